"""Opposite captions by rule: the demo's exactly, written ones, and those that must have none."""

from collections.abc import Iterator

import pytest

from egohod.data.opposites import opposite
from egohod.demo.world import VAGUE, VERBS, phrase

WRITTEN = [
    ("opens the door", "closes the door"),
    ("#C C opened the tap with her right hand", "#C C closed the tap with her right hand"),
    ("opening the fridge", "closing the fridge"),
    ("open drawer and take spoon", "close drawer and put down spoon"),
    ("#C C picks up the cup from the table", "#C C puts down the cup on the table"),
    ("#C C picks a knife from the drawer with his left hand", "#C C puts a knife in the drawer with his left hand"),
    ("puts the cup down on the shelf", "picks the cup up from the shelf"),
    ("put plate in cupboard", "take plate from cupboard"),
    ("take milk out of fridge", "put milk in fridge"),
    ("Take a spoon in your right hand", "Put down a spoon with your right hand"),
    ("turns the tap on", "turns the tap off"),
    ("switch off kettle", "switch on kettle"),
    ("pour water into the pan", "pour water out of the pan"),
    ("pours the milk from the jug into a cup", "pours the milk from a cup into the jug"),
    ("adds the salt, the sugar, and the oil to the pot", "removes the salt, the sugar, and the oil from the pot"),
    ("inserts the key in the lock", "removes the key from the lock"),
    ("#C C lifts the lid off the pot", "#C C lowers the lid in the pot"),
    ("screws the cap onto the bottle", "unscrews the cap from the bottle"),
    ("wraps the bread in foil", "unwraps the bread in foil"),
    ("unfolds the towel", "folds the towel"),
    ("covers the pot with a lid", "uncovers the pot with a lid"),
    ("attaches the hose to the tap", "detaches the hose from the tap"),
    ("locks the door", "unlocks the door"),
    ("zips up the bag", "unzips the bag"),
    ("pushes the drawer in", "pulls the drawer out"),
    ("moves the hand upwards", "moves the hand downwards"),
    ("walks towards the door", "walks away from the door"),
    ("turns left", "turns right"),
    ("moves the box from left to right", "moves the box from right to left"),
    (
        "moves the sponge, first to the left, then to the right",
        "moves the sponge, first to the right, then to the left",
    ),
    ("stirs the soup anticlockwise", "stirs the soup clockwise"),
    ("knocks on the table twice", "knocks on the table once"),
    ("washes the knife before cutting the onion", "washes the knife after cutting the onion"),
    ("Turn off the heat. Put down the pan.", "Turn on the heat. Pick up the pan."),
]
NONE = [
    "",
    "washes the plate",
    "holds the can opener",
    "holds the cup with the left hand",
    "the left hand rests on the right side of the pot",
    "eats the leftover rice",
    "stands close to the door",
    "keeps the door open",
    "looks at the open drawer",
    "cuts through the opening of the bag",
    "wipes the cover of the pot",
    "takes a look at the phone",
    "takes the pan to the sink",
    "shakes the bottle up and down",
    "opens and closes the door",
    "#C C picks up the cup and puts it on the table",
    "The meat, covered with foil, rests",
    "once the water boils, stirs the soup",
    "walks in the park",
    "throws the skin away",
]


def demo_pairs() -> Iterator[tuple[str, str | None]]:
    """Every wording of every verb with a hand, and that of its opposite."""
    for verb in VERBS.values():
        for noun in verb.nouns:
            for tail in (
                "{text} with the {hand} hand",
                "{text} with the {hand} hand, {detail}",
                "{text} with the {hand} hand, {detail}, while the right hand rests on the counter",
                "{text} with the {hand} hand while the left hand holds the jar still",
                "#C C uses the {hand} hand and {act}, {detail}; the right hand stays out of sight",
            ):
                texts = []
                for name in (verb.name, verb.opposite):
                    if name:
                        text, detail = phrase(name, f"red {noun}"), VERBS[name].detail
                        act = text.removeprefix("#C C ")
                        texts.append(tail.format(text=text, act=act, detail=detail, hand="left"))
                yield texts[0], texts[1] if verb.opposite else None


def test_every_pair_of_the_demo_is_exact() -> None:
    pairs = list(demo_pairs())
    assert len(pairs) > 500
    assert [(text, opposite(text)) for text, _ in pairs] == pairs
    for wording in (*VAGUE, *(verb.coarse for verb in VERBS.values())):
        # What names no direction has no opposite.
        assert opposite("#C C " + wording.format(o="the cup")) is None


@pytest.mark.parametrize(("text", "expected"), WRITTEN)
def test_written_captions(text: str, expected: str) -> None:
    assert opposite(text) == expected


@pytest.mark.parametrize("text", NONE)
def test_captions_without_an_opposite(text: str) -> None:
    assert opposite(text) is None
