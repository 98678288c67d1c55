"""Embed your own clips: features for search, or as input of another model.

    python tools/extract_features.py --videos my/videos --checkpoint runs/demo --output features
    python tools/extract_features.py --videos my/videos --clips clips.csv --checkpoint ... --output ...
    python tools/extract_features.py --videos long --window 2 --stride 1 --checkpoint ... --output ...

By default every video in the folder is one clip. --clips is a csv with video_id,start_second,end_second and optionally
text. --window and --stride, in seconds, slide over long videos, as methods for EgoNLQ and EgoMQ expect their features.
--output gets one .npz a video (features [n, D] of unit length, start, end, text) and index.json, which tools/search.py
reads. The model is that of --config_file. Rerun to resume after an interruption; a video or clip that changed is
embedded again. The processes of torchrun --nproc_per_node=N tools/extract_features.py ... share the videos.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _common import load_for_checkpoint, run_tool

from egohod import cli
from egohod.config import Config, to_yaml
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, EvalProtocol
from egohod.data.formats.custom import rows_of_csv, whole_files, windows
from egohod.data.storage import open_cache
from egohod.distributed import Distributed, setup
from egohod.errors import UserError
from egohod.evaluation.embed import extract, fingerprint, remaining
from egohod.evaluation.features import CONFIG_FILE, INDEX_FORMAT, file_of, open_index
from egohod.evaluation.runner import execution_of
from egohod.training.build import build_model

log = logging.getLogger("extract_features")


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__ or "", "configs/demo.yml")
    add = parser.add_argument
    videos = "folder of video files (with --clips also s3://... or chunks)"
    layouts = ("auto", "chunks", "avion", "whole")
    add("--videos", required=True, metavar="FOLDER", help=videos)
    add("--checkpoint", required=True, metavar="PATH", help="checkpoint or run folder, or a file of trained weights")
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the features go")
    add("--clips", type=Path, metavar="CSV", help="embed these clips: video_id,start_second,end_second[,text]")
    add("--window", type=float, metavar="SECONDS", help="embed windows of this length")
    add("--stride", type=float, metavar="SECONDS", help="from one window's start to the next (default: half a window)")
    add("--frames", type=int, metavar="N", help="frames of each clip (default: model.num_frames)")
    add("--layout", default="auto", choices=layouts, help="file layout of the videos of --clips")
    add("--chunk_seconds", type=float, default=15.0, metavar="SECONDS", help="length of chunks (default: 15)")
    add("--allow_missing", action="store_true", help="leave out what cannot be read")
    add("--dry_run", action="store_true", help="print how much there is to do, and write nothing")
    args = parser.parse_intermixed_args(arguments)
    # The model is that of the checkpoint; --config_file only adds what a checkpoint does not store.
    cfg = load_for_checkpoint(args)
    dataset = _dataset(args, cfg)
    dist = setup(cfg.train.device, inference=True)
    try:
        _embed(args, cfg, dist, dataset)
    finally:
        dist.close()
    return cli.DONE


def _dataset(args: argparse.Namespace, cfg: Config) -> ClipDataset:
    """The clips to embed, without those that cannot be read if the user allows it."""
    faults: list[str] = []
    if args.clips and args.window is not None:
        raise UserError("--clips and --window both choose the clips; give one of them")
    if args.stride is not None and args.window is None:
        raise UserError("--stride needs --window")
    if args.clips:
        clips = rows_of_csv(args.clips)
    elif args.window is not None:
        # Half a window: a moment at the border of one window is in the middle of another.
        stride = args.window / 2 if args.stride is None else args.stride
        clips, faults = windows(args.videos, args.window, stride, cfg.data.decoder)
    else:
        clips, faults = whole_files(args.videos)
    layout = args.layout if args.clips else "whole"
    # Short clips are not widened, unlike in training: a user who asks for half a second gets half a second.
    source = SourceConfig(root=args.videos, layout=layout, chunk_seconds=args.chunk_seconds, min_clip_seconds=0.0)
    frames = cfg.model.num_frames if args.frames is None else args.frames
    if frames < 1:
        raise UserError(f"--frames must be at least 1, not {frames}")
    dataset = ClipDataset(
        [(clips, source)],
        # One view of a clip: methods on top of features expect one vector a window.
        protocol=EvalProtocol("features", "this project: one centre crop", frames=frames),
        size=cfg.model.geometry().image_size,
        decoder=cfg.data.decoder,
        cache=open_cache(cfg.data.cache, cfg.data.cache_gb),
        frame_cache=cfg.data.frame_cache,
        read_ahead=cfg.data.read_ahead,
    )
    missing = dataset.missing()
    # Many clips of one video have one fault.
    lines = list(dict.fromkeys([*faults, *missing.values()]))
    if lines and not args.allow_missing:
        # All at once: a user with many videos should not fix them one run at a time.
        raise UserError(*lines, f"{len(lines)} videos cannot be read; --allow_missing leaves them out")
    for line in lines:
        log.warning("left out: %s", line)
    readable = np.ones(len(dataset), dtype=bool)
    readable[list(missing)] = False
    if not readable.any():
        raise UserError(f"{args.videos}: not a single clip can be read")
    return dataset.restricted(readable)


def _embed(args: argparse.Namespace, cfg: Config, dist: Distributed, dataset: ClipDataset) -> None:
    """Embed the clips whose features are not in --output yet; with --dry_run only count them."""
    rows_of, frames = dataset.clips.rows_of_videos(), dataset.protocol.frames
    # The first process decides for all: another one might list --output after the first has begun to write.
    todo = dist.gather_objects(remaining(dataset, args.output) if dist.is_main else None)[0]
    clips = sum(len(rows_of[video]) for video in todo)
    log.info(
        "%s clips of %s videos, of which %s clips of %s videos are to be embedded (%d frames, %d px); about %.3g MB",
        f"{len(dataset):,}", f"{len(rows_of):,}", f"{clips:,}", f"{len(todo):,}", frames, dataset.size,
        # float32
        4e-6 * clips * cfg.model.geometry().embed_dim,
    )  # fmt: skip
    if args.dry_run:
        return
    model = build_model(cfg, dist)
    # Two runs into one folder would mix their features, which nobody could separate later.
    with cli.claimed_run(str(args.output), dist):
        if dist.is_main:
            # All that two folders must share to be searched or compared together.
            index = {
                "format": INDEX_FORMAT,
                "model": cfg.model.name,
                "weights": fingerprint(model),
                "protocol": {"frames": frames, "size": dataset.size, "crop": "centre"},
                "root": str(args.videos) if "://" in args.videos else str(Path(args.videos).resolve()),
                "layout": dataset.config.layout,
                "chunk_seconds": dataset.config.chunk_seconds,
                "videos": {video: file_of(video) for video in rows_of},
            }
            open_index(args.output, index)
            (args.output / CONFIG_FILE).write_text(to_yaml(cfg), encoding="utf-8")
        dist.gather_objects(None)  # no process may write before the index accepts these features
        execution = dataclasses.replace(execution_of(cfg, dist), allow_missing=args.allow_missing)
        done = extract(model, dataset, args.output, todo, execution)
    log.info("%s: embedded %s clips of %s videos", args.output, f"{done.clips:,}", f"{done.videos:,}")
    if done.faults:
        log.warning("%d clips could not be read and were left out", len(done.faults))


if __name__ == "__main__":
    run_tool(main)
