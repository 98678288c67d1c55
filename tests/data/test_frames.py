import numpy as np
import pytest

from egohod.data.frames import frame_times, segment_indices


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
