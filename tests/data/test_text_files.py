"""Text files in the encodings, compressions and spellings that people's programs write."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from egohod.data.chunking import find_videos
from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.data.formats.base import read_csv, read_header, read_json, read_lines
from egohod.data.table import narrations_in
from egohod.errors import UserError
from tests.support import ROOT

NAMES = ["video_id", "start_second", "end_second", "text", "verb_class"]
ROWS = [
    ["Küche 1/v", "0.5", "2.5", 'says "cut", or; what | else', "3"],
    ["w", "10", "12.25", "台所\u2028line\x85end", "14"],
    ["w", "20", "22", "two\nlines", "0"],
]


def text(delimiter: str = ",", names: list[str] = NAMES, rows: list[list[str]] = ROWS, above: str = "") -> str:
    content = io.StringIO(newline="")
    csv.writer(content, delimiter=delimiter).writerows([names, *rows])
    return above + content.getvalue()


def parquet(**columns: object) -> bytes:
    """As pandas writes it, with an index and types."""
    frame = pd.DataFrame(dict(zip(NAMES, zip(*ROWS, strict=True), strict=True)))
    frame = frame.astype({"start_second": float, "end_second": float, "verb_class": int}).assign(**columns)
    file = io.BytesIO()
    frame.set_index(pd.Index([7, 5, 3])).to_parquet(file)
    return file.getvalue()


def indexed(second: str) -> str:
    """Written with its index by pandas, twice."""
    return text(names=["", second, *NAMES], rows=[[str(i), str(9 - i), *row] for i, row in enumerate(ROWS)])


WAYS: dict[str, Callable[[], bytes]] = {
    "commas": lambda: text().encode(),
    "semicolons": lambda: text(";").encode(),
    "bars": lambda: text("|").encode(),
    "tabs": lambda: text("\t").encode(),
    "Excel's line": lambda: text(";", above="sep=;\r\n").encode("utf-8-sig"),
    "byte order mark": lambda: text().encode("utf-8-sig"),
    "UTF-16": lambda: text().encode("utf-16"),
    "UTF-16, big end first": lambda: b"\xfe\xff" + text().encode("utf-16-be"),
    "UTF-16 without mark": lambda: text().encode("utf-16-le"),
    "UTF-32": lambda: text().encode("utf-32"),
    "gzip": lambda: gzip.compress(text().encode()),
    "gzip in two parts": lambda: gzip.compress(text()[:50].encode()) + gzip.compress(text()[50:].encode()),
    "bzip2": lambda: bz2.compress(text().encode()),
    "zstd": lambda: pa.compress(text().encode(), "zstd", asbytes=True),
    "parquet": parquet,
    "parquet of lists and categories": lambda: parquet(
        text=[[row[3]] for row in ROWS], video_id=pd.Categorical([row[0] for row in ROWS])
    ),
    "parquet of durations": lambda: parquet(
        start_second=pd.to_timedelta([float(row[1]) for row in ROWS], unit="s"),
        end_second=pd.to_timedelta([float(row[2]) for row in ROWS], unit="s"),
    ),
    "a blank first line": lambda: text(above="\r\n").encode(),
    "lines of blanks above, within and below": lambda: (
        text(above=" \r\n,,,,\r\n\n").replace("\r\nw,10", "\r\n\r\n  \r\nw,10") + " \n\n"
    ).encode(),
    "upper case": lambda: text(names=["Video_ID", "START_SECOND", " End Second ", "TEXT", "Verb-Class"]).encode(),
    "two indices": lambda: indexed("").encode(),
    "pandas' two indices": lambda: indexed("Unnamed: 0").encode(),
    "all at once": lambda: gzip.compress(
        text(";", names=["Video ID", *NAMES[1:3], "TEXT", "VERB_CLASS"], above="\r\n").encode("utf-16")
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["clips.csv", "clips.csv.gz"])
def test_tables_are_read_whatever_their_program_made_of_them(way: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(WAYS[way]())
    table = read_clips(SourceConfig(metadata=str(path)), strict=False)
    assert table.report.left_out.keys() <= {"malformed"}
    actual = [(row.video_id, row.start, row.end, row.texts) for row in map(table.row, range(len(table)))]
    assert actual == [(video, float(start), float(end), (narration,)) for video, start, end, narration, _ in ROWS]
    assert table.column("verb_class").tolist() == ["3", "14", "0"]
    assert not [column for column in table.column_names if column.startswith("Unnamed")]
    rows = read_csv(path, NAMES)
    assert [narrations_in(cell) for cell in rows["text"]] == [(row[3],) for row in ROWS]
    for column in (0, 4):
        assert rows[NAMES[column]].tolist() == [row[column] for row in ROWS]
    exclude = SourceConfig(metadata=str(path), exclude=str(path))
    with pytest.raises(UserError, match="3 left out: on the exclude list"):
        read_clips(exclude)


def test_decimal_commas_go_with_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_text("video_id;start_second;end_second;text\nv;1,5;00:00:03,25;a, b\n")
    row = read_clips(path).row(0)
    assert (row.start, row.end, row.texts) == (1.5, 3.25, ("a, b",))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["TEXT", "text"], None),  # both are there: each is what it is
        (["Text", "TEXT"], "no column 'text'"),
        (["text", "text"], "column 'text' appears twice"),
    ],
)
def test_columns_that_differ_in_case_only(names: list[str], expected: str | None, tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_text(f"video_id,start_second,end_second,{','.join(names)}\nv,0,2,x,y\n")
    if expected is None:
        table = read_clips(path)
        assert (table.row(0).texts, table.column("TEXT").tolist()) == (("y",), ["x"])
    else:
        with pytest.raises(UserError, match=expected):
            read_clips(path)


def test_a_source_may_name_columns_as_the_file_spells_them(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_text("Video,START,End,TEXT,Kitchen\nv,0,2,x,k\n")
    columns = {"video_id": "Video", "start_second": "START", "end_second": "end", "text": "TEXT"}
    table = read_clips(SourceConfig(metadata=str(path), columns=columns))
    assert table.row(0).texts == ("x",)
    assert table.column("Kitchen").tolist() == ["k"]  # a column of the user's own keeps its name


def test_old_line_ends_are_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_bytes(b"video_id,start_second,end_second,text\rv,0,2,x\rw,0,2,y\r")
    assert len(read_clips(path)) == len(read_csv(path, NAMES[:4])) == 2


STRANGE = {
    "Windows-1252": (b"video_id,start_second,end_second,text\nv,0,2,x\nv,0,2,caf\xe9\n", "line 3, byte 0xe9"),
    "a packed one": (gzip.compress("a,b\né,1\n".encode("latin-1")), "line 2, byte 0xe9"),
    "a workbook": (b"PK\x03\x04" + bytes(60), "save its sheet as csv"),
    "an old workbook": (b"\xd0\xcf\x11\xe0" + bytes(60), "save its sheet as csv"),
    "xz": (b"\xfd7zXZ\x00" + bytes(60), "compress it with gzip"),
    "feather": (b"ARROW1" + bytes(60), "save it as parquet"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html><title>404</title></html>", "a web page"),
    "a pickle": (b"\x80\x04\x95" + bytes(60), "a pickle"),
    "cut gzip": (gzip.compress(text().encode() * 20)[:-30], "cannot be read"),
    "damaged gzip": (gzip.compress(text().encode())[:40] + b"\xff" * 20, "cannot be read"),
    "cut UTF-16": ("video_id,text\nv,x".encode("utf-16")[:-1], "not UTF-16"),
    "cut parquet": (parquet()[:-20], "clips.csv"),
    "empty": (b"", "the file is empty"),
    "blanks": (b"\n \n,,\n", "the file is empty"),
    "packed nothing": (gzip.compress(b""), "the file is empty"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_cannot_be_read_is_named_with_its_cure(case: str, tmp_path: Path) -> None:
    content, expected = STRANGE[case]
    path = tmp_path / "clips.csv"
    path.write_bytes(content)
    for read in (read_clips, lambda path: read_csv(path, ("video_id",))):
        with pytest.raises(UserError) as caught:
            read(path)
        assert expected in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_benchmarks_row_with_too_many_cells_is_named_by_its_number(tmp_path: Path) -> None:
    """pandas would make an index of the first cell, and rows would no longer be numbered."""
    path = tmp_path / "clips.csv"
    for bad, number in (("a,1,x", 1), ("a", 1)):
        path.write_text(f"\nuid,verb_class\n{bad}\nb,2\n")
        with pytest.raises(UserError, match=rf"row {number}: . columns instead of 2"):
            read_csv(path, ("uid",))
    path.write_text("uid,verb_class\nb,2\n\n   \nb,3\n")
    assert read_csv(path, ("uid",)).index.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"row 2: uid 'b' occurs twice"):
        read_csv(path, ("uid",), unique="uid")


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    lines = ["a\u2028b", "c\x85d", "e\x0bf\x0cg\x1ch", "", " i "]
    for end in ("\n", "\r\n", "\r"):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            path.write_bytes((end.join(lines) + end).encode(encoding))
            assert read_lines(path) == lines
    path.write_bytes(b"")
    assert read_lines(path) == []
    path.write_bytes(b"a\nb\xff")
    with pytest.raises(UserError, match="line 2, byte 0xff at column 2"):
        read_lines(path)
    with pytest.raises(UserError, match="No such file"):
        read_lines(tmp_path / "none.txt")


def test_json_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"", b"\xef\xbb\xbf", gzip.compress(b'{"\xc3\xbc": 1}')):
        path.write_bytes(content if content.startswith(b"\x1f") else content + '{"ü": 1}'.encode())
        assert read_json(path) == {"ü": 1}
    path.write_bytes('{"ü": 1}'.encode("utf-16"))
    assert read_json(path) == {"ü": 1}
    for bad in (b"{", b"[" * 100_000, b"\xff{}"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"a\.json: not"):
            read_json(path)


def test_narrations_may_be_packed(tmp_path: Path) -> None:
    narration = {"timestamp_sec": 3.0, "narration_text": "#C C stirs"}
    content = json.dumps({"v": {"narration_pass_1": {"narrations": [narration]}}})
    for name, data in (("a.json.gz", gzip.compress(content.encode())), ("a.json", content.encode("utf-16"))):
        (tmp_path / name).write_bytes(data)
        assert read_clips(tmp_path / name).row(0).texts == ("#C C stirs",)


def test_a_list_of_videos_has_a_name_a_line(tmp_path: Path) -> None:
    name = "a\u2028b.mp4"
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "names.txt").write_text(name + "\n", encoding="utf-16")
    (video,) = find_videos(tmp_path, names=tmp_path / "names.txt")
    assert video.video_id == name.removesuffix(".mp4")
    (tmp_path / "names.txt").write_text("x" * 5000 + "\n")
    with pytest.raises(UserError, match=r"line 1: .* no such file"):
        find_videos(tmp_path, names=tmp_path / "names.txt")


def test_header_of_many_columns(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"column {i}" for i in range(100_000)) + "\n")
    start = time.monotonic()
    for read in (read_clips, lambda path: read_csv(path, ("video_id",))):
        with pytest.raises(UserError, match="video_id"):
            read(path)
    assert time.monotonic() - start < 5
    path.write_text(",".join(f'"a\n{i}"' for i in range(500)) + "\n")
    header = read_header(path)
    assert (len(header.names), header.lines) == (500, 501)


MEASURE = """
import resource, sys, egohod.data.formats as t
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = len(t.read_clips(sys.argv[1], extra=[]))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_packed_and_wide_text_is_streamed(tmp_path: Path) -> None:
    """A table of 150 MB in UTF-16, of which a tenth is requested, is never in memory as a whole."""
    path = tmp_path / "clips.csv.gz"
    row = "v,{0},{1},x{0}," + "much else " * 100 + "\n"
    with gzip.open(path, "wt", encoding="utf-16", compresslevel=1) as file:
        file.write("video_id,start_second,end_second,text,more\n")
        file.writelines(row.format(i, i + 2) for i in range(75_000))
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    rows, grown = map(int, run.stdout.split())
    assert rows == 75_000
    assert grown < 150


def test_a_header_of_very_many_columns_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"c{i}" for i in range(50_000)) + ",c7\n")
    began = time.process_time()
    with pytest.raises(UserError, match="column 'c7' appears twice"):
        read_header(path)
    assert time.process_time() - began < 5
