"""Manually labelled captions: which words change places when the picture is mirrored."""

import csv
import hashlib
import json
import re
from pathlib import Path

import pytest

from egohod.data.table import swap_sides

CAPTIONS = json.loads((Path(__file__).parent / "side_captions.json").read_text(encoding="utf-8"))
WORD = re.compile(r"\b(?:left|right)\b|\b(?:counter|anti)?-?clockwise\b", re.IGNORECASE)
OPPOSITE = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}


@pytest.mark.parametrize(("text", "mirrored"), CAPTIONS["written"])
def test_written_captions(text: str, mirrored: str) -> None:
    assert swap_sides(text) == mirrored
    if "anticlockwise" not in text:
        assert swap_sides(mirrored) == text


@pytest.fixture(scope="module")
def narrations(shared: Path) -> list[dict[str, str]]:
    path = shared / "annotations" / "egoexolearn" / "association_exo_train.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def labelled(text: str, unchanged: list[int]) -> str:
    """The mirrored caption by the label: all words that may be sides change, but those with these numbers."""
    numbers = iter(range(100))
    return WORD.sub(lambda m: m.group() if next(numbers) in unchanged else _opposite(m.group()), text)


def _opposite(word: str) -> str:
    other = OPPOSITE[word.lower()]
    return other.capitalize() if word[0].isupper() else other


def test_at_least_99_percent_of_150_captions_are_right(narrations: list[dict[str, str]]) -> None:
    right = [swap_sides(text) == mirrored for text, mirrored in CAPTIONS["written"]]
    for entry in CAPTIONS["egoexolearn"]:
        text = narrations[entry["row"]][entry["column"]]
        assert hashlib.sha256(text.encode()).hexdigest().startswith(entry["sha256"]), entry
        assert len(WORD.findall(text)) == entry["words"]
        right.append(swap_sides(text) == labelled(text, entry["unchanged"]))
    assert len(right) >= 150
    assert sum(right) >= 0.99 * len(right), [i for i, fine in enumerate(right) if not fine]


def test_mirroring_twice_is_the_identity_on_all_narrations(narrations: list[dict[str, str]]) -> None:
    assert len(narrations) == 6270
    changed = 0
    for row in narrations:
        for column in ("narration_en", "narration_en_hand_prompt", "narration_en_no_hand_prompt"):
            mirrored = swap_sides(row[column])
            assert swap_sides(mirrored) == row[column]
            changed += mirrored != row[column]
    assert changed > 10_000
