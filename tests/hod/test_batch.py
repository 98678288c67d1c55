"""The language model narrator by files of requests and answers, as vllm run-batch and OpenAI's Batch API have them."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.errors import UserError
from egohod.hod.config import NarratorConfig
from egohod.hod.narrators import Request
from egohod.hod.narrators.batch import BatchNarrator, request_line
from egohod.hod.narrators.llm import answer_schema
from tests.hod.chat_server import ChatServer, clips_of, run_batch, write_rows
from tests.hod.hod_facts import WIPE
from tests.hod.runs import command, head, rows
from tests.hod.test_judge import JudgingServer
from tests.support import ROOT, Command

Run = Callable[..., Any]
CAPTIONS = "narrator.captions=[fine, coarse, opposite]"


def caption(request: dict[str, Any]) -> dict[str, Any]:
    """Names the acting hand, but the wrong one for kettles until the caption is refused."""
    acts = re.search(r"(left|right) hand: does the action", " ".join(request["facts"]))
    side = acts[1] if acts else "right"
    if "kettle" in request["narration"] and "because" not in request:
        side = {"left": "right", "right": "left"}[side]
    return {
        "caption": f"{request['narration']} with the {side} hand",
        "coarse": request["narration"],
        "opposite": None,
    }


@pytest.fixture
def run(demo_world: Path, tmp_path: Path, inside: Command) -> Run:
    """generate_hod.py on ten clips, of which some are about a kettle, by a model of which no server runs."""
    clips = list(csv.DictReader(head(demo_world, 10)))
    lines = ["video_id,start_second,end_second,text"]
    for number, clip in enumerate(clips):
        text = re.sub(r"the .*", "the kettle", clip["text"]) if number in (1, 6, 7) else clip["text"]
        lines.append(f"{clip['video_id']},{clip['start_second']},{clip['end_second']},{text}")
    arguments = command(demo_world, tmp_path, lines)
    arguments += ["narrator.kind=llm", "narrator.model=m", "narrator.batch=4", CAPTIONS]
    arguments += ["narrator.endpoint=http://127.0.0.1:9/v1", "narrator.give_up_seconds=1e-6"]

    def generate(*more: object, code: int = 0) -> str:
        done = inside("generate_hod.py", *arguments, *more)
        assert done.returncode == code, done.stderr
        return done.stderr

    return generate


def requests_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_rounds_of_files_write_what_an_endpoint_does(run: Run, tmp_path: Path) -> None:
    with ChatServer(caption) as server:
        run(f"narrator.endpoint={server.address}", f"output={tmp_path}/online.csv")
    online = (tmp_path / "online.csv").read_bytes()
    output, files = tmp_path / "hod.csv", [tmp_path / f"{name}.jsonl" for name in ("r1", "a1", "r2", "a2")]

    log = run("--batch_requests", files[0])
    assert "track   done: 10 clips" in log
    assert not output.exists()
    first = requests_in(files[0])
    assert [len(clips_of(each["body"])) for each in first] == [4, 4, 2]
    assert all(each["body"]["model"] == "m" for each in first)
    schema = first[0]["body"]["response_format"]["json_schema"]["schema"]
    assert schema == answer_schema(["fine", "coarse", "opposite"])
    answers = run_batch(*files[:2], caption)
    write_rows(files[1], answers[::-1])  # services keep no order

    log = run("--batch_answers", files[1])
    assert re.search(r"3 captions are the template's.*--retry --batch_requests", log), log
    by_template = output.read_bytes()
    assert by_template != online
    assert "no request is due" in run("--batch_requests", files[2])
    assert not files[2].exists()

    run("--retry", "--batch_requests", files[2])
    (second,) = requests_in(files[2])
    assert [each["narration"][-6:] for each in clips_of(second["body"])] == ["kettle"] * 3
    assert all(each["because"] for each in clips_of(second["body"]))
    run_batch(*files[2:], caption)
    run("--batch_answers", files[3])
    assert output.read_bytes() == online
    # Once more, and the first answers again: nothing is worse for it.
    run("--batch_answers", files[1])
    run("--batch_answers", files[1], "--batch_answers", files[3])
    assert output.read_bytes() == online
    assert list(rows(output)[0])[-2:] == ["coarse", "opposite"]


def test_captions_that_the_judge_refuses_are_requested_again(run: Run, tmp_path: Path) -> None:
    def cautious(request: dict[str, Any]) -> dict[str, Any]:
        answer = caption(request)
        return answer | {"caption": answer["caption"] + " slowly" * ("because" in request)}

    def doubt(asked: dict[str, str]) -> dict[str, Any]:
        return {"entailed": "slowly" in asked["caption"], "reason": "too quick"}

    files = [tmp_path / f"{name}.jsonl" for name in ("r1", "a1", "r2", "a2")]
    with JudgingServer(doubt) as judge, ChatServer(cautious) as server:
        knobs = ("check.judge=endpoint", f"check.judge_endpoint={judge.address}", "narrator.give_up_seconds=9")
        run(f"narrator.endpoint={server.address}", f"output={tmp_path}/online.csv", *knobs)
        run("--batch_requests", files[0], *knobs)
        run_batch(*files[:2], cautious)
        assert "10 captions are the template's" in run("--batch_answers", files[1], *knobs)
        run("--retry", "--batch_requests", files[2], *knobs)
        reasons = [clip["because"] for each in requests_in(files[2]) for clip in clips_of(each["body"])]
        assert [any("too quick" in reason for reason in each) for each in reasons].count(True) == 7
        assert len(reasons) == 10
        run_batch(*files[2:], cautious)
        run("--batch_answers", files[3], *knobs)
        assert "no request is due" in run("--retry", "--batch_requests", tmp_path / "r3.jsonl", *knobs)
    assert (tmp_path / "hod.csv").read_bytes() == (tmp_path / "online.csv").read_bytes()


def test_shards_read_one_file_of_all_answers(run: Run, tmp_path: Path) -> None:
    with ChatServer(caption) as server:
        run(f"narrator.endpoint={server.address}", f"output={tmp_path}/online.csv", "check.ask_again=false")
    everything = []
    for shard in ("0/2", "1/2"):
        requests = tmp_path / f"r{shard[0]}.jsonl"
        run("--shard", shard, "--batch_requests", requests, "check.ask_again=false")
        everything += run_batch(requests, tmp_path / "a.jsonl", caption)
    write_rows(tmp_path / "a.jsonl", everything)
    for shard in ("0/2", "1/2"):
        log = run("--shard", shard, "--batch_answers", tmp_path / "a.jsonl", "check.ask_again=false")
        assert "answers to another shard: line" in log
        assert "template's" not in log
    run("--merge", "check.ask_again=false")
    assert (tmp_path / "hod.csv").read_bytes() == (tmp_path / "online.csv").read_bytes()


def test_answers_that_are_missing_or_failed_are_named_and_requested_again(run: Run, tmp_path: Path) -> None:
    requests, answers = tmp_path / "r.jsonl", tmp_path / "a.jsonl"
    run("--batch_requests", requests)
    whole = run_batch(requests, answers, caption)
    # The first request has failed, the second is whole, the third breaks off.
    failed = whole[0] | {"response": {"status_code": 400, "body": None}, "error": {"error": {"message": "too long"}}}
    foreign = whole[0] | {"custom_id": "request-17"}
    write_rows(answers, [failed, whole[1], whole[1], foreign, {"hello": 1}, whole[2]])
    answers.write_bytes(answers.read_bytes()[:-40])

    log = run("--batch_answers", answers, code=2)
    for part in (
        "1 of 6 lines: further answers to a request: line 3 (clip 4)",
        "1 of 6 lines: not of this program: line 4 (custom_id 'request-17')",
        "1 of 6 lines: without a custom_id: line 5",
        "1 of 6 lines: broken off at the end of the file: line 6",
        "1 of 3 requests have failed; the first: HTTP 400: too long",
        "error: " + f"{answers}: 2 of 10 clips have no answer, such as {tmp_path}/clips.csv: row 9; ",
    ):
        assert part in log, (part, log)
    assert not (tmp_path / "hod.csv").exists()
    # Those without an answer are due, those that failed with --retry.
    run("--batch_requests", tmp_path / "r2.jsonl")
    assert [each["custom_id"][12:] for each in requests_in(tmp_path / "r2.jsonl")] == ["-1-8x2"]
    run("--retry", "--batch_requests", tmp_path / "r3.jsonl")
    assert [each["custom_id"][12:] for each in requests_in(tmp_path / "r3.jsonl")][:2] == ["-1-0x4", "-1-8x2"]
    more = run_batch(tmp_path / "r3.jsonl", tmp_path / "a3.jsonl", caption)
    run("--batch_answers", tmp_path / "a3.jsonl")
    by_model = sum(bool(re.search(r"with the (left|right) hand$", row["text"])) for row in rows(tmp_path / "hod.csv"))
    assert by_model >= 8
    assert len(more) == 3


def test_frames_are_in_the_requests_and_not_needed_for_the_answers(run: Run, tmp_path: Path, demo_world: Path) -> None:
    requests, answers = tmp_path / "r.jsonl", tmp_path / "a.jsonl"
    run("narrator.kind=vlm", "narrator.frames=2", "--batch_requests", requests)
    content = requests_in(requests)[0]["body"]["messages"][1]["content"]
    assert sum(part["type"] == "image_url" for part in content) == 4 * 2
    run_batch(requests, answers, caption)
    (tmp_path / "none").mkdir()
    away = ["narrator.kind=vlm", "narrator.frames=2", f"source.root={tmp_path}/none"]
    run(*away, "--batch_answers", answers)
    assert len(rows(tmp_path / "hod.csv")) == 10


def test_training_reads_fine_and_coarse_captions(run: Run, tmp_path: Path) -> None:
    run("narrator.kind=template")
    output = tmp_path / "hod.csv"
    written = rows(output)
    assert all(row["coarse"] and len(row["coarse"]) < len(row["text"]) for row in written)
    coarse = read_clips(SourceConfig(metadata=str(output), columns={"text": "coarse"}), strict=True)
    assert [coarse.row(i).texts for i in range(10)] == [(row["coarse"],) for row in written]
    # The command of docs/hod.md.
    (line,) = re.findall(r'    python -c "(import pandas.*to_csv.*)"', (ROOT / "docs" / "hod.md").read_text())
    subprocess.run([sys.executable, "-c", line], cwd=tmp_path, check=True)
    both = read_clips(tmp_path / "both.csv", strict=True)
    assert [both.row(i).texts for i in range(10)] == [(row["text"], row["coarse"]) for row in written]


def test_answers_of_another_run_are_refused(run: Run, tmp_path: Path) -> None:
    requests, answers = tmp_path / "r.jsonl", tmp_path / "a.jsonl"
    run("--batch_requests", requests)
    assert "r.jsonl: exists; choose another file" in run("--batch_requests", requests, code=2)
    run_batch(requests, answers, caption)
    for other in ("narrator.temperature=0.1", "narrator.captions=[fine]", "check.min_seen=0.5"):
        log = run("--batch_answers", answers, other, code=2)
        assert re.search(r"error: .*a\.jsonl: line 1 is of another run \(custom_id '[0-9a-f]{12}-1-0x4'\)", log), log
    # What requests do not depend on.
    run("--batch_answers", answers, "narrator.concurrency=7", "check.max_words=50")


def bad(path: Path, kind: str, row: dict[str, Any]) -> str:
    """Write a file that is no file of answers; what the message says."""
    custom_id = row["custom_id"]
    contents: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "has no answer to a request of this run, in 0 lines"),
        "binary": (bytes(range(256)) * 30, "has no answer to a request of this run"),
        "deep": (b"[" * 200_000, "has no answer to a request of this run, in 1 lines"),
        "requests": (json.dumps({"custom_id": custom_id, "body": {}}).encode(), "has no answer"),
        "numbers": (json.dumps(row | {"custom_id": custom_id[:15] + "0x999999999"}).encode(), "has no answer"),
        "twice": (json.dumps(row | {"custom_id": custom_id[:15] + "1_1"}).encode(), "has no answer"),
        "failed": (
            json.dumps(row | {"response": None, "error": {"code": "expired", "message": "out of time"}}).encode(),
            "not one of 1 requests has succeeded; the first: out of time",
        ),
        "no chat": (
            json.dumps(row | {"response": {"status_code": 200, "body": {"object": "list"}}}).encode(),
            'not one of 1 requests has succeeded; the first: not an answer of a chat endpoint: {"object": "list"}',
        ),
    }
    if kind == "missing":
        return "cannot be read: No such file or directory"
    if kind == "folder":
        path.mkdir()
        return "cannot be read: Is a directory"
    path.write_bytes(contents[kind][0])
    return contents[kind][1]


KINDS = ["missing", "folder", "empty", "binary", "deep", "requests", "numbers", "twice", "failed", "no chat"]
RUN = "0123456789ab"


def answer(clips: list[int], content: str, **more: Any) -> dict[str, Any]:
    row = json.loads(request_line(RUN, 1, clips, {}))
    body = {"choices": [{"message": {"content": content}, **more}]}
    return {"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def narrator(path: Path, clips: range = range(100)) -> BatchNarrator:
    return BatchNarrator(NarratorConfig(kind="llm", batch=8), [path], RUN, clips, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_answers_is_one_message(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    expected = bad(path, kind, answer([3], "{}"))
    with pytest.raises(UserError) as caught:
        narrator(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


def test_the_clips_of_a_request_are_in_its_name(tmp_path: Path) -> None:
    clips = [2, 3, 4, 9, 20, 21, 99]
    written = json.loads(request_line(RUN, 2, clips, {}))
    assert written["custom_id"] == f"{RUN}-2-2x3_9_20x2_99"
    texts = json.dumps({"captions": [{"clip": i + 1, "caption": f"caption of {clip}"} for i, clip in enumerate(clips)]})
    path = tmp_path / "a.jsonl"
    write_rows(path, [answer(clips, texts)])
    made = narrator(path)
    assert made.answered == clips
    requests = [Request("", WIPE, seed=clip) for clip in (99, 5, 2)]
    answers = [each for _, each in made.narrate(requests)]
    assert [each.text for each in answers] == ["caption of 99", None, "caption of 2"]
    assert answers[1].problem == "no answer: none in the batch"
    assert narrator(path, range(4, 20)).answered == [4, 9]


def test_the_answer_that_succeeded_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = '{"captions": [{"clip": 1, "caption": "%s"}]}'
    failure = answer([5], "") | {"response": {"status_code": 500, "body": {"error": "no memory"}}}
    write_rows(path, [failure, answer([5], text % "one"), failure, answer([5], text % "two")])
    assert [each.text for _, each in narrator(path).narrate([Request("", WIPE, seed=5)])] == ["one"]


def test_a_line_that_is_too_long_costs_its_clips_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    text = '{"captions": [{"clip": 1, "caption": "one"}]}'
    write_rows(path, [answer([1], "x" * 9_000_000), answer([2], text)])
    assert narrator(path).answered == [2]
    assert "1 of 2 lines: longer than 4 MB: line 1" in caplog.text
