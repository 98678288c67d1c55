"""Train a reranker: a small head over the frozen towers of a checkpoint, the second stage of retrieval.

    python tools/train_reranker.py --config_file configs/finetune/demo_mir.yml --checkpoint runs/demo \\
        --output runs/rerank.safetensors
    python main_eval.py --config_file configs/demo_eval.yml --checkpoint runs/demo --benchmark ek100_mir \\
        evaluate.rerank.path=runs/rerank.safetensors

It learns on the training clips of the configuration (crops, flips and texts as in training) from the dual encoder's own
mistakes: a batch is a clip or a text with those that the dual encoder ranks highest for it, and of all pairs in it the
more relevant one must score higher. Relevancy is that of data.labels.target=relevancy, else 1 for the own caption.
Features of frozen towers are computed once; for 10,000 clips of 16 frames a ViT-B's take up to 2 GB of memory.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """What frozen towers make of P samples (each training clip, once for every view of it)."""

    video: Tensor  # [P, E]
    clips: Tensor  # [P, S, D], half precision
    text: Tensor  # [P, E]
    words: Tensor  # [P, L, D], half precision
    mask: Tensor  # bool [P, L]
    labels: dict[str, Tensor]  # [P, ...] by name

    def relevancy(self, rows: Tensor) -> Tensor:
        """Of the texts of some samples to their clips, [B, B]."""
        if "clip_verbs" not in self.labels:
            # Equal captions are as good as the own one.
            return (self.text[rows] @ self.text[rows].T > 1 - 1e-5).float()
        verbs, text_verbs = (self.labels[f"{each}_verbs"][rows] for each in ("clip", "text"))
        nouns, text_nouns = (self.labels[f"{each}_nouns"][rows] for each in ("clip", "text"))
        return relevancy((verbs, text_verbs), (nouns, text_nouns))


@torch.no_grad()
def embed(model: DualEncoder, dataset: ClipDataset, cfg: Config, dist: Distributed, views: int, grid: int) -> Pool:
    """Features of all training clips, each in ``views`` crops with the texts drawn for them."""
    batches, device = list[tuple[Any, ...]](), dist.device
    precision, labels = pick_precision(cfg.evaluate.precision, device), list[dict[str, Tensor]]()
    # As the clips of so many epochs of training: frames, crop, flip and text follow from (seed, view, clip).
    keys, size = [(view, i) for view in range(views) for i in range(len(dataset))], cfg.evaluate.batch_size
    loader = ClipLoader(
        dataset, [keys[first : first + size] for first in range(0, len(keys), size)],
        workers=worker_count(cfg.data.workers, dist), prefetch=2, pin_memory=False, stop=dist.stop, clips=size,
    )  # fmt: skip
    for batch in loader:
        with inference_precision(device, precision):
            video = normalise(batch["video"].to(device), model.image_stats)
            tokens = model.textual.padded(batch["tokens"].to(device))
            values = (
                model.encode_video(video), grid_tokens(model, video, grid), model.encode_text(tokens),
                model.textual.states(tokens), tokens != 0,
            )  # fmt: skip
        batches.append((*(each.half().cpu() if each.ndim == 3 else each.cpu() for each in values),))
        labels.append(batch.get("labels", {}))
    columns = [*zip(*batches, strict=True)]
    longest = max(mask.shape[1] for mask in columns[4])
    # Texts of a batch have the length of its longest.
    padded = [F.pad(words, (0, 0, 0, longest - words.shape[1])) for words in columns[3]]
    masks = [F.pad(mask, (0, longest - mask.shape[1])) for mask in columns[4]]
    video, clips, text = (torch.cat(columns[i]) for i in range(3))
    joined = {name: torch.cat([each[name] for each in labels]) for name in labels[0]}
    return Pool(video, clips, text, torch.cat(padded), torch.cat(masks), joined)


def train(head: Reranker, pool: Pool, device: torch.device, args: Any) -> float:
    """Update ``head`` for ``args.steps`` batches; returns the share of pairs in the right order in the last tenth."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    head.to(device).train()
    right, begin = list[float](), time.monotonic()
    for step in range(args.steps):
        losses = []
        for _ in range(args.groups):
            # A query, clip or text by turns, and a draw of what the dual encoder ranks highest for it.
            query = int(torch.randint(len(pool.video), (), generator=generator))
            sides = (pool.video, pool.text) if torch.rand((), generator=generator) < 0.5 else (pool.text, pool.video)
            first = (sides[1] @ sides[0][query]).topk(min(args.depth, len(pool.video))).indices
            drawn = first[torch.randperm(len(first), generator=generator)[: args.group - 1]]
            rows = torch.cat((torch.tensor([query]), drawn[drawn != query]))
            graded = pool.relevancy(rows).to(device)
            cosines = (pool.video[rows] @ pool.text[rows].T).to(device)
            longest = int(pool.mask[rows].any(dim=0).sum())
            words, mask = (each[rows, :longest].to(device) for each in (pool.words, pool.mask))
            scores = head(pool.clips[rows].to(device).float(), words.float(), mask, cosines)
            for each, target in ((scores, graded), (scores.T, graded.T)):
                # Of two candidates of a query the more relevant one must lead, the more the larger the difference
                # (RankNet): precision at every rank is about such pairs.
                lead, weight = (m[:, :, None] - m[:, None, :] for m in (each, target))
                weight = weight.clamp(min=0)
                losses.append((weight * F.softplus(-lead)).sum() / weight.sum().clamp(min=1e-3))
                if step >= args.steps - max(1, args.steps // 10):
                    right.append(float((weight * (lead.detach() > 0)).sum() / weight.sum().clamp(min=1e-3)))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, args.steps // 10) == 0:
            log.info("step %d of %d: loss %.4f, %.0f s", step + 1, args.steps, loss.item(), time.monotonic() - begin)
    head.eval()
    return 100 * sum(right) / max(1, len(right))


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__, "configs/finetune/demo_mir.yml")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="as of main_eval.py")
    add("--output", type=Path, required=True, metavar="FILE", help="the reranker, for evaluate.rerank.path")
    add("--steps", type=int, default=1000)
    add("--groups", type=int, default=4, help="queries of a step (default: %(default)s)")
    add("--group", type=int, default=12, help="clips and texts of a query's group (default: %(default)s)")
    add("--depth", type=int, default=50, help="ranks that a group is drawn from (default: %(default)s)")
    add("--views", type=int, default=2, help="crops of each training clip (default: %(default)s)")
    add("--grid", type=int, default=2, help="regions of a frame's side, an average of patches each (default: 2)")
    add("--width", type=int, default=128, help="of the head (default: %(default)s)")
    add("--layers", type=int, default=2, help="of the head (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
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
                grid=grid, width=args.width, layers=args.layers, encoder=fingerprint(model),
                trained=f"{len(dataset)} clips, {settings}, seed={args.seed}",
            )
        )  # fmt: skip
        share = train(head, pool, dist.device, args)
        head.save(args.output)
        weights = sum(parameter.numel() for parameter in head.parameters())
        log.info("%s: %.2f M weights, %.1f %% of the pairs in order", args.output, weights / 1e6, share)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
