"""Placements with one defect each: some from published code, and at least one per placement.

Each replaces its parent, and is not registered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.architecture.residual import (
    GPAS,
    Admin,
    AttentionResiduals,
    B2TConnection,
    BranchGains,
    DeepNorm,
    HybridNorm,
    HybridNormStar,
    Keel,
    LayerNormScaling,
    MHCLite,
    MixLN,
    NoNorm,
    OLMo2,
    PeriLN,
    Place,
    PostLN,
    PreLN,
    ResiDual,
    Residual,
    SandwichLN,
    ScaledPreLN,
    ScaledResiDual,
    SiameseNorm,
    ValueResidual,
)
from minitransformer.architecture.residual.base import MakeNorm, Sublayer


class InvertedBeta(DeepNorm):
    """β = (8L)^¼: the sign of the exponent is lost, as in released baselines."""

    @staticmethod
    def constants(place: Place) -> tuple[float, float]:
        alpha, beta = DeepNorm.constants(place)
        return alpha, 1 / beta


class FixedAlpha(DeepNorm):
    """α of a stack of 32 layers at every depth, as in released baselines."""

    @staticmethod
    def constants(place: Place) -> tuple[float, float]:
        return (2 * 32) ** 0.25, DeepNorm.constants(place)[1]


class TorchscaleBeta(DeepNorm):
    """β of an encoder beside a decoder is 1.15 (N⁴M)^-¹⁄₁₆, as in torchscale: 1/0.87 in place of 0.87."""

    @staticmethod
    def constants(place: Place) -> tuple[float, float]:
        alpha, beta = DeepNorm.constants(place)
        return alpha, beta / 0.87 * 1.15 if place.partner_layers and not place.has_memory else beta


class ScoresScaledToo(DeepNorm):
    """Queries and keys start β times as large too."""

    def branch_gains(self) -> BranchGains:
        return BranchGains(self.beta, self.beta)


class AlphaOfTheOtherStack(DeepNorm):
    """α and β of a decoder beside an encoder are those of the encoder."""

    @staticmethod
    def constants(place: Place) -> tuple[float, float]:
        if place.has_memory:
            place = replace(place, num_layers=place.partner_layers, partner_layers=place.num_layers, has_memory=False)
        return DeepNorm.constants(place)


class NoFinalNorm(PreLN):
    """Nothing normalises what the head reads."""

    has_final_norm = False


class TwoFinalNorms(PreLN):
    """The stack's own final norm, and one more before the head."""

    @classmethod
    def make_final_norm(cls, settings: Any, make_norm: MakeNorm) -> nn.Module:
        return nn.Sequential(make_norm(), make_norm())


class IdleLayers(PreLN):
    """The second half of the layers does nothing."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x if self.place.layer >= self.place.num_layers // 2 else super().forward(x, sublayer)


class CrossAttentionUnnormalised(PreLN):
    """x ← x + f(x) around cross-attention."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        if self.place.sublayer == "cross_attention":
            return x + sublayer(x)
        return super().forward(x, sublayer)


class StreamScaledToo(ScaledPreLN):
    """x ← m (x + f(N(x)))."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.multiplier * (x + sublayer(self.norm(x)))


class FinalNormAfterPost(PostLN):
    """Post-LN with Pre-LN's final norm: the last layer is normalised twice."""

    has_final_norm = True


class SandwichSwapped(SandwichLN):
    """x ← x + N₁(f(N₂(x))): each norm has the gains of the other."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.norm(sublayer(self.output_norm(x)))


class PeriWithoutEmbeddingNorm(PeriLN):
    """Embeddings are not normalised."""

    has_embedding_norm = False


class OLMo2NormOfTheSum(OLMo2):
    """x ← N(x + f(x))."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.norm(x + sublayer(x))


class FinalNormAfterNone(NoNorm):
    """The output is normalised."""

    has_final_norm = True


class AdminScalesBranch(Admin):
    """x ← N(x + ω ⊙ f(x))."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.norm(x + self.omega * self.dropout(sublayer(x)))


class AdminFromVariance(Admin):
    """Calibration sets ω to the variance, without its root."""

    class Shared(Admin.Shared):
        @torch.no_grad()
        def calibrate(self, connections: Sequence[Residual], run: Callable[[], object]) -> None:
            super().calibrate(connections, run)
            for connection in connections:
                connection.omega.square_()  # type: ignore[operator]


class LayerNormScalingWithoutRoot(LayerNormScaling):
    """x ← x + f(N(x) / l)."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.scale = 1 / (place.layer + 1)


class LayerNormScalingGoesOn(LayerNormScaling):
    """A decoder counts its layers from the last of the encoder."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.scale = (place.layer + 1 + place.has_memory * place.partner_layers) ** -0.5


class KeelCountsLayers(Keel):
    """α is the number of layers."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.alpha = float(place.num_layers)


class KeelForgetsCrossAttention(Keel):
    """α is two a layer, with cross-attention too."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.alpha = 2.0 * place.num_layers


class MixFirstLayerOnly(MixLN):
    """Post-LN in the first layer, at every depth."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.connection = (PreLN if place.layer else PostLN)(settings, make_norm, dropout, place)


class MixByTheOtherStack(MixLN):
    """A decoder's first quarter is as many layers as that of the encoder."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        num_layers = place.partner_layers if place.has_memory else place.num_layers
        self.connection = (PostLN if place.layer < num_layers // 4 else PreLN)(settings, make_norm, dropout, place)


class HybridWithoutQKVNorm(HybridNorm):
    """Attention does not normalise its queries, keys and values."""

    has_qkv_norm = False


class HybridAddsInput(HybridNorm):
    """x ← x + f(N(x)) around feed-forward networks."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x)))


class HybridCrossAttention(HybridNorm):
    """x ← N(x) + f(N(x)) around cross-attention too."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        if place.sublayer == "cross_attention":
            self.norm = make_norm()


class HybridStarIsHybrid(HybridNormStar):
    """The first block is like all others."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.connection = HybridNorm(settings, make_norm, dropout, place)


class B2TWithoutBottom(B2TConnection):
    """The input of a block never reaches its end."""

    def forward(self, stream: tuple[Tensor, Tensor], sublayer: Sublayer) -> tuple[Tensor, Tensor]:
        bottom, x = stream
        return bottom, self.norm(x + self.dropout(sublayer(x)))


class B2TWithoutGains(B2TConnection):
    """Weights start as large at every depth."""

    def branch_gains(self) -> BranchGains:
        return BranchGains()


class B2TAtCrossAttention(B2TConnection):
    """Cross-attention adds the bottom too."""

    def forward(self, stream: tuple[Tensor, Tensor], sublayer: Sublayer) -> tuple[Tensor, Tensor]:
        bottom, x = stream
        if self.place.sublayer == "cross_attention":
            return bottom, self.norm(bottom + x + self.dropout(sublayer(x)))
        return super().forward(stream, sublayer)


class ResiDualWithoutEmbedding(ResiDual):
    """y starts from 0."""

    class Shared(ResiDual.Shared):
        def open(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.zeros_like(x)


class ResiDualEpsOfOthers(ResiDual):
    """The last norm has the eps of all others."""

    @classmethod
    def make_final_norm(cls, settings: Any, make_norm: MakeNorm) -> nn.Module:
        return make_norm()


class ResiDualNormOfBoth(ResiDual):
    """The output is N(x + y)."""

    class Shared(ResiDual.Shared):
        def close(self, stream: tuple[Tensor, Tensor], final_norm: nn.Module) -> Tensor:
            return final_norm(stream[0] + stream[1])


class ScaledResiDualFullEmbedding(ScaledResiDual):
    """y starts from x in place of η x."""

    class Shared(ScaledResiDual.Shared):
        def open(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x


class SiameseWithoutTwo(SiameseNorm):
    """x ← x + o / √l."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.scale = (place.layer + 1) ** -0.5


class SiameseFromRawStream(SiameseNorm):
    """x ← x + o / √(2l) from x before its norm."""

    def forward(self, stream: tuple[Tensor, Tensor], sublayer: Sublayer) -> tuple[Tensor, Tensor]:
        x, y = stream
        branch = self.dropout(sublayer(self.input_norm(self.norm(x) + self.other_norm(y))))
        return x + self.scale * branch, y + branch


class GPASScalesGradient(GPAS):
    """x ← x − SiLU(g) x: the gradient shrinks too."""

    def forward(self, stream: tuple[Tensor, Tensor], sublayer: Sublayer) -> tuple[Tensor, Tensor]:
        x, gates = stream
        x = x + self.dropout(sublayer(self.norm(x)))
        return x - F.silu(gates[self.place.layer]) * x, gates


class GPASBeforeSum(GPAS):
    """x ← x − SiLU(g) sg(x) + f(N(x)): the branch is not scaled."""

    def forward(self, stream: tuple[Tensor, Tensor], sublayer: Sublayer) -> tuple[Tensor, Tensor]:
        x, gates = stream
        branch = self.dropout(sublayer(self.norm(x)))
        return x - F.silu(gates[self.place.layer]) * x.detach() + branch, gates


class MHCLiteTakesTurnsByLayer(MHCLite):
    """The layer, and not the sublayer, says which stream is read and written the most."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, replace(place, sublayer="parallel"))
        self.place = place


class MHCLiteWritesOnce(MHCLite):
    """X ← H X + σ(w)ᵀ f(N(σ(r) X)): the factor 2 is lost."""

    def forward(self, stream: Tensor, sublayer: Sublayer) -> Tensor:
        return super().forward(stream, lambda x, **given: sublayer(x, **given) / 2)


class AttentionResidualsWithoutLastQuery(AttentionResiduals):
    """The output is N of the mean of all v: there is no query at the end."""

    class Shared(AttentionResiduals.Shared):
        def close(self, stream: tuple[Tensor, ...], final_norm: nn.Module) -> Tensor:
            return final_norm(torch.stack(stream).mean(0) + 0 * self.query)


class ValueResidualFromBefore(ValueResidual):
    """Values are mixed with those of the layer before, and not with those of the first."""

    def forward(self, stream: tuple[Tensor, Tensor | None], sublayer: Sublayer) -> tuple[Tensor, Tensor | None]:
        if not self.has_values:
            return super().forward(stream, sublayer)
        own: list[Tensor] = []

        def attend(x: Tensor, mix_values: Callable[[Tensor], Tensor]) -> Tensor:
            def keep(values: Tensor) -> Tensor:
                own.append(values)
                return mix_values(values)

            return sublayer(x, mix_values=keep)

        return super().forward(stream, attend)[0], own[0]
