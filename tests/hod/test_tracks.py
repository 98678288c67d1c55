"""Lengths in metres, what two hands do together, regrasps: measured, written into captions, and checked there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from egohod.data.detections import NO_CONTACT, PORTABLE_OBJECT, SCHEMA
from egohod.hod.check import check
from egohod.hod.config import CheckConfig, TracksConfig
from egohod.hod.facts import ClipFacts, PairFacts, facts_of
from egohod.hod.narrators import describe
from egohod.hod.narrators.template import template
from tests.hod.hod_facts import clip, hand
from tests.hod.test_facts import TIMES, Rows, boxes

T = len(TIMES)
STEP = np.linspace(0, 1, T)
REST = np.full(T, 0.5)


def facts(rows: Rows, aspect: float = 1.0, **more: Any) -> ClipFacts:
    table = pa.Table.from_pylist(rows, SCHEMA)
    return facts_of(table, TIMES, video_id="v", start=0.0, end=2.0, aspect=aspect, **more)


def shown(rows: Rows, wide: float, high: float) -> Rows:
    """The same boxes where the picture's width and height are drawn at other scales around its middle."""
    scales = {"left": wide, "right": wide, "top": high, "bottom": high}
    return [row | {edge: 0.5 + (row[edge] - 0.5) * scale for edge, scale in scales.items()} for row in rows]  # type: ignore[operator]


def touching(rows: Rows, flags: np.ndarray, x: np.ndarray, y: np.ndarray) -> Rows:
    """A hand's rows with its contact state, and its offset to a thing at (x, y) where it touches that."""
    for row, flag, to_x, to_y in zip(rows, flags, x, y, strict=True):
        middle = ((row["left"] + row["right"]) / 2, (row["top"] + row["bottom"]) / 2)  # type: ignore[operator]
        offset = (to_x - middle[0], to_y - middle[1]) if flag else (None, None)
        row |= {"state": PORTABLE_OBJECT if flag else NO_CONTACT, "offset_x": offset[0], "offset_y": offset[1]}
    return rows


def between(start: int, end: int) -> np.ndarray:
    return (np.arange(T) >= start) & (np.arange(T) < end)


# --- Lengths ---


def test_lengths_are_measured_in_hands() -> None:
    motion = facts(boxes(0.2 + 0.5 * STEP, REST)).hands["right"].motion
    assert motion.distance == pytest.approx(0.12 * 0.5 / 0.2, rel=0.02)
    assert motion.pace == pytest.approx(0.3 / (TIMES[-1] - TIMES[0]), rel=0.05)
    assert not motion.is_metric
    larger = facts(boxes(0.2 + 0.5 * STEP, REST), params=TracksConfig(hand_metres=0.24)).hands["right"]
    assert larger.motion.distance == pytest.approx(2 * motion.distance)
    assert larger.size == pytest.approx(0.2)
    there_and_back = facts(boxes(0.2 + 0.5 * np.sin(np.pi * STEP), REST)).hands["right"].motion
    assert there_and_back.distance == pytest.approx(2 * motion.distance, rel=0.05)
    round_once = facts(boxes(0.5 + 0.2 * np.cos(2 * np.pi * STEP), 0.5 + 0.2 * np.sin(2 * np.pi * STEP)))
    assert round_once.hands["right"].motion.distance == pytest.approx(0.12 * 2 * np.pi, rel=0.15)
    still = facts(boxes(REST, REST)).hands["right"].motion
    assert (still.distance, still.pace) == (0.0, 0.0)


def test_jitter_does_not_lengthen_the_way() -> None:
    rng = np.random.default_rng(0)
    noisy = facts(boxes(0.2 + 0.5 * STEP + rng.normal(0, 0.01, T), 0.5 + rng.normal(0, 0.01, T))).hands["right"]
    assert noisy.motion.distance == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(("wide", "high", "aspect"), [(0.4, 0.4, 1.0), (0.75, 1.0, 4 / 3), (0.3, 0.3 * 16 / 9, 16 / 9)])
def test_neither_zoom_nor_the_shape_of_the_picture_changes_facts(wide: float, high: float, aspect: float) -> None:
    """A motion of two thirds of a hand, which is less than the former 5 % of the picture where it is far away."""
    rows = boxes(0.45 + 0.13 * STEP, REST) + boxes(REST, 0.3 + 0.2 * STEP, side=0)
    near, far = facts(rows), facts(shown(rows, wide, high), aspect)
    for side, way in (("right", "right"), ("left", "down")):
        one, other = near.hands[side].motion, far.hands[side].motion
        assert one.directions == other.directions == (way,)
        assert one.distance == pytest.approx(other.distance, rel=1e-3)
        assert one.pace == pytest.approx(other.pace, rel=1e-3)


def test_a_hand_that_is_cut_off_has_the_other_hands_ruler_or_none() -> None:
    cut = [row | {"bottom": 1.0} for row in boxes(0.2 + 0.5 * STEP, np.full(T, 0.9))]
    alone = facts(cut).hands["right"]
    assert alone.motion.directions == ("right",)
    assert (alone.motion.distance, alone.motion.pace, alone.size) == (None, None, None)
    both = facts(cut + boxes(REST, REST, 0.1, side=0))
    assert both.hands["right"].motion.distance == pytest.approx(0.12 * 0.5 / 0.1, rel=0.02)
    leaves = facts(boxes(0.5 + 0.7 * STEP, REST)[:20]).hands["right"]
    assert leaves.motion.directions == ("right",)
    assert leaves.motion.distance == pytest.approx(0.12 * (0.7 * STEP[17]) / 0.2, rel=0.2), "until it is out of sight"


# --- Two hands ---


def pair_of(right: tuple[np.ndarray, np.ndarray], left: tuple[np.ndarray, np.ndarray]) -> PairFacts:
    pair = facts(boxes(*right, 0.15) + boxes(*left, 0.15, side=0)).pair
    assert pair is not None
    return pair


def test_hands_that_move_the_same_way_or_as_in_a_mirror() -> None:
    wave = 0.15 * np.sin(3 * STEP)
    lift = 0.7 - 0.3 * STEP
    assert pair_of((0.7 + wave, REST), (0.3 + wave, REST)).moves == "parallel"
    assert pair_of((0.7 + wave, REST), (0.3 - wave, REST)).moves == "mirrored"
    assert pair_of((REST + 0.2, lift), (REST - 0.2, lift)).moves == "parallel", "up is up in a mirror too"
    assert pair_of((0.6 + 0.2 * STEP, lift), (0.4 - 0.2 * STEP, lift)).moves == "mirrored"
    # Other ways, other times, one that rests, one that goes three times as far
    assert pair_of((0.7 + wave, REST), (REST - 0.2, lift)).moves is None
    first, second = np.clip(2 * STEP, 0, 1), np.clip(2 * STEP - 1, 0, 1)
    loop = 0.2 * np.sin(np.pi * first), 0.2 * np.sin(np.pi * second)
    assert pair_of((0.7 + loop[0], REST), (0.3 + loop[1], REST)).moves is None
    assert pair_of((0.7 + wave, REST), (REST - 0.2, REST)).moves is None
    assert pair_of((0.6 + 0.3 * STEP, REST), (0.2 + 0.1 * STEP, REST)).moves is None
    assert pair_of((0.2 + 0.5 * STEP, REST), (0.8 - 0.5 * STEP, REST + 0.2)).moves == "mirrored"
    assert pair_of((0.6 + 0.3 * STEP, REST), (0.1 + 0.3 * STEP, 0.8 - 0.3 * STEP)).moves is None


def test_one_hand_has_no_pair() -> None:
    assert facts(boxes(REST, REST)).pair is None
    assert facts([]).pair is None


def passing(right: np.ndarray, left: np.ndarray) -> PairFacts:
    """Hands that touch a cup in these samples; the cup goes from the right to the left."""
    x = 0.7 - 0.4 * STEP
    cup = boxes(x, REST, 0.1, "object", name="cup")
    rows = touching(boxes(REST + 0.25, REST, 0.15), right, x, REST)
    rows += touching(boxes(REST - 0.25, REST, 0.15, side=0), left, x, REST)
    pair = facts(rows + cup).pair
    assert pair is not None
    return pair


def test_a_thing_is_handed_over() -> None:
    assert passing(between(0, 13), between(11, T)).handed_to == "left"
    assert passing(between(11, T), between(0, 13)).handed_to == "right"
    assert passing(between(0, 11), between(14, T)).handed_to == "left", "a moment in which neither is seen to hold it"
    flicker = between(0, 13) & ~between(5, 6)
    assert passing(flicker, between(11, T) & ~between(17, 18)).handed_to == "left"
    # Put down in between; held by both; touched by the other one for a moment, or from before; only one hand
    assert passing(between(0, 6), between(16, T)).handed_to is None
    assert passing(between(0, T), between(0, T)).handed_to is None
    assert passing(between(0, T), between(10, 14)).handed_to is None
    assert passing(between(0, 13), between(0, T)).handed_to is None
    assert passing(between(3, 13), between(0, 5) | between(11, T)).handed_to is None, "there and back"
    assert passing(between(0, 13), between(24, T)).handed_to is None
    assert passing(between(0, 22), between(21, T)).handed_to is None, "too short to be sure"


def test_both_hands_hold_the_same_thing() -> None:
    assert passing(between(0, T), between(3, T)).shares
    assert passing(between(0, T) & ~between(7, 8), between(0, T) & ~between(12, 13)).shares
    assert not passing(between(0, 14), between(11, T)).shares
    assert not passing(between(0, T), between(24, T)).shares


def steadying(touches: np.ndarray, works: np.ndarray, moves: np.ndarray, turns: np.ndarray = REST) -> str | None:
    """The left hand touches a bowl while the right one moves with a spoon it touches."""
    bowl, spoon = boxes(REST - 0.2, REST + 0.1, 0.2, "object"), boxes(0.5 + moves, REST - 0.2, 0.1, "object")
    rows = touching(boxes(0.55 + moves, REST - 0.1, 0.15), works, 0.5 + moves, REST - 0.2)
    rows += touching(boxes(turns - 0.25, REST + 0.1, 0.15, side=0), touches, REST - 0.2, REST + 0.1)
    pair = facts(rows + bowl + spoon).pair
    assert pair is not None
    return pair.steadies


def test_one_hand_steadies_what_the_other_works_on() -> None:
    everywhere, stir = between(0, T), 0.15 * np.sin(6 * STEP)
    assert steadying(everywhere, everywhere, stir) == "left"
    assert steadying(everywhere & ~between(9, 10), everywhere, stir) == "left"
    assert steadying(between(24, T), everywhere, stir) is None, "it touches nothing"
    assert steadying(between(0, 8), everywhere, stir) is None, "it touches the bowl for a moment"
    assert steadying(everywhere, between(24, T), stir) is None, "the other one only waves"
    assert steadying(everywhere, everywhere, 0 * stir) is None, "both rest"
    assert steadying(everywhere, everywhere, stir, REST + 0.2 * STEP) is None, "both work"


# --- Regrasps ---


def regrasps(flags: np.ndarray, missing: np.ndarray | None = None, elsewhere: np.ndarray | None = None) -> Any:
    x = REST if elsewhere is None else np.where(elsewhere, 0.05, REST)
    rows = touching(boxes(REST, REST), flags if elsewhere is None else flags | elsewhere, x, REST)
    cup = boxes(REST, REST, 0.1, "object", name="cup")
    if missing is not None:
        rows = [row for row, gone in zip(rows, missing, strict=True) if not gone]
    return facts(rows + cup).hands["right"].regrasps


def test_a_hand_takes_the_same_thing_again() -> None:
    assert regrasps(~between(8, 14)) == (pytest.approx(TIMES[14]),)
    assert regrasps(~between(5, 9) & ~between(14, 19)) == (pytest.approx(TIMES[9]), pytest.approx(TIMES[19]))
    assert regrasps(~between(8, 14), elsewhere=between(8, 14)) == (pytest.approx(TIMES[14]),), "it took another thing"


def test_flicker_is_no_regrasp() -> None:
    assert regrasps(between(0, T)) == ()
    assert regrasps(between(4, 20)) == ()
    assert regrasps(~between(8, 9)) == ()
    assert regrasps(~between(8, 9) & ~between(13, 14) & ~between(16, 17)) == ()
    assert regrasps(~between(8, 14), missing=between(8, 14)) == (), "a hand that is not seen lets nothing go"
    assert regrasps(~between(8, 14), missing=between(8, 13)) == (), "it is seen in one sample"
    assert regrasps(between(0, 8) | between(14, 15)) == (), "touched again, not held"
    assert regrasps(between(0, 2) | between(12, 14)) == (), "two taps"


# --- In captions ---

_TOGETHER = PairFacts(None, None, False, None)
_ONLY_TRACKS = CheckConfig(words=False)


def wordings(source: str, actual: ClipFacts, **more: Any) -> set[str]:
    texts = {template(source, actual, seed, **more) for seed in range(60)}
    for text in texts:
        assert check(text, source, actual, CheckConfig()).passed, (text, check(text, source, actual, CheckConfig()))
    return texts


def refused(text: str, actual: ClipFacts) -> bool:
    return not check(text, "", actual, _ONLY_TRACKS).passed


def test_the_template_says_what_two_hands_do_and_the_check_knows_when_it_is_untrue() -> None:
    held = {"touches": "object", "contact": 0.0}
    both = clip(hand("right", "up", **held), hand("left", "up", **held), thing="pot")
    alone = replace(both, pair=_TOGETHER)

    carries = replace(both, pair=replace(_TOGETHER, moves="parallel", shares=True))
    assert all("both hands" in text and "left" not in text for text in wordings("#C C lifts the pot", carries))
    assert template("", carries) == "Both hands move the pot upward"
    same = replace(both, pair=replace(_TOGETHER, moves="parallel"))
    texts = wordings("#C C lifts the pot", same)
    told = next(text for text in texts if "the left hand moves the same way" in text)
    assert any("the left hand moves upward" in text for text in texts)
    assert refused(told, alone)
    assert refused(told, replace(both, pair=None))

    spread = clip(hand("right", "right"), hand("left", "left"), pair=replace(_TOGETHER, moves="mirrored"))
    (told, *_) = wordings("#C C spreads the dough", spread)
    assert "the left hand moves to the left symmetrically" in told
    assert refused(told, replace(spread, pair=_TOGETHER))
    assert refused("The right hand and the left hand move in parallel", spread)

    handed = replace(both, pair=replace(_TOGETHER, handed_to="left"))
    assert wordings("#C C moves the pot", handed) == {"#C C moves the pot from the right hand to the left hand"}
    assert template("", handed) == "The pot goes from the right hand to the left hand"
    assert not refused("The right hand passes the pot to the left hand side", both), "a place, and nothing handed over"
    for text in (
        "She passes it over to the right hand",
        "C moves it from his left hand to his right hand",
        "C gives the red pot to the right hand",
        "C passes the pot on to the right hand",
    ):
        assert refused(text, handed)
        assert not refused(text, replace(both, pair=replace(_TOGETHER, handed_to="right")))

    steadies = clip(hand("right", "clockwise", **held), hand("left", touches="other object", contact=0.0), thing="pot")
    steadies = replace(steadies, pair=replace(_TOGETHER, steadies="left"))
    texts = wordings("#C C stirs the pot", steadies)
    assert {text.partition("the left hand ")[2] for text in texts} == {
        "holds another object still",
        "steadies another object",
    }
    assert refused("The right hand stirs, while the left hand steadies the bowl", clip(hand("right"), hand("left")))


def test_regrasps_in_captions() -> None:
    again = clip(hand("right", "left", touches="object", contact=0.0, regrasps=(1.0,)), thing="cup")
    once = clip(hand("right", "left", touches="object", contact=0.0), thing="cup")
    texts = wordings("#C C moves the cup", again)
    assert all(text.endswith(("regrasping it", "letting go of it in between")) for text in texts)
    assert all(refused(text, once) for text in texts)
    for text in ("lets go of the cup and takes it again", "grabs the red cup again", "takes hold of the cup again"):
        assert refused(f"The right hand {text}", once)
        assert not refused(f"The right hand {text}", again)


def test_distances_in_captions_are_rough_and_only_on_request() -> None:
    right = hand("right", "left", touches="object", contact=0.0)
    moved = clip(replace(right, motion=replace(right.motion, distance=0.22)), thing="cup")
    assert not any("cm" in text for text in wordings("#C C moves the cup", moved))
    assert all("to the left by about 20 cm" in text for text in wordings("#C C moves it", moved, distances=True))
    assert any("moves to the left by about 20 cm" in line for line in describe(moved, distances=True))
    assert not any("cm" in line for line in describe(moved))
    for true in ("220 mm", "200 millimetres", "25-cm", "0.3 m", "8.5 inches", "8 inch", "0.7 ft", "1 foot", "0,2 m"):
        assert not refused(f"The right hand moves the cup about {true} to the left", moved), true
    for wrong in ("22 mm", "5 cm", "80 centimetres", "2 m", "0.2 cm", "1,000 mm", "22 inches", "2 feet", "2-3 metres"):
        assert refused(f"The right hand moves the cup {wrong} to the left", moved), wrong
    assert not refused("With the right hand 0.2 metres to the left, the cup is moved", moved)
    assert refused("The right hand moves the cup by 1,022 cm to the left", moved)
    assert refused("The right hand moves the cup by 20 cm to the left", clip(right, thing="cup")), "nothing is known"
    source, told = "#C C cuts the carrot into 2 cm pieces", "with the right hand, to the left"
    assert check(f"{source} {told}", source, moved, CheckConfig()).passed, "a size in the narration"
    assert check(f"{source} {told} by about 20 cm", source, moved, CheckConfig()).passed
    assert not check(f"{source} {told} by about 90 cm", source, moved, CheckConfig()).passed
    quick = clip(hand("right", "left", "right", touches="object", contact=0.0), thing="cup")
    assert not any("cm" in text for text in wordings("#C C moves the cup", quick, distances=True))


def test_language_models_are_told_what_two_hands_do() -> None:
    held = {"touches": "object", "contact": 0.0}
    both = clip(hand("right", "up", **held, regrasps=(1.0,)), hand("left", "up", **held), thing="pot")
    lines = "\n".join(describe(replace(both, pair=PairFacts("parallel", "left", True, None))))
    assert "both hands hold the pot" in lines
    assert "the two hands move the same way" in lines
    assert "the left hand steadies what it holds" in lines
    assert "lets go of it in between and takes it again" in lines
    handed = describe(replace(both, pair=replace(_TOGETHER, handed_to="left")))
    assert "the pot goes from the right hand to the left hand" in handed
