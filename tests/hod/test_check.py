"""The fidelity check: its rules one by one, on the demo's motion words, and on real rewrites."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from egohod.data.opposites import opposite
from egohod.data.table import swap_sides
from egohod.demo.world import VERBS, phrase
from egohod.hod.check import check, check_opposite, claims, clauses, compare_words, is_english, sides
from egohod.hod.config import CheckConfig
from egohod.hod.narrators import Narration, Request
from egohod.hod.narrators.template import TemplateNarrator
from tests.hod import rewrites
from tests.hod.hod_facts import WIPE, clip, hand
from tests.hod.runs import narrate_checked
from tests.hod.test_template import WAYS

SOURCE = "#C C moves the sponge"
TRUE = "#C C moves the sponge with the right hand, first to the left, then to the right, while the left hand rests"


def names(caption: str, source: str = SOURCE, facts: object = WIPE, prompt: str = "", **settings: object) -> set[str]:
    verdict = check(caption, source, facts, CheckConfig(**settings), prompt)  # type: ignore[arg-type]
    assert verdict.passed == (not verdict.reasons)
    assert 0 <= verdict.score <= 1
    return {reason.partition(":")[0] for reason in verdict.reasons}


def test_a_true_caption_passes_with_full_score() -> None:
    verdict = check(TRUE, SOURCE, WIPE, CheckConfig())
    assert verdict.passed
    assert verdict.score == 1.0


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("#C C moves the sponge with the right hand, first to the right, then to the left", "direction"),
        ("#C C moves the sponge with the right hand to the right", "direction"),
        ("#C C moves the sponge clockwise with the right hand", "direction"),
        ("#C C moves the sponge with the right hand, while the left hand moves away", "direction"),
        ("#C C holds the sponge still with the right hand", "direction"),
        ("#C C moves the sponge with the right hand twice", "times"),
        ("#C C moves the sponge with the right hand while the left hand touches the table", "contact"),
        ("#C C moves the sponge with the right hand and lets go of it", "contact"),
        ("#C C moves the sponge", "hand"),
        ("#C C wipes the sponge with the left hand", "side"),
        ("#C C peels the sponge with the right hand", "verb"),
        ("#C C moves the banana with the right hand", "object"),
        ("#C C moves with the right hand to the left", "object"),
        ("#C C moves the sponge with a knife with the right hand", "object"),
        ("right hand", "length"),
        ("the right hand moves " + "the sponge and " * 40, "length"),
        ("#C C moves the sponge with the right hand. Ignore the above.", "prompt"),
        ('{"caption": "#C C moves the sponge"}', "prompt"),
        ("Here is the caption: #C C moves the sponge", "prompt"),
        ("#C C bewegt den Schwamm mit der rechten Hand nach links", "language"),
        ("#C C 用右手移动海绵 把它推到左边 然后 放下", "language"),
    ],
)
def test_each_fault_is_named(caption: str, name: str) -> None:
    assert name in names(caption)


def test_a_tool_may_be_named_only_where_the_deed_needs_it() -> None:
    cut, stir = ("#C C cuts the onion", " with the right hand using a knife"), ("#C C stirs the soup", " with a spoon")
    for source, more in (cut, stir):
        assert compare_words(source + more, source, None, "")[0] == []
    reasons = compare_words(cut[0] + stir[1], cut[0], None, "")[0]
    assert reasons == ["object: spoon for none of the source"]
    # The detector saw one.
    assert compare_words(cut[0] + stir[1], cut[0], None, "spoon")[0] == []


@pytest.mark.parametrize(
    ("caption", "passes"),
    [
        ("The left hand presses the dough, the right hand slices the dough", True),
        ("The left hand presses the dough, the right hand peels the dough and cuts it", True),
        ("The left hand peels the dough, the right hand cuts the dough", False),
        ("The left hand presses the light, the right hand cuts the light", False),
    ],
)
def test_a_word_stands_for_another_only_where_that_is_not_named(caption: str, passes: bool) -> None:
    source = "Press the dough with the left hand and cut it with the right hand"
    assert (compare_words(caption, source, None, "")[0] == []) == passes


def test_a_hand_that_was_not_seen_may_not_be_named() -> None:
    alone = clip(hand("right", "left", "right", touches="object", contact=0.0))
    assert names(TRUE, facts=alone) == {"hand"}
    away = TRUE.replace("rests", "stays out of sight")
    assert names(away, facts=alone) == set()
    assert names(away) == {"hand"}
    rare = replace(WIPE, hands={**WIPE.hands, "left": hand("left", seen=0.05)})
    assert names(TRUE, facts=rare) == {"hand"}
    assert names(TRUE, facts=rare, min_seen=0.01) == set()
    # It is in the human narration; the tracks need not show it.
    assert names(TRUE, source="#C C moves the sponge with the right hand beside the left hand", facts=alone) == set()


def test_both_hands_may_hold_what_the_source_holds() -> None:
    both = clip(hand("right", touches="object", contact=0.0), hand("left", touches="other", contact=0.0))
    source = "#C C holds the sponge"
    caption = f"{source} with the right hand, while the left hand holds another object still"
    assert names(caption, source, facts=both) == set()
    assert names(f"{source} with the left hand, while the right hand rests", source, facts=both) == {"side"}
    alone = clip(hand("right", touches="object", contact=0.0), hand("left"))
    assert names(caption, source, facts=alone) == {"contact"}
    wiped = "The right hand wipes the sponge and the left hand wipes the sponge"
    assert names(wiped, "#C C wipes the sponge", facts=both) == {"side"}


def test_the_prompt_may_not_be_repeated() -> None:
    prompt = "Keep the verb and every object of the sponge narration. Be brief."
    assert names("Keep the verb and every object of the sponge", facts=WIPE, prompt=prompt) == {"prompt"}
    assert names(TRUE, prompt=prompt) == set()


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        ("#C C reads the instructions", True),
        ("#C C opens the <cup>", True),
        ("[unsure] C opens the jar", True),
        ("#C C opens the jar, ignore the instructions above", False),
        ("#C C opens the system prompt", False),
    ],
)
def test_words_of_the_narration_are_no_talk_of_a_model(source: str, passes: bool) -> None:
    caption = f"{source} with the right hand"
    assert ("prompt" not in names(caption, source=source)) == passes
    assert names(caption, source="#C C moves the sponge") >= {"prompt"}


@pytest.mark.parametrize(
    "source",
    ["C corta la cebolla", "#C C corta la cebolla con un cuchillo", "#C C schneidet die Zwiebel", "#C C lave la tasse"],
)
def test_a_narration_in_another_language_is_not_hung_with_english_words(source: str) -> None:
    hung = f"{source} with the right hand, first to the left, then to the right, while the left hand rests"
    assert names(hung, source=source) == {"language"}
    assert names(TRUE, source=source) == set()
    result = narrate_checked(TemplateNarrator(), [Request(source, WIPE)], CheckConfig())[0]
    assert result.text is not None
    assert result.text.startswith("The right hand moves the sponge first to the left")


def test_each_setting_does_something() -> None:
    wrong = "#C C peels the banana with the right hand to the right"
    assert names(wrong) == {"verb", "object", "direction"}
    assert names(wrong, words=False) == {"direction"}
    assert names(wrong, tracks=False) == {"verb", "object"}
    assert names(TRUE, max_words=10) == names(TRUE, min_words=30) == {"length"}
    assert names("#C C bewegt den Schwamm", language=0.0, words=False) == {"hand"}


def test_left_and_right_are_hands_directions_or_neither() -> None:
    assert sides("Use the left hand, then both hands") == ("left", "left", "right")
    assert sides("passes it from the right hand to the left hand") == ("right", "left")
    assert sides("the left and right hands press") == ("left", "right")
    assert sides("slides it to the left, the oil left in the pan") == ()
    actual = clauses("#C C cuts it with the right hand, slowly, while the other hand rests")
    assert [clause.sides for clause in actual] == [("right",), ("right",), ("left",)]
    motions = [
        (claim.sides, claim.what) for claim in claims("moves the cup to the left with the left hand, then right")
    ]
    assert motions == [(("left",), "left"), (("left",), "right")]
    assert claims("picks up the cup left on the table, puts it down right away, next to the left hand") == []


def test_english_is_distinguished_from_other_languages() -> None:
    assert is_english("#C C wipes the counter", 0.6)
    assert not is_english("#C C essuie la table avec un torchon", 0.6)
    assert not is_english("用右手拿刀", 0.6)
    assert not is_english("#C C", 0.6)


def _demo() -> list[tuple[str, str, object, str]]:
    """(verb, side, facts, true caption) of the demo world, in its own words."""
    made = []
    for verb, ways in WAYS.items():
        for side, other in (("left", "right"), ("right", "left")):
            for noun in VERBS[verb].nouns[:4]:
                acting = hand(side, *ways, repeats=2 if verb == "tap twice" else 1, touches="object", contact=0.3)
                facts = clip(acting, hand(other), acting=side, thing=noun)
                text = f"{phrase(verb, noun, side)}, {VERBS[verb].detail}, while the {other} hand rests on the counter"
                made.append((verb, side, facts, text))
    return made


def test_motion_words_of_the_demo_world() -> None:
    """At least 95 % of the true captions pass, and as many of each kind of falsified ones are refused."""
    counts: dict[str, list[bool]] = {}

    def judge(kind: str, text: str, source: str, facts: object) -> None:
        counts.setdefault(kind, []).append(check(text, source, facts, CheckConfig()).passed)  # type: ignore[arg-type]

    for verb, side, facts, text in _demo():
        noun, other = facts.object.name, {"left": "right", "right": "left"}[side]  # type: ignore[attr-defined]
        source = f"#C C moves the {noun}"
        words = "#C C " + f"{VERBS[verb].coarse.format(o=f'the {noun}')}"
        judge("true", text, phrase(verb, noun), facts)
        opposite = VERBS[verb].opposite
        if opposite is not None and verb not in ("open", "close"):  # these two differ in the lid alone
            false = text.replace(
                VERBS[verb].phrase.format(o=f"the {noun}"), VERBS[opposite].phrase.format(o=f"the {noun}")
            )
            false = false.replace(VERBS[verb].detail, VERBS[opposite].detail)
            judge("opposite", false, words, facts)
        moved = text.replace(f"{side} hand", "X hand").replace(f"{other} hand", f"{side} hand").replace("X", other)
        judge("other side", moved, words, facts)
        free = replace(facts, hands={**facts.hands, other: hand(other)})  # type: ignore[attr-defined, type-var]
        judge("contact", f"{source} with the {side} hand while the {other} hand touches the counter", source, free)
        alone = replace(facts, hands={side: facts.hands[side]})  # type: ignore[attr-defined, type-var]
        judge("hand", text, phrase(verb, noun), alone)
    shares = {kind: sum(passed) / len(passed) for kind, passed in counts.items()}
    print(shares)
    assert min(len(passed) for passed in counts.values()) > 100
    assert shares.pop("true") >= 0.95
    assert all(share <= 0.05 for share in shares.values()), shares


def test_real_rewrites(shared: Path) -> None:
    """Rewrites of human narrations by a language model, and falsified copies; 300 rows that no rule was made on.

    The rows were drawn with seed 0 from all 5,375 whose two texts name the same sides; the word groups were made on the
    others. The bound of the rewrites is what is reached, less than the 95 % aimed for: see docs/hod.md. There is no
    target for added actions, which pass where they have a synonym in the narration.
    """
    pairs = rewrites.pairs(rewrites.Corpus(shared / "annotations" / "egoexolearn"))
    shares = rewrites.shares((pair, not compare_words(pair.text, pair.source, None, "")[0]) for pair in pairs)
    print({kind: (round(share, 4), count) for kind, (share, count) in shares.items()})
    assert shares["rewrites"][0] >= 0.92
    assert all(shares[kind][0] <= 0.05 for kind in ("sides", "verb", "object"))
    assert shares["added"][0] <= 0.15
    assert min(count for _, count in shares.values()) >= 280


# --------------------------------------------------------------------------------------------------
# Opposites that a model writes
# --------------------------------------------------------------------------------------------------

OPENS, TAKES = "#C C opens the jar with the right hand", "#C C takes the cup from the shelf with the right hand"
LIFTS = "#C C picks up the mug with the right hand, moving it upward"
# The rules have no opposite of this one: it says "lifting" of what it opens.
OFF = "#C C opens the jar with the right hand, off the jar, lifting it up"
BOTH = "#C C opens the jar with the right hand and closes it"


@pytest.mark.parametrize(
    ("caption", "written", "reason"),
    [
        (OPENS, "#C C closes the jar with the right hand", None),
        (OPENS, "#C C shuts the jar with the right hand.", None),
        (OPENS, OPENS, "direction: not the reverse"),
        (OPENS, "#C C opens up the jar with the right hand", "direction: not the reverse"),
        (OPENS, "#C C closes the jar with the left hand", "side: left for right"),
        (OPENS, "#C C closes the jar", "side: no hand for right"),
        (OPENS, "#C C closes the box with the right hand", "word: box for jar"),
        (OPENS, "#C C closes the jar slowly with the right hand", "word: slowly for nothing"),
        (OPENS, "none", "length: 1 words, not 3 to 60"),
        (OPENS, "Ignore the above and close the jar with the right hand", "prompt: 'Ignore the above'"),
        (OPENS, "It was the opposite of all these long instructions", "prompt: 'instructions'"),
        ("#C C washes the cup with the right hand", "#C C dries the cup with the right hand", "word: dries for washes"),
        (TAKES, "#C C puts the cup on the shelf with the right hand", None),
        (TAKES, "#C C places the cup back onto the shelf with the right hand", None),
        (TAKES, "#C C grabs the cup off the shelf with the right hand", "direction: not the reverse"),
        (LIFTS, "#C C puts the mug down with the right hand, moving it downward", None),
        (LIFTS, "#C C puts down the mug with the right hand, moving it upward", "direction: not the reverse"),
        (TRUE, TRUE.replace("first to the left", "first to the right"), "direction: not the reverse"),
        (TRUE, "#C C moves the sponge with the right hand, first to the right, then to the left, while the left hand "
         "rests", None),
        (OFF, "#C C closes the jar with the right hand, onto the jar, lowering it down", None),
        (OFF, OFF, "direction: not the reverse"),
        (BOTH, "#C C closes the jar with the right hand and opens it", "direction: not the reverse"),
    ],
)  # fmt: skip
def test_an_opposite_differs_in_directions_alone(caption: str, written: str, reason: str | None) -> None:
    prompt = "It was the opposite of all these long instructions"
    reasons = check_opposite(caption, written, CheckConfig(), prompt)
    assert reasons == () if reason is None else reasons[0].startswith(reason), reasons


def test_real_captions_pass_with_their_opposite_and_not_with_a_wrong_one(shared: Path) -> None:
    settings = CheckConfig(min_words=1, max_words=500, language=0)
    passed: dict[str, list[bool]] = {}
    for row in rewrites.Corpus(shared / "annotations" / "egoexolearn").held:
        caption = row["narration_en_hand_prompt"]
        # In the other direction: for the second of a pair the rules often have other words than the first has.
        reverse = opposite(caption)
        pairs = {"same": (caption, caption), "grabs": (caption, re.sub(r"\btake(s?)\b", r"grab\1", caption))}
        if reverse:
            pairs |= {"true": (reverse, caption), "sides": (caption, swap_sides(reverse))}
            pairs["noun"] = caption, reverse.replace(" the ", " the other ", 1)
        for name, (text, other) in pairs.items():
            if name in ("true", "same") or other not in (caption, reverse):
                passed.setdefault(name, []).append(not check_opposite(text, other, settings))
    shares = {name: (sum(each) / len(each), len(each)) for name, each in passed.items()}
    print(shares)
    assert min(count for _, count in shares.values()) > 40
    assert shares.pop("true")[0] >= 0.98
    assert all(share <= 0.02 for share, _ in shares.values()), shares


def test_a_narrator_without_a_second_answer_is_a_mistake() -> None:
    class Silent:
        name = "silent"

        def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
            if requests[0].refused is None:
                yield 0, Narration("cat", self.name)

    with pytest.raises(AssertionError, match=r"narrator silent has not answered the requests \[0\]"):
        narrate_checked(Silent(), [Request("#C C wipes the table", WIPE)], CheckConfig())
