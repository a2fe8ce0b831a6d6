"""Train a model: `python train.py [PRESET] [--flag value]`; `python train.py --help` names them all."""

import sys

from minitransformer.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
