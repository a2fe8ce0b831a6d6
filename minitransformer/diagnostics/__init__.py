"""What can be measured of a model: at rest, on a batch, and while it trains.

`probe` measures a model as it stands; `TrainingProbe` is what `train.py --probe` switches on.
"""

from minitransformer.diagnostics import attention, gradients, layers, streams
from minitransformer.diagnostics.base import Instrument
from minitransformer.diagnostics.passage import Loss
from minitransformer.diagnostics.probe import TrainingProbe, check_probe, probe, probe_for

__all__ = [
    "Instrument",
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
