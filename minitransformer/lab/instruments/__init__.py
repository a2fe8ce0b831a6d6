"""What can be measured of a model: at rest, on a batch, and while it trains.

`probe` measures a model as it stands; `TrainingProbe` is what `train.py --probe` switches on.
"""

from minitransformer.lab.instruments import attention, gradients, layers, streams
from minitransformer.lab.instruments.base import Instrument
from minitransformer.lab.instruments.passage import Loss
from minitransformer.lab.instruments.probe import TrainingProbe, check_probe, probe, probe_for

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
