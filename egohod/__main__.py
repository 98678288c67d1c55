"""The command ``egohod``: one name for all programs, wherever the package is installed.

``COMMANDS`` is the only list of them. A module of egohod.commands or tools takes the arguments in its ``main``; what it
needs is imported when it is chosen, so that the overview is printed at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from egohod.errors import DONE, UserError, nearest

# Command: its module, and what it does in a line.
COMMANDS = {
    "Train": {
        "demo": ("commands.demo", "render the demo world, train on it and evaluate: ten minutes on two cores"),
        "pretrain": ("commands.pretrain", "train a video and a text encoder on narrated clips"),
        "finetune": ("commands.finetune", "fine-tune for graded retrieval or action classes"),
        "rerank": ("tools.train_reranker", "train a second stage of retrieval over frozen towers"),
        "submit": ("tools.submit", "submit training to a Slurm cluster"),
    },
    "Evaluate": {
        "eval": ("commands.eval", "evaluate a checkpoint on one benchmark or on all"),
        "benchmarks": ("commands.benchmarks", "list what there is to evaluate on"),
        "report": ("tools.report", "write report.html of an evaluation again"),
        "mean": ("tools.mean_results", "average several evaluations, such as EGTEA's three splits"),
        "probe": ("tools.probe", "linear and k-NN probes of frozen features"),
        "probe-order": ("tools.probe_order", "measure whether a model reads the order of frames"),
        "robot": ("tools.robot", "success of a simulated robot that sees through a model's features"),
        "check-submission": ("tools.check_submission", "check a file for an EPIC-KITCHENS-100 challenge"),
        "relevancy": ("tools.build_relevancy", "build or compare EK100's relevancy matrix"),
    },
    "Use a model on your videos": {
        "extract": ("tools.extract_features", "embed videos: features for search or for another model"),
        "search": ("tools.search", "find the clips that match a sentence"),
        "serve": ("tools.serve", "search, watch and mark moments of your videos in a browser"),
        "predict": ("tools.predict", "score sentences or classes over a video"),
        "convert": ("tools.convert_checkpoint", "describe a checkpoint, or write its weights under other names"),
        "models": ("tools.model_cards", "describe models and their published weights"),
    },
    "Data": {
        "data": ("tools.prepare_data", "clips of any annotations, index of tar shards, videos to download"),
        "chunk": ("tools.chunk_videos", "cut long videos into chunks that load fast"),
        "verify": ("tools.verify_dataset", "open every clip and list what cannot be read"),
        "show": ("tools.show_batch", "draw a batch as the model sees it"),
        "hod": ("tools.generate_hod", "generate hand-object narrations from videos"),
        "hod detect": ("tools.detect_hands", "find and draw hands, and what they touch, in pictures and videos"),
        "show-hod": ("tools.visualize_hod", "show what the narration pipeline detected and wrote"),
        "exchange": ("tools.exchange", "clips and boxes to FiftyOne, Rerun, CVAT and Label Studio, and boxes back"),
        "opposites": ("tools.opposites", "add opposite captions, or captions with another verb, to a table"),
        "demo-world": ("tools.make_demo_data", "render the demo world"),
    },
    "Measure": {
        "bench": ("tools.bench", "measure decoding, loading, training steps and memory on this machine"),
        "gpu-check": ("tools.gpu_check", "check and measure a GPU"),
        "ablate": ("tools.ablate", "train the rows of a study with several seeds"),
    },
}
MODULES = {command: module for group in COMMANDS.values() for command, (module, _) in group.items()}


def overview() -> str:
    """All commands by group."""
    width = max(map(len, MODULES)) + 2
    lines = ["usage: egohod COMMAND [arguments]; egohod COMMAND --help explains one"]
    for title, group in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {command:{width}}{line}" for command, (_, line) in group.items())]
    # Not egohod.config.PROJECT, which takes longer to import than all of this.
    package = Path(__file__).resolve().parent
    folders = [folder / "docs" for folder in (package, package.parent) if (folder / "docs").is_dir()]
    lines += ["", *(f"The pages that messages name as docs/PAGE.md are in {folder}" for folder in folders)]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the program that the first argument names. Raises :class:`UserError` if there is none."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if rest and f"{command} {rest[0]}" in MODULES:  # a command of two words
        command, rest = f"{command} {rest[0]}", rest[1:]
    if command in ("-h", "--help"):
        print(overview())
        return DONE
    if command == "--version":
        print(importlib.import_module("egohod").__version__)
        return DONE
    if command not in MODULES:
        raise UserError(f"egohod {command}: no such command{nearest(command, [*MODULES])}")
    package, name = MODULES[command].split(".")
    if package == "tools":
        # Under their own names, as `python tools/NAME.py` runs them: they import each other's common parts from there.
        from egohod.config import PROJECT

        if (folder := str(PROJECT / "tools")) not in sys.path:
            sys.path.insert(0, folder)
    else:
        name = f"egohod.{package}.{name}"
    sys.argv[0] = f"egohod {command}"  # argparse names the program after it
    program = importlib.import_module(name).main
    try:
        if {"-h", "--help"}.isdisjoint(rest):
            return int(program(rest))
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                return int(program(rest))
        finally:
            print(in_commands(printed.getvalue()), end="")
    except UserError as error:
        # The cure that it names must be one that this user has.
        error.args = tuple(in_commands(str(line)) for line in error.args)
        raise


def in_commands(text: str) -> str:
    """A program's help or error with the commands instead of the files that a checkout runs."""
    for command, module in MODULES.items():
        package, name = module.split(".")
        file = re.escape(f"tools/{name}.py" if package == "tools" else f"main_{name}.py")
        text = re.sub(rf"(torchrun\b.*?) {file}", rf"\1 -m egohod {command}", text)
        text = re.sub(rf"(python )?(?<![\w/.-]){file}", f"egohod {command}", text)  # not within another path
    return text


def run() -> None:
    """The entry point of the command; see :func:`egohod.cli.run` for exit codes."""
    if sys.argv[1:] in ([], ["-h"], ["--help"], ["--version"]):
        sys.exit(main(sys.argv[1:]))  # without the half second that importing the rest takes
    from egohod import cli

    sys.exit(cli.run(main))


if __name__ == "__main__":
    run()
