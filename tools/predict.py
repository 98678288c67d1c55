"""Recognise what happens in a video: the top classes of a fine-tuned model, or the best of some sentences.

    python tools/predict.py clip.mp4 --checkpoint runs/ek100_cls
    python tools/predict.py clip.mp4 --checkpoint runs/demo --sentences "cuts an onion" "opens the fridge"
    python tools/predict.py long.mp4 --checkpoint runs/ek100_cls --window 2      writes timeline.csv and timeline.png

A video longer than two windows is classified window by window: the csv has the five best classes of every window, and
the picture the best classes over time.
"""

from __future__ import annotations

import argparse
import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from _common import load_for_checkpoint, run_tool, save_picture, tool_parser

from egohod import cli
from egohod.api import load_clip
from egohod.config import Config
from egohod.data.dataset import center_crop, normalise, tokenizer_for
from egohod.data.decoders import choose_decoder
from egohod.data.videos import window_spans as spans
from egohod.distributed import inference_precision, setup
from egohod.errors import UserError
from egohod.evaluation.embed import ClassProbabilities
from egohod.evaluation.report import new_figure
from egohod.model.dual_encoder import DualEncoder
from egohod.training.build import build_model
from egohod.training.checkpoint import CheckpointError, classes_of

log = logging.getLogger("predict")

# Classes printed for a window, and rows of the picture: more than ten are hard to compare by eye.
SHOWN, DRAWN = 5, 10


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("video", type=Path, metavar="VIDEO", help="a video file")
    add("overrides", nargs="*", metavar="section.key=value", help="change single knobs, e.g. train.device=cpu")
    cli.add_config_file(parser, "configs/demo.yml")  # for settings that the checkpoint does not store
    weights = "run or checkpoint folder; with --sentences any weights file"
    add("--checkpoint", required=True, metavar="PATH", help=weights)
    add("--sentences", nargs="+", metavar="TEXT", help="rank these instead of classes")
    add("--window", type=float, default=2.0, metavar="SECONDS", help="length of a window of a long video (default: 2)")
    add("--output", type=Path, default=Path(), metavar="FOLDER", help="where a timeline goes (default: here)")
    args = parser.parse_intermixed_args(arguments)
    # Not <=, which NaN would pass.
    if not args.window > 0:
        raise UserError(f"--window must be above 0, not {args.window:g}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from error
    cfg = load_for_checkpoint(args)
    windows = _windows(args.video, args.window, cfg.data.decoder)
    names, scores = _scores(cfg, args, windows)
    # Stable: equal scores come in the order of the names, on every machine.
    best = np.argsort(-scores, axis=1, kind="stable")[:, : min(SHOWN, len(names))]
    if len(windows) == 1:
        for number in best[0]:
            print(f"{scores[0, number]:.3f}  {names[number]}")
        return cli.DONE
    path = args.output / "timeline.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["start", "end", "rank", "label", "score"])
        for (start, end), row, order in zip(windows, scores, best, strict=True):
            for rank, number in enumerate(order, start=1):
                writer.writerow([f"{start:.2f}", f"{end:.2f}", rank, names[number], f"{row[number]:.4f}"])
            print(f"{start:8.1f} - {end:.1f} s  {row[order[0]]:.3f}  {names[order[0]]}")
    log.info("wrote %s", path)
    _draw(args.output / "timeline.png", windows, names, scores)
    return cli.DONE


def _windows(video: Path, window: float, decoder: str) -> list[tuple[float, float]]:
    # The whole video if it is short: two windows or less would cut one action in two.
    opened = choose_decoder(decoder)[1](video, str(video))
    duration = opened.duration
    opened.close()
    if duration <= 2 * window:
        return [(0.0, duration)]
    *before, (start, end) = spans(duration, window, window)
    # A rest of less than half a window joins the one before: the model saw no such short clips.
    return [*before, (start, end)] if end - start >= window / 2 else [*before[:-1], (before[-1][0], end)]


def _scores(
    cfg: Config, args: argparse.Namespace, windows: Sequence[tuple[float, float]]
) -> tuple[Sequence[str], np.ndarray]:
    """Names of classes or sentences, and scores [windows, names]: probabilities, or cosine similarities."""
    dist = setup(cfg.train.device, alone=True, inference=True)
    if args.sentences:
        encoder: DualEncoder | ClassProbabilities = build_model(cfg, dist).eval()
        # Both encoders return unit vectors, whose product is the cosine similarity.
        tokens = tokenizer_for(cfg.model)(args.sentences).to(dist.device)
        with torch.inference_mode(), inference_precision(dist.device, torch.float32):
            names, columns = args.sentences, encoder.encode_text(tokens).T
    else:
        try:
            cfg.model.heads, classes = classes_of(Path(args.checkpoint))
        except CheckpointError as error:
            file = "a file does not store the classes of its heads: give its run or checkpoint folder"
            what = file if Path(args.checkpoint).is_file() else str(error)
            raise UserError(f"--checkpoint {args.checkpoint}: {what}; --sentences ranks sentences instead") from error
        encoder = ClassProbabilities(build_model(cfg, dist, classes), classes).eval()
        # Features of this encoder are probabilities, one a class and perhaps those of verb and noun behind them: the
        # product below takes the former.
        names, columns = classes.names, torch.eye(len(encoder.mirrored), len(classes.names), device=dist.device)
    # One centre crop: the protocol of features and of most published numbers.
    size = cfg.model.geometry().image_size
    rows = []
    with torch.inference_mode(), inference_precision(dist.device, torch.float32):
        # One window in memory at a time, however long the video is.
        for start, end in windows:
            frames = load_clip(args.video, start, end, cfg.model.num_frames, cfg.data.decoder)
            video = normalise(center_crop(frames, size)[None].to(dist.device), encoder.image_stats)
            rows.append((encoder.encode_video(video) @ columns)[0].float().cpu().numpy())
    return names, np.stack(rows)


def _draw(path: Path, windows: Sequence[tuple[float, float]], names: Sequence[str], scores: np.ndarray) -> None:
    """Plot the classes with the highest scores over time, a row each."""
    # By its best moment: an action that lasts two of a hundred windows is worth a row.
    shown = np.argsort(-scores.max(axis=0), kind="stable")[:DRAWN]
    edges = [start for start, _ in windows] + [windows[-1][1]]
    # A row for each class, so that names stay readable.
    figure = new_figure((12, 1 + 0.35 * len(shown)))
    if figure is None:
        return
    axis = figure.subplots()
    mesh = axis.pcolormesh(edges, np.arange(len(shown) + 1), scores[:, shown].T, cmap="viridis")
    axis.set(yticks=np.arange(len(shown)) + 0.5, yticklabels=[names[i] for i in shown], xlabel="seconds")
    for label in axis.get_yticklabels():
        label.set_parse_math(False)  # a $ is a $
    # The best class at the top.
    axis.invert_yaxis()
    figure.colorbar(mesh, label="score")
    save_picture(figure, path)
    log.info("wrote %s", path)


if __name__ == "__main__":
    run_tool(main)
