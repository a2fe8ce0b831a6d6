"""Continue a prompt: `python sample.py [RUN] [--prompt TEXT]`; `python sample.py --help` names every flag."""

import sys

from minitransformer.commands import start

if __name__ == "__main__":
    sys.exit(start("sample", sys.argv[1:]))
