"""Train a reranker: a small head over the frozen towers of a checkpoint, the second stage of retrieval.

    python tools/train_reranker.py --config_file configs/finetune/demo_mir.yml --checkpoint runs/demo \\
        --output runs/rerank.safetensors
    python main_eval.py --config_file configs/demo_eval.yml --checkpoint runs/demo --benchmark ek100_mir \\
        evaluate.rerank.path=runs/rerank.safetensors

It learns on the training clips of the configuration (crops, flips and texts as in training) from the dual encoder's own
mistakes: a step has some clips with a text of each, and what the dual encoder ranks highest for both. The scores of all
these texts for each clip, and of all these clips for each text, shall be distributed as the relevancies are, which are
those of data.labels.target=relevancy, else 1 for the own caption. Features of frozen towers are computed once; for
10,000 clips of 16 frames a ViT-B's take up to 2 GB of memory.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import load_for_checkpoint, run_tool
from torch import Tensor

from egohod import cli
from egohod.config import Config
from egohod.data.dataset import ClipDataset, normalise
from egohod.data.loader import ClipLoader, worker_count
from egohod.distributed import Distributed, inference_precision, pick_precision
from egohod.errors import UserError
from egohod.evaluation.embed import fingerprint
from egohod.loss.retrieval import relevancy
from egohod.model.dual_encoder import DualEncoder
from egohod.model.reranker import Reranker, RerankerShape, grid_tokens
from egohod.training.build import build_dataset, build_model

log = logging.getLogger("train_reranker")


@dataclass(frozen=True)
class Pool:
    """What frozen towers make of P samples (each training clip in each of its views) and their Q distinct texts."""

    video: Tensor  # [P, E]
    clips: Tensor  # [P, S, D], half precision
    own: Tensor  # int64 [P], the text of each sample
    text: Tensor  # [Q, E]
    words: Tensor  # [Q, L, D], half precision
    mask: Tensor  # bool [Q, L]
    clip_labels: dict[str, Tensor]  # [P, ...] by name
    text_labels: dict[str, Tensor]  # [Q, ...] by name

    def relevancy(self, samples: Tensor, texts: Tensor) -> Tensor:
        """Of some texts to the clips of some samples, [C, M]."""
        if "clip_verbs" not in self.clip_labels:
            return (self.own[samples][:, None] == texts).float()
        verbs, nouns = (
            (self.clip_labels[f"clip_{kind}"][samples], self.text_labels[f"text_{kind}"][texts])
            for kind in ("verbs", "nouns")
        )
        return relevancy(verbs, nouns)


@torch.no_grad()
def embed(model: DualEncoder, dataset: ClipDataset, cfg: Config, dist: Distributed, views: int, grid: int) -> Pool:
    """Features of all training clips, each in ``views`` crops with the texts drawn for them."""
    videos, tokens, labels = list[tuple[Tensor, Tensor]](), list[Tensor](), list[dict[str, Tensor]]()
    device, size = dist.device, cfg.evaluate.batch_size
    precision = pick_precision(cfg.evaluate.precision, device)
    # As the clips of so many epochs of training: frames, crop, flip and text follow from (seed, view, clip).
    keys = [(view, i) for view in range(views) for i in range(len(dataset))]
    loader = ClipLoader(
        dataset, [keys[first : first + size] for first in range(0, len(keys), size)],
        workers=worker_count(cfg.data.workers, dist), prefetch=2, pin_memory=False, stop=dist.stop, clips=size,
    )  # fmt: skip
    for batch in loader:
        with inference_precision(device, precision):
            video = normalise(batch["video"].to(device), model.image_stats)
            videos.append((model.encode_video(video).cpu(), grid_tokens(model, video, grid).half().cpu()))
        tokens.append(batch["tokens"])
        labels.append(batch.get("labels", {}))
    # Tokens of a batch have the length of its longest text.
    longest = max(each.shape[1] for each in tokens)
    every = torch.cat([F.pad(each, (0, longest - each.shape[1])) for each in tokens])
    # Of the samples with the same text the first one's classes are the text's.
    _, first, own = (torch.from_numpy(x) for x in np.unique(every, axis=0, return_index=True, return_inverse=True))
    distinct, texts = every[first], list[tuple[Tensor, Tensor]]()
    for some in distinct.split(size):
        with inference_precision(device, precision):
            read = model.textual.padded(some.to(device))
            texts.append((model.encode_text(read).cpu(), model.textual.states(read)[:, :longest].half().cpu()))
    joined = {name: torch.cat([each[name] for each in labels]) for name in labels[0]}
    (video, clips), (text, words) = (map(torch.cat, zip(*each, strict=True)) for each in (videos, texts))
    return Pool(video, clips, own, text, words, distinct != 0, joined, {name: x[first] for name, x in joined.items()})


def train(head: Reranker, pool: Pool, device: torch.device, args: Any) -> float:
    """Update ``head`` for ``args.steps`` steps; returns the mean loss of the last tenth."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    head.to(device).train()
    history, begin = list[float](), time.monotonic()
    for step in range(args.steps):
        samples, texts = list[Tensor](), list[Tensor]()
        for query in torch.randint(len(pool.video), (args.groups,), generator=generator):
            # A clip, its text, and a draw of what the dual encoder ranks highest for the one and for the other.
            text = pool.own[query]
            for chosen, first, cosines in (
                (samples, query, pool.video @ pool.text[text]), (texts, text, pool.text @ pool.video[query])
            ):  # fmt: skip
                hard = cosines.topk(min(args.depth, len(cosines))).indices
                drawn = hard[torch.randperm(len(hard), generator=generator)[: args.group - 1]]
                chosen.append(torch.cat((first[None], drawn)))
        # All pairs of the groups; what several of them have drawn counts once.
        rows, columns = torch.cat(samples).unique(), torch.cat(texts).unique()
        graded = pool.relevancy(rows, columns).to(device)
        longest = int(pool.mask[columns].any(dim=0).sum())
        words, mask = (each[columns, :longest].to(device) for each in (pool.words, pool.mask))
        cosines = (pool.video[rows] @ pool.text[columns].T).to(device)
        scores = head(pool.clips[rows].to(device).float(), words.float(), mask, cosines)
        # The scores' distribution over the candidates of a query is to be that of the relevancies (ListNet): of pairs
        # alone (RankNet) most say nothing about the first ranks, which precision is about.
        by_clip, by_text = (
            F.cross_entropy(each, (target / args.temperature).softmax(dim=1))
            for each, target in ((scores, graded), (scores.T, graded.T))
        )
        loss = (by_clip + by_text) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append(loss.item())
        if (step + 1) % max(1, args.steps // 10) == 0:
            log.info("step %d of %d: loss %.4f, %.0f s", step + 1, args.steps, loss.item(), time.monotonic() - begin)
    head.eval()
    last = history[-max(1, args.steps // 10) :]
    return sum(last) / len(last)


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__, "configs/finetune/demo_mir.yml")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="as of main_eval.py")
    add("--output", type=Path, required=True, metavar="FILE", help="the reranker, for evaluate.rerank.path")
    add("--steps", type=int, default=1000)
    add("--groups", type=int, default=6, help="clips of a step that mistakes are drawn for (default: %(default)s)")
    add("--group", type=int, default=8, help="clips and texts that are drawn for each (default: %(default)s)")
    add("--depth", type=int, default=30, help="ranks that they are drawn from (default: %(default)s)")
    add("--temperature", type=float, default=0.1, help="of the relevancies' distribution (default: %(default)s)")
    add("--views", type=int, default=3, help="crops of each training clip (default: %(default)s)")
    add("--grid", type=int, default=2, help="regions of a frame's side, an average of patches each (default: 2)")
    add("--width", type=int, default=128, help="of the head (default: %(default)s)")
    add("--parts", type=int, default=2, help="averages of a text's words that attend (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=0)
    args = parser.parse_intermixed_args(arguments)
    if args.width % RerankerShape.heads:
        raise UserError(f"--width {args.width} must be a multiple of {RerankerShape.heads}, the attention heads")
    cfg = load_for_checkpoint(args)
    with cli.joined(cfg) as dist:
        model = build_model(cfg, dist).eval().requires_grad_(False)
        dataset = build_dataset(cfg, model.geometry.image_size)
        start = time.monotonic()
        pool = embed(model, dataset, cfg, dist, args.views, args.grid)
        log.info("%d samples of %d clips in %.0f s", len(pool.video), len(dataset), time.monotonic() - start)
        torch.manual_seed(args.seed)
        settings = ", ".join(f"{name}={getattr(args, name)}" for name in ("steps", "groups", "group", "depth", "views"))
        # A tower may have fewer patches along a side than regions were requested.
        frames = cfg.model.num_frames
        grid = math.isqrt(pool.clips.shape[1] // frames)
        head = Reranker(
            RerankerShape(
                video_width=pool.clips.shape[2], text_width=pool.words.shape[2], frames=frames,
                grid=grid, width=args.width, parts=args.parts, encoder=fingerprint(model),
                trained=f"{len(dataset)} clips, {settings}, seed={args.seed}",
            )
        )  # fmt: skip
        loss = train(head, pool, dist.device, args)
        head.save(args.output)
        weights = sum(parameter.numel() for parameter in head.parameters())
        log.info("%s: %.2f M weights, loss %.4f in the last tenth", args.output, weights / 1e6, loss)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
