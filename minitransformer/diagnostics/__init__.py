"""What can be measured of a model: at rest, on a batch, and while it trains.

`probe` measures a model as it is; `TrainingProbe` is what `train.py --probe` switches on.
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
