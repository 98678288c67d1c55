"""What an evaluation takes for a model: temporal controls, fingerprints, an outside baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import ALONE, config, demo_benchmark, settings, small_model
from torch import Tensor, nn

from egohod.data.dataset import normalise
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.embed import (
    CONTROLS,
    Execution,
    FrameAverage,
    apply_control,
    embed_clips,
    fingerprint,
    shuffled_order,
)
from egohod.evaluation.runner import benchmark, execution_of

FRAMES = 5


def clips(count: int = 6, frames: int = FRAMES) -> Tensor:
    """uint8 clips whose every pixel tells its clip, channel and frame."""
    clip, channel, frame = torch.meshgrid(torch.arange(count), torch.arange(3), torch.arange(frames), indexing="ij")
    return (40 * clip + 10 * channel + frame).to(torch.uint8)[..., None, None].expand(-1, -1, -1, 2, 2)


def order_of(video: Tensor) -> np.ndarray:
    """Which frames stand where, [B, T]; the same for all channels and pixels."""
    inner = video % 10
    assert (inner == inner[:, :1, :, :1, :1]).all()
    assert (video // 10 == clips(len(video), video.shape[2]) // 10).all()
    return inner[:, 0, :, 0, 0].numpy()


def test_reverse_and_freeze() -> None:
    assert order_of(apply_control("reverse", clips(), range(6))).tolist() == [[4, 3, 2, 1, 0]] * 6
    assert order_of(apply_control("freeze", clips(), range(6))).tolist() == [[2] * 5] * 6
    assert order_of(apply_control("freeze", clips(frames=4), range(6))).tolist() == [[2] * 4] * 6


def test_shuffle_follows_from_the_index_alone_and_is_never_the_identity() -> None:
    shuffled = order_of(apply_control("shuffle", clips(), range(6)))
    assert len({tuple(row) for row in shuffled}) > 1
    for i in (4, 1):
        alone = order_of(apply_control("shuffle", clips()[i : i + 1] - 40 * i, [i]))
        np.testing.assert_array_equal(alone[0], shuffled[i])
    for frames in (2, 3, 16):
        orders = [shuffled_order(index, frames) for index in range(200)]
        assert all(sorted(order) == list(range(frames)) for order in orders)
        assert not any((order == np.arange(frames)).all() for order in orders)
        assert len({tuple(order) for order in orders}) > {2: 0, 3: 4, 16: 190}[frames]
    assert not np.array_equal(shuffled_order(3, 16, seed=1), shuffled_order(3, 16))


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_do_not_care_whether_frames_are_normalised(control: str) -> None:
    before = normalise(apply_control(control, clips(), range(6)))
    after = apply_control(control, normalise(clips()), range(6))
    assert torch.equal(before, after)


def test_what_has_no_order_and_what_is_no_control_is_refused() -> None:
    with pytest.raises(UserError, match="'freeze' needs clips of at least two frames"):
        apply_control("freeze", clips(frames=1), range(6))
    with pytest.raises(UserError, match="no temporal control 'blur'; there are shuffle, reverse, freeze"):
        apply_control("blur", clips(), range(6))


class Frames(nn.Module):
    """Features are the brightness of each frame."""

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        return video.mean(dim=(1, 3, 4))

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        raise AssertionError


def test_clips_are_decoded_once_for_the_plain_order_and_all_controls(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, decoded = demo_benchmark(world).dataset, list[int]()
    plain_getitem = type(dataset).__getitem__
    monkeypatch.setattr(type(dataset), "__getitem__", lambda self, key: decoded.append(key) or plain_getitem(self, key))
    run = Execution(4, 0, Distributed(0, 1, torch.device("cpu"), None))
    features, _ = embed_clips(Frames(), dataset, run, controls=list(CONTROLS))
    assert sorted(decoded) == list(range(len(dataset)))
    plain = features["plain"]
    assert torch.equal(features["reverse"], plain.flip(1))
    torch.testing.assert_close(features["freeze"], plain[:, 2:3].expand_as(plain))
    for index, row in enumerate(features["shuffle"]):
        order = shuffled_order(dataset.numbers[index], plain.shape[1])
        assert torch.equal(row, plain[index, torch.from_numpy(order)])


def test_the_fingerprint_is_that_of_the_weights() -> None:
    model = small_model()
    before = fingerprint(model)
    assert fingerprint(small_model()) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(model) != before


@pytest.fixture
def outside(tiny_outside: str) -> FrameAverage:
    return FrameAverage(tiny_outside)


def test_an_outside_model_runs_on_every_benchmark(formats: Path, outside: FrameAverage) -> None:
    cfg = config()
    for kind in ("custom", "ek100_cls"):
        bench = benchmark(
            cfg, kind, settings(formats, kind), execution_of(cfg, ALONE),
            size=outside.size, tokenizer=outside.tokenizer, controls=["shuffle", "freeze"],
        )  # fmt: skip
        results = bench(outside)
        # It sees frames one by one, so their order means nothing to it; which frames there are does.
        drops = [value for name, value in results.items() if name.startswith("shuffle/") and name.endswith("_drop")]
        assert drops == pytest.approx([0] * len(drops), abs=1e-3)


def test_an_unknown_outside_model_is_refused() -> None:
    with pytest.raises(UserError, match="open_clip:ViT-nothing"):
        FrameAverage("open_clip:ViT-nothing")
