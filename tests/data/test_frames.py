import numpy as np
import pytest

from egohod.data.videos import clip_indices, floored_midpoints, frame_times, segment_indices


@pytest.mark.parametrize(
    ("start", "end", "n"), [(0, 60, 4), (0, 60, 16), (17, 18, 4), (5, 12, 16), (100, 3700, 32), (3, 50, 1)]
)
def test_middle_of_each_segment_is_the_published_formula(start: int, end: int, n: int) -> None:
    size = (end - start - 1) / n
    expected = [(round(size * i) + round(size * (i + 1))) // 2 + start for i in range(n)]
    assert segment_indices(start, end, n).tolist() == expected


def test_jitter_reaches_all_of_each_segment_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([segment_indices(10, 51, 4, rng) for _ in range(2000)])
    for i, (low, high) in enumerate([(10, 20), (20, 30), (30, 40), (40, 50)]):
        assert set(drawn[:, i]) == set(range(low, high + 1))


@pytest.mark.parametrize("end", [10, 9, 0])
def test_an_empty_range_is_one_frame(end: int) -> None:
    assert segment_indices(10, end, 3).tolist() == [10, 10, 10]
    assert segment_indices(10, end, 3, np.random.default_rng(0)).tolist() == [10, 10, 10]


def test_times_lie_in_the_middle_of_the_display_interval() -> None:
    assert frame_times(np.array([0, 1, 29]), 10.0).tolist() == pytest.approx([0.05, 0.15, 2.95])


@pytest.mark.parametrize("seed", range(3))
def test_frame_ranges_are_those_of_the_published_loaders(seed: int) -> None:
    """Ranges written out as the loaders of EgoVideo, AVION and LaViLa compute them, over clips of 0.05 to 4 s."""
    rng = np.random.default_rng(seed)
    for _ in range(200):
        fps, n = float(rng.choice([25.0, 29.97, 30.0, 50.0, 59.94])), int(rng.choice([4, 16]))
        frames = 90 * int(fps)
        start = round(float(rng.uniform(0, 85)), 2)
        end = round(start + float(rng.uniform(0.05, 4)), 2)
        first, count = int(np.round(start * fps)), max(int((end - start) * fps), n)

        def formula(a: int, b: int, n: int = n) -> list[int]:
            size = float(b - a - 1) / n
            edges = [(int(np.round(size * i) + a), int(np.round(size * (i + 1)) + a)) for i in range(n)]
            return [(min(low, b - 1) + min(high, b)) // 2 for low, high in edges]

        def midpoints(a: int, b: int, n: int = n) -> list[int]:
            return np.convolve(np.linspace(a, b, n + 1), [0.5, 0.5], mode="valid").astype(int).tolist()  # type: ignore[no-any-return]

        def ours(rule: str, chunk: float | None = None, n: int = n) -> list[int]:
            return clip_indices(start, end, frames / fps, fps, n, None, rule, chunk).tolist()  # noqa: B023

        seconds = formula(first, int(np.round(end * fps)))
        assert ours("middle") == ours("middle", 15.0) == seconds
        assert ours("upstream", start // 15 * 15) == seconds
        assert ours("upstream") == formula(first, min(first + count, frames))
        assert ours("avion") == midpoints(first, min(first + count, frames))
        assert ours("avion", start // 15 * 15) == midpoints(first, int(np.round(end * fps)))
        assert ours("lavila") == formula(first, int(np.ceil(end * fps)))


def test_upstream_shows_a_short_clip_of_a_whole_file_in_at_least_as_many_frames() -> None:
    """EK100's clips of 0.2 s have 10 frames at 50 fps: upstream takes 16 from their start on, up to the file's end."""
    assert clip_indices(2.0, 2.2, 60.0, 50.0, 16, rule="upstream").tolist() == segment_indices(100, 116, 16).tolist()
    assert clip_indices(59.9, 60.0, 60.0, 50.0, 16, rule="upstream").tolist()[-1] == 2999
    assert clip_indices(2.0, 2.2, 60.0, 50.0, 16).tolist() == segment_indices(100, 110, 16).tolist()


@pytest.mark.parametrize("rule", ["middle", "lavila"])
def test_a_whole_file_ends_with_its_last_frame(rule: str) -> None:
    """As floats, 749 / 29.97 * 29.97 is more than 749."""
    for fps in (24000 / 1001, 29.97, 30000 / 1001, 60000 / 1001):
        for frames in range(20, 1000):
            shown = clip_indices(0.0, np.inf, frames / fps, fps, 16, rule=rule)
            assert shown.tolist() == segment_indices(0, frames, 16).tolist()


def test_an_end_is_cut_to_the_frames_before_it_as_upstream_does() -> None:
    assert clip_indices(0.0, 1.99, 60.0, 30.0, 1, rule="upstream").tolist() == segment_indices(0, 59, 1).tolist()
    assert clip_indices(0.0, 1.99, 60.0, 30.0, 1).tolist() == segment_indices(0, 60, 1).tolist()


def test_midpoints_move_by_half_a_part_and_stay_in_the_clip() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([floored_midpoints(10, 50, 4, rng) for _ in range(2000)])
    assert [(int(column.min()), int(column.max())) for column in drawn.T] == [(10, 19), (20, 29), (30, 39), (40, 49)]
    assert floored_midpoints(10, 10, 3, rng).tolist() == [10, 10, 10]
