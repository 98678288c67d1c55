"""tools/probe_order.py: its numbers on features whose answers are known, and the tool as a user meets it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import probe_order
import pytest
import torch
from evaluation_cases import random_features
from torch.nn.functional import normalize

from egohod.model.config import GEOMETRIES, geometry
from tests.model.field_files import (
    open_clip_state,
    openai_state,
    upstream_state,
    write_archive,
    write_avion,
    write_safetensors,
    write_upstream,
)
from tests.support import Command, ShortRun

CAPTIONS = "#C C opens the box", "#C C closes the box", "#C C pulls the cup closer", "#C C holds the cup still"


def features(motion: float) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Captions, opposites and clips of 40 directions: what is moved, and along a further axis the direction."""
    nouns = random_features(40, seed=1)
    axis = torch.zeros(16)
    axis[3] = motion
    texts, opposites = normalize(nouns + axis, dim=1), normalize(nouns - axis, dim=1)
    videos = {"plain": texts, "reverse": opposites, "shuffle": normalize(nouns, dim=1)}
    return texts, opposites, videos


def test_a_model_that_reads_direction_turns_round_and_a_blind_one_does_not() -> None:
    captions = [f"caption {i}" for i in range(40)]
    texts, opposites, videos = features(1.0)
    seeing = probe_order.summary(probe_order.measure(texts, opposites, videos, captions))
    shares = {name: each["value"] for name, each in seeing["shares"].items()}
    assert (shares["plain"], shares["reverse"], shares["turned"]) == (100.0, 0.0, 100.0)
    assert seeing["distances"]["text_opposite"] > 0.5
    # The same clip in every order: whatever the words prefer, nothing turns round.
    blind = probe_order.summary(probe_order.measure(texts, opposites, dict.fromkeys(videos, texts), captions))
    assert blind["shares"]["turned"]["value"] == 0.0
    assert blind["shares"]["plain"]["value"] == blind["shares"]["reverse"]["value"] == 100.0
    assert blind["distances"]["video_reverse"] == pytest.approx(0, abs=1e-6)


def test_a_blind_text_tower_shows_in_the_distance_of_its_captions() -> None:
    texts, opposites, _ = features(0.01)
    measured = probe_order.measure(texts, opposites, {}, [f"caption {i}" for i in range(40)])
    assert sorted(measured) == ["text_opposite", "text_other"]
    summary = probe_order.summary(measured)
    expected = float((1 - (texts * opposites).sum(dim=1)).mean() / (1 - np.nanmean(measured["text_other"])))
    assert summary["distances"]["text_opposite"] == pytest.approx(expected, rel=1e-3)
    assert expected < 0.01
    assert summary["shares"] == {}


def test_equal_captions_are_no_reference() -> None:
    texts, opposites, _ = features(1.0)
    measured = probe_order.measure(texts, opposites, {}, ["the same"] * 40)
    assert np.isnan(measured["text_other"]).all()
    assert probe_order.summary(measured)["distances"] == {}


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "order.json").read_text())


def test_captions_alone(short_run: ShortRun, tmp_path: Path, inside: Command) -> None:
    (tmp_path / "captions.csv").write_text("\n".join(["caption", *CAPTIONS]) + "\n")
    done = inside(
        "probe_order.py", short_run.folder, "--metadata", tmp_path / "captions.csv", "--output", tmp_path / "order"
    )
    assert done.returncode == 0, done.stderr
    assert "3 clips have a caption with an opposite (4 inspected)" in done.stdout
    assert "a caption and its opposite: mean cosine" in done.stdout
    results = results_of(tmp_path / "order")
    assert [row["caption"] for row in results["rows"]] == [*CAPTIONS[:3]]
    assert results["rows"][0]["opposite"] == CAPTIONS[1]
    assert results["rows"][0]["text_opposite"] == pytest.approx(results["rows"][1]["text_opposite"], abs=1e-5)
    assert results["shares"] == {}
    page = (tmp_path / "order" / "order.html").read_text()
    assert 'id="text"' in page
    assert 'id="margin"' not in page


def test_with_videos_every_number_is_on_a_page_that_fetches_nothing(
    short_run: ShortRun, world: Path, tmp_path: Path, inside: Command
) -> None:
    command = [short_run.folder, "--metadata", world / "hod.csv", "--root", world / "videos", "--by", "motion_kind"]
    done = inside("probe_order.py", *command, "--output", tmp_path / "order", "data.workers=0")
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "order")
    assert results["clips"] == len(results["rows"]) > 5
    assert results["frames"] == 5, "those of the checkpoint"
    assert set(results["groups"]) == {"state_changing", "transient"}
    for part in (results["groups"], results["by_distance"]):
        assert sum(each["distributions"]["text_opposite"]["count"] for each in part.values()) == results["clips"]
    margins = np.array([row["margin_plain"] for row in results["rows"]])
    assert results["shares"]["plain"]["value"] == pytest.approx(100 * (margins > 0).mean())
    page = (tmp_path / "order" / "order.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert results["checkpoint"]["sha256"] in page
    for each in results["shares"].values():
        assert f"{each['value']:.1f} % ({each['interval'][0]:.1f} to {each['interval'][1]:.1f}" in page
    assert all(row["opposite"] in page for row in results["rows"])


def test_frames_averaged_by_an_outside_model_never_turn_round(
    tiny_outside: str, world: Path, tmp_path: Path, inside: Command
) -> None:
    command = [tiny_outside, "--metadata", world / "hod.csv", "--root", world / "videos", "--limit", 6]
    done = inside("probe_order.py", *command, "--output", tmp_path / "order", "data.workers=0", "model.num_frames=4")
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "order")
    assert results["model"] == tiny_outside
    assert results["clips"] == 6
    assert results["shares"]["turned"]["value"] == 0.0
    assert results["distances"]["video_reverse"] == pytest.approx(0, abs=1e-5)
    assert "no sign that the model reads the direction of motion" in done.stdout


def test_opposites_of_a_column_and_clips_that_are_missing(
    short_run: ShortRun, world: Path, tmp_path: Path, inside: Command
) -> None:
    with (world / "hod.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        row["other"] = f"the opposite of {i}" if i < 4 else ""
    rows[3]["video_id"] = "gone"
    with (tmp_path / "hod.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    command = [short_run.folder, "--metadata", tmp_path / "hod.csv", "--root", world / "videos", "data.workers=0"]
    command += ["--opposite_column", "other", "--output", tmp_path / "order"]
    done = inside("probe_order.py", *command)
    assert done.returncode == 2
    assert "gone" in done.stderr
    assert "--allow_missing" in done.stderr
    assert inside("probe_order.py", *command, "--allow_missing").returncode == 0
    results = results_of(tmp_path / "order")
    assert [row["opposite"] for row in results["rows"]] == [f"the opposite of {i}" for i in range(3)]
    assert (results["clips"], results["clips_left_out"], results["opposites"]) == (3, 1, "column other")


def test_opposites_that_are_not_those_of_the_caption_are_left_out(
    short_run: ShortRun, tmp_path: Path, inside: Command
) -> None:
    long = " ".join(["word"] * 90)
    rows = [
        ("takes the cup", "puts the cup"),
        # The gap may be the first caption's: the model learned nothing from it, and is not measured on it.
        ("['holds the cup', 'opens the box']", "['', 'closes the box']"),
        ("['opens the jar', 'holds the cup']", "['closes the jar', 'drops the cup']"),
        # The model reads 77 tokens.
        (f"{long} opens", f"{long} closes"),
    ]
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "other"), *rows])
    command = [short_run.folder, "--opposite_column", "other", "--output", tmp_path / "order", "--metadata"]
    done = inside("probe_order.py", *command, tmp_path / "captions.csv")
    assert done.returncode == 0, done.stderr
    captions = [(row["caption"], row["opposite"]) for row in results_of(tmp_path / "order")["rows"]]
    assert captions == [("takes the cup", "puts the cup"), ("opens the jar", "closes the jar")]
    assert "1 more are cut by the model before the word that differs" in done.stdout
    (tmp_path / "long.csv").write_text(f"text,other\n{long} opens,{long} closes\n")
    done = inside("probe_order.py", *command, tmp_path / "long.csv")
    assert done.returncode == 2
    assert "long.csv: the model reads too little of each caption" in done.stderr


def test_a_text_tower_with_one_vector_for_all_has_no_distances(
    tiny_outside: str, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(model: object, texts: list[str], *_: object) -> torch.Tensor:
        return normalize(torch.ones(len(texts), 16), dim=1)

    monkeypatch.setattr(probe_order, "embed_texts", blind)
    (tmp_path / "captions.csv").write_text("\n".join(["caption,verb", *(f"{each},v" for each in CAPTIONS)]) + "\n")
    command = [tiny_outside, "--metadata", tmp_path / "captions.csv", "--by", "verb", "--output", tmp_path / "order"]
    done = inside("probe_order.py", *command)
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "order")
    assert results["by_distance"] == {}
    assert results["distances"]["text_opposite"] is None
    page = (tmp_path / "order" / "order.html").read_text()
    assert "By verb" in page
    assert "In percent of the distance" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--metadata", "still.csv"],
            "still.csv: none of 1 captions has an opposite; --opposite_column names a column",
        ),
        (["--metadata", "nowhere.csv"], "nowhere.csv: no such annotation file"),
        (["--metadata", "good.csv", "--opposite_column", "other"], "column 'other' is missing"),
        (["--metadata", "hod.csv", "--by", "verbs"], "hod.csv: no column 'verbs' (did you mean 'verb'?)"),
        (["--metadata", "good.csv", "--limit", "-1"], "--limit must be at least 0"),
        (["--metadata", "good.csv", "--root", "videos"], "good.csv: no column 'video_id'"),
    ],
)
def test_a_mistake_is_one_clear_line(
    short_run: ShortRun, world: Path, tmp_path: Path, inside: Command, options: list[str], message: str
) -> None:
    (tmp_path / "still.csv").write_text(f"text\n{CAPTIONS[3]}\n")
    (tmp_path / "good.csv").write_text(f"text\n{CAPTIONS[0]}\n")
    shutil.copy(world / "hod.csv", tmp_path)
    options = [str(tmp_path / each) if each.endswith((".csv", "videos")) else each for each in options]
    done = inside("probe_order.py", short_run.folder, *options, "--output", tmp_path / "order")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in done.stderr


RELEASED: dict[str, Callable[[Path], Path]] = {
    "OpenAI CLIP": lambda path: write_archive(path, openai_state(geometry("DEMO"))),
    "open_clip": lambda path: write_safetensors(path, open_clip_state(geometry("DEMO"))),
    "upstream EgoHOD": lambda path: write_upstream(path, upstream_state("b16_flash")),
    "upstream EgoVideo": lambda path: write_upstream(path, upstream_state("slowfast_b16_flash")),
    "AVION": lambda path: write_avion(path, upstream_state("b16_flash")),
}


@pytest.mark.parametrize("family", RELEASED)
def test_every_family_of_checkpoints_is_probed(
    family: str, world: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks deep, with random weights: that each is read and embedded, not what it knows."""
    for name in ("CLIP_VITB16", "CLIP_VITB16_Slowfast"):
        monkeypatch.setitem(GEOMETRIES, name, replace(geometry(name), vision_layers=2, text_layers=2))
    settings = ["model.name=CLIP_VITB16", "model.num_frames=4"]
    if family in ("OpenAI CLIP", "open_clip"):
        settings = ["model.name=DEMO", "model.num_frames=4", "model.weights.source=clip"]
        settings += ["model.weights.projections=keep", "model.weights.adapt=true"]
    elif family == "upstream EgoVideo":
        settings = ["model.name=CLIP_VITB16_Slowfast", "model.num_frames=16", "model.fast.position=after"]
    weights = RELEASED[family](tmp_path / "weights.pt")
    command = [weights, "--metadata", world / "hod.csv", "--root", world / "videos", "--limit", 1]
    done = inside("probe_order.py", *command, "--output", tmp_path / "order", "data.workers=0", *settings)
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "order")
    assert results["clips"] == 1
    assert set(results["shares"]) == {"plain", "reverse", "shuffle", "turned"}
    assert all(np.isfinite(row["margin_plain"]) for row in results["rows"])
