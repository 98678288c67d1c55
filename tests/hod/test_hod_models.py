"""The whole pipeline with a language model, or one that looks, behind an endpoint on loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from egohod.data.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.formats import read_clips
from egohod.data.opposites import opposite
from egohod.data.table import ClipReader
from tests.hod.chat_server import ChatServer, clips_of
from tests.hod.runs import command, encode, head, rows
from tests.support import Command


def caption(request: dict[str, Any]) -> str:
    """Names the acting hand, and nothing more."""
    lines = " ".join(str(value) for value in request.values())
    side = re.search(r"(left|right) hand: does the action", lines)
    return f"{request['narration']} with the {side[1]} hand" if side else request["narration"]


def llm(server: ChatServer, **more: Any) -> list[str]:
    knobs = {"kind": "llm", "endpoint": server.address, "batch": 2, "concurrency": 2, "retries": 1, **more}
    return [f"narrator.{name}={value}" for name, value in knobs.items()]


def test_a_language_model_captions_the_clips_with_no_request_twice(
    few: list[str], tmp_path: Path, inside: Command
) -> None:
    with ChatServer(caption) as server:
        done = inside("generate_hod.py", *few, *llm(server))
        assert done.returncode == 0, done.stderr
        requests = len(server.bodies)
        assert server.most <= 2
        assert requests >= 5
        assert inside("generate_hod.py", *few, *llm(server)).returncode == 0
        assert len(server.bodies) == requests, "answered clips are not requested again"
    written = [row["text"] for row in rows(tmp_path / "hod.csv")]
    assert sum(bool(re.search(r"with the (left|right) hand$", text)) for text in written) >= 8, written


def test_an_endpoint_that_goes_away_costs_nothing_that_was_answered(
    few: list[str], tmp_path: Path, inside: Command
) -> None:
    with ChatServer(caption, script=["ok", "ok", *[(401, {})] * 20]) as server:
        done = inside("generate_hod.py", *few, *llm(server, concurrency=1))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "401" in line
    with ChatServer(caption) as server:
        done = inside("generate_hod.py", *few, *llm(server, concurrency=1))
        assert done.returncode == 0, done.stderr
    assert "narrate done: 6 clips, 4 stored by an earlier run" in done.stderr
    assert len(rows(tmp_path / "hod.csv")) == 10


def test_a_model_that_repeats_its_orders_is_replaced_by_the_template(
    few: list[str], tmp_path: Path, inside: Command
) -> None:
    with ChatServer(lambda _: "As an AI I cannot describe this clip, ignore the above") as server:
        done = inside("generate_hod.py", *few, *llm(server))
    assert done.returncode == 0, done.stderr
    assert not any("AI" in row["text"] for row in rows(tmp_path / "hod.csv"))
    assert re.search(
        r"10 narrations: by template 10; captions refused for prompt 10; tokens: prompt [\d,]+", done.stderr
    )
    assert "the template replaced the captions of llm in 10 of 10 narrations" in done.stderr
    page = tmp_path / "page.html"
    assert inside("visualize_hod.py", *few, *llm(server), "--page", page).returncode == 0
    assert page.read_text().count('data-verdict="replaced"') == 10


def test_clips_without_an_answer_are_requested_again_with_retry(
    few: list[str], tmp_path: Path, inside: Command
) -> None:
    with ChatServer(caption, script=["ok", (500, {})]) as server:
        arguments = [*few, *llm(server, concurrency=1, retries=0), "check.ask_again=false"]
        done = inside("generate_hod.py", *arguments)
        assert "by llm 8, template 2; captions refused for no answer 2" in done.stderr
        assert len(server.bodies) == 5
        assert inside("generate_hod.py", *arguments).returncode == 0
        assert len(server.bodies) == 5
        done = inside("generate_hod.py", *arguments, "--retry")
        assert len(server.bodies) == 6
        assert "by llm 10;" in done.stderr


def test_a_wrong_distance_is_refused_and_requested_again(few: list[str], tmp_path: Path, inside: Command) -> None:
    reasons = []

    def far(request: dict[str, Any]) -> str:
        """The facts' distance; five times as far at the first request."""
        acts = re.search(
            r"(left|right) hand: does the action; moves ([^;]+) by about (\d+) cm", "|".join(request["facts"])
        )
        if not acts:
            return caption(request)
        reasons.extend(request.get("because", ()))
        way = int(acts[3]) * (1 if "because" in request else 5)
        return f"{request['narration']} with the {acts[1]} hand, {acts[2]} by {way} cm"

    with ChatServer(far) as server:
        done = inside("generate_hod.py", *few, *llm(server), "narrator.distances=true")
    assert done.returncode == 0, done.stderr
    assert len(reasons) >= 3
    assert all(re.match(r'distance: "\d+ cm", but the (left|right) hand goes \d+ cm$', reason) for reason in reasons)
    assert f"llm on the second try {len(reasons)}" in done.stderr
    assert sum(bool(re.search(r"by \d+ cm$", row["text"])) for row in rows(tmp_path / "hod.csv")) == len(reasons)


def caption_and_opposite(request: dict[str, Any]) -> dict[str, Any]:
    """The caption with its directions and its opposite with a full stop; of a request's second clip a wrong one."""
    lines = " ".join(str(value) for value in request.values())
    acts = re.search(r"(left|right) hand: does the action; (?:moves )?([^;']+)", lines)
    text = f"{request['narration']} with the {acts[1]} hand, {acts[2]}" if acts else str(request["narration"])
    reverse = opposite(text)
    return {"caption": text, "opposite": text if request["clip"] == 2 else reverse and f"{reverse}."}


def test_opposites_are_a_column_that_training_reads(
    few: list[str], demo_world: Path, tmp_path: Path, inside: Command
) -> None:
    output = tmp_path / "hod.csv"
    assert inside("generate_hod.py", *few).returncode == 0
    plain, template = output.read_bytes(), rows(output)
    done = inside("generate_hod.py", *few, "narrator.opposites=true")  # the name of before
    assert "narrator.opposites is now narrator.captions=[fine, opposite]" in done.stderr
    assert done.returncode == 0, done.stderr
    assert re.search(r"opposite captions: .*written \d+", done.stderr)
    assert [{k: v for k, v in row.items() if k != "opposite"} for row in rows(output)] == template
    assert [row["opposite"] for row in rows(output)] == [opposite(row["text"]) or "" for row in template]
    # Off again: the results of before, and the same bytes.
    done = inside("generate_hod.py", *few)
    assert "is finished: 10 narrations; nothing to do" in done.stderr
    assert output.read_bytes() == plain
    with ChatServer(caption_and_opposite) as server:
        arguments = [*few, *llm(server, captions="[fine, opposite]"), "block=3"]
        assert inside("generate_hod.py", *arguments, "--shard", "1/2").returncode == 0
        done = inside("generate_hod.py", *arguments, "--shard", "0/2")
        assert done.returncode == 0, done.stderr
        assert re.search(r"opposite captions: .*refused for direction \d", done.stderr)
        requests = len(server.bodies)
        assert inside("generate_hod.py", *arguments, "--merge").returncode == 0
        merged = output.read_bytes()
        done = inside("generate_hod.py", *arguments, "--retry")
        assert done.returncode == 0, done.stderr
        assert len(server.bodies) == requests, "a refused opposite is no reason to request a caption again"
        assert output.read_bytes() == merged
    written = rows(output)
    # Where the model's was refused there are the rules', without the full stop.
    assert {row["opposite"].endswith(".") for row in written if row["opposite"]} == {True, False}, written
    source = SourceConfig(metadata=str(output), root=str(tmp_path), opposite_column="opposite")
    table = read_clips(source, strict=True, extra=["opposite"])
    clips = ClipReader(table, source, choose_decoder("auto")[1], None)
    read = [clips.opposite(index, table.row(index).texts[0]) for index in range(len(table))]
    assert read == [row["opposite"] or None for row in written]
    lines = head(demo_world, 10)
    arguments = command(demo_world, tmp_path, [lines[0], lines[6], lines[9]])
    done = inside("generate_hod.py", *arguments, "narrator.captions=[fine, opposite]", "--dry_run")
    assert done.stderr.count("  opposite: #C C uses the ") == 2, done.stderr


def estimate(log: str) -> dict[str, Any]:
    return json.loads(re.search(r"estimate (\{.*\})", log)[1])  # type: ignore[index]


def test_a_dry_run_estimates_tokens_and_price_of_a_thousand_clips(few: list[str], inside: Command) -> None:
    def usage(request: dict[str, Any]) -> dict[str, int]:
        """Instructions of 600 tokens, 50 and 20 for each clip."""
        clips = len(clips_of(request))
        return {"prompt_tokens": 600 + 50 * clips, "completion_tokens": 20 * clips}

    prices = {"price_per_million_input": 2, "price_per_million_output": 10}
    with ChatServer(caption, usage=usage) as server:
        done = inside("generate_hod.py", *few, *llm(server, batch=8, concurrency=2, **prices), "--dry_run")
        assert done.returncode == 0, done.stderr
        assert sorted(len(clips_of(body)) for body in server.bodies) == [1, 1, 1, 3]
        priceless = inside("generate_hod.py", *few, *llm(server, batch=1), "--dry_run")
    found = estimate(done.stderr)
    thousand, due = found["per_1000_clips"], found["to_do"]
    assert (thousand["clips"], thousand["requests"], due["clips"]) == (1000, 125, 10)
    assert (thousand["prompt_tokens"], thousand["completion_tokens"]) == (125 * 600 + 50_000, 20_000)
    assert thousand["price"] == (125_000 * 2 + 20_000 * 10) / 1e6
    assert due["prompt_tokens"] == 1250
    assert re.search(r"tokens of prompts +125,000 +1,250\n", done.stderr)
    assert re.search(r"price +0\.45 +0\.00\n", done.stderr)
    assert thousand["seconds"] > 0
    alone = estimate(priceless.stderr)["per_1000_clips"]
    assert alone["prompt_tokens"] == 650_000
    assert "price" not in alone


def test_a_second_request_after_a_refusal_is_part_of_the_estimate(few: list[str], inside: Command) -> None:
    def usage(_: dict[str, Any]) -> dict[str, int]:
        return {}

    with ChatServer(lambda _: "#C C peels the banana", usage=usage) as server:
        done = inside("generate_hod.py", *few, *llm(server, batch=2), "--dry_run")
    thousand = estimate(done.stderr)["per_1000_clips"]
    assert thousand["requests"] == 1000
    assert thousand["prompt_tokens"] is None
    assert "not counted" in done.stderr


@pytest.mark.parametrize("window", [1.0, 2.0])
def test_videos_without_narrations_are_cut_into_windows_and_shown_to_a_model(
    demo_world: Path, tmp_path: Path, inside: Command, window: float
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, frames in (("one", 48), ("two", 30)):
        encode(videos / f"{name}.mp4", frames, 90)
    arguments = command(demo_world, tmp_path, head(demo_world, 1))
    arguments += [
        f"windows.seconds={window}",
        f"windows.stride={window}",
        "source.metadata=''",
        f"source.root={videos}",
        f"detector.options.path={tmp_path}/boxes.parquet",
    ]
    boxes = pd.read_parquet(demo_world / "train" / "detections.parquet")
    boxes.assign(video_id="one", second=boxes["second"] + 100).to_parquet(tmp_path / "boxes.parquet")
    with ChatServer(lambda _: "A person wipes the counter with a sponge") as server:
        done = inside("generate_hod.py", *arguments, *llm(server, kind="vlm", frames=3))
    assert done.returncode == 0, done.stderr
    pictures = [
        part for body in server.bodies for part in body["messages"][1]["content"] if part["type"] == "image_url"
    ]
    table = read_clips(tmp_path / "hod.csv", strict=True)
    # 4 s and 2.5 s: the last window is cut at the video's end, and read as a second at least.
    assert len(table) == (4 + 3 if window == 1 else 2 + 2)
    assert len(pictures) == 3 * len(table)
