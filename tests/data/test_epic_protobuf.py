"""EPIC-KITCHENS' hand-object files: our table to them and back, and files that must not be believed."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from egohod.data import detections
from egohod.data.detections import LEFT, NO_CONTACT, PORTABLE_OBJECT, RIGHT, SCHEMA, UNKNOWN_STATE
from egohod.errors import UserError


def row(frame: int, kind: str = "hand", fps: float = 50.0, **more: object) -> dict[str, object]:
    where = {"video_id": "P01_01", "frame_number": frame, "second": (frame + 0.5) / fps, "kind": kind, "score": 0.75}
    box = {"left": 0.25, "top": 0.5, "right": 0.5, "bottom": 0.75}
    of_kind = {"side": LEFT, "state": NO_CONTACT} if kind == "hand" else {"side": -1, "state": UNKNOWN_STATE}
    return dict.fromkeys(SCHEMA.names) | where | box | of_kind | more


def test_a_table_survives_the_way_to_the_protobuf_and_back(tmp_path: Path) -> None:
    touching = {"side": RIGHT, "state": PORTABLE_OBJECT, "offset_x": 0.125, "offset_y": -0.25}
    rows = [row(3), row(3, **touching), row(3, "object", left=0.0), row(10, "object", right=1.0)]
    table = pa.Table.from_pylist([*rows, row(0, video_id="P01_02")], SCHEMA)
    first, second = detections.write_epic(table, tmp_path / "new")
    assert (first.name, second.name) == ("P01_01.pkl", "P01_02.pkl")
    assert detections.read_epic(first, fps=50).to_pylist() == rows


def test_bytes_are_those_of_the_published_schema(tmp_path: Path) -> None:
    """Encoded from the field numbers of types.proto: a hand of the right side in frame 4."""
    box = b"\x0d\x00\x00\x80\x3e\x15\x00\x00\x00\x3f\x1d\x00\x00\x00\x3f\x25\x00\x00\x40\x3f"
    offset = b"\x0d\x00\x00\x00\x3e\x15\x00\x00\x80\xbe"
    hand = b"\x0a\x14" + box + b"\x15\x00\x00\x40\x3f" + b"\x18\x03" + b"\x22\x0a" + offset + b"\x28\x01"
    message = b"\x0a\x06P01_01" + b"\x10\x04" + b"\x1a" + bytes([len(hand)]) + hand
    path = tmp_path / "P01_01.pkl"
    path.write_bytes(pickle.dumps([message]))
    touching = {"side": RIGHT, "state": PORTABLE_OBJECT, "offset_x": 0.125, "offset_y": -0.25}
    table = detections.read_epic(path, fps=50)
    assert table.to_pylist() == [row(3, **touching)]
    (written,) = detections.write_epic(table, tmp_path / "again")
    assert pickle.loads(written.read_bytes()) == [message]


def test_an_unknown_state_is_written_as_no_contact(tmp_path: Path) -> None:
    (path,) = detections.write_epic(pa.Table.from_pylist([row(0, state=UNKNOWN_STATE)], SCHEMA), tmp_path)
    assert detections.read_epic(path, fps=50).column("state").to_pylist() == [NO_CONTACT]


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("exploded"),)


def test_files_that_are_not_what_they_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "P01_01.pkl"
    table = pa.Table.from_pylist([row(frame) for frame in range(50)], SCHEMA)
    whole = detections.write_epic(table, tmp_path)[0].read_bytes()
    messages = pickle.loads(whole)

    def refuses(content: bytes, pattern: str) -> None:
        path.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + pattern):
            detections.read_epic(path, fps=50)

    for size in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        refuses(whole[:size], "cut off|damaged")
    refuses(b"no pickle at all", "cut off|damaged")
    refuses(pickle.dumps([messages[0], messages[1][:-3]]), "message 2 of 2 is cut off")
    refuses(pickle.dumps({"P01_01": messages}), "instead of a list of messages")
    refuses(pickle.dumps([1, 2]), "instead of a list of messages")
    refuses(pickle.dumps([_Bomb()]), "nothing in it was run")
    refuses(pickle.dumps(np.zeros(3)), "nothing in it was run")
    assert not Path("exploded").exists()
    detections.write_epic(pa.Table.from_pylist([row(0), row(1, right=456.0)], SCHEMA), tmp_path)
    refuses(path.read_bytes(), "row 2 is no box")
    with pytest.raises(UserError, match="No such file"):
        detections.read_epic(tmp_path / "absent.pkl", fps=50)
    with pytest.raises(UserError, match="cannot name a file"):
        detections.write_epic(pa.Table.from_pylist([row(0, video_id="../up")], SCHEMA), tmp_path)


def test_class_names_survive_parquet_and_old_files_lack_them(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row(0, "object", name="cup")], SCHEMA)
    detections.write(table, tmp_path / "new.parquet")
    assert detections.read(tmp_path / "new.parquet").column("name").to_pylist() == ["cup"]
    pa.parquet.write_table(table.drop_columns(["name"]), tmp_path / "old.parquet")
    assert detections.read(tmp_path / "old.parquet").column("name").to_pylist() == [None]
