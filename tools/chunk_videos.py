"""Cut a folder of camera files into short chunks that training can read fast.

    python tools/chunk_videos.py my/recordings my/chunks --dry_run     # estimate the time and the size
    python tools/chunk_videos.py my/recordings my/chunks               # rerun to resume after an interruption
    python tools/chunk_videos.py my/recordings my/shards --tar         # a few tar files: root=my/shards/shards.parquet

my/recordings/day 1/GX010042.MP4 becomes my/chunks/day 1/GX010042/0000.mp4, 0001.mp4, ... and its video id in a csv is
"day 1/GX010042". Every container and codec that FFmpeg reads is supported. A video's folder appears only when it is
complete.

Exit code: 0 done; 1 some files could not be read (they are listed); 2 an error in the arguments, the input or the
output, which the last line explains; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from _common import log_to_stdout, run_tool, tool_parser

from egohod.data.chunking import (
    CODECS,
    LAYOUTS,
    ChunkSettings,
    Estimate,
    Output,
    Probe,
    Video,
    estimate,
    find_videos,
    probe_videos,
    try_encoder,
    write_videos,
)
from egohod.errors import DONE, UserError
from egohod.runtime import Progress, time_left, usable_cores

log = logging.getLogger("chunk_videos")

SOME_FAILED = 1
PROGRESS_SECONDS = 5.0


# Fields of ChunkSettings that are options of the same name, with their help.
SETTINGS = {
    "seconds": "length of a chunk: short enough to open fast, long enough that few clips cross a border; set "
    "chunk_seconds of the data source too",
    "short_side": "shorter side in pixels, for crops of 224; 256 decodes faster, models at 336 px need 384 or more; "
    "smaller sources keep their size",
    "keyint": "frames between key frames: fewer seek faster, more make smaller files",
    "fps": "constant frame rate: frames are repeated or dropped; half the rate saves a fifth of the size (default: the "
    "source's own timing, variable or not)",
    "crf": "quality, 0 (best) to 51: 6 less doubles the size; at 23 the loss is hardly visible",
    "preset": "encoder preset: fast takes twice as long and saves a twelfth of the size",
    "codec": "libx265 (HEVC) at crf 28 is half as large, but decoding takes twice and encoding 4 times as long",
    "layout": "chunks: <id>/<0000>.mp4 by number; avion: <id>.mp4/<second>.mp4, which AVION and LaViLa read",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("input", type=Path, help="folder of camera files, with any sub-folders")
    parser.add_argument("output", type=Path, help="folder of the chunks; an interrupted run resumes in its own")
    add = parser.add_argument_group("which files").add_argument
    add("--pattern", metavar="GLOB", help="only files whose path below the input matches (default: all videos)")
    add("--list", type=Path, metavar="TXT", help="only the files listed in TXT, one path below the input per line")
    add("--follow_links", action="store_true", help="also read links that lead out of the input (default: left out)")
    add = parser.add_argument_group("chunks").add_argument
    for name, text in SETTINGS.items():
        default = getattr(ChunkSettings, name)
        if default is not None:  # else the help describes it
            text += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
        choices = {"codec": CODECS, "layout": LAYOUTS}.get(name)
        add(f"--{name}", type=float if default is None else type(default), default=default, choices=choices, help=text)
    fast = "let the encoder use CABAC and deblocking: a tenth smaller, but decoding takes 1.6 times as long"
    add("--no_fastdecode", action="store_true", help=fast)
    tar = "pack the chunks into tar files of 1 GB and an index, OUTPUT/shards.parquet, which is the root to train from"
    add("--tar", action="store_true", help=tar)
    add = parser.add_argument_group("the run").add_argument
    add("--workers", type=int, help="processes (default: one per available core)")
    add("--strict", action="store_true", help="stop at the first file that cannot be read")
    dry_run = "read all headers, chunk a few seconds of some files, log the estimated time and size; write nothing"
    add("--dry_run", action="store_true", help=dry_run)
    return parser.parse_args(argv)


def size(number: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def report_estimate(probes: dict[Video, Probe], cost: Estimate, output: Path, workers: int) -> None:
    """Log the kinds of files, the longest first, the cost of a run, and whether it fits on the disk."""
    lengths: dict[str, list[float]] = defaultdict(list)
    for header in probes.values():
        lengths[f"{header.codec} {header.width}x{header.height} {header.fps:.4g} fps"].append(header.seconds)
    for kind, seconds in sorted(lengths.items(), key=lambda item: -sum(item[1]))[:20]:
        log.info("  %s: %d files, %.2f h", kind, len(seconds), sum(seconds) / 3600)
    unknown = sum(not header.seconds for header in probes.values())
    if unknown:
        log.info("  %d files do not state their length, and are missing from the estimate", unknown)
    for fault in cost.faults:
        log.warning("cannot be sampled: %s", fault)
    # The output need not exist yet: what counts is the disk of the nearest folder that does.
    place = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    log.info(
        "about %s (%.3g hours) with %d workers, about %s (%.3g TB) on disk; %s free at %s",
        time_left(3600 * cost.hours, 1.0), cost.hours, workers, size(cost.bytes), cost.bytes / 1e12, size(free), place,
    )  # fmt: skip
    if cost.bytes > free:
        log.warning("the disk is too small: lower --short_side or --fps, or raise --crf")


def main(argv: Sequence[str] | None = None) -> int:
    """Find, probe, write; the exit code."""
    args = parse(argv)
    log_to_stdout()
    # As on Ctrl-C: the workers end and incomplete videos are removed, also when a scheduler ends the job.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = ChunkSettings(
        **{name: getattr(args, name) for name in SETTINGS}, fastdecode=not args.no_fastdecode, tar=args.tar
    )
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}, but must be at least 1")
    output = Output(args.output, settings, args.input)
    # Before the search, which may take minutes: a wrong preset fails at once.
    try_encoder(settings)
    videos = find_videos(args.input, args.pattern, args.list, args.follow_links)
    todo = [video for video in videos if not output.is_done(video)]
    if len(todo) < len(videos):
        log.info("%d of %d videos are complete already", len(videos) - len(todo), len(videos))
    if not todo:
        log.info("%s is complete, nothing to do", args.output)
        return DONE
    began, workers = time.monotonic(), args.workers or usable_cores()
    with contextlib.ExitStack() as stack:
        if not args.dry_run:
            stack.enter_context(output.claim())
        with Progress("read headers", len(todo), unit="files", seconds=PROGRESS_SECONDS) as progress:
            probes, faults = probe_videos(todo, workers, progress)
        if faults and args.strict:
            raise UserError(next(iter(faults.values())))
        total = sum(header.seconds for header in probes.values())
        read = sum(header.bytes for header in probes.values())
        log.info("%d videos, %.2f h, %s", len(probes), total / 3600, size(read))
        if args.dry_run:
            report_estimate(probes, estimate(probes, settings, workers), args.output, workers)
        else:
            with Progress("chunk", total, unit="s of video", seconds=PROGRESS_SECONDS) as progress:
                summary = write_videos(probes, output, workers, args.strict, progress)
    if not args.dry_run:
        faults = summary.faults | faults
        spent, read, made = time_left(time.monotonic() - began, 1.0), size(summary.bytes_in), size(summary.bytes_out)
        log.info(
            "%s: wrote %d videos, %.2f h, in %s: %s became %s",
            args.output, summary.videos, summary.seconds / 3600, spent, read, made,
        )  # fmt: skip
    # On standard error: a log of the output alone stays a list of what was done.
    for reason in faults.values():
        print(f"could not be read: {reason}", file=sys.stderr)
    if faults:
        print(f"{len(faults)} files could not be read", file=sys.stderr)
    return SOME_FAILED if faults else DONE


if __name__ == "__main__":
    run_tool(main)
