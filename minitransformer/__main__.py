"""`python -m minitransformer COMMAND`, installed as `minitransformer`."""

from __future__ import annotations

import sys

from minitransformer.commands import DONE, HELP, USAGE, start, with_exit_code
from minitransformer.registry import lookup

COMMANDS = {
    "train": "train a model, resume a run, or fine-tune one",
    "data": "report and remove what training is better without",
    "tokenize": "turn text into shards of tokens, for data larger than memory",
    "doctor": "say whether a training run would work, and what it needs",
    "sample": "continue texts, converse, fill in masks, translate",
    "evaluate": "measure a model on data that it has not learned",
    "memorisation": "measure what of its training text a model repeats",
    "serve": "answer requests over HTTP, as OpenAI's API does",
    "drift": "say whether a served model still fits its use",
    "feedback": "make fine-tuning data from what users say of answers",
    "promote": "serve another run if it is better, or go back",
    "embed": "turn texts into vectors",
    "look": "show attention, predictions and residual norms, as a page",
    "replay": "repeat the last step of a run that has diverged, and show where",
    "compare": "compare runs: settings, curves, significance across seeds",
    "sweep": "search settings: grid, random draws, successive halving",
    "verify-resume": "prove on this machine that a run resumes exactly, bit for bit",
    "campaign": "prove that no kill, full disk or damaged file loses a run",
    "lab": "run experiments on norm placement, each with a report",
    "bench": "measure speed and memory beside peers and limits",
    "import": "turn a public checkpoint into a run",
    "merge": "bake an adapter into its base, or average checkpoints",
    "compress": "make a smaller run: fewer bits, weights or layers",
    "export": "export a model to another runtime, with a certificate",
}


@with_exit_code
def main() -> int:
    """Run the command that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in HELP:
        print("usage: minitransformer COMMAND [--help | options]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:14} {what}")
        return DONE if arguments else USAGE
    lookup("command", arguments[0], COMMANDS)
    return start(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
