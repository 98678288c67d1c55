"""Parts that a job can do without, in an environment where they are broken: real processes, packages that raise."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support import ROOT, Command

# As protobuf speaks where the generated code of tensorboard is of another version.
TOO_NEW = "raise TypeError('Descriptors cannot be created directly.\\nIf this call came from a _pb2.py file ...')"
# Left over from a terminal that a notebook opened; the module is not installed here.
NOTEBOOK = "module://no_such_notebook.backend_inline"

DRAWING = """
import os, sys
sys.path.insert(0, "tools")
import ablate, predict
import numpy as np
from pathlib import Path
from egohod.evaluation.report import confusion_plot
folder = Path(sys.argv[1])
predict._draw(folder / "timeline.png", [(0.0, 2.0), (2.0, 4.0)], ["cut", "wash"], np.array([[0.5, 0.25], [0.1, 0.9]]))
row = {"title": "one", "seeds": {"0": {"val": {10: {"motion": 50.0}, 20: {"motion": 60.0}}}}}
ablate.plot({"metrics": {"motion": "motion"}, "chance": {"motion": 50.0}, "rows": {"one": row}}, folder / "curves.png")
(folder / "confusion.png").write_bytes(confusion_plot([[0, 0, 9], [1, 0, 3]], ["cut", "wash"]))
print(os.environ["MPLBACKEND"])
"""


def package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)


def test_plots_are_drawn_whatever_backend_a_notebook_left_behind(tmp_path: Path, program: Command) -> None:
    done = program("-c", DRAWING, tmp_path, MPLBACKEND=NOTEBOOK)
    assert done.returncode == 0, done.stderr
    for name in ("timeline", "curves", "confusion"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert done.stdout == f"{NOTEBOOK}\n"


def test_a_broken_matplotlib_costs_the_plots_only(tmp_path: Path, program: Command) -> None:
    package(tmp_path / "broken", "matplotlib", "raise ImportError('numpy.core.multiarray failed to import')")
    module = "egohod.evaluation.report"
    code = f"from {module} import confusion_plot; print([confusion_plot([[0, 0, 9]], 'a') for _ in 'ab'])"
    done = program("-c", code, PYTHONPATH=f"{tmp_path}/broken:{ROOT}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[None, None]\n"
    assert done.stderr.count("no plots: matplotlib cannot be used (numpy.core.multiarray failed to import)") == 1


def test_a_broken_tensorboard_costs_its_own_file_only(tiny_config: Path, tmp_path: Path, program: Command) -> None:
    package(tmp_path / "broken", "tensorboard", TOO_NEW)
    # As on a machine for which it has no wheels: nothing imports it unless it is chosen.
    package(tmp_path / "broken", "decord", "raise ImportError('no decord here')")
    path = f"{tmp_path}/broken:{ROOT}"
    command = ["--config_file", str(tiny_config), "train.duration=1 steps"]
    done = program("main_pretrain.py", *command, PYTHONPATH=path, MPLBACKEND=NOTEBOOK)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no TensorBoard, metrics.jsonl only: TypeError: Descriptors cannot be created") == 1
    assert "decord" not in done.stderr
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
