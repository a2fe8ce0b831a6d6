"""How weights start: one initialisation is one class, found by its name."""

from __future__ import annotations

from torch import Tensor, nn

from minitransformer.architecture.embeddings import LMHead
from minitransformer.architecture.linear import OutputProjection
from minitransformer.architecture.norms import Norm
from minitransformer.registry import Registered


class Initialisation(Registered, kind="initialisation"):
    """Draws each kind of weight, in place, for a model of `num_sublayers` residual branches.

    Biases start at 0 and norms as identity under every scheme.
    """

    def __init__(self, num_sublayers: int) -> None:
        self.num_sublayers = num_sublayers

    def linear(self, weight: Tensor) -> None:
        raise NotImplementedError

    def embedding(self, weight: Tensor) -> None:
        raise NotImplementedError

    def output_projection(self, weight: Tensor) -> None:
        """The weights through which a sublayer writes to the residual stream."""
        self.linear(weight)

    def head(self, weight: Tensor) -> None:
        """The weights of an untied language-model head."""
        self.embedding(weight)


class GPT2(Initialisation, name="gpt2"):
    """N(0, 0.02²); output projections N(0, (0.02/√num_sublayers)²). Radford et al. 2019 (GPT-2), section 2.3."""

    def linear(self, weight: Tensor) -> None:
        nn.init.normal_(weight, std=0.02)

    embedding = linear

    def output_projection(self, weight: Tensor) -> None:
        nn.init.normal_(weight, std=0.02 * self.num_sublayers**-0.5)


class Xavier(Initialisation, name="xavier"):
    """U(±√(6 / (fan_in + fan_out))), embeddings N(0, 1/d_model). Glorot and Bengio 2010, equation 16."""

    def linear(self, weight: Tensor) -> None:
        nn.init.xavier_uniform_(weight)

    def embedding(self, weight: Tensor) -> None:
        nn.init.normal_(weight, std=weight.size(1) ** -0.5)


class Small(Initialisation, name="small"):
    """N(0, 2 / (5 d_model)), embeddings too. Nguyen and Salazar 2019 (arXiv 1910.05895), section 2.2."""

    def linear(self, weight: Tensor) -> None:
        nn.init.normal_(weight, std=(2 / (5 * weight.size(1))) ** 0.5)

    embedding = linear

    def output_projection(self, weight: Tensor) -> None:
        nn.init.normal_(weight, std=(2 / (5 * weight.size(0))) ** 0.5)


class ZeroOutput(GPT2, name="zero-output"):
    """GPT-2's, but every sublayer starts as zero, the stack as identity. Zhang et al. 2019 (arXiv 1901.09321)."""

    def output_projection(self, weight: Tensor) -> None:
        nn.init.zeros_(weight)


def initialise(model: nn.Module, scheme: Initialisation) -> None:
    """Draw every weight of `model` by `scheme`; a module with weights of a kind that no rule names is an error."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        match module:
            case nn.Embedding():
                scheme.embedding(module.weight)
            case LMHead() if id(module.weight) in tables:
                pass
            case LMHead():
                scheme.head(module.weight)
            case OutputProjection():
                scheme.output_projection(module.weight)
            case nn.Linear():
                scheme.linear(module.weight)
            case nn.GRU():
                _gru(module, scheme)
            case Norm():
                continue
            case _:
                assert not list(module.parameters(recurse=False)), f"no rule starts the weights of {module}"
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _gru(module: nn.GRU, scheme: Initialisation) -> None:
    """Each gate's input weights as linear maps, its recurrent ones orthogonal: Bahdanau et al. 2014, appendix B.1."""
    for name, parameter in module.named_parameters():
        for gate in parameter.detach().chunk(3):
            if name.startswith("bias"):
                nn.init.zeros_(gate)
            elif name.startswith("weight_hh"):
                nn.init.orthogonal_(gate)
            else:
                scheme.linear(gate)
