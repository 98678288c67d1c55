import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egohod.config import UserError
from egohod.data.table import ClipTable, TableError

HEADER = "video_id,start_second,end_second,text\n"


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def table(folder: Path, text: str | bytes) -> ClipTable:
    return ClipTable.read(write(folder / "clips.csv", text))


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
    assert clips.column_names[-1] == "verb"


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
    clips = ClipTable.read(path)
    assert [clips.row(i).texts for i in range(len(clips))] == [
        ("left hand, first", "second"),
        ("only",),
        ("[unsure] stirs [it]",),
    ]
    assert clips.report.empty == 2


def test_mends_and_counts(tmp_path: Path) -> None:
    rows = ["v,5,3,backwards", "v,5,5.2,short", "v,-0.5,3,early", "v,1,3,", "v,1,3,  ", "v,1,2,fine"]
    clips = table(tmp_path, HEADER + "\n".join(rows) + "\n")
    assert [(clips.row(i).start, clips.row(i).end) for i in range(4)] == [(5, 6), (5, 6), (0, 3), (1, 2)]
    report = clips.report
    assert (report.rows, report.widened, report.negative_start, report.empty) == (4, 2, 1, 2)
    assert "2 widened to 1 s" in str(report)
    assert clips.row(3).row == 6  # counted in the file, not in what is left of it


def test_a_narration_of_ten_thousand_characters(tmp_path: Path) -> None:
    text = "stirs the pot " * 715
    assert table(tmp_path, HEADER + f"v,0,2,{text}\n").row(0).texts == (text.strip(),)


BAD: dict[str, tuple[str | bytes, str]] = {
    "empty file": ("", "is empty"),
    "no rows": (HEADER, "no clip with a narration"),
    "only empty narrations": (HEADER + "v,0,2,\n", "no clip with a narration"),
    "wrong columns": ("video_uid,start_second,end_second,text\nv,0,2,x\n", "'video_id' (did you mean 'video_uid'?)"),
    "no text": ("video_id,start_second,end_second,narrations\nv,0,2,x\n", "no column 'text'"),
    "column twice": ("video_id,video_id,start_second,end_second,text\nv,v,0,2,x\n", "appears twice"),
    "tab separated": ("video_id\tstart_second\tend_second\ttext\nv\t0\t2\tx\n", "no column 'video_id'"),
    "ragged row": (HEADER + "v,0,2,x\nv,0,2,x,y\n", "#3: Expected 4 columns, got 5"),
    "not a number": (HEADER + "v,0,2,x\nv,zero,2,x\n", "row 2: start_second is 'zero'"),
    "missing number": (HEADER + "v,0,,x\n", "row 1: end_second is ''"),
    "nan": (HEADER + "v,0,2,x\nv,nan,2,x\n", "row 2: start_second is 'nan'"),
    "infinite": (HEADER + "v,0,inf,x\n", "row 1: end_second is 'inf'"),
    "not utf-8": ((HEADER + "v,0,2,x\nv,0,2,café\n").encode("latin-1"), "line 3, byte 0xe9 at column 10"),
    "header not utf-8": ("vidéo,start\n".encode("latin-1"), "not UTF-8"),
    "climbing id": (HEADER + "v,0,2,x\n../secret,0,2,x\n", "row 2: video_id '../secret'"),
    "climbing inside": (HEADER + "a/../../b,0,2,x\n", "row 1"),
    "climbing with backslash": (HEADER + "..\\b,0,2,x\n", "row 1"),
    "absolute id": (HEADER + "/etc/passwd,0,2,x\n", "leads out of the video folder"),
    "drive letter": (HEADER + "C:\\videos\\a,0,2,x\n", "row 1"),
    "empty id": (HEADER + ",0,2,x\n", "row 1"),
    "a binary file": (b"\x00\x01\x02\xff" * 100, "clips.csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_file_and_row(tmp_path: Path, case: str) -> None:
    content, said = BAD[case]
    with pytest.raises(TableError) as caught:
        table(tmp_path, content)
    assert said in str(caught.value)
    assert str(tmp_path / "clips.csv") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_dots_in_ids_are_not_climbing(tmp_path: Path) -> None:
    assert len(table(tmp_path, HEADER + "a..b,0,2,x\n...,0,2,x\nx.y/z,0,2,x\n")) == 3


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such annotation file"):
        ClipTable.read(tmp_path / "none.csv")
    with pytest.raises(TableError, match="cannot be read"):
        ClipTable.read(tmp_path)


def test_group_codes_agree_with_tuples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"v{rng.integers(5)}", int(rng.integers(100)), f"o{rng.integers(3)}") for _ in range(200)]
    lines = "".join(f"{v},{s},{s + 2},x,{o}\n" for v, s, o in rows)
    clips = table(tmp_path, HEADER.strip() + ",group\n" + lines)

    def agree(codes: np.ndarray, keys: list[Any]) -> bool:
        return all((codes[i] == codes[j]) == (keys[i] == keys[j]) for i in range(200) for j in range(i))

    assert agree(clips.group_codes(["video"]), [v for v, _, _ in rows])
    assert agree(clips.group_codes(["video", "group"]), [(v, o) for v, _, o in rows])
    assert agree(clips.group_codes(["window"], 20.0), [(v, (s + 1) // 20) for v, s, _ in rows])
    assert clips.group_codes(["group"]).dtype == np.int64


def test_unknown_names_list_the_columns(tmp_path: Path) -> None:
    clips = table(tmp_path, HEADER + "v,0,2,x\n")
    with pytest.raises(TableError, match=r"cannot group clips by 'vidoe' .did you mean 'video"):
        clips.group_codes(["vidoe"])
    with pytest.raises(TableError, match="there are: video_id, start_second"):
        clips.column("qqq")
    with pytest.raises(TableError, match="name video, window or a column"):
        clips.group_codes([])


def test_no_python_object_per_row(tmp_path: Path) -> None:
    rows = 50_000
    path = write(tmp_path / "big.csv", HEADER + "".join(f"v{i},{i},{i + 2},text {i}\n" for i in range(rows)))
    before = sys.getallocatedblocks()
    clips = ClipTable.read(path)
    assert sys.getallocatedblocks() - before < rows / 10
    assert clips.row(rows - 1).texts == (f"text {rows - 1}",)
