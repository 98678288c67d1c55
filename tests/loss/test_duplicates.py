"""``loss.mask_duplicates``: equal captions are no negatives, in one process, in chunks, and over two real processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from egohod.config import Config, check, load
from egohod.data.dataset import Tokenizer, trim
from egohod.loss.config import LOSSES, LossConfig, build_loss
from egohod.loss.contrastive import hash_captions
from egohod.training.checkpoint import identity
from egohod.training.step import forward_backward
from tests.support import ROOT
from tests.training.test_forward_backward import assert_equal, bias, build, chunked, data, gradients
from tests.training.test_step import Waits, batch, config
from tests.training.test_step import build as build_step

# Those with tags are in test_egonce.py.
NAMES = [name for name, kind in LOSSES.items() if kind.has_negatives and not kind.has_tags]
# Of eight clips; two processes have half each, so that 7 occurs within one and in both, 3 once in each.
CAPTIONS = torch.tensor([7, 3, 7, 1, 7, 3, 5, 9])


def inputs(name: str, ids: Tensor | None = CAPTIONS) -> dict[str, Tensor]:
    """What the loss ``name`` takes, in float64, with leaves for features, temperature and bias."""
    generator = torch.Generator().manual_seed(0)
    values = {
        each: torch.randn(8, 6, generator=generator, dtype=torch.float64)
        for each in ("video_features", "text_features")
    }
    values["logit_scale"] = torch.tensor(4.0, dtype=torch.float64)
    if LOSSES[name].has_bias:
        values["logit_bias"] = torch.tensor(-1.0, dtype=torch.float64)
    values = {each: value.requires_grad_() for each, value in values.items()}
    if LOSSES[name].target == "relevancy":
        for side in ("clip", "text"):
            values[f"{side}_verbs"] = torch.randint(3, (8,), generator=generator)
            values[f"{side}_nouns"] = (torch.rand(8, 5, generator=generator) < 0.4).double()
    return values if ids is None else values | {"caption_ids": ids}


def loss_of(name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    unit = {each: F.normalize(v, dim=-1) if each.endswith("features") else v for each, v in values.items()}
    return build_loss(LossConfig(name=name))(**unit)


def reference(name: str, values: dict[str, Tensor]) -> Tensor:
    """Pair by pair, without the pairs of different clips with one caption."""
    video, text = (F.normalize(values[f"{each}_features"], dim=-1) for each in ("video", "text"))
    total = []
    for queries, items in ((video, text), (text, video)):
        for i in range(8):
            others = [j for j in range(8) if j == i or CAPTIONS[j] != CAPTIONS[i]]
            s = (queries[i] * items[others]).sum(dim=1)
            own = others.index(i)
            if name == "infonce":
                total.append((values["logit_scale"] * s).logsumexp(dim=0) - values["logit_scale"] * s[own])
                continue
            if name == "sigmoid":
                sign = 2 * F.one_hot(torch.tensor(own), len(s)) - 1
                total.append(-F.logsigmoid(sign * (values["logit_scale"] * s + values["logit_bias"])).sum())
                continue
            margin = torch.tensor(LOSSES[name].margin, dtype=s.dtype)
            if name == "adaptive_max_margin":
                nouns = values["clip_nouns"][i], values["text_nouns"][i]
                overlap = (nouns[0] * nouns[1]).sum() / torch.maximum(*nouns).sum().clamp(min=1)
                margin = margin * ((values["clip_verbs"][i] == values["text_verbs"][i]) + overlap) / 2
            total.append(torch.stack([F.relu(margin - s[own] + s[j]) for j in range(len(s)) if j != own]).sum() / 7)
    # The sigmoid loss is over clips only, which gives the same sum.
    return torch.stack(total).mean()


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_without_the_pairs(name: str) -> None:
    results = []
    for function in (lambda values: loss_of(name, values)["loss"], lambda values: reference(name, values)):
        values = inputs(name)
        loss = function(values)
        loss.backward()
        results.append([loss, *(value.grad for value in values.values() if value.grad is not None)])
    assert len(results[0]) >= 3
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name: str) -> None:
    values = inputs(name)
    free = {each: value for each, value in values.items() if value.requires_grad}

    def of(*leaves: Tensor) -> Tensor:
        return loss_of(name, values | dict(zip(free, leaves, strict=True)))["loss"]

    assert torch.autograd.gradcheck(of, tuple(free.values()), atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_without_equal_captions_it_is_the_same_to_the_bit(name: str) -> None:
    results = []
    for ids in (None, torch.arange(8)):
        values = inputs(name, ids)
        result = loss_of(name, values)
        result["loss"].backward()
        grads = [value.grad for value in values.values() if value.grad is not None]
        results.append([result["loss"], result["accuracy"], *grads])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.equal(loss_of(name, inputs(name))["loss"], results[0][0])


def test_a_clip_whose_caption_is_not_unique_can_win() -> None:
    """Equal texts have equal similarities, of which the first one would count as the best."""
    values = inputs("infonce")
    with torch.no_grad():
        values["text_features"][:] = values["video_features"][:]
        for first, later in ((0, 2), (0, 4), (1, 5)):
            values["text_features"][later] = values["text_features"][first]
            values["video_features"][later] = values["video_features"][first]
    assert float(loss_of("infonce", values)["accuracy"]) == 1
    assert float(loss_of("infonce", {k: v for k, v in values.items() if k != "caption_ids"})["accuracy"]) == 5 / 8


def test_captions_are_equal_if_their_tokens_are() -> None:
    tokenize = Tokenizer()
    texts = ["#C C cuts the dough", "#C C cuts the dough  ", "#c c CUTS the dough", "#C C cuts a dough"]
    whole = hash_captions(tokenize(texts))
    assert whole[0] == whole[1] == whole[2] != whole[3]
    # Each process trims its own batch.
    assert torch.equal(hash_captions(trim(tokenize(texts))), whole)
    verbs = ("opens", "closes", "cuts", "stirs", "picks up", "puts down", "washes", "wipes", "turns", "pushes")
    nouns = ("pot", "pan", "lid", "cup", "drawer", "knife", "board", "tap", "cloth", "box", "bowl", "door")
    words = itertools.product(("left", "right", "left hand and right"), verbs, nouns, ("", " slowly", " again"))
    many = [f"#C C {verb} the {noun} with the {side} hand{end}" for side, verb, noun, end in words]
    assert len(set(hash_captions(tokenize(many)).tolist())) == len(many) == 1080


def batch_of(captions: Tensor) -> tuple[Tensor, Tensor]:
    """The batch of test_forward_backward, where clips of the same number have the same tokens."""
    video, tokens = data()
    first = [int((captions == number).nonzero()[0]) for number in captions]
    return video, tokens[first]


def outputs(model: torch.nn.Module, part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return model(*part) | {"caption_ids": hash_captions(part[1])}


CASES = {
    "infonce": (1, LossConfig()),
    "infonce, chunks": (2, LossConfig()),
    "infonce, chunks, global": (2, LossConfig(local_loss=False)),
    "sigmoid, chunks": (2, LossConfig(name="sigmoid")),
}
"""Micro-batches per process and the loss."""


def in_two_processes(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    share = tuple(part.chunk(2)[rank] for part in batch_of(CAPTIONS))
    for case, (chunks, loss) in CASES.items():
        model = DistributedDataParallel(build(bias=bias(loss)))
        loss_fn = build_loss(loss, rank=rank, world_size=2)
        parts = chunked(share, chunks)
        result = forward_backward(lambda part, model=model: outputs(model, part), model, parts, loss_fn)
        torch.save({"gradients": gradients(model), **result}, folder / f"{case}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left their results."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(in_two_processes, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_loss_and_gradients_of_one(two_processes: Path, case: str) -> None:
    loss = CASES[case][1]
    model, loss_fn = build(bias=bias(loss)), build_loss(loss)
    expected = loss_fn(**outputs(model, batch_of(CAPTIONS)))
    expected["loss"].backward()
    assert expected["loss"] != loss_fn(**model(*batch_of(CAPTIONS)))["loss"]
    results = [torch.load(two_processes / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in ("loss", "accuracy"):
        mean = torch.stack([result[name] for result in results]).mean()
        torch.testing.assert_close(mean, expected[name].detach(), atol=1e-5, rtol=0)
    for result in results:
        assert_equal(result["gradients"], gradients(model))


@pytest.mark.parametrize("opposites", [False, True])
def test_a_step_of_chunks_masks_across_them_and_never_waits(opposites: bool) -> None:
    whole = batch(8)
    whole["tokens"][5] = whole["tokens"][0]
    if opposites:
        whole |= {"negatives": batch(8, seed=1)["tokens"][:, None], "has_negative": torch.arange(8)[:, None] % 3 > 0}
    losses = {}
    for masks, chunks in itertools.product((False, True), (1, 4)):
        cfg = config()
        cfg.loss.mask_duplicates, cfg.loss.opposites = masks, float(opposites)
        _, step = build_step(cfg)
        parts = [{key: value.chunk(chunks)[i] for key, value in whole.items()} for i in range(chunks)]
        with Waits() as waits:
            losses[masks, chunks] = step(1, parts)["loss"]
        assert not waits.seen
    torch.testing.assert_close(losses[True, 1], losses[True, 4], atol=1e-5, rtol=0)
    assert losses[True, 1] < losses[False, 1] - 1e-4


def test_our_recipes_mask_and_published_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOD_CSV", "EGO4D_ROOT", "HOWTO_ROOT", "CLIP_WEIGHTS", "DUAL_ENCODER"):
        monkeypatch.setenv(name, "x")
    folder = ROOT / "configs" / "config"
    masks = {path.stem: load(path).loss.mask_duplicates for path in folder.glob("*.yml") if "eval" not in path.stem}
    # A dual encoder's recipe is the published one, on whichever backbone.
    assert all(value == name.startswith("egovideo_") for name, value in masks.items()), masks
    assert {"clip_base", "clip_large", "siglip2_base", "egovideo_base"} <= set(masks)
    assert not Config().loss.mask_duplicates


def test_a_checkpoint_records_it_where_it_is_on() -> None:
    """So that a run with the other value does not resume it, and checkpoints from before it existed still agree."""
    cfg = config()
    model, _ = build_step(cfg)
    assert "loss.mask_duplicates" not in identity(cfg, model, 8, None)
    cfg.loss.mask_duplicates = True
    assert identity(cfg, model, 8, None)["loss.mask_duplicates"] is True


@pytest.mark.parametrize("name", ["sms", "soft_infonce", "classes"])
def test_losses_without_negatives_refuse_it(name: str) -> None:
    (text,) = (text for key, text in check(Config(loss=LossConfig(name=name, mask_duplicates=True))) if "mask" in key)
    assert "goes with infonce, sigmoid, max_margin, adaptive_max_margin" in text
