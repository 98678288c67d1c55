"""Which clips a machine works on, that nobody else does at the same time, and how the parts become one file.

hod.csv                          the narrations, once every shard is finished
hod.csv.failures.csv             clips without one, with the stage and the reason
hod.csv.work/blocks/             what the stages found out, see egohod/hod/store.py
hod.csv.work/parts/3-of-64.csv   the rows of a finished shard, and its .failures.csv
hod.csv.work/parts/3-of-64.json  what it was made of, written last: then the shard is finished
hod.csv.work/locks/3-of-64       held while a process works on the shard
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from egohod.errors import UserError
from egohod.runtime import locked

# Seconds: the processes of a run that was killed a moment ago are still on their way out.
_PATIENCE = 3.0


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``of``, counted from 0."""

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``3/64``. Raises :class:`UserError`."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        shard = cls(int(match.group(1)), int(match.group(2))) if match else cls(0, 0)
        if shard.number >= shard.of:
            raise UserError(f"--shard is '{text}', but must be i/n with i from 0 to n - 1: 0/64 is the first of 64")
        return shard

    @classmethod
    def named(cls, name: str) -> Shard | None:
        """That of a file called as :attr:`name` says; None for any other file."""
        match = re.fullmatch(r"(\d+)-of-(\d+)", name)
        return cls(int(match[1]), int(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def name(self) -> str:
        """How its files are called."""
        return f"{self.number}-of-{self.of}"

    def blocks(self, clips: int, size: int) -> range:
        """Its blocks of ``size`` clips: a range, so that neighbouring clips of a video stay on one machine."""
        blocks = -(-clips // size)
        return range(self.number * blocks // self.of, (self.number + 1) * blocks // self.of)


class Work:
    """The folder beside an output file."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".work")

    def block(self, number: int) -> Path:
        """The file of a block; a thousand to a folder."""
        return self.folder / "blocks" / f"{number // 1000:04d}" / f"{number:07d}.jsonl"

    def part(self, shard: Shard, ending: str) -> Path:
        """A file of a finished shard."""
        return self.folder / "parts" / f"{shard.name}{ending}"

    @property
    def failures(self) -> Path:
        """The ledger of a merged output."""
        return self.output.with_name(self.output.name + ".failures.csv")

    def summary(self, shard: Shard) -> dict[str, Any] | None:
        """What is told of a shard that was finished once; None if it was not."""
        try:
            content = json.loads(self.part(shard, ".json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        kinds = {"fingerprint": str, "narrations": int, "failures": int, "makeshift": int}
        good = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())
        return content if good else None

    def finished(self, shard: Shard, fingerprint: str) -> dict[str, Any] | None:
        """What a shard holds that was made of this, and whose files are all there with all their rows; else None."""
        said = self.summary(shard)
        if said is None or said.get("fingerprint") != fingerprint:
            return None
        told = {".csv": said["narrations"], ".failures.csv": said["failures"]}
        return said if all(_rows(self.part(shard, ending)) == rows for ending, rows in told.items()) else None

    @contextlib.contextmanager
    def claim(self, shard: Shard) -> Iterator[None]:
        """Within, no other process works on the shard, nor on clips that it has in common with other divisions.

        Raises :class:`UserError` if one does.
        """
        folder = self.folder / "locks"
        with contextlib.ExitStack() as held:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder / shard.name, _PATIENCE))
                for path in folder.iterdir():
                    other = Shard.named(path.name)
                    if other and other.of != shard.of:
                        # The neighbours look too, and hold it for a moment.
                        with locked(path, _PATIENCE):
                            pass
            except BlockingIOError as error:
                name = Path(error.filename).name.replace("-of-", "/")
                raise UserError(f"{self.output}: another run is writing here (shard {name}); wait for it") from error
            except OSError as error:
                raise CacheError(f"{folder}: cannot be written: {error.strerror or error}") from error
            yield

    def finish(self, shard: Shard, summary: dict[str, Any]) -> None:
        """Mark a shard as finished; its other files are there."""
        with written(self.part(shard, ".json")) as file:
            json.dump(summary, file, indent=1)

    def merge(self, shards: int, fingerprint: str, clips: int, size: int) -> dict[str, int]:
        """Put the parts of all shards into the output; how many narrations and failures it has.

        ``fingerprint`` is what each shard must have been made of. Raises :class:`UserError` naming what is missing, or
        what does not fit together, or if there is no narration at all; the output is then as it was.
        """
        unfinished = [shard for shard in _all(shards) if self.finished(shard, fingerprint) is None]
        if unfinished:
            names = ", ".join(map(str, unfinished[:10])) + (", ..." if len(unfinished) > 10 else "")
            raise UserError(
                f"{self.output}: {len(unfinished)} of {shards} shards are not finished with these settings: "
                f"--shard {names}"
            )
        total = {"narrations": 0, "failures": 0}
        for shard in _all(shards):
            said, blocks = self.summary(shard) or {}, shard.blocks(clips, size)
            due = min(blocks.stop * size, clips) - min(blocks.start * size, clips)
            if said["narrations"] + said["failures"] != due:
                raise UserError(
                    f"{self.part(shard, '.json')}: tells of {said['narrations']} narrations and {said['failures']} "
                    f"failures, but the shard has {due} clips; remove the file and run the shard again"
                )
            for name in total:
                total[name] += said[name]
        if not total["narrations"]:
            raise UserError(
                f"{self.output}: not one of {total['failures']:,} clips has a narration; {self.folder / 'parts'} says "
                "why in the .failures.csv, and --retry tries them again"
            )
        for path, ending in ((self.failures, ".failures.csv"), (self.output, ".csv")):
            with written(path) as file:
                for shard in _all(shards):
                    _append(self.part(shard, ending), file, shard.number == 0)
        return total

    def divisions(self, fingerprint: str) -> list[int]:
        """Into how many shards the clips were divided, of which at least one is finished and made of this."""
        shards = [Shard.named(path.stem) for path in (self.folder / "parts").glob("*.json")]
        return sorted(
            {each.of for each in shards if each and (self.summary(each) or {}).get("fingerprint") == fingerprint}
        )


def _all(shards: int) -> list[Shard]:
    return [Shard(number, shards) for number in range(shards)]


def _rows(part: Path) -> int | None:
    """Of a part that can be read. Each is a line: the fields hold no line breaks."""
    try:
        with part.open("rb") as lines:
            return sum(1 for _ in lines) - 1
    except OSError:
        return None


def _append(part: Path, file: TextIO, header: bool) -> None:
    """Copy a part."""
    try:
        with part.open(encoding="utf-8", newline="") as lines:
            if not header:
                next(lines)
            file.writelines(lines)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{part}: cannot be read: {reason}; remove it and run the shard again") from error


@contextlib.contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """A text file that appears as a whole or not at all. Raises :class:`CacheError` if it cannot be written."""
    # Of its own: all shards of an array write the settings, in the same second.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="replace", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CacheError(
            f"cannot write {path}: {error.strerror or error}; what is done is kept, run again to go on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


log = logging.getLogger(__name__)

# What a crash of the whole machine may cost; a killed process loses nothing that was written.
_SYNC_SECONDS = 2.0


class CacheError(UserError):
    """The folder of the stages cannot be written or read."""


class Found(NamedTuple):
    """What a stage made of a clip: a value, or why there is none."""

    value: Any
    fault: str | None = None
    makeshift: bool = False
    """Whether the value stands in for one that could not be had, as a failure is to be tried again when asked."""


def key_of(*parts: Any) -> str:
    """A name for anything JSON can spell, the same for equal parts."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class Block:
    """The lines of one block, all of them in memory. Nothing is written, nor made anew, before :meth:`put`.

    Raises :class:`CacheError` if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._found: dict[tuple[str, str], Found] = {}
        self._synced = time.monotonic()
        with _clearly(path, "read"):
            content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].split(b"\n")[:-1]:
            try:
                said = json.loads(line)
                self._found[said["stage"], said["key"]] = Found(
                    said.get("value"), said.get("fault"), said.get("makeshift", False)
                )
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                log.warning("%s: a damaged line is left out, its clip is done again", path)
        self._size = whole

    def get(self, stage: str, key: str) -> Found | None:
        """What is known; None if nothing is."""
        return self._found.get((stage, key))

    def put(self, stage: str, key: str, found: Found) -> None:
        """Write what a stage found out. Raises :class:`CacheError` if it cannot be written; then nothing was."""
        said: dict[str, Any] = {"stage": stage, "key": key} | (
            {"fault": found.fault} if found.fault else {"value": found.value}
        )
        if found.makeshift:
            said["makeshift"] = True
        line = (json.dumps(said, separators=(",", ":"), allow_nan=False) + "\n").encode()
        with _clearly(self._path, "write"):
            if self._file < 0:
                self._open()
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
            self._size += len(line)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        self._found[stage, key] = found

    def close(self) -> None:
        """Let the file go, its content safe on the disk."""
        if self._file >= 0:
            try:
                with _clearly(self._path, "write"):
                    self._sync()
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Block:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()


@contextlib.contextmanager
def _clearly(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"cannot {what} {path}: {error.strerror or error}; what is done is kept, run again to go on"
        ) from error
