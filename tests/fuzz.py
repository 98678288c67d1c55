"""Give damaged files to every reader of the project: each must be read, or refused by one line that names the fault.

    python tests/fuzz.py --dry_run                        the readers and how many cases are left
    python tests/fuzz.py [--readers a,b] [--cases 10000]  run them; rerun to resume
    python tests/fuzz.py --reader clips_hod --case 17     one case here, with its files and its traceback

A case is a function of (reader, number, --seed): a small valid input of tests/fuzz_targets.py with a few changes of
tests/fuzz_mutations.py. A fault is whatever is neither a success nor a ``UserError``: another exception, a process that
dies, more than 10 s or 1 GB, a message of several lines, and a file that has code run or something written outside its
folder. Cases run in forked processes, so that a crash costs one case. Results in --work belong to a
hash of the code: after a change of the code a reader starts again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # tools import each other without a package
# Before the libraries that read them: one thread a process, and no cache of a library in anyone's home.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLCONFIGDIR": f"{tempfile.gettempdir()}/fuzz-mpl"}

import matplotlib.font_manager  # the first import on a machine runs fc-list, which is no reader's fault  # noqa: F401
import psutil
import torch

from egohod.distributed import source_hash
from egohod.errors import UserError
from egohod.training.telemetry import git_commit
from tests import fuzz_mutations
from tests.fuzz_mutations import mutate
from tests.fuzz_targets import TARGETS, VIDEOS, Target

SECONDS, BYTES, LONGEST_LINE = 10.0, 1 << 30, 1000
# Beyond this an allocation fails, so that no case can take the machine's memory; more than BYTES is a fault before.
_SPACE = 4 << 30
# Cases that share a process, and are noted together.
_CHUNK = 250
_SHOWN_FAULTS = 20
_GRACE = 5.0
_BY_THE_CLOCK = f"takes more than {SECONDS:g} s"
_STARTS = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.startfile", "socket.connect", "pty.spawn")
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_SPAWN = multiprocessing.get_context("fork")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", default=",".join(TARGETS), help="names with commas between (default: all)")
    parser.add_argument("--cases", type=int, default=10_000, help="of each reader (default: 10000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another ten thousand cases")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/fuzz"), help="folder of results and of the cases' files"
    )
    parser.add_argument("--output", type=Path, help="result file (docs/results/fuzz.json is that of the whole run)")
    parser.add_argument("--dry_run", action="store_true", help="print what there is to do")
    parser.add_argument("--reader", help="with --case: run one case in this process")
    parser.add_argument("--case", type=int, help="its number")
    args = parser.parse_args()
    names = [args.reader] if args.reader else args.readers.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no reader {unknown[0]}; there are {', '.join(TARGETS)}")
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen = [TARGETS[name] for name in names]
    if args.case is not None:
        return _one(chosen[0], args.case, args.seed, work)
    notes = {target.name: Notes(work / f"{target.name}.json", args.seed) for target in chosen}
    if args.dry_run:
        for name, each in notes.items():
            print(f"{name:24} {each.total('cases'):6} of {args.cases} cases done, {len(each.faults)} faults")
        return 0
    run(chosen, args.cases, args.jobs, args.seed, work, notes)
    faults = sum(len(each.faults) for each in notes.values())
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(_result(notes, args), indent=1) + "\n")
    print(f"{sum(each.total('cases') for each in notes.values()):,} cases of {len(notes)} readers, {faults} faults")
    return 1 if faults else 0


class Notes:
    """The finished chunks of cases of a reader, in a file that belongs to this code and seed."""

    def __init__(self, path: Path, seed: int) -> None:
        code = b"".join(
            Path(__file__).with_name(f"fuzz{part}.py").read_bytes() for part in ("", "_targets", "_mutations")
        )
        self._of = {"source": source_hash(), "fuzzer": hashlib.sha256(code).hexdigest()[:12], "seed": seed}
        self._path = path
        self.chunks: dict[str, dict[str, Any]] = {}
        if path.is_file():
            stored = json.loads(path.read_text())
            self.chunks = stored["chunks"] if stored["of"] == self._of else {}

    def add(self, first: int, chunk: dict[str, Any]) -> None:
        self.chunks[str(first)] = chunk
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"of": self._of, "chunks": self.chunks}))
        part.replace(self._path)

    def total(self, name: str) -> float:
        return sum(chunk[name] for chunk in self.chunks.values())

    @property
    def faults(self) -> list[dict[str, Any]]:
        return sorted(
            (each for chunk in self.chunks.values() for each in chunk["faults"]), key=lambda each: each["case"]
        )


def _result(notes: dict[str, Notes], args: argparse.Namespace) -> dict[str, Any]:
    readers = {
        name: {each: round(of.total(each), 1) for each in ("cases", "read", "refused", "seconds")}
        | {"faults": len(of.faults), "examples": of.faults[:_SHOWN_FAULTS]}
        for name, of in notes.items()
    }
    return {
        "command": " ".join(["python", "tests/fuzz.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "source": source_hash(),
        "seed": args.seed,
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB",
        "python": platform.python_version(),
        "limits": {"seconds": SECONDS, "bytes": BYTES, "characters of a line": LONGEST_LINE},
        "cases": sum(each["cases"] for each in readers.values()),
        "faults": sum(each["faults"] for each in readers.values()),
        "readers": readers,
    }


# --------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """A valid input: its folders and files, and which of these are damaged."""

    folders: tuple[str, ...]
    files: dict[str, bytes]
    damaged: tuple[str, ...]


def seed_of(target: Target, folder: Path) -> Seed:
    """The files of ``target``'s seed, written below ``folder`` unless they are there."""
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with contextlib.chdir(part):
            target.seed(part)
        part.rename(folder)
    below = sorted(folder.rglob("*"))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in below if path.is_file()}
    damaged = [path.relative_to(folder).as_posix() for path in sorted(folder.glob(target.only)) if path.is_file()]
    folders = [path.relative_to(folder).as_posix() for path in below if path.is_dir()]
    return Seed(tuple(folders), files, tuple(name for name in damaged if "lock" not in name))


def damaged(target: Target, seed: Seed, number: int, of: int) -> dict[str, bytes]:
    """The files of a case."""
    rng = random.Random(f"{target.name} {of} {number}")
    names = list(seed.damaged)
    if target.name in VIDEOS:
        names = [rng.choice(names)]
        return {names[0]: mutate(seed.files[names[0]], names[0], rng, [seed.files[name] for name in seed.damaged])}
    files = dict(seed.files)
    for _ in range(rng.choice((1, 1, 1, 1, 2)) if len(names) > 1 else 1):
        name, how = rng.choice(names), rng.random()
        if len(names) > 1 and how < 0.03:
            files.pop(name, None)
        elif len(names) > 1 and how < 0.06:
            files[name] = seed.files[rng.choice(names)]
        elif name in files:
            files[name] = mutate(files[name], name, rng, [seed.files[each] for each in names])
    return files


def write(target: Target, seed: Seed, files: dict[str, bytes], folder: Path) -> None:
    """Write a case into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in seed.folders:
        (folder / name).mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    target.mend(folder)


class _TooSlow(BaseException):
    """No ``Exception``, which readers may catch."""


class Watch:
    """What is held against a case while it runs: time, memory, code and writes outside of its folder."""

    def __init__(self) -> None:
        self.folder = ""
        self.seen: list[str] = []
        self._late = False
        signal.signal(signal.SIGALRM, self._ring)
        sys.addaudithook(self._audit)

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.folder, self.seen, self._late, fuzz_mutations.fired = f"{folder.resolve()}/", [], False, False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _memory("VmRSS")
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.5)  # again, should a reader swallow it
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.folder = ""
        if (grown := _memory("VmHWM") - before) > BYTES:
            self.seen.append(f"takes {grown / 1e9:.1f} GB of memory")
        if fuzz_mutations.fired:
            self.seen.append("runs code of the file")

    def _ring(self, *_: object) -> None:
        if self.folder:
            if _BY_THE_CLOCK not in self.seen:
                self.seen.append(_BY_THE_CLOCK)
            raise _TooSlow

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in _STARTS or (event == "subprocess.Popen" and args[0] != sys.executable):
            self._refuse(f"{event} {args!r:.100}")
        elif event == "open":
            path, mode, flags = args
            writes = any(c in (mode or "") for c in "wax+") or (mode is None and flags & (os.O_WRONLY | os.O_RDWR))
            if writes and not isinstance(path, int):
                self._inside(event, path)
        # Names beside an open folder are below one that was looked at.
        elif event in _WRITES and not any(isinstance(each, int) and each >= 0 for each in args[1:]):
            self._inside(event, args[0])

    def _inside(self, event: str, path: Any) -> None:
        whole = os.path.realpath(os.fsdecode(path))
        if not f"{whole}/".startswith(self.folder) and whole != "/dev/null" and not whole.startswith("/proc/"):
            self._refuse(f"{event} {whole!r:.100}")

    def _refuse(self, what: str) -> None:
        self.seen.append(f"leaves its folder: {what}")
        raise RuntimeError(what)


def judge(target: Target, folder: Path, watch: Watch) -> tuple[str, str]:
    """Read a case: ("read" or "refused" or "fault", the message)."""
    verdict, answer = "read", ""
    try:
        with contextlib.chdir(folder), watch.over(folder), warnings.catch_warnings(action="ignore"):
            target.read(folder)
    except UserError as error:
        verdict, answer = "refused", str(error)
        lines = answer.splitlines()
        if not 0 < len(lines) <= target.lines:
            verdict = "fault"
        elif (long := max(len(line.replace(str(folder), "")) for line in lines)) > LONGEST_LINE:
            verdict, answer = "fault", f"a message of {long} characters: {answer}"
    except _TooSlow:
        verdict = "fault"
    except BaseException as error:
        verdict = "fault"
        answer = f"{type(error).__name__}: {error!s:.300} at {_place(error)}"
    if watch.seen:
        verdict, answer = "fault", "; ".join([*watch.seen, answer])
    return verdict, answer


def _place(error: BaseException) -> str:
    """The innermost line of this project."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT / "egohod") in frame.filename]
    frames = frames or traceback.extract_tb(error.__traceback__)
    return f"{os.path.relpath(frames[-1].filename, ROOT)}:{frames[-1].lineno}" if frames else "?"


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return 0


def _one(target: Target, number: int, of: int, work: Path) -> int:
    """Run a case in this process and leave its files."""
    seed, folder = seed_of(target, work / "seeds" / target.name), work / f"{target.name}-{number}"
    write(target, seed, damaged(target, seed, number, of), folder)
    changed = [name for name in seed.files if _content(folder / name) != seed.files[name]]
    print(f"{folder}: changed are {', '.join(changed) or 'no files'}")
    _limit()
    watch = Watch()
    print(*judge(target, folder, watch), sep=": ")
    write(target, seed, damaged(target, seed, number, of), folder)  # as it was before it was read
    with contextlib.chdir(folder), contextlib.suppress(_TooSlow), watch.over(folder):
        try:
            target.read(folder)
        except Exception:
            traceback.print_exc()
    return 0


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A chunk of cases, and the process that is at them."""

    target: Target
    first: int
    stop: int
    chunk: dict[str, Any] = field(
        default_factory=lambda: {"cases": 0, "read": 0, "refused": 0, "seconds": 0.0, "faults": []}
    )
    next: int = 0
    again: int = -1
    process: Any = None
    pipe: Any = None
    began: float = 0.0

    def start(self, seed: Seed, of: int, work: Path) -> None:
        """Go on with the next case in a process of its own."""
        self.pipe, end = _SPAWN.Pipe(duplex=False)
        arguments = (self.target, seed, range(self.next, self.stop), of, work / f"job-{os.getpid()}-{id(self)}", end)
        self.process = _SPAWN.Process(target=_work, args=arguments)
        self.process.start()
        end.close()
        self.began = time.monotonic()

    def step(self) -> bool:
        """Read the messages of the process; whether it has ended."""
        alive = self.process.is_alive()  # before the pipe is read: what a process sent before it died can then be read
        slow = False
        with contextlib.suppress(EOFError):
            while not slow and self.pipe.poll():
                case = self.pipe.recv()
                slow = _BY_THE_CLOCK in case[2] and self.again != case[0]
                if not slow:
                    self._take(*case)
        hangs = time.monotonic() - self.began > SECONDS + _GRACE
        if alive and not slow and not hangs and self.next < self.stop:
            return False
        self.process.kill()
        self.process.join()
        if (slow or hangs) and self.again != self.next:  # a busy machine is no fault: once more
            self.again = self.next
        elif self.next < self.stop:  # the case that it was at
            what = "does not end" if hangs else f"ends the process ({_ended(self.process.exitcode)})"
            self._take(self.next, "fault", what, SECONDS if hangs else 0.0)
        return True

    def _take(self, number: int, verdict: str, answer: str, seconds: float) -> None:
        self.chunk["cases"] += 1
        self.chunk["seconds"] += seconds
        if verdict == "fault":
            command = f"python tests/fuzz.py --reader {self.target.name} --case {number}"
            self.chunk["faults"].append({"case": number, "what": answer[:600], "command": command})
        else:
            self.chunk[verdict] += 1
        self.next, self.began = number + 1, time.monotonic()


def run(chosen: Sequence[Target], cases: int, jobs: int, of: int, work: Path, notes: dict[str, Notes]) -> None:
    """Run what is left of ``cases`` of each target."""
    seeds = {target.name: _seed_apart(target, work) for target in chosen}
    waiting = [
        Job(target, first, min(first + _CHUNK, cases), next=first)
        for first in range(0, cases, _CHUNK)  # outside: an interrupted run has been through all readers alike
        for target in chosen
        if notes[target.name].chunks.get(str(first), {"cases": 0})["cases"] < min(first + _CHUNK, cases) - first
    ]
    running: list[Job] = []
    began, reported = time.monotonic(), time.monotonic()
    total, done = sum(job.stop - job.first for job in waiting), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(waiting.pop(0))
            running[-1].start(seeds[running[-1].target.name], of, work)
        for job in list(running):
            before = job.chunk["cases"]
            over = job.step()
            done += job.chunk["cases"] - before
            if over and job.next < job.stop:
                job.start(seeds[job.target.name], of, work)
            elif over:
                running.remove(job)
                notes[job.target.name].add(job.first, job.chunk)
                if notes[job.target.name].total("cases") >= cases:
                    _tell(job.target.name, notes[job.target.name])
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            eta = timedelta(seconds=round((total - done) * (reported - began) / max(done, 1)))
            print(
                f"{done:,} of {total:,} cases, at {running[0].target.name if running else '-'}, ETA {eta}", flush=True
            )
        time.sleep(0.02)


def _ended(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _tell(name: str, of: Notes) -> None:
    faults = of.faults
    shown = f"{name:24} {of.total('read'):6.0f} read {of.total('refused'):6.0f} refused {len(faults):4} faults"
    print(f"{shown} {of.total('seconds'):6.0f} s", flush=True)
    for fault in faults[:3]:
        print(f"    {fault['command']}\n        {fault['what'][:300]}", flush=True)


def _seed_apart(target: Target, work: Path) -> Seed:
    """In another process: what a library starts there must not be forked with every chunk."""
    folder = work / "seeds" / target.name
    if not folder.is_dir():
        process = _SPAWN.Process(target=seed_of, args=(target, folder))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the seed of {target.name} cannot be written")
    return seed_of(target, folder)


def _work(target: Target, seed: Seed, numbers: range, of: int, folder: Path, pipe: Any) -> None:
    """Run cases and send (number, verdict, message, seconds) of each."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    sys.dont_write_bytecode = True
    with open(os.devnull, "r+b", buffering=0) as nothing:  # FFmpeg's library talks to the terminal itself
        for handle in (0, 1, 2):
            os.dup2(nothing.fileno(), handle)
    _limit()
    watch = Watch()
    try:
        for number in numbers:
            began = time.monotonic()
            write(target, seed, damaged(target, seed, number, of), folder)
            verdict, answer = judge(target, folder, watch)
            pipe.send((number, verdict, answer, time.monotonic() - began))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _limit() -> None:
    """Nothing of this process may grow without bound."""
    size = _memory("VmSize") + _SPACE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, BYTES))


if __name__ == "__main__":
    sys.exit(main())
