"""Pictures of clips: where boxes and tracks are drawn, and in which colours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import visualize_hod

from egohod.data.detections import ROLE_COLOURS
from egohod.hod.draw import write_film
from egohod.hod.facts import ClipFacts, HandFacts, Motion, ObjectFacts, PairFacts

FRAMES, HEIGHT, WIDTH = 6, 60, 80


def motion(path: Any) -> Motion:
    path = np.asarray(path, dtype=float)
    return Motion(path, np.full(len(path), 0.2), ("right",), 1, 0.3, "left", "right")


def view(**changes: Any) -> visualize_hod.ClipView:
    times = np.arange(FRAMES) / FRAMES
    across: np.ndarray = np.stack([np.linspace(0.2, 0.8, FRAMES), np.full(FRAMES, 0.5)], axis=1)
    hand = HandFacts("right", 1.0, motion(across), 0.0, None, None, "object")
    thing = ObjectFacts("cup", False, motion(across + np.array([0, 0.3])))
    facts = ClipFacts("v", 0.0, 1.0, times, {"right": hand}, thing, "right", None)
    box = {"kind": "hand", "side": 1, "state": 3, "score": 1.0, "second": 0.0, "offset_x": 0.0, "offset_y": 0.3}
    box |= {"left": 0.25, "top": 0.25, "right": 0.5, "bottom": 0.5}
    whole = visualize_hod.ClipView(
        "v 0-1 s", np.full((FRAMES, HEIGHT, WIDTH, 3), 90, np.uint8), times, [box], facts, "#C C moves a cup",
        "#C C slides the cup to the right with the right hand", "template", "passed", {},
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def colours(image: Any) -> set[tuple[int, ...]]:
    return {tuple(colour) for _, colour in image.getcolors(1 << 20)}


def test_a_box_stands_in_its_own_frame_in_the_colour_of_its_side() -> None:
    image = np.asarray(visualize_hod.frame(view(), 0, HEIGHT))
    assert tuple(image[15, 30]) == (255, 255, 255), "a white edge, for dark pictures"
    assert tuple(image[16, 30]) == ROLE_COLOURS[1]
    assert tuple(image[40, 30]) == ROLE_COLOURS[1], "the line to what the hand touches"
    assert ROLE_COLOURS[1] not in colours(visualize_hod.frame(view(), 1, HEIGHT))
    # Detections made elsewhere have moments of their own: the nearest frame has them.
    apart = view(boxes=[view().boxes[0] | {"second": 0.6 / FRAMES}])
    assert ROLE_COLOURS[1] not in colours(visualize_hod.frame(apart, 0, HEIGHT))
    assert ROLE_COLOURS[1] in colours(visualize_hod.frame(apart, 1, HEIGHT))


def test_a_track_goes_from_the_colour_of_the_start_to_that_of_the_end() -> None:
    image = visualize_hod.tracks(view(), 240)
    assert image.size == (320, 240)
    pixels = np.asarray(image)
    assert tuple(pixels[120, 66]) == visualize_hod.time_colour(0.2) or tuple(
        pixels[120, 64]
    ) == visualize_hod.time_colour(0)
    assert tuple(pixels[120, 255]) == visualize_hod.time_colour(1)
    early = np.asarray(visualize_hod.frame(view(boxes=[]), 2, 240, until=2))
    assert tuple(early[120, 255]) == (90, 90, 90), "the track has not come there yet"


def test_time_runs_from_dark_to_light() -> None:
    light = [sum(visualize_hod.time_colour(share)) for share in np.linspace(0, 1, 20)]
    assert light == sorted(light)
    assert visualize_hod.time_colour(-1) == visualize_hod.time_colour(0)
    assert visualize_hod.time_colour(2) == visualize_hod.time_colour(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": None, "boxes": [], "traits": {}},
        {"text": "word " * 300, "source": ""},
        {"pictures": np.zeros((1, 45, 90, 3), np.uint8), "seconds": np.zeros(1)},
    ],
)
def test_whatever_is_missing_a_sheet_can_be_drawn(changes: dict[str, Any]) -> None:
    sheet = visualize_hod.sheet([view(), view(**changes)])
    assert sheet.width > 600
    assert sheet.height > 2 * visualize_hod.LARGE
    assert visualize_hod.card(view(**changes)).height == 2 * visualize_hod.SMALL


def test_gaps_in_a_track_stay_gaps() -> None:
    facts = view().facts
    assert facts is not None
    path = facts.hands["right"].motion.path.copy()
    path[2:4] = np.nan
    broken = dataclasses.replace(
        facts, object=None, hands={"right": dataclasses.replace(facts.hands["right"], motion=motion(path))}
    )
    pixels = np.asarray(visualize_hod.frame(view(facts=broken, boxes=[]), 5, 240, until=5))
    assert (pixels[120, 130:180] == 90).all()


def test_a_film_has_every_frame_and_even_sides(tmp_path: Path) -> None:
    write_film(visualize_hod.film(view(), 121), 10, tmp_path / "film.mp4")
    with av.open(str(tmp_path / "film.mp4")) as film:
        sizes = [(frame.height, frame.width) for frame in film.decode(video=0)]
    assert sizes == [(120, 160)] * FRAMES


def test_a_line_says_how_far_hands_move_and_what_they_do_together() -> None:
    facts = view().facts
    assert facts is not None
    assert visualize_hod.measured(facts) == "right moves", "no hand's size is known"
    hand = facts.hands["right"]
    known = dataclasses.replace(hand, motion=dataclasses.replace(hand.motion, distance=0.214, pace=0.1))
    still = dataclasses.replace(hand.motion, directions=("still",))
    other = dataclasses.replace(hand, side="left", motion=still, grasp="closed")
    pair = PairFacts("parallel", "left", True, "right")
    both = {"right": dataclasses.replace(known, regrasps=(0.5,)), "left": other}
    together = dataclasses.replace(facts, hands=both, hands_together="apart", pair=pair)
    assert visualize_hod.measured(together) == (
        "left still, closed; right about 21 cm at 10 cm/s, takes it 2 times; "
        "hands apart, parallel, both hold it, left steadies, handed to the right"
    )
    true = dataclasses.replace(known, motion=dataclasses.replace(known.motion, is_metric=True))
    assert visualize_hod.measured(dataclasses.replace(facts, hands={"right": true})) == "right 21 cm at 10 cm/s"
