"""EgoNCE and EgoNCE++: the formulas pair by pair, and any share of the batch against the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from egohod.config import check, load
from egohod.loss.config import LossConfig, build_loss
from egohod.loss.egonce import share_tags
from tests.support import ROOT

NAMES = ["egonce", "egonce_pp"]
FREE = ("video_features", "text_features", "negative_features", "logit_scale")
# Two verbs or nouns at most; the third clip has neither, and shares nothing with the fifth, which has none either.
VERBS = torch.tensor([[1, 0], [1, 2], [0, 0], [2, 0], [0, 0], [3, 1]])
NOUNS = torch.tensor([[5, 6], [6, 0], [0, 0], [5, 0], [7, 0], [7, 6]])
# All three replacements, some, and none; processes have different numbers.
HAS = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"video_features": (6, 8), "text_features": (6, 8), "negative_features": (6, 3, 8)}
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return values | {
        "logit_scale": torch.tensor(5.0, dtype=torch.float64), "verb_tags": VERBS, "noun_tags": NOUNS,
        "has_negative": HAS,
    }  # fmt: skip


def run(name: str, values: dict[str, Tensor], rank: int = 0, size: int = 1, **config: Any) -> dict[str, Tensor]:
    """Scalars of the loss, and the gradients of the features."""
    free = {each: values[each].clone().requires_grad_() for each in FREE}
    unit = {each: F.normalize(value, dim=-1) if value.ndim else value for each, value in free.items()}
    given = values | unit
    if name == "egonce" and "opposites" not in config:
        given = {each: value for each, value in given.items() if "negative" not in each}
    result = build_loss(LossConfig(name=name, **config), rank=rank, world_size=size)(**given)
    result["loss"].backward()
    gradients = {f"{each}_grad": value.grad for each, value in free.items() if value.grad is not None}
    return {each: value.detach() for each, value in result.items()} | gradients


def common(tags: Tensor, i: int, j: int) -> bool:
    return bool({*tags[i].tolist()} & {*tags[j].tolist()} - {0})


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_papers_pair_by_pair(name: str) -> None:
    values = inputs()
    video, text, negatives = (F.normalize(values[each], dim=-1) for each in FREE[:3])
    rows = []
    for i in range(6):
        by_video = [(5 * video[i] @ text[j]).exp() for j in range(6)]
        by_text = [(5 * text[i] @ video[j]).exp() for j in range(6)]
        if name == "egonce":
            positive = [j for j in range(6) if j == i or (common(VERBS, i, j) and common(NOUNS, i, j))]
            rows.append(-(sum(by_video[j] for j in positive) / sum(by_video)).log())
            rows.append(-(sum(by_text[j] for j in positive) / sum(by_text)).log())
        else:
            hard = [(5 * video[i] @ negatives[i, k]).exp() for k in range(3) if HAS[i, k]]
            rows.append(-(by_video[i] / sum(by_video + hard)).log())
            positive = [j for j in range(6) if j == i or common(NOUNS, i, j)]
            rows.append(-(sum(by_text[j] for j in positive) / sum(by_text)).log())
    result = run(name, values)
    torch.testing.assert_close(result["loss"], torch.stack(rows).mean())
    if name == "egonce_pp":
        # A clip without a replacement gets no gradient of one.
        assert not result["negative_features_grad"][~HAS].any()
        assert result["negative_features_grad"][HAS].all(dim=1).all()
        own = (video * text).sum(dim=1)
        best = torch.einsum("be,bke->bk", video, negatives).masked_fill(~HAS, -2).amax(dim=1)
        assert result["replaced_accuracy"] == pytest.approx(float((own > best)[HAS.any(dim=1)].double().mean()))


def test_without_a_common_tag_it_is_the_plain_loss() -> None:
    values = inputs() | {"noun_tags": torch.zeros_like(NOUNS)}
    plain = {name: value for name, value in values.items() if "tags" not in name and "negative" not in name}
    unit = {name: F.normalize(value, dim=-1) if value.ndim else value for name, value in plain.items()}
    expected = build_loss(LossConfig())(**unit)
    result = run("egonce", values)
    torch.testing.assert_close(result["loss"], expected["loss"])
    assert result["accuracy"] == expected["accuracy"]
    assert share_tags(NOUNS, NOUNS)[2].any() == False  # noqa: E712  no tag is no common tag


@pytest.mark.parametrize("name", NAMES)
def test_masked_duplicates_are_no_negatives(name: str) -> None:
    values, same = inputs(), torch.tensor([1, 2, 3, 4, 3, 6])
    masked, plain = (run(name, values | more) for more in ({"caption_ids": same}, {}))
    # Of the third and the fifth, each other's term is left out of the sum over all.
    video, text = (F.normalize(values[each], dim=-1) for each in FREE[:2])
    changes = []
    for queries, items in ((video, text), (text, video)):
        sims = (5 * queries @ items.T).exp()
        if name == "egonce_pp" and items is text:
            hard = (5 * torch.einsum("be,bke->bk", video, F.normalize(values["negative_features"], dim=-1))).exp()
            extra = (hard * HAS).sum(dim=1)
        else:
            extra = torch.zeros(6)
        for i, j in ((2, 4), (4, 2)):
            whole = sims[i].sum() + extra[i]
            changes.append(((whole - sims[i, j]) / whole).log())
    torch.testing.assert_close(masked["loss"] - plain["loss"], torch.stack(changes).sum() / 12)


def test_opposites_come_first_and_replacements_after_them() -> None:
    values = inputs()
    first = F.normalize(torch.randn(6, 1, 8, dtype=torch.float64), dim=-1)
    joint = values | {
        "negative_features": torch.cat((first, values["negative_features"]), dim=1),
        "has_negative": torch.cat((torch.ones(6, 1, dtype=torch.bool), HAS), dim=1),
    }
    result, plain = run("egonce_pp", joint, opposites=0.7), run("egonce_pp", values)
    alone = values | {"negative_features": first, "has_negative": torch.ones(6, 1, dtype=torch.bool)}
    added = run("egonce", alone, opposites=0.7)["loss"] - run("egonce", values)["loss"]
    torch.testing.assert_close(result["loss"], plain["loss"] + added)
    assert result["replaced_accuracy"] == plain["replaced_accuracy"]


def in_two_processes(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in NAMES:
        share = {each: value.chunk(2)[rank] if value.ndim else value for each, value in inputs().items()}
        torch.save(run(name, share, rank, 2), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(in_two_processes, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_loss_and_gradients_of_one(two_processes: Path, name: str) -> None:
    expected = run(name, inputs())
    parts = [torch.load(two_processes / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert parts[0].keys() == expected.keys()
    for each, value in expected.items():
        # The mean over processes, which DistributedDataParallel forms of gradients and telemetry of scalars.
        ours = [part[each] for part in parts]
        joint = torch.cat(ours) / 2 if value.ndim else (ours[0] + ours[1]) / 2
        torch.testing.assert_close(joint, value, atol=1e-12, rtol=1e-10, msg=each)


def test_tag_columns_are_two_and_replacements_count_as_texts() -> None:
    cfg = load(ROOT / "configs" / "demo.yml", ["loss.name=egonce_pp", "loss.replacements=3", "loss.opposites=1"])
    assert cfg.loss.negatives == 4
    assert LossConfig(opposites=1).negatives == 1
    assert LossConfig(replacements=5).negatives == 0
    cfg.data.train["demo"].tag_columns = ["verb"]
    assert any("data.train.demo.tag_columns=['verb'] must name two columns" in text for _, text in check(cfg))
