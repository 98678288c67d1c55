"""Fine-tune a pretrained video and text encoder: ``egohod finetune``, also where egohod is not installed.

    python main_finetune.py --config_file configs/finetune/demo_mir.yml model.weights.path=runs/demo
    python main_finetune.py --help

The program is egohod/commands/finetune.py.
"""

import sys

from egohod import cli
from egohod.commands.finetune import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
