"""Many clips on many machines: metadata that is read once for all shards, merges that name what is wrong, pages."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import visualize_hod

from egohod.data.formats import read_clips
from egohod.data.table import ClipRow, ClipTable
from egohod.data.videos import Frames, VideoError
from egohod.errors import UserError
from egohod.hod import pipeline as hod_pipeline
from egohod.hod.config import HodConfig
from egohod.hod.pipeline import CHECK, DETECT, TRACK, Pipeline, Task, narrated_clips
from egohod.hod.store import Outcome, Shard
from tests.hod.runs import full_disk
from tests.hod.test_hod_resume import fork
from tests.hod.test_pipeline import SUMMARY, Straw, write_table


def same(one: ClipTable, other: ClipTable) -> bool:
    return (
        [one.row(index) for index in range(len(one))] == [other.row(index) for index in range(len(other))]
        and one.column_names == other.column_names
        and all((one.column(name) == other.column(name)).all() for name in one.column_names)
        and (one.report, one.path, one.content_hash()) == (other.report, other.path, other.content_hash())
        and [one.where(index) for index in range(len(one))] == [other.where(index) for index in range(len(other))]
    )


def settings(folder: Path, output: str = "hod.csv") -> HodConfig:
    cfg = HodConfig(output=str(folder / output), block=3)
    cfg.source.metadata = str(folder / "clips.csv")
    return cfg


def clip_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "hod.csv.work" / "clips").iterdir())


def run_shard(cfg: HodConfig, shard: Shard) -> Pipeline:
    pipeline = Pipeline(cfg, narrated_clips(cfg, save=True), [Straw("detect"), Straw("track")])
    with pipeline.store.claim(shard):
        pipeline.run_all(shard)
        pipeline.finish(shard)
    return pipeline


def test_a_mapped_table_is_the_table_and_a_worker_maps_it_too(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    lines = ["video_id,start_second,end_second,text,dataset,noun", "v,1,2,cuts,one,", "v,,2,cuts,one,knife"]
    lines += ["v,4,3,\"['cuts', 'slices a loaf']\",two,é", "w,0,1,cuts,one,knife", "w,0,1,cuts,one,knife"]
    path.write_text("\n".join(lines) + "\n")
    table = read_clips(path)
    assert table.report.left_out == {"no readable time": 1, "duplicates": 1}
    table.save(tmp_path / "clips.arrow")
    mapped = ClipTable.mapped(tmp_path / "clips.arrow", path)
    assert same(mapped, table)
    assert same(mapped.restricted(np.array([True, False, True])), table.restricted(np.array([True, False, True])))
    assert same(pickle.loads(pickle.dumps(mapped)), table)
    assert len(pickle.dumps(ClipTable.mapped(tmp_path / "clips.arrow", path))) < 1000
    assert same(pickle.loads(pickle.dumps(table)), table), "one that is in memory is copied"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux only: memory of a process by /proc")
def test_rows_of_a_mapped_table_that_nobody_uses_take_no_memory(tmp_path: Path) -> None:
    count, file = 200_000, tmp_path / "clips.arrow"
    texts = [f"#C C moves thing number {index} {'x' * 100}" for index in range(count)]
    start = np.arange(count, dtype=np.float64)
    videos = [f"video_{index // 100}" for index in range(count)]
    ClipTable.of(tmp_path / "clips.csv", videos, start, start + 1, text=texts).save(file)
    table = ClipTable.mapped(file, tmp_path / "clips.csv")
    for index in range(100_000, 101_000):
        assert table.row(index).texts == (texts[index],)
    assert len(table.distinct("video_id")) == 2000
    smaps = Path("/proc/self/smaps").read_text()
    maps = re.findall(r"(?m)clips\.arrow\nSize: +(\d+) kB\n(?:.*\n)*?Rss: +(\d+) kB", smaps)
    mapped, resident = (sum(int(each[place]) for each in maps) for place in (0, 1))
    assert mapped > 25_000
    assert resident < 0.3 * mapped


def test_shards_that_start_at_once_read_the_metadata_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, calls = write_table(tmp_path, 11), tmp_path / "calls"

    def read(*arguments: object, **options: object) -> ClipTable:
        with calls.open("a") as file:
            file.write("read\n")
        time.sleep(0.5)  # the others come to the lock meanwhile
        return read_clips(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(hod_pipeline, "read_clips", read)
    cfg = settings(tmp_path)
    children = [fork(lambda shard=shard: run_shard(cfg, shard)) for shard in Shard.all(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert calls.read_text() == "read\n"
    assert [name.partition(".")[2] for name in clip_files(tmp_path)] == ["arrow", "sha256"]
    pipeline = Pipeline(cfg, narrated_clips(cfg), [Straw("detect"), Straw("track")])
    assert same(pipeline.table, table)
    assert pipeline.merge(3).narrations == 11
    assert calls.read_text() == "read\n"


def test_a_process_that_is_killed_while_it_writes_the_clips_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, cfg, save = write_table(tmp_path, 11), settings(tmp_path), ClipTable.save

    def die(self: ClipTable, file: Path) -> None:
        save(self, file)
        os.truncate(file, 100)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(ClipTable, "save", die)
        assert os.waitpid(fork(lambda: narrated_clips(cfg, save=True)), 0)[1] == signal.SIGKILL
    assert [name.startswith(".tmp-") for name in clip_files(tmp_path)] == [True]
    assert same(narrated_clips(cfg), table), "a reader that writes nothing reads the metadata"
    assert same(narrated_clips(cfg, save=True), table)
    assert [name.partition(".")[2] for name in clip_files(tmp_path)] == ["arrow", "sha256"]


@pytest.mark.parametrize("damage", ["cut off", "other bytes", "no checksum"])
def test_damaged_clips_are_read_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    table, cfg = write_table(tmp_path, 11), settings(tmp_path)
    narrated_clips(cfg, save=True)
    (file,) = (tmp_path / "hod.csv.work" / "clips").glob("*.arrow")
    content = file.read_bytes()
    if damage == "no checksum":
        file.with_suffix(".sha256").unlink()
    else:
        file.write_bytes(content[:-50] if damage == "cut off" else content.replace(b"thing 7", b"thing 8"))
    assert same(narrated_clips(cfg), table)
    assert ("is damaged" in caplog.text) == (damage != "no checksum")
    assert same(narrated_clips(cfg, save=True), table)
    assert file.read_bytes() == content


def test_a_full_disk_while_the_clips_are_written(tmp_path: Path) -> None:
    table, cfg = write_table(tmp_path, 300), settings(tmp_path)
    with full_disk(2000), pytest.raises(UserError, match=r"\.arrow: cannot be written: File too large; rerun"):
        narrated_clips(cfg, save=True)
    assert clip_files(tmp_path) == []
    assert same(narrated_clips(cfg, save=True), table)


def test_metadata_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path, 11)

    def read(*arguments: object, **options: object) -> ClipTable:
        table = read_clips(*arguments, **options)  # type: ignore[arg-type]
        write_table(tmp_path, 12)
        return table

    monkeypatch.setattr(hod_pipeline, "read_clips", read)
    with pytest.raises(UserError, match=r"clips\.csv: changed while it was read; rerun"):
        narrated_clips(settings(tmp_path), save=True)
    assert clip_files(tmp_path) == []


def test_other_ways_to_read_the_metadata_have_clips_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second,text,noun\nv,1,2,cuts,loaf\n")
    cfg = settings(tmp_path)
    assert narrated_clips(cfg, save=True).column_names == narrated_clips(cfg).column_names
    wider = dataclasses.replace(cfg, keep=["noun"])
    assert narrated_clips(wider, save=True).value("noun", 0) == "loaf"
    renamed = dataclasses.replace(cfg, source=dataclasses.replace(cfg.source, columns={"text": "noun"}))
    assert narrated_clips(renamed, save=True).row(0).texts == ("loaf",)
    assert narrated_clips(cfg).row(0).texts == ("cuts",)
    assert len(clip_files(tmp_path)) == 6
    # A file beside the metadata is read with it.
    (tmp_path / "action_idx.txt").write_text("Take bowl 7\nCut loaf 8\n")
    (tmp_path / "train.txt").write_text("P01-R01-Cooking-1-49-F1-50 7 1 2\n")
    listed = dataclasses.replace(cfg, source=dataclasses.replace(cfg.source, metadata=str(tmp_path / "train.txt")))
    assert narrated_clips(listed, save=True).row(0).texts == ("take bowl",)
    (tmp_path / "action_idx.txt").write_text("Wash bowl 7\nCut loaf 8\n")
    assert narrated_clips(listed, save=True).row(0).texts == ("wash bowl",)


def test_a_merge_names_shards_of_other_metadata_and_those_that_are_gone(tmp_path: Path) -> None:
    write_table(tmp_path, 11)
    cfg = settings(tmp_path)
    for shard in Shard.all(3):
        run_shard(cfg, shard)
    write_table(tmp_path, 12)
    pipeline = run_shard(cfg, Shard(1, 3))
    message = r"2 of 3 shards .*: --shard 0/3 \(finished with other metadata\), 2/3 \(finished with other metadata\)$"
    with pytest.raises(UserError, match=message):
        pipeline.merge(3)
    pipeline.store.file(Shard(2, 3)).unlink()
    with pytest.raises(UserError, match=r"0/3 \(finished with other metadata\), 2/3 \(no results\)$"):
        pipeline.merge(3)
    for shard in (Shard(0, 3), Shard(2, 3)):
        run_shard(cfg, shard)
    assert pipeline.merge(3).narrations == 12
    other = Pipeline(dataclasses.replace(cfg, seed=7), pipeline.table, [Straw("detect"), Straw("track")])
    with pytest.raises(UserError, match=r"0/3 \(finished with other settings\)"):
        other.merge(3)
    pipeline.store.file(Shard(1, 3)).write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"1-of-3\.sqlite is damaged: .*; delete it"):
        pipeline.merge(3)


def test_a_work_folder_on_another_machine_needs_no_metadata_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    write_table(tmp_path / "here", 11)
    for shard in Shard.all(2):
        run_shard(settings(tmp_path / "here"), shard)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    monkeypatch.setattr(hod_pipeline, "read_clips", None)
    cfg = settings(tmp_path / "there")
    pipeline = Pipeline(cfg, narrated_clips(cfg), [Straw("detect"), Straw("track")])
    assert pipeline.merge(2).narrations == 11
    assert pipeline.table.where(4) == f"{tmp_path}/there/clips.csv: row 5"


def test_metadata_that_is_mostly_bad_is_refused_by_every_shard(tmp_path: Path) -> None:
    lines = ["video_id,start_second,end_second,text", *["v,1,2,"] * 60, "v,1,2,cuts"]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    for _ in range(2):
        with pytest.raises(UserError, match="60 of 61 rows cannot be used"):
            narrated_clips(settings(tmp_path), save=True)


def hand(side: str, touches: str | None, directions: list[str]) -> dict[str, Any]:
    motion = {"path": [], "size": [], "directions": directions, "repeats": 1, "speed": 0.1, "start_region": "centre"}
    facts = {"side": side, "seen": 1.0, "motion": motion | {"end_region": "centre"}, "contact": None, "release": None}
    return facts | {"approach": None, "touches": touches, "relation": "onto" if touches == "object" else None}


class Facts(Straw):
    """Stages whose results a page can show: boxes, facts and captions that follow from the clip's index."""

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        for task in tasks:
            index, side = task.index, "left" if task.index % 2 else "right"
            score = {"second": [0.5], "score": [0.5 + index % 5 / 10]}
            facts = {"video_id": "v", "start": 0.0, "end": 1.0, "times": [], "object": None, "hands_together": None}
            facts |= {"hands": {side: hand(side, "object" if index % 3 else None, [("up", "down")[index % 4 // 2]])}}
            checked = SUMMARY | {
                "text": f"#C C cuts thing {index}",
                "refusals": ["too short"] if index % 7 == 0 else [],
            }
            values = {DETECT: {"boxes": score}, TRACK: facts | {"acting": side}, CHECK: checked}
            fault = f"video_{index}: no such file" if self.name == DETECT and index % 10 == 9 else None
            yield task, Outcome(None if fault else values[self.name], fault)


class NoVideos:
    def __init__(self, cfg: HodConfig, table: ClipTable) -> None: ...

    def read(self, row: ClipRow, *arguments: object) -> None:
        raise VideoError(f"{row.video_id}: there are no videos")


def facts_pipeline(cfg: HodConfig) -> Pipeline:
    return Pipeline(cfg, narrated_clips(cfg), [Facts(DETECT), Facts(TRACK), Facts(CHECK)])


@pytest.fixture(scope="module")
def shards_of_facts(tmp_path_factory: pytest.TempPathFactory) -> HodConfig:
    """A run of 200 clips on 7 shards."""
    folder = tmp_path_factory.mktemp("facts")
    write_table(folder, 200)
    made = facts_pipeline(settings(folder))
    for shard in Shard.all(7):
        with made.store.claim(shard):
            made.run_all(shard)
            made.finish(shard)
    return made.cfg


@pytest.fixture
def draw(shards_of_facts: HodConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Draws a page of that run; the clips on it, by the numbers in their narrations before."""
    monkeypatch.setattr(visualize_hod, "build", facts_pipeline)
    monkeypatch.setattr(visualize_hod, "open_videos", NoVideos)
    cfg = shards_of_facts

    def draw(*arguments: str) -> list[int]:
        places = ["--metadata", cfg.source.metadata, "--root", "none", "--output", cfg.output, "block=3"]
        assert visualize_hod.main([*places, "--page", str(tmp_path / "page.html"), *arguments]) == 0
        return [int(each) for each in re.findall(r"was:</span> the hand moves thing (\d+)", page(tmp_path))]

    return draw


def page(folder: Path) -> str:
    return (folder / "page.html").read_text()


def test_random_clips_are_drawn_by_the_seed_from_all_shards(draw: Callable[..., list[int]], tmp_path: Path) -> None:
    first = draw("--number", "20", "--seed", "3")
    assert first == sorted(set(first))
    assert len(first) == 20
    assert max(first) - min(first) > 100
    assert draw("--number", "20", "--seed", "3") == first
    assert draw("--number", "20", "--seed", "4") != first
    assert len(draw("--number", "1000")) == 200


@pytest.mark.parametrize(
    ("filters", "fits"),
    [
        (["hand=left"], lambda i: i % 2 == 1),
        (["hand=left,right"], lambda i: True),
        (["hand=left", "direction=up"], lambda i: i % 2 == 1 and i % 4 // 2 == 0),
        (["touches=nothing"], lambda i: i % 3 == 0),
        (["relation=onto"], lambda i: i % 3 != 0),
        (["verdict=replaced"], lambda i: i % 7 == 0),
        (["word=cut", "word=17"], lambda i: str(i).startswith("17")),
        (["score<0.6"], lambda i: i % 5 == 0),
        (["score>0.85"], lambda i: i % 5 == 4),
    ],
)
def test_clips_that_fit_all_filters(
    draw: Callable[..., list[int]], tmp_path: Path, filters: list[str], fits: Callable[[int], bool]
) -> None:
    arguments = [part for each in filters for part in ("--where", each)]
    expected = [index for index in range(200) if index % 10 != 9 and fits(index)]
    assert draw(*arguments, "--number", "500") == expected
    some = draw(*arguments, "--number", "3")
    assert len(some) == min(3, len(expected))
    assert set(some) <= set(expected)
    shown = " and ".join(filters).replace("<", "&lt;").replace(">", "&gt;")
    assert f"with <code>{shown}</code>" in page(tmp_path)


def test_failures_by_their_stage_and_reason(draw: Callable[..., list[int]], tmp_path: Path) -> None:
    failed = [index for index in range(200) if index % 10 == 9]
    assert draw("--where", "stage=detect", "--number", "500") == failed
    assert draw("--where", "verdict=failed", "--number", "500") == failed
    assert draw("--where", "reason=video_19: no such", "--number", "500") == [19]
    assert 'data-stage="detect"' in page(tmp_path)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (["hand"], "must be NAME=VALUE"),
        (["hnd=left"], "there is no 'hnd'.*'hand'.*; there are hand, touches"),
        (["hand=lefft"], "hand is one of left, right, none"),
        (["hand<0.5"], "hand takes ="),
        (["score=0.5"], "score takes < or >"),
        (["score<much"], "'much' is no number"),
        (["score<0.5,0.7"], "score takes one number"),
        (["word=cut up"], "'cut up' is not a word"),
        (["word=#C"], "'#C' is not a word"),
        (
            ["stage=detect", "hand=left"],
            r"none of 200 clips fits stage=detect and hand=left; there are stage: detect \(20\); "
            r"hand: right \(100\), left \(80\)$",
        ),
        (["touches=plate"], r"touches: object \(120\), nothing \(60\)$"),
        (["word=fly"], r"word: c \(180\), cuts \(180\), thing \(180\), 0 \(1\), 1 \(1\), 10 \(1\)"),
    ],
)
def test_filters_that_are_none_or_that_nothing_fits(
    draw: Callable[..., list[int]], tmp_path: Path, filters: list[str], message: str
) -> None:
    (tmp_path / "page.html").write_text("as before")
    with pytest.raises(UserError, match=message):
        draw(*[part for each in filters for part in ("--where", each)])
    assert page(tmp_path) == "as before"


def test_the_page_has_filters_of_its_own_and_needs_no_network(draw: Callable[..., list[int]], tmp_path: Path) -> None:
    draw("--number", "200")
    html = page(tmp_path)
    for name in ("hand", "touches", "relation", "direction", "verdict", "narrator", "stage"):
        assert f'<select name="{name}"' in html
    assert '<option value="left">left (80)</option>' in html
    assert html.count("data-hand=") == 200
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)


def test_a_page_of_many_clips_has_the_frames_of_one_in_memory(
    draw: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, shown = np.linspace(0, 1, 4), list[weakref.ref[np.ndarray]]()

    class Pictures(NoVideos):
        def read(self, row: ClipRow, *arguments: object) -> Frames:  # type: ignore[override]
            shown.append(weakref.ref(pictures := np.zeros((4, 20, 30, 3), np.uint8)))
            return Frames(pictures, seconds, np.arange(4))

    alive = []
    card = visualize_hod.card

    def counted(view: visualize_hod.ClipView) -> Any:
        alive.append(sum(each() is not None for each in shown))
        return card(dataclasses.replace(view, facts=None, boxes=[]))

    monkeypatch.setattr(visualize_hod, "open_videos", Pictures)
    monkeypatch.setattr(visualize_hod, "card", counted)
    assert len(draw("--where", "hand=left,right", "--number", "50")) == 50
    assert len(alive) == 50
    assert max(alive) <= 2


def test_rows_and_filters_contradict_each_other(draw: Callable[..., list[int]]) -> None:
    assert draw("--clips", "5,100") == [4, 99]
    with pytest.raises(UserError, match="--where has no effect"):
        draw("--clips", "5,100", "--where", "hand=left")
    with pytest.raises(UserError, match="500 is no row"):
        draw("--clips", "5,500")
