"""Putting weights into a model: strictly, with a report, and all or nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from egohod.model.config import IMAGE_STATS
from egohod.model.egovideo import DualEncoder
from egohod.model.slowfast import SlowFastTransformer
from egohod.model.video import ACTIVATIONS, Block
from egohod.model.weight_files import WeightFile, read_weights
from egohod.model.weight_names import Family, WeightsError, upstreams

__all__ = ["Family", "WeightFile", "WeightReport", "WeightsError", "load_state", "load_weights", "read_weights"]

log = logging.getLogger(__name__)

PROJECTIONS = ("visual.image_projection", "textual.text_projection", "logit_scale")
"""What the published recipe starts anew from CLIP: both output projections and the temperature."""

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Part:
    """A part that not every model has."""

    name: str
    pattern: str
    only_trains: bool = False
    """Whether it shapes the loss and no feature, so that it may come and go without being asked."""


PARTS = (
    _Part("temporal embedding", r"visual\.temporal_embedding"),
    _Part("spatial branch of the motion adapters", r"visual\..*\.adapter\.conv2d\..*"),
    _Part("motion adapters", r"visual\..*\.adapter\..*"),
    _Part("merge of the two paths", r"slowfast_projection"),
    _Part("offset of the sigmoid loss", r"logit_bias", only_trains=True),
    _Part("classification heads", r"heads\..*", only_trains=True),
    _Part("head of the box loss", r"visual\.box_head\..*", only_trains=True),
)


@dataclass
class WeightReport:
    """What happened to every weight of a file and of the model, under our names."""

    source: str
    family: Family
    taken: list[str] = field(default_factory=list)
    """Copied as they are."""
    resized: dict[str, str] = field(default_factory=dict)
    """Adapted to the model, with both shapes."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors of the file that were not used, with the reason."""
    missing: dict[str, str] = field(default_factory=dict)
    """Parameters of the model that kept their initial values, with the reason."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.source} ({self.family}): {len(self.taken)} tensors taken over"]
        if self.resized:
            parts.append("resized: " + ", ".join(f"{name} {shapes}" for name, shapes in self.resized.items()))
        parts += [f"not taken over: {text}" for text in _by_reason(self.dropped)]
        parts += [f"kept their initial values: {text}" for text in _by_reason(self.missing)]
        return "; ".join(parts + self.notes)


def _by_reason(names: Mapping[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in names.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{_list(found, 6)} ({reason})" for reason, found in reasons.items()]


def load_weights(
    model: nn.Module, weights: WeightFile, *, adapt: bool = False, projections: str = "auto"
) -> WeightReport:
    """Put the weights of a file into ``model``; they become the model's type. All is checked before anything is copied.

    Args:
        model: any module whose parameters have this project's names.
        weights: what :func:`read_weights` returns.
        adapt: whether to resize the temporal, spatial and text position embeddings (linearly, bicubic, by cutting) to
            the model's, and to start parts that a trained model does not have, such as motion adapters, anew.
        projections: ``keep`` takes over both output projections and the temperature, ``fresh`` leaves the model's, as
            the published recipe does; ``auto`` is fresh for CLIP models and keep for trained video models.

    Raises:
        WeightsError: one line that names tensors, both shapes, and the knob that would help.
    """
    own = model.state_dict()
    report = WeightReport(weights.source, weights.family, dropped=dict(weights.dropped), notes=list(weights.remarks))
    theirs = dict(weights.tensors)
    fresh = starts_projections_anew(weights, projections)
    if fresh:
        for name in PROJECTIONS:
            if theirs.pop(name, None) is not None:
                report.dropped[name] = "model.weights.projections=fresh"
    fitting = _Fitting(own, theirs, report, adapt, weights.family.is_clip, fresh)
    new = fitting.run()
    warning = ""
    for key, here in _meaning(model).items():
        there = weights.settings.get(key, here)
        if there != here and key == "model.image_stats" and weights.family is not Family.OURS:
            # Known by the family alone, and a run may well go on with other statistics.
            warning = f"{weights.family} trains with {key}={there}, here it is {here}"
        elif there != here:
            fitting.complaints.append(f"they were trained with {key}={there}, not {here}")
    if fitting.complaints:
        geometry = getattr(model, "geometry", None)
        here = f"{geometry.name}, {getattr(model, 'num_frames', '?')} frames" if geometry else type(model).__name__
        raise WeightsError(
            f"{weights.source} ({weights.family}): these weights do not fit the model ({here}): "
            f"{'; '.join(fitting.complaints)}"
        )
    if "logit_scale" in new and not own["logit_scale"].isclose(new["logit_scale"].to(own["logit_scale"]), atol=1e-3):
        old_and_new = [f"{(-value.float()).exp().item():.4f}" for value in (own["logit_scale"], new["logit_scale"])]
        report.notes.append("temperature {} gave way to the file's {}".format(*old_and_new))
    with torch.no_grad():
        for name, value in new.items():
            own[name].copy_(value)
    if warning:
        report.notes.append(warning)
        log.warning("%s: %s", weights.source, warning)
    return report


def _meaning(model: nn.Module) -> dict[str, str]:
    """Knobs under which the same weights would be another model without any shape to tell."""
    if not isinstance(model, DualEncoder):
        return {}
    block = model.visual.transformer.resblocks[0]
    assert isinstance(block, Block)
    known = {
        "model.activation": next(name for name, kind in ACTIVATIONS.items() if isinstance(block.mlp.gelu, kind)),
        "model.image_stats": next(name for name, stats in IMAGE_STATS.items() if stats == model.image_stats),
    }
    if isinstance(model.visual, SlowFastTransformer):
        known |= {"model.fast.position": model.visual.position, "model.fast.pool": model.visual.pool}
    return known


def starts_projections_anew(weights: WeightFile, projections: str) -> bool:
    """Whether the model keeps its own projections and temperature. Raises :class:`WeightsError` for a wrong choice."""
    if projections not in ("auto", "fresh", "keep"):
        raise WeightsError(f"projections is '{projections}', but must be auto, fresh or keep")
    return projections == "fresh" or (projections == "auto" and weights.family.is_clip)


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint") -> WeightReport:
    """Put a complete state dict under our names into ``model``: :func:`load_weights` without any adapting."""
    return load_weights(model, WeightFile(source, Family.OURS, "memory", "plain", dict(state)))


def upstream_state(weights: WeightFile) -> dict[str, Tensor]:
    """The weights under upstream's names, as its released configs save them (flash spelling, matrix ``conv1``).

    Left out is what upstream has no name for: parts that shape the loss alone.
    """
    unknown = [part.pattern for part in PARTS if part.only_trains]
    return {
        upstreams(name): value
        for name, value in weights.tensors.items()
        if not any(re.fullmatch(pattern, name) for pattern in unknown)
    }


class _Fitting:
    """Compares what a file holds with what a model wants."""

    def __init__(
        self,
        own: Mapping[str, Tensor],
        theirs: dict[str, Tensor],
        report: WeightReport,
        adapt: bool,
        is_clip: bool,
        fresh: bool,
    ) -> None:
        self._own, self._theirs, self._report = own, theirs, report
        self._adapt, self._is_clip, self._fresh = adapt, is_clip, fresh
        self.complaints: list[str] = []

    def run(self) -> dict[str, Tensor]:
        """What is to be copied, by name; ``complaints`` and the report say the rest."""
        self._drop_parts()
        self._leave_parts()
        self._complain("it has unknown tensors", [name for name in self._theirs if name not in self._own])
        absent = [name for name in self._own if name not in self._theirs and name not in self._report.missing]
        self._complain("it lacks", absent)
        new, shapes = {}, []
        for name, value in self._theirs.items():
            if name not in self._own:
                continue
            wanted = self._own[name]
            if value.dtype not in TYPES:
                shapes.append(f"{name} holds {str(value.dtype).removeprefix('torch.')}, no floating-point numbers")
            elif value.shape == wanted.shape:
                new[name] = value
                self._report.taken.append(name)
            else:
                resized, reason = self._resize(name, value, wanted)
                there_and_here = f"{name} is {list(value.shape)} there and {list(wanted.shape)} here"
                if resized is None:
                    shapes.append(f"{there_and_here}{reason}")
                else:
                    new[name] = resized
                    self._report.resized[name] = f"{list(value.shape)} -> {list(wanted.shape)}"
        broken = [name for name, value in new.items() if not value.isfinite().all()]
        self._complain("it holds numbers that are not finite in", broken)
        if shapes:
            self.complaints.insert(0, "; ".join(shapes[:3]) + _more(shapes, 3))
        return new

    def _drop_parts(self) -> None:
        """Whole parts that the file has and the model has not."""
        for part in PARTS:
            there = [name for name in self._theirs if re.fullmatch(part.pattern, name)]
            if there and not any(re.fullmatch(part.pattern, name) for name in self._own):
                if part.only_trains or self._adapt:
                    for name in there:
                        del self._theirs[name]
                        self._report.dropped[name] = f"the model has no {part.name}"
                else:
                    self._ask(f"it has a part that the model has not, {part.name} ({_list(there)})", "leaves it out")
                    for name in there:
                        del self._theirs[name]

    def _leave_parts(self) -> None:
        """Whole parts that the model has and the file has not; half a part is not excused."""
        if self._fresh:
            self._report.missing |= {name: "started anew" for name in PROJECTIONS if name in self._own}
        for part in PARTS:
            here = [name for name in self._own if re.fullmatch(part.pattern, name) and name not in self._report.missing]
            if not here or any(re.fullmatch(part.pattern, name) for name in self._theirs):
                continue
            if not (part.only_trains or self._is_clip or self._adapt):
                self._ask(f"it lacks the {part.name} ({_list(here)})", "starts them anew")
            self._report.missing |= dict.fromkeys(here, f"the file has no {part.name}")

    def _resize(self, name: str, value: Tensor, wanted: Tensor) -> tuple[Tensor | None, str]:
        """``value`` in the shape of ``wanted``; or None and what would help."""
        if name in PROJECTIONS:
            cure = ", or model.weights.projections=fresh starts it anew"
            if value.dim() == 2 and value.shape[0] == wanted.shape[0]:
                return None, f" (model.embed_dim={value.shape[1]} builds the model of the file{cure})"
            return None, ""
        if name.startswith("heads."):
            return None, " (a head for other classes: train it on data with the same ones)"
        resize = _RESIZERS.get(name)
        if resize is None or value.dim() != 2 or value.shape[1] != wanted.shape[1] or 0 in value.shape:
            return None, ""
        if name == "visual.positional_embedding" and not (_is_square(len(value) - 1) and _is_square(len(wanted) - 1)):
            return None, " (one of them is no square of patches and CLS, so it cannot be adapted)"
        if not self._adapt:
            return None, " (model.weights.adapt=true resizes it)"
        return resize(value.float(), wanted), ""

    def _ask(self, what: str, effect: str) -> None:
        self.complaints.append(f"{what}; model.weights.adapt=true {effect}")

    def _complain(self, what: str, names: list[str]) -> None:
        if names:
            self.complaints.append(f"{what} {_list(names)}")


def _resize_frames(value: Tensor, wanted: Tensor) -> Tensor:
    """[T, D] -> [T', D], linearly, as the model itself does for clips of another length."""
    return F.interpolate(value.T[None], size=len(wanted), mode="linear", align_corners=False)[0].T


def _resize_grid(value: Tensor, wanted: Tensor) -> Tensor:
    """[1 + S S, D] -> [1 + S' S', D], bicubic; CLS stays."""
    side = round((len(wanted) - 1) ** 0.5)
    return resample_abs_pos_embed(value[None], [side, side])[0]


def _resize_text(value: Tensor, wanted: Tensor) -> Tensor:
    """[L, D] -> [L', D]: the first positions keep their meaning, further ones their initial values."""
    kept = value[: len(wanted)].to(wanted)
    return torch.cat((kept, wanted[len(kept) :]))


_RESIZERS = {
    "visual.temporal_embedding": _resize_frames,
    "visual.positional_embedding": _resize_grid,
    "textual.positional_embedding": _resize_text,
}


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


def _list(names: list[str], shown: int = 3) -> str:
    return f"{', '.join(names[:shown])}{_more(names, shown)}"


def _more(names: list[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""
