"""One test per format on files as they are released, and what happens to bad ones."""

import csv
import gzip
import json
import os
import pickle
import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.data.table import ClipTable
from egohod.errors import UserError

EGOCLIP = "video_uid\tnarration_source\tnarration_time\tclip_start\tclip_end\tclip_text\ttag_verb\ttag_noun\n"


def read(path: Path, **options: object) -> ClipTable:
    return read_clips(SourceConfig(metadata=str(path), **options), strict=True)  # type: ignore[arg-type]


def clips(table: ClipTable) -> list[tuple[str, float, float, tuple[str, ...]]]:
    return [(row.video_id, row.start, row.end, row.texts) for row in map(table.row, range(len(table)))]


def test_egoclip(tmp_path: Path) -> None:
    path = tmp_path / "egoclip.csv"
    lines = 'a-1\tpass_1\t3.0\t2.0\t4.0\t#C C cuts the "red" onion\t[3]\t[5, 7]\n'
    path.write_text(EGOCLIP + lines + "a-1\tpass_2\t9.0\t8.5\t9.25\t#C C looks\t[1]\t[]\n")
    table = read(path)
    assert clips(table) == [
        ("a-1", 2.0, 4.0, ('#C C cuts the "red" onion',)),
        ("a-1", 8.5, 9.25, ("#C C looks",)),
    ]
    assert table.column("tag_noun").tolist() == ["[5, 7]", "[]"]


# --------------------------------------------------------------------------------------------------
# What every format must bear
# --------------------------------------------------------------------------------------------------

Entry = tuple[str, float | str, float | str, str]
NAMES = {
    "hod": ["video_id", "start_second", "end_second", "text"],
    "egoclip": ["video_uid", "clip_start", "clip_end", "clip_text"],
}


def write_text(path: Path, name: str, entries: Sequence[Entry], names: Sequence[str] | None = None) -> None:
    """With a byte order mark, CRLF, a further column in front, and all others in reverse."""
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t" if name == "egoclip" else ",", lineterminator="\r\n")
        writer.writerow(["more", *reversed(names or NAMES[name])])
        writer.writerows(["...", *reversed(entry)] for entry in entries)


def write_hod(path: Path, entries: Sequence[Entry]) -> None:
    write_text(path, "hod", entries)


def write_egoclip(path: Path, entries: Sequence[Entry]) -> None:
    write_text(path, "egoclip", entries)


def write_pickle(path: Path, entries: Sequence[Entry]) -> None:
    path.write_bytes(pickle.dumps([(*entry, {"more": 1.0}) for entry in entries]))


def write_ego4d(path: Path, entries: Sequence[Entry]) -> None:
    """The start is the moment; the end follows from the rule."""
    content: dict[str, dict[str, dict[str, list[dict[str, object]]]]] = {}
    for video, stamp, _, text in entries:
        narration = {"timestamp_sec": stamp, "narration_text": text, "more": 1}
        content.setdefault(video, {"narration_pass_1": {"narrations": []}})["narration_pass_1"]["narrations"] += [
            narration
        ]
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")


FORMATS: dict[str, tuple[str, str, Callable[[Path, Sequence[Entry]], None]]] = {
    "hod": ("clips.csv", "row", write_hod),
    "egoclip": ("egoclip.csv", "row", write_egoclip),
    "pickle": ("clips.pkl", "entry", write_pickle),
    "ego4d": ("narration.json", "narration", write_ego4d),
}


@pytest.mark.parametrize("name", FORMATS)
def test_odd_but_good_entries(name: str, tmp_path: Path) -> None:
    file, _, write = FORMATS[name]
    entries: list[Entry] = [
        ("Küche 1/vidéo 2", "00:01:02.5", "1:04", 'says "cut",\nthen\twaits'),
        ("Küche 1/vidéo 2", 3.5, "5", "台所 #C C's"),
        ("a b", "1e1", 12.25, "#C C stirs"),
        ("a b", -0.25, 2, "#C C begins before the video"),
    ]
    write(tmp_path / file, entries)
    table = read(tmp_path / file)
    assert [(row.video_id, row.texts) for row in map(table.row, range(4))] == [(v, (t,)) for v, _, _, t in entries]
    assert table.report.left_out == {}
    assert table.report.negative_start == 1
    assert table.row(3).start == 0
    times = [(row.start, row.end) for row in map(table.row, range(3))]
    if name == "ego4d":
        assert [(start + end) / 2 for start, end in times] == [62.5, 3.5, 10.0]
    else:
        assert times == [(62.5, 64.0), (3.5, 5.0), (10.0, 12.25)]


@pytest.mark.parametrize("name", FORMATS)
def test_bad_entries_are_left_out_counted_and_named_or_stop_if_strict(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, unit, write = FORMATS[name]
    path = tmp_path / file
    bad: list[tuple[Entry, str]] = [
        (("v", "soon", 5, "y"), "is 'soon', not a time in seconds or HH:MM:SS"),
        (("v", -9, -5, "y"), "the clip ends at -"),
        (("v", 10, 12, "x"), "video 'v' has the same clip and narration before"),
        (("v", 30, 32, " "), "no narration"),
        (("../v", 20, 22, "y"), "video_id '../v' is empty or leads out of the video folder"),
    ]
    write(path, [("v", 10, 12, "x"), *(entry for entry, _ in bad)])
    table = read_clips(path)
    assert [row.texts for row in map(table.row, range(len(table)))] == [("x",)]
    assert sum(table.report.left_out.values()) == 5
    for number, (_, expected) in enumerate(bad, 2):
        assert re.search(rf"{re.escape(str(path))}: {unit} {number}: .*{re.escape(expected)}", caplog.text)
    for entry, expected in bad:
        write(path, [("v", 10, 12, "x"), entry])
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: {unit} 2: .*{re.escape(expected)}[^\n]*$"):
            read(path)


@pytest.mark.parametrize("name", NAMES)
def test_columns_may_be_renamed_but_not_be_missing(name: str, tmp_path: Path) -> None:
    path, entries = tmp_path / "clips.csv", [("v", 1, 3, "x")]
    renamed = dict(zip(NAMES["hod"], ["clip", "begin", "finish", "said"], strict=True))
    write_text(path, name, entries, list(renamed.values()))
    assert clips(read(path, format=name, columns=renamed)) == [("v", 1.0, 3.0, ("x",))]
    for missing in range(4):
        names = [f"other_{i}" if i == missing else column for i, column in enumerate(NAMES[name])]
        write_text(path, name, entries, names)
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: no column '{NAMES[name][missing]}'"):
            read(path, format=name)


def narrations(*stamps: float, text: str = "#C C stirs") -> dict[str, object]:
    return {"narrations": [{"timestamp_sec": t, "narration_text": f"{text} {t}"} for t in stamps], "summaries": []}


def test_ego4d_clips_by_the_published_rule(tmp_path: Path) -> None:
    """Video a: spacings 4 and 8, mean 6; video b: one spacing of 12; so alpha is 9, and a's clips last 6/9 s."""
    path = tmp_path / "narration.json"
    content = {
        "a": {"status": "complete", "narration_pass_1": narrations(2.0, 6.0, 14.0)},
        "b": {"narration_pass_1": narrations(30.0, 18.0), "narration_pass_2": narrations(40.0)},
    }
    path.write_text(json.dumps(content))
    table = read(path)
    stamps = [2.0, 6.0, 14.0, 30.0, 18.0, 40.0]
    lengths = np.array([6, 6, 6, 12, 12, 9]) / 9
    for i, (stamp, length) in enumerate(zip(stamps, lengths, strict=True)):
        row = table.row(i)
        assert row.texts == (f"#C C stirs {stamp}",)
        half = max(length, 1.0) / 2  # none is shorter than a second
        assert (row.start, row.end) == pytest.approx((stamp - half, stamp + half))


def test_ego4d_clips_by_the_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "narration.json"
    path.write_text(json.dumps({"videos": {"a": {"narration_pass_1": narrations(2.0, 6.0, 14.0)}}}))
    table = read(path, clip_rule="neighbours")
    spacing = np.array([4, 6, 8]) / 6
    half = np.maximum(spacing, 1) / 2
    assert [table.row(i).start for i in range(3)] == pytest.approx(np.array([2, 6, 14]) - half)
    assert [table.row(i).end for i in range(3)] == pytest.approx(np.array([2, 6, 14]) + half)


def test_a_narration_that_is_no_narration_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "narration.json"
    good = narrations(2.0, 6.0)
    good["narrations"].insert(1, {"timestamp_sec": 3.0})  # type: ignore[attr-defined]
    path.write_text(json.dumps({"a": {"narration_pass_1": good}}))
    table = read_clips(path)
    assert len(table) == 2
    assert table.where(1) == f"{path}: narration 3"
    assert "narration 2: video 'a': has no timestamp_sec and narration_text" in caplog.text
    with pytest.raises(UserError, match="narration 2"):
        read(path)


def test_times_of_narrations_may_be_text_and_the_file_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "narration.json"
    entries = [{"timestamp_sec": t, "narration_text": f"{t}"} for t in (4.5, "00:00:09", "13.5", "soon")]
    path.write_text("\ufeff" + json.dumps({"a": {"narration_pass_1": {"narrations": entries}}}), encoding="utf-8")
    table = read_clips(path)
    assert [(table.row(i).start + table.row(i).end) / 2 for i in range(len(table))] == pytest.approx([4.5, 9.0, 13.5])
    with pytest.raises(UserError, match="narration 4: timestamp_sec is 'soon'"):
        read(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "no narrations"),
        ('{"a": {}}', "no narrations"),
        ('{"a": {"b": 1}, "c', "not JSON"),
    ],
)
def test_json_that_is_no_narration_file(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "narration.json"
    path.write_text(content)
    with pytest.raises(UserError, match=expected):
        read(path)


def test_pickle(tmp_path: Path) -> None:
    path = tmp_path / "ego4d_train.pkl"
    rows = [
        ("v1", 1.5, 4.0, "#C C cuts"),
        ("v2", np.float64(3), np.float32(9.5), ["#C C stirs", "#C C's spoon, turns"]),
        ["v3", 0, 2, ("one",)],
        (np.str_("küche"), np.int16(7), np.array(9.5, ">f8")[()], np.str_("台所")),
    ]
    path.write_bytes(pickle.dumps(rows))
    table = read(path)
    assert clips(table) == [
        ("v1", 1.5, 4.0, ("#C C cuts",)),
        ("v2", 3.0, 9.5, ("#C C stirs", "#C C's spoon, turns")),
        ("v3", 0.0, 2.0, ("one",)),
        ("küche", 7.0, 9.5, ("台所",)),
    ]


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, ("touch ran",)


def test_a_pickle_that_would_run_code_is_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "clips.pkl"
    path.write_bytes(pickle.dumps([("v", 0, 2, Hostile())]))
    with pytest.raises(UserError, match=r"refused: it asks for (posix|nt)\.system"):
        read(path)
    assert not (tmp_path / "ran").exists()


def test_numbers_of_made_up_types_are_refused(tmp_path: Path) -> None:
    """NumPy itself would build them, and with them read and write where it should not."""
    path = tmp_path / "clips.pkl"
    odd = np.zeros(1, np.dtype([("a", "f8"), ("b", "f8")]))[0]
    for value in (odd, np.datetime64("2020-01-01"), np.longdouble(1)):
        path.write_bytes(pickle.dumps([("v", 0, value, "x")]))
        with pytest.raises(UserError, match=r"not a readable pickle .*is no plain number or text"):
            read(path)


def test_pickles_that_are_no_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "clips.pkl"
    for content, expected in ((b"nothing", "not a readable pickle"), (pickle.dumps({"a": 1}), "holds no list")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=expected):
            read(path)
    path.write_bytes(
        pickle.dumps([("v", 0, 2, "x"), ("v", 1), ("v", "soon", 5, "y"), ("v", 1, 3, None), ("\ud800", 1, 3, "z")])
    )
    assert len(read_clips(path)) == 1
    assert "entry 2: " in caplog.text
    assert "entry 3: start is 'soon'" in caplog.text


def test_the_format_can_be_given_instead_of_detected(tmp_path: Path) -> None:
    path = tmp_path / "clips.data"
    path.write_bytes(pickle.dumps([("v", 0, 2, "x")]))
    assert len(read(path, format="pickle")) == 1
    with pytest.raises(UserError):
        read(path)


def test_tabs_separate_columns_as_well(tmp_path: Path) -> None:
    path = tmp_path / "clips.tsv"
    path.write_text("video_id\tstart_second\tend_second\ttext\nv\t0\t2\tcuts, slowly\n")
    assert clips(read(path)) == [("v", 0.0, 2.0, ("cuts, slowly",))]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 50_000 + "]" * 50_000])
def test_json_that_nests_without_end_is_refused_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "narration.json"
    path.write_text(f'{{"v": {text}')
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="not JSON"):
            read_clips(SourceConfig(metadata=str(path), format="ego4d"))
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


def test_open_brackets_in_narrations_are_text(tmp_path: Path) -> None:
    path = tmp_path / "narration.json"
    written = [{"timestamp_sec": i, "narration_text": f"#C C opens {{ the [ {i}"} for i in range(1000)]
    path.write_text(json.dumps({"v": {"narration_pass_1": {"narrations": written}}}))
    assert len(read_clips(SourceConfig(metadata=str(path)))) == 1000


def test_json_nested_without_end_is_refused_before_it_takes_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "narration.json"
    for deep in ("[" * 100_000, '{"a":' * 100_000):
        path.write_text(deep)
        with pytest.raises(UserError, match="nested deeper than 100 levels"):
            read_clips(path)
    # What only looks like nesting, across the borders of blocks.
    long_text = 'says "[[{" \\ ' * 20_000
    path.write_text(json.dumps({"v": {"narration_pass_1": narrations(2.0, 6.0, text=long_text)}}))
    assert read_clips(path).row(1).texts == (f"{long_text} 6.0",)


@pytest.mark.parametrize(
    "content",
    ['{"v": {"'.encode("utf-16")[:-1], gzip.compress(b'{"v": {}}' * 99, mtime=0)[:-20]],
    ids=["utf-16", "gzip"],
)
def test_narrations_that_are_cut_off_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "narration.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"narration\.json: "):
        read_clips(SourceConfig(metadata=str(path), format="ego4d"))
