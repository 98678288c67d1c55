"""Evaluate a checkpoint: ``egohod eval``, also where egohod is not installed.

    python main_eval.py --config_file configs/demo.yml --checkpoint runs/demo
    python main_eval.py --help

The program is egohod/commands/eval.py.
"""

import sys

from egohod import cli
from egohod.commands.eval import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
