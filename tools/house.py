"""Measure the shape of the code base: size, function length, imports, comments, and the files that one clip crosses.

python tools/house.py                    # a table: each measure, its value, its limit
python tools/house.py --details          # also what is behind each number: the files, cycles, names
python tools/house.py --check            # exit code 1 when a limit is exceeded
python tools/house.py --only egohod/data # lines, functions, comments and names of one package
python tools/house.py --trace            # also the files that run for one clip, in training and in the HOD pipeline

Counts cover the Python outside tests/. Imports count wherever they are written, also inside functions, because an
import that is delayed to hide a cycle is still a cycle; those under TYPE_CHECKING do not count: they never run.
"""

from __future__ import annotations

import ast
import builtins
import io
import statistics
import sys
import tempfile
import threading
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from _common import ROOT, run_tool, tool_parser

from egohod.errors import UserError

# Parts of identifiers that no field uses; words of the domain that contain one are allowed by name.
BANNED_PARTS = frozenset(["told", "said", "asked", "found", "kept", "owed", "known", "say"])
ALLOWED_NAMES = frozenset[str]()
# Modules behind a protocol may have a single importer: the registry or factory that chooses among them. Commands are
# behind the table of egohod/__main__.py, and a judge is what check.judge names.
VARIANTS = (
    "egohod.commands.", "egohod.data.formats.", "egohod.hod.detectors.", "egohod.hod.narrators.", "egohod.loss.",
    "egohod.hod.judge", "egohod.robot.",
)  # fmt: skip

# 24,100 is what was planned for the features of the time, and what more formats of input added.
LINES = (
    "1,700 of the excess are comments (8.6 % of all lines, once 2.7 %); the rest are features and checks that no merge "
    "of duplicates took away; 3,600 are for GPUs and clusters: 1,300 of gpu_check, 900 of training (memory, "
    "deadlines, saving, speed, trackers), 700 of loading (tar shards, read-ahead, workers), the rest of set-up, "
    "models; 2,500 are for backbones, low-rank parts and sharding, 3,700 for benchmarks, submissions and losses of "
    "others, 1,500 for the robot, 4,000 for the Hub, export, the page of serve and formats of others, "
    "4,500 for the HOD pipeline: 900 of the 100DOH detector and its folder command, 1,100 of camera, 3-D hands and "
    "relations, 700 of batches, captions and cost, 900 of vocabulary and judge, 900 of shards, pages and a benchmark"
)


@dataclass
class Measure:
    """One row of the table; ``limit`` is (lowest, highest), None for no bound on that side.

    ``reason``: why a limit that is exceeded is not met, printed below the row.
    """

    name: str
    value: float
    limit: tuple[float | None, float | None]
    details: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the value is within its limit."""
        low, high = self.limit
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def __str__(self) -> str:
        low, high = self.limit
        bound = f">= {low:g}" if high is None else f"<= {high:g}" if low is None else f"{low:g} to {high:g}"
        # In words: a colour would be lost in a log.
        row = f"{self.name:58} {self.value:>9,.6g}   {bound:>10}   {'' if self.is_met else 'EXCEEDED'}"
        return row if self.is_met or not self.reason else f"{row}\n    {self.reason}"


@dataclass(frozen=True)
class Module:
    """A source file of the project."""

    path: Path
    name: str
    text: str
    tree: ast.Module


def main(argv: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--details", action="store_true", help="list what is behind each number")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a limit is exceeded")
    parser.add_argument("--only", default="", metavar="PATH", help="a folder or file: what it has a share in")
    parser.add_argument("--trace", action="store_true", help="run one clip through training and the HOD pipeline")
    args = parser.parse_args(argv)
    measures = measure(read_modules(ROOT), args.only)
    if args.trace:
        measures += trace()
    # Measures that are met are printed as well: the table is the report.
    for each in measures:
        print(each)
        if args.details:
            print("".join(f"    {line}\n" for line in each.details), end="")
    return int(args.check and not all(each.is_met for each in measures))


def read_modules(root: Path) -> list[Module]:
    """Every Python file of the project outside tests/."""
    modules = []
    # Sorted: lists of names must not depend on the file system.
    for path in (path for below in ("egohod/**/", "tools/**/", "") for path in sorted(root.glob(f"{below}*.py"))):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        modules.append(Module(path, name, text, ast.parse(text)))
    return modules


def measure(modules: Sequence[Module], only: str = "") -> list[Measure]:
    """All measures that need no running code; imports are always those of the whole project."""
    names = {each.name for each in modules}
    imports = {each.name: _imports(each, names) for each in modules}
    # A package's cycles and importers are mostly outside it: these two are always of the whole project.
    modules = [each for each in modules if str(each.path.relative_to(ROOT)).startswith(only)]
    if not modules:
        raise UserError(f"--only {only}: no Python file of the project begins with this path; e.g. egohod/data")
    lines = sum(len(each.text.splitlines()) for each in modules)
    comments = sum(_comment_lines(each.text) for each in modules)
    # Python starts with a cycle as long as one side is delayed; a reader does not.
    cycles = _cycles(imports)
    lonely = _single_importers(imports)
    # Each class is a promise that somebody catches it by type.
    exceptions = _exception_classes(modules)
    banned = [f"{each.name}: {name}" for each in modules for name in sorted(_banned_identifiers(each.tree))]
    # A median and not a mean: a few long tables must not hide that all else is chopped.
    lengths = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for each in modules
        for node in ast.walk(each.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return [
        Measure("Python files", len(modules), (None, 100)),
        Measure("lines", lines, (None, 24_100), reason=LINES),
        # A file of settings may have no function, and an empty file no line: nothing of them is too short.
        *([Measure("median function, lines", statistics.median(lengths), (10, 15))] if lengths else []),
        *([Measure("comment lines, percent", round(100 * comments / lines, 1), (8, None))] if lines else []),
        Measure("import cycles, lazy imports included", len(cycles), (None, 0), [" -> ".join(each) for each in cycles]),
        Measure("modules with one importer, not behind a protocol", len(lonely), (None, 0), lonely),
        Measure("exception classes", len(exceptions), (None, 12), exceptions),
        Measure("identifiers with a banned part", len(banned), (None, 0), banned),
    ]


def _comment_lines(text: str) -> int:
    # By tokens: a # within a string is no comment.
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def _imports(module: Module, names: set[str]) -> set[str]:
    # Anywhere in it, also within functions.
    imported = set()
    for node in _executed(module.tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # "from egohod.data import video" imports a module, "from egohod.data.videos import X" a name of one.
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= (parts & names) or {node.module}
            imported |= {f"tools.{name}" for name in parts}
    # Tools import each other without the name of their folder, which is on sys.path.
    return {name if name in names else f"tools.{name}" for name in imported} & names - {module.name}


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        # Never run: annotations may point upwards.
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _executed(child)


def _cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    # Breadth first from each module: one shortest cycle through it. A cycle is met from each of its modules.
    cycles: dict[frozenset[str], list[str]] = {}
    for start in imports:
        paths = [[start]]
        seen = {start}
        while paths:
            path = paths.pop(0)
            if start in imports[path[-1]] and len(path) > 1:
                cycles.setdefault(frozenset(path), [*path, start])
                break
            for follower in sorted(imports[path[-1]] - seen):
                seen.add(follower)
                paths.append([*path, follower])
    return list(cycles.values())


def _single_importers(imports: dict[str, set[str]]) -> list[str]:
    # Such a module is a part of its importer that a reader has to open another file for.
    lonely = []
    for name in imports:
        importers = [other for other, targets in imports.items() if name in targets]
        if name.startswith("egohod.") and len(importers) == 1 and not name.startswith(VARIANTS):
            lonely.append(f"{name} <- {importers[0]}")
    return lonely


def _exception_classes(modules: Sequence[Module]) -> list[str]:
    bases = {
        node.name: (each.name, [ast.unparse(base).rpartition(".")[2] for base in node.bases])
        for each in modules
        for node in ast.walk(each.tree)
        if isinstance(node, ast.ClassDef)
    }

    # By name: importing every module to ask its classes would start torch.
    def is_exception(name: str) -> bool:
        builtin = getattr(builtins, name, None)
        if isinstance(builtin, type):
            return issubclass(builtin, BaseException)
        return name in bases and any(is_exception(base) for base in bases[name][1])

    return [f"{module}.{name}" for name, (module, _) in bases.items() if is_exception(name)]


def _banned_identifiers(tree: ast.AST) -> set[str]:
    # Where a name is defined: its uses follow, and those of other libraries are not ours.
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names - ALLOWED_NAMES if BANNED_PARTS & set(name.lower().strip("_").split("_"))}


def trace() -> list[Measure]:
    """The files of the package that run for one clip: from csv row to loss, and from video to HOD csv.

    On the shortest path: a small dual encoder with the contrastive loss, boxes from a file, no workers. What is built
    once for all clips (tables, model, optimizer, choice of a detector) is left out.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from egohod.demo import make_world

        # The smallest world there is, cut to the first clip of each table.
        make_world(folder / "world", scale=0.01, workers=1, splits=["train"])
        for table in ("hod.csv", "narrations.csv"):
            path = folder / "world" / "train" / table
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
        # Twice: what only the first clip of a process runs, such as delayed imports, is not on a clip's way.
        training = [_trace_training(folder) for _ in range(2)][-1]
        pipeline = [_trace_pipeline(folder, f"hod{number}.csv") for number in range(2)][-1]
    return [
        Measure("files that a training clip runs through, row to loss", len(training), (None, 12), training),
        Measure("files that a clip runs through, video to HOD csv", len(pipeline), (None, 14), pipeline),
    ]


@contextmanager
def _traced(files: set[str], folder: str = "egohod") -> Iterator[None]:
    """Within, add the files of ``folder`` whose functions are called, also by threads that start meanwhile."""

    def record(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        # A module's body runs when it is imported: that is set-up.
        if event == "call" and code.co_filename.startswith(f"{ROOT / folder}/") and code.co_name != "<module>":
            files.add(str(Path(code.co_filename).relative_to(ROOT)))

    threading.setprofile(record)
    sys.setprofile(record)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@contextmanager
def _traced_rows(files: set[str]) -> Iterator[None]:
    """Within, which opens an annotation file, add what parses its rows. Choosing the format is set-up."""
    opened: set[str] = set()
    with _traced(opened, "egohod/data/formats"):
        yield
    files |= {each for each in opened if not each.endswith("__init__.py")}


def _trace_training(folder: Path) -> list[str]:
    """A batch of one clip through the loader and a training step of a tiny model."""
    from egohod import config
    from egohod.data.loader import train_loader
    from egohod.distributed import setup
    from egohod.training.build import build_data, build_model
    from egohod.training.step import TrainStep

    split = folder / "world" / "train"
    knobs = [f"data.train.demo.metadata={split}/hod.csv", f"data.train.demo.root={split}/videos", "data.workers=0"]
    knobs += ["data.hard_negatives.share=0", "train.global_batch_size=1", "train.device=cpu", "model.num_frames=2"]
    # Given, not searched for: how many clips fit the memory is set-up.
    cfg = config.load(ROOT / "configs" / "demo.yml", [*knobs, "train.max_batch_per_process=1"])
    dist = setup("cpu", alone=True)
    model = build_model(cfg, dist)
    files: set[str] = set()
    with _traced_rows(files):
        data = build_data(cfg, dist, model)
    # Optimizer and schedule are built once a run: set-up, like the model.
    step = TrainStep(model, cfg, dist, total_steps=1, steps_per_epoch=1)
    batches = train_loader(data.dataset, data.plan, start_step=0, total_steps=1, workers=0)
    with _traced(files):
        for batch in batches:
            step(1, [batch])
    return sorted(files)


def _trace_pipeline(folder: Path, output: str) -> list[str]:
    """One clip through all stages of the HOD pipeline, with the world's true boxes and template narrations."""
    from egohod.hod import config
    from egohod.hod.pipeline import build
    from egohod.hod.store import Shard

    split = folder / "world" / "train"
    knobs = [f"source.metadata={split}/narrations.csv", f"source.root={split}/videos", f"output={folder / output}"]
    # Without workers: a profile function sees its own process alone.
    knobs += [f"detector.options.path={split}/detections.parquet", "demo.folder=null", "workers=0"]
    cfg = config.load(ROOT / "configs" / "hod" / "demo.yml", knobs)
    files: set[str] = set()
    with _traced_rows(files):
        pipeline = build(cfg)
        # Reads the files of detections and chooses the detector by its name, once for all clips: set-up too.
        pipeline.stages[0].prepare()
    with _traced(files):
        pipeline.run_all(Shard())
        pipeline.finish(Shard())
        pipeline.merge(1)
    return sorted(files)


if __name__ == "__main__":
    run_tool(main)
