"""Is a model blind to time? Compares captions with their opposites, and clips with their reversals.

    python tools/probe_order.py runs/demo --metadata demo_data/val/hod.csv --root demo_data/val/videos --output order
    python tools/probe_order.py runs/demo --metadata captions.csv --output order                  captions alone
    python tools/probe_order.py open_clip:ViT-B-16:weights.pt --metadata EPIC_100_retrieval_test.csv --root ...

CHECKPOINT is what main_eval.py takes. The opposite of a caption exchanges its direction words (opens and closes), or is
read from --opposite_column; clips whose caption has none are left out. --metadata is an annotation file of any format;
without --root a csv with a column text is enough. --output gets order.html, the page to look at, and order.json.
docs/blind.md explains every number. The processes of torchrun --nproc_per_node=N tools/probe_order.py ... share clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from _common import load_for_checkpoint, run_tool, tool_parser
from numpy.typing import NDArray

from egohod import cli
from egohod.config import Config
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, EvalProtocol, require_all, tokenizer_for
from egohod.data.formats import read_clips, recognise
from egohod.data.formats.base import read_csv, read_header
from egohod.data.opposites import opposite
from egohod.data.storage import open_cache
from egohod.data.table import ClipTable, narrations_in, text_column
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.embed import PLAIN, FrameAverage, embed_clips, embed_texts, fingerprint
from egohod.evaluation.features import write_json, write_text
from egohod.evaluation.metrics import percent
from egohod.evaluation.page import data_uri, number, render
from egohod.evaluation.report import histogram_plot
from egohod.evaluation.runner import execution_of
from egohod.training.build import build_model

log = logging.getLogger("probe_order")

FORMAT, RESULTS_FILE, PAGE_FILE = 1, "order.json", "order.html"
# Borders of the table by distance, in percent of the distance of unrelated captions: whether only clips whose captions
# are apart are answered correctly.
DISTANCES = (5, 20)
# Distances of unrelated captions or clips below this are rounding: the model gives all of them one vector.
MIN_SCALE = 1e-6
# Groups and captions on the page: longer tables are not read. The file has all of them.
SHOWN_GROUPS, SHOWN_CAPTIONS = 30, 100
# Percent of clips that random answers reach; both a positive and then a negative margin is half of a half.
CHANCE = {PLAIN: 50.0, "reverse": 50.0, "shuffle": 50.0, "turned": 25.0}
# What a cosine is compared with.
REFERENCES = {"text_opposite": "text_other", "video_reverse": "video_other", "video_shuffle": "video_other"}

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Captions [N] that have an opposite [N], and their rows of the table; ``inspected`` counts those with none too."""

    table: ClipTable
    rows: Sequence[int]
    captions: Sequence[str]
    opposites: Sequence[str]
    inspected: int

    def restricted(self, mask: NDArray[np.bool_]) -> Pairs:
        """The pairs where ``mask`` [N] is true."""
        rows, captions, opposites = (
            [each for each, is_chosen in zip(values, mask, strict=True) if is_chosen]
            for values in (self.rows, self.captions, self.opposites)
        )
        return dataclasses.replace(self, rows=rows, captions=captions, opposites=opposites)


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    models = "a checkpoint or run folder, a file of upstream EgoHOD or AVION, or open_clip:NAME:FILE"
    add("checkpoint", metavar="CHECKPOINT", help=models)
    add("overrides", nargs="*", metavar="section.key=value", help="change single knobs, e.g. model.name=CLIP_VITB16")
    cli.add_config_file(parser, "configs/demo.yml")  # for settings that the checkpoint does not store
    add("--metadata", required=True, metavar="FILE", help="annotation file with the captions")
    add("--root", metavar="FOLDER", help="its videos; without it only captions are compared")
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the page and its numbers go")
    add("--opposite_column", metavar="NAME", help="column with the opposite of each caption, empty where there is none")
    add("--by", metavar="NAME", help="column whose values get a row each, e.g. a verb")
    add("--limit", type=int, default=1000, metavar="N", help="random clips to look at (default: 1000; 0: all)")
    add("--layout", default="auto", choices=("auto", "chunks", "avion", "whole"), help="file layout of the videos")
    add("--chunk_seconds", type=float, default=15.0, metavar="SECONDS", help="length of chunks (default: 15)")
    add("--allow_missing", action="store_true", help="leave out clips that cannot be read")
    args = parser.parse_intermixed_args(arguments)
    if args.limit < 0:
        raise UserError(f"--limit must be at least 0, not {args.limit}")
    cfg = load_for_checkpoint(args)
    pairs = read_pairs(args)
    with cli.joined(cfg, stops_cleanly=True, inference=True) as dist:
        results = probe(args, cfg, dist, pairs)
        if dist.is_main:
            write_json(args.output / RESULTS_FILE, results)
            write_text(args.output / PAGE_FILE, page(results))
            log.info("wrote %s and %s", args.output / PAGE_FILE, args.output / RESULTS_FILE)
            print(*findings(results), sep="\n")
    return cli.DONE


# --------------------------------------------------------------------------------------------------
# Captions and clips
# --------------------------------------------------------------------------------------------------


def read_pairs(args: argparse.Namespace) -> Pairs:
    """At most ``--limit`` random clips whose caption has an opposite, in the order of the file.

    Raises :class:`UserError` if a column is missing or no caption has an opposite.
    """
    path = Path(args.metadata)
    further = [name for name in (args.opposite_column, args.by) if name]
    # A plain list of captions has neither videos nor times; without videos nothing else needs them.
    names = read_header(path).names if not args.root and path.is_file() and recognise(path) == "hod" else []
    text = next((name for name in ("text", "caption") if name in names), "")
    if text and "video_id" not in names:
        cells = read_csv(path, [text, *further])
        columns = {"video_id": [""] * len(cells), "text": cells[text], **{name: cells[name] for name in further}}
        times = np.zeros(len(cells)), np.full(len(cells), np.inf)
        table = ClipTable(path, pa.table({name: text_column(each) for name, each in columns.items()}), *times)
    else:
        # With all columns if one is needed, so that a wrong name is answered with the right ones.
        table = read_clips(str(path), extra=None if further else ())
    written = table.column(args.opposite_column) if args.opposite_column else None
    if args.by:
        table.column(args.by)  # a wrong name is reported now, and not after an hour of decoding
    # In random order until there are enough: only these are looked at of a file of millions.
    chosen: list[tuple[int, str, str]] = []
    inspected = 0
    for row in np.random.default_rng(0).permutation(len(table)).tolist():
        inspected += 1
        texts = table.row(row).texts
        caption, others = texts[0], narrations_in(str(written[row] or "")) if written is not None else ()
        # Of several narrations each has its own opposite, as in training: a list with a gap does not say whose is left.
        other = opposite(caption) if written is None else others[0] if len(others) == len(texts) else None
        if other and other != caption:
            chosen.append((row, caption, other))
        if len(chosen) == args.limit:
            break
    if not chosen:
        cure = "--opposite_column names a column that has them" if written is None else "the column is empty"
        raise UserError(f"{path}: none of {inspected} captions has an opposite; {cure}")
    rows, captions, opposites = zip(*sorted(chosen), strict=True)
    return Pairs(table, rows, captions, opposites, inspected)


def probe(args: argparse.Namespace, cfg: Config, dist: Distributed, pairs: Pairs) -> dict[str, Any]:
    """All numbers of ``order.json``. Collective over all processes of the run."""
    # First: an output that cannot be written should not cost minutes.
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from error
    if args.checkpoint.startswith("open_clip:"):
        model: Any = FrameAverage(args.checkpoint).to(dist.device)
        size, tokenizer = model.size, model.tokenizer
    else:
        model = build_model(cfg, dist)
        size, tokenizer = model.geometry.image_size, tokenizer_for(cfg.model)
    # Some texts are longer than the model reads: where it reads the same of both, nothing can be measured.
    same = np.array([torch.equal(*tokenizer([*pair])) for pair in zip(pairs.captions, pairs.opposites, strict=True)])
    if same.all():
        raise UserError(f"{args.metadata}: the model reads too little of each caption to see how its opposite differs")
    pairs = pairs.restricted(~same)
    run = dataclasses.replace(execution_of(cfg, dist), allow_missing=args.allow_missing)
    frames, videos, left_out = cfg.evaluate.num_frames or cfg.model.num_frames, dict[str, torch.Tensor](), 0
    if args.root:
        source = SourceConfig(root=args.root, layout=args.layout, chunk_seconds=args.chunk_seconds)
        everything = ClipDataset(
            [(pairs.table, source)],
            # Frames as in training: other numbers of frames are another question.
            protocol=EvalProtocol("as_trained", frames=frames),
            size=size,
            decoder=cfg.data.decoder,
            cache=open_cache(cfg.data.cache, cfg.data.cache_gb),
            frame_cache=cfg.data.frame_cache,
        )
        dataset = everything.restricted(np.isin(np.arange(len(everything)), pairs.rows))
        missing = dist.gather_objects(dataset.missing() if dist.is_main else None)[0]
        readable = ~np.isin(np.arange(len(dataset)), list(missing))
        if not args.allow_missing or not readable.any():
            require_all(missing, len(dataset))
        videos, report = embed_clips(model, dataset.restricted(readable), run, controls=("reverse", "shuffle"))
        # Rows of clips that turned out to be unreadable are NaN.
        decoded = torch.isfinite(videos[PLAIN]).all(dim=1)
        if not decoded.any():
            require_all(report.faults, len(dataset))
        videos = {order: features[decoded] for order, features in videos.items()}
        readable[readable] = decoded.numpy()
        pairs, left_out = pairs.restricted(readable), int((~readable).sum())
    # Together, so that a text that is the caption of one clip and the opposite of another is encoded once.
    texts = embed_texts(model, [*pairs.captions, *pairs.opposites], tokenizer, run)
    measured = measure(*texts.chunk(2), videos, pairs.captions)
    numbers = summary(measured)
    groups = pairs.table.column(args.by)[list(pairs.rows)].tolist() if args.by else [""] * len(pairs.rows)
    # If only clips whose captions are apart are answered correctly, the text tower is part of the cause.
    scale = 1 - numbers["distributions"].get("text_other", {"mean": np.nan})["mean"]
    bins = np.digitize(100 * (1 - measured["text_opposite"]) / max(scale, MIN_SCALE), DISTANCES)
    names = [f"below {DISTANCES[0]} %", f"{DISTANCES[0]} to {DISTANCES[1]} %", f"above {DISTANCES[1]} %"]
    return {
        "format": FORMAT,
        "checkpoint": {"path": args.checkpoint, "sha256": fingerprint(model)},
        "model": args.checkpoint if isinstance(model, FrameAverage) else cfg.model.name,
        "metadata": str(args.metadata),
        "root": args.root,
        "opposites": f"column {args.opposite_column}" if args.opposite_column else "rules",
        "captions_inspected": pairs.inspected,
        "captions_cut": int(same.sum()),
        "clips": len(pairs.rows),
        "clips_left_out": left_out,
        "frames": frames if videos else None,
        **numbers,
        "by_distance": {
            name: summary({key: each[bins == i] for key, each in measured.items()})
            for i, name in enumerate(names)
            if (bins == i).any() and scale > MIN_SCALE
        },
        "by": args.by,
        "groups": {
            name: summary({key: each[np.array(groups) == name] for key, each in measured.items()})
            for name, _ in Counter(groups).most_common()
            if args.by
        },
        "rows": [
            {"clip": pairs.table.where(row), "caption": caption, "opposite": other, "group": group}
            | {name: round(float(each[i]), 5) for name, each in measured.items()}
            for i, (row, caption, other, group) in enumerate(
                zip(pairs.rows, pairs.captions, pairs.opposites, groups, strict=True)
            )
        ],
    }


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


def measure(
    texts: torch.Tensor, opposites: torch.Tensor, videos: Mapping[str, torch.Tensor], captions: Sequence[str]
) -> dict[str, Floats]:
    """Cosines and margins of every clip, float64 [N] each, from unit vectors [N, D].

    ``text_opposite`` and ``text_other`` are cosines of a caption with its opposite and with the caption of another
    clip; ``video_reverse``, ``video_shuffle`` and ``video_other`` those of a clip. ``margin_<order>`` is its similarity
    to its caption minus that to the opposite. NaN where there is no other caption or clip.
    """
    text, opposite = texts.double(), opposites.double()
    count = len(text)
    # Another caption for the scale: features of most models share a direction, so that unrelated texts have cosines far
    # above 0. A shift of a random order gives each clip one partner; equal captions are no partners.
    order = np.random.default_rng(0).permutation(count)
    partner = np.empty(count, np.int64)
    partner[order] = np.roll(order, 1)
    is_other = np.array([captions[i] != captions[j] for i, j in enumerate(partner)])
    measured = {
        "text_opposite": (text * opposite).sum(dim=1).numpy(),
        "text_other": np.where(is_other, (text * text[partner]).sum(dim=1).numpy(), np.nan),
    }
    if videos:
        plain = videos[PLAIN].double()
        for name in ("reverse", "shuffle"):
            measured[f"video_{name}"] = (plain * videos[name].double()).sum(dim=1).numpy()
        other = (plain * plain[partner]).sum(dim=1).numpy()
        measured["video_other"] = np.where(partner != np.arange(count), other, np.nan)
        for name, features in videos.items():
            measured[f"margin_{name}"] = (features.double() * (text - opposite)).sum(dim=1).numpy()
    return measured


def summary(measured: Mapping[str, Floats]) -> dict[str, Any]:
    """Distributions of :func:`measure`, relative distances, and the shares of margins above 0 in percent."""
    distributions: dict[str, Any] = {}
    for name, values in measured.items():
        values = values[~np.isnan(values)]
        if len(values):
            # Quantiles beside the mean: captions of two sorts of motion can have two peaks, with the mean between.
            points = (5, 25, 50, 75, 95)
            quantiles = dict(zip([f"p{each}" for each in points], np.percentile(values, points), strict=True))
            distributions[name] = {"count": len(values), "mean": values.mean(), "std": values.std(), **quantiles}
    # Relative to another caption or clip: 0 is the same vector, 1 as different as an unrelated one. A cosine alone says
    # little, as some models give unrelated captions 0.9 and others 0.
    distances = {}
    for name, reference in REFERENCES.items():
        if name in distributions and reference in distributions:
            scale = 1 - distributions[reference]["mean"]
            distances[name] = (1 - distributions[name]["mean"]) / scale if scale > MIN_SCALE else float("nan")
    shares = {}
    if "margin_plain" in measured:
        above = {name: measured[f"margin_{name}"] > 0 for name in (PLAIN, "reverse", "shuffle")}
        # Alone, a margin above 0 may be the caption's doing: some words are nearer to all clips than their opposites.
        above["turned"] = above[PLAIN] & (measured["margin_reverse"] < 0)
        for name, mask in above.items():
            score = percent([mask], CHANCE[name])
            shares[name] = {"value": score.value, "chance": score.chance, "interval": score.interval()}
    return {"distributions": distributions, "distances": distances, "shares": shares}


def findings(results: Mapping[str, Any]) -> list[str]:
    """What the numbers mean, one sentence each."""
    cosine, distance, shares = results["distributions"], results["distances"], results["shares"]
    lines = [f"{results['clips']} clips have a caption with an opposite ({results['captions_inspected']} inspected)"]
    if results["captions_cut"]:
        lines.append(f"{results['captions_cut']} more are cut by the model before the word that differs, and left out")
    for name, what, unrelated in (
        ("text_opposite", "a caption and its opposite", "captions of two clips"),
        ("video_reverse", "a clip and its reversal", "two clips"),
        ("video_shuffle", "a clip and its frames in random order", "two clips"),
    ):
        if name in distance:
            reference = cosine[REFERENCES[name]]["mean"]
            lines.append(
                f"{what}: mean cosine {cosine[name]['mean']:.3f} ({unrelated}: {reference:.3f}), "
                f"{number(100 * distance[name])} % of the distance of {unrelated}"
            )
    for name, what in (
        (PLAIN, "clips closer to their caption than to its opposite"),
        ("reverse", "the same, clips reversed"),
        ("shuffle", "the same, frames in random order"),
        ("turned", "clips closer to their caption, and to its opposite when reversed"),
    ):
        if shares:
            (low, high), value, chance = (shares[name][key] for key in ("interval", "value", "chance"))
            lines.append(f"{what}: {value:.1f} % ({low:.1f} to {high:.1f}; random answers {chance:g} %)")
    if shares and shares["turned"]["interval"][0] > CHANCE["turned"]:
        lines.append("the model reads the direction of motion, in more clips than random answers would")
    elif shares:
        lines.append("no sign that the model reads the direction of motion")
    return lines


def page(results: Mapping[str, Any]) -> str:
    """``order.html``."""
    titles = {
        "text_opposite": "caption and its opposite", "text_other": "captions of two clips",
        "video_reverse": "clip and its reversal", "video_shuffle": "clip and its frames shuffled",
        "video_other": "two clips", "margin_plain": "original", "margin_reverse": "reversed",
        "margin_shuffle": "frames shuffled",
    }  # fmt: skip
    plots = []
    for kind, label in (("text", "cosine"), ("video", "cosine"), ("margin", "margin")):
        names = [name for name in results["distributions"] if name.startswith(kind)]
        values = {titles[name]: np.array([row[name] for row in results["rows"]], np.float64) for name in names}
        if values:
            shown = {name: each[~np.isnan(each)] for name, each in values.items()}
            png = histogram_plot(shown, label, mark=0.0 if kind == "margin" else None)
            plots.append({"kind": kind, "picture": png and data_uri(png, "image/png")})
    # Evenly from the most similar pair to the least: both ends are worth reading.
    rows = sorted(results["rows"], key=lambda row: -row["text_opposite"])
    places = np.linspace(0, len(rows) - 1, min(len(rows), SHOWN_CAPTIONS)).round().astype(int)
    tables = {"By distance of caption and opposite": results["by_distance"]}
    if results["by"]:
        tables[f"By {results['by']}"] = dict(list(results["groups"].items())[:SHOWN_GROUPS])
    return render(
        "order.html.jinja", results=results, findings=findings(results), plots=plots, titles=titles, tables=tables,
        rows=[rows[i] for i in places],
    )  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
