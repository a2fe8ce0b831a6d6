"""Start-up time of commands."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from minitransformer.benchmark.case import BenchSetting, Case, Contestant, Subject, Work

ROOT = Path(__file__).parents[3]


class StartUp(Subject, name="start-up"):
    """Seconds of each command's `--help`, compared with importing torch."""

    about = "seconds of --help, compared with `import torch`"

    def cases(self) -> Iterator[Case]:
        commands = {
            "import torch": ["-c", "import torch"],
            "train.py --help": [*_script("train"), "--help"],
            "sample.py --help": [*_script("sample"), "--help"],
        }
        entries = [
            Contestant(name, partial(_work, self.setting, tuple(command)), base=name == "import torch")
            for name, command in commands.items()
        ]
        yield Case.of("start-up", "s", entries, lower_is_better=True)


def _script(name: str) -> list[str]:
    """The script in the checkout, or in an installed package, the corresponding command."""
    script = ROOT / f"{name}.py"
    return [str(script)] if script.is_file() else ["-m", "minitransformer", name]


def _work(setting: BenchSetting, command: tuple[str, ...]) -> Work:
    def sample() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    return Work(sample)
