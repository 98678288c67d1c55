import csv
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.data.table import ClipTable
from egohod.errors import UserError

HEADER = "video_id,start_second,end_second,text\n"


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def table(folder: Path, text: str | bytes) -> ClipTable:
    return read_clips(write(folder / "clips.csv", text))


def test_reads_the_released_columns_and_keeps_the_others(tmp_path: Path) -> None:
    clips = table(
        tmp_path,
        "video_id,start_second,end_second,caption,dataset,uid,verb\n"
        'v1,1.5,4,"#C C cuts, slowly",ego4d,u1,cut\n'
        "P01/P01_01, 2 ,3.25,#C C stirs,howto,u2,007\n",
    )
    first, second = clips.row(0), clips.row(1)
    assert (first.video_id, first.start, first.end, first.texts) == ("v1", 1.5, 4.0, ("#C C cuts, slowly",))
    assert (second.video_id, second.start, second.dataset, second.row) == ("P01/P01_01", 2.0, "howto", 2)
    assert clips.column("uid").tolist() == ["u1", "u2"]
    assert clips.column("verb").tolist() == ["cut", "007"]
    assert clips.column("end_second").tolist() == [4.0, 3.25]
    assert {"uid", "verb", "dataset"} < set(clips.column_names)


def test_a_file_without_dataset_column(tmp_path: Path) -> None:
    assert table(tmp_path, HEADER + "v,0,2,x\n").row(0).dataset == ""


def test_byte_order_mark_newlines_and_crlf(tmp_path: Path) -> None:
    clips = table(tmp_path, ("\ufeff" + HEADER + 'v,0,2,"two\nlines"\nw,0,2,one\n').replace("\nw", "\r\nw"))
    assert clips.row(0).texts == ("two\nlines",)
    assert clips.row(1).video_id == "w"


def test_list_literals(tmp_path: Path) -> None:
    cells = ['["left hand, first", "second"]', "['only']", "[unsure] stirs [it]", "['', ' ']", "[]"]
    path = tmp_path / "clips.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER.strip().split(","))
        writer.writerows(["v", 0, 2, cell] for cell in cells)
    clips = read_clips(path)
    assert [clips.row(i).texts for i in range(len(clips))] == [
        ("left hand, first", "second"),
        ("only",),
        ("[unsure] stirs [it]",),
    ]
    assert clips.report.left_out == {"no narration": 2}


def test_mends_and_counts(tmp_path: Path) -> None:
    rows = ["v,5,3,backwards", "v,5,5.2,short", "v,-0.5,3,early", "v,1,3,", "v,1,3,  ", "v,1,2,fine"]
    clips = table(tmp_path, HEADER + "\n".join(rows) + "\n")
    assert [(clips.row(i).start, clips.row(i).end) for i in range(4)] == [(5, 6), (5, 5.2), (0, 3), (1, 2)]
    report = clips.report
    assert (report.rows, report.short, report.backwards, report.negative_start) == (4, 1, 1, 1)
    assert report.left_out == {"no narration": 2}
    assert "1 shorter than 1 s, 1 ended before they began and were given 1 s" in str(report)
    assert clips.row(3).row == 6  # counted in the file, not in what is left of it


def test_a_narration_of_ten_thousand_characters(tmp_path: Path) -> None:
    text = "stirs the pot " * 715
    assert table(tmp_path, HEADER + f"v,0,2,{text}\n").row(0).texts == (text.strip(),)


FILES: dict[str, tuple[str | bytes, str]] = {
    "empty file": ("", "is empty"),
    "no rows": (HEADER, "no clip with a narration"),
    "only empty narrations": (HEADER + "v,0,2,\n", "no clip with a narration; 1 left out: no narration"),
    "wrong columns": ("video_uid,start_second,end_second,text\nv,0,2,x\n", "'video_id' (did you mean 'video_uid'?)"),
    "no text": ("video_id,start_second,end_second,narrations\nv,0,2,x\n", "no column 'text'"),
    "column twice": ("video_id,video_id,start_second,end_second,text\nv,v,0,2,x\n", "appears twice"),
    "not utf-8": ((HEADER + "v,0,2,x\nv,0,2,café\n").encode("latin-1"), "line 3, byte 0xe9 at column 10"),
    "header not utf-8": ("vidéo,start\n".encode("latin-1"), "not UTF-8"),
    "a binary file": (b"\x00\x01\x02\xff" * 100, "clips.csv"),
}
ROWS: dict[str, tuple[str, str]] = {
    "ragged row": ("v,0,2,x,y", "row 2: 5 columns instead of 4"),
    "short row": ("v,0,2", "row 2: 3 columns instead of 4"),
    "not a number": ("v,zero,2,x", "row 2: start_second is 'zero', not a time"),
    "missing number": ("v,0,,x", "row 2: end_second is ''"),
    "nan": ("v,nan,2,x", "row 2: start_second is 'nan'"),
    "infinite": ("v,0,inf,x", "row 2: end_second is 'inf'"),
    "minutes of minutes": ("v,0:1:2:3,9,x", "row 2: start_second is '0:1:2:3'"),
    "climbing id": ("../secret,0,2,x", "row 2: video_id '../secret' is empty or leads out of the video folder"),
    "climbing inside": ("a/../../b,0,2,x", "row 2"),
    "climbing with backslash": ("..\\b,0,2,x", "row 2"),
    "absolute id": ("/etc/passwd,0,2,x", "leads out of the video folder"),
    "drive letter": ("C:\\videos\\a,0,2,x", "row 2"),
    "empty id": (",0,2,x", "row 2"),
    "before the video": ("v,-7,-3,x", "row 2: the clip ends at -3 s"),
    "no narration": ("v,4,6, ", "row 2: no narration"),
    "duplicate": ("first,0,2,x", "row 2: video 'first' has the same clip and narration before"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_refused_with_their_name(tmp_path: Path, case: str) -> None:
    content, expected = FILES[case]
    with pytest.raises(UserError) as caught:
        table(tmp_path, content)
    assert expected in str(caught.value)
    assert str(tmp_path / "clips.csv") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_left_out_and_counted_or_an_error_if_strict(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    row, expected = ROWS[case]
    path = write(tmp_path / "clips.csv", HEADER + f"first,0,2,x\n{row}\nlast,0,2,x\n")
    clips = read_clips(path)
    assert [(clips.row(i).video_id, clips.row(i).row) for i in range(len(clips))] == [("first", 1), ("last", 3)]
    assert sum(clips.report.left_out.values()) == 1
    assert expected in caplog.text
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        read_clips(path, strict=True)
    assert str(caught.value).startswith(f"{path}: row 2: ")


def test_an_unclosed_quote_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "clips.csv", HEADER + 'u,0,2,x\nv,0,2,"open the door\nw,3,5,cut\nx,6,8,stir\n')
    with pytest.raises(UserError, match=r"row 2: a quote that is not closed swallows .*: 'open the door"):
        read_clips(path, strict=True)
    assert len(read_clips(path)) == 1


def test_times_may_be_clock_times(tmp_path: Path) -> None:
    clips = table(tmp_path, HEADER + "v,00:01:02.5,1:04,x\nv,01:00:00,3602,y\nv, 2.5e0 ,5.,z\n")
    times = [(clips.row(i).start, clips.row(i).end) for i in range(3)]
    assert times == [(62.5, 64.0), (3600.0, 3602.0), (2.5, 5.0)]


def test_columns_in_any_order_under_any_name_with_odd_contents(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    rows = [["2", 'says "cut"\nand waits', "Küche 1/vidéo 2", "0"], ["9", "#C C, stirs", "v2", "7"]]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, lineterminator="\r\n").writerows([["fin", "sentence", "vid", "début"], *rows])
    renamed = {"video_id": "vid", "start_second": "début", "end_second": "fin", "text": "sentence"}
    clips = read_clips(SourceConfig(metadata=str(path), columns=renamed))
    assert clips.row(0).video_id == "Küche 1/vidéo 2"
    assert clips.row(0).texts == ('says "cut"\nand waits',)
    assert (clips.row(1).start, clips.row(1).end) == (7, 9)
    with pytest.raises(UserError, match=r"no column 'sentense' .did you mean 'sentence'"):
        read_clips(SourceConfig(metadata=str(path), columns=renamed | {"text": "sentense"}))
    with pytest.raises(UserError, match=r"columns name 'txet' .did you mean 'text'"):
        read_clips(SourceConfig(metadata=str(path), columns={"txet": "sentence"}))


def test_only_requested_columns_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "clips.csv", "uid,verb,noun," + HEADER + "u,cut,onion,v,0,2,x\n")
    assert set(read_clips(path).column_names) >= {"uid", "verb", "noun"}
    assert "noun" not in read_clips(path, extra=["verb"]).column_names


def test_an_exclude_list_leaves_clips_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "clips.csv", HEADER + "v,0,2,x\nv,3,3.2,y\nw,0,2,z\nw,3,4,a\nw,3,3.2,b\n")
    # The list holds the clip's own times, or those to which short clips were once widened; a clip of just these times
    # is meant itself.
    for end in ("3.2", "4.0"):
        listed = f"v,3.0,{end},no such file\nw,3.0,4.0,no such file\n"
        exclude = write(tmp_path / "bad.csv", "video_id,start_second,end_second,reason\n" + listed)
        clips = read_clips(SourceConfig(metadata=str(path), exclude=str(exclude)))
        assert [clips.row(i).row for i in range(len(clips))] == [1, 3, 5]
        assert clips.report.left_out == {"on the exclude list": 2}
    for content, warned in (("", False), ("x,3.0,4.0\n", True)):
        write(exclude, "video_id,start_second,end_second\n" + content)
        assert len(read_clips(SourceConfig(metadata=str(path), exclude=str(exclude)))) == 5
        assert ("names no clip of this table" in caplog.text) == warned
    for content, expected in (
        ("video,start\n", "not an exclude list"),
        ("video_id,start_second,end_second\nv,x,1\n", "row 1: start_second is 'x', not a time in seconds"),
    ):
        with pytest.raises(UserError, match=expected):
            read_clips(SourceConfig(metadata=str(path), exclude=str(write(exclude, content))))


def test_dots_in_ids_are_not_climbing(tmp_path: Path) -> None:
    assert len(table(tmp_path, HEADER + "a..b,0,2,x\n...,0,2,x\nx.y/z,0,2,x\n")) == 3


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such annotation file"):
        read_clips(tmp_path / "none.csv")
    with pytest.raises(UserError, match="a folder of none of these data sets"):
        read_clips(tmp_path)
    with pytest.raises(UserError, match=r"^s3://\.\.\.: annotations are read from a local disk only"):
        read_clips("s3://bucket/clips.csv?X-Amz-Signature=secret")


def test_group_codes_agree_with_tuples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"v{rng.integers(5)}", int(rng.integers(100)), f"o{rng.integers(3)}") for _ in range(200)]
    lines = "".join(f"{v},{s},{s + 2},text {i},{o}\n" for i, (v, s, o) in enumerate(rows))
    clips = table(tmp_path, HEADER.strip() + ",group\n" + lines)

    def agree(codes: np.ndarray, keys: list[Any]) -> bool:
        return all((codes[i] == codes[j]) == (keys[i] == keys[j]) for i in range(200) for j in range(i))

    assert agree(clips.group_codes(["video"]), [v for v, _, _ in rows])
    assert agree(clips.group_codes(["video", "group"]), [(v, o) for v, _, o in rows])
    assert agree(clips.group_codes(["window"], 20.0), [(v, (s + 1) // 20) for v, s, _ in rows])
    assert clips.group_codes(["group"]).dtype == np.int64


def test_unknown_names_list_the_columns(tmp_path: Path) -> None:
    clips = table(tmp_path, HEADER + "v,0,2,x\n")
    with pytest.raises(UserError, match=r"cannot group clips by 'vidoe' .did you mean 'video"):
        clips.group_codes(["vidoe"])
    with pytest.raises(UserError, match="there are: video_id, text, start_second"):
        clips.column("qqq")
    with pytest.raises(UserError, match="name video, window or a column"):
        clips.group_codes([])


def test_no_python_object_per_row(tmp_path: Path) -> None:
    rows = 50_000
    path = write(tmp_path / "big.csv", HEADER + "".join(f"v{i},{i},{i + 2},text {i}\n" for i in range(rows)))
    before = sys.getallocatedblocks()
    clips = read_clips(path)
    assert sys.getallocatedblocks() - before < rows / 10
    assert clips.row(rows - 1).texts == (f"text {rows - 1}",)


def test_real_annotations_with_columns_of_their_own(shared: Path) -> None:
    """EPIC-KITCHENS (clock times, lists in further columns) and EgoExoLearn (commas, quotes, two languages)."""
    path = shared / "annotations" / "epic-kitchens-100" / "EPIC_100_validation.csv"
    names = {"start_second": "start_timestamp", "end_second": "stop_timestamp", "text": "narration"}
    epic = read_clips(SourceConfig(metadata=str(path), columns=names), strict=True)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(epic) == len(rows) == 9668
    starts = [
        sum(60**i * float(part) for i, part in enumerate(reversed(r["start_timestamp"].split(":")))) for r in rows
    ]
    assert epic.column("start_second").tolist() == pytest.approx(starts)
    for name in ("video_id", "all_nouns"):
        assert epic.column(name).tolist() == [row[name] for row in rows]

    path = shared / "annotations" / "egoexolearn" / "association_exo_train.csv"
    names = {"video_id": "video_uid", "start_second": "start_sec", "end_second": "end_sec", "text": "narration_en"}
    exo = read_clips(SourceConfig(metadata=str(path), columns=names))
    assert (len(exo), exo.report.left_out) == (6268, {"duplicates": 2})
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for i in range(0, len(exo), 100):
        row = exo.row(i)
        assert row.texts == (rows[row.row - 1]["narration_en"].strip(),)
        assert row.start == float(rows[row.row - 1]["start_sec"])
