"""Continue a prompt: `python sample.py [RUN] [--prompt TEXT]`; `python sample.py --help` names every flag."""

import sys

from minitransformer.commands.sample import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
