"""The loss in chunks is the loss, and takes less memory."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minitransformer.architecture.embeddings import LMHead, TokenEmbedding, TransformedHead
from minitransformer.models.build import build_head
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.text.batches import IGNORE
from minitransformer.training.objectives import cross_entropy
from minitransformer.training.objectives.cross_entropy import score_tokens, summed_loss, token_losses, tokens_at_once

D, VOCAB = 6, 11


def tied(**options: Any) -> LMHead:
    return LMHead(D, VOCAB, tied_to=TokenEmbedding(VOCAB, D), **options)


def narrow() -> nn.Module:
    config = ModelConfig(d_model=D, num_heads=1, embedding_dim=4, vocab_size=VOCAB)
    return build_head(config, TokenEmbedding(VOCAB, D, embedding_dim=4))


HEADS = {
    "untied": lambda: LMHead(D, VOCAB),
    "tied": tied,
    "bias": lambda: LMHead(D, VOCAB, bias=True),
    "scale": lambda: tied(scale=D**-0.5),
    "softcap": lambda: LMHead(D, VOCAB, softcap=3.0),
    "transformed": lambda: TransformedHead(D, tied(bias=True), activation=F.gelu, norm=nn.LayerNorm(D)),
    "narrow": narrow,
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return HEADS[request.param]().double()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens at once as there are features."""
    monkeypatch.setattr(cross_entropy, "FEWEST_LOGITS", {"cpu": 0})


def hidden_states(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def targets_for(hidden: Tensor, ignored: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(VOCAB, hidden.shape[:-1], generator=generator)
    return targets.masked_fill(torch.rand(targets.shape, generator=generator) < ignored, IGNORE)


def plain(head: nn.Module, hidden: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    logits = head(hidden).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=label_smoothing)


def gradients(loss: Any, head: nn.Module, hidden: Tensor, targets: Tensor) -> list[Tensor]:
    """The value of `loss`, and its gradients times 3, as if more had been made of it."""
    hidden = hidden.clone().requires_grad_()
    value = loss(head, hidden, targets)
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    return [value.detach(), *torch.autograd.grad(3 * value, [hidden, *weights])]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_values_and_gradients_are_those_of_plain_cross_entropy(head: nn.Module, label_smoothing: float) -> None:
    hidden = hidden_states(3, 9)
    assert hidden.numel() / D > 4 * tokens_at_once(head, hidden)
    targets = targets_for(hidden)
    expected = gradients(partial(plain, label_smoothing=label_smoothing), head, hidden, targets)
    actual = gradients(partial(summed_loss, label_smoothing=label_smoothing), head, hidden, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        value = summed_loss(head, hidden, targets, label_smoothing=label_smoothing)
    torch.testing.assert_close(value, expected[0], rtol=1e-14, atol=0)


@given(st.integers(1, 40), st.floats(0, 1))
def test_any_number_of_tokens_of_which_any_may_be_ignored(length: int, ignored: float) -> None:
    head, hidden = LMHead(D, VOCAB).double(), hidden_states(length)
    targets = targets_for(hidden, ignored)
    expected, actual = (gradients(loss, head, hidden, targets) for loss in (plain, summed_loss))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_under_autocast_chunks_differ_by_the_rounding_of_bf16_alone(head: nn.Module) -> None:
    head = head.float()
    hidden = hidden_states(3, 9, dtype=torch.float32)
    targets = targets_for(hidden)
    exact = gradients(plain, head, hidden, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden).dtype == torch.bfloat16
        actual = gradients(summed_loss, head, hidden, targets)
    for ours, true in zip(actual, exact, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - true).norm() <= 2**-6 * true.norm()


def test_weights_that_are_frozen_get_no_gradient(head: nn.Module) -> None:
    next(head.parameters()).requires_grad_(False)
    hidden = hidden_states(3, 9)
    targets = targets_for(hidden)
    expected, actual = (gradients(loss, head, hidden, targets) for loss in (plain, summed_loss))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_a_tied_table_sums_the_gradients_of_both_its_uses() -> None:
    model = build_model(ModelConfig(d_model=8, num_heads=2, num_layers=1, vocab_size=VOCAB, context_length=32)).double()
    tokens = torch.randint(VOCAB, (2, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for loss in (plain, summed_loss):
        model(tokens[:, :-1], readout=partial(loss, targets=tokens[:, 1:])).backward()
        found.append([weight.grad for weight in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_scores_say_which_targets_have_the_highest_logit(head: nn.Module) -> None:
    hidden = hidden_states(3, 9)
    targets = targets_for(hidden)
    with torch.no_grad():
        nats, right = score_tokens(head, hidden, targets)
        assert torch.equal(right, head(hidden).argmax(-1) == targets)
        torch.testing.assert_close(nats.sum(), plain(head, hidden, targets))
        assert torch.equal(nats, token_losses(head, hidden, targets))
        assert (nats == 0).equal(targets == IGNORE)


def test_few_logits_are_made_at_once_and_many_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rows = []
    head = LMHead(4, 1 << 14)
    head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for length in (1024, 1025):
        summed_loss(head, torch.zeros(length, 4), torch.zeros(length, dtype=torch.long))
    assert rows == [1024, 1024, 1]


STEP = """
import re, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from minitransformer.architecture.embeddings import LMHead
from minitransformer.training.objectives.cross_entropy import summed_loss

def plain(head, hidden, targets):
    return F.cross_entropy(head(hidden), targets, reduction="sum")

head, hidden = LMHead(16, 50257), torch.randn(4096, 16, requires_grad=True)
if len(sys.argv) > 1:
    loss = {"plain": plain, "chunks": summed_loss}[sys.argv[1]]
    loss(head, hidden, torch.zeros(4096, dtype=torch.long)).backward()
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_chunks_take_a_quarter_of_the_memory_of_all_logits_at_once() -> None:
    def peak(*how: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", STEP, *how], capture_output=True, text=True, check=True).stdout
        )

    nothing, plain, chunks = peak(), peak("plain"), peak("chunks")
    assert chunks - nothing < (plain - nothing) / 4


def test_a_frozen_head_is_read_in_smaller_chunks_and_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    head = LMHead(8, 11).double()
    hidden = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (30,))
    [expected] = torch.autograd.grad(summed_loss(head, hidden, targets), hidden)
    monkeypatch.setitem(cross_entropy.FEWEST_LOGITS, "cpu", 88)
    assert tokens_at_once(head, hidden) == 8
    head.requires_grad_(False)
    assert tokens_at_once(head, hidden) == 2
    [frozen] = torch.autograd.grad(summed_loss(head, hidden, targets), hidden)
    torch.testing.assert_close(frozen, expected)
