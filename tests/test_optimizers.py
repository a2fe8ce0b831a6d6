"""The optimizers: what they update, and that they are what their papers and PyTorch say."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minitransformer.models.model import build_model
from minitransformer.training.light import LightAdamW
from minitransformer.training.muon import Muon, jordan, nearest_to_one, orthogonalise, polar_express
from minitransformer.training.optimizers import AdamW, Optimizer, Rates, build_optimizers
from tests.runs_for_tests import TINY

SETTINGS = Rates(lr=0.1, embedding_lr=0.1, head_lr=0.1, weight_decay=0.1)


def test_only_matrices_decay():
    model = build_model(TINY.model)
    [optimizer] = build_optimizers(AdamW.choose(), model, SETTINGS)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.dim() > 1 else 0.0) for p in model.parameters())


@pytest.mark.parametrize("name", Optimizer.registry)
@pytest.mark.parametrize("tied", [True, False])
def test_every_optimizer_updates_every_weight_once(name, tied):
    model = build_model(replace(TINY.model, tied_embeddings=tied, bias=True, positions="learned", qk_norm="head"))
    updated = [
        id(p)
        for o in build_optimizers(Optimizer.choose(name), model, SETTINGS)
        for g in o.param_groups
        for p in g["params"]
    ]
    assert sorted(updated) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    ("quintics", "seen", "least", "most"),
    # How small a singular value is lifted, and what all those become.
    [(jordan(5), 0.03, 0.3, 1.3), (polar_express(3), 5e-4, 0.07, 1.94), (polar_express(6), 5e-4, 0.96, 1.04)],
)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 999))
def test_orthogonalising_keeps_directions_and_makes_their_sizes_alike(
    quintics, seen, least, most, rows, columns, count, seed
):
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    sizes = (u.mT @ orthogonalise(matrices, quintics) @ v.mT).diagonal(dim1=1, dim2=2)
    lifted = s / s.norm(dim=1, keepdim=True) > seen
    assert ((sizes > least) & (sizes < most))[lifted].all()


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(0, 999))
def test_rounding_to_bfloat16_makes_nothing_grow(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(4, rows, rank, generator=generator) @ torch.randn(4, rank, columns, generator=generator)
    for quintics in (jordan(5), polar_express(3), polar_express(5), polar_express(8)):
        orthogonal = orthogonalise(matrices.bfloat16(), quintics).float()
        assert torch.linalg.matrix_norm(orthogonal, 2).max() < 2.2


@given(st.floats(1e-3, 0.9), st.floats(1.0, 2.0), st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3))
def test_no_other_polynomial_is_nearer_to_one(lowest, highest, others):
    x = torch.linspace(lowest, highest, 4001, dtype=torch.float64)

    def distance(a, b, c):
        return (a * x + b * x**3 + c * x**5 - 1).abs().max().item()

    quintic, most = nearest_to_one(lowest, highest)
    assert distance(*quintic) == pytest.approx(most, rel=1e-4, abs=1e-7)
    assert distance(*(q + other for q, other in zip(quintic, others, strict=True))) >= most * (1 - 1e-4) - 1e-7


def test_adamw_is_torchs_own_bit_for_bit():
    ours, theirs = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    optimizers = [kind([p], lr=0.1, fused=True) for kind, p in ((LightAdamW, ours), (torch.optim.AdamW, theirs))]
    for _ in range(4):
        ours.grad = torch.randn(5, 3)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_is_torchs_own_up_to_its_bfloat16(shape):
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    muon = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.2)
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)


def test_muon_takes_matrices_of_a_shape_together_as_it_would_alone():
    together = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in alone)]
    for p, q in zip(together, alone, strict=True):
        p.grad = torch.randn(4, 6)
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q)
