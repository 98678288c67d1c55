"""A sample is a function of (seed, epoch, index); unreadable clips are replaced, counted, and stop the run."""

import logging
import pickle
import re
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_files import encode

from egohod.data import dataset as clips_module
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, FaultLedger, Tokenizer, collate
from egohod.data.formats import read_clips
from egohod.data.loader import BatchPlan, train_loader
from egohod.data.storage import LocalCache, RemoteFolder
from egohod.data.videos import VideoError
from egohod.distributed import Distributed
from egohod.errors import UserError
from tests.ranks import pair

CLIPS = 12
TOKENIZER = Tokenizer()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, a csv of twelve clips on them, and one with bad rows in it."""
    root = tmp_path_factory.mktemp("world")
    for number in range(3):
        encode(root / "videos" / f"v{number}.mp4", 40, first=10 * number)
    (root / "videos" / "bad.mp4").write_text("no video")
    rows = [f"v{i % 3},{i % 3 * 0.5},{i % 3 * 0.5 + 2},#C C moves cup {i} with the left hand" for i in range(CLIPS)]
    header = "video_id,start_second,end_second,text\n"
    (root / "clips.csv").write_text(header + "\n".join(rows) + "\n")
    rows[3], rows[7] = "bad,0,2,damaged", "missing,0,2,absent"
    (root / "faulty.csv").write_text(header + "\n".join(rows) + "\n")
    return root


def dataset(world: Path, name: str = "clips", **options: Any) -> ClipDataset:
    source = SourceConfig(metadata=str(world / f"{name}.csv"), root=str(world / "videos"))
    options = {
        "size": 32,
        "num_frames": 4,
        "tokenizer": TOKENIZER,
        "decoder": "pyav",
        "train": True,
        "flip": 0.5,
    } | options
    return ClipDataset([(read_clips(source), source)], **options)


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return torch.equal(a["video"], b["video"]) and torch.equal(a["tokens"], b["tokens"]) and a["index"] == b["index"]


def test_a_sample_depends_on_seed_epoch_and_index_alone(world: Path) -> None:
    one, other = dataset(world), dataset(world)
    keys = [(epoch, index) for epoch in range(3) for index in range(CLIPS)]
    first = {key: one[key] for key in keys}
    assert all(equal(other[key], first[key]) for key in reversed(keys))
    assert not any(equal(first[0, i], first[1, i]) for i in range(CLIPS))
    assert not any(equal(dataset(world, seed=1)[0, i], first[0, i]) for i in range(CLIPS))


def test_spawned_workers_load_what_forked_ones_do(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in the same order, also resumed; whatever a data set holds is sent to them."""
    options = {"replacements": 1, "opposites": True, "tags": True, "cache": LocalCache(tmp_path, 1.0)}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        return value.tolist() if isinstance(value, torch.Tensor) else value

    def batches(start_method: str, start: int) -> list[Any]:
        monkeypatch.setenv("EGOHOD_START_METHOD", start_method)
        data = dataset(world, **options)
        data[0, 0]  # texts and files that this process has read
        loader = train_loader(data, BatchPlan(CLIPS, 4, 0), start_step=start, total_steps=5, workers=2)
        return [plain(batch) for batch in loader]

    forked = batches("fork", 0)
    assert len(forked) == 5
    assert "has_negative" in forked[0]
    assert batches("spawn", 2) == forked[2:]
    # An open file and a connection stay in their process, what was listed goes along.
    reader = dataset(world, train=False, **options)
    reader[0]
    pickle.loads(ForkingPickler.dumps(reader))
    remote = RemoteFolder("memory://spawned")
    remote.listings.put("", {"a.mp4": 3})
    remote._connect()
    copied = pickle.loads(pickle.dumps(remote))
    assert copied.listings.entries() == {"": {"a.mp4": 3}}
    assert not copied._systems


def test_a_frame_cache_changes_no_sample(world: Path, tmp_path: Path) -> None:
    cached = dataset(world, train=True, frame_cache=str(tmp_path / "frames"))
    plain = dataset(world, train=True)
    for index in (0, 1, 0):
        assert equal(cached[0, index], plain[0, index])
    assert list(tmp_path.rglob("frames.npy"))
    shown, decoded = dataset(world, frame_cache=str(tmp_path / "frames")), dataset(world)
    assert torch.equal(shown[1]["video"], decoded[1]["video"])


def test_shapes_and_types(world: Path) -> None:
    sample = dataset(world)[0, 5]
    assert sample["video"].shape == (3, 4, 32, 32)
    assert sample["video"].dtype == torch.uint8
    assert sample["tokens"].shape == (77,)
    assert sample["fault"] is None
    assert len(dataset(world)) == CLIPS
    with pytest.raises(IndexError):
        dataset(world)[0, CLIPS]


def test_evaluation_samples_are_fixed_and_plain(world: Path) -> None:
    evaluation = dataset(world, train=False, flip=1.0)
    sample = evaluation[2]["video"]
    assert sample.shape == (1, 3, 4, 32, 32)
    assert torch.equal(sample, evaluation[2]["video"])
    assert torch.equal(sample, dataset(world, train=False, seed=5)[2]["video"])


def test_a_flip_mirrors_picture_and_caption(world: Path) -> None:
    plain, flipped = dataset(world, flip=0.0), dataset(world, flip=1.0)
    for index in range(CLIPS):
        a, b = plain[0, index], flipped[0, index]
        assert torch.equal(a["video"].flip(-1), b["video"])
        assert torch.equal(b["tokens"], TOKENIZER([f"#C C moves cup {index} with the right hand"])[0])


def test_every_clip_is_decoded_and_cropped_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = dataset(world)
    calls = []
    inner = clips_module.crop
    monkeypatch.setattr(clips_module, "crop", lambda *a: calls.append(a[0].shape) or inner(*a))
    clips[0, 0]
    assert calls == [(4, 64, 96, 3)]


def test_an_unreadable_training_clip_is_replaced_the_same_way_every_time(world: Path) -> None:
    for index, reason in ((3, "not a video"), (7, "no such file")):
        sample = dataset(world, "faulty")[0, index]
        assert equal(sample, dataset(world, "faulty")[0, index])
        assert sample["index"] not in (3, 7)
        assert f"row {index + 1}:" in sample["fault"]
        assert reason in sample["fault"]
    replacements = {dataset(world, "faulty")[epoch, 3]["index"] for epoch in range(12)}
    assert len(replacements) > 2


def test_an_unreadable_clip_in_an_evaluation_is_reported_with_its_name(world: Path) -> None:
    sample = dataset(world, "faulty", train=False)[3]
    assert sample["video"] is None
    assert re.match(r"clip 4: .*bad\.mp4: not a video", sample["fault"])


def test_a_folder_without_any_readable_clip_gives_up(world: Path, tmp_path: Path) -> None:
    clips = ClipDataset(
        [(read_clips(world / "clips.csv"), SourceConfig(root=str(tmp_path)))],
        size=32,
        num_frames=4,
        tokenizer=TOKENIZER,
        decoder="pyav",
        train=True,
    )
    with pytest.raises(VideoError, match=r"11 clips in a row could not be read; the last: .*no such file"):
        clips[0, 0]


def test_roots_by_dataset(world: Path, tmp_path: Path) -> None:
    csv = tmp_path / "two.csv"
    csv.write_text("video_id,start_second,end_second,text,dataset\nv0,0,2,a,ego4d\nv1,0,2,b,howto\n")
    encode(tmp_path / "other" / "v1.mp4", 40)

    def build(**roots: Any) -> ClipDataset:
        options = {"size": 32, "num_frames": 2, "tokenizer": TOKENIZER, "decoder": "pyav"}
        return ClipDataset([(read_clips(csv), SourceConfig(metadata=str(csv), **roots))], **options)

    clips = build(root=str(tmp_path / "other"), dataset_roots={"ego4d": str(world / "videos"), "unused": "/none"})
    assert [clips[i]["index"] for i in range(2)] == [0, 1]
    with pytest.raises(UserError, match="the rows of dataset 'howto' need a video folder"):
        build(dataset_roots={"ego4d": str(world / "videos")})
    with pytest.raises(UserError, match="/none: no such video folder"):
        build(root="/none")


def test_collate(world: Path) -> None:
    clips = dataset(world, "faulty")
    batch = collate([clips[0, i] for i in (0, 3, 5)])
    assert batch["video"].shape == (3, 3, 4, 32, 32)
    assert torch.equal(batch["video"][2], clips[0, 5]["video"])
    assert batch["tokens"].shape == (3, 16)
    assert batch["index"].tolist() == [0, clips[0, 3]["index"], 5]
    assert len(batch["faults"]) == 1


def batch_of(size: int, *faults: str) -> dict[str, Any]:
    return {"index": torch.arange(size), "faults": list(faults)}


def update(ledger: FaultLedger, *batches: dict[str, Any]) -> None:
    """As the training loop of a single process does after every step."""
    for batch in batches:
        ledger.update(batch)
        ledger.check_share(ledger.seen, ledger.bad, Distributed(0, 1, torch.device("cpu"), None))


def test_the_ledger_logs_once_and_stops_above_the_share(caplog: pytest.LogCaptureFixture) -> None:
    ledger = FaultLedger(0.01)
    with caplog.at_level(logging.WARNING):
        update(ledger, *[batch_of(48, "a: broken", "b: broken")] * 5)
    assert [record.getMessage().count("broken") for record in caplog.records] == [1, 1]
    with pytest.raises(
        UserError, match=r"12 of 300 clips could not be read.*max_bad_fraction=0\.01.*c: broken"
    ) as error:
        update(ledger, batch_of(48, "b: broken", "c: broken"))
    # exclude alone would change the clips, and a checkpoint of this run would be refused.
    assert "to resume this run, raise data.max_bad_fraction; for a new run, tools/verify_dataset.py" in str(error.value)


def test_the_ledger_judges_many_clips_by_their_share() -> None:
    ledger = FaultLedger(0.01)
    update(ledger, *[batch_of(99, "a: broken")] * 100, batch_of(1089, *("b: broken",) * 11))
    with pytest.raises(UserError, match="112 of 11101"):
        update(ledger, batch_of(0, "c: broken"))


def test_clips_that_replace_others_count_as_tried() -> None:
    """Half of all clips are bad: in front of 1,000 that are delivered, 1,000 could not be read."""
    ledger = FaultLedger(0.55)
    update(ledger, *[batch_of(10, *(f"{i}: broken" for i in range(10)))] * 100)
    assert (ledger.seen, ledger.bad) == (2000, 1000)


def test_a_ledger_without_tolerance_and_one_with_all() -> None:
    with pytest.raises(UserError, match="1 of 10000"):
        update(FaultLedger(0.0), batch_of(9_999, "a: broken"))
    update(FaultLedger(1.0), batch_of(3, "a\nb", "c"))


def test_the_share_is_that_of_all_processes() -> None:
    """One of two processes has more than its share of bad clips, which is no other run than with one process."""
    ledger, other = FaultLedger(0.01), pair("clip 8: broken")
    ledger.update(batch_of(985, *(f"clip {i}: broken" for i in range(15))))
    ledger.check_share(ledger.seen + 1000, ledger.bad + 5, other)
    with pytest.raises(UserError, match=r"21 of 2000 .*clip 14: broken"):
        ledger.check_share(ledger.seen + 1000, ledger.bad + 6, other)


def test_the_ledger_continues_after_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    ledger, resumed = FaultLedger(0.01), FaultLedger(0.01)
    update(ledger, batch_of(90, *(f"clip {i}: broken" for i in range(10))))
    state = ledger.state_dict()
    assert all(isinstance(value, (int, list)) for value in state.values())
    resumed.load_state_dict(state)
    caplog.clear()
    with pytest.raises(UserError, match="11 of 110"):
        update(resumed, batch_of(9, "clip 3: broken"))
    assert not caplog.records


def test_what_is_of_one_table_is_not_taken_for_that_of_several(world: Path) -> None:
    source = dataset(world).sources[0]
    several = ClipDataset([(source.table, source.config)] * 2, size=32, decoder="pyav")
    for each in (lambda: several.clips, lambda: several.config, several.length_note):
        with pytest.raises(AssertionError):
            each()


def test_generator_streams_of_neighbours_are_independent(world: Path) -> None:
    clips = dataset(world, num_frames=1)
    videos = np.stack([clips[epoch, 0]["video"].numpy().ravel() for epoch in range(20)])
    assert len(np.unique(videos, axis=0)) == 20


def test_whatever_a_clip_raises_costs_that_clip(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is tested here; libraries raise many other types for damaged files."""
    clips, plain = dataset(world), clips_module.choose_text

    def odd(texts: object, mode: str, rng: object) -> str:
        if texts == clips.row(5).texts:
            raise KeyError("verb")
        return plain(texts, mode, rng)  # type: ignore[arg-type]

    monkeypatch.setattr(clips_module, "choose_text", odd)
    sample = clips[0, 5]
    assert sample["index"] != 5
    assert f"{clips.where(5)}: {clips.row(5).video_id}: cannot be read: KeyError: 'verb'" in sample["fault"]
    monkeypatch.setattr(clips_module, "choose_text", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        clips[0, 5]
