"""What commands and ranks find when they fork: modules that they import late, and the speed that each process measures.

The speed is only reported, and takes a third of a run of a few steps.
"""

from __future__ import annotations

import filelock  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.nn.parallel
import tyro

from minitransformer.commands import doctor, sample, train, verify_resume  # noqa: F401
from minitransformer.commands.campaign import Options
from minitransformer.training.machine import peak_flops
from tests import collectives_for_tests, ranks_for_tests, recovery_on_ranks_for_tests, starts_for_tests  # noqa: F401

peak_flops(torch.device("cpu"), torch.float32)
tyro.cli(Options, args=[])
