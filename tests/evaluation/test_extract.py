"""Features of anyone's clips: which clips, files that go on after an interruption, search and its contact sheet."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import ALONE, small_model
from PIL import Image

from egohod.data import dataset as dataset_module
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, EvalProtocol, collate_views, normalise
from egohod.data.decoders import PyavDecoder
from egohod.data.formats.custom import rows_of_csv, whole_files, windows
from egohod.data.loader import eval_loader
from egohod.data.table import ClipTable
from egohod.data.videos import window_spans
from egohod.errors import UserError
from egohod.evaluation import embed as extraction
from egohod.evaluation.embed import Execution, extract, remaining, shares
from egohod.evaluation.features import open_index, read_features, read_index, write_video
from tests.data.video_files import encode, encode_sizes, opener, remux
from tests.support import Command, ShortRun


@pytest.fixture
def videos(formats: Path, tmp_path: Path) -> Path:
    """Three files of some 2.5 s in two folders."""
    folder = tmp_path / "videos"
    videos = sorted((formats / "benchmarks" / "egtea" / "videos").rglob("*.mp4"))
    (folder / "b").mkdir(parents=True)
    for path, name in zip(videos, ("a.mp4", "b/c.MP4", "b/d.mp4"), strict=False):
        shutil.copy(path, folder / name)
    return folder


def dataset_of(clips: ClipTable, root: Path, layout: str = "whole", frames: int = 4) -> ClipDataset:
    source = SourceConfig(root=str(root), layout=layout, min_clip_seconds=0.0)
    return ClipDataset([(clips, source)], protocol=EvalProtocol(frames=frames), size=40, decoder="pyav")


def run(dataset: ClipDataset, folder: Path, allow_missing: bool = False) -> extraction.Extracted:
    execution = Execution(2, 0, ALONE, allow_missing=allow_missing)
    return extract(small_model(), dataset, folder, remaining(dataset, folder), execution)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (5.0, [(0, 2), (1, 3), (2, 4), (3, 5)]),
        (4.5, [(0, 2), (1, 3), (2, 4), (3, 4.5)]),
        (5.0004, [(0, 2), (1, 3), (2, 4), (3, 5)]),
        (1.5, [(0, 1.5)]),
    ],
)
def test_windows_cover_a_video_to_its_end(duration: float, expected: list[tuple[float, float]]) -> None:
    assert window_spans(duration, 2, 1) == expected
    with pytest.raises(UserError, match="--window and --stride"):
        window_spans(duration, 2, 0)


def test_every_file_of_a_folder_is_a_clip(videos: Path) -> None:
    clips, faults = whole_files(str(videos))
    assert (clips.videos, faults) == (["a", "b/c", "b/d"], [])
    assert np.isinf(clips.end).all()
    shutil.copy(videos / "a.mp4", videos / "a.MP4")
    with pytest.raises(UserError, match="is there as well"):
        whole_files(str(videos))


def test_a_csv_may_mix_videos_and_orders(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_bytes(
        b"text,end_second,extra,video_id,start_second\r\none,2,x,b,1\r\ntwo,00:00:03.5,x,a,0\r\n,1,x,b,0.5\r\n"
    )
    clips = rows_of_csv(path)
    assert clips.videos == ["b", "b", "a"]
    assert clips.end.tolist() == [2, 1, 3.5]
    assert clips.column("text").tolist() == ["one", "", "two"]
    assert clips.rows_of_videos() == {"b": range(2), "a": range(2, 3)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../../x,0,1", r"clips\.csv: row 1: video_id '\.\./\.\./x' leads out"),
        ("/etc/x,0,1", "leads out"),
        ("a,2,1", "row 1: '2' to '1' is no stretch of time"),
        ("a,soon,1", "row 1: 'soon' to '1'"),
        ("a,-1,1", "row 1: '-1' to '1'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "clips.csv").write_text(f"video_id,start_second,end_second\n{row}\n")
    with pytest.raises(UserError, match=message):
        rows_of_csv(tmp_path / "clips.csv")


def test_features_are_those_of_the_clip_alone_and_in_order(videos: Path, tmp_path: Path) -> None:
    dataset = dataset_of(windows(str(videos), 1.0, 0.5)[0], videos)
    assert run(dataset, tmp_path / "features").videos == 3
    model = small_model().eval()
    with torch.no_grad():
        alone = torch.cat([model.encode_video(normalise(dataset[row]["video"])) for row in range(len(dataset))])
    for video, rows in dataset.clips.rows_of_videos().items():
        with np.load(tmp_path / "features" / f"{video}.npz") as content:
            np.testing.assert_allclose(content["features"], alone[list(rows)], atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(content["features"], axis=1), 1, atol=1e-5)
            assert content["start"].tolist() == dataset.clips.start[list(rows)].tolist()


def test_windows_that_overlap_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "videos").mkdir()
    encode(tmp_path / "videos" / "v.mp4", 100, x264="keyint=100")
    clips, _ = windows(str(tmp_path / "videos"), 2.0, 1.0)
    decoded = list[int]()
    real = PyavDecoder._decode

    def count(self: PyavDecoder, packets: list[Any], wanted: set[int]) -> Any:
        decoded.append(len(wanted))
        return real(self, packets, wanted)

    monkeypatch.setattr(PyavDecoder, "_decode", count)
    samples = []
    for batch_size in (9, 1):
        decoded.clear()
        loader = eval_loader(dataset_of(clips, tmp_path / "videos"), range(9), batch_size, 0, collate=collate_views)
        samples.append(torch.cat([batch["video"] for batch in loader]))
        # The first clip of a video is read alone, to see how large its pictures are. Then all others together, whose
        # 8 x 4 frames are fewer as windows share some.
        assert len(decoded) == (2 if batch_size == 9 else 9)
    assert torch.equal(*samples)

    # No more at a time than fits the memory, and where one is broken each is read alone.
    monkeypatch.setattr(dataset_module, "_WAITING_BYTES", 3 * 4 * 96 * 64 * 3)
    decoded.clear()
    list(eval_loader(dataset_of(clips, tmp_path / "videos"), range(9), 9, 0, collate=collate_views))
    assert len(decoded) == 1 + 3
    monkeypatch.setattr(dataset_module, "_WAITING_BYTES", 1 << 28)
    decoded.clear()
    csv = tmp_path / "clips.csv"
    csv.write_text("video_id,start_second,end_second\nv,1,3\nv,2,4\nv,3,90\nv,3,5\nv,88,91\n")
    data = dataset_of(rows_of_csv(csv), tmp_path / "videos")
    (batch,) = eval_loader(data, range(5), 5, 0, collate=collate_views)
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert "begins at 88.00 s" in batch["faults"][4]
    assert len(decoded) == 4


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec", "decord"])
@pytest.mark.parametrize("kind", ["sizes", "open groups", "damaged"])
def test_pictures_are_those_of_each_window_alone(tmp_path: Path, decoder: str, kind: str) -> None:
    opener(decoder)  # skips where it does not load
    path = tmp_path / "videos" / "v.mp4"
    path.parent.mkdir()
    if kind == "sizes":
        encode_sizes(path, [(160, 120), (80, 60), (160, 120)])
    else:
        encode(path, 60, size=(160, 120), x264="keyint=12:open-gop=1:bframes=4:scenecut=0")
    if kind == "damaged":
        content = bytearray(path.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 60] = b"\xff" * 60
        path.write_bytes(content)
    clips, _ = windows(str(path.parent), 2.0, 0.5)
    source = SourceConfig(root=str(path.parent), layout="whole", min_clip_seconds=0.0)
    samples = []
    for batch_size in (len(clips), 1):
        data = ClipDataset([(clips, source)], protocol=EvalProtocol(frames=4), size=40, decoder=decoder)
        read = list(eval_loader(data, range(len(clips)), batch_size, 0, collate=collate_views))
        pictures = [each for batch in read if batch["video"] is not None for each in batch["video"]]
        samples.append(dict(zip((i for batch in read for i in batch["index"].tolist()), pictures, strict=True)))
    together, alone = samples
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[index], video) for index, video in alone.items())


def test_an_interrupted_run_goes_on_and_what_changed_is_embedded_again(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, clips = tmp_path / "features", windows(str(videos), 1.0, 1.0)[0]
    dataset = dataset_of(clips, videos)
    written: list[str] = []

    def stop(where: Path, video: str, *rest: object) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(video)
        real(where, video, *rest)  # type: ignore[arg-type]

    real = extraction.write_video
    monkeypatch.setattr(extraction, "write_video", stop)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, folder)
    monkeypatch.setattr(extraction, "write_video", real)
    assert list(remaining(dataset_of(clips, videos), folder)) == ["b/c", "b/d"]
    assert run(dataset, folder).videos == 2
    assert run(dataset, folder).clips == 0
    other = windows(str(videos), 1.0, 0.5)[0]
    assert len(remaining(dataset_of(other, videos), folder)) == 3
    shutil.copy(videos / "b" / "d.mp4", videos / "a.mp4")
    assert list(remaining(dataset_of(clips, videos), folder)) == ["a"]
    (folder / "b" / "c.npz").write_bytes(b"cut off")
    assert list(remaining(dataset_of(clips, videos), folder)) == ["a", "b/c"]


def test_a_clip_that_cannot_be_read_stops_the_run_or_is_left_out_and_tried_again(videos: Path, tmp_path: Path) -> None:
    csv, folder = tmp_path / "clips.csv", tmp_path / "features"
    csv.write_text("video_id,start_second,end_second\na,0,1\na,90,91\na,1,2\nb/d,0,1\n")
    clips = rows_of_csv(csv)
    dataset = dataset_of(clips, videos)
    with pytest.raises(UserError, match=r"(?s)a 90\.00-91\.00 s.*--allow_missing"):
        run(dataset, folder)
    done = run(dataset, folder, allow_missing=True)
    assert (done.videos, done.clips, len(done.faults)) == (2, 3, 1)
    with np.load(folder / "a.npz") as content:
        assert content["start"].tolist() == [0, 1]
    assert list(remaining(dataset_of(clips, videos), folder)) == ["a"]


def test_shares_hold_every_video_once_and_are_about_even() -> None:
    sizes = {"a": 5, "b": 1, "c": 9, "d": 4, "e": 1}
    dealt = shares(sizes, 2)
    assert sorted([*dealt[0], *dealt[1]]) == sorted(sizes)
    assert [sum(sizes[video] for video in share) for share in dealt] == [10, 10]
    assert shares({"a": 1}, 3) == [["a"], [], []]


@pytest.mark.ci
def test_two_processes_write_what_one_writes(
    videos: Path, tmp_path: Path, program: Command, inside: Command, short_run: ShortRun
) -> None:
    arguments = ["--config_file", short_run.command[1], "data.decoder=pyav", "--checkpoint", short_run.folder]
    arguments += ["--videos", videos, "--window", "1", "evaluate.batch_size=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert inside("extract_features.py", *arguments, "--output", one).returncode == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = program(*launcher, "tools/extract_features.py", *arguments, "--output", two)
    assert done.returncode == 0, done.stderr
    alone, (shared, lacking) = read_features(one)[0], read_features(two)
    assert lacking == 0
    assert f"embedded {len(alone.videos)} clips of 3 videos" in done.stderr
    assert (shared.videos, shared.start.tolist()) == (alone.videos, alone.start.tolist())
    np.testing.assert_allclose(shared.features, alone.features, atol=1e-6)

    # Only one process meets the broken clip; the other's files stay, and the run fails.
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second\na,90,91\nb/d,0,1\n")
    arguments[arguments.index("--window") :] = ["--clips", tmp_path / "clips.csv", "--output", tmp_path / "three"]
    done = program(*launcher, "tools/extract_features.py", *arguments)
    assert done.returncode != 0
    assert "a 90.00-91.00 s" in done.stderr
    assert (tmp_path / "three" / "b" / "d.npz").exists()


def test_from_files_to_a_contact_sheet(videos: Path, tmp_path: Path, inside: Command, short_run: ShortRun) -> None:
    features = tmp_path / "features"
    model = [*short_run.command, "data.decoder=pyav", "--checkpoint", short_run.folder]
    command = ["extract_features.py", *model, "--videos", videos, "--output", features, "--window", "1"]
    done = inside(*command, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "of 3 videos are to be embedded (5 frames, 40 px)" in done.stderr
    assert not features.exists()
    done = inside(*command)
    assert done.returncode == 0, done.stderr
    assert "ETA" in done.stderr
    assert "0 clips of 0 videos are to be embedded" in inside(*command).stderr
    assert inside(*command, "--frames", "6").returncode == 2

    sheet = tmp_path / "sheet.png"
    done = inside("search.py", "opens the jar", "--index", features, "--top", "4", "--sheet", sheet, "--json")
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    assert [hit["similarity"] for hit in hits] == sorted((hit["similarity"] for hit in hits), reverse=True)
    index, lacking = read_features(features)
    assert lacking == 0
    assert {hit["video"] for hit in hits} <= set(index.videos)
    with Image.open(sheet) as picture:
        assert picture.width > 400
        assert picture.height > 200
    done = inside("search.py", "opens the jar", "--index", features, "--top", "2")
    assert len(done.stdout.splitlines()) == 2
    assert "0:00:0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--videos", "/nowhere"], "/nowhere: no such video folder"),
        (["--videos", ".", "--stride", "1"], "--stride needs --window"),
        (["--videos", ".", "--clips", "x.csv", "--window", "1"], "give one of them"),
        (["--videos", "configs"], "not a single video file"),
        (["--videos", "tests", "--clips", "/nowhere.csv"], "/nowhere.csv: cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    inside: Command, short_run: ShortRun, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = inside("extract_features.py", "--checkpoint", short_run.folder, "--output", tmp_path / "f", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_files_that_are_missing_or_broken_are_named_at_once(
    videos: Path, tmp_path: Path, inside: Command, short_run: ShortRun
) -> None:
    command = ["extract_features.py", "--checkpoint", short_run.folder, "--videos", videos, "--dry_run"]
    command += ["--output", tmp_path / "f"]
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second\nno,0,1\na,0,1\nnope,0,1\n")
    done = inside(*command, "--clips", tmp_path / "clips.csv")
    assert done.returncode == 2
    assert "no.mp4" in done.stderr
    assert "nope.mp4" in done.stderr
    assert inside(*command, "--clips", tmp_path / "clips.csv", "--allow_missing").returncode == 0
    (videos / "a.mp4").write_bytes(b"no video")
    done = inside(*command, "--window", "1")
    assert done.returncode == 2
    assert "a.mp4" in done.stderr


def test_a_name_that_is_not_utf8_is_named_and_may_be_left_out(
    videos: Path, tmp_path: Path, inside: Command, short_run: ShortRun
) -> None:
    """No csv, index or features file can hold it."""
    os.link(videos / "a.mp4", os.fsencode(videos) + b"/caf\xe9.mp4")
    command = ["extract_features.py", *short_run.command, "data.decoder=pyav", "--checkpoint", short_run.folder]
    command += ["--videos", videos, "--output", tmp_path / "f"]
    for more in ([], ["--window", "1"]):
        done = inside(*command, *more, "--dry_run")
        assert done.returncode == 2
        assert f"b'{videos}/caf\\xe9.mp4': its name is not UTF-8; rename it" in done.stderr
        assert "1 videos cannot be read" in done.stderr
    done = inside(*command, "--allow_missing")
    assert done.returncode == 0, done.stderr
    assert sorted(read_index(tmp_path / "f")["videos"]) == ["a", "b/c", "b/d"]


def test_an_ending_in_mixed_case_is_named(videos: Path) -> None:
    (videos / "a.mp4").rename(videos / "a.Mp4")
    clips, faults = windows(str(videos), 1.0, 1.0)
    assert set(clips.rows_of_videos()) == {"b/c", "b/d"}
    assert faults == [f"{videos}/a.Mp4: its ending is in mixed case; rename it to .mp4"]


def test_a_picture_that_changes_its_proportions_costs_its_clip(
    videos: Path, tmp_path: Path, inside: Command, short_run: ShortRun
) -> None:
    encode_sizes(videos / "a.mp4", [(96, 64), (64, 96)])
    command = ["extract_features.py", *short_run.command, "data.decoder=pyav", "--checkpoint", short_run.folder]
    done = inside(*command, "--videos", videos, "--output", tmp_path / "f", "--allow_missing")
    assert done.returncode == 0, done.stderr
    assert f"{videos}/a.mp4: the picture size changes from 96x64 to 64x96 at 2." in done.stderr
    assert sorted(read_features(tmp_path / "f")[0].videos) == ["b/c", "b/d"]


def test_whatever_a_video_raises_is_its_clip_s_fault(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(whole_files(str(videos))[0], videos)
    monkeypatch.setattr(dataset, "_eval_views", lambda index: {}[index])
    assert dataset[1]["fault"] == "clip b/c: b/c: cannot be read: KeyError: 1"


def test_videos_in_other_containers_are_embedded(
    videos: Path, tmp_path: Path, inside: Command, short_run: ShortRun
) -> None:
    remux(videos / "a.mp4", videos / "t.mkv")
    (videos / "a.mp4").unlink()
    command = ["extract_features.py", *short_run.command, "data.decoder=pyav", "--checkpoint", short_run.folder]
    done = inside(*command, "--videos", videos, "--output", tmp_path / "f")
    assert done.returncode == 0, done.stderr
    index, lacking = read_features(tmp_path / "f")
    assert lacking == 0
    assert sorted(index.videos) == ["b/c", "b/d", "t"]


def test_search_refuses_what_is_no_index_and_other_weights(
    videos: Path, tmp_path: Path, inside: Command, short_run: ShortRun
) -> None:
    done = inside("search.py", "x", "--index", tmp_path)
    assert done.returncode == 2
    assert "tools/extract_features.py makes such folders" in done.stderr
    model = [*short_run.command, "data.decoder=pyav", "--checkpoint", short_run.folder]
    assert inside("extract_features.py", *model, "--videos", videos, "--output", tmp_path / "f").returncode == 0
    index = read_index(tmp_path / "f")
    (tmp_path / "f" / "index.json").write_text(json.dumps(index | {"weights": "other"}))
    done = inside("search.py", "x", "--index", tmp_path / "f")
    assert done.returncode == 2
    assert "not the weights that made" in done.stderr
    assert inside("search.py", " ", "--index", tmp_path / "f").returncode == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.ones((3, 4), np.float32)}, r"have the shapes \(3, 4\), \(2,\), \(2,\), \(2,\)"),
        ({"features": np.ones(2, np.float32)}, r"have the shapes \(2,\)"),
        ({"features": np.ones((2, 5), np.float32)}, "its features have 5 dimensions, those of other videos 4"),
        ({"start": np.array(["x", "y"])}, "could not convert string to float"),
        ({}, "start is not a file in the archive"),
    ],
)
def test_features_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, change: dict[str, np.ndarray], message: str
) -> None:
    index = {"format": 1, "weights": "w", "protocol": "p", "root": "videos", "layout": "whole", "chunk_seconds": 15.0}
    open_index(tmp_path, index | {"videos": {"a": "a.npz", "b": "b.npz"}})
    for video in ("a", "b"):
        write_video(tmp_path, video, np.ones((2, 4), np.float32), [0, 1], [1, 2], ["x", "y"], "id")
    with np.load(tmp_path / "b.npz") as content:
        whole = dict(content)
    np.savez(tmp_path / "b.npz", **(whole | change if change else {"features": whole["features"]}))
    with pytest.raises(UserError, match=rf"b\.npz: .*({message}).*; delete it and extract again"):
        read_features(tmp_path)


@pytest.mark.parametrize("change", [{"layout": ["c", None]}, {"root": None}, {"chunk_seconds": "15"}, {"videos": []}])
def test_an_index_of_other_kinds_of_values_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    index = {"format": 1, "weights": "w", "root": "v", "layout": "whole", "chunk_seconds": 15.0, "videos": {}}
    (tmp_path / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(UserError, match=rf"index\.json: damaged, {next(iter(change))} is "):
        read_index(tmp_path)
