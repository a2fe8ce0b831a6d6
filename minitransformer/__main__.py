"""`python -m minitransformer COMMAND`, installed as `minitransformer`."""

from __future__ import annotations

import sys

from minitransformer.commands import run_command, start
from minitransformer.registry import lookup

COMMANDS = {
    "train": "train a model, or resume a run",
    "sample": "continue, fill or translate a text with the model of a run",
    "look": "show attention, predictions and residual norms for a text, as a page",
    "compare": "runs beside each other: settings, curves, and which differences the seeds bear out",
    "sweep": "search hyper-parameters of a preset: grid, random draws, successive halving",
    "lab": "experiments on where the norm stands, each with a report",
    "bench": "speed and memory, beside peers and beside what the machine can do",
    "import": "make a run of a public checkpoint",
    "export": "write the model of a run as the transformers library opens it",
}


def main() -> int:
    """Hand the rest of the command line to the command that it names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: minitransformer COMMAND [--help | options]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:10} {what}")
        return 0 if arguments else 2

    def command() -> int:
        lookup("command", arguments[0], COMMANDS)
        return start(arguments[0], arguments[1:])

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
