"""Cut a folder of camera files into small chunks that training reads fast.

    python tools/chunk_videos.py my/recordings my/chunks --dry_run     # how long it takes, how large it gets
    python tools/chunk_videos.py my/recordings my/chunks               # again after an interruption: goes on

my/recordings/day 1/GX010042.MP4 becomes my/chunks/day 1/GX010042/0000.mp4, 0001.mp4, ... and its video id in a csv is
"day 1/GX010042". Any container and codec that FFmpeg reads. A video's folder appears only when it is complete.

Exit code: 0 all done, 1 some files could not be read (they are listed), 2 nothing to be done before you mend what the
last line says, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from egohod import cli
from egohod.data.chunking import (
    CODECS,
    LAYOUTS,
    ChunkSettings,
    Estimate,
    Interim,
    Output,
    Probe,
    Summary,
    Video,
    Workers,
    estimate,
    find_videos,
    try_encoder,
    write_videos,
)
from egohod.errors import UserError
from egohod.runtime import usable_cores

log = logging.getLogger("chunk_videos")

DONE, SOME_FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
SAY_EVERY = 5.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    usual = ChunkSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder of camera files, in sub-folders as you like")
    parser.add_argument("output", type=Path, help="folder of the chunks; new, or that of an earlier run to go on with")

    which = parser.add_argument_group("which files")
    which.add_argument(
        "--pattern", metavar="GLOB", help="only files whose path below the input matches, instead of all video endings"
    )
    which.add_argument(
        "--list", type=Path, metavar="TXT", help="only these: a file with a path below the input per line"
    )
    which.add_argument(
        "--follow_links", action="store_true", help="read links that lead out of the input too; without it nothing "
        "outside the folder you named is read"
    )  # fmt: skip

    how = parser.add_argument_group("chunks")
    how.add_argument(
        "--seconds", type=float, default=usual.seconds,
        help="length of a chunk: short enough to open fast, long enough that few clips cross a border; a change "
        "must be told to the training, chunk_seconds (default: %(default)g)",
    )  # fmt: skip
    how.add_argument(
        "--short_side", type=int, default=usual.short_side,
        help="pixels: room for crops at 224; 256 decodes faster, models at 336 want 384 or more; smaller sources keep "
        "their size (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--keyint", type=int, default=usual.keyint,
        help="frames from key frame to key frame: fewer are faster to reach, more are smaller (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--fps", type=float, default=None,
        help="a constant frame rate: frames are repeated or left out; half the rate saves a fifth of the size "
        "(default: the source's own timing, variable or not)",
    )  # fmt: skip
    how.add_argument(
        "--crf", type=float, default=usual.crf,
        help="quality, 0 to 51: 6 less is twice the size; at 23 the loss is hardly visible (default: %(default)g)",
    )  # fmt: skip
    how.add_argument(
        "--preset", default=usual.preset,
        help="effort of the encoder: fast takes twice as long for a twelfth of the size (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--codec", choices=CODECS, default=usual.codec,
        help="libx265 (HEVC) at crf 28 is half as large, but takes twice as long to decode and 4 times to make "
        "(default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--no_fastdecode", action="store_true",
        help="let the encoder use CABAC and deblocking: a tenth smaller, but 1.6 times as long to decode",
    )  # fmt: skip
    how.add_argument(
        "--layout", choices=LAYOUTS, default=usual.layout,
        help="chunks: <id>/<0000>.mp4 by number; avion: <id>.mp4/<second>.mp4, which AVION and LaViLa read (default: "
        "%(default)s)",
    )  # fmt: skip

    run = parser.add_argument_group("the run")
    run.add_argument("--workers", type=int, default=None, help="processes (default: one per core that may be used)")
    run.add_argument("--strict", action="store_true", help="stop at the first file that cannot be read")
    run.add_argument(
        "--dry_run", action="store_true", help="look at every file, chunk a few seconds of a few, say hours and size; "
        "writes nothing to the output"
    )  # fmt: skip
    return parser.parse_args(argv)


class Progress:
    """A line every few seconds, with the time left by seconds of video."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def __call__(self, at: Interim) -> None:
        """Say how far it is, if it is time to."""
        now = time.monotonic()
        if now - self.said < SAY_EVERY:
            return
        self.said = now
        speed = at.seconds / (now - self.began)
        left = clock((at.total_seconds - at.seconds) / speed) if speed else "unknown"
        log.info(
            "%3.0f %%  %s of %s of video, %d of %d videos, %.1f x real time, ETA %s",
            100 * at.seconds / max(at.total_seconds, 1e-9),
            clock(at.seconds),
            clock(at.total_seconds),
            at.videos,
            at.total_videos,
            speed,
            left,
        )

    def probing(self, number: int, total: int) -> None:
        """Say how many files were looked at."""
        if time.monotonic() - self.said >= SAY_EVERY:
            self.said = time.monotonic()
            log.info("looked at %d of %d files", number, total)


def clock(seconds: float) -> str:
    """1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def size(number: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def describe(probes: dict[Video, Probe]) -> None:
    """The kinds of files there are, the longest first."""
    kinds: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for each in probes.values():
        kind = f"{each.codec} {each.width}x{each.height} {each.fps:.4g} fps"
        kinds[kind] += round(each.seconds * 1000)
        numbers[kind] += 1
    for kind, milliseconds in kinds.most_common(20):
        log.info("  %s: %d files, %.2f h", kind, numbers[kind], milliseconds / 3.6e6)
    unknown = sum(not each.seconds for each in probes.values())
    if unknown:
        log.info("  %d files do not say how long they are, and are missing from the estimate", unknown)


def say_estimate(found: Estimate, output: Path, workers: int) -> None:
    """What a run would take, and whether it fits on the disk."""
    for fault in found.faults:
        log.warning("cannot be sampled: %s", fault)
    place = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    log.info(
        "about %s (%.3g hours) with %d workers, about %s (%.3g TB) on disk; %s free at %s",
        clock(3600 * found.hours), found.hours, workers, size(found.bytes), found.bytes / 1e12, size(free), place,
    )  # fmt: skip
    if found.bytes > free:
        log.warning("that does not fit: a smaller --short_side, a higher --crf or a lower --fps make it smaller")


def finish(summary: Summary, output: Path, seconds: float) -> int:
    """The last lines; the exit code."""
    log.info(
        "%s: wrote %d videos, %.2f h, in %s: %s became %s",
        output, summary.videos, summary.seconds / 3600, clock(seconds), size(summary.bytes_in), size(summary.bytes_out),
    )  # fmt: skip
    return list_faults(summary.faults)


def list_faults(faults: dict[Video, str]) -> int:
    """The files that could not be read; the exit code."""
    for reason in faults.values():
        print(f"could not be read: {reason}", file=sys.stderr)
    if faults:
        print(f"{len(faults)} files could not be read", file=sys.stderr)
    return SOME_FAILED if faults else DONE


def run(args: argparse.Namespace) -> int:
    """Find, probe, write; the exit code."""
    settings = ChunkSettings(
        args.seconds, args.short_side, args.keyint, args.fps, args.crf, args.preset, args.codec,
        not args.no_fastdecode, args.layout,
    )  # fmt: skip
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}, but must be at least 1")
    output = Output(args.output, settings, args.input)
    try_encoder(settings)
    videos = find_videos(args.input, args.pattern, args.list, args.follow_links)
    todo = [video for video in videos if not output.is_done(video)]
    if len(todo) < len(videos):
        log.info("%d of %d videos are there already", len(videos) - len(todo), len(videos))
    if not todo:
        log.info("%s is complete, nothing to do", args.output)
        return DONE
    progress = Progress()
    with contextlib.ExitStack() as stack:
        if not args.dry_run:
            stack.enter_context(output.claim())
        # Within the claim, so that nothing is written any more when that is given up.
        workers = stack.enter_context(Workers(args.workers or usable_cores()))
        probes, faults = workers.probe(todo, lambda number: progress.probing(number, len(todo)))
        if faults and args.strict:
            raise UserError(next(iter(faults.values())))
        total = sum(each.seconds for each in probes.values())
        log.info("%d videos, %.2f h, %s", len(probes), total / 3600, size(sum(each.bytes for each in probes.values())))
        if args.dry_run:
            describe(probes)
            say_estimate(estimate(probes, settings, workers), args.output, workers.number)
            return list_faults(faults)
        progress = Progress()
        summary = write_videos(probes, output, settings, workers, args.strict, progress)
    summary.faults |= faults
    return finish(summary, args.output, time.monotonic() - progress.began)


def main(argv: list[str] | None = None) -> int:
    """Run; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[cli.LogOutput()])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run again to go on", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(cli.while_read(main))
