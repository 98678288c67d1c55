"""What the main programs share: arguments, logging, signals, one-line errors, exit codes, the body of those that train.

PyTorch is imported inside the functions that need it: programs that need no model start in a third of the time.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from egohod import config
from egohod.config import IS_CHECKOUT, PROJECT, Config
from egohod.errors import BROKEN, DONE, INTERRUPTED, UNREAD, USER_ERROR, UserError
from egohod.knobs import help_text, knobs
from egohod.runtime import STOP_SIGNALS, Interrupted, RankInfo, StopRequest, locked, process_tqdm, rank_info

if TYPE_CHECKING:
    from egohod.distributed import Distributed

log = logging.getLogger(__name__)

# A program that saved and left before its end because a signal asked it to exits with DONE, and creates the file that
# this variable names: launchers (exps/launch.sh, tools/submit.py) then start it again.
UNFINISHED = "EGOHOD_UNFINISHED"
# A user's mistake is mostly the same in all processes: the first one reports it, and by then the launcher has ended
# the others. The same goes for the lost connection to a process that died.
REPORT_AFTER_SECONDS = 5.0
# Launchers signal all processes of a run in the same moment, or nearly so.
SIGNAL_SPREAD_SECONDS = 2.0
# File descriptors of standard output and standard error.
_OUTPUT = (1, 2)

# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------


class _HelpWithKnobs(argparse.ArgumentParser):
    schema: type = Config

    def format_help(self) -> str:
        # Built for --help only, and not wrapped as argparse wraps an epilog.
        explained = "Every knob, as section.key=default (type; allowed values) and its reason:"
        return f"{super().format_help()}\n{explained}\n\n{help_text(self.schema)}\n"


def parser(description: str, default_config: str, schema: type = Config) -> argparse.ArgumentParser:
    """The arguments that every main program takes; programs add their own.

    ``schema`` holds the knobs, all of which ``--help`` explains.
    """
    result = _HelpWithKnobs(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.schema = schema
    add_config_file(result, default_config)
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change single knobs, e.g. train.lr=1e-4"
    )
    return result


def add_config_file(parser: argparse.ArgumentParser, default: str) -> None:
    """``--config_file``; its default is a file of the project, whatever the working directory is. All other relative
    paths, on a command line or in a configuration, are relative to the working directory."""
    path = default if Path.cwd() == PROJECT else str(PROJECT / default)
    parser.add_argument("--config_file", default=path, metavar="YAML", help=f"default: {default} of the project")


def overrides(args: argparse.Namespace) -> list[str]:
    """The knobs set on the command line, ``--strict`` being one of them."""
    return [*args.overrides, *(["data.strict=true"] if args.strict else [])]


def model_of(checkpoint: str, overrides: Sequence[str] = ()) -> list[str]:
    """The model that a checkpoint holds, as overrides: they count more than a configuration file.

    ``overrides`` are the command line's, of which ``model.weights.base`` counts. Raises :class:`UserError` if the
    checkpoint cannot be read.
    """
    from egohod.evaluation.embed import OUTSIDE
    from egohod.model.checkpoints import PUBLISHED_SETTINGS
    from egohod.training.checkpoint import open_weights

    # A model of another project brings all of its settings.
    if checkpoint.startswith(OUTSIDE):
        return []
    base = [text.partition("=")[2] for text in overrides if text.startswith("model.weights.base=")]
    content = open_weights(checkpoint, base=base[-1] if base else None)
    if content.family.is_clip:
        # Files beside the weights may say what they were trained with; all else is for the configuration to choose.
        return [f"{name}={value}" for name, value in content.settings.items() if name in PUBLISHED_SETTINGS]
    # A file of a later release may have knobs that this one lacks.
    allowed = {name for name, _, _ in knobs(Config)}
    settings = {f"model.{name}": value for name, value in content.model_knobs.items()}
    return [f"{name}={value}" for name, value in settings.items() if name in allowed]


# --------------------------------------------------------------------------------------------------
# Running a program: logging, errors, exit codes
# --------------------------------------------------------------------------------------------------


def run(program: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a main program; a :class:`UserError` becomes one line per problem on stderr and exit code 2.

    See :func:`while_read` for a standard output that is closed.
    """
    return while_read(lambda: _run(program, arguments))


def _run(program: Callable[[Sequence[str]], int], arguments: Sequence[str] | None) -> int:
    info = RankInfo()

    def print_error(message: str) -> None:
        print(f"[rank {info.rank}] error: {message}" if info.rank else f"error: {message}", file=sys.stderr)

    try:
        info = rank_info()
        set_up_logging(info)
        return program(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        # Raised before the processes have joined, when all make the same mistake; joined() handles the others.
        if info.rank != 0:
            time.sleep(REPORT_AFTER_SECONDS)
        for line in str(error).splitlines():
            print_error(line)
        return USER_ERROR
    except Interrupted as reason:
        log.info("%s: stopped; rerun the same command to resume", reason)
        if UNFINISHED in os.environ and info.rank == 0:
            Path(os.environ[UNFINISHED]).touch()
        return DONE
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return INTERRUPTED
    except UnicodeEncodeError as error:
        if not re.search("[\udc80-\udcff]", str(error.object)):
            raise
        # Python's stand-ins for bytes of a file name that are no UTF-8: nothing that is written may hold them.
        print_error(f"{os.fsencode(str(error.object)[:200])!r}: a name that is not UTF-8; rename the file or folder")
        return USER_ERROR
    except ImportError as error:
        if (error.name or "").startswith("egohod"):  # our own fault, which pip cannot cure
            raise
        cure = "-r requirements.txt" if IS_CHECKOUT else "'egohod[all]'"
        print_error(f"a package that this command needs cannot be imported: {error}; pip install {cure}")
        return USER_ERROR
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            raise
        print_error(f"{error.filename or 'a file'}: {error.strerror}" if error.strerror else str(error))
        return BROKEN


def while_read(program: Callable[[], int]) -> int:
    """What ``program`` returns, or silently 141 when the reader of its output leaves (``... | head -1``).

    Names that cannot be printed, as those of files that are not UTF-8, are printed with escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return program()
        finally:
            # Here, or Python would flush it after the last handler, and complain.
            sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        # Python would complain when it fails to write what is left at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in _OUTPUT:
            os.dup2(nowhere, descriptor)
        return UNREAD


def _output_is_closed() -> bool:
    # Other pipes may break too, as those to workers, so that the exception alone says nothing.
    poll = select.poll()
    for descriptor in _OUTPUT:
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class LogOutput(logging.StreamHandler):
    """Log lines on standard output, for programs whose output they are; ends them when it is closed."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def handleError(self, record: logging.LogRecord) -> None:
        """Pass on that the output is closed, which logging would report once a line."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise
        super().handleError(record)


class _AroundBars(logging.StreamHandler):
    """Log lines on standard error, above the progress bars that are drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:  # no bar was ever drawn, and importing it would take longer than the line
            super().emit(record)
            return
        with process_tqdm().external_write_mode(file=self.stream):
            super().emit(record)


def set_up_logging(info: RankInfo) -> None:
    """Log lines with time and rank on stderr; only the first process logs more than warnings."""
    prefix = f"[rank {info.rank}] " if info.world_size > 1 else ""
    logging.basicConfig(
        level=logging.INFO if info.rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[_AroundBars()],
        force=True,
    )
    # All processes read the same configuration: one of them warns of its old names.
    logging.getLogger("egohod.config").setLevel(logging.NOTSET if info.rank == 0 else logging.ERROR)
    # Of the client of the Hub: a line for each request, or each that failed, with its address, which may be signed.
    for name, level in {"httpx": "WARNING", "httpx2": "WARNING", "huggingface_hub.file_download": "ERROR"}.items():
        logging.getLogger(name).setLevel(level)


# --------------------------------------------------------------------------------------------------
# Runs of several processes
# --------------------------------------------------------------------------------------------------


@contextmanager
def joined(cfg: Config, *, stops_cleanly: bool = False, inference: bool = False) -> Iterator[Distributed]:
    """This process's place in the run, left at the end.

    With ``stops_cleanly`` the signals that ask a run to stop raise :class:`Interrupted`, or are left to the training
    loop; with ``inference`` nothing is trained. Raises :class:`UserError` on every process if the processes do not run
    the same code and configuration, and :class:`ConnectionError` when another process died or does not come to a
    collective operation in time.
    """
    from egohod.distributed import first_lines, is_connection_error, require_agreement, setup

    train = cfg.train
    dist = setup(train.device, inference=inference, timeout=train.collective_timeout, deterministic=train.deterministic)
    try:
        with stop_signals(dist.stop) if stops_cleanly else nullcontext():
            try:
                require_agreement(cfg, dist)
                yield dist
                # Nobody leaves before the first process has written what comes last: if it cannot, the run has failed.
                # A signal must no longer end one process alone, which the others would take for its death.
                dist.stop.at_once = False
                dist.gather_objects(None)
            except Interrupted:
                # The others must get their signal before they notice that this process is gone.
                if dist.stop.was_raised and dist.world_size > 1:
                    time.sleep(SIGNAL_SPREAD_SECONDS)
                raise
    except UserError as error:
        if dist.world_size == 1:
            raise
        if dist.is_first_with(str(error)):
            # Not later, as _run would: the launcher ends this process as soon as another one notices that it failed.
            rank = f"[rank {dist.rank}] " if dist.rank else ""
            print(*(f"{rank}error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr, flush=True)
        if dist.is_main:
            dist.wait_for_others_with(str(error), REPORT_AFTER_SECONDS)
        raise SystemExit(USER_ERROR) from None
    except RuntimeError as error:
        if dist.world_size == 1:
            raise
        if is_connection_error(error) and dist.stop:
            raise Interrupted(dist.stop.reason) from None
        # At once, by every process: when the first one leaves, a launcher ends the others, and what they would have
        # printed on their way out is lost.
        log.error("this process stops after %s", first_lines(error))
        if not is_connection_error(error):
            raise
        message = (
            "another process of this run died, or did not come within train.collective_timeout="
            f"{cfg.train.collective_timeout:g} s (the error is logged above); the launcher's report names "
            "the one that failed first; rerun the same command to resume from the last checkpoint"
        )
        if dist.is_main:
            log.error("%s", message)
        # The launcher, if there is one, ends this process here: its report is about the one that failed first.
        time.sleep(REPORT_AFTER_SECONDS)
        raise ConnectionError(message) from None
    finally:
        dist.close(after_error=sys.exc_info()[0] is not None)


@contextmanager
def stop_signals(stop: StopRequest) -> Iterator[None]:
    """Within, signals that ask a run to stop become requests, which raise :class:`Interrupted` where they may.

    Repeats change nothing (launchers send several); a second Ctrl-C ends the process at once.
    """
    previous: dict[signal.Signals, Any] = {}

    def receive(number: int, frame: FrameType | None) -> None:
        stop.request(f"{signal.Signals(number).name} received")
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])
        # Once only: a repeat must not break into the way out.
        if stop.at_once and not stop.was_raised:
            stop.was_raised = True
            raise Interrupted(stop.reason)

    for each in STOP_SIGNALS:
        previous[each] = signal.signal(each, receive)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


@contextmanager
def claimed_run(folder: str, dist: Distributed) -> Iterator[None]:
    """Within, no other process may use the run folder; the first process of a run holds the claim for all.

    Raises :class:`UserError` if another process holds it, or if the folder cannot be made.
    """
    with ExitStack() as claim:
        if dist.is_main:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                claim.enter_context(locked(Path(folder) / ".lock"))
            except BlockingIOError as error:
                raise UserError(f"{folder}: another run is writing here; choose another folder") from error
            except OSError as error:
                raise UserError(f"{folder}: cannot be used as run folder: {error.strerror or error}") from error
        yield


def train_and_report(description: str, default_config: str, arguments: Sequence[str]) -> int:
    """The whole of a program that trains, from its command line to results.json and report.html; the exit code."""
    options = parser(description, default_config)
    add = options.add_argument
    weights = "start from these weights, a run or a file, with the model that they are of"
    add("--checkpoint", metavar="PATH", help=weights)
    add("--resume", metavar="auto|none|PATH", help="same as train.resume=...")
    add("--strict", action="store_true", help="same as data.strict=true")
    add("--dry_run", action="store_true", help="build everything, try three clips and one step, explain, exit")
    args = options.parse_intermixed_args(arguments)
    # Here, because they take seconds, which neither --help nor a misspelt argument should.
    from egohod.evaluation.embed import fingerprint
    from egohod.evaluation.report import write_report
    from egohod.evaluation.results import write_results
    from egohod.evaluation.runner import named_evaluators
    from egohod.training.build import build_classes, build_data, build_model, dry_run, read_tables
    from egohod.training.telemetry import require_trackers
    from egohod.training.train import train

    changes = [*overrides(args), *([f"train.resume={args.resume}"] if args.resume else [])]
    if args.checkpoint:
        start = ["model.weights.source=checkpoint", *model_of(args.checkpoint, changes)]
        changes = [*start, *changes, f"model.weights.path={args.checkpoint}"]
    if args.dry_run:
        dry_run(args.config_file, changes, named_evaluators)
        return DONE

    cfg = config.load(args.config_file, changes)
    require_trackers(cfg)
    with joined(cfg, stops_cleanly=True) as dist, claimed_run(cfg.train.output, dist):
        # Without heads the clips are read last, when all else has been checked.
        tables = read_tables(cfg) if cfg.model.heads != "none" else None
        classes = build_classes(cfg, tables)
        model = build_model(cfg, dist, classes, tables)
        data = build_data(cfg, dist, model, tables)
        # Before training: what is wrong with a benchmark shows now, not after days.
        val = named_evaluators(cfg, dist, "val", classes=classes)
        test = named_evaluators(cfg, dist, "test", controls=cfg.evaluate.controls, classes=classes)
        scores = train(cfg, dist, model, data, val)
        # The test set is evaluated once, when training is done: it must not influence any choice.
        if test:
            results = [(each, each.measure(model)) for each in test]
            checkpoint = {"path": cfg.train.output, "sha256": fingerprint(model)}
            write_results(cfg.train.output, cfg, dist, results, checkpoint=checkpoint, also=scores)
            if dist.is_main:
                write_report(cfg.train.output, decoder=cfg.data.decoder)
    return DONE
