"""Opposite captions by rule: the demo's exactly, written ones, and those that must have none; and in samples."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from video_files import encode

from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, Tokenizer, collate
from egohod.data.formats import read_clips
from egohod.data.formats.base import read_csv
from egohod.data.opposites import opposite
from egohod.data.table import swap_sides
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


# --------------------------------------------------------------------------------------------------
# In training samples
# --------------------------------------------------------------------------------------------------

TOKENIZER = Tokenizer()
CAPTIONS = {
    "opens the jar": "closes the jar",
    "slides the cup to the left with the left hand": "slides the cup to the right with the left hand",
    "washes the cup": None,
}


def dataset(folder: Path, column: str | None = None, list_text: str = "random", **options: Any) -> ClipDataset:
    """Clips of ``CAPTIONS``, the last with two narrations, and columns with other opposites."""
    if not (folder / "clips.csv").exists():
        encode(folder / "videos" / "v.mp4", 40)
        lists = ["""['opens the jar', 'wipes the pot']""", """['shuts the jar', 'dirties the pot']"""]
        rows = [(text, f"not {text}", "", text) for text in CAPTIONS]
        rows += [(*lists, "['only one']", "['opens the jar', 'dirties the pot']")]
        cells = ["video_id,start_second,end_second,text,reversed,partial,copied"]
        cells += ["v,0,2," + ",".join(f'"{cell}"' for cell in row) for row in rows]
        (folder / "clips.csv").write_text("\n".join(cells) + "\n")
    source = SourceConfig(
        metadata=str(folder / "clips.csv"), root=str(folder / "videos"), opposite_column=column, list_text=list_text
    )
    chosen: dict[str, Any] = {"size": 32, "num_frames": 4, "tokenizer": TOKENIZER, "train": True, "opposites": True}
    return ClipDataset([(read_clips(source), source)], **chosen | options)


def test_a_sample_has_the_tokens_of_its_opposite(tmp_path: Path) -> None:
    for index, (text, expected) in enumerate(CAPTIONS.items()):
        sample = dataset(tmp_path)[0, index]
        assert sample["has_negative"].tolist() == [expected is not None]
        assert torch.equal(sample["negatives"], TOKENIZER([expected or text]))
        plain = dataset(tmp_path, opposites=False)[0, index]
        assert set(sample) - set(plain) == {"negatives", "has_negative"}
        assert torch.equal(sample["video"], plain["video"])
        assert torch.equal(sample["tokens"], plain["tokens"])


def test_a_mirrored_clip_has_the_opposite_of_its_mirrored_caption(tmp_path: Path) -> None:
    view = dataset(tmp_path, flip=1.0).view((0, 1))
    assert view.text == "slides the cup to the right with the right hand"
    assert view.negatives == ("slides the cup to the left with the right hand",)
    given = dataset(tmp_path, "reversed", flip=1.0).view((0, 1))
    assert given.negatives == ("not slides the cup to the right with the right hand",)


def test_a_column_has_an_opposite_for_each_narration(tmp_path: Path) -> None:
    drawn = {
        (view.text, *view.negatives) for view in (dataset(tmp_path, "reversed", seed=s).view((0, 3)) for s in range(9))
    }
    assert drawn == {("opens the jar", "shuts the jar"), ("wipes the pot", "dirties the pot")}
    joined = dataset(tmp_path, "reversed", list_text="concat").view((0, 3))
    assert joined.negatives == ("shuts the jar. dirties the pot",)
    # A gap in the list does not say whose it is; an empty cell is none.
    assert [dataset(tmp_path, "partial").view((0, i)).negatives for i in (0, 3)] == [(None,), (None,)]
    # A copy is none, also of one narration in a list.
    assert dataset(tmp_path, "copied").view((0, 0)).negatives == (None,)
    views = [dataset(tmp_path, "copied", seed=seed).view((0, 3)) for seed in range(9)]
    assert {(view.text, *view.negatives) for view in views} == {
        ("opens the jar", None),
        ("wipes the pot", "dirties the pot"),
    }


def test_a_difference_beyond_the_last_token_counts_nothing(tmp_path: Path) -> None:
    long = " ".join(["washes the cup,"] * 40) + " opens the jar"
    assert opposite(long) == long.replace("opens", "closes")
    encode(tmp_path / "videos" / "v.mp4", 40)
    (tmp_path / "clips.csv").write_text(f'video_id,start_second,end_second,text\nv,0,2,"{long}"\n')
    assert not dataset(tmp_path)[0, 0]["has_negative"]


def test_captions_and_opposites_of_a_batch_have_one_length(tmp_path: Path) -> None:
    clips = dataset(tmp_path)
    batch = collate([clips[0, i] for i in range(3)])
    assert batch["tokens"].shape == (3, 16)
    assert batch["negatives"].shape == (3, 1, 16)
    assert batch["has_negative"].tolist() == [[True], [True], [False]]
    assert "negatives" not in collate([dataset(tmp_path, opposites=False)[0, i] for i in range(3)])


def test_mirroring_and_reversing_commute(shared: Path) -> None:
    path = shared / "annotations" / "egoexolearn" / "association_exo_train.csv"
    with path.open(encoding="utf-8", newline="") as file:
        captions = [row["narration_en"] for row in csv.DictReader(file)]
    pairs = [(text, reverse) for text in captions if (reverse := opposite(text))]
    wrong = [text for text, reverse in pairs if opposite(swap_sides(text)) != swap_sides(reverse)]
    assert len(wrong) <= 0.01 * len(pairs), wrong[:5]


def test_at_least_95_percent_of_100_labelled_pairs_are_right(shared: Path) -> None:
    """``tools/opposites.py --sample 50 --seed 0`` of two files; a rule that changes a pair needs its label again."""
    labels = json.loads((Path(__file__).parent / "opposite_captions.json").read_text())
    captions: dict[tuple[str, str], list[str]] = {}
    for label in labels:
        key = label["file"], label["column"]
        if key not in captions:
            captions[key] = [str(text) for text in read_csv(shared / "annotations" / key[0], ())[key[1]]]
        text = opposite(captions[key][label["row"] - 1]) or ""
        assert hashlib.sha256(text.encode()).hexdigest().startswith(label["sha256"]), (label, text)
    assert len(labels) == 100
    assert sum(label["right"] for label in labels) >= 95
