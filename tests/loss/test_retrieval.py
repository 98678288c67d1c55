"""Losses for multi-instance retrieval: against few-line references, finite differences, and two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from egohod.data.formats.ek100 import GradedTexts, class_relevancy
from egohod.distributed import gather_with_grad
from egohod.loss.config import LOSSES, LossConfig, build_loss
from egohod.loss.retrieval import relevancy

NAMES = [name for name, kind in LOSSES.items() if kind.target == "relevancy"]
BATCH, WIDTH, NOUNS = 8, 6, 5


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Features before normalising, and classes such that pairs are relevant in part, wholly and not at all."""
    generator = torch.Generator().manual_seed(0)

    def classes() -> tuple[Tensor, Tensor]:
        nouns = (torch.rand(BATCH, NOUNS, generator=generator) < 0.4).to(dtype)
        return torch.randint(3, (BATCH,), generator=generator), nouns

    (clip_verbs, clip_nouns), (text_verbs, text_nouns) = classes(), classes()
    # Own pairs are relevant, half of them wholly.
    text_verbs = clip_verbs.clone()
    text_nouns[::2] = clip_nouns[::2]
    features = {
        name: torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for name in ("video_features", "text_features")
    }
    return features | {
        "logit_scale": torch.tensor(10.0, dtype=dtype),
        "clip_verbs": clip_verbs,
        "clip_nouns": clip_nouns,
        "text_verbs": text_verbs,
        "text_nouns": text_nouns,
    }


def normalised(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: F.normalize(v, dim=-1) if name.endswith("features") else v for name, v in values.items()}


def numbers() -> tuple[np.ndarray, np.ndarray]:
    """Cosines and relevancies [clips, texts] of :func:`inputs`, in numpy."""
    values = normalised(inputs(torch.float64))
    similarity = (values["video_features"] @ values["text_features"].T).numpy()
    nouns = [[row.nonzero()[:, 0].tolist() for row in values[name]] for name in ("clip_nouns", "text_nouns")]
    verbs = values["clip_verbs"].numpy(), values["text_verbs"].numpy()
    clips, texts = (GradedTexts([], *classes) for classes in zip(verbs, nouns, strict=True))
    return similarity, class_relevancy(clips, texts)


def test_relevancy_on_the_device_is_that_of_the_evaluation() -> None:
    values = inputs()
    verbs, nouns = (values["clip_verbs"], values["text_verbs"]), (values["clip_nouns"], values["text_nouns"])
    np.testing.assert_allclose(relevancy(verbs, nouns).numpy(), numbers()[1], atol=1e-6)


def reference(name: str) -> float:
    """The definitions, pair by pair."""
    total, count = 0.0, 0
    for s, c in (numbers(), tuple(each.T for each in numbers())):
        for i in range(BATCH):
            for j in range(BATCH):
                if i == j:
                    continue
                lead, difference = s[i, i] - s[i, j], c[i, i] - c[i, j]
                count += 1
                if name == "max_margin":
                    total += max(0.0, 0.2 - lead)
                elif name == "adaptive_max_margin":
                    total += max(0.0, 0.4 * c[i, i] - lead)
                elif abs(difference) < 1e-6:
                    total += max(0.0, abs(lead) - 0.1)
                elif difference > 0:
                    total += max(0.0, 0.6 * difference - lead)
                else:
                    total += max(0.0, lead - 0.6 * difference)
    return total / count


@pytest.mark.parametrize("name", ["max_margin", "adaptive_max_margin", "sms"])
def test_losses_over_pairs_follow_their_definitions(name: str) -> None:
    result = build_loss(LossConfig(name=name))(**normalised(inputs()))
    assert float(result["loss"]) == pytest.approx(reference(name), abs=1e-6)
    assert not result["accuracy"].requires_grad


def test_soft_infonce_is_cross_entropy_to_the_relevancies() -> None:
    total = []
    for s, c in (numbers(), tuple(each.T for each in numbers())):
        log_p = 10 * s - np.log(np.exp(10 * s).sum(axis=1, keepdims=True))
        total.append(-(c / c.sum(axis=1, keepdims=True) * log_p).sum(axis=1).mean())
    result = build_loss(LossConfig(name="soft_infonce"))(**normalised(inputs()))
    assert float(result["loss"]) == pytest.approx(np.mean(total), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name: str) -> None:
    values = inputs(torch.float64)
    loss = build_loss(LossConfig(name=name))

    def of(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        changed = {"video_features": video, "text_features": text, "logit_scale": scale}
        return loss(**normalised(values | changed))["loss"]

    free = [values[each].requires_grad_() for each in ("video_features", "text_features", "logit_scale")]
    assert torch.autograd.gradcheck(of, free, atol=1e-7)


@pytest.mark.parametrize(("knob", "name"), [("margin", "sms"), ("margin", "max_margin"), ("tau", "sms")])
def test_knobs_of_the_losses_do_something(knob: str, name: str) -> None:
    values = normalised(inputs())
    changed = LossConfig(name=name, **{knob: 0.3})
    assert build_loss(LossConfig(name=name))(**values)["loss"] != build_loss(changed)(**values)["loss"]


def run(name: str, values: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    free = {each: values[each].clone().requires_grad_() for each in ("video_features", "text_features")}
    loss = build_loss(LossConfig(name=name), rank=rank, world_size=world_size)
    result = loss(**normalised(values | free))
    result["loss"].backward()
    gradients = {f"{each}_grad": value.grad for each, value in free.items() if value.grad is not None}
    return {"loss": result["loss"].detach(), "accuracy": result["accuracy"]} | gradients


def in_two_processes(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    share = {name: value.chunk(2)[rank] if value.ndim else value for name, value in inputs().items()}
    for name in NAMES:
        torch.save(run(name, share, rank, 2), folder / f"{name}-{rank}.pt")
    numbers = gather_with_grad(torch.tensor([rank, rank]), 2)
    assert numbers.tolist() == [0, 0, 1, 1]
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(in_two_processes, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_loss_and_gradients_of_one(two_processes: Path, name: str) -> None:
    expected = run(name, inputs(), 0, 1)
    parts = [torch.load(two_processes / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for scalar in ("loss", "accuracy"):
        torch.testing.assert_close((parts[0][scalar] + parts[1][scalar]) / 2, expected[scalar], atol=1e-5, rtol=0)
    for each in ("video_features_grad", "text_features_grad"):
        # The mean over processes, which DistributedDataParallel forms, is a half of their sum.
        joint = torch.cat([part[each] for part in parts]) / 2
        torch.testing.assert_close(joint, expected[each], atol=1e-5, rtol=0)
