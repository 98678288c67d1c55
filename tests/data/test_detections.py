"""Boxes of hands and objects: read from the schema, looked up by time, and carried through crop and flip."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from show_batch import sheet

from egohod.data import detections
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, Tokenizer, collate, crop_boxes, flip_boxes
from egohod.data.detections import LEFT, NO_CONTACT, PORTABLE_OBJECT, RIGHT, ROLE_COLOURS, SCHEMA, BoxTable
from egohod.data.formats import read_clips
from egohod.errors import UserError


def row(second: float, kind: str = "hand", side: int = LEFT, left: float = 0.1, **more: object) -> dict[str, object]:
    box = {"left": left, "top": 0.2, "right": left + 0.1, "bottom": 0.4}
    where = {"video_id": "v", "frame_number": round(second * 10), "second": second}
    what = {"kind": kind, "side": side if kind == "hand" else -1, "state": NO_CONTACT, "score": 0.5}
    return dict.fromkeys(SCHEMA.names) | where | what | box | more


def table(*rows: dict[str, object]) -> BoxTable:
    return BoxTable(pa.Table.from_pylist(list(rows), SCHEMA).to_pandas())


def test_the_nearest_moment_answers_and_far_ones_do_not() -> None:
    boxes = table(row(1.0, left=0.1), row(1.2, left=0.5), row(0.0, left=0.9, video_id="w", side=RIGHT))
    actual = boxes.at("v", np.array([0.0, 0.95, 1.09, 1.11, 1.25, 1.31]))
    assert actual.shape == (6, 3, 4)
    np.testing.assert_allclose(actual[1:5, 0, 0], [0.1, 0.1, 0.5, 0.5])
    assert np.isnan(actual[[0, 5]]).all()
    assert np.isnan(actual[:, 1:]).all()
    np.testing.assert_allclose(boxes.at("w", np.array([0.05]))[0, 1], [0.9, 0.2, 1.0, 0.4])
    assert np.isnan(boxes.at("nowhere", np.array([1.0]))).all()


def test_the_surest_hand_counts_and_the_object_a_hand_points_to() -> None:
    sure, unsure = row(1.0, left=0.3, score=0.9), row(1.0, left=0.1, score=0.2)
    near, far = (row(1.0, "object", left=left, score=score) for left, score in ((0.5, 0.3), (0.8, 0.8)))
    assert table(unsure, sure).at("v", np.ones(1))[0, 0, 0] == pytest.approx(0.3)
    # No hand touches anything: the surest object is the active one.
    assert table(sure, near, far).at("v", np.ones(1))[0, 2, 0] == pytest.approx(0.8)
    pointing = sure | {"state": PORTABLE_OBJECT, "offset_x": 0.2, "offset_y": 0.0}
    assert table(pointing, near, far).at("v", np.ones(1))[0, 2, 0] == pytest.approx(0.5)


def test_a_folder_of_files_is_one_table(tmp_path: Path) -> None:
    for name in ("a", "b"):
        detections.write(pa.Table.from_pylist([row(0.0, video_id=name)], SCHEMA), tmp_path / f"{name}.parquet")
    boxes = BoxTable.read(tmp_path)
    assert len(boxes) == 2
    assert np.isfinite(boxes.at("b", np.zeros(1))[0, 0]).all()
    # What a killed process left, before its file got its name.
    (tmp_path / ".tmp-1-0-half.parquet").write_bytes(b"PAR1")
    assert len(detections.read(tmp_path)) == 2


def test_mistakes_name_the_file_and_the_row(tmp_path: Path) -> None:
    path = tmp_path / "boxes.parquet"

    def refuses(pattern: str) -> None:
        with pytest.raises(UserError, match=re.escape(str(path)) + pattern):
            BoxTable.read(path)

    refuses(": not readable as parquet")
    path.write_bytes(b"PAR1 but no more")
    refuses(": not readable as parquet")
    good = pd.DataFrame([row(0.0)])
    good.drop(columns=["side", "top"]).to_parquet(path)
    refuses(": lacks the columns side, top")
    good.assign(side="left").to_parquet(path)
    refuses(": a column is of another type")
    pd.concat([good, good.assign(right=1.2)]).to_parquet(path)
    refuses(": row 2 is no box")
    with pytest.raises(UserError, match="holds no parquet file"):
        BoxTable.read(tmp_path / "..")


def test_crops_and_flips_take_the_boxes_along() -> None:
    boxes = np.array([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.5, 0.75, 0.75], [0.9, 0.9, 1.0, 1.0]]], dtype=np.float32)
    cropped = crop_boxes(boxes, (0, 50, 80, 100), height=100, width=200)
    np.testing.assert_allclose(cropped[0, 0], [0, 0, 0.5, 1])
    np.testing.assert_allclose(cropped[0, 1], [0.5, 0.625, 1, 0.9375])
    assert np.isnan(cropped[0, 2]).all(), "what lies outside of the crop is unknown"
    mirrored = flip_boxes(cropped)
    np.testing.assert_allclose(mirrored[0, 1], [0.5, 0, 1, 1])
    np.testing.assert_allclose(mirrored[0, 0], [0, 0.625, 0.5, 0.9375])


def test_training_clips_carry_the_boxes_of_their_frames(demo_world: Path) -> None:
    source = SourceConfig(
        metadata=str(demo_world / "train" / "hod.csv"),
        root=str(demo_world / "train" / "videos"),
        detections=str(demo_world / "train" / "detections.parquet"),
    )
    options = {"size": 40, "num_frames": 8, "tokenizer": Tokenizer(), "train": True}
    clips = read_clips(source)
    plain, flipped = (ClipDataset([(clips, source)], flip=flip, boxes=True, **options) for flip in (0.0, 1.0))
    batch = collate([plain[0, index] for index in range(8)])
    assert batch["boxes"].shape == (8, 8, 3, 4)
    for index, boxes in enumerate(batch["boxes"].numpy()):
        hand = ("left", "right").index(clips.column("hand")[index])
        assert np.isfinite(boxes[:, hand]).all(axis=1).any()
        np.testing.assert_allclose(flipped[0, index]["boxes"], flip_boxes(boxes), atol=1e-6)
    without = SourceConfig(metadata=source.metadata, root=source.root)
    assert ClipDataset([(clips, without)], boxes=True, **options)[0, 0]["boxes"].isnan().all()
    assert "boxes" not in ClipDataset([(clips, source)], **options)[0, 0]


def test_the_picture_of_a_batch_shows_the_boxes(demo_world: Path) -> None:
    source = SourceConfig(
        metadata=str(demo_world / "train" / "hod.csv"),
        root=str(demo_world / "train" / "videos"),
        detections=str(demo_world / "train" / "detections.parquet"),
    )
    options = {"size": 40, "num_frames": 4, "tokenizer": Tokenizer(), "train": True}
    seen = []
    for boxes in (True, False):
        view = ClipDataset([(read_clips(source), source)], boxes=boxes, **options).view((0, 0))
        colours = {colour for _, colour in sheet([("one", view)]).getcolors(1 << 24)}
        seen.append(ROLE_COLOURS[2] in colours)
    assert seen == [True, False]


def test_texts_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """A damaged file: Arrow reads the bytes as they are."""
    path = tmp_path / "boxes.parquet"
    row = {"video_id": "v", "frame_number": 0, "second": 0.0, "kind": "object", "side": -1, "state": -1, "score": 1.0}
    row |= {"left": 0.1, "top": 0.1, "right": 0.2, "bottom": 0.2, "name": "a long name of a cup"}
    detections.write(pa.Table.from_pylist([row], SCHEMA), path)
    content = path.read_bytes()
    assert content.count(b"a long name") >= 1
    path.write_bytes(content.replace(b"a long name", b"\xff long name"))
    with pytest.raises(UserError, match=r"boxes\.parquet: a column is of another type: .*UTF8"):
        detections.read(path)


def test_names_of_columns_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "boxes.parquet"
    pa.parquet.write_table(pa.table({"video_id": ["v"], "a_column": [1]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"a_column", b"\xff_column"))
    with pytest.raises(UserError, match=r"boxes\.parquet: not readable as parquet: .*utf-8"):
        detections.read(path)
