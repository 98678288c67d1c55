"""The vocabulary of the check: what each section does, a user's own file, and what is refused of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from egohod.errors import UserError
from egohod.hod.check import check, claims, clauses, compare_words, extract_words, sides
from egohod.hod.config import CheckConfig
from egohod.hod.vocabulary import load_vocabulary
from tests.hod.hod_facts import WIPE


def passes(source: str, caption: str) -> bool:
    return compare_words(caption, source, None, "")[0] == []


# --- The packaged vocabulary: each section by an example ---


@pytest.mark.parametrize(
    ("source", "caption", "expected"),
    [
        # verbs and things: synonyms, and lemmas of irregular forms
        ("Put the pan on the stove", "Place the pot on the stove", True),
        ("Put the pan on the stove", "Wash the pan on the stove", False),
        ("Scatter the chilies into the pot", "Scatter the chili into the pot", True),
        # different_verbs: two that share a group with a third
        ("Use the spoon to eat the rice", "Pull the spoon to eat the rice", False),
        ("Put the tube into the rack", "Insert the tube into the rack", False),
        # phrases
        ("Stir the tea", "Moves the spoon around in circles in the tea", True),
        ("Cover the pot with the lid", "Puts the lid on the pot", True),
        ("Cut the chili open", "Cuts the chili", True),
        # light, plain: handling and supporting verbs come and go
        ("Hold the knife and cut the tofu", "Cuts the tofu with the knife", True),
        ("Cut the tofu", "Starts to cut the tofu", True),
        # implied_verbs: a step that a tool or an action implies, where no action of the source is missing
        ("Put a spoonful of salt into the pot", "Scoops a spoonful of salt and puts it into the pot", True),
        ("Shake the box", "Shakes the box and scoops from it", False),
        ("Shake the tofu", "Shakes the tofu to separate it", True),
        ("Wash the tofu", "Washes the tofu to separate it", False),
        # perfect: what was done before is no action
        ("Put the scallions into the pot", "Puts the scallions that have been cut into the pot", True),
        ("Put the scallions into the pot", "Cuts the scallions and puts them into the pot", False),
        # tools, tools_of_actions
        ("Cut the tofu", "Cuts the tofu with a knife", True),
        ("Cut the tofu", "Cuts the tofu with a spoon", False),
        # generic: words for many things, where nothing is missing; else they are no word for the thing
        ("Put the tofu into the pot", "Puts the tofu, an ingredient, into the pot", True),
        ("Slice the tofu in the pot", "Slices the mixture in the pot", False),
        # shapes and kinds: free beside a thing, things themselves in the place of one
        ("Cut the tofu into slices", "Cuts the white tofu into cubes", True),
        ("Cut the tofu", "Cuts the white", False),
        # of_places: a tool and a place do not replace one another
        ("Stir the tofu with a spoon", "Stirs the tofu in the pan", True),
        ("Stir the tofu with a spoon", "Stirs the tofu with a pan", False),
        # adjective_endings
        ("Cut the tofu with a knife", "Cuts the regrettable tofu", True),
        # negations
        ("Cut the tofu", "Does not cut the tofu", False),
        ("Cut the tofu", "Doesn't cut the tofu", False),
        ("Do not cut the tofu", "Cuts the tofu", False),
        ("Cut the tofu", "Avoids cutting the tofu", False),
        ("Stir the tofu without letting it burn", "Stirs the tofu so that it does not burn", True),
        ("Stir until no water is left", "Stirs until water cannot be seen", True),
        ("Cut the tofu", "Cuts the tofu while the left hand does not move", True),
        # function_words
        ("Wash the cup", "Carefully washes all of the cup now", True),
    ],
)
def test_a_section_has_its_effect(source: str, caption: str, expected: bool) -> None:
    assert passes(source, caption) == expected


def test_an_action_may_be_left_out_beside_another() -> None:
    assert passes("Stir and separate the tofu", "Stirs the tofu")
    assert not passes("Stir the tofu", "Takes the tofu")
    # It is not left out but replaced.
    assert not passes("Stir and separate the tofu", "Stirs and peels the tofu")


def test_what_follows_the_spoon_of_a_hand_is_no_verb() -> None:
    assert extract_words("Pours it into the right hand's spoon").verbs == ("pour",)
    assert "spoon" in extract_words("Pours it into the right hand's spoon").things


# --- A user's own ---


def own(folder: Path, text: str, name: str = "my.yml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_users_words_are_added(tmp_path: Path) -> None:
    path = own(
        tmp_path,
        """
version: garage-1
verbs: |
  torque tighten
things: |
  spanner torquewrench
different_things: |
  pan pot
tools_of_actions:
  torquewrench: torque
implied_verbs:
  torque: torquewrench
lemmas:
  torqued: torque
phrases:
  'torque[- ]wrench(?:es)?': torquewrench
claims:
  - {what: still, pattern: 'rock[- ]solid'}
  - {what: [contact, still], pattern: '{firmly} clamp(?:s|ing)?'}
hands:
  other: free(?= hand)
talk:
  - '\\bpretty please\\b'
orders:
  - '\\bdo as i say\\b'
breaks:
  - '\\bwhereupon\\b'
means:
  - 'by means of the {side} hand\\b'
negations:
  - hardly
pieces:
  very: '(?:{their})?very '
  firmly: '(?:{very})?firmly'
""",
    )
    vocabulary = load_vocabulary(path)
    assert vocabulary.version.endswith("+garage-1")

    def reasons(caption: str, source: str) -> list[str]:
        return compare_words(caption, source, None, "", vocabulary)[0]

    assert reasons("Tightens the bolt with the torque-wrench", "Torqued the bolt with the spanner") == []
    assert not passes("Torqued the bolt with the spanner", "Tightens the bolt with the torque-wrench")
    assert reasons("Places the pot on the rack", "Puts the pan on the rack") != []
    assert passes("Puts the pan on the rack", "Places the pot on the rack")
    # The packaged words are still there.
    assert reasons("Grabs the cup", "Takes the mug") == []
    assert [each.what for each in claims("the hand is rock-solid", vocabulary)] == ["still"]
    assert claims("the hand is rock-solid") == []
    assert [each.what for each in claims("it very firmly clamps the rod", vocabulary)] == ["contact", "still"]
    assert sides("the left hand pushes while the free hand pulls", vocabulary) == ("left", "right")
    assert len(clauses("it stops whereupon it goes", vocabulary)) == 2
    assert reasons("Hardly moves the cup", "Moves the cup") == ["negation: hardly for none of the source"]
    settings = CheckConfig(vocabulary=path)
    for text in ("pretty please", "do as I say"):
        caption = f"#C C moves the sponge with the right hand, {text}"
        assert any("prompt" in each for each in check(caption, "#C C moves the sponge", WIPE, settings).reasons)
        assert not any(
            "prompt" in each for each in check(caption, "#C C moves the sponge", WIPE, CheckConfig()).reasons
        )
    caption = "#C C moves the sponge by means of the left hand"
    assert any(each.startswith("side") for each in check(caption, "#C C moves the sponge", WIPE, settings).reasons)


def test_patterns_that_are_quick_are_no_danger(tmp_path: Path) -> None:
    """Alternatives that begin differently, repeats of one thing, and a piece with alternatives counts as one."""
    text = "version: 1\npieces: {soft: gently|softly}\ntalk: ['(?:ab|cd|ef)+g', 'x{soft}y', '\\w+ \\w+']\n"
    talk = load_vocabulary(own(tmp_path, text)).talk
    assert talk.fullmatch("abefcdg")
    assert talk.fullmatch("xsoftlyy")
    assert not talk.fullmatch("xgently")


def test_a_users_words_replace_a_section(tmp_path: Path) -> None:
    path = own(tmp_path, "version: 1\nreplace: [verbs]\nverbs: |\n  weld solder\n")
    vocabulary = load_vocabulary(path)
    assert "stir" not in vocabulary.verbs
    assert "pan" in vocabulary.things
    assert compare_words("Solders the wire", "Welds the wire", None, "", vocabulary)[0] == []


def test_the_identity_changes_with_the_words_and_not_with_comments(tmp_path: Path) -> None:
    text = "version: 1\nthings: |\n  spanner torquewrench\n"
    first = load_vocabulary(own(tmp_path, text, "1.yml")).identity
    assert first == load_vocabulary(own(tmp_path, f"# A garage\n{text}", "2.yml")).identity
    assert first != load_vocabulary(own(tmp_path, text + "  chock\n", "3.yml")).identity
    assert first != load_vocabulary(own(tmp_path, text.replace("1", "2"), "4.yml")).identity
    assert first != load_vocabulary().identity


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nthing: |\n  cup mug\n", ("'thing'", "did you mean 'things'")),
        ("things: |\n  cup mug\n", ("version",)),
        ("version: one two\n", ("version",)),
        ("- cup\n", ("mapping of sections",)),
        ("version: 1\nversion: 2\n", ("duplicate key 'version'",)),
        ("version: 1\nthings: [cup, mug]\n", ("things", "must be text")),
        ("version: 1\nthings: ''\n", ("things", "not empty")),
        ("version: 1\nthings:\n", ("things", "must be text")),
        ("version: 1\nthings: |\n  cup mug\n\n  pan pot\n", ("things, line 2", "needs words")),
        ("version: 1\nthings: |\n  cup Mug\n", ("things, line 1", "'Mug'")),
        ("version: 1\nshapes: 'cube 3d'\n", ("shapes", "'3d'")),
        ("version: 1\ndifferent_things: |\n  cup\n", ("different_things, line 1", "differs from")),
        ("version: 1\ntools_of_actions: spoon\n", ("tools_of_actions", "mapping")),
        ("version: 1\ntools_of_actions: {spoon: [stir]}\n", ("tools_of_actions: spoon", "needs words")),
        ("version: 1\nimplied_verbs: {}\n", ("implied_verbs", "not empty")),
        ("version: 1\nimplied_verbs: {two words: stir}\n", ("implied_verbs: two words", "needs one word")),
        ("version: 1\nlemmas: {knives: knife blade}\n", ("lemmas: knives", "needs one word")),
        ("version: 1\nphrases: {'(': x}\n", ("phrases", "does not compile")),
        ("version: 1\nphrases: {'a?': x}\n", ("phrases", "matches empty text")),
        ("version: 1\nphrases: {'(a)b': x}\n", ("phrases", "captures")),
        ("version: 1\nphrases: {'ab': {c: d}}\n", ("phrases", "needs words")),
        ("version: 1\ntalk: ['(?:a+)+b']\n", ("talk", "may take for ever")),
        ("version: 1\ntalk: ['(?:a|ab)*c']\n", ("talk", "may take for ever")),
        ("version: 1\ntalk: ['(?:a{0,30}){2,30}c']\n", ("talk", "may take for ever")),
        ("version: 1\ntalk: ['(?=(?:a*b)*)c']\n", ("talk", "may take for ever")),
        ("version: 1\ntalk: ['a*b*c*d*e']\n", ("talk", "may take for ever")),
        (f"version: 1\ntalk: ['{'a?' * 30}{'a' * 30}']\n", ("talk", "may take for ever")),
        (f"version: 1\ntalk: ['{'(?:aa|a)' * 30}b']\n", ("talk", "may take for ever")),
        (f"version: 1\ntalk: ['{'a{0,300}' * 5}b']\n", ("talk", "may take for ever")),
        ("version: 1\ntalk: ['(?:(?i:A)|aa){1,30}b']\n", ("talk", "may take for ever")),
        (f"version: 1\ntalk: ['(?!{'a?' * 30}{'a' * 30})b']\n", ("talk", "may take for ever")),
        (f"version: 1\npieces: {{x: '{'a?' * 9}'}}\nphrases: {{'{{x}}{{x}}{{x}}b': c}}\n", ("phrases", "for ever")),
        ("version: 1\ntalk: ['(?i)abc']\n", ("talk", "does not compile: global flags")),
        ("version: 1\nmeans: ['by hand']\n", ("means", "needs {side}")),
        ("version: 1\nmeans: [null]\n", ("means", "needs {side}")),
        ("version: 1\ntalk: [{a: null}]\n", ("talk", "must be text")),
        ("version: 1\nmeans: ['(?:by the {side} hand|manually)']\n", ("means", "may be absent")),
        ("version: 1\nmeans: ['{side} or \\1']\n", ("means", "refers to one")),
        ("version: 1\nhands: {side: mine}\n", ("hands: side", "needs {side}")),
        (f"version: 1\ntalk: ['{'a' * 401}']\n", ("talk", "401 characters")),
        ("version: 1\ntalk: [[a]]\n", ("talk", "must be text")),
        ("version: 1\ntalk: a\n", ("talk", "must be a list")),
        ("version: 1\ntalk: ['{their}{no_such}']\n", ("talk", "no_such")),
        ("version: 1\nmeans: ['{side} or {side}']\n", ("means", "more than once")),
        ("version: 1\nhands: {both: two hands}\n", ("hands", "'both'")),
        ("version: 1\nhands: {side: '{side}('}\n", ("hands: side", "does not compile")),
        ("version: 1\nclaims: [{what: sideways, pattern: a}]\n", ("claims", "'sideways'")),
        ("version: 1\nclaims: [{what: [up, sideways], pattern: a}]\n", ("claims", "'sideways'")),
        ("version: 1\nclaims: [{what: [], pattern: a}]\n", ("claims", "'[]'")),
        ("version: 1\nclaims: [{what: up}]\n", ("claims", "what and pattern")),
        (
            f"version: 1\npieces: {{a: {'a' * 300}, b: '{{a}}{{a}}{{a}}', c: '{{b}}{{b}}{{b}}'}}\n",
            ("pieces: c", "more than 2000"),
        ),
        ("version: 1\nclaims: [{what: up, pattern: 'to {side}'}]\n", ("claims", "{side}")),
        ("version: 1\nclaims: [{what: side, pattern: over}]\n", ("claims", "{side}")),
        ("version: 1\npieces: {go: '(?:a+)+'}\n", ("pieces: go", "may take for ever")),
        ("version: 1\nreplace: [verbs]\n", ("replace", "'verbs'")),
        ("version: 1\nreplace: [[verbs]]\n", ("replace", "verbs")),
        ("version: 1\nreplace: verbs\n", ("replace", "list")),
        ("version: 1\nreplace: [pieces]\npieces: {x: y}\n", ("hands", "'their', which does not exist")),
        ("version: 1\nthings: *cup\n", ("cup",)),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = own(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_vocabulary(path)
    message = str(caught.value)
    assert path in message
    assert all(each in message for each in words), message
    assert "\n" not in message


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check\.vocabulary: .*no\.yml: No such file"):
        load_vocabulary(str(tmp_path / "no.yml"))
