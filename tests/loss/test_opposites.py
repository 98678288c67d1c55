"""Opposite captions as negatives: the formula, its schedule, and any share of the batch against the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from egohod.loss.config import LOSSES, LossConfig, build_loss
from egohod.loss.opposites import WithOpposites, weight_share

NAMES = [name for name, kind in LOSSES.items() if name != "classes" and not kind.has_tags]
FEATURES = ("video_features", "text_features", "negative_features")
# All clips of the first half have an opposite, and one of the second: processes have different numbers.
HAS = torch.tensor([True, True, True, False, False, True])
# Also with a process, or both, that have none.
CASES = {"some": HAS, "one": HAS & (torch.arange(6) < 3), "none": torch.zeros(6, dtype=torch.bool)}


def inputs(name: str = "infonce") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {each: torch.randn(6, 8, generator=generator, dtype=torch.float64) for each in FEATURES}
    # Opposites are similar to their captions, as in a text tower that is not separated.
    values["negative_features"] = values["text_features"] + 0.3 * values["negative_features"]
    values |= {"logit_scale": torch.tensor(5.0, dtype=torch.float64), "has_negative": HAS}
    if name == "sigmoid":
        values["logit_bias"] = torch.tensor(-2.0, dtype=torch.float64)
    elif name != "infonce":
        for each in ("clip", "text"):
            values[f"{each}_verbs"] = torch.randint(2, (6,), generator=generator)
            values[f"{each}_nouns"] = torch.randint(2, (6, 3), generator=generator).double()
    return values


def run(values: dict[str, Tensor], rank: int = 0, world_size: int = 1, **config: Any) -> dict[str, Tensor]:
    """Scalars of the loss, and the gradients of the features."""
    free = {name: values[name].clone().requires_grad_() for name in (*FEATURES, "logit_scale")}
    loss = build_loss(LossConfig(**{"opposites": 0.7, "separation": 0.9, **config}), rank=rank, world_size=world_size)
    normalised = {name: F.normalize(value, dim=1) if value.ndim else value for name, value in free.items()}
    # One negative of each clip, its opposite.
    one = {name: (values | normalised)[name].unsqueeze(1) for name in ("negative_features", "has_negative")}
    result = loss(**values | normalised | one)
    result["loss"].backward()
    gradients = {f"{name}_grad": value.grad for name, value in free.items() if value.grad is not None}
    return {name: value.detach() for name, value in result.items()} | gradients


@pytest.mark.parametrize("name", NAMES)
def test_both_terms_are_means_over_the_clips_with_an_opposite(name: str) -> None:
    values = inputs(name)
    v, t, o = (F.normalize(values[each], dim=1)[HAS] for each in FEATURES)
    ranking = torch.log1p(torch.exp(5.0 * ((v * o).sum(1) - (v * t).sum(1)))).mean()
    cosine = (t * o).sum(1)
    separation = (cosine - 0.3).clamp(min=0).mean()
    plain = build_loss(LossConfig(name=name))
    others = {each: value for each, value in values.items() if "negative" not in each}
    base = plain(**others | {each: F.normalize(values[each], dim=1) for each in FEATURES[:2]})
    result = run(values, name=name)
    torch.testing.assert_close(result["loss"], base["loss"] + 0.7 * ranking + 0.9 * separation)
    assert result["accuracy"] == base["accuracy"]
    assert result["opposite_accuracy"] == pytest.approx(float(((v * t).sum(1) > (v * o).sum(1)).double().mean()))
    assert result["opposite_cosine"] == pytest.approx(float(cosine.mean()))
    # A clip without an opposite gets no gradient of one.
    assert not result["negative_features_grad"][~HAS].any()
    assert result["negative_features_grad"][HAS].all(dim=1).all()


def test_no_weight_is_the_plain_loss() -> None:
    assert not isinstance(build_loss(LossConfig()), WithOpposites)


@pytest.mark.parametrize("knob", [{"opposites": 0.2}, {"separation": 0.2}, {"separation_margin": 0.97}])
def test_every_weight_does_something(knob: dict[str, float]) -> None:
    one, other = run(inputs()), run(inputs(), **knob)
    assert one["loss"] != other["loss"]
    assert not torch.equal(one["negative_features_grad"], other["negative_features_grad"])


def test_without_any_opposite_the_terms_are_nothing() -> None:
    values = inputs() | {"has_negative": torch.zeros(6, dtype=torch.bool)}
    result = run(values)
    assert torch.equal(result["loss"], run(values, opposites=1e-9, separation=0.0)["loss"])
    assert result["opposite_accuracy"] == 0


def test_the_schedule_holds_the_weights_and_lets_them_fall() -> None:
    assert weight_share(LossConfig(), 1000, 1000) == 1
    for schedule, middle in (("linear", 0.7), ("cosine", 0.7)):
        config = LossConfig(opposites_schedule=schedule, opposites_hold=0.5, opposites_end=0.4)
        shares = [weight_share(config, step, 101) for step in (1, 51, 76, 101)]
        assert shares == pytest.approx([1, 1, middle, 0.4])
    # Slower at both ends.
    quarters = {
        schedule: weight_share(LossConfig(opposites_schedule=schedule, opposites_hold=0.0), 26, 101)
        for schedule in ("linear", "cosine")
    }
    assert quarters == pytest.approx({"linear": 0.75, "cosine": 0.8536}, abs=1e-4)


def test_with_the_box_loss_all_terms_add_up() -> None:
    values, errors = inputs(), torch.rand(6, dtype=torch.float64)
    values |= {name: values[name].unsqueeze(1) for name in ("negative_features", "has_negative")}
    both = build_loss(LossConfig(opposites=0.7, boxes=2.0))(box_errors=errors, weight_share=0.5, **values)
    plain, one = (build_loss(LossConfig(opposites=weight))(**values) for weight in (1e-9, 0.7))
    expected = plain["loss"] + 0.5 * (one["loss"] - plain["loss"]) + 2 * errors.mean()
    torch.testing.assert_close(both["loss"], expected)
    assert both.keys() == one.keys() | {"box_error"}


def in_two_processes(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for case, has_opposite in CASES.items():
        for name in NAMES:
            values = inputs(name) | {"has_negative": has_opposite}
            share = {each: value.chunk(2)[rank] if value.ndim else value for each, value in values.items()}
            torch.save(run(share, rank, 2, name=name), folder / f"{case}-{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(in_two_processes, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_loss_and_gradients_of_one(two_processes: Path, name: str, case: str) -> None:
    expected = run(inputs(name) | {"has_negative": CASES[case]}, name=name)
    parts = [torch.load(two_processes / f"{case}-{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert parts[0].keys() == expected.keys()
    for each, value in expected.items():
        # The mean over processes, which DistributedDataParallel forms of gradients and telemetry of scalars.
        ours = [part[each] for part in parts]
        joint = torch.cat(ours) / 2 if value.ndim else (ours[0] + ours[1]) / 2
        torch.testing.assert_close(joint, value, atol=1e-12, rtol=1e-10, msg=each)
