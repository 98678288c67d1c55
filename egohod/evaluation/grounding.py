"""When does a text happen in a recording? Measured by a small head that is trained on features of windows.

The head looks at a few windows around each one and gives it a score and a segment, as anchor-free detectors do
(ActionFormer, 2202.07925, in small). It is trained on the training part, on all processes alike.

R recordings of L windows, D dimensions, Q queries.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from egohod.data.formats.base import GroundingData, MomentQuery
from egohod.distributed import one_core
from egohod.evaluation.metrics import RESAMPLES, IntArray, Score, percent
from egohod.evaluation.tasks import EvaluationTask, Features

log = logging.getLogger(__name__)

# Of the official evaluations: recall at k with an overlap of at least so much, and detection from 0.1 to 0.5.
RECALL_AT, OVERLAPS = (1, 5), (0.3, 0.5)
DETECTION_OVERLAPS = (0.1, 0.2, 0.3, 0.4, 0.5)
# Segments of a query that are kept, and the overlap with a better one from which on a segment is the same.
_SEGMENTS, _SAME = 10, 0.5
_WIDTH, _EPOCHS, _BATCH, _RATE = 64, 12, 16, 2e-3
# Queries about what does not happen, for each that does, in training a detector.
_ABSENT = 2
# Draws of random segments whose mean is the chance level, of recall and of detection, which takes longer.
_CHANCE_DRAWS = (50, 5)

Segments = NDArray[np.float64]
"""Start, end and score of each, best first: [n, 3]."""


class GroundingHead(nn.Module):
    """Score and segment of every window for a query; segments are distances to both sides in windows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.video, self.text = nn.Linear(width, _WIDTH), nn.Linear(width, _WIDTH)
        # It sees 14 windows to either side, enough for both ends of most moments.
        self.mix = nn.Sequential(
            nn.Conv1d(2 * _WIDTH + 1, _WIDTH, 5, padding=2), nn.GELU(),
            nn.Conv1d(_WIDTH, _WIDTH, 5, padding=4, dilation=2), nn.GELU(),
            nn.Conv1d(_WIDTH, _WIDTH, 5, padding=8, dilation=4), nn.GELU(), nn.Conv1d(_WIDTH, 3, 1),
        )  # fmt: skip

    def forward(self, video: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Windows [Q, L, D] with ``mask`` [Q, L] of those that exist, texts [Q, D] -> logits [Q, L], [Q, L, 2]."""
        similarity = (video * text[:, None]).sum(dim=-1, keepdim=True)
        clips, query = self.video(video), self.text(text)[:, None]
        joined = torch.cat([clips * query, clips, similarity], dim=-1) * mask[..., None]
        score, *sides = self.mix(joined.transpose(1, 2)).unbind(dim=1)
        return score, F.softplus(torch.stack(sides, dim=-1))


@dataclass(frozen=True)
class GroundingTask(GroundingData, EvaluationTask):
    """Recall of the moment of a query (NLQ), or mean average precision of the moments of every class (MQ)."""

    def measure(self, video: Features, text: Features) -> dict[str, Score]:
        """Metrics in percent; the head is trained on features of the same order of frames that it is tested on.

        NaN, with a warning, where no moment of the training or of the validation part is left.
        """
        if not self._can_be_measured:
            log.warning("no recording with a moment can be read whole, of the training or of the validation part")
            return {name: percent([], None) for name in self.metric_names}
        return self._scores(self._segments(video, text), self._chance)

    @property
    def metric_names(self) -> list[str]:
        """See :class:`EvaluationTask`."""
        if self.detection:
            return ["map", *(f"map_iou_{100 * overlap:.0f}" for overlap in DETECTION_OVERLAPS), "recall_1x_iou_50"]
        return [*(f"recall_{k}_iou_{100 * overlap:.0f}" for k in RECALL_AT for overlap in OVERLAPS), "recall_1_mean"]

    def details(self, video: Features, text: Features) -> Mapping[str, Any]:
        """The best segment of each query that has a moment, and the windows in their middles."""
        queries = []
        best_of_each = self._segments(video, text) if self._can_be_measured else ()
        for query, segments in zip(self._tested, best_of_each, strict=self._can_be_measured):
            if not query.moments:
                continue
            rows = self.recordings[query.recording]
            best = [round(float(value), 3) for value in segments[0]]
            overlap = max(_overlap(best, span) for span in query.moments)
            # The windows in the middles.
            shown, true = (
                int(rows[np.abs(self.centres[rows] - (start + end) / 2).argmin()])
                for start, end in (best[:2], query.moments[0])
            )
            queries.append(
                {
                    "text": query.text, "moments": [list(span) for span in query.moments], "best": best,
                    "overlap": round(overlap, 3), "shown": shown, "true": true,
                }
            )  # fmt: skip
        return {"kind": "grounding", "texts": list(self.texts), "queries": queries}

    def restricted(self, mask: NDArray[Any]) -> GroundingTask:
        """See :class:`EvaluationTask`; a recording of which a window is left out goes, and with it its queries."""
        number = np.cumsum(mask) - 1
        whole = [bool(mask[rows].all()) for rows in self.recordings]
        place = np.cumsum(whole) - 1
        return dataclasses.replace(
            self,
            recordings=[number[rows] for rows, complete in zip(self.recordings, whole, strict=True) if complete],
            centres=self.centres[mask],
            queries=[
                dataclasses.replace(query, recording=int(place[query.recording]))
                for query in self.queries
                if whole[query.recording]
            ],
        )

    @property
    def _can_be_measured(self) -> bool:
        """Whether both parts still have a recording with a moment."""
        return {query.train for query in self.queries if query.moments} == {True, False}

    @cached_property
    def _tested(self) -> list[MomentQuery]:
        return [query for query in self.queries if not query.train]

    @cached_property
    def _chance(self) -> dict[str, float]:
        """What random segments reach that are as long as moments of the training part."""
        generator = np.random.default_rng(0)
        lengths = np.array([end - start for query in self.queries if query.train for start, end in query.moments])
        values: dict[str, list[float]] = {}
        for _ in range(_CHANCE_DRAWS[self.detection]):
            drawn = []
            for query in self._tested:
                centres, half = self.centres[self.recordings[query.recording]], generator.choice(lengths, _SEGMENTS) / 2
                middle = generator.uniform(centres[0], centres[-1], _SEGMENTS)
                drawn.append(_suppressed(np.stack([middle - half, middle + half, generator.random(_SEGMENTS)], axis=1)))
            for name, score in self._scores(drawn, {}).items():
                values.setdefault(name, []).append(score.value)
        return {name: float(np.mean(each)) for name, each in values.items()}

    @one_core()
    def _segments(self, video: Features, text: Features) -> list[Segments]:
        """The best segments of every tested query, by a head that is trained now."""
        assert isinstance(video, Tensor), "a head is trained on the features of one model"
        assert isinstance(text, Tensor), "a head is trained on the features of one model"
        # Both numbers and details need them. The features are kept with them: an address alone may be another's later.
        earlier: dict[Any, Any] = self.__dict__.setdefault("_earlier", {})
        if (id(video), id(text)) in earlier:
            return earlier[id(video), id(text)][0]
        given = video, text
        video = video if video.dim() == 2 else video.mean(dim=1)
        # Without effect on whatever else draws random numbers, and the same on all processes.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            head = GroundingHead(video.shape[1])
            self._train(head, video, text)
        head.eval()
        result = []
        for query in self._tested:
            rows = self.recordings[query.recording]
            with torch.no_grad():
                mask = torch.ones(1, len(rows))
                score, sides = head(video[rows][None], text[query.text][None], mask)
            centres = self.centres[rows]
            spans = centres[:, None] + self.stride * sides[0].double().numpy() * [-1, 1]
            result.append(_suppressed(np.column_stack([spans, score[0].double().numpy()])))
        earlier[id(given[0]), id(given[1])] = result, *given
        return result

    def _train(self, head: GroundingHead, video: Tensor, text: Tensor) -> None:
        generator = np.random.default_rng(0)
        present = [query for query in self.queries if query.train and query.moments]
        absent = [query for query in self.queries if query.train and not query.moments]
        steps = -(-len(present) // _BATCH)
        # A small set gets as many steps as the large ones need to converge.
        epochs = max(_EPOCHS, -(-400 // steps))
        optimizer = torch.optim.AdamW(head.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=epochs * steps)
        for _ in range(epochs):
            order = generator.permutation(len(present))
            for at in range(0, len(order), _BATCH):
                batch = [present[i] for i in order[at : at + _BATCH]]
                if absent:
                    batch += [absent[i] for i in generator.integers(0, len(absent), _ABSENT * len(batch))]
                optimizer.zero_grad()
                self._loss(head, batch, video, text).backward()
                optimizer.step()
                schedule.step()

    def _loss(self, head: GroundingHead, batch: Sequence[MomentQuery], video: Tensor, text: Tensor) -> Tensor:
        """Whether a window is in a moment, balanced, and the overlap of its segment with that moment."""
        rows = [self.recordings[query.recording] for query in batch]
        longest = max(map(len, rows))
        mask = torch.tensor([[1.0] * len(each) + [0.0] * (longest - len(each)) for each in rows])
        padded = torch.stack([F.pad(video[each], (0, 0, 0, longest - len(each))) for each in rows])
        score, sides = head(padded, text[[query.text for query in batch]], mask)
        inside, target, counted = torch.zeros_like(mask), torch.zeros(*mask.shape, 2), mask.clone()
        for place, (query, each) in enumerate(zip(batch, rows, strict=True)):
            centres = self.centres[each]
            for start, end in query.moments:
                # The middle half, from which both ends are near; the rest of a moment counts neither way. A moment
                # shorter than a window belongs to the nearest one.
                away = np.abs(centres - (start + end) / 2)
                hit = away <= (end - start) / 4
                hit[away.argmin()] = True
                counted[place, : len(each)][torch.from_numpy((away <= (end - start) / 2) & ~hit)] = 0.0
                distances = np.stack([centres - start, end - centres], axis=1)[hit] / self.stride
                inside[place, : len(each)][torch.from_numpy(hit)] = 1.0
                target[place, : len(each)][torch.from_numpy(hit)] = torch.from_numpy(distances).float()
        losses = F.binary_cross_entropy_with_logits(score, inside, reduction="none")
        # Where two moments of a class meet, a window may be in the middle of the other.
        positive, negative = inside.sum().clamp(min=1), counted * (1 - inside)
        balanced = (losses * inside).sum() / positive + (losses * negative).sum() / negative.sum().clamp(min=1)
        common = torch.minimum(sides, target).sum(dim=-1)
        union = torch.maximum(sides, target).sum(dim=-1).clamp(min=1e-6)
        return balanced + ((1 - common / union) * inside).sum() / positive

    def _scores(self, segments: Sequence[Segments], chance: Mapping[str, float]) -> dict[str, Score]:
        # Whole recordings are resampled: the moments of one are no independent draws.
        of_recording: dict[int, list[int]] = {}
        for place, query in enumerate(self._tested):
            of_recording.setdefault(query.recording, []).append(place)
        groups = list(of_recording.values())
        # Of a single recording nothing can be resampled: no interval, instead of one without width.
        few = np.full(RESAMPLES, np.nan) if len(groups) < 2 else None

        def recall(name: str, hits: Sequence[Sequence[float]]) -> Score:
            """The mean of what every query has for each of its moments."""
            total, count = (np.array([sum(f(hits[i]) for i in group) for group in groups]) for f in (sum, len))

            def value(chosen: IntArray) -> NDArray[np.float64]:
                share: NDArray[np.float64] = total[chosen].sum(axis=-1) / count[chosen].sum(axis=-1)
                return 100 * share

            return Score(
                float(value(np.arange(len(groups)))),
                chance.get(name),
                lambda rng: few if few is not None else value(rng.integers(0, len(groups), (RESAMPLES, len(groups)))),
            )

        if not self.detection:
            best = np.array(
                [
                    [max(_overlap(s, q.moments[0]) for s in each[:k]) for k in RECALL_AT]
                    for q, each in zip(self._tested, segments, strict=True)
                ]
            )
            hits = {
                f"recall_{k}_iou_{100 * overlap:.0f}": best[:, column] >= overlap
                for column, k in enumerate(RECALL_AT)
                for overlap in OVERLAPS
            }
            # The official ranking is by the mean of both overlaps.
            hits["recall_1_mean"] = np.mean([hits[f"recall_1_iou_{100 * each:.0f}"] for each in OVERLAPS], axis=0)
            return {name: recall(name, values[:, None].tolist()) for name, values in hits.items()}
        matches = {overlap: self._matches(segments, overlap) for overlap in DETECTION_OVERLAPS}

        def precision(overlap: float, chosen: IntArray) -> float:
            places = [place for group in chosen for place in groups[group]]
            by_class: dict[int, list[int]] = {}
            for place in places:
                by_class.setdefault(self._tested[place].text, []).append(place)
            values = []
            for some in by_class.values():
                count = sum(len(self._tested[place].moments) for place in some)
                if count:
                    scores = np.concatenate([segments[place][:, 2] for place in some])
                    right = np.concatenate([matches[overlap][place] for place in some])
                    values.append(_interpolated_precision(right[np.argsort(-scores, kind="stable")], count))
            return 100 * float(np.mean(values)) if values else float("nan")

        def score(name: str, overlaps: Sequence[float]) -> Score:
            def value(chosen: IntArray) -> float:
                return float(np.mean([precision(each, chosen) for each in overlaps]))

            return Score(
                value(np.arange(len(groups))),
                chance.get(name),
                lambda rng: (
                    few
                    if few is not None
                    else np.array([value(rng.integers(0, len(groups), len(groups))) for _ in range(RESAMPLES)])
                ),
            )

        result = {"map": score("map", DETECTION_OVERLAPS)}
        for overlap in DETECTION_OVERLAPS:
            result[f"map_iou_{100 * overlap:.0f}"] = score(f"map_iou_{100 * overlap:.0f}", [overlap])
        # As many segments as there are moments of the class in the recording.
        recalled = [
            [any(_overlap(s, span) >= 0.5 for s in each[: len(query.moments)]) for span in query.moments]
            for query, each in zip(self._tested, segments, strict=True)
        ]
        result["recall_1x_iou_50"] = recall("recall_1x_iou_50", recalled)
        return result

    def _matches(self, segments: Sequence[Segments], overlap: float) -> list[NDArray[np.bool_]]:
        """Whether each segment hits a moment that no better one has hit."""
        result = []
        for query, each in zip(self._tested, segments, strict=True):
            free, hits = list(query.moments), np.zeros(len(each), dtype=bool)
            for place, segment in enumerate(each):
                shares = [_overlap(segment, span) for span in free]
                if shares and max(shares) >= overlap:
                    hits[place] = True
                    del free[int(np.argmax(shares))]
            result.append(hits)
        return result


def _overlap(one: Sequence[float] | NDArray[Any], other: Sequence[float] | NDArray[Any]) -> float:
    """Intersection over union of two stretches of time."""
    common = min(one[1], other[1]) - max(one[0], other[0])
    return max(0.0, common) / max(max(one[1], other[1]) - min(one[0], other[0]), 1e-9)


def _suppressed(segments: Segments) -> Segments:
    """The best segments, without those that a better one overlaps."""
    best: list[NDArray[np.float64]] = []
    for segment in segments[np.argsort(-segments[:, 2], kind="stable")]:
        if all(_overlap(segment, other) < _SAME for other in best):
            best.append(segment)
        if len(best) == _SEGMENTS:
            break
    return np.stack(best)


def _interpolated_precision(right: NDArray[np.bool_], count: int) -> float:
    """Average precision of ranked detections, interpolated as ActivityNet's evaluation does; ``count`` moments."""
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    # The best precision at this recall or a higher one.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * right).sum() / count)
