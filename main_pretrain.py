"""Train a video and a text encoder on narrated clips: ``egohod pretrain``, also where egohod is not installed.

    python main_pretrain.py --config_file configs/demo.yml
    python main_pretrain.py --help

The program is egohod/commands/pretrain.py.
"""

import sys

from egohod import cli
from egohod.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
