"""Train a model: `python train.py [PRESET] [--flag value]`; `python train.py --help` lists every flag."""

import sys

from minitransformer.commands import start

if __name__ == "__main__":
    sys.exit(start("train", sys.argv[1:]))
