"""What the main programs share: arguments, logging, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from egohod.config import PROJECT, Config
from egohod.errors import UserError
from egohod.knobs import help_text, knobs
from egohod.place import Place, find_place
from egohod.runtime import locked
from egohod.stopping import Interrupted, RunFailed

if TYPE_CHECKING:
    from egohod.distributed import Distributed

log = logging.getLogger(__name__)

# Exit codes: the run is done, something broke, the user can mend it, the user stopped it, nobody reads what it prints
# any more (as a shell reports a program that SIGPIPE ended).
DONE, BROKEN, USER_ERROR, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
# File descriptors of standard output and standard error.
_OUTPUT = (1, 2)
# A program that saved and left before its end because a signal asked it to exits with DONE, and creates the file that
# this variable names: launchers (exps/launch.sh, tools/submit.py) then start it again.
UNFINISHED = "EGOHOD_UNFINISHED"
# A user's mistake is mostly the same in all processes: the first one speaks, and by then the launcher has ended others.
SPEAK_AFTER_SECONDS = 5


class _HelpWithKnobs(argparse.ArgumentParser):
    """``--help`` ends with every knob of the configuration."""

    schema: type = Config

    def format_help(self) -> str:
        explained = "Every knob, as section.key=default (type; allowed values) and its reason:"
        return f"{super().format_help()}\n{explained}\n\n{help_text(self.schema)}\n"


def parser(description: str, default_config: str, schema: type = Config) -> argparse.ArgumentParser:
    """The arguments that every main program takes; programs add their own. ``schema`` holds the knobs."""
    made = _HelpWithKnobs(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.schema = schema
    add_config_file(made, default_config)
    made.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change single knobs, e.g. train.lr=1e-4"
    )
    return made


def add_config_file(parser: argparse.ArgumentParser, default: str) -> None:
    """``--config_file``; its default is a file of the project, wherever the user stands. All else that is relative on
    a command line or in a configuration is so to where the user stands."""
    here = default if Path.cwd() == PROJECT else str(PROJECT / default)
    parser.add_argument("--config_file", default=here, metavar="YAML", help=f"default: {default} of the project")


def training_parser(description: str, default_config: str) -> argparse.ArgumentParser:
    """The arguments of the programs that train; :func:`training_overrides` reads them."""
    made = parser(description, default_config)
    made.add_argument("--resume", metavar="auto|none|PATH", help="same as train.resume=...")
    made.add_argument("--strict", action="store_true", help="same as data.strict=true")
    made.add_argument(
        "--dry_run", action="store_true", help="build everything, try three clips and one step, explain, leave"
    )
    return made


def overrides(args: argparse.Namespace) -> list[str]:
    """The knobs set on the command line, ``--strict`` being one of them."""
    return [*args.overrides, *(["data.strict=true"] if args.strict else [])]


def training_overrides(args: argparse.Namespace) -> list[str]:
    """As :func:`overrides`, ``--resume`` being another one."""
    return [*overrides(args), *([f"train.resume={args.resume}"] if args.resume else [])]


def run(program: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a main program; a :class:`UserError` becomes one line per problem on stderr and exit code 2.

    See :func:`while_read` for a standard output that is closed.
    """
    return while_read(lambda: _run(program, arguments))


def while_read(program: Callable[[], int]) -> int:
    """What ``program`` returns, or 141 without a word when the reader of its output leaves (``... | head -1``).

    Names that cannot be printed, as those of files that are not UTF-8, are printed with escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return program()
        finally:
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
    """Whether nobody reads this process's output any more; other pipes may break too, as those to workers."""
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


def _run(program: Callable[[Sequence[str]], int], arguments: Sequence[str] | None) -> int:
    place = Place()
    try:
        place = find_place()
        set_up_logging(place)
        return program(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        if place.rank != 0:
            time.sleep(SPEAK_AFTER_SECONDS)
        for line in str(error).splitlines():
            print(f"{_prefix(place)}error: {line}", file=sys.stderr)
        return USER_ERROR
    except Interrupted as reason:
        log.info("%s: stopped; the same command goes on", reason)
        return _leave_unfinished(place)
    except RunFailed as failure:
        if not failure.quiet:
            print(f"{_prefix(place)}error: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print("interrupted; run again to go on", file=sys.stderr)
        return INTERRUPTED
    except UnicodeEncodeError as error:
        if not re.search("[\udc80-\udcff]", str(error.object)):
            raise
        # Python's stand-ins for bytes of a file name that are no UTF-8: nothing that is written may hold them.
        text = os.fsencode(str(error.object)[:200])
        print(f"{_prefix(place)}error: {text!r}: a name that is not UTF-8; rename the file or folder", file=sys.stderr)
        return USER_ERROR
    except ImportError as error:
        if (error.name or "").startswith("egohod"):
            raise
        print(
            f"{_prefix(place)}error: a package that this command needs cannot be imported: {error}; pip install -r "
            "requirements.txt",
            file=sys.stderr,
        )
        return USER_ERROR
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            raise
        print(f"{_prefix(place)}error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return BROKEN


def _leave_unfinished(place: Place) -> int:
    """Tell the launcher, if it wants to know, that there is more to do."""
    if UNFINISHED in os.environ and place.rank == 0:
        Path(os.environ[UNFINISHED]).touch()
    return DONE


def _prefix(place: Place) -> str:
    return f"[rank {place.rank}] " if place.rank else ""


def set_up_logging(place: Place) -> None:
    """Log lines with time and rank on stderr; only the first process says ordinary things."""
    prefix = f"[rank {place.rank}] " if place.world_size > 1 else ""
    logging.basicConfig(
        level=logging.INFO if place.rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


@contextmanager
def joined(cfg: Config, *, stops_cleanly: bool = False) -> Iterator[Distributed]:
    """This process's place in the run, which ends for all processes when it ends for one.

    With ``stops_cleanly`` the signals that ask a run to stop raise :class:`Interrupted`, or are left to the training
    loop. Raises :class:`UserError` on every process if the processes do not run the same code and configuration.
    """
    # Not above: programs that need no model start in a third of the time without PyTorch.
    from egohod.distributed import setup
    from egohod.peers import watched
    from egohod.training.agreement import require_agreement
    from egohod.training.preemption import Preemption

    dist = setup(cfg.train.device)
    try:
        with Preemption(dist.stop) if stops_cleanly else nullcontext(), watched(dist, cfg.train.peer_timeout):
            require_agreement(cfg, dist)
            yield dist
    finally:
        dist.close()


@contextmanager
def claimed_run(folder: str, dist: Distributed) -> Iterator[None]:
    """Within, no other process may use the run folder; the first process of a run holds the claim for all.

    Raises :class:`UserError` if another process holds it, or if the folder cannot be made.
    """
    with ExitStack() as held:
        if dist.is_main:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(Path(folder) / ".lock"))
            except BlockingIOError as error:
                raise UserError(f"{folder}: another run is writing here; choose another folder") from error
            except OSError as error:
                raise UserError(f"{folder}: cannot be used as run folder: {error.strerror or error}") from error
        yield


def model_of(checkpoint: str, overrides: Sequence[str] = ()) -> list[str]:
    """What a checkpoint says about its model, as overrides: it counts more than a configuration file.

    ``overrides`` are the command line's, of which ``model.weights.base`` counts.

    Raises :class:`UserError` if it cannot be read.
    """
    # Not above, as in joined.
    from egohod.training.checkpoint import open_weights

    base = [text.partition("=")[2] for text in overrides if text.startswith("model.weights.base=")]
    content = open_weights(checkpoint, base=base[-1] if base else None)
    if content.family.is_clip:
        return []
    known = {f"model.{name}": value for name, value in content.model_knobs.items()}
    allowed = {name for name, _, _ in knobs(Config)}
    return [f"{name}={value}" for name, value in known.items() if name in allowed]
