"""Small data sets in the layouts in which LeRobot, WebDataset and EgoDex are published, with real video files.

Every frame shows its number, counted over a set: which episode a picture is of can be seen.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.video_files import FPS, encode

EGO, WRIST, DEPTH = "observation.images.ego", "observation.images.wrist", "observation.images.depth"
LENGTHS = (20, 15, 20)
"""Frames of the episodes, of which the first two are in one file."""
TASKS = ("pick up the cup", "wipe the table", "open the drawer")
STEPS = ("reach for the cup", "lift the cup", "wipe", "pull the handle")
# Steps by episode: first frame, step (-1: none).
_STEPS = {0: [(0, 0), (8, 1)], 1: [(0, -1), (5, 2)], 2: [(0, 3)]}


def write_lerobot(
    folder: Path, version: str = "v3.0", cameras: Sequence[str] = (EGO,), codec: str = "libx264", **info: Any
) -> Path:
    """Three episodes in two mp4 files a camera, version 2 in three; the steps are in both ways."""
    depth = {"info": {"is_depth_map": True}}
    features: dict[str, Any] = {key: {"dtype": "video", "shape": [64, 96, 3], "names": None} for key in cameras}
    features |= {DEPTH: {"dtype": "video", "shape": [64, 96, 1], "names": None} | depth}
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("task_index", "subtask_index")}
    features |= {"language_persistent": {"dtype": "language", "shape": [1], "names": None}}
    is_new = version.startswith("v3")
    names = (
        "chunk-{chunk_index:03d}/file-{file_index:03d}",
        "chunk-{episode_chunk:03d}",
        "episode_{episode_index:06d}",
    )
    paths = {"data_path": f"data/{names[0]}.parquet", "video_path": f"videos/{{video_key}}/{names[0]}.mp4"}
    if not is_new:
        paths = {"data_path": f"data/{names[1]}/{names[2]}.parquet"}
        paths |= {"video_path": f"videos/{names[1]}/{{video_key}}/{names[2]}.mp4"}
    content = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000} | paths | info
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(content))
    files = [(0, 0), (0, 1)] if is_new else []
    for place, key in enumerate(cameras):
        # Of another camera at the same moment the numbers are others.
        parts = [(0, 35), (35, 20)] if is_new else [(0, 20), (20, 15), (35, 20)]
        for number, (first, count) in enumerate(parts):
            name = f"videos/{key}/chunk-000/file-{number:03d}" if is_new else ""
            name = name or f"videos/chunk-000/{key}/episode_{number:06d}"
            encode(folder / f"{name}.mp4", count, first=first + 7 * place, codec=codec)
    rows = list[dict[str, Any]]()
    for episode, length in enumerate(LENGTHS):
        steps = _STEPS[episode]
        language = [
            {"role": "assistant", "content": STEPS[step], "style": "subtask", "timestamp": frame / FPS}
            for frame, step in steps
            if step >= 0
        ]
        language.append({"role": "assistant", "content": "a plan", "style": "plan", "timestamp": 0.0})
        for frame in range(length):
            step = next(step for first, step in reversed(steps) if first <= frame)
            row = {"episode_index": episode, "frame_index": frame, "timestamp": frame / FPS}
            rows.append(row | {"task_index": episode, "subtask_index": step, "language_persistent": language})
    table = pa.Table.from_pylist(rows)
    data = "file-000" if is_new else "episode_000000"
    (folder / "data/chunk-000").mkdir(parents=True)
    pq.write_table(table, folder / f"data/chunk-000/{data}.parquet")
    texts = {"task": TASKS, "subtask": STEPS}
    for kind, values in texts.items():
        index = pd.Index(list(values), name=kind)
        pd.DataFrame({f"{kind}_index": range(len(values))}, index=index).to_parquet(folder / f"meta/{kind}s.parquet")
    if is_new:
        write_episodes(folder, cameras, files)
    else:
        (folder / "meta/tasks.parquet").unlink()
        lines = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
        (folder / "meta/tasks.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        pairs = enumerate(zip(TASKS, LENGTHS, strict=True))
        lines = [{"episode_index": i, "tasks": [task], "length": length} for i, (task, length) in pairs]
        (folder / "meta/episodes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def write_episodes(folder: Path, cameras: Sequence[str], files: Sequence[tuple[int, int]], **changed: Any) -> None:
    """``meta/episodes``; ``changed`` are other columns."""
    columns: dict[str, list[Any]] = {"episode_index": [0, 1, 2], "tasks": [[task] for task in TASKS]}
    columns |= {"length": list(LENGTHS), "stats/action/min": [[0.0]] * 3}
    for key in cameras:
        places = [files[0], files[0], files[1]]
        columns |= {f"videos/{key}/chunk_index": [chunk for chunk, _ in places]}
        columns |= {f"videos/{key}/file_index": [file for _, file in places]}
        columns |= {f"videos/{key}/from_timestamp": [0.0, 2.0, 0.0], f"videos/{key}/to_timestamp": [2.0, 3.5, 2.0]}
    (folder / "meta/episodes/chunk-000").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | changed), folder / "meta/episodes/chunk-000/file-000.parquet")


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    """A tar of files, or of members as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, texts: bool = True) -> Path:
    """Two shards as Egocentric-10K has them; with ``texts`` narrations, which it lacks, in the JSON or a text."""
    scratch = folder / "scratch.mp4"
    for shard in range(2):
        members = dict[str, bytes | tarfile.TarInfo]()
        for number in range(2):
            first = 20 * shard + 10 * number
            video = encode(scratch, 10, first=first).read_bytes()
            name = f"factory001_worker00{shard + 1}_0000{number}"
            about = {"factory_id": "factory_001", "worker_id": f"worker_00{shard + 1}", "video_index": number}
            about |= {"duration_sec": 1.0} if number else {}
            if texts and number:
                about |= {"caption": f"narration {first}"}
            elif texts:
                members[f"{name}.txt"] = f"narration {first}\n".encode()
            members |= {f"{name}.mp4": video, f"{name}.json": json.dumps(about).encode()}
        write_tar(folder / f"factory_001/workers/worker_00{shard + 1}/factory001_worker_part0{shard}.tar", members)
    scratch.unlink()
    return folder


def write_vrs(path: Path, pictures: Sequence[np.ndarray], times: Sequence[int], stream: int = 214) -> Path:
    """The colour camera of first Aria glasses: uint8 [H, W, 3] pictures at ``times`` in ns, not compressed.

    The format is that of facebookresearch/vrs, FileFormat.h and DescriptionRecord.cpp; the fields are Aria's.
    """
    height, width = pictures[0].shape[:2]
    types = {"I": "uint32_t", "Q": "uint64_t", "q": "int64_t", "d": "double"}

    def fields(values: dict[str, tuple[str, float]]) -> tuple[str, bytes]:
        """Their description, and their bytes."""
        described, content = list[dict[str, Any]](), b""
        for name, (code, value) in values.items():
            described.append({"name": name, "type": f"DataPieceValue<{types[code]}>", "offset": len(content)})
            content += struct.pack(f"<{code}", value)
        return json.dumps({"data_layout": described}), content

    def frame(number: int, time: int) -> tuple[str, bytes]:
        stamps = dict.fromkeys(("capture_timestamp_ns", "arrival_timestamp_ns"), ("q", time))
        floats = dict.fromkeys(("exposure_duration_s", "gain", "temperature_deg_c"), ("d", 1.0))
        return fields(dict.fromkeys(("group_id", "group_mask", "frame_number"), ("Q", number)) | floats | stamps)

    sizes = {"image_width": width, "image_height": height, "image_stride": 3 * width, "image_pixel_format": 4}
    camera = {name: ("I", value) for name, value in ({"camera_id": 0} | sizes).items()} | {"nominal_rate": ("d", FPS)}
    ranges = (f"{name}.{end}" for name in ("exposure_duration", "gain") for end in ("min", "max"))
    configuration, about = fields(camera | dict.fromkeys((*ranges, "gamma_factor"), ("d", 1.0)))
    tags = {"DL:Configuration:2:0": configuration, "DL:Data:2:0": frame(0, 0)[0]}
    tags |= {"RF:Configuration:2": "data_layout", "RF:Data:2": "data_layout+image/raw"}
    tags |= {"VRS_Original_Recordable_Name": "RGB Camera Class", "VRS_Serial_Number": "1"}

    def text(value: str) -> bytes:
        return struct.pack("<I", len(value)) + value.encode()

    described = struct.pack("<IiHII", 1, stream, 1, 0, len(tags)) + b"".join(map(text, chain(*tags.items()))) + bytes(4)
    records = [(2, sys.float_info.max, 0, 3, described), (stream, times[0] / 1e9, 1, 2, about)]
    pairs = enumerate(zip(pictures, times, strict=True))
    records += [(stream, time / 1e9, 1, 3, frame(i, time)[1] + picture.tobytes()) for i, (picture, time) in pairs]
    content, before = struct.pack("<8sQIIqq", b"VisionRe", 1, 80, 32, 0, 80) + bytes(32) + b"cordVRS1", 0
    for kind, time, instance, record, body in records:
        size = 32 + len(body)
        content += struct.pack("<IIiIdHBBI", size, before, kind, 2, time, instance, record, 0, 0) + body
        before = size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_egodex(folder: Path) -> Path:
    """Two tasks, one of which can be undone, in the second direction."""
    import h5py

    for place, (task, about) in enumerate(
        {
            "add_lid": {
                "llm_type": "reversible",
                "which_llm_description": "2",
                "llm_description2": "takes the lid off",
            },
            "fold": {"llm_type": "simple"},
        }.items()
    ):
        encode(folder / task / "0.mp4", 30, first=25 * place)
        with h5py.File(folder / task / "0.hdf5", "w") as file:
            # 30 frames a second in EgoDex, ten here: a third of the poses.
            file.create_dataset("transforms/camera", data=np.zeros((90, 4, 4), np.float32))
            for key, value in ({"llm_description": f"does {task}", "task": task} | about).items():
                file.attrs[key] = value
    return folder
