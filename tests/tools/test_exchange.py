"""Boxes go to CVAT and Label Studio and come back; clips to FiftyOne and tracks to Rerun, read with those libraries."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import exchange
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from egohod import cli
from egohod.data import detections
from egohod.data.detections import EDGES, LEFT, PORTABLE_OBJECT, RIGHT, SCHEMA, BoxTable
from egohod.evaluation.results import FORMAT

CHUNK, CHUNKS = 180, 3  # frames of the demo's chunks of 15 s

# As CVAT exports a job of a video: every frame is listed, those between key frames with keyframe="0"; coordinates have
# two decimals; what is outside is not listed until it is back.
CVAT_VIDEO = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <job>
      <id>12</id><size>9</size><mode>interpolation</mode><overlap>0</overlap><bugtracker></bugtracker>
      <start_frame>0</start_frame><stop_frame>8</stop_frame><frame_filter></frame_filter>
      <labels><label><name>left hand</name><color>#2878e6</color><type>rectangle</type></label></labels>
    </job>
    <original_size><width>160</width><height>120</height></original_size>
    <source>kitchen.mp4</source>
    <dumped>2026-11-20 10:00:00.000000+00:00</dumped>
  </meta>
  <track id="0" label="left hand" source="manual">
    <box frame="0" keyframe="1" outside="0" occluded="0" xtl="16.00" ytl="12.00" xbr="48.00" ybr="60.00" z_order="0">
      <attribute name="contact">portable object</attribute>
    </box>
    <box frame="1" keyframe="0" outside="0" occluded="0" xtl="18.00" ytl="12.00" xbr="50.00" ybr="60.00" z_order="0">
      <attribute name="contact">portable object</attribute>
    </box>
    <box frame="2" keyframe="1" outside="0" occluded="1" xtl="20.00" ytl="12.00" xbr="52.00" ybr="60.00" z_order="0">
      <attribute name="contact">no contact</attribute>
    </box>
    <box frame="3" keyframe="1" outside="1" occluded="0" xtl="20.00" ytl="12.00" xbr="52.00" ybr="60.00" z_order="0">
      <attribute name="contact">no contact</attribute>
    </box>
    <box frame="6" keyframe="1" outside="0" occluded="0" xtl="80.00" ytl="12.00" xbr="112.00" ybr="60.00" z_order="0">
    </box>
  </track>
</annotations>
"""
CVAT_IMAGES = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><name>some frames</name><mode>annotation</mode></task></meta>
  <image id="0" name="kitchen/frame_000004.png" width="160" height="120">
    <box label="right hand" source="manual" occluded="0" xtl="16.00" ytl="12.00" xbr="48.00" ybr="60.00" z_order="0">
      <attribute name="contact">stationary object</attribute>
    </box>
    <box label="object" source="manual" occluded="0" xtl="0.00" ytl="0.00" xbr="160.00" ybr="120.00" z_order="0">
      <attribute name="name">pan</attribute>
    </box>
    <box label="object" source="manual" occluded="0" xtl="80.00" ytl="60.00" xbr="160.00" ybr="120.00" z_order="0">
      <attribute name="name">pan</attribute>
    </box>
  </image>
  <image id="1" name="kitchen/frame_000005.png" width="160" height="120">
  </image>
</annotations>
"""
# As Label Studio exports JSON: frames count from 1; a key frame that is not enabled is the last of its stretch.
KEYS = [(2, 10.0, True), (6, 30.0, False), (9, 50.0, True), (11, 50.0, False)]
LABEL_STUDIO = [
    {
        "id": 7,
        "data": {"video": "/data/upload/3/0a1b2c3d-kitchen.mp4"},
        "predictions": [],
        "annotations": [
            {
                "id": 9,
                "was_cancelled": False,
                "result": [
                    {
                        "value": {
                            "framesCount": CHUNK,
                            "duration": 15.0,
                            "sequence": [
                                {"x": x, "y": 20, "width": 20, "height": 50, "rotation": 0, "frame": frame,
                                 "enabled": enabled, "time": frame / 12}
                                for frame, x, enabled in KEYS
                            ],
                            "labels": ["right hand, portable object"],
                        },
                        "id": "Rw3", "from_name": "box", "to_name": "video", "type": "videorectangle",
                        "origin": "manual",
                    }
                ],
            }
        ],
    }
]  # fmt: skip


@pytest.fixture(scope="module")
def chunks(demo_world: Path) -> Path:
    return demo_world / "test" / "videos"


@pytest.fixture(scope="module")
def kitchen(chunks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one whole video, of 180 frames."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(next(chunks.rglob("0000.mp4")), folder / "kitchen.mp4")
    return folder


@pytest.fixture(scope="module")
def boxes(demo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's boxes with all that the schema has: names, scores, unknown states, gaps, two objects at a time."""
    frame = detections.read(demo_world / "test" / "detections.parquet").to_pandas()
    is_object = frame["kind"] == "object"
    more = frame[is_object & (frame["frame_number"] % 3 == 0)].assign(name='a "pan" & <lid>', left=0.0, top=0.0)
    frame.loc[is_object & (frame["frame_number"] >= 200), "name"] = "cup"
    frame.loc[(frame["kind"] == "hand") & (frame["frame_number"] % 7 == 0), "state"] = -1
    frame = pd.concat([frame[frame["frame_number"] % 40 < 30], more]).astype({"score": "float32"})
    frame["score"] = np.random.default_rng(0).random(len(frame), dtype=np.float32)
    path = tmp_path_factory.mktemp("boxes") / "boxes.parquet"
    detections.write(pa.Table.from_pandas(frame, SCHEMA, preserve_index=False), path)
    return path


def run(*arguments: object) -> None:
    assert cli.run(exchange.main, [str(each) for each in arguments]) == cli.DONE


def frame_of(path: Path) -> pd.DataFrame:
    order = ["video_id", "frame_number", "kind", "side", *EDGES, "score"]
    return detections.read(path).to_pandas().sort_values(order).reset_index(drop=True)


def write_cvat(path: Path, text: str = CVAT_VIDEO) -> Path:
    path.write_text(text)
    return path


def write_label_studio(path: Path, tasks: Any = LABEL_STUDIO, **region: Any) -> Path:
    tasks = json.loads(json.dumps(tasks))
    for name, value in region.items():
        tasks[0]["annotations"][0]["result"][0][name] = value
    path.write_text(json.dumps(tasks))
    return path


def files_of(program: str, folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.xml")) if program == "cvat" else [folder / "tasks.json"]


@pytest.mark.parametrize("program", ["cvat", "labelstudio"])
def test_boxes_come_back_as_they_went(program: str, boxes: Path, chunks: Path, tmp_path: Path) -> None:
    run(program, boxes, "--videos", chunks, "--output", tmp_path / "task")
    files = files_of(program, tmp_path / "task")
    back = tmp_path / "back.parquet"
    run(program, *files, "--videos", chunks, "--output", back, "--key_frames")
    pd.testing.assert_frame_equal(frame_of(back), frame_of(boxes), rtol=0, atol=1e-7)
    exact = [*EDGES, "second", "score", "side", "state", "frame_number"]
    pd.testing.assert_frame_equal(frame_of(back)[exact], frame_of(boxes)[exact], rtol=0, atol=0)
    # What training looks up, active objects included.
    seconds = np.arange(CHUNK * CHUNKS) / 12
    before, after = (BoxTable.read(path).at("demo_test_0000", seconds) for path in (boxes, back))
    np.testing.assert_array_equal(before, after)
    # Without --key_frames short gaps are filled, and nothing else changes.
    run(program, *files, "--videos", chunks, "--output", back)
    whole = frame_of(back)
    assert len(whole) > len(frame_of(boxes))
    key = ["frame_number", "kind", "side", *EDGES]
    assert len(frame_of(boxes).merge(whole, on=key)) == len(frame_of(boxes))
    # Ten frames without any box, 0.83 s, are no short gap.
    assert not whole[whole["kind"] == "hand"]["frame_number"].mod(40).between(32, 38).any()


def test_corrected_chunks_replace_their_own_boxes(boxes: Path, chunks: Path, tmp_path: Path) -> None:
    run("cvat", boxes, "--videos", chunks, "--output", tmp_path)
    path = tmp_path / "demo_test_0000" / "0001.xml"
    # The annotator exchanges the hands' labels of one chunk.
    text = path.read_text().replace('label="left hand"', 'label="?"').replace('label="right hand"', 'label="left hand"')
    path.write_text(text.replace('label="?"', 'label="right hand"'))
    right, again = tmp_path / "right.parquet", ["--videos", chunks, "--key_frames"]
    run("cvat", path, *again, "--output", right, "--base", boxes)
    expected = frame_of(boxes)
    exchanged = (expected["kind"] == "hand") & expected["frame_number"].between(CHUNK, 2 * CHUNK - 1)
    expected.loc[exchanged, "side"] = 1 - expected.loc[exchanged, "side"]
    order = ["frame_number", "kind", "side", *EDGES, "score"]
    expected = expected.sort_values(order).reset_index(drop=True).astype({"side": "int8"})
    pd.testing.assert_frame_equal(frame_of(right), expected, rtol=0, atol=1e-7)


def test_a_cvat_export_of_a_video_is_read(kitchen: Path, tmp_path: Path) -> None:
    path, output = write_cvat(tmp_path / "annotations.xml"), tmp_path / "b.parquet"
    run("cvat", path, "--videos", kitchen, "--output", output)
    rows = frame_of(output)
    # Up to the last frame of the job, and not where it is outside.
    assert rows["frame_number"].tolist() == [0, 1, 2, 6, 7, 8]
    assert rows["left"].tolist() == pytest.approx([0.1, 0.1125, 0.125, 0.5, 0.5, 0.5])
    assert rows["second"].tolist() == pytest.approx([(frame + 0.5) / 12 for frame in (0, 1, 2, 6, 7, 8)])
    assert rows["state"].tolist() == [PORTABLE_OBJECT, PORTABLE_OBJECT, 0, -1, -1, -1]
    assert set(rows["video_id"]) == {"kitchen"}
    assert set(rows["side"]) == {LEFT}
    run("cvat", path, "--videos", kitchen, "--output", output, "--key_frames")
    assert frame_of(output)["frame_number"].tolist() == [0, 2, 6]
    # Other programs write key frames alone: what is between them is linear in time.
    write_cvat(path, re.sub(r'    <box frame="1".*?</box>\n', "", CVAT_VIDEO, flags=re.DOTALL))
    run("cvat", path, "--videos", kitchen, "--output", output)
    assert frame_of(output)["left"].tolist() == rows["left"].tolist()


def test_a_cvat_export_of_images_is_read(kitchen: Path, tmp_path: Path) -> None:
    path, output = write_cvat(tmp_path / "annotations.xml", CVAT_IMAGES), tmp_path / "b.parquet"
    run("cvat", path, "--videos", kitchen, "--output", output, "--video", "kitchen")
    rows = frame_of(output)
    assert rows["frame_number"].tolist() == [4, 4, 4]
    assert rows["kind"].tolist() == ["hand", "object", "object"]
    assert rows["name"].fillna("").tolist() == ["", "pan", "pan"]
    assert rows["state"].tolist() == [4, -1, -1]


def test_a_label_studio_export_is_read(kitchen: Path, tmp_path: Path) -> None:
    path, output = write_label_studio(tmp_path / "export.json"), tmp_path / "b.parquet"
    run("labelstudio", path, "--videos", kitchen, "--output", output)
    rows = frame_of(output)
    assert rows["frame_number"].tolist() == [1, 2, 3, 4, 5, 8, 9, 10]
    assert rows["left"].tolist() == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.5, 0.5])
    assert set(rows["state"]) == {PORTABLE_OBJECT}
    assert set(rows["side"]) == {RIGHT}
    # A project without frameRate counts 24 frames a second of this video of 12.
    value = LABEL_STUDIO[0]["annotations"][0]["result"][0]["value"] | {"framesCount": 2 * CHUNK}  # type: ignore[index]
    run("labelstudio", write_label_studio(path, value=value), "--videos", kitchen, "--output", output, "--key_frames")
    assert frame_of(output)["frame_number"].tolist() == [0, 2, 4, 5]


def test_label_studio_interpolates_the_same(kitchen: Path, tmp_path: Path) -> None:
    video = pytest.importorskip("label_studio_sdk._extensions.label_studio_tools.postprocessing.video")
    sequence = video.extract_key_frames(LABEL_STUDIO[0]["annotations"][0]["result"])[0]["value"]["sequence"]  # type: ignore[index]
    path, output = write_label_studio(tmp_path / "export.json"), tmp_path / "b.parquet"
    run("labelstudio", path, "--videos", kitchen, "--output", output)
    assert frame_of(output)["frame_number"].tolist() == [each["frame"] - 1 for each in sequence]
    assert frame_of(output)["left"].tolist() == pytest.approx([each["x"] / 100 for each in sequence])


def test_label_studio_accepts_the_tasks(boxes: Path, chunks: Path, tmp_path: Path) -> None:
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason="needs label-studio-sdk")
    run("labelstudio", boxes, "--videos", chunks, "--output", tmp_path)
    labels = interface.LabelInterface((tmp_path / "labels.xml").read_text())
    for task in json.loads((tmp_path / "tasks.json").read_text()):
        assert labels.validate_prediction(task["predictions"][0])


BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;&b;">]><annotations>&c;</annotations>'
CVAT_FAULTS = {
    "DOCTYPE": BOMB,
    "label 'left hnad' (did you mean 'left hand'?)": CVAT_VIDEO.replace('label="left hand"', 'label="left hnad"'),
    "track 0, frame 2: a box from 12.5, 10.0, 332.5, 50.0": CVAT_VIDEO.replace('xbr="52.00"', 'xbr="532.00"'),
    "is about 'hall.mp4', which is not in": CVAT_VIDEO.replace("kitchen.mp4", "hall.mp4"),
    "frame 400, but": CVAT_VIDEO.replace('frame="6"', 'frame="400"'),
    "the box is rotated": CVAT_VIDEO.replace('ytl="12.00"', 'ytl="12.00" rotation="30.0"'),
    "a polygon, but only boxes": CVAT_VIDEO.replace("<box", "<polygon").replace("</box", "</polygon"),
    "contact 'holding'": CVAT_VIDEO.replace("portable object", "holding"),
    "xtl: 'x' is no number": CVAT_VIDEO.replace('"16.00"', '"x"'),
    "size of the picture: 'None' is no number": CVAT_VIDEO.replace("original_size", "size_"),
    "not readable as XML": CVAT_VIDEO[:300],
    "no box": CVAT_IMAGES[: CVAT_IMAGES.index("<box")].replace("some frames", "kitchen") + "</image></annotations>",
    "begins with <svg>": "<svg/>",
}
_VALUE = LABEL_STUDIO[0]["annotations"][0]["result"][0]["value"]  # type: ignore[index]
LABEL_STUDIO_FAULTS: dict[str, dict[str, Any]] = {
    "label 'left' (did you mean 'left hand'?)": {"value": {**_VALUE, "labels": ["left"]}},
    "a rectanglelabels, but only boxes of videos": {"type": "rectanglelabels"},
    "task 7, region Rw3, frame 2: the box is rotated": {
        "value": {**_VALUE, "sequence": [{**_VALUE["sequence"][0], "rotation": 12.5}]}
    },
    "frame 2: a box from 90.0, 20.0, 110.0, 70.0": {
        "value": {**_VALUE, "sequence": [{**_VALUE["sequence"][0], "x": 90}]}
    },
    "frame 299, but": {"value": {**_VALUE, "sequence": [{**_VALUE["sequence"][0], "frame": 300}]}},
    "width: 'wide' is no number": {"value": {**_VALUE, "sequence": [{**_VALUE["sequence"][0], "width": "wide"}]}},
    "not as Label Studio exports JSON (KeyError: 'sequence')": {"value": {"labels": ["left hand"]}},
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.run(exchange.main, [str(each) for each in arguments]) == cli.USER_ERROR
    error = capsys.readouterr().err.strip()
    assert error.count("error: ") == 1
    return error


@pytest.mark.parametrize("message", CVAT_FAULTS)
def test_a_wrong_cvat_file_is_refused(
    message: str, kitchen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_cvat(tmp_path / "annotations.xml", CVAT_FAULTS[message])
    error = refused(capsys, "cvat", path, "--videos", kitchen, "--output", tmp_path / "b.parquet")
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "b.parquet").exists()


@pytest.mark.parametrize("message", LABEL_STUDIO_FAULTS)
def test_a_wrong_label_studio_file_is_refused(
    message: str, kitchen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_label_studio(tmp_path / "export.json", **LABEL_STUDIO_FAULTS[message])
    assert message in refused(capsys, "labelstudio", path, "--videos", kitchen, "--output", tmp_path / "b.parquet")


def test_other_wrong_input_is_refused(
    boxes: Path, chunks: Path, kitchen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "export.json", tmp_path / "b.parquet"
    path.write_text('[{"video": "kitchen.mp4", "box": []}]')  # JSON-MIN
    assert "exports JSON (KeyError: 'data')" in refused(
        capsys, "labelstudio", path, "--videos", kitchen, "--output", output
    )
    # An upload of a chunk has lost its folder, of which there may be several.
    (tmp_path / "v" / "a").mkdir(parents=True)
    (tmp_path / "v" / "b").mkdir()
    for name in ("a", "b"):
        shutil.copy(kitchen / "kitchen.mp4", tmp_path / "v" / name / "kitchen.mp4")
    write_label_studio(path)
    error = refused(capsys, "labelstudio", path, "--videos", tmp_path / "v", "--output", output)
    assert "may be any of a/kitchen, b/kitchen" in error
    run("labelstudio", path, "--videos", tmp_path / "v", "--output", output, "--video", "b/kitchen")
    assert set(frame_of(output)["video_id"]) == {"b/kitchen"}
    # Boxes of a longer file of that name.
    renamed = frame_of(boxes).assign(video_id="kitchen")
    detections.write(pa.Table.from_pandas(renamed, SCHEMA, preserve_index=False), output)
    assert "the boxes are of another file" in refused(
        capsys, "cvat", output, "--videos", kitchen, "--output", tmp_path / "task"
    )


def moments_of(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """(label, first, last, confidence, attributes) of each file, read without FiftyOne."""
    content = json.loads((folder / "labels.json").read_text())
    return {
        video: [
            (content["classes"][each["label"]], *each["support"], each.get("confidence"), each["attributes"])
            for each in entries
        ]
        for video, entries in content["labels"].items()
    }


def test_clips_become_moments_of_fiftyone(chunks: Path, kitchen: Path, tmp_path: Path) -> None:
    path, look = tmp_path / "hits.json", tmp_path / "look"
    hits = [{"video": "kitchen", "start": 1.0, "end": 2.5, "similarity": 0.25, "text": ""}]
    hits.append({"video": "kitchen", "start": 0.0, "end": None, "similarity": 0.125, "text": "stirs"})
    path.write_text(json.dumps(hits))
    run("fiftyone", path, "--videos", kitchen, "--output", look, "--label", "cuts an onion")
    assert moments_of(look) == {
        "kitchen": [("cuts an onion", 13, 30, 0.25, {"rank": 1}), ("stirs", 1, CHUNK, 0.125, {"rank": 2})]
    }
    assert (look / "data" / "kitchen.mp4").resolve() == (kitchen / "kitchen.mp4").resolve()
    # Details of results: the best answer, and what is true.
    clips = {"id": ["a", "b"], "video": ["demo_test_0000"] * 2, "start": [14.0, 16.0], "end": [17.0, None]}
    table = {"kind": "classification", "classes": ["cut", "stir"], "labels": [0, 0]}
    table |= {"best_classes": [[0, 1], [1, 0]], "similarity": [[0.5, 0.25], [0.75, 0.5]], "per_class": []}
    path.write_text(json.dumps({"format": FORMAT, "clips": clips, "tables": [table]}))
    run("fiftyone", path, "--videos", chunks, "--output", look)
    task = {"truth": "cut", "task": "classification"}
    assert moments_of(look) == {
        # A moment is in the chunk in which it starts, and cut at its end.
        "demo_test_0000/0000": [("cut", 169, 180, 0.5, {**task, "correct": True})],
        "demo_test_0000/0001": [("stir", 13, 180, 0.75, {**task, "correct": False})],
    }
    # The timeline of tools/predict.py names no video.
    (tmp_path / "timeline.csv").write_text("start,end,rank,label,score\n0.00,2.00,1,cut,0.9\n2.00,4.00,1,stir,0.8\n")
    run("fiftyone", tmp_path / "timeline.csv", "--videos", kitchen, "--output", look, "--video", "kitchen")
    assert [each[:4] for each in moments_of(look)["kitchen"]] == [("cut", 1, 24, 0.9), ("stir", 25, 48, 0.8)]


def test_wrong_clips_are_refused(kitchen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, hit = tmp_path / "hits.json", {"video": "kitchen", "start": 1.0, "end": 2.0, "similarity": 0.5, "text": ""}
    arguments = ["fiftyone", path, "--videos", kitchen, "--output", tmp_path / "look"]
    for change, message in (
        ({"start": 99.0, "end": 100.0}, "from 99 to 100 s, which the video does not have"),
        ({"start": -2.0}, "from -2 to 2 s, which the video does not have"),
        ({"video": "kitchn"}, "is about 'kitchn', which is not in"),
        ({"similarity": None}, "neither the --json of tools/search.py nor the details"),
    ):
        path.write_text(json.dumps([hit | change]))
        assert message in refused(capsys, *arguments)
    path.write_text("[]")
    assert "holds no clip with a label" in refused(capsys, *arguments)


def test_fiftyone_reads_the_moments(demo_world: Path, chunks: Path, tmp_path: Path) -> None:
    importers = pytest.importorskip("fiftyone.utils.data.importers", reason="needs fiftyone")
    run("fiftyone", demo_world / "test" / "hod.csv", "--videos", chunks, "--output", tmp_path)
    expected, seen = moments_of(tmp_path), 0
    # The importer alone, since a dataset needs the database of FiftyOne.
    with importers.FiftyOneTemporalDetectionDatasetImporter(dataset_dir=str(tmp_path)) as importer:
        for path, _, label, _ in importer:
            video = str(Path(path).relative_to(tmp_path / "data").with_suffix(""))
            moments = [(each.label, *each.support) for each in label.detections]
            assert moments == [each[:3] for each in expected[video]]
            seen += len(moments)
    assert seen == sum(map(len, expected.values()))


def test_fiftyone_reads_the_boxes_for_cvat(boxes: Path, chunks: Path, tmp_path: Path) -> None:
    cvat = pytest.importorskip("fiftyone.utils.cvat", reason="needs fiftyone")
    run("cvat", boxes, "--videos", chunks, "--output", tmp_path)
    _, labels, tracks = cvat.load_cvat_video_annotations(str(tmp_path / "demo_test_0000" / "0001.xml"))
    assert [each["name"] for each in labels.labels] == list(exchange.THINGS)
    rows = frame_of(boxes)
    rows = rows[rows["frame_number"].between(CHUNK, 2 * CHUNK - 1)]
    own = [(frame, each) for track in tracks for frame, each in track.to_labels().items()]
    assert len(own) == len(rows)
    for frame, each in own:
        # left, top, width, height, of whole pixels; frames count from 1.
        left, top, width, height = each.bounding_box
        at = rows[(rows["frame_number"] == frame - 1 + CHUNK) & np.isclose(rows["score"], float(each.score))]
        assert at[list(EDGES)].to_numpy()[0] == pytest.approx([left, top, left + width, top + height], abs=1 / 120)
        assert exchange.CONTACT[at["state"].iloc[0]] == each.contact


@pytest.mark.ci  # which has the package
def test_rerun_reads_the_tracks(demo_world: Path, boxes: Path, chunks: Path, tmp_path: Path) -> None:
    chunk = pytest.importorskip("rerun.chunk", reason="needs rerun-sdk")
    run("rerun", boxes, "--videos", chunks, "--output", tmp_path, "--narrations", demo_world / "test" / "hod.csv")
    batches = dict[str, Any]()
    for each in chunk.RrdReader(tmp_path / "demo_test_0000" / "0001.rrd").stream().to_chunks():
        batches[f"{each.entity_path}{' static' * each.is_static}"] = each.to_record_batch().to_pydict()
    assert (
        len(batches["/video static"]["AssetVideo:blob"][0][0])
        == (chunks / "demo_test_0000" / "0001.mp4").stat().st_size
    )
    assert len(batches["/video"]["VideoFrameReference:timestamp"]) == CHUNK
    rows = frame_of(boxes)
    rows = rows[rows["frame_number"].between(CHUNK, 2 * CHUNK - 1) & (rows["kind"] == "hand") & (rows["side"] == RIGHT)]
    hand = batches["/video/right_hand"]
    logged = {frame: centres for frame, centres in zip(hand["frame"], hand["Boxes2D:centers"], strict=True) if centres}
    assert sorted(logged) == sorted(rows["frame_number"] - CHUNK)
    for row in rows.to_dict("records"):
        centre = [(row["left"] + row["right"]) / 2 * 160, (row["top"] + row["bottom"]) / 2 * 120]
        assert logged[row["frame_number"] - CHUNK][0] == pytest.approx(centre, abs=1e-3)
    # Where nothing is detected for long, a box does not stay: 0.1 s after the last one there is an empty set.
    assert 31 in hand["frame"] or any(not centres for centres in hand["Boxes2D:centers"])
    states = batches["/contact/right_hand"]
    assert [each[0] for each in states["Scalars:scalars"]] == rows["state"].tolist()
    texts = [each[0] for each in batches["/narration"]["TextLog:text"]]
    narrations = pd.read_csv(demo_world / "test" / "hod.csv")
    assert texts == narrations[narrations["start_second"].between(15, 29.99)]["text"].tolist()
    # Seconds of the chunk, not of the video.
    assert max(each.total_seconds() for each in batches["/narration"]["time"]) < 15


def test_rerun_is_needed_for_rerun(
    boxes: Path, chunks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rerun", None)
    error = refused(capsys, "rerun", boxes, "--videos", chunks, "--output", tmp_path)
    assert "pip install rerun-sdk" in error
