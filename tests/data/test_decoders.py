"""Every decoder gives the frame that is on display, bit for bit the same as decoding the whole file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_files import DECODERS, encode, opener, reference

from egohod.config import UserError
from egohod.data import decoders
from egohod.data.decoders import choose_decoder
from egohod.data.frames import frame_times, segment_indices

# Streams that need different care: what may be left out, and where decoding may begin.
STREAMS: dict[str, dict[str, Any]] = {
    "default": {},
    "no b-frames": {"x264": "keyint=12:bframes=0"},
    "b-pyramid": {"x264": "keyint=30:bframes=7:b-adapt=0:b-pyramid=normal:ref=4"},
    "one group": {"x264": "keyint=250:bframes=3"},
    "only key frames": {"x264": "keyint=1"},
    "fastdecode": {"x264": "keyint=8:cabac=0:deblock=0:weightp=0"},
    "odd size": {"size": (102, 70)},
    "open groups": {"x264": "keyint=8:open-gop=1:bframes=5:b-adapt=0:b-pyramid=normal"},
    "mpeg-4 part 2": {"codec": "mpeg4"},
    # The last frame's length is not stored, so that a file's end is where its last frame begins.
    "variable rate": {"milliseconds": [int(100 * i + 60 * np.sin(i)) for i in range(40)]},
}
# What the other libraries get wrong, which is one more reason to prefer PyAV.
NOT_EXACT = {
    "decord": ("open groups", "mpeg-4 part 2", "variable rate"),  # loses its place when it seeks
    "torchcodec": ("open groups", "variable rate"),  # cannot reach the last frame
}


def check(path: Path, decoder: str) -> None:
    """Single frames, dense and sparse sets, in any order, with repeats, in one open decoder."""
    times, pictures = reference(path)
    opened = opener(decoder)(path)
    rng = np.random.default_rng(0)
    asked = [rng.uniform(0, times[-1], n) for n in (1, 1, 1, 1, 4, 4, 16)]
    asked += [np.array([times[-1] + 50, -1.0]), times[:8] + 1e-4, np.array([0.5, 0.5, 0.5])]
    for seconds in asked:
        shown = np.maximum(np.searchsorted(times, seconds + 1e-6, side="right") - 1, 0)
        got = opened.read_at(seconds)
        assert got.dtype == np.uint8
        assert np.array_equal(got, pictures[shown]), f"frames {shown.tolist()} differ"
    opened.close()


@pytest.mark.parametrize(
    ("stream", "decoder"), [(s, d) for s in STREAMS for d in DECODERS if s not in NOT_EXACT.get(d, ())]
)
def test_frames_are_identical_to_decoding_everything(tmp_path: Path, stream: str, decoder: str) -> None:
    check(encode(tmp_path / "v.mp4", **STREAMS[stream]), decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_rate_and_duration(tmp_path: Path, decoder: str) -> None:
    opened = opener(decoder)(encode(tmp_path / "v.mp4", 25))
    assert opened.fps == pytest.approx(10)
    assert opened.duration == pytest.approx(2.5)


@pytest.mark.parametrize("decoder", DECODERS)
def test_real_clips(shared: Path, decoder: str) -> None:
    for path in sorted((shared / "media").glob("*/*.mp4")):
        times, pictures = reference(path)
        opened = opener(decoder)(path)
        rng = np.random.default_rng(0)
        seconds = frame_times(segment_indices(0, len(times), 16, rng), opened.fps)
        shown = np.maximum(np.searchsorted(times, seconds + 1e-6, side="right") - 1, 0)
        assert np.array_equal(opened.read_at(seconds), pictures[shown]), path.name


def test_the_fast_decoder_leaves_out_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener("pyav")(encode(tmp_path / "v.mp4", 40, x264="keyint=10:bframes=3:b-adapt=0:b-pyramid=none"))
    groups = []
    inner = decoders._needed_groups
    monkeypatch.setattr(decoders, "_needed_groups", lambda *a: groups.append(inner(*a)) or groups[-1])
    opened.read_at(np.array([0.05, 2.55]))
    # Two of the four groups hold a wanted frame, and neither is needed by the next.
    assert [(group[0].pts, whole) for group, whole in groups[0]] == [
        (groups[0][0][0][0].pts, False),
        (groups[0][1][0][0].pts, False),
    ]
    assert len(groups[0]) == 2


def test_auto_takes_the_first_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"av"}
    monkeypatch.setattr(decoders, "_cannot_import", lambda module: "No module" if module in missing else None)
    assert choose_decoder("auto")[0] == "torchcodec"
    missing.add("torchcodec.decoders")
    assert choose_decoder("auto")[0] == "decord"
    missing.add("decord")
    with pytest.raises(UserError, match=r"pip install av.*apt-get install ffmpeg.*pip install decord"):
        choose_decoder("auto")


def test_an_absent_decoder_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_cannot_import", lambda module: "libavutil.so.56: no such file")
    with pytest.raises(UserError, match=r"torchcodec does not load .libavutil.*apt-get install ffmpeg"):
        choose_decoder("torchcodec")


def test_an_unknown_decoder() -> None:
    with pytest.raises(UserError, match="must be auto, pyav, torchcodec, decord"):
        choose_decoder("gstreamer")
