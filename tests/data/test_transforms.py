import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from egohod.data.dataset import center_crop, crop, normalise, random_box, spatial_crops
from egohod.model.config import IMAGE_STATS


def picture(height: int, width: int, frames: int = 3) -> np.ndarray:
    """A smooth gradient with a different tint per frame, uint8 [T, H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    planes = np.stack([255 * x / width, 255 * y / height, 127 * (1 + np.sin(x / 9) * np.cos(y / 7))], -1)
    return np.stack([np.roll(planes, t, axis=-1) for t in range(frames)]).astype(np.uint8)


def test_a_crop_is_the_float_crop_of_the_same_box() -> None:
    frames = picture(120, 160)
    ours = crop(frames, (11, 23, 84, 101), 64)
    assert ours.shape == (3, 3, 64, 64)
    assert ours.dtype == torch.uint8
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    theirs = F.resized_crop(video, 11, 23, 84, 101, [64, 64], InterpolationMode.BICUBIC, antialias=True)
    error = (ours.transpose(0, 1).float() - theirs.clamp(0, 255)).abs()
    assert error.max() <= 2
    assert error.mean() < 0.5


@pytest.mark.parametrize(("height", "width"), [(120, 160), (320, 426), (64, 64), (40, 400)])
def test_random_boxes_stay_inside_and_cover_the_range(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    boxes = [random_box(height, width, 0.5, rng) for _ in range(500)]
    assert len(set(boxes)) > (100 if height * 4 > width else 0)
    for top, left, h, w in boxes:
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert 0.7 < w / h < 1.4
        assert h * w >= 0.48 * height * width or width == 10 * height


@pytest.mark.parametrize(("height", "width"), [(120, 160), (160, 120), (321, 427), (64, 64), (48, 100)])
def test_center_crop_is_short_side_then_middle(height: int, width: int) -> None:
    frames, size = picture(height, width), 64
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    video = F.resize(video, [size], InterpolationMode.BICUBIC, antialias=True)
    expected = F.center_crop(video, [size, size]).clamp(0, 255)
    ours = center_crop(frames, size)
    assert ours.shape == (3, 3, size, size)
    assert (ours.transpose(0, 1).float() - expected).abs().max() <= 2


def step(before: int, after: int) -> np.ndarray:
    """Two grey halves side by side, uint8 [1, 8, 8, 3]."""
    return np.repeat(np.array([before] * 4 + [after] * 4, np.uint8)[None, None, :, None], 8, 1).repeat(3, 3)


def test_resizing_without_antialiasing_overshoots_as_torchvision_0_14_did() -> None:
    """Halving, computed separately: bicubic weighs four neighbours -0.09375, 0.59375, 0.59375, -0.09375 (a = -0.75)."""
    row = spatial_crops(step(0, 255), 4, 1, "bicubic")[0, 0, 0, 0]
    assert row.tolist() == [0, -0.09375 * 255, 1.09375 * 255, 255], "neither rounded nor kept within 0..255"
    assert spatial_crops(step(10, 20), 4, 1, "bilinear")[0, 0, 0, 0].tolist() == [10, 10, 20, 20]
    ours = spatial_crops(step(0, 255), 4, 1)[0, 0, 0, 0]
    assert ours.dtype == torch.uint8
    assert ours.tolist() != row.round().clamp(0, 255).tolist()


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width"), [(120, 160), (161, 123)])
def test_resizing_without_antialiasing_is_interpolation_of_float32(mode: str, height: int, width: int) -> None:
    frames, size = picture(height, width), 56
    short = min(height, width)
    target = [int(size * side / short) for side in (height, width)]
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    whole = torch.nn.functional.interpolate(video, target, mode=mode, align_corners=False, antialias=False)
    top, left = (round((side - size) / 2) for side in target)
    got = spatial_crops(frames, size, 1, mode)
    assert got.dtype == torch.float32
    expected = whole[..., top : top + size, left : left + size].transpose(0, 1)[None]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    # A smooth picture shows little of it; it is not the antialiased one all the same.
    assert 0.01 < (got - spatial_crops(frames, size, 1).float()).abs().mean() < 5


# Mean and deviation of 255 as each project's code has them.
PUBLISHED = {
    "clip": ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
    "avion": ((108.3272985, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "inception": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
}


@pytest.mark.parametrize("name", list(IMAGE_STATS))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalise_is_what_the_family_publishes_and_contiguous(name: str, dtype: torch.dtype) -> None:
    video = torch.randint(256, (2, 4, 8, 8, 3), dtype=torch.uint8).to(dtype).permute(0, 4, 1, 2, 3)
    assert not video.is_contiguous()
    expected = F.normalize(video.transpose(1, 2).float(), *map(list, PUBLISHED[name])).transpose(1, 2)
    ours = normalise(video, IMAGE_STATS[name])
    assert ours.is_contiguous()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert torch.equal(normalise(video), normalise(video, IMAGE_STATS["clip"])), "upstream's recipe is the default"


def test_half_a_pixel_beside_a_middle_crop_is_cut_as_the_family_does() -> None:
    """Of 8 x 13 pixels 2.5 are left of the middle: torchvision crops from 2, LaViLa's second of three from 3."""
    frames = np.broadcast_to(np.arange(13, dtype=np.uint8)[None, None, :, None], (1, 8, 13, 3)).copy()
    for count, first in ((1, [2]), (3, [0, 3, 5])):
        assert spatial_crops(frames, 8, count)[:, 0, 0, 0, 0].tolist() == first


def test_normalise_leaves_its_input_alone() -> None:
    """Frames that were resized without rounding are float32 already."""
    video = torch.full((1, 3, 2, 4, 4), 100.0)
    normalise(video)
    assert (video == 100).all()


def test_a_squashed_picture_is_open_clips() -> None:
    """SigLIP and PE see the whole picture, whatever its shape, as a square."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 9, 16, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    settings = PreprocessCfg(
        size=32, mode="RGB", resize_mode="squash", interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3
    )
    theirs = image_transform_v2(settings, is_train=False)(Image.fromarray(frames[0]))
    (ours,) = spatial_crops(frames, 32, 1, "squash")
    assert (ours.shape, ours.dtype) == ((3, 1, 32, 32), torch.uint8)
    # Pillow rounds between the two directions.
    torch.testing.assert_close(ours[:, 0] / 255, theirs, atol=2 / 255, rtol=0)
    assert (ours[:, 0] / 255 - center_crop(frames, 32)[:, 0] / 255).abs().mean() > 0.05
