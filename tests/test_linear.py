"""Linear maps of one input: together they are what they are one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minitransformer.architecture.linear import ScoreProjection
from minitransformer.models.joined import project_together


@pytest.mark.parametrize("bias", [True, False])
def test_maps_project_together_are_the_maps_in_values_and_gradients(bias: bool) -> None:
    maps = [ScoreProjection(5, 4, bias=bias), nn.Linear(5, 2, bias=bias), nn.Linear(5, 7, bias=bias)]
    x = torch.randn(2, 3, 5, requires_grad=True)
    inputs = [x, *(weight for linear in maps for weight in linear.parameters())]
    together, alone = project_together(x, *maps), [linear(x) for linear in maps]
    torch.testing.assert_close(list(together), alone)
    gradients = [torch.autograd.grad(sum(y.square().sum() for y in ys), inputs) for ys in (together, alone)]  # type: ignore[arg-type]
    torch.testing.assert_close(*gradients)


def test_a_map_that_does_something_else_does_it_and_one_that_is_listened_to_is_heard() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    maps, x, heard = [Doubled(3, 2), nn.Linear(3, 2)], torch.randn(4, 3), []
    torch.testing.assert_close(project_together(x, *maps)[0], maps[0](x))
    plain = [nn.Linear(3, 2), nn.Linear(3, 2)]
    plain[1].register_forward_hook(lambda module, inputs, output: heard.append(output))
    result = project_together(x, *plain)
    assert heard[0] is result[1]
