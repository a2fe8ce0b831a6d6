"""Diagnostics of a model: in eval mode on a batch, and during training.

`probe` measures a model as it is; `TrainingProbe` implements `train.py --probe`.
"""

from minitransformer.diagnostics import attention, gradients, layers, streams
from minitransformer.diagnostics.activations import Loss
from minitransformer.diagnostics.base import Diagnostic
from minitransformer.diagnostics.measuring import TrainingProbe, check_probe, probe, probe_for

__all__ = [
    "Diagnostic",
    "Loss",
    "TrainingProbe",
    "attention",
    "check_probe",
    "gradients",
    "layers",
    "probe",
    "probe_for",
    "streams",
]
