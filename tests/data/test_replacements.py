"""Captions with another verb by rule: the demo's exactly, written ones; and verbs and nouns; and all in samples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_files import encode

from egohod.data.config import SourceConfig
from egohod.data.dataset import MOST_TAGS, ClipDataset, Tokenizer, collate, tag_number
from egohod.data.formats import read_clips
from egohod.data.replacements import Verbs, false_verbs, parse, verb_and_nouns
from egohod.demo.world import VERBS, phrase

TOKENIZER = Tokenizer()
DEMO = [
    f"{phrase(verb.name, f'red {noun}')} with the left hand, while the right hand rests on the counter"
    for verb in VERBS.values()
    for noun in verb.nouns
]
PARSED = [
    ("#C C picks up the red cup from the table", ["take"], ["cup", "table"]),
    ("takes cups", ["take"], ["cup"]),
    ("turn oven light on", ["turn on"], ["light"]),
    ("put in fridge", ["put"], ["fridge"]),
    ("#C C uses the left hand and slides the jar to the left; the right hand rests on the box", ["slide to the left"],
     ["jar"]),
    ("The left hand opens the lid of the pot, while the right hand holds the pan", ["open"], ["lid", "pot"]),
    ("walks away", ["walk away"], []),
    ("In the left hand is a plate", [], []),
    ("", [], []),
    ("...", [], []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "verbs", "nouns"), PARSED)
def test_verb_and_nouns_of_a_caption(text: str, verbs: list[str], nouns: list[str]) -> None:
    assert verb_and_nouns(text) == (verbs, nouns)


def test_the_demo_is_read_exactly() -> None:
    read = {(name, noun): verb_and_nouns(phrase(name, f"red {noun}")) for name in VERBS for noun in VERBS[name].nouns}
    # One name for each verb, and no other verb has it.
    names = {name: {verbs[0] for (verb, _), (verbs, _) in read.items() if verb == name} for name in VERBS}
    assert all(len(each) == 1 for each in names.values())
    assert len(set.union(*names.values())) == len(VERBS)
    assert all(nouns == [noun] for (_, noun), (_, nouns) in read.items())


def test_every_verb_of_the_demo_is_replaced_by_all_others() -> None:
    verbs, rng = Verbs(DEMO), np.random.default_rng(0)
    assert len(verbs) == len(VERBS)
    tail = " with the left hand, while the right hand rests on the counter"
    for verb in VERBS.values():
        text = phrase(verb.name, "red box") + tail
        others = {phrase(name, "red box") + tail for name in VERBS if name != verb.name}
        assert set(verbs.replace(text, 100, rng)) == others
        assert len(verbs.replace(text, 3, rng)) == 3


def test_form_case_and_objects_stay_and_verbs_that_may_be_true_are_left_out() -> None:
    captions = [
        "Open the jar", "Take the jar", "Lift the jar", "Wash the jar", "Walk away", "opens the jar", "shakes the jar",
        "Use the jar", "Rinse it", "Hold the jar still",
    ] * 2  # fmt: skip
    verbs, rng = Verbs(captions), np.random.default_rng(0)
    assert set(verbs.replace("Pick up the cup", 9, rng)) == {
        "Open the cup", "Wash the cup", "Rinse the cup", "Hold the cup still"
    }  # fmt: skip
    assert verbs.replace("#C C closes the box", 9, rng)
    assert set(verbs.replace("washes the pan with soap", 9, rng)) == {
        "opens the pan with soap",
        "shakes the pan with soap",
    }
    assert verbs.replace("Walk away", 9, rng) == []
    # A verb that occurs once may be a misspelling.
    assert len(Verbs(["opnes the jar", "opens the jar", "opens the box"])) == 1


def test_verbs_that_captions_have_with_the_same_object_come_first() -> None:
    captions = ["open tap", "close tap", "cut onion", "peel onion", "eats onion", "takes pan", "lid", "wash onion"] * 3
    verbs = Verbs([*captions, "wash tap"])
    for seed in range(5):
        drawn = verbs.replace("wash the onion", 9, np.random.default_rng(seed))
        # In any order, and the others behind them; once with the tap is a mistake.
        assert {*drawn[:2]} == {"cut the onion", "peel the onion"}
        assert {*drawn[2:]} == {"open the onion", "close the onion"}
        assert verbs.replace("open tap", 9, np.random.default_rng(seed))[0] == "close tap"
    # The same draw, and nothing but it, decides among the first ones.
    first = {verbs.replace("wash the onion", 1, np.random.default_rng(seed))[0] for seed in range(20)}
    assert first == {"cut the onion", "peel the onion"}


@pytest.mark.parametrize(
    ("caption", "left_out"),
    [
        ("holds the cup", {"takes", "puts", "presses"}),
        ("shakes the cup into the pot", {"takes"}),
        ("shakes the cup in the right hand", {"puts"}),
        ("opens the drawer", {"pulls", "takes", "puts"}),
        ("pulls the drawer", {"opens"}),
        ("opens the cup", set()),
    ],
)
def test_verbs_that_do_not_fit_or_may_be_true_are_left_out(caption: str, left_out: set[str]) -> None:
    names = ["takes", "puts", "presses", "shakes", "opens", "pulls", "washes"]
    verbs = Verbs([f"{verb} the jar" for verb in names] * 2)
    own = caption.split()[0]
    drawn = {text.split()[0] for text in verbs.replace(caption, 9, np.random.default_rng(0))}
    assert drawn == {*names} - left_out - {own}


def test_answers_of_a_language_model_become_captions() -> None:
    answer = "closes; picks up; takes\n shakes; a phrase of many words; "
    assert false_verbs("#C C lifts the jar", answer, 9) == ["#C C closes the jar", "#C C shakes the jar"]
    assert false_verbs("#C C lifts the jar", answer, 1) == ["#C C closes the jar"]
    assert false_verbs("...", answer, 9) == []


def dataset(folder: Path, **options: Any) -> ClipDataset:
    if not (folder / "clips.csv").exists():
        encode(folder / "videos" / "v.mp4", 40)
        rows = [
            '''opens the jar,open,"['jar', 'lid']","['cuts the jar', 'eats the jar']"''',
            'slides the cup to the left,slide left,cup,',
            'shakes the jar,shake,"[3, 12]",',
            '"[\'opens the jar\', \'shakes the jar\']",open,jar,"[\'cuts the jar\']"',
        ]  # fmt: skip
        lines = [
            "video_id,start_second,end_second,text,verb,noun,wrong",
            *(f"v,{start},2,{row}" for start in (0, 0.1) for row in rows),
        ]
        (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    columns = {key: options.pop(key) for key in ("tag_columns", "replacement_column") if key in options}
    source = SourceConfig(metadata=str(folder / "clips.csv"), root=str(folder / "videos"), **columns)
    extra = ["verb", "noun", "wrong"]
    chosen: dict[str, Any] = {"size": 32, "num_frames": 4, "tokenizer": TOKENIZER, "train": True, "replacements": 4}
    return ClipDataset([(read_clips(source, extra=extra), source)], **chosen | options)


def test_a_sample_has_the_tokens_of_its_replacements(tmp_path: Path) -> None:
    clips = dataset(tmp_path, opposites=True)
    view = clips.view((0, 0))
    # The opposite first; there are two other verbs with an object, and room for four.
    assert view.negatives[0] == "closes the jar"
    assert {*view.negatives[1:]} == {"slides the jar to the left", "shakes the jar", None}
    assert view.negatives[3:] == (None, None)
    sample, plain = clips[0, 0], dataset(tmp_path, replacements=0)[0, 0]
    assert sample["has_negative"].tolist() == [True, True, True, False, False]
    assert torch.equal(sample["negatives"][:3], TOKENIZER([str(text) for text in view.negatives[:3]]))
    # Whatever is requested beside them, pixels and captions are the same.
    assert torch.equal(sample["video"], plain["video"])
    assert torch.equal(sample["tokens"], plain["tokens"])
    assert torch.equal(sample["negatives"], clips[0, 0]["negatives"])
    orders = {clips.view((epoch, 1)).negatives[1] for epoch in range(9)}
    assert orders == {"opens the cup", "shakes the cup"}
    batch = collate([clips[0, i] for i in range(3)])
    assert batch["negatives"].shape == (3, 5, batch["tokens"].shape[1])


def test_a_mirrored_clip_has_mirrored_replacements_and_tags(tmp_path: Path) -> None:
    view = dataset(tmp_path, flip=1.0, tags=True).view((0, 1))
    assert (view.text, view.tags) == ("slides the cup to the right", (("slide to the right",), ("cup",)))
    others = {text for text in dataset(tmp_path, flip=1.0).view((0, 0)).negatives if text}
    assert others == {"slides the jar to the right", "shakes the jar"}
    assert dataset(tmp_path, flip=1.0, tags=True, tag_columns=["verb", "noun"]).view((0, 1)).tags == (
        ("slide right",),
        ("cup",),
    )


def test_columns_give_replacements_and_tags(tmp_path: Path) -> None:
    clips = dataset(tmp_path, tags=True, tag_columns=["verb", "noun"], replacement_column="wrong")
    assert {*clips.view((0, 0)).negatives} == {"cuts the jar", "eats the jar", None}
    assert clips.view((0, 1)).negatives == (None,) * 4
    # Of several narrations a column does not say whose it is.
    assert {*clips.view((0, 3)).negatives} >= {"slides the jar to the left"}
    assert [clips.view((0, i)).tags for i in (0, 2)] == [(("open",), ("jar", "lid")), (("shake",), ("3", "12"))]
    labels = clips[0, 0]["labels"]
    assert labels["noun_tags"].tolist() == [tag_number("jar"), tag_number("lid"), *[0] * (MOST_TAGS - 2)]
    assert labels["verb_tags"][0] == tag_number("Open")
    assert collate([clips[0, i] for i in range(3)])["labels"]["noun_tags"].shape == (3, MOST_TAGS)


def test_parsing_never_fails() -> None:
    rng = np.random.default_rng(0)
    words = re.split(
        r" (?!the left)", "#C C the uses left hand and to the left up away . , ; opens jar's é 12 of slides"
    )
    verbs = Verbs(DEMO)
    for _ in range(3000):
        text = " ".join(rng.choice(words, rng.integers(0, 12)))
        parse(text)
        assert all(other != text for other in verbs.replace(text, 3, rng))
