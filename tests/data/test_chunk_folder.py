"""Folders of camera files: search, refusals, interruptions, damage, full disks, estimates."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from servers import FaultyS3, point_to
from video_files import encode, numbers, reference

from egohod.data import chunking
from egohod.data.chunking import ChunkSettings, Output, Video, find_videos, split
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, Tokenizer, collate, collate_views
from egohod.data.formats import read_clips
from egohod.data.loader import eval_loader
from egohod.data.storage import open_root
from egohod.errors import UserError
from egohod.runtime import Progress, locked

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "chunk_videos.py")]


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOL, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)


def tree(folder: Path) -> dict[str, bytes]:
    """Every visible file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".")}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of 2 to 4 s in sub-folders, with spaces and unicode, among things that are none."""
    root = tmp_path_factory.mktemp("recordings")
    encode(root / "a.mp4", 40)
    encode(root / "day 1" / "küche 2.MP4", 20)
    encode(root / "day 1" / "台所.mov", 25)
    encode(root / "b.c" / "d.e.mkv", 30)
    encode(root / "z.avi", 20)
    encode(root / ".hidden.mp4", 10)
    (root / "._a.mp4").write_bytes(b"what Macs leave behind")
    (root / "notes.txt").write_text("no video")
    return root


IDS = ["a", "b.c/d.e", "day 1/küche 2", "day 1/台所", "z"]


def test_ids_are_paths_without_ending(recordings: Path, tmp_path: Path) -> None:
    assert [video.video_id for video in find_videos(recordings)] == IDS
    assert [video.video_id for video in find_videos(recordings, "day 1/*")] == IDS[2:4]
    names = tmp_path / "names.txt"
    names.write_text("z.avi\r\n\n./day 1/küche 2.MP4\n", encoding="utf-8-sig")
    assert [video.video_id for video in find_videos(recordings, names=names)] == ["day 1/küche 2", "z"]
    for line, expected in (
        ("nothing.mp4", "no such file"),
        ("../a.mp4", "not a path below"),
        ("/etc/passwd", "not a path"),
    ):
        names.write_text(f"a.mp4\n{line}\n")
        with pytest.raises(UserError, match=f"line 2: .*{expected}"):
            find_videos(recordings, names=names)
    with pytest.raises(UserError, match=r"no videos that match '\*\.wmv'"):
        find_videos(recordings, "*.wmv")
    with pytest.raises(UserError, match="no such folder"):
        find_videos(recordings / "nothing")


def test_files_that_would_be_in_each_others_way(tmp_path: Path) -> None:
    for name in ("v.mp4", "v.mov"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"v\.mov and .*v\.mp4 would both become 'v'"):
        find_videos(tmp_path)
    (tmp_path / "v.mov").unlink()
    (tmp_path / "v" / "w").mkdir(parents=True)
    (tmp_path / "v" / "w" / "x.mp4").touch()
    with pytest.raises(UserError, match=r"v\.mp4: its chunks would be in one folder with those of .*x\.mp4"):
        find_videos(tmp_path)


def test_links_out_of_the_folder_need_an_option(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (root / "in.mp4", outside / "out.mp4", outside / "deep" / "x.mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "file.mp4").symlink_to(outside / "out.mp4")
    (root / "same.mp4").symlink_to(root / "in.mp4")
    (root / "folder").symlink_to(outside / "deep")
    (outside / "deep" / "circle").symlink_to(root)
    assert [video.video_id for video in find_videos(root)] == ["in", "same"]
    assert "1 links lead out of" in caplog.text
    assert [video.video_id for video in find_videos(root, follow_links=True)] == ["file", "folder/x", "in", "same"]


def test_long_videos_are_shared_out() -> None:
    settings = ChunkSettings(seconds=15)
    assert split(0, settings) == [(0, None)]
    assert split(599, settings) == [(0, None)]
    assert split(3600, settings)[:2] == [(0, 20), (20, 40)]
    assert split(3600, settings)[-1] == (220, None)
    assert split(7000, ChunkSettings(seconds=3600))[-1] == (0, None)


def test_a_folder_becomes_chunks_whatever_the_number_of_processes(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    done = tool(recordings, out, "--seconds", 1, "--short_side", 48, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "5 videos" in done.stdout
    assert "wrote 5 videos" in done.stdout
    files = tree(out)
    assert {name.rsplit("/", 1)[0] for name in files} == set(IDS)
    assert sorted(path.name for path in (out / "day 1" / "台所").iterdir()) == ["0000.mp4", "0001.mp4", "0002.mp4"]
    assert numbers(reference(out / "b.c" / "d.e" / "0001.mp4")[1]) == list(range(10, 20))
    assert not (out / ".chunk_videos" / "parts").exists()
    lines = [json.loads(line) for line in (out / ".chunk_videos" / "done.jsonl").read_text().splitlines()]
    assert {line["video_id"]: line["chunks"] for line in lines}["a"] == 4

    again = tool(recordings, out, "--seconds", 1, "--short_side", 48)
    assert (again.returncode, tree(out)) == (0, files)
    assert "nothing to do" in again.stdout
    other = tool(recordings, out, "--seconds", 1, "--short_side", 64)
    assert (other.returncode, tree(out)) == (2, files)
    assert other.stderr.startswith("error: ")
    assert "short_side 48 (requested: 64)" in other.stderr

    # What is missing is made again, by one process this time, and is the same.
    shutil.rmtree(out / "day 1")
    monkeypatch.setenv("EGOHOD_START_METHOD", "spawn")
    one = tool(recordings, out, "--seconds", 1, "--short_side", 48, "--workers", 1)
    assert (one.returncode, tree(out)) == (0, files)
    assert "3 of 5 videos are complete already" in one.stdout


def test_one_long_video_in_ranges(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_RANGE_SECONDS", 1.0)
    settings = ChunkSettings(seconds=1.0, short_side=48)
    output = Output(tmp_path / "out", settings, recordings)
    lines: list[str] = []
    with output.claim(), Progress("chunk", 4, seconds=0, report=lines.append) as progress:
        probes, faults = chunking.probe_videos(find_videos(recordings, "a.mp4"), 2)
        assert not faults
        summary = chunking.write_videos(probes, output, 2, progress=progress)
    assert lines[-1].startswith("chunk: 100 %  4 of 4")
    assert (summary.videos, summary.seconds) == (1, 4)
    chunks = sorted((tmp_path / "out" / "a").iterdir())
    assert [numbers(reference(path)[1])[0] for path in chunks] == [0, 10, 20, 30]


def test_damaged_files_are_named_and_the_others_are_written(recordings: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    shutil.copytree(recordings / "b.c", root / "good")
    content = encode(root / "cut.mp4", 60, x264="keyint=10:qp=1", faststart=True).read_bytes()
    (root / "cut.mp4").write_bytes(content[: len(content) // 2])
    (root / "none.mp4").write_text("no video")
    done = tool(root, out, "--seconds", 1, "--workers", 2)
    assert done.returncode == 1
    lines = sorted(done.stderr.splitlines())
    assert lines[0] == "2 files could not be read"
    assert [
        f"could not be read: {root}/{name}.mp4: " in line for name, line in zip(("cut", "none"), lines[1:], strict=True)
    ]
    assert {path.name for path in out.iterdir()} == {"good", ".chunk_videos"}
    assert "wrote 1 videos" in done.stdout
    strict = tool(root, tmp_path / "strict", "--seconds", 1, "--strict")
    assert strict.returncode == 2
    assert strict.stderr.startswith("error: ")
    assert strict.stderr.count("\n") == 1


def test_folders_that_are_no_output(recordings: Path, tmp_path: Path) -> None:
    settings = ChunkSettings()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(UserError, match="not empty and not made by"):
        Output(tmp_path / "full", settings, recordings)
    with pytest.raises(UserError, match="is in the input folder"):
        Output(recordings / "chunks", settings, recordings)
    with pytest.raises(UserError, match="not a folder"):
        Output(tmp_path / "full" / "letter.txt", settings, recordings)
    with Output(tmp_path / "out", settings, recordings).claim(), pytest.raises(UserError, match="another process"):  # noqa: SIM117
        with Output(tmp_path / "out", settings, recordings).claim():
            pass
    (tmp_path / "out" / ".chunk_videos" / "done.jsonl").write_bytes(b'{"video_id": "v", "source_bytes": "x"}\n[[\xff\n')
    Output(tmp_path / "out", settings, recordings)
    for damaged in ('{"seconds": ', "[" * 100_000):
        (tmp_path / "out" / ".chunk_videos" / "settings.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            Output(tmp_path / "out", settings, recordings)


def test_another_file_under_the_same_id_is_not_taken_for_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode(tmp_path / "one" / "v.mp4", 10)
    encode(tmp_path / "two" / "v.mp4", 12)
    assert tool(tmp_path / "one", out, "--workers", 1).returncode == 0
    done = tool(tmp_path / "two", out, "--workers", 1)
    assert done.returncode == 2
    assert "made of another file" in done.stderr
    assert Output(out, ChunkSettings(), tmp_path / "one").is_done(Video("v", tmp_path / "one" / "v.mp4"))


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 130, marks=pytest.mark.ci),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.ci),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_result(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    root, out, straight = tmp_path / "root", tmp_path / "out", tmp_path / "straight"
    encode(root / "a.mp4", 10)
    encode(root / "b.mp4", 120, size=(320, 240), x264="keyint=250:qp=30:bframes=0")
    options = ("--seconds", "1", "--preset", "slow", "--workers", "1")
    run = subprocess.Popen(
        [*TOOL, str(root), str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    parts = out / ".chunk_videos" / "parts" / "b"
    while run.poll() is None and not ((parts / "0001.mp4").exists() and (out / "a").exists()):
        time.sleep(0.01)
    run.send_signal(sent)
    _, errors = run.communicate()
    assert run.returncode == code
    assert b"Traceback" not in errors
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == ["a"]
    if sent != signal.SIGKILL:
        assert errors == b"interrupted; rerun the same command to resume\n"
        assert not parts.exists()
    else:  # its process leaves too, and then the folder is free
        while (out / ".chunk_videos" / "lock").exists() and not free(out):
            time.sleep(0.05)
    first = (out / "a" / "0000.mp4").stat().st_mtime_ns
    assert tool(root, out, *options).returncode == 0
    assert (out / "a" / "0000.mp4").stat().st_mtime_ns == first
    assert tool(root, straight, *options[:-1], "2").returncode == 0
    assert tree(out) == tree(straight)


def free(out: Path) -> bool:
    """Whether no process claims the folder."""
    try:
        with locked(out / ".chunk_videos" / "lock"):
            return True
    except BlockingIOError:
        return False


def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files imitates a full disk."""
    root, out = tmp_path / "root", tmp_path / "out"
    encode(root / "a.mp4", 2)
    encode(root / "b.mp4", 60, size=(320, 240), x264="qp=10")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.argv[0] = sys.argv[1];"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r}); import chunk_videos; from egohod import cli;"
        f"sys.exit(cli.run(chunk_videos.main, [{str(root)!r}, {str(out)!r}, '--crf', '1', '--workers', '1']))"
    )
    run = subprocess.run([sys.executable, "-B", "-c", code, "-c"], capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: cannot write ")
    assert run.stderr.count("\n") == 1
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == ["a"]
    assert not (out / ".chunk_videos" / "parts").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written(recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    done = tool(recordings, tmp_path / "locked" / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_dry_run_estimates_and_writes_nothing(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGOHOD_START_METHOD", "spawn")  # what it sends to its processes has to pickle
    root, out = tmp_path / "root", tmp_path / "new" / "out"
    shutil.copytree(recordings, root)
    (root / "none.mp4").write_text("no video")
    (root / "._a.mp4").unlink()
    done = tool(root, out, "--dry_run", "--seconds", 1, "--workers", 2)
    assert done.returncode == 1, done.stderr
    assert "1 files could not be read" in done.stderr
    for part in ("5 videos", "h264 96x64 10 fps: 5 files", "hours) with 2 workers", "TB", "free at"):
        assert part in done.stdout, part
    assert not out.parent.exists()

    # The estimate holds: the chunks of a file of the same kind are about as large as estimated.
    (root / "none.mp4").unlink()
    settings = ChunkSettings()
    probes, _ = chunking.probe_videos(find_videos(root), 1)
    estimate = chunking.estimate(probes, settings, 1)
    assert not estimate.faults
    assert tool(root, out, "--workers", 1).returncode == 0
    assert estimate.bytes == pytest.approx(sum(map(len, tree(out).values())), rel=0.35)
    assert 0 < estimate.hours < 0.1


def test_progress_counts_seconds_of_video(recordings: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import chunk_videos;"
        "chunk_videos.PROGRESS_SECONDS = 0;"
        f"sys.exit(chunk_videos.main([{str(recordings)!r}, {str(tmp_path / 'out')!r}, '--workers', '1']))"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "ETA" in line and line.startswith("chunk: ")]
    assert re.match(r"chunk: 100 %  14 of 14 s of video, ", lines[-1])
    assert lines[-1].endswith(", 5 of 5 videos")
    shares = [int(line.split("%")[0].split()[1]) for line in lines]
    assert shares == sorted(shares)
    assert len(set(shares)) > 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--short_side", "225"], "--short_side is 225"),
        (["--preset", "swift"], "preset 'swift'"),
        (["--workers", "0"], "--workers is 0"),
        (["--list", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    recordings: Path, tmp_path: Path, options: list[str], expected: str
) -> None:
    done = tool(recordings, tmp_path / "out", *options)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_gives_a_reason_for_every_option() -> None:
    done = tool("--help")
    assert done.returncode == 0
    for option in [*vars(ChunkSettings()), "workers", "pattern", "list", "strict", "follow_links", "dry_run"]:
        option = option.replace("fastdecode", "no_fastdecode")
        assert f"--{option} " in done.stdout, option


# --------------------------------------------------------------------------------------------------
# Tar shards
# --------------------------------------------------------------------------------------------------


def members(folder: Path) -> dict[str, bytes]:
    """Every member of the shards in a folder, which tar itself can read."""
    contents = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                file = archive.extractfile(member)
                assert file is not None
                contents[member.name] = file.read()
    return contents


def test_shards_hold_the_chunks_of_a_folder(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    options = ["--seconds", 1, "--short_side", 48, "--workers", 2]
    assert tool(recordings, plain, *options).returncode == 0
    done = tool(recordings, packed, *options, "--tar")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in packed.iterdir()) == [".chunk_videos", "shard-00000.tar", "shards.parquet"]
    assert members(packed) == tree(plain)
    index = open_root(packed / "shards.parquet")
    for name, content in tree(plain).items():
        assert index.open(name).read() == content  # type: ignore[union-attr]
    assert index.names("") == sorted(video.partition("/")[0] for video in {"a", "b.c", "day 1", "z"})
    assert index.names("day 1/küche 2") == ["0000.mp4", "0001.mp4"]
    assert index.names("day") == []
    with pytest.raises(FileNotFoundError):
        index.open("a/0009.mp4")
    # Ordinary folders and shards are not mixed.
    assert "tar False (requested: True)" in tool(recordings, plain, *options, "--tar").stderr
    with pytest.raises(UserError, match=r"a folder of tar shards; set the root to their index, .*shards\.parquet"):
        open_root(packed)
    # Rerun: nothing is written.
    before = {path.name: path.stat().st_mtime_ns for path in packed.iterdir()}
    assert "is complete, nothing to do" in tool(recordings, packed, *options, "--tar").stdout
    assert {path.name: path.stat().st_mtime_ns for path in packed.iterdir()} == before


def test_killed_shards_resume_to_the_same_content(recordings: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    options = [recordings, "{}", "--seconds", 0.5, "--short_side", 48, "--workers", 1, "--tar"]
    assert tool(options[0], straight, *options[2:]).returncode == 0
    for lines in (1, 3):  # killed once after the first video, once after the third
        command = [*TOOL, str(recordings), str(killed), *map(str, options[2:])]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        done = killed / ".chunk_videos" / "done.jsonl"
        while not done.exists() or done.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
    # As if it had died within a member, and a disk had lost the last video that it noted.
    shard, notes = killed / "shard-00000.tar", done.read_text().splitlines(keepends=True)
    with shard.open("ab") as file:
        file.write(b"half a chunk")
    lost = json.loads(notes[-1]) | {"video_id": "z", "end": 1 << 40}
    done.write_text("".join([*notes, json.dumps(lost) + "\n", '{"video_id": "z", "sou']))
    assert tool(recordings, killed, *options[2:]).returncode == 0
    assert members(killed) == members(straight)
    assert sorted(open_root(killed / "shards.parquet").names("")) == ["a", "b.c", "day 1", "z"]


def test_a_full_shard_is_followed_by_another(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_SHARD_BYTES", 20_000)
    output = Output(tmp_path / "out", ChunkSettings(seconds=1, short_side=48, tar=True), recordings)
    videos = find_videos(recordings)
    with output.claim():
        chunking.write_videos(chunking.probe_videos(videos, 1)[0], output, 1)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert shards[:2] == ["shard-00000.tar", "shard-00001.tar"]
    again = Output(tmp_path / "out", ChunkSettings(seconds=1, short_side=48, tar=True), recordings)
    assert all(again.is_done(video) for video in videos)
    # As after a power cut: the next run writes over the place of what is not noted, and may be killed.
    done = tmp_path / "out" / ".chunk_videos" / "done.jsonl"
    *lines, last = done.read_text().splitlines(keepends=True)
    done.write_text("".join(lines))
    with Output(tmp_path / "out", ChunkSettings(seconds=1, short_side=48, tar=True), recordings).claim():
        index = open_root(tmp_path / "out" / "shards.parquet")
        assert not index.names(json.loads(last)["video_id"])
        assert all(index.names(json.loads(line)["video_id"]) for line in lines)


@pytest.mark.parametrize("remote", [False, True])
def test_training_and_evaluation_read_shards_as_any_root(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder, tar in ((plain, False), (packed, True)):
        output = Output(folder, ChunkSettings(seconds=1, short_side=48, tar=tar), recordings)
        with output.claim():
            chunking.write_videos(chunking.probe_videos(find_videos(recordings), 1)[0], output, 1)
    rows = [f"{video},{start},{start + 1.5},text" for video in ("a", "day 1/küche 2") for start in (0.2, 0.4)]
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second,text\n" + "\n".join(rows) + "\n")
    server, root = FaultyS3(), str(packed / "shards.parquet")
    try:
        if remote:
            point_to(monkeypatch, server.address)
            server.objects |= {f"/bucket/{path.name}": path.read_bytes() for path in packed.glob("s*")}
            root = "s3://bucket/shards.parquet"

        def clips(root: str, train: bool) -> ClipDataset:
            source = SourceConfig(root=root, chunk_seconds=1.0)
            table = read_clips(tmp_path / "clips.csv")
            options = {"size": 32, "num_frames": 3, "tokenizer": Tokenizer(), "train": train, "read_ahead": 2}
            return ClipDataset([(table, source)], decoder="pyav", **options)

        for train in (False, True):
            batches = [
                next(iter(eval_loader(clips(each, train), range(4), 4, 0, collate=collate if train else collate_views)))
                for each in (str(plain), root)
            ]
            assert torch.equal(batches[0]["video"], batches[1]["video"])
        data = clips(root, False)
        assert data.missing() == {}
        assert len(set(data.identities)) == 4
        if remote:  # the index once, then a range for each of a clip's two chunks
            server.requests.clear()
            data = clips(root, False)
            list(eval_loader(data, range(4), 4, 0, collate=collate_views))
            assert len(server.requests) == 1 + 8
            server.objects["/bucket/shard-00000.tar"] = b"short"
            monkeypatch.setattr("egohod.data.storage._PAUSE", 0.001)
            assert "shards.parquet/a/0000.mp4" in data[0]["fault"] or "shard-00000.tar" in data[0]["fault"]
        else:
            (packed / "shard-00000.tar").write_bytes(b"short")
            assert "shard-00000.tar: truncated" in data[0]["fault"]
            (packed / "shard-00000.tar").unlink()
            assert "shard-00000.tar: no such file, though shards.parquet has it" in data[0]["fault"]
            (packed / "shards.parquet").write_bytes(b"PAR1 damaged")
            with pytest.raises(UserError, match=r"shards\.parquet: not an index of tar shards"):
                clips(root, False)
            (packed / "shards.parquet").unlink()
            with pytest.raises(UserError, match=r"shards\.parquet: no such index .*--tar writes it"):
                clips(root, False)
    finally:
        server.close()
