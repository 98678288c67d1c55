"""Cached-feature accumulation gives the gradient of the joint batch, in one process and in two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from egohod.loss.config import LossConfig, build_loss
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import Geometry, ModelConfig
from egohod.model.dual_encoder import DualEncoder, TextTower
from egohod.model.vision import VideoTransformer
from egohod.training.step import forward_backward

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
