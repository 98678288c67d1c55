"""The pipeline with made-up stages: what is stored, who may write, what a kill, a full disk and damage cost."""

from __future__ import annotations

import csv
import itertools
import os
import re
import signal
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.data.table import ClipReader, ClipTable
from egohod.errors import UserError
from egohod.hod import store
from egohod.hod.config import COLUMNS, HodConfig
from egohod.hod.pipeline import STAGES, Pipeline, Stage, Task, narrated_clips
from egohod.hod.store import Finished, Outcome, Results, Shard, Store
from egohod.runtime import locked
from tests.hod.runs import full_disk
from tests.support import Command

WHOLE = Shard()


class Straw(Stage):
    """A stage that remembers which clips it was given, and fails at some."""

    def __init__(
        self, name: str, fails: Mapping[int, str] | None = None, reads_text: bool = False, **settings: Any
    ) -> None:
        self.name, self.settings, self.reads_text = name, settings, reads_text
        self.fails, self.indices = fails or {}, list[int]()
        self.group = None if name == "detect" else 4

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        for task in tasks:
            self.indices.append(task.index)
            if task.index in self.fails:
                yield task, Outcome(None, self.fails[task.index])
            else:
                before = {name: outcome.parsed()["of"] for name, outcome in task.outcomes.items() if name != self.name}
                yield task, Outcome({"of": task.index, "before": before, "text": f"text {task.index}"} | SUMMARY)


SUMMARY = {"attempts": 1, "narrator": "template", "refusals": [], "prompt_tokens": 0, "completion_tokens": 0}


@pytest.fixture(params=["local", "network", "without locks"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kinds of file systems that results are written to in different ways."""
    if request.param != "local":
        monkeypatch.setattr(store, "_LOCAL_FILE_SYSTEMS", frozenset())
    if request.param == "without locks":

        def flock(descriptor: int, operation: int) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", flock)
    return str(request.param)


@pytest.fixture
def table(tmp_path: Path) -> ClipTable:
    return write_table(tmp_path, 11)


def write_table(folder: Path, rows: int) -> ClipTable:
    path = folder / "clips.csv"
    lines = [f"video_{i // 4},{i},{i + 1.5},the hand moves thing {i}" for i in range(rows)]
    path.write_text("\n".join(["video_id,start_second,end_second,text", *lines]) + "\n")
    return read_clips(path)


def pipeline(table: ClipTable, folder: Path, *stages: Stage, retry: bool = False, **settings: Any) -> Pipeline:
    cfg = HodConfig(output=str(folder / "out" / "hod.csv"), **{"block": 3, **settings})
    cfg.source.metadata = str(table.path)
    return Pipeline(cfg, table, stages or (Straw("detect"), Straw("track")), retry=retry)


def outcomes(made: Pipeline, index: int) -> dict[str, Outcome]:
    with made.store.results(clips=made.clips) as results:
        return made.stored(index, results)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_every_stage_is_given_every_clip_once(table: ClipTable, tmp_path: Path, file_system: str) -> None:
    one, two = Straw("detect"), Straw("track")
    made = pipeline(table, tmp_path, one, two)
    for names in (["detect"], ["track"], ["detect"], ["track"]):
        made.run(names, WHOLE)
    assert one.indices == two.indices == list(range(11))
    assert outcomes(made, 5)["track"].parsed()["before"] == {"detect": 5}
    made.finish(WHOLE)
    assert made.merge(1) == Finished(11, 0, 0)
    assert sorted(each.name for each in made.store.folder.rglob("*.sqlite*")) == ["0-of-1.sqlite"]


def test_stages_that_run_together_store_what_they_store_alone(table: ClipTable, tmp_path: Path) -> None:
    stages = [Straw("detect"), Straw("track", {4: "lost"}), Straw("check")]
    made = pipeline(table, tmp_path, *stages)
    made.run_all(WHOLE)
    alone = pipeline(table, tmp_path / "alone", *(Straw(each.name, each.fails) for each in stages))
    for stage in stages:
        alone.run([stage.name], WHOLE)
    for index in range(11):
        parsed = [{n: (o.parsed(), o.fault) for n, o in outcomes(each, index).items()} for each in (made, alone)]
        assert parsed[0] == parsed[1]
        assert len(parsed[0]) == (2 if index == 4 else 3)
    assert stages[2].indices == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_other_settings_are_other_results_and_earlier_ones_are_used_again(table: ClipTable, tmp_path: Path) -> None:
    for depth, due in ((1, 11), (2, 11), (1, 0)):
        first, second = Straw("detect"), Straw("track", depth=depth)
        made = pipeline(table, tmp_path, first, second)
        made.run(["detect"], WHOLE)
        made.run(["track"], WHOLE)
        assert len(second.indices) == due
        assert len(first.indices) == (11 if depth == 1 and due else 0)


def test_a_change_of_a_stage_changes_all_that_follow(table: ClipTable, tmp_path: Path) -> None:
    one, other = (pipeline(table, tmp_path, Straw("detect", size=size), Straw("track")) for size in (1, 2))
    assert all(one.keys(3)[name] != other.keys(3)[name] for name in ("detect", "track"))
    again = pipeline(table, tmp_path, Straw("detect", size=1), Straw("track", more=True))
    assert one.keys(3)["detect"] == again.keys(3)["detect"]


def test_only_stages_that_read_the_narration_depend_on_it(tmp_path: Path) -> None:
    table = write_table(tmp_path, 3)
    stages = Straw("detect"), Straw("narrate", reads_text=True), Straw("check")
    before = pipeline(table, tmp_path, *stages).keys(0)
    path = tmp_path / "clips.csv"
    path.write_text(path.read_text().replace("thing 0", "spoon"))
    after = pipeline(read_clips(path), tmp_path, *stages).keys(0)
    assert before["detect"] == after["detect"]
    assert before["narrate"] != after["narrate"]
    assert before["check"] != after["check"]


def test_failures_are_in_the_ledger_and_tried_again_with_retry(
    table: ClipTable, tmp_path: Path, file_system: str
) -> None:
    made = pipeline(table, tmp_path, Straw("detect", {4: "no such\nfile \udcff", 9: "cut off"}), Straw("track"))
    made.run(["detect"], WHOLE)
    at = made.run(["track"], WHOLE)["track"]
    assert (at.done, at.blocked) == (9, 2)
    assert made.finish(WHOLE) == made.merge(1) == made.finished(WHOLE) == Finished(9, 2, 0)
    assert rows(made.store.failures)[1] == ["5", "video_1", "4", "5.5", "video_1_4_5.5", "detect", "no such file ?"]
    assert made.run(["detect"], WHOLE)["detect"].done == 0
    healed = pipeline(table, tmp_path, Straw("detect"), Straw("track"), retry=True)
    assert healed.finished(WHOLE) == Finished(9, 2, 0)
    assert healed.run(["detect"], WHOLE)["detect"].done == 2
    # From the first change on the shard is not finished: its rows would be of two runs.
    assert healed.finished(WHOLE) is None
    assert healed.run(["track"], WHOLE)["track"].done == 2
    assert healed.finish(WHOLE) == Finished(11, 0, 0)


def test_a_retry_takes_the_marks_of_all_settings_that_share_the_result(table: ClipTable, tmp_path: Path) -> None:
    def made(depth: int, retry: bool = False) -> Pipeline:
        detect = Straw("detect", None if retry else {4: "no such file"})
        return pipeline(table, tmp_path, detect, Straw("track", depth=depth), retry=retry)

    for depth in (1, 2):
        made(depth).run_all(WHOLE)
        assert made(depth).finish(WHOLE) == Finished(10, 1, 0)
    assert made(1).finished(WHOLE) == made(2).finished(WHOLE) == Finished(10, 1, 0)
    made(1, retry=True).run_all(WHOLE)
    # Its clip now has boxes but no facts: with its mark it could be neither merged nor run.
    assert made(2).finished(WHOLE) is None
    made(2).run_all(WHOLE)
    assert made(2).finish(WHOLE) == made(2).merge(1) == Finished(11, 0, 0)


def test_too_many_failures_stop_a_stage(tmp_path: Path) -> None:
    table = write_table(tmp_path, 120)
    made = pipeline(table, tmp_path, Straw("detect", dict.fromkeys(range(120), "gone")))
    with pytest.raises(UserError, match=r"detect: 51 of 51 clips failed.*max_bad_fraction=0.05.*row 51: gone"):
        made.run(["detect"], WHOLE)


def test_failures_of_an_earlier_run_do_not_stop_a_stage(tmp_path: Path) -> None:
    table = write_table(tmp_path, 120)
    with pytest.raises(UserError):
        pipeline(table, tmp_path, Straw("detect", dict.fromkeys(range(120), "gone"))).run(["detect"], WHOLE)
    at = pipeline(table, tmp_path, Straw("detect", {60: "damaged"})).run(["detect"], WHOLE)["detect"]
    assert (at.failed_before, at.failed, at.done) == (51, 1, 69)


def test_a_stage_before_its_time_is_an_error_if_so_for_all_clips(table: ClipTable, tmp_path: Path) -> None:
    made = pipeline(table, tmp_path)
    with pytest.raises(UserError, match="track: not one of 11 clips has been through detect; run that first"):
        made.run(["track"], WHOLE)
    made.run(["detect"], Shard(0, 2))
    assert made.run(["track"], WHOLE)["track"].unready == 5


def test_a_stage_that_was_left_out_is_named(table: ClipTable, tmp_path: Path) -> None:
    made = pipeline(table, tmp_path)
    made.run(["detect"], WHOLE)
    with pytest.raises(UserError, match="row 1: has not been through the stage track"):
        made.finish(WHOLE)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 9])
def test_shards_merge_to_what_a_single_run_writes(table: ClipTable, tmp_path: Path, shards: int) -> None:
    made = pipeline(table, tmp_path, Straw("detect", {7: "gone"}))
    for index in reversed(range(shards)):
        made.run(["detect"], Shard(index, shards))
        made.finish(Shard(index, shards))
    assert made.merge(shards) == Finished(10, 1, 0)
    written = rows(made.store.output)
    assert written[0] == list(COLUMNS)
    assert [row[1] for row in written[1:]] == [str(i) for i in range(11) if i != 7]
    assert [row[0] for row in rows(made.store.failures)] == ["row", "8"]
    assert sum(len(made.clips(shard)) for shard in Shard.all(shards)) == 11
    assert made.store.divisions(made.fingerprint) == [shards]
    single = pipeline(table, tmp_path / "single", Straw("detect", {7: "gone"}))
    single.run(["detect"], WHOLE)
    single.finish(WHOLE)
    single.merge(1)
    for one, other in ((single.store.output, made.store.output), (single.store.failures, made.store.failures)):
        assert one.read_bytes() == other.read_bytes()


def test_results_of_another_division_are_used(table: ClipTable, tmp_path: Path, file_system: str) -> None:
    stage = Straw("detect")
    made = pipeline(table, tmp_path, stage)
    made.run(["detect"], Shard(1, 3))
    done = list(stage.indices)
    made.run(["detect"], WHOLE)
    assert sorted(stage.indices) == list(range(11))
    assert stage.indices[: len(done)] == done
    # What a shard works from is then in three files.
    made.finish(WHOLE)
    assert made.merge(1) == Finished(11, 0, 0)


def test_a_merge_names_what_is_missing(table: ClipTable, tmp_path: Path) -> None:
    made = pipeline(table, tmp_path, Straw("detect"))
    made.run(["detect"], Shard(0, 2))
    made.finish(Shard(0, 2))
    with pytest.raises(UserError, match=r"1 of 2 shards are not finished with these settings: --shard 1/2"):
        made.merge(2)
    made.run(["detect"], Shard(1, 2))
    made.finish(Shard(1, 2))
    with pytest.raises(UserError, match="2 of 2 shards are not finished"):
        pipeline(table, tmp_path, Straw("detect", other=1)).merge(2)
    (made.store.folder / "results" / "1-of-2.sqlite").unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards are not finished with these settings: --shard 1/2"):
        made.merge(2)
    assert not made.store.output.exists()


def test_no_narration_at_all_is_an_error(table: ClipTable, tmp_path: Path) -> None:
    made = pipeline(table, tmp_path, Straw("detect", dict.fromkeys(range(11), "gone")))
    made.run(["detect"], WHOLE)
    made.finish(WHOLE)
    with pytest.raises(UserError, match=r"not one of 11 clips has a narration; .*detect: gone.*--retry"):
        made.merge(1)
    assert [each.name for each in made.store.output.parent.iterdir()] == ["hod.csv.work"]


@pytest.mark.parametrize(
    ("text", "expected"), [("3", "i/n"), ("4/4", "0/64 is the first"), ("-1/4", "i/n"), ("0/0", "i/n")]
)
def test_a_shard_that_is_none(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Shard.parse(text)


def test_two_runs_on_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egohod.hod.store._PATIENCE", 0.1)
    made = Store(tmp_path / "hod.csv")
    with made.claim(Shard(0, 2)):
        with made.claim(Shard(1, 2)):
            pass
        for other in (Shard(0, 2), Shard(0, 1), Shard(2, 3)):
            with (
                pytest.raises(UserError, match=r"hod\.csv: another run is writing here \(shard 0/2"),
                made.claim(other),
            ):
                pass
    # Other files and folders are ignored.
    (made.folder / "locks" / "folder").mkdir()
    (made.folder / "results").mkdir()
    (made.folder / "results" / "3-of-3 (copy).sqlite").write_text("{}")
    with made.claim(Shard(0, 1)):
        assert made.divisions("x") == []


def test_shards_that_look_at_older_locks_at_once(tmp_path: Path) -> None:
    made = Store(tmp_path / "hod.csv")
    with made.claim(Shard(0, 1)):
        pass
    lock = locked(made.folder / "locks" / "0-of-1")
    lock.__enter__()
    threading.Timer(0.3, lock.__exit__, [None, None, None]).start()
    with made.claim(Shard(1, 2)):
        pass


def test_a_folder_of_an_older_release_is_recognised(
    table: ClipTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = pipeline(table, tmp_path)
    (made.store.folder / "blocks" / "0000").mkdir(parents=True)
    (made.store.folder / "blocks" / "0000" / "0000000.jsonl").write_text('{"stage":"detect","key":"a","value":1}\n')
    (made.store.folder / "parts").mkdir()
    (made.store.folder / "parts" / "0-of-1.json").write_text('{"fingerprint": "x", "narrations": 3}')
    with made.store.claim(WHOLE):
        assert made.finished(WHOLE) is None
        made.run_all(WHOLE)
        made.finish(WHOLE)
    assert made.merge(1) == Finished(11, 0, 0)
    (line,) = [record.getMessage() for record in caplog.records if "older release" in record.getMessage()]
    assert "all clips are processed again" in line


def test_results_survive_a_process_that_is_killed(table: ClipTable, tmp_path: Path, file_system: str) -> None:
    made = pipeline(table, tmp_path, Straw("detect"))
    child = os.fork()
    if child == 0:
        with made.store.results(WHOLE) as results:
            for index in range(7):
                results.put(*made.keys(index)["detect"], Outcome({"of": index}))
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    # Readers may be there before the next run.
    assert outcomes(made, 6)["detect"].parsed() == {"of": 6}
    at = made.run(["detect"], WHOLE)["detect"]
    assert (at.stored, at.done) == (7, 4)


def test_a_process_that_is_killed_while_it_makes_the_file_leaves_no_results(table: ClipTable, tmp_path: Path) -> None:
    made = pipeline(table, tmp_path, Straw("detect"))
    path = made.store.folder / "results" / "0-of-1.sqlite"
    path.parent.mkdir(parents=True)
    path.touch()
    assert made.finished(WHOLE) is None
    assert made.run(["detect"], WHOLE)["detect"].done == 11


def test_a_reader_does_not_disturb_a_run(table: ClipTable, tmp_path: Path, file_system: str) -> None:
    made = pipeline(table, tmp_path, Straw("detect"))
    with made.store.results(WHOLE) as results:
        for index in range(3):
            results.put(*made.keys(index)["detect"], Outcome({"of": index}))
            with made.store.results(clips=made.clips) as others:
                assert others.get(*made.keys(index)["detect"]) == Outcome(b'{"of":%d}' % index)
    assert made.run(["detect"], WHOLE)["detect"].stored == 3


def test_a_damaged_result_costs_its_clip_alone(
    table: ClipTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = pipeline(table, tmp_path, Straw("detect"))
    made.run(["detect"], WHOLE)
    made.finish(WHOLE)
    path = made.store.folder / "results" / "0-of-1.sqlite"
    content = path.read_bytes()
    assert content.count(b'"text 5"') == 1
    path.write_bytes(content.replace(b'"text 5"', b'"text 6"'))
    assert outcomes(made, 5) == {}
    assert "a damaged result is ignored" in caplog.text
    with pytest.raises(UserError, match="row 6: has not been through the stage detect"):
        made.merge(1)
    assert made.finished(WHOLE) is None, "else a rerun would have nothing to do"
    assert made.run(["detect"], WHOLE)["detect"].done == 1
    made.finish(WHOLE)
    assert made.merge(1) == Finished(11, 0, 0)
    assert rows(made.store.output)[6][3] == "text 5"


@pytest.mark.parametrize("damage", [slice(0, 16), slice(4096, 4120), slice(100, 300)])
def test_a_damaged_file_is_named_with_the_cure(table: ClipTable, tmp_path: Path, damage: slice) -> None:
    made = pipeline(table, tmp_path, Straw("detect"))
    made.run(["detect"], WHOLE)
    path = made.store.folder / "results" / "0-of-1.sqlite"
    content = bytearray(path.read_bytes())
    content[damage] = b"\xa5" * len(content[damage])
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"0-of-1\.sqlite is damaged: .*delete it, and its clips are processed again"):
        made.run(["detect"], WHOLE)
    path.unlink()
    assert made.run(["detect"], WHOLE)["detect"].done == 11


def test_a_file_is_touched_only_to_add_to_it(tmp_path: Path, file_system: str) -> None:
    path = tmp_path / "deep" / "0-of-1.sqlite"
    with closing(Results(path)) as results:
        assert results.get("a", "detect") is None
        assert results.finished("print") is None
    assert not path.parent.exists()
    with closing(Results(path)) as results:
        results.put("a", "detect", Outcome(1, is_fallback=True))
    stamp = path.stat().st_mtime_ns
    with closing(Results(path)) as results:
        assert results.get("a", "detect") == Outcome(b"1", None, True)
    assert path.stat().st_mtime_ns == stamp
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot read .*0-of-1\.sqlite: "):
        Results(path)


def test_a_full_disk_is_one_message_and_loses_nothing(table: ClipTable, tmp_path: Path, file_system: str) -> None:
    made = pipeline(table, tmp_path, Straw("detect", long="x" * 3000), Straw("track"))
    made.stages[0].run = lambda tasks: ((task, Outcome({"long": "x" * 9000})) for task in tasks)  # type: ignore[method-assign]
    with (
        full_disk(60_000),
        pytest.raises(UserError, match=r"cannot write .*\.sqlite: .*; finished clips are kept, rerun to resume"),
    ):
        made.run(["detect"], WHOLE)
    done = sum("detect" in outcomes(made, index) for index in range(11))
    assert 0 < done < 11
    at = made.run(["detect"], WHOLE)["detect"]
    assert (at.stored, at.done) == (done, 11 - done)


def test_line_breaks_in_cells_do_not_make_rows(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_text(
        'video_id,start_second,end_second,text,uid\nv,1,2,moves a cup,"one\r\ntwo"\nv,3,4,takes a cup,"a\nb"\n'
    )
    made = pipeline(read_clips(path, extra=["uid"]), tmp_path, Straw("detect", {1: "gone"}))
    made.run(["detect"], WHOLE)
    made.finish(WHOLE)
    assert made.merge(1) == Finished(1, 1, 0)
    assert rows(made.store.output)[1][-1] == "one two"
    assert rows(made.store.failures)[1][4] == "a b"


def test_fallback_values_are_made_again_with_retry(table: ClipTable, tmp_path: Path) -> None:
    stage = Straw("narrate")
    first = pipeline(table, tmp_path, stage)
    with first.store.results(WHOLE) as results:
        value = {"text": "no answer"} | SUMMARY
        results.put(*first.keys(3)["narrate"], Outcome(value, is_fallback=True))
    first.run(["narrate"], WHOLE)
    assert 3 not in stage.indices
    assert first.finish(WHOLE) == Finished(11, 0, 1)
    again = Straw("narrate")
    made = pipeline(table, tmp_path, again, retry=True)
    made.run(["narrate"], WHOLE)
    assert again.indices == [3]
    assert made.finish(WHOLE) == Finished(11, 0, 0)


def test_a_broken_line_is_counted_and_many_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path, 40)
    path = tmp_path / "clips.csv"
    cfg = HodConfig(source=SourceConfig(metadata=str(path)))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], "one,two", *lines[20:], 'v,never,2,"text"', "v,1,2,"]) + "\n")
    caplog.set_level("INFO")
    assert len(narrated_clips(cfg)) == 40
    assert "1 left out: malformed" in caplog.text
    assert "1 left out: no narration" in caplog.text
    path.write_text("\n".join([*lines, *["one,two"] * 60]) + "\n")
    with pytest.raises(
        UserError, match=r"60 of 100 rows cannot be used \(60 malformed\), more than max_bad_fraction=0.05"
    ):
        narrated_clips(cfg)
    with pytest.raises(UserError, match="no column 'noun' to keep"):
        narrated_clips(replace(cfg, keep=["noun"], max_bad_fraction=1.0))


def test_a_group_that_breaks_off_keeps_what_was_ready(table: ClipTable, tmp_path: Path) -> None:
    sizes = []

    class Broken(Straw):
        def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
            group = list(tasks)
            sizes.append(len(group))
            for task in reversed(group):
                if task.index == 5:
                    raise UserError("the endpoint is down")
                yield task, Outcome({"text": str(task.index)})

    with pytest.raises(UserError, match="the endpoint is down"):
        pipeline(table, tmp_path, Broken("narrate")).run(["narrate"], WHOLE)
    assert sizes == [4, 4]
    healed = Straw("narrate")
    assert pipeline(table, tmp_path, healed).run(["narrate"], WHOLE)["narrate"].stored == 6
    assert sorted(healed.indices) == [4, 5, 8, 9, 10]


def test_clips_with_nothing_to_do_take_no_place_in_a_group(tmp_path: Path) -> None:
    table, sizes = write_table(tmp_path, 40), []

    class Sized(Straw):
        def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
            group = list(tasks)
            sizes.append(len(group))
            yield from super().run(group)

    made = pipeline(table, tmp_path, Sized("narrate"))
    with made.store.results(WHOLE) as results:
        for index in set(range(40)) - {3, 13, 23, 33}:
            results.put(*made.keys(index)["narrate"], Outcome({"text": "x"}))
    at = made.run(["narrate"], WHOLE)["narrate"]
    assert (at.stored, at.done, sizes) == (36, 4, [4])


def test_a_file_of_something_else_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "0-of-1.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE finished (other)")
        database.execute("CREATE TABLE results (other)")
    database.close()
    with closing(Results(path)) as results, pytest.raises(UserError, match=r"cannot read .*no such column"):
        results.get("a", "detect")


class Captions(Straw):
    """A narrator: its answers are fallbacks until ``answers``; the check copies what it reads."""

    answers = False

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        for task in tasks:
            is_fallback = not type(self).answers
            if self.name == "check":
                value = task.outcomes["narrate"].parsed()
                is_fallback = value["text"] == "fallback"
            else:
                value = {"text": "fallback" if is_fallback else "answer"} | SUMMARY
            yield task, Outcome(value, is_fallback=is_fallback)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_retry_that_is_killed_between_two_stages_leaves_no_stale_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Also where the later result is in a file that this run only reads, of another division."""
    table = write_table(tmp_path, 3)

    def made(retry: bool = False) -> Pipeline:
        return pipeline(table, tmp_path, Captions("narrate"), Captions("check"), retry=retry, block=1)

    for shard in Shard.all(shards):
        made().run_all(shard)
    assert made().finish(WHOLE) == Finished(3, 0, 3)
    monkeypatch.setattr(Captions, "answers", True)
    made(retry=True).run(["narrate"], WHOLE)  # killed before the check
    at = made().run(["check"], WHOLE)["check"]
    assert (at.stored, at.done) == (0, 3)
    assert made().finish(WHOLE) == made().merge(1) == Finished(3, 0, 0)
    assert [row[3] for row in rows(made().store.output)[1:]] == ["answer"] * 3


def test_a_result_that_is_replaced_and_those_that_follow_change_together(tmp_path: Path) -> None:
    path = tmp_path / "0-of-1.sqlite"
    with closing(Results(path)) as results:
        results.put("a", "narrate", Outcome(1, is_fallback=True))
        results.put("a", "check", Outcome(2))
        results.put("b", "check", Outcome(3))
        results.put("a", "narrate", Outcome(4), stale=[("a", "check")])
        assert [results.get(clip, stage) for clip, stage in (("a", "narrate"), ("a", "check"), ("b", "check"))] == [
            Outcome(b"4"),
            None,
            Outcome(b"3"),
        ]
        results.put("a", "check", Outcome(5))
        assert results.get("a", "check") == Outcome(b"5")


def test_a_stage_that_drops_a_clip_is_a_mistake(table: ClipTable, tmp_path: Path) -> None:
    class Forgetful(Straw):
        def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
            return itertools.islice(super().run(tasks), 2)

    with pytest.raises(AssertionError, match=r"stage narrate has no outcome for .*clips\.csv: row 3"):
        pipeline(table, tmp_path, Forgetful("narrate")).run(["narrate"], WHOLE)


def test_the_order_of_renamed_columns_makes_no_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_text("video,start_second,end_second,words\nv,1,2,moves a cup\n")
    prints = []
    for columns in ({"video_id": "video", "text": "words"}, {"text": "words", "video_id": "video"}):
        cfg = HodConfig(output=str(tmp_path / "hod.csv"))
        cfg.source = SourceConfig(metadata=str(path), columns=columns)
        prints.append(Pipeline(cfg, read_clips(cfg.source), [Straw("detect")]).fingerprint)
    assert prints[0] == prints[1]


class Shout(Stage):
    """A further stage, as a user adds it: a class and a place in the list."""

    name, version, reads_text = "shout", 1, True

    def __init__(self, cfg: HodConfig, source: ClipReader, before: Mapping[str, Stage]) -> None:
        self.settings = {"mark": "!"}

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        for task in tasks:
            value = task.outcomes["check"].parsed()
            yield task, Outcome(value | {"text": value["text"].upper() + self.settings["mark"]})


def test_a_stage_is_added_by_a_class_and_a_place_in_the_list(
    few: list[str], tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egohod.hod.pipeline.STAGES", (*STAGES, Shout))
    done = inside("generate_hod.py", *few, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"shout +10 to do", done.stderr)
    assert re.search(r"-> [^a-z]+!$", done.stderr, re.MULTILINE)
    for stage in ("detect", "track", "narrate", "check"):
        assert inside("generate_hod.py", *few, "--stage", stage).returncode == 0
        assert not (tmp_path / "hod.csv").exists()
    done = inside("generate_hod.py", *few, "--stage", "shout")
    assert done.returncode == 0, done.stderr
    assert all(row[3].endswith("!") and row[3].isupper() for row in rows(tmp_path / "hod.csv")[1:])
