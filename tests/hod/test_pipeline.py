"""The frame of the pipeline with stages of straw: what is remembered, who may write, what a kill or full disk costs."""

from __future__ import annotations

import csv
import errno
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.data.table import ClipTable
from egohod.errors import UserError
from egohod.hod.config import COLUMNS
from egohod.hod.pipeline import VERSIONS, Pipeline, Task, Thinking, narrated, uid_of
from egohod.hod.store import Block, CacheError, Found, Shard, Work, key_of
from egohod.runtime import locked


class Straw:
    """A stage that counts what it is asked, and fails where it is told to."""

    def __init__(
        self, name: str, fails: Mapping[int, str] | None = None, of_text: bool = False, **settings: Any
    ) -> None:
        self.name, self.settings, self.of_text = name, settings, of_text
        self.fails, self.asked = fails or {}, list[int]()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Found]]:
        for task in tasks:
            self.asked.append(task.index)
            if task.index in self.fails:
                yield task, Found(None, self.fails[task.index])
            else:
                yield task, Found({"of": task.index, "before": sorted(task.before)})


@pytest.fixture
def table(tmp_path: Path) -> ClipTable:
    return write_table(tmp_path, 11)


def write_table(folder: Path, rows: int) -> ClipTable:
    path = folder / "clips.csv"
    lines = [f"video_{i // 4},{i},{i + 1.5},the hand moves thing {i}" for i in range(rows)]
    path.write_text("\n".join(["video_id,start_second,end_second,text", *lines]) + "\n")
    return read_clips(path)


def pipeline(table: ClipTable, folder: Path, *stages: Any, **more: Any) -> Pipeline:
    chosen = stages or (Straw("detect"), Straw("track"))
    return Pipeline(
        table, chosen, Work(folder / "out" / "hod.csv"), lambda index: table.row(index).texts[0], **{"block": 3, **more}
    )


WHOLE = Shard()


def finish(made: Pipeline, shard: Shard = WHOLE) -> Any:
    def row(index: int, value: Any) -> list[str]:
        clip = made.table.row(index)
        return [clip.video_id, str(clip.start), str(clip.end), clip.texts[0], "", uid_of(made.table, index, clip)]

    return made.finish(shard, "print", row, COLUMNS)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_every_stage_sees_every_clip_once(table: ClipTable, tmp_path: Path) -> None:
    one, two = Straw("detect"), Straw("track")
    made = pipeline(table, tmp_path, one, two)
    for name in ("detect", "track", "detect", "track"):
        made.run(name, WHOLE)
    assert one.asked == two.asked == list(range(11))
    assert made.known(5)["track"].value == {"of": 5, "before": ["detect"]}


def test_other_settings_are_other_work_and_old_ones_are_remembered(table: ClipTable, tmp_path: Path) -> None:
    for depth, asked in ((1, 11), (2, 11), (1, 0)):
        first, second = Straw("detect"), Straw("track", depth=depth)
        made = pipeline(table, tmp_path, first, second)
        made.run("detect", WHOLE)
        made.run("track", WHOLE)
        assert len(second.asked) == asked
        assert len(first.asked) == (11 if depth == 1 and asked else 0)


def test_a_change_early_on_changes_all_that_follows(table: ClipTable, tmp_path: Path) -> None:
    one, other = (pipeline(table, tmp_path, Straw("detect", size=size), Straw("track")) for size in (1, 2))
    assert all(one.keys(3)[name] != other.keys(3)[name] for name in ("detect", "track"))
    again = pipeline(table, tmp_path, Straw("detect", size=1), Straw("track", more=True))
    assert one.keys(3)["detect"] == again.keys(3)["detect"]


def test_only_stages_that_read_the_narration_depend_on_it(tmp_path: Path) -> None:
    table = write_table(tmp_path, 3)
    before = pipeline(table, tmp_path, Straw("detect"), Straw("narrate", of_text=True)).keys(0)
    path = tmp_path / "clips.csv"
    path.write_text(path.read_text().replace("thing 0", "spoon"))
    after = pipeline(read_clips(path), tmp_path, Straw("detect"), Straw("narrate", of_text=True)).keys(0)
    assert before["detect"] == after["detect"]
    assert before["narrate"] != after["narrate"]


def test_failures_are_in_the_ledger_and_tried_again_when_asked(table: ClipTable, tmp_path: Path) -> None:
    bad = Straw("detect", {4: "no such\nfile", 9: "cut off"})
    made = pipeline(table, tmp_path, bad, Straw("track"))
    made.run("detect", WHOLE)
    at = made.run("track", WHOLE)
    assert (at.done, at.lacking) == (9, 2)
    result = finish(made)
    assert (result.narrations, result.failures, result.reasons) == (9, 2, {"detect": 2})
    ledger = rows(made.work.part(WHOLE, ".failures.csv"))
    assert ledger[1] == ["5", "video_1", "4", "5.5", "video_1_4_5.5", "detect", "no such file"]
    assert made.run("detect", WHOLE).done == 0
    healed = pipeline(table, tmp_path, Straw("detect"), Straw("track"), again=True)
    assert healed.run("detect", WHOLE).done == 2
    assert healed.run("track", WHOLE).done == 2
    assert finish(healed).narrations == 11


def test_too_many_failures_stop_a_stage(tmp_path: Path) -> None:
    table = write_table(tmp_path, 120)
    made = pipeline(table, tmp_path, Straw("detect", dict.fromkeys(range(120), "gone")))
    with pytest.raises(UserError, match=r"detect: 51 of 51 clips failed.*max_bad_fraction=0.05.*row 51: gone"):
        made.run("detect", WHOLE)


def test_failures_of_an_earlier_run_do_not_stop_a_stage(tmp_path: Path) -> None:
    table = write_table(tmp_path, 120)
    with pytest.raises(UserError):
        pipeline(table, tmp_path, Straw("detect", dict.fromkeys(range(120), "gone"))).run("detect", WHOLE)
    at = pipeline(table, tmp_path, Straw("detect", {60: "damaged"})).run("detect", WHOLE)
    assert (at.failed_before, at.failed, at.done) == (51, 1, 69)


def test_a_stage_before_its_time_is_an_error_if_so_for_all_clips(table: ClipTable, tmp_path: Path) -> None:
    made = pipeline(table, tmp_path)
    with pytest.raises(UserError, match="track: not one of 11 clips has been through detect; run that first"):
        made.run("track", WHOLE)
    made.run("detect", Shard(0, 2))
    assert made.run("track", WHOLE).unready == 5


def test_a_stage_that_was_left_out_is_named(table: ClipTable, tmp_path: Path) -> None:
    made = pipeline(table, tmp_path)
    made.run("detect", WHOLE)
    with pytest.raises(UserError, match="row 1: has not been through the stage track"):
        finish(made)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 9])
def test_shards_merge_to_what_a_single_run_writes(table: ClipTable, tmp_path: Path, shards: int) -> None:
    made = pipeline(table, tmp_path, Straw("detect", {7: "gone"}))
    for number in reversed(range(shards)):
        made.run("detect", Shard(number, shards))
        finish(made, Shard(number, shards))
    total = made.work.merge(shards, "print", len(table), 3)
    assert total == {"narrations": 10, "failures": 1}
    told = rows(made.work.output)
    assert told[0] == list(COLUMNS)
    assert [row[1] for row in told[1:]] == [str(float(i)) for i in range(11) if i != 7]
    assert [row[0] for row in rows(made.work.failures)] == ["row", "8"]
    assert sum(len(made.clips(Shard(number, shards))) for number in range(shards)) == 11


def test_a_merge_says_what_is_missing(table: ClipTable, tmp_path: Path) -> None:
    made = pipeline(table, tmp_path, Straw("detect"))
    made.run("detect", Shard(0, 2))
    finish(made, Shard(0, 2))
    with pytest.raises(UserError, match=r"1 of 2 shards are not finished with these settings: --shard 1/2"):
        made.work.merge(2, "print", len(table), 3)
    made.run("detect", Shard(1, 2))
    finish(made, Shard(1, 2))
    with pytest.raises(UserError, match="2 of 2 shards are not finished"):
        made.work.merge(2, "other settings", len(table), 3)
    part = made.work.part(Shard(1, 2), ".csv")
    part.write_text("\n".join(part.read_text().splitlines()[:-1]) + "\n")
    for damage in (lambda: None, part.unlink):
        damage()
        assert made.work.finished(Shard(1, 2), "print") is None
        with pytest.raises(UserError, match=r"1 of 2 shards are not finished with these settings: --shard 1/2"):
            made.work.merge(2, "print", len(table), 3)
    assert not made.work.output.exists()


@pytest.mark.parametrize(
    ("text", "said"), [("3", "i/n"), ("4/4", "0/64 is the first"), ("-1/4", "i/n"), ("0/0", "i/n")]
)
def test_a_shard_that_is_none(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Shard.parse(text)


def test_two_runs_on_one_shard(table: ClipTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egohod.hod.store._PATIENCE", 0.1)
    work = Work(tmp_path / "hod.csv")
    with work.claim(Shard(0, 2)):
        with work.claim(Shard(1, 2)):
            pass
        for other in (Shard(0, 2), Shard(0, 1), Shard(2, 3)):
            with (
                pytest.raises(UserError, match=r"hod\.csv: another run is writing here \(shard 0/2"),
                work.claim(other),
            ):
                pass
    # What else lies there is nobody's.
    (work.folder / "locks" / "folder").mkdir()
    (work.folder / "parts").mkdir()
    (work.folder / "parts" / "3-of-3 (copy).json").write_text("{}")
    with work.claim(Shard(0, 1)):
        assert work.divisions("x") == []


def test_a_line_cut_short_is_done_again_and_the_file_goes_on_behind_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    with Block(path) as block:
        for key in "abc":
            block.put("detect", key, Found({"key": key}))
    whole = path.read_bytes()
    for cut in (1, 5, 30):
        path.write_bytes(whole[:-cut])
        with Block(path) as block:
            assert block.get("detect", "b") == Found({"key": "b"})
            assert block.get("detect", "c") is None
            block.put("detect", "c", Found({"key": "c"}))
        assert path.read_bytes() == whole


def test_a_damaged_line_costs_its_clip_alone(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    path.write_bytes(
        b'{"stage":"detect","key":"a","value":1}\n\x00\x00garbage\n{"stage":"detect","key":"b","fault":"no"}\n'
        + b"[" * 200_000
        + b"\n"
    )
    with Block(path) as block:
        assert block.get("detect", "a") == Found(1)
        assert block.get("detect", "b") == Found(None, "no")


def test_a_block_is_touched_only_to_add_to_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "0.jsonl"
    with Block(path) as block:
        assert block.get("detect", "a") is None
    assert not path.parent.exists()
    with Block(path) as block:
        block.put("detect", "a", Found(1, makeshift=True))
    with Block(path) as block:
        assert block.get("detect", "a") == Found(1, makeshift=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(CacheError, match=r"cannot read .*0\.jsonl: Is a directory"):
        Block(path)


def test_line_breaks_in_cells_do_not_make_rows(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_text(
        'video_id,start_second,end_second,text,uid\nv,1,2,moves a cup,"one\r\ntwo"\nv,3,4,takes a cup,"a\nb"\n'
    )
    made = pipeline(read_clips(path), tmp_path, Straw("detect", {1: "gone"}))
    made.run("detect", WHOLE)
    finish(made)
    assert made.work.merge(1, "print", 2, 3) == {"narrations": 1, "failures": 1}
    assert rows(made.work.output)[1][-1] == "one two"
    assert rows(made.work.failures)[1][4] == "a b"


def test_makeshift_values_are_made_again_when_asked(table: ClipTable, tmp_path: Path) -> None:
    first = pipeline(table, tmp_path, Straw("narrate"), block=11)
    with Block(first.work.block(0)) as block:
        block.put("narrate", first.keys(3)["narrate"], Found({"text": "no answer"}, makeshift=True))
    first.run("narrate", WHOLE)
    assert 3 not in first.stages[0].asked  # type: ignore[attr-defined]
    assert finish(first).narrations == 11
    assert (first.work.summary(WHOLE) or {})["makeshift"] == 1
    again = pipeline(table, tmp_path, Straw("narrate"), block=11, again=True)
    again.run("narrate", WHOLE)
    assert again.stages[0].asked == [3]  # type: ignore[attr-defined]


def test_shards_that_look_at_older_locks_at_once(tmp_path: Path) -> None:
    work = Work(tmp_path / "hod.csv")
    with work.claim(Shard(0, 1)):
        pass
    lock = locked(work.folder / "locks" / "0-of-1")
    lock.__enter__()
    threading.Timer(0.3, lock.__exit__, [None, None, None]).start()
    with work.claim(Shard(1, 2)):
        pass


def test_a_full_disk_is_said_once_and_loses_nothing(
    table: ClipTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, budget = os.write, [400]

    def write(file: int, content: Any) -> int:
        if len(content) > budget[0]:
            if budget[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            content = bytes(content[: budget[0]])
        budget[0] -= len(content)
        return real(file, content)

    made = pipeline(table, tmp_path)
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CacheError, match=r"cannot write .*\.jsonl: No space left on device; what is done is kept"):
        made.run("detect", WHOLE)
    monkeypatch.undo()
    done = sum(
        len([json.loads(line) for line in path.read_text().splitlines()])
        for path in made.work.folder.rglob("*.jsonl")
    )  # fmt: skip
    assert 0 < done < 11
    at = made.run("detect", WHOLE)
    assert (at.known, at.done) == (done, 11 - done)


def test_keys_tell_apart(tmp_path: Path) -> None:
    assert key_of("a", 1.0) == key_of("a", 1.0)
    assert (
        len({key_of(*each) for each in (("a", "b"), ("ab",), ("a", 1), ("a", 1.5), ("a", None), ("half \ud800",))}) == 6
    )


def test_a_broken_line_is_counted_and_many_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path, 40)
    path = tmp_path / "clips.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], "one,two", *lines[20:], 'v,never,2,"text"', "v,1,2,"]) + "\n")
    caplog.set_level("INFO")
    table = narrated(SourceConfig(metadata=str(path)), [], 0.05)
    assert len(table) == 40
    assert "1 left out: malformed" in caplog.text
    assert "1 left out: no narration" in caplog.text
    path.write_text("\n".join([*lines, *["one,two"] * 60]) + "\n")
    with pytest.raises(
        UserError, match=r"60 of 100 rows cannot be used \(60 malformed\), more than max_bad_fraction=0.05"
    ):
        narrated(SourceConfig(metadata=str(path)), [], 0.05)
    with pytest.raises(UserError, match="no column 'noun' to keep"):
        narrated(SourceConfig(metadata=str(path)), ["noun"], 1.0)


def test_a_group_that_breaks_off_keeps_what_was_ready(table: ClipTable, tmp_path: Path) -> None:
    sizes = []

    def think(tasks: Sequence[Task]) -> Iterator[tuple[int, Found]]:
        sizes.append(len(tasks))
        for place in reversed(range(len(tasks))):
            if tasks[place].index == 5:
                raise UserError("the endpoint is down")
            yield place, Found({"text": str(tasks[place].index)})

    made = pipeline(table, tmp_path, Thinking("narrate", think, {}, group=4))
    with pytest.raises(UserError, match="the endpoint is down"):
        made.run("narrate", WHOLE)
    assert sizes == [4, 4]
    healed = pipeline(table, tmp_path, Straw("narrate", version=VERSIONS["narrate"]))
    assert healed.run("narrate", WHOLE).known == 6
    assert sorted(healed.stages[0].asked) == [4, 5, 8, 9, 10]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "damage", ['{"fingerprint": "print"}', '{"fingerprint": "print", "narrations": "9"}', "[" * 9999]
)
def test_a_shard_of_which_nothing_sensible_is_told_is_not_finished(
    table: ClipTable, tmp_path: Path, damage: str
) -> None:
    made = pipeline(table, tmp_path, Straw("detect"))
    made.run("detect", WHOLE)
    finish(made)
    assert made.work.finished(WHOLE, "print") is not None
    made.work.part(WHOLE, ".json").write_text(damage)
    assert made.work.finished(WHOLE, "print") is None


def test_a_part_that_is_no_text_is_named(table: ClipTable, tmp_path: Path) -> None:
    made = pipeline(table, tmp_path, Straw("detect"))
    made.run("detect", WHOLE)
    finish(made)
    part = made.work.part(WHOLE, ".csv")
    part.write_bytes(part.read_bytes().replace(b"thing 3", b"thing \xff"))
    with pytest.raises(UserError, match=r"0-of-1\.csv: cannot be read: .*remove it and run the shard again"):
        made.work.merge(1, "print", len(table), 3)
