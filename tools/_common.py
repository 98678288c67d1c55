"""What all tools share: the project importable, one parser, one way to start, to load and to write.

Import it before egohod. Python puts this folder on sys.path when it starts a tool, from whatever folder, so that
``from _common import ...`` always works; egohod itself is installed by exps/setup.sh, but not in a read-only checkout
nor in a mere clone of the repository. This module is the one place that makes up for it. In a wheel this folder is
egohod/tools.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
# In front: a copy of egohod elsewhere on the path must not be mixed with these tools. In a wheel this is the package
# itself, whose modules must not become importable as config, data and so on.
if (ROOT / "egohod").is_dir() and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from egohod import cli, config
from egohod.config import Config
from egohod.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def tool_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser for a tool without configuration knobs; ``description`` is its docstring, printed as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_tool(main: Callable[[Sequence[str]], int]) -> None:
    """Run ``main`` on the command line and exit: one line per mistake on stderr and exit code 2, see egohod.cli."""
    # Not sys.exit(main()) in each tool: all exit codes and one-line errors are decided in one place.
    sys.exit(cli.run(main))


def log_to_stdout() -> None:
    """Log plain lines on standard output: for tools whose output they are. Call it in ``main``, within run_tool."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[cli.LogOutput()], force=True)


def load_for_checkpoint(args: argparse.Namespace) -> Config:
    """The configuration of ``--config_file`` for the model of ``--checkpoint``.

    The checkpoint's own model settings come before the command line's, so that a user can still override them.
    """
    model = cli.model_of(args.checkpoint, args.overrides)
    # Nothing is trained, so no low-rank parts are added and no base file is compared.
    last = [f"model.weights.path={args.checkpoint}", "train.trainable=all"]
    return config.load(args.config_file, ["model.weights.source=checkpoint", *model, *args.overrides, *last])


def save_picture(picture: Image | Figure, path: Path) -> None:
    """Save a PIL image or a matplotlib figure; raise :class:`UserError` where that cannot be done."""
    try:
        if hasattr(picture, "savefig"):
            # Without any layout a matplotlib figure's labels are outside the picture.
            if picture.get_layout_engine() is None:
                picture.tight_layout()
            picture.savefig(path, dpi=90)
        else:
            picture.save(path)
    except (OSError, ValueError) as error:  # ValueError: an ending that names no picture format
        raise UserError(f"cannot write {path}: {error}") from error


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head_line, *lines = ("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (head, *rows))
    return [head_line, "|" + "---|" * len(head), *lines]
