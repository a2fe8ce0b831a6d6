"""Placements with n streams between sublayers, [batch, length, n, d_model].

Notation: X are the streams, one in each row, f is the sublayer (attention or feed-forward), N the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.architecture.residual.base import RMS_EPS, MakeNorm, Place, Residual, Sublayer
from minitransformer.settings import setting


class MHCLite(Residual, name="mhc-lite"):
    """X ← H X + 2 σ(w)ᵀ f(N(σ(r) X)), where H = Σ_k softmax(h)_k P_k over all permutations P_k of the n streams.

    H is doubly stochastic. r and w [n] and h [n!] are computed per token: s · (vec X / RMS(vec X)) W + b, with initial
    W = 0, s = 0.01, and b such that H is near the identity and the k-th sublayer reads and writes mostly stream
    k mod n. All streams start as x; the output is N of their sum. Yang and Gao 2026 (mHC-lite, arXiv
    2601.05732), as in the authors' code (FFTYYY/mhc-lite), except that it draws which stream is
    read most, sums N of each stream, and has a gain before W, which W can absorb.
    """

    has_final_norm = True

    @dataclass(frozen=True)
    class Settings:
        streams: int = setting(4, at_least=2, at_most=6, help="number n of parallel residual streams")

    class Shared(Residual.Shared):
        def __init__(self, settings: MHCLite.Settings, places: Sequence[Place]) -> None:
            super().__init__(settings, places)
            self.streams = settings.streams

        def open(self, x: Tensor) -> Tensor:
            return x[..., None, :].expand(*x.shape[:-1], self.streams, -1)

        def state(self, stream: Tensor) -> Tensor:
            return stream.sum(-2)

    def __init__(self, settings: Settings, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        n = settings.streams
        orders = list(permutations(range(n)))
        self.register_buffer("permutations", torch.eye(n)[torch.tensor(orders)], persistent=False)
        self.sizes = [n, n, len(orders)]
        favourite = torch.full((n,), -1.0)
        favourite[place.index % n] = 1.0
        mixing = torch.full((len(orders),), -8.0)
        mixing[0] = 0.0  # of the identity
        self.maps = nn.Parameter(torch.zeros(n * place.d_model, sum(self.sizes)))
        self.scales = nn.Parameter(torch.full((3,), 0.01))
        self.biases = nn.Parameter(torch.cat([favourite, favourite, mixing]))

    def forward(self, stream: Tensor, sublayer: Sublayer) -> Tensor:
        flat = stream.flatten(-2)
        projected = (F.rms_norm(flat, flat.shape[-1:], eps=RMS_EPS) @ self.maps).split(self.sizes, -1)
        parts = zip(self.scales, projected, self.biases.split(self.sizes), strict=True)
        read, write, mix = (scale * part + bias for scale, part, bias in parts)
        branch = self.dropout(sublayer(self.norm((read.sigmoid()[..., None] * stream).sum(-2))))
        mixing = torch.einsum("...k,kij->...ij", mix.softmax(-1), self.permutations)
        return mixing @ stream + 2 * write.sigmoid()[..., None] * branch[..., None, :]
