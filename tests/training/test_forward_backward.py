"""Cached-feature accumulation gives the gradient of the joint batch, in one process and in two."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from egohod.config import Config
from egohod.distributed import Distributed
from egohod.loss.config import LossConfig, build_loss
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import Geometry, ModelConfig
from egohod.model.dual_encoder import DualEncoder, TextTower
from egohod.model.vision import VideoTransformer
from egohod.runtime import Interrupted
from egohod.training.step import TrainStep, forward_backward
from egohod.training.train import ArrivingBatches, StopDeadline

BATCH, FRAMES = 8, 2
TINY = Geometry("TINY", 32, 16, 32, 2, 2, 32, 1, 2, 16, vocab_size=100)
Batch = tuple[Tensor, Tensor]
SIGMOID = LossConfig(name="sigmoid")


def bias(config: LossConfig) -> float | None:
    return config.bias if config.name == "sigmoid" else None


def build(patch_dropout: float = 0.0, drop_path: float = 0.0, bias: float | None = None) -> DualEncoder:
    """A model small enough for many steps; the real vocabulary alone has six million weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        num_frames=FRAMES, temporal_init="sinusoidal", patch_dropout=patch_dropout, drop_path=drop_path
    )
    visual, textual = VideoTransformer(TINY, config), TextTower(TINY, config)
    return DualEncoder(visual, textual, geometry=TINY, num_frames=FRAMES, learn_temperature=True, bias=bias)


def data() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, TINY.vocab_size - 1, (BATCH, 8), generator=generator)
    tokens[:, -1] = TINY.vocab_size - 1
    return torch.randn(BATCH, 3, FRAMES, TINY.image_size, TINY.image_size, generator=generator), tokens


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model only waits for its second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def chunked(batch: Batch, chunks: int) -> list[Batch]:
    return list(zip(*(part.chunk(chunks) for part in batch), strict=True))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def joint(
    model: DualEncoder, batch: Batch, loss_fn: Callable[..., dict[str, Tensor]] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss, accuracy and gradients of the whole batch in one graph."""
    result = (loss_fn or ContrastiveLoss())(**model(*batch))
    result["loss"].backward()
    return result, gradients(model)


@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
def test_chunks_give_the_gradient_of_the_whole_batch(chunks: int) -> None:
    expected, expected_gradients = joint(build(), data())
    model = build()
    result = forward_backward(lambda batch: model(*batch), model, chunked(data(), chunks), ContrastiveLoss())
    torch.testing.assert_close(result["loss"], expected["loss"].detach(), atol=1e-5, rtol=0)
    assert result["accuracy"] == expected["accuracy"]
    assert not result["loss"].requires_grad
    assert "logit_scale" in expected_gradients
    assert_equal(gradients(model), expected_gradients)


def test_the_sigmoid_loss_in_chunks_with_its_bias() -> None:
    loss_fn = build_loss(SIGMOID)
    expected, expected_gradients = joint(build(bias=SIGMOID.bias), data(), loss_fn)
    model = build(bias=SIGMOID.bias)
    result = forward_backward(lambda batch: model(*batch), model, chunked(data(), 4), loss_fn)
    torch.testing.assert_close(result["loss"], expected["loss"].detach(), atol=1e-5, rtol=0)
    assert {"logit_scale", "logit_bias"} < expected_gradients.keys()
    assert_equal(gradients(model), expected_gradients)


def test_micro_batches_alone_would_not() -> None:
    """The usual accumulation has another gradient; otherwise the test above could not fail."""
    _, expected = joint(build(), data())
    model = build()
    for video, tokens in chunked(data(), 4):
        (ContrastiveLoss()(**model(video, tokens))["loss"] / 4).backward()
    difference = gradients(model)["visual.conv1.weight"] - expected["visual.conv1.weight"]
    assert difference.norm() > 0.1 * expected["visual.conv1.weight"].norm()


def test_dropout_repeats_in_the_second_pass() -> None:
    """The reference is one graph over the same forward passes with the same random numbers."""
    parts = chunked(data(), 4)
    reference = build(patch_dropout=0.5, drop_path=0.5)
    torch.manual_seed(3)
    outputs = [reference(*part) for part in parts]
    after = torch.get_rng_state()
    features = (torch.cat([output[name] for output in outputs]) for name in ("video_features", "text_features"))
    ContrastiveLoss()(*features, reference.logit_scale.exp())["loss"].backward()
    model = build(patch_dropout=0.5, drop_path=0.5)
    torch.manual_seed(3)
    forward_backward(lambda batch: model(*batch), model, parts, ContrastiveLoss())
    assert_equal(gradients(model), gradients(reference))
    assert torch.equal(torch.get_rng_state(), after), "the generator must stand where one pass leaves it"


@pytest.mark.parametrize("chunks", [1, 4])
def test_scaled_loss_scales_gradients_and_gradients_add_up(chunks: int) -> None:
    _, expected = joint(build(), data())
    model = build()
    for _ in range(2):
        result = forward_backward(
            lambda batch: model(*batch), model, chunked(data(), chunks), ContrastiveLoss(), lambda loss: loss * 8
        )
    assert result["loss"] < 5, "the loss that is reported is not scaled"
    assert_equal({name: gradient / 16 for name, gradient in gradients(model).items()}, expected)


def test_fixed_temperature_has_no_gradient() -> None:
    model = build()
    model.logit_scale.requires_grad_(False)
    forward_backward(lambda batch: model(*batch), model, chunked(data(), 2), ContrastiveLoss())
    assert model.logit_scale.grad is None


@pytest.mark.parametrize("chunks", [1, 4])
def test_each_micro_batch_is_computed_as_soon_as_it_is_loaded_and_released_after_its_second_pass(chunks: int) -> None:
    model, events, alive = build(), list[str](), list[weakref.ref[Tensor]]()

    def load() -> Iterator[dict[str, Any]]:
        for number, (video, tokens) in enumerate(chunked(data(), chunks)):
            events.append(f"load {number}")
            torch.rand(3)  # as torch's loader does when it starts
            # A copy, as chunks are views of tensors that this function holds.
            copy = video.clone()
            alive.append(weakref.ref(copy))
            yield {"video": copy, "tokens": tokens, "index": [number], "faults": []}

    def forward(batch: dict[str, Any]) -> dict[str, Tensor]:
        events.append(f"forward {batch['index'][0]}")
        if torch.is_grad_enabled() and chunks > 1:
            # Those before it are gone, as the loader has the next step's in memory by now.
            assert [each() is not None for each in alive].count(True) == chunks - batch["index"][0]
        return model(batch["video"], batch["tokens"])

    arriving, state = ArrivingBatches(load(), chunks), torch.get_rng_state()
    forward_backward(forward, model, arriving, ContrastiveLoss(), enter=events.append)
    features = [event for i in range(chunks) for event in ("data", f"load {i}", "features", f"forward {i}")]
    again = [event for i in range(chunks) for event in ("forward", f"forward {i}", "backward")]
    expected = [*features, "loss", "backward"] if chunks == 1 else [*features, "data", "loss", *again]
    assert events == expected
    assert [each["index"] for each in arriving.read] == [[number] for number in range(chunks)]
    assert arriving.text_tokens == BATCH * 8
    assert torch.equal(torch.get_rng_state(), state), "loading must not change the random numbers of the step"


CASES = {
    "whole, local": (1, LossConfig()),
    "chunks, local": (2, LossConfig()),
    "chunks, global": (2, LossConfig(local_loss=False)),
    "chunks, sigmoid": (2, SIGMOID),
}
"""Micro-batches per process and the loss."""


def in_two_processes(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    share = tuple(part.chunk(2)[rank] for part in data())
    for case, (chunks, config) in CASES.items():
        model = DistributedDataParallel(build(bias=bias(config)))
        loss_fn = build_loss(config, rank=rank, world_size=2)
        result = forward_backward(lambda batch, model=model: model(*batch), model, chunked(share, chunks), loss_fn)
        torch.save({"gradients": gradients(model), **result}, folder / f"{case}-{rank}.pt")

    here = Distributed(rank, 2, torch.device("cpu"), "gloo", store=dist.FileStore(str(folder / "store"), 2))
    video, tokens = ((share[0] * 50).clamp(0, 255).to(torch.uint8), share[1])
    batches = [{"video": part, "tokens": text} for part, text in chunked((video, tokens), 2)]
    for dtype in ("fp32", "bf16"):
        cfg = Config(loss=LossConfig(learn_temperature=True))
        cfg.train.precision, cfg.train.gradient_dtype = "fp32", dtype
        model = build()
        step = TrainStep(model, cfg, here, total_steps=2, steps_per_epoch=2)
        scalars = step(1, batches)
        torch.save({"gradients": gradients(model), **scalars}, folder / f"{dtype}-{rank}.pt")

    # A step of eighty passes of 25 ms, of which one process alone is asked to stop after the fourth.
    before, began = {name: value.clone() for name, value in model.state_dict().items()}, time.monotonic()
    passes = 0
    inner = step._forward

    def forward(batch: dict[str, Any]) -> dict[str, Tensor]:
        nonlocal passes
        passes += 1
        if rank == 1 and passes == 4:
            here.stop.request("SIGTERM received")
        time.sleep(0.025)
        return inner(batch)

    step._forward = forward  # type: ignore[method-assign]
    try:
        step(2, batches * 40, StopDeadline(here, 0.1))
        reason = ""
    except Interrupted as interruption:
        reason = str(interruption)
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.save({"reason": reason, "passes": passes, "same": same}, folder / f"stopped-{rank}.pt")
    assert time.monotonic() - began < 60
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left their results."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(in_two_processes, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_loss_and_gradients_of_one(two_processes: Path, case: str) -> None:
    config = CASES[case][1]
    expected, expected_gradients = joint(build(bias=bias(config)), data(), build_loss(config))
    results = [torch.load(two_processes / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in ("loss", "accuracy"):
        mean = torch.stack([result[name] for result in results]).mean()
        torch.testing.assert_close(mean, expected[name].detach(), atol=1e-5, rtol=0)
    for result in results:
        assert_equal(result["gradients"], expected_gradients)


def test_gradients_exchanged_in_bf16_are_rounded_and_nothing_else(two_processes: Path) -> None:
    exact, rounded = (torch.load(two_processes / f"{dtype}-0.pt", weights_only=True) for dtype in ("fp32", "bf16"))
    for name in ("loss", "accuracy"):
        assert torch.equal(exact[name], rounded[name]), name
    differs = False
    for name, gradient in exact["gradients"].items():
        # Rounded once before the sum and once by it; relative to the largest, as small ones may be sums of large ones.
        error = (rounded["gradients"][name] - gradient).abs().max()
        assert error <= gradient.abs().max() * 2 / 256, name
        differs |= bool(error > 0)
    assert differs
    for dtype in ("fp32", "bf16"):
        other = torch.load(two_processes / f"{dtype}-1.pt", weights_only=True)
        mine = torch.load(two_processes / f"{dtype}-0.pt", weights_only=True)
        for name, gradient in mine["gradients"].items():
            assert torch.equal(gradient, other["gradients"][name]), name


def test_a_signal_to_one_process_ends_a_long_step_of_all(two_processes: Path) -> None:
    results = [torch.load(two_processes / f"stopped-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [each["reason"] for each in results] == ["another process was asked to stop", "SIGTERM received"]
    assert all(each["same"] for each in results), "the step that was given up changed weights"
    # Of 160: the one that was asked after 0.1 s, the other one when it has looked and waited as long.
    assert results[1]["passes"] < 30
    assert results[0]["passes"] < 79
