"""Data sets of others: LeRobot, WebDataset shards, EgoDex, and what Ego4D's command is to download."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest

from egohod.data import storage
from egohod.data.chunking import find_videos, probe
from egohod.data.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.formats import read_clips
from egohod.data.formats.pairs import index_shards
from egohod.data.storage import open_root, tar_members
from egohod.data.table import ClipTable
from egohod.data.videos import VideoStore
from egohod.errors import UserError
from egohod.hod.config import HodConfig
from egohod.hod.pipeline import _table_hash
from tests.data.servers import FaultyS3, point_to
from tests.data.set_files import (
    DEPTH,
    EGO,
    STEPS,
    TASKS,
    WRIST,
    write_egodex,
    write_episodes,
    write_lerobot,
    write_shards,
    write_tar,
    write_vrs,
)
from tests.data.video_files import FPS, encode, numbers, opener, picture
from tests.support import Command


def frames(clips: ClipTable, root: Path | str, row: int, **store: Any) -> list[int]:
    """The numbers that all frames of a clip show."""
    clip = clips.row(row)
    decoder = opener(store.pop("decoder", "pyav"))
    videos = VideoStore(root, "auto", store.pop("chunk_seconds", 15.0), decoder, **store)
    # Several to a frame: one a frame would repeat some and leave out the last.
    count = 4 * round((clip.end - clip.start) * FPS)
    return list(dict.fromkeys(numbers(videos.read(clip.video_id, clip.start, clip.end, count).pictures)))


def rows(clips: ClipTable) -> list[tuple[str, float, float, str]]:
    values = (clips.row(i) for i in range(len(clips)))
    return [(each.video_id, round(each.start, 6), round(each.end, 6), *each.texts) for each in values]


# --------------------------------------------------------------------------------------------------
# LeRobot
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "decoder"), [("libx264", "pyav"), ("libsvtav1", "pyav"), ("libsvtav1", "torchcodec")]
)
def test_episodes_of_a_shared_file_are_clips_with_their_tasks(tmp_path: Path, codec: str, decoder: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    root = write_lerobot(tmp_path / "set", codec=codec)
    clips = read_clips(SourceConfig(metadata=str(root), root=str(root)))
    video = f"videos/{EGO}/chunk-000/file-00"
    assert rows(clips) == [
        (f"{video}0", 0.0, 2.0, TASKS[0]),
        (f"{video}0", 2.0, 3.5, TASKS[1]),
        (f"{video}1", 0.0, 2.0, TASKS[2]),
    ]
    # To the frame: nothing of the neighbours.
    shown = [frames(clips, root, row, decoder=decoder) for row in range(3)]
    assert shown == [list(range(20)), list(range(20, 35)), list(range(35, 55))]
    assert clips.column("camera").tolist() == [EGO] * 3
    assert clips.where(1).endswith("set: episode 1")


def test_steps_of_episodes_are_read_in_both_ways_in_which_lerobot_has_written_them(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set")
    source = SourceConfig(metadata=str(root), root=str(root), subtasks=True)
    by_index = read_clips(source)
    video = f"videos/{EGO}/chunk-000/file-00"
    assert rows(by_index) == [
        (f"{video}0", 0.0, 0.8, STEPS[0]),
        (f"{video}0", 0.8, 2.0, STEPS[1]),
        (f"{video}0", 2.5, 3.5, STEPS[2]),
        (f"{video}1", 0.0, 2.0, STEPS[3]),
    ]
    assert frames(by_index, root, 2) == list(range(25, 35))
    (root / "meta/subtasks.parquet").unlink()
    assert rows(read_clips(source)) == rows(by_index)
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["language_persistent"]
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"set: no sub-tasks: neither meta/subtasks\.parquet nor a column"):
        read_clips(source)


def test_an_episode_of_several_tasks_is_cut_where_they_change(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set")
    write_episodes(root, [EGO], [(0, 0), (0, 1)], tasks=[[TASKS[0], TASKS[1]], [TASKS[1]], [TASKS[2]]])
    data = root / "data/chunk-000/file-000.parquet"
    table = pd.read_parquet(data)
    table.loc[(table.episode_index == 0) & (table.frame_index >= 6), "task_index"] = 1
    table.to_parquet(data)
    clips = read_clips(root)
    assert [row[1:] for row in rows(clips)][:3] == [(0, 0.6, TASKS[0]), (0.6, 2, TASKS[1]), (2, 3.5, TASKS[1])]


def test_the_hod_pipeline_knows_a_set_that_is_a_folder_by_its_clips(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set")
    hashes = list[str]()
    for subtasks in (False, True, False):
        source = SourceConfig(metadata=str(root), root=str(root), subtasks=subtasks)
        hashes.append(_table_hash(HodConfig(source=source), read_clips(source)))
    assert hashes[0] == hashes[2] != hashes[1]


def test_cameras_are_chosen_by_name(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", cameras=(EGO, WRIST))
    source = SourceConfig(metadata=str(root), root=str(root))
    with pytest.raises(UserError, match=rf"info\.json: several cameras; choose video_keys of {EGO}, {WRIST}"):
        read_clips(source)
    source.video_keys = [WRIST]
    clips = read_clips(source)
    assert frames(clips, root, 0) == list(range(7, 27))
    source.video_keys = [EGO, WRIST]
    assert len(read_clips(source)) == 6
    for name, message in (("observation.images.eg", f"did you mean '{EGO}'"), (DEPTH, f"no video '{DEPTH}'")):
        source.video_keys = [name]
        with pytest.raises(UserError, match=message):
            read_clips(source)


def test_version_2_has_a_file_for_every_episode(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", "v2.1")
    clips = read_clips(SourceConfig(metadata=str(root), root=str(root)))
    names = [f"videos/chunk-000/{EGO}/episode_00000{i}" for i in range(3)]
    assert rows(clips) == [(names[i], 0.0, (2.0, 1.5, 2.0)[i], TASKS[i]) for i in range(3)]
    assert frames(clips, root, 1) == list(range(20, 35))
    steps = read_clips(SourceConfig(metadata=str(root), subtasks=True))
    assert len(steps) == 4
    # A tar in it makes it no WebDataset, and a number that no int64 holds costs its episode.
    (root / "backup.tar").write_bytes(b"")
    episodes = root / "meta/episodes.jsonl"
    episodes.write_text(episodes.read_text().replace('"episode_index": 1', f'"episode_index": {10**30}'))
    clips = read_clips(root)
    assert (len(clips), clips.report.left_out) == (2, {"malformed": 1})


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"video_path": "../{video_key}.mp4"}, r"video_path '\.\./observation\.images\.ego\.mp4' is no mp4 file below"),
        ({"video_path": "/etc/{video_key}.mp4"}, "is no mp4 file below the data set"),
        ({"video_path": "{video_key.__class__}.mp4"}, "is no mp4 file below the data set"),
        ({"video_path": "{file_index:0999999999d}.mp4"}, "is no mp4 file below the data set"),
        ({"video_path": "{video_key}/passwd"}, "is no mp4 file below the data set"),
        ({"video_path": None}, "no feature of dtype video"),
        ({"storage_format": "lance"}, "stored in Lance tables"),
        ({"codebase_version": "v4.0"}, r"codebase_version v4\.0 at 10 fps; 2\.0 to 3\.0 are read"),
        ({"fps": 0}, "at 0 fps"),
        ({"features": {"observation.image": {"dtype": "image"}}}, "pictures in parquet files are not read"),
        ({"features": 3}, "not that of a LeRobot data set"),
    ],
)
def test_an_info_that_leads_elsewhere_or_is_of_another_kind(tmp_path: Path, info: dict[str, Any], message: str) -> None:
    root = write_lerobot(tmp_path / "set", **info)
    with pytest.raises(UserError, match=message) as caught:
        read_clips(root)
    assert "\n" not in str(caught.value)


def test_links_out_of_a_set_are_refused_but_those_of_the_hubs_cache(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "hub/snapshots/1234")
    source = SourceConfig(metadata=str(root), root=str(root))
    video = root / f"videos/{EGO}/chunk-000/file-001.mp4"
    (tmp_path / "hub/blobs").mkdir()
    shutil.move(video, tmp_path / "hub/blobs/ab")
    video.symlink_to(tmp_path / "hub/blobs/ab")
    assert frames(read_clips(source), root, 2) == list(range(35, 55))
    shutil.move(tmp_path / "hub/blobs/ab", tmp_path / "secret.mp4")
    video.unlink()
    video.symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(UserError, match=r"file-001\.mp4: a link to .*secret\.mp4, outside of the data set"):
        read_clips(source)
    # Of a root elsewhere, such as chunks, the set's files do not matter.
    assert len(read_clips(root)) == 3


def test_damaged_and_missing_files_of_a_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_lerobot(tmp_path / "set")
    episodes = root / "meta/episodes/chunk-000/file-000.parquet"
    content = episodes.read_bytes()
    episodes.write_bytes(content[:200] + content[260:])
    with pytest.raises(UserError, match=r"file-000\.parquet: "):
        read_clips(root)
    episodes.unlink()
    with pytest.raises(UserError, match=r"set: no meta/episodes/chunk-000/\*\.parquet; was it downloaded\?"):
        read_clips(root)
    key = f"videos/{EGO}"
    changed = {f"{key}/from_timestamp": [0.0, 9.0, 2.0], f"{key}/to_timestamp": [2.0, 10.0, 1.0]}
    write_episodes(root, [EGO], [(0, 0), (0, 1)], **changed)
    with caplog.at_level(logging.WARNING):
        clips = read_clips(root)
    assert "episode 2: 'observation.images.ego': 2 to 1 s is no stretch of time" in caplog.text
    assert clips.report.left_out == {"malformed": 1}
    write_episodes(root, [EGO], [(0, 0), (0, 1)], episode_index=[0, 0, 2])
    assert (len(read_clips(root)), read_clips(root).report.left_out) == (2, {"malformed": 1})
    write_episodes(root, [EGO], [(0, 0), (0, 1)], **changed)
    with pytest.raises(UserError, match=r"episode 2: .* is no stretch of time"):
        read_clips(root, strict=True)
    # Where a file ends only the file shows.
    with pytest.raises(
        storage.VideoError, match=r"file-000\.mp4: the clip begins at 9\.00 s, the video ends at 3\.50 s"
    ):
        frames(clips, root, 1)


# --------------------------------------------------------------------------------------------------
# WebDataset
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_videos_in_tars_are_read_by_their_place(
    tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    folder, server = write_shards(tmp_path / "shards"), FaultyS3()
    try:
        root, index = str(folder), folder / "shards.parquet"
        if remote:
            point_to(monkeypatch, server.address)
            tars = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.tar")}
            server.objects |= {f"/bucket/{name}": content for name, content in tars.items()}
            root, index = "s3://bucket", tmp_path / "index/shards.parquet"
            done = inside("prepare_data.py", "index", root)
            assert (done.returncode, "give --output" in done.stderr) == (2, True)
        more = ["--output", index.parent] if remote else []
        done = inside("prepare_data.py", "index", root, *more)
        assert done.returncode == 0, done.stderr
        assert "4 videos in 2 tars" in done.stdout
        server.objects["/bucket/shards.parquet"] = index.read_bytes()
        clips = read_clips(SourceConfig(metadata=str(index)))
        names = [
            f"factory_001/workers/worker_00{i}/factory001_worker_part0{i - 1}/factory001_worker00{i}" for i in (1, 2)
        ]
        assert rows(clips) == [
            (f"{name}_0000{i}", 0.0, 1.0, f"narration {20 * shard + 10 * i}")
            for shard, name in enumerate(names)
            for i in range(2)
        ]
        assert clips.column("worker_id").tolist() == ["worker_001"] * 2 + ["worker_002"] * 2
        # The JSON's own names can be others.
        assert read_clips(SourceConfig(metadata=str(index), columns={"text": "worker_id"})).row(0).texts == (
            "worker_001",
        )
        monkeypatch.setattr(storage, "_WHOLE_BYTES", 1000)
        shown = [frames(clips, f"{root}/shards.parquet", row) for row in range(4)]
        assert shown == [list(range(10 * row, 10 * row + 10)) for row in range(4)]
    finally:
        server.close()


def _link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("a.mp4")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def _device() -> tarfile.TarInfo:
    member = tarfile.TarInfo("a.mp4")
    member.type = tarfile.FIFOTYPE
    return member


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../../a.mp4": b"x"}, r"shard\.tar: member '\.\./\.\./a\.mp4' leads out of the folder; refused"),
        ({"/etc/a.mp4": b"x"}, r"member '/etc/a\.mp4' leads out of the folder"),
        ({"C:\\a.mp4": b"x"}, "leads out of the folder"),
        ({"a.mp4": _link(tarfile.SYMTYPE)}, r"member 'a\.mp4' is a link \(to '/etc/passwd'\); refused"),
        ({"a.mp4": _link(tarfile.LNKTYPE)}, r"member 'a\.mp4' is a link"),
        ({"a.mp4": _device()}, r"member 'a\.mp4' is no plain file"),
        ({"a.mp4": b"x", "./a.mp4": b"y"}, r"member '\./a\.mp4' is there twice"),
        ({"a.mp4": b"x", "a.json": b"[1]"}, r"member 'a\.json': no JSON object but '\[1\]'"),
        ({"a.mp4": b"x", "a.json": b"{"}, r"member 'a\.json': not readable as JSON"),
        ({"a.mp4": b"x", "a.txt": b"\xff"}, r"member 'a\.txt': not UTF-8 text"),
        ({"a.mp4": b"x", "a.txt": bytes(2 << 20)}, r"member 'a\.txt' has 2,097,152 bytes"),
        ({"a.jpg": b"x"}, "shards: no video in its 1 tars"),
    ],
)
def test_tars_that_lead_elsewhere_are_refused_and_name_the_member(
    tmp_path: Path, inside: Command, members: dict[str, Any], message: str
) -> None:
    write_tar(tmp_path / "shards/shard.tar", members)
    done = inside("prepare_data.py", "index", tmp_path / "shards")
    assert done.returncode == 2
    with pytest.raises(UserError, match=message):
        raise UserError(done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "shards/shards.parquet").exists()


def test_a_field_of_another_name_counts_more_than_the_usual_ones(tmp_path: Path) -> None:
    about = {"text": "a title", "mine": "cuts", "start_second": 0.1, "from": 0.2, "to": 0}
    write_tar(
        tmp_path / "a.tar", {"0.mp4": encode(tmp_path / "a.mp4", 10).read_bytes(), "0.json": json.dumps(about).encode()}
    )
    index_shards(str(tmp_path), tmp_path)
    columns = {"text": "mine", "start_second": "from"}
    clips = read_clips(SourceConfig(metadata=str(tmp_path / "shards.parquet"), columns=columns))
    assert rows(clips) == [("a/0", 0.2, 1.0, "cuts")]
    # An end of 0 is no missing one: the clip ends before it begins, as in a csv.
    columns["end_second"] = "to"
    clips = read_clips(SourceConfig(metadata=str(tmp_path / "shards.parquet"), columns=columns))
    assert rows(clips) == [("a/0", 0.2, 1.2, "cuts")]


@pytest.mark.parametrize(
    ("tars", "message"),
    [
        ({"a.tar": ["0.mp4", "0.mkv"]}, r"a\.tar/0\.mkv and .*a\.tar/0\.mp4 would both be 'a/0'; rename one"),
        ({"a.tar": ["x/0.mp4"], "a/x.tar": ["0.mp4"]}, "would both be 'a/x/0'"),
    ],
)
def test_two_videos_of_one_id_are_refused(tmp_path: Path, tars: dict[str, list[str]], message: str) -> None:
    video = encode(tmp_path / "video.mp4", 10).read_bytes()
    for name, members in tars.items():
        write_tar(tmp_path / "shards" / name, dict.fromkeys(members, video))
    with pytest.raises(UserError, match=message):
        index_shards(str(tmp_path / "shards"), tmp_path)


def test_compressed_and_damaged_tars_are_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    path = next(folder.rglob("*.tar"))
    shard, content = path.relative_to(folder).as_posix(), path.read_bytes()

    def members() -> list[Any]:
        return list(tar_members(storage.open_folder(folder), shard))

    assert len(members()) == 5
    second = content.index(b"factory001_worker", 1024)
    for damaged, message in (
        (b"\x1f\x8b" + content, "a compressed tar, of which no part can be read alone; unpack it to a plain .tar"),
        (content[: second + 4000], r"not a tar, or a damaged one \(unexpected end of data\)"),
        (content[:second] + b"x" + content[second + 1 :], r"a damaged one \(no header at byte [\d,]+\)"),
        (b"no tar at all" * 200, "not a tar, or a damaged one"),
        (b"", "not a tar, or a damaged one"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            members()
    # A size below zero, which would lead the library in a circle.
    header = bytearray(content[:512])
    header[124:136] = b"\xff" * 8 + struct.pack(">i", -512)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    path.write_bytes(bytes(header) + content[512:])
    with pytest.raises(UserError, match="damaged one"):
        members()
    (folder / "more.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"more\.tar\.gz: a compressed tar"):
        index_shards(str(folder), folder)


def test_shards_without_narrations_are_cut_into_windows(tmp_path: Path, inside: Command) -> None:
    folder = write_shards(tmp_path / "shards", texts=False)
    with pytest.raises(
        UserError, match=r"no such index of tar shards; tools/prepare_data\.py index .*shards writes it"
    ):
        read_clips(folder)
    assert inside("prepare_data.py", "index", folder).returncode == 0
    with pytest.raises(UserError, match="no clip with a narration; 4 left out: no narration"):
        read_clips(folder)
    table = tmp_path / "windows.csv"
    command = ["clips", folder / "shards.parquet", "--window", 0.5, "--stride", 0.5, "--output", table]
    done = inside("prepare_data.py", *command)
    assert "8 clips of 4 videos" in done.stdout, done.stderr
    assert pd.read_csv(table)["start_second"].tolist() == [0.0, 0.5] * 4
    for values in ([0.5, "--stride", "inf"], ["inf"], ["nan"]):
        done = inside("prepare_data.py", *command[:3], *values, "--output", table)
        assert (done.returncode, "must be seconds above 0" in done.stderr) == (2, True)


def test_an_index_whose_names_lead_elsewhere_is_not_chunked(tmp_path: Path) -> None:
    storage.ShardIndex.write(tmp_path, [("../../evil.mp4", "a.tar", 0, 10)])
    with pytest.raises(UserError, match=r"'\.\./\.\./evil\.mp4' leads out of the folder"):
        find_videos(tmp_path / "shards.parquet")
    storage.ShardIndex.write(tmp_path, [("a.mp4", "x/../../a.tar", 0, 10)])
    with pytest.raises(UserError, match="names the shard"):
        open_root(tmp_path / "shards.parquet")


# --------------------------------------------------------------------------------------------------
# EgoDex
# --------------------------------------------------------------------------------------------------


def test_the_attributes_of_egodex_are_narrations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    root = write_egodex(tmp_path / "test")
    clips = read_clips(root)
    assert rows(clips) == [("add_lid/0", 0.0, 3.0, "takes the lid off"), ("fold/0", 0.0, 3.0, "does fold")]
    assert frames(clips, root, 1) == list(range(25, 55))
    assert clips.column("task").tolist() == ["add_lid", "fold"]
    # What is broken is left out and named, and a link to another file is never followed.
    (root / "add_lid/0.hdf5").write_bytes(b"\x89HDF damaged")
    shutil.copy(root / "fold/0.mp4", root / "fold/1.mp4")
    for name, target in (("2", "transforms"), ("3", "transforms/camera")):
        with h5py.File(root / f"fold/{name}.hdf5", "w") as file:
            file[target] = h5py.ExternalLink(str(root / "fold/0.hdf5"), target)
            file.attrs["llm_description"] = "text"
    caplog.clear()
    clips = read_clips(root)
    assert clips.videos == ["fold/0"]
    assert clips.report.left_out == {"malformed": 4}
    (root / "fold/4.mp4").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"fold/4\.mp4: a link to /etc/hostname, outside of the data set"):
        read_clips(root)


def test_egodex_without_h5py_names_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/0.hdf5").write_bytes(b"\x89HDF")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="need h5py: pip install h5py"):
        read_clips(tmp_path)


def test_a_folder_of_no_known_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a folder of none of these data sets: lerobot .*, webdataset .*, egodex "):
        read_clips(tmp_path)


# --------------------------------------------------------------------------------------------------
# From a set to a model
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lerobot", "webdataset", "egodex"])
def test_a_set_is_chunked_trained_on_and_embedded(kind: str, tmp_path: Path, inside: Command) -> None:
    data, more = tmp_path / "set", []
    if kind == "lerobot":
        write_lerobot(data, cameras=(EGO, WRIST))
        more = [f"data.train.own.video_keys=[{EGO}]"]
        metadata = root = str(data)
    elif kind == "webdataset":
        write_shards(data)
        assert inside("prepare_data.py", "index", data).returncode == 0
        metadata = root = str(data / "shards.parquet")
    else:
        pytest.importorskip("h5py", reason="needs h5py")
        metadata = root = str(write_egodex(data))
    # Chunks have the ids of the whole files: the annotations are the same.
    chunks = str(tmp_path / "chunks")
    cut = ["--seconds", 0.5, "--short_side", 48, "--workers", 1]
    done = inside("chunk_videos.py", root, chunks, *cut)
    assert done.returncode == 0, done.stderr
    source = SourceConfig(metadata=metadata, video_keys=[EGO] if kind == "lerobot" else [])
    clips = read_clips(source)
    whole = [frames(clips, root, row) for row in range(len(clips))]
    assert [frames(clips, chunks, row, chunk_seconds=0.5, min_clip_seconds=0.0) for row in range(len(clips))] == whole
    config = tmp_path / "own.yml"
    config.write_text(
        f"model: {{name: DEMO, num_frames: 4}}\n"
        f"data: {{train: {{own: {{metadata: {metadata}, root: {root}}}}}, workers: 0, flip: 0.0}}\n"
        f"train: {{output: {tmp_path / 'run'}, duration: 2 steps, global_batch_size: 2, warmup: 1 steps,"
        f" log_every: 1 steps, save_every: 2 steps, precision: fp32}}\nevaluate: {{every: 1000 steps}}\n"
    )
    done = inside("main_pretrain.py", "--config_file", config, *more)
    assert done.returncode == 0, done.stderr
    table, features = tmp_path / "clips.csv", tmp_path / "features"
    keys = ["--video_keys", EGO] if kind == "lerobot" else []
    done = inside("prepare_data.py", "clips", metadata, *keys, "--output", table)
    assert done.returncode == 0, done.stderr
    assert rows(read_clips(table)) == rows(clips)
    command = ["--videos", root, "--clips", table, "--checkpoint", tmp_path / "run", "--output", features]
    done = inside("extract_features.py", "--config_file", config, *command)
    assert done.returncode == 0, done.stderr
    assert len(list(features.rglob("*.npz"))) == len(set(clips.videos))
    # What is missing is named at once, all of it.
    if kind != "webdataset":
        for path in data.rglob("*.mp4"):
            path.unlink()
        done = inside("extract_features.py", "--config_file", config, *command)
        assert done.returncode == 2
        for video in set(clips.videos):
            assert f"{video}.mp4: no such file" in done.stderr


def test_a_member_of_a_tar_is_probed_as_a_file_is(tmp_path: Path, inside: Command) -> None:
    folder = write_shards(tmp_path)
    assert inside("prepare_data.py", "index", folder).returncode == 0
    videos = find_videos(folder / "shards.parquet", pattern="*_00001.mp4")
    assert len(videos) == 2
    header = probe(videos[0].path)
    assert (header.seconds, header.width, header.fps) == (1.0, 96, 10.0)


# --------------------------------------------------------------------------------------------------
# Aria
# --------------------------------------------------------------------------------------------------


@pytest.mark.ci  # which has the package
def test_a_recording_of_aria_glasses_is_chunked_upright_and_at_its_times(tmp_path: Path, inside: Command) -> None:
    pytest.importorskip("projectaria_tools", reason="needs projectaria_tools")
    # As the sensor sees them: a quarter turn to the left of upright. One picture is missing, so that the one before it
    # is on display for longer.
    shown = [number for number in range(25) if number != 4]
    pictures = [np.ascontiguousarray(np.rot90(picture(number))) for number in shown]
    write_vrs(tmp_path / "aria/day/a.vrs", pictures, [5_000_000_000 + number * 100_000_000 for number in shown])
    (tmp_path / "aria/b.vrs").write_bytes(b"VisionRe" + bytes(100))
    command = ["chunk_videos.py", tmp_path / "aria", tmp_path / "chunks", "--seconds", 1, "--short_side", 64]
    done = inside(*command, "--workers", 1)
    assert done.returncode == 1
    assert "b.vrs: not a recording of Aria glasses, or a damaged one" in done.stderr
    seen = list[int]()
    for number in range(3):
        path = tmp_path / f"chunks/day/a/{number:04d}.mp4"
        with contextlib.closing(choose_decoder("pyav")[1](path)) as decoder:
            seen += numbers(decoder.read_at(np.arange(10 if number < 2 else 5) / 10 + 0.05))
    assert seen == [number if number != 4 else 3 for number in range(25)]


def test_aria_without_its_library_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "projectaria_tools.core.data_provider", None)
    with pytest.raises(UserError, match=r"a\.vrs: .* need projectaria_tools: pip install projectaria_tools"):
        probe(tmp_path / "a.vrs")


# --------------------------------------------------------------------------------------------------
# Ego4D
# --------------------------------------------------------------------------------------------------

UIDS = [f"{i}0000000-1111-2222-3333-444444444444" for i in range(3)]


def test_the_videos_that_a_csv_needs_are_listed_for_ego4ds_command(tmp_path: Path, inside: Command) -> None:
    lines = [f"{uid},0,1,cuts" for uid in (*UIDS, UIDS[0], "P01_101")]
    table, output = tmp_path / "clips.csv", tmp_path / "uids.txt"
    table.write_text("\n".join(["video_id,start_second,end_second,text", *lines]) + "\n")
    done = inside("prepare_data.py", "list-needed", table, "--output", output)
    assert done.returncode == 0, done.stderr
    assert output.read_text().split() == UIDS
    assert "left out 1 ids of other data sets" in done.stdout + done.stderr
    (tmp_path / "have/v2/full_scale").mkdir(parents=True)
    (tmp_path / f"have/v2/full_scale/{UIDS[1]}.mp4").write_bytes(b"")
    done = inside("prepare_data.py", "list-needed", table, "--have", tmp_path / "have", "--output", output)
    assert output.read_text().split() == [UIDS[0], UIDS[2]]
    command = f"ego4d --output_directory {tmp_path / 'have'} --datasets full_scale --video_uid_file {output} -y"
    assert command in done.stdout
    question = {"query": {"clip_text": "cuts"}, "answer": 0, "types": 1}
    choice = {"video_uid": UIDS[2], "clip_start": 0.0, "clip_end": 1.0, "clip_text": "cuts"}
    question["choices"] = {str(i): choice | {"clip_start": i / 10} for i in range(5)}
    (tmp_path / "egomcq.json").write_text(json.dumps({"0": question}))
    done = inside("prepare_data.py", "list-needed", tmp_path, "--benchmark", "egomcq", "--output", output)
    assert output.read_text().split() == [UIDS[2]], done.stderr
    table.write_text("video_id,start_second,end_second,text\nP01_101,0,1,cuts\n")
    done = inside("prepare_data.py", "list-needed", table, "--output", output)
    assert (done.returncode, "no id of an Ego4D video (it has 'P01_101')" in done.stderr) == (2, True)


def test_no_message_of_prepare_data_holds_a_password(inside: Command) -> None:
    done = inside("prepare_data.py", "index", "https://user:secret@localhost/shards")
    assert (done.returncode, "secret" in done.stderr + done.stdout) == (2, False)
