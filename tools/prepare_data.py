"""Get other people's data ready: list their clips, index their tar shards, see which videos to download.

    python tools/prepare_data.py clips my/lerobot_set --video_keys observation.images.ego --output clips.csv
    python tools/prepare_data.py clips my/egodex --output clips.csv
    python tools/prepare_data.py clips my/shards/shards.parquet --window 2 --stride 1 --output windows.csv
    python tools/prepare_data.py index my/shards
    python tools/prepare_data.py list-needed egoclip.csv --have ego4d_data --output uids.txt

clips        the clips of any annotations that training reads, as a csv with video_id,start_second,end_second,text for
             tools/extract_features.py --clips and tools/generate_hod.py --metadata; with --window windows over the
             clips, also over those without a narration, for the former
index        shards.parquet beside plain tars of mp4 and json or txt (WebDataset), the metadata and root of a source
list-needed  the ids of Ego4D's videos that annotations need, for its own command: ego4d --video_uid_file uids.txt

docs/data.md describes the data sets.
"""

from __future__ import annotations

import argparse
import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from _common import log_to_stdout, run_tool, tool_parser

from egohod.data.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.formats import BENCHMARKS, FORMATS, read_clips, read_raw
from egohod.data.formats.base import BenchmarkOptions, seconds
from egohod.data.formats.pairs import index_shards
from egohod.data.storage import SHARD_INDEX, VideoError
from egohod.data.videos import VideoStore, window_spans
from egohod.errors import DONE, UserError, nearest
from egohod.runtime import Progress, atomic_write

log = logging.getLogger("prepare_data")

_EGO4D_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    formats = ["auto", *FORMATS]
    add = commands.add_parser("clips", help="clips as a csv").add_argument
    add("metadata", help="annotation file, or the folder of a data set")
    add("--output", type=Path, required=True, metavar="CSV", help="where the clips go")
    add("--format", default="auto", choices=formats, help="format of the annotations (default: recognised)")
    add("--video_keys", nargs="+", default=[], metavar="KEY", help="cameras of a LeRobot data set")
    add("--subtasks", action="store_true", help="the annotated steps of a LeRobot data set's episodes")
    add("--window", type=float, metavar="SECONDS", help="windows of this length over every clip, without narrations")
    add("--stride", type=float, metavar="SECONDS", help="from one window's start to the next (default: half a window)")
    add = commands.add_parser("index", help="index of tar shards").add_argument
    add("root", help="folder of the tars, with any sub-folders, or a URI such as s3://bucket/prefix")
    add("--output", type=Path, metavar="FOLDER", help="where the index goes (default: root); needed for a URI")
    add = commands.add_parser("list-needed", help="ids of Ego4D's videos to download").add_argument
    add("annotations", nargs="+", help="annotation files of training, or with --benchmark folders of it")
    add("--output", type=Path, required=True, metavar="TXT", help="where the ids go, one a line")
    add("--format", default="auto", choices=formats, help="format of the annotations (default: recognised)")
    add("--benchmark", metavar="KIND", help="a benchmark on Ego4D: egomcq, ego4d_nlq, ego4d_mq, ...")
    add("--have", metavar="FOLDER", help="leave out videos that are below it, as the ego4d command stores them")
    return parser.parse_args(argv)


def list_clips(args: argparse.Namespace) -> None:
    """The csv of all clips, or of windows over them."""
    source = SourceConfig(args.metadata, args.format, video_keys=args.video_keys, subtasks=args.subtasks)
    if args.window is None:
        if args.stride is not None:
            raise UserError("--stride needs --window")
        clips = read_clips(source)
        names = ["video_id", "start_second", "end_second", "text"]
        names += [name for name in clips.column_names if name not in names]
        table = pd.DataFrame({name: clips.column(name) for name in names})
    else:
        stride = args.window / 2 if args.stride is None else args.stride
        raw = read_raw(source, ())
        start, end = (seconds(times) for times in raw.times)
        rows = [
            (video, begin + first, begin + last)
            for video, begin, until in zip(raw.columns["video_id"].to_pylist(), start, end, strict=True)
            if begin < until  # false for a length that is unknown
            for first, last in window_spans(until - begin, args.window, stride)
        ]
        if left_out := len(raw.broken) + int((~(start < end)).sum()):
            log.warning("left out %d entries without readable times", left_out)
        table = pd.DataFrame(rows, columns=["video_id", "start_second", "end_second"])
    with atomic_write(args.output) as temporary:
        table.to_csv(temporary, index=False)
    log.info("%s: %s clips of %s videos", args.output, f"{len(table):,}", f"{table['video_id'].nunique():,}")


def index(args: argparse.Namespace) -> None:
    """The index of the tars."""
    if args.output is None and "://" in args.root:
        # The address is not printed: it may hold a password.
        raise UserError(
            f"index: nothing can be written to a URI; give --output, and copy {SHARD_INDEX} beside the tars"
        )
    output = Path(args.output or args.root)
    output.mkdir(parents=True, exist_ok=True)
    with Progress("read tars", 1, unit="tars") as progress:
        shards, videos = index_shards(args.root, output, lambda done, total: progress.update(done, total=total))
    log.info("%s: %s videos in %s tars", output / SHARD_INDEX, f"{videos:,}", f"{shards:,}")


def list_needed(args: argparse.Namespace) -> None:
    """The ids of Ego4D's videos that are needed and not there yet."""
    videos = dict[str, None]()
    for path in args.annotations:
        if args.benchmark is None:
            ids = read_raw(SourceConfig(path, args.format), ()).columns["video_id"].unique().to_pylist()
        elif args.benchmark in BENCHMARKS:
            ids = BENCHMARKS[args.benchmark].read(SourceConfig(path), BenchmarkOptions()).clips.videos
        else:
            raise UserError(
                f"--benchmark {args.benchmark}: no such benchmark{nearest(args.benchmark, list(BENCHMARKS))}"
            )
        videos |= dict.fromkeys(ids)
    uids = [video for video in videos if _EGO4D_UID.fullmatch(video)]
    if not uids:
        raise UserError(f"{args.annotations[0]}: no id of an Ego4D video (it has '{next(iter(videos), '')}')")
    if len(uids) < len(videos):
        log.warning("left out %d ids of other data sets", len(videos) - len(uids))
    wanted = uids
    if args.have:
        store = VideoStore(args.have, "whole", 15.0, choose_decoder("auto")[1])
        wanted = [uid for uid in uids if not _is_there(store, uid)]
    with atomic_write(args.output) as temporary:
        temporary.write_text("".join(f"{uid}\n" for uid in wanted), encoding="utf-8")
    log.info("%s: %s videos, %s of them to download", args.output, f"{len(uids):,}", f"{len(wanted):,}")
    if wanted:
        folder = args.have or "ego4d_data"
        paths = ["--output_directory", folder, "--datasets", "full_scale", "--video_uid_file", str(args.output)]
        log.info("%s", shlex.join(["ego4d", *paths, "-y"]))


def _is_there(store: VideoStore, uid: str) -> bool:
    try:
        return bool(store.states(uid, 0.0))
    except VideoError:
        return False


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    log_to_stdout()
    try:
        {"clips": list_clips, "index": index, "list-needed": list_needed}[args.command](args)
    except OSError as error:  # a disk that is full, a folder that may not be read
        raise UserError(f"{error.filename or args.command}: {error.strerror or error}") from error
    return DONE


if __name__ == "__main__":
    run_tool(main)
