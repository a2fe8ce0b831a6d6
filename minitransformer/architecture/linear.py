"""Linear layers with a special role."""

from torch import nn


class ScoreProjection(nn.Linear):
    """A linear layer that only determines attention scores or routing; initialisations check for it."""


class OutputProjection(nn.Linear):
    """The last linear layer of a sublayer, which writes to the residual stream; initialisations check for it."""
