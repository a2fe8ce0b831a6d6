"""The linear maps of a transformer that play a role of their own."""

from torch import nn


class ScoreProjection(nn.Linear):
    """A linear map that only says where to look, such as that of queries and keys; initialisations ask for it."""


class OutputProjection(nn.Linear):
    """The last linear map of a sublayer, whose output is added to the residual stream; initialisations ask for it."""
