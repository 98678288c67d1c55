"""Zero-shot numbers of released models, in percent, as their papers tell them; for comparison, never for tests."""

from __future__ import annotations

_NAMES = ("ek100_mir/map", "ek100_mir/ndcg", "ek100_cls/action_top1", "egtea/action_top1", "egtea/action_mean_class")
_MCQ = ("egomcq/inter", "egomcq/intra")


def _row(*numbers: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(_NAMES + _MCQ, numbers, strict=True) if value is not None}


PUBLISHED: dict[str, dict[str, float]] = {
    "EgoVideo-L": _row(41.8, None, 24.0, 51.7, 47.1, 95.9, 65.5),
    "EgoVideo-G": _row(47.1, None, 28.5, 63.0, None, None, 69.1),
    "EVA02-AT-B": _row(34.3, 34.1, None, None, None, 95.0, 63.2),
    "EVA02-AT-L": _row(38.9, 36.2, None, None, None, 95.9, 66.5),
    "EgoVideo-2024": _row(45.9, 38.6, None, None, None, None, None),
    "AVION-B": _row(32.9, 32.7, None, None, None, 94.5, 61.4),
    "AVION-L": _row(37.6, 35.3, None, None, None, 95.4, 64.5),
    "LaViLa-B": _row(30.9, 32.0, None, None, 28.9, 93.8, 59.9),
    "LaViLa-L": _row(36.1, 34.6, None, None, 34.1, 94.5, 63.1),
}
