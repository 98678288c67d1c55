"""Order of the clips, resuming, and processes that fail or must end."""

import copy
import itertools
import math
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch

from egohod.data import loader
from egohod.data.loader import (
    BatchPlan,
    ClipLoader,
    EvalLoader,
    MixedPlan,
    check_shared_memory,
    eval_loader,
    shares,
    train_loader,
    worker_count,
)
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.runtime import Interrupted, StopRequest, core_quota
from tests.support import Command


class Numbers:
    """Stands in for a ClipDataset: the 'video' holds the requested key and the process."""

    def __init__(self, size: int = 40) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.sample(epoch, index)

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        video = torch.tensor([epoch, index, os.getpid()]).reshape(3, 1, 1, 1)
        return {
            "video": video,
            "tokens": torch.tensor([49406, index + 1, 49407] + [0] * 74),
            "index": index,
            "fault": None,
        }


def clips_of(loader: ClipLoader) -> list[list[tuple[int, int]]]:
    return [[(int(e), int(i)) for e, i in batch["video"][:, :2, 0, 0, 0]] for batch in loader]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_clip_at_most_once_an_epoch(share: float) -> None:
    plan = BatchPlan(103, 10, seed=3, groups=np.arange(103) % 7, share=share, group_size=3)
    assert plan.steps_per_epoch == 10
    for epoch in range(3):
        batches = np.stack([plan.batch(epoch, step) for step in range(10)])
        assert batches.shape == (10, 10)
        assert batches.dtype == np.int64
        assert len(np.unique(batches)) == 100
        assert batches.min() >= 0
        assert batches.max() < 103


def test_every_clip_once_an_epoch_whatever_the_number_of_processes() -> None:
    """Started again in the middle of an epoch, with other processes and another accumulation: 1, then 2, then 4 x 2."""
    plan = BatchPlan(40, 8, seed=1)
    seen: list[tuple[int, int]] = []
    for first, last, world_size, accumulation in ((0, 2, 1, 1), (2, 3, 2, 1), (3, 5, 4, 2)):
        for rank in range(world_size):
            loader = train_loader(
                Numbers(),  # type: ignore[arg-type]
                plan,
                start_step=first,
                total_steps=last,
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
            )
            seen += [key for batch in clips_of(loader) for key in batch]
    assert sorted(seen) == [(0, index) for index in range(40)]


def test_a_batch_is_a_function_of_seed_epoch_and_step() -> None:
    def plan(seed: int = 0) -> BatchPlan:
        return BatchPlan(64, 8, seed, groups=np.arange(64) // 8, share=0.5)

    one = plan()
    forward = {(e, s): one.batch(e, s).tolist() for e in range(3) for s in range(8)}
    assert all(plan().batch(e, s).tolist() == forward[e, s] for e, s in reversed(forward))
    assert one.batch(0, 0).tolist() != one.batch(1, 0).tolist()
    assert one.batch(0, 0).tolist() != plan(1).batch(0, 0).tolist()
    with pytest.raises(IndexError):
        one.batch(0, 8)


def test_hard_negatives_fill_their_share_with_groups() -> None:
    codes = np.random.default_rng(0).integers(0, 60, 600)
    plan = BatchPlan(600, 32, seed=0, groups=codes, share=0.5, group_size=4)
    for step in range(plan.steps_per_epoch):
        batch = codes[plan.batch(5, step)]
        assert (batch[:16].reshape(4, 4) == batch[:16].reshape(4, 4)[:, :1]).all()
    # The rest is drawn from everything, not from what is alike.
    assert np.mean([len(np.unique(codes[plan.batch(5, s)][16:])) for s in range(18)]) > 12


def test_too_few_groups_are_dealt_evenly() -> None:
    codes = np.arange(80)
    codes[:12] = np.repeat([0, 1, 2], 4)
    plan = BatchPlan(80, 8, seed=0, groups=codes, share=1.0, group_size=4)
    alike = [len(np.unique(codes[plan.batch(0, step)])) < 8 for step in range(10)]
    assert sum(alike) == 3
    assert not any(a and b for a, b in itertools.pairwise(alike))
    assert len(np.unique([plan.batch(0, s) for s in range(10)])) == 80


def test_groups_change_from_epoch_to_epoch() -> None:
    plan = BatchPlan(40, 8, seed=0, groups=np.zeros(40, dtype=np.int64), share=1.0, group_size=4)
    assert {frozenset(plan.batch(0, 0)[:4].tolist())} != {frozenset(plan.batch(1, 0)[:4].tolist())}


def test_more_clips_in_a_batch_than_there_are() -> None:
    with pytest.raises(UserError, match=r"batch needs 8 clips, but there are only 7; lower train.global_batch_size"):
        BatchPlan(7, 8, 0)


def test_shares_of_a_batch_are_whole_clips_by_weight() -> None:
    assert shares([3, 1], 8) == [6, 2]
    assert shares([1, 1, 1], 8) == [3, 3, 2]
    assert sum(shares([0.613, 0.2, 0.187], 2048)) == 2048
    with pytest.raises(UserError, match=r"weight 0.01 out of 1.01 gets no clip of a batch of 8"):
        shares([1, 0.01], 8)


def test_a_mixed_batch_holds_its_share_of_each_source_whatever_their_sizes() -> None:
    plan = MixedPlan([BatchPlan(100, 6, 0), BatchPlan(5, 2, 0)], [0, 100], seed=0)
    assert (plan.batch_size, plan.steps_per_epoch) == (8, 13)
    seen: list[tuple[int, int]] = []
    for step in range(20):
        keys = plan.keys(step)
        assert keys.shape == (8, 2)
        assert (keys[:, 1] >= 100).sum() == 2
        assert np.array_equal(keys, MixedPlan([BatchPlan(100, 6, 0), BatchPlan(5, 2, 0)], [0, 100], 0).keys(step))
        seen += [(int(epoch), int(clip)) for epoch, clip in keys if clip >= 100]
    # The small source goes through epochs of its own, so that its clips are drawn anew each time.
    assert len(set(seen)) == len(seen) == 40
    assert {epoch for epoch, _ in seen} == set(range(10))
    assert any((plan.keys(step)[:6, 1] >= 100).any() for step in range(4)), "sources must be shuffled"


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_processes_and_micro_batches_share_the_global_batch(world_size: int, accumulation: int) -> None:
    plan, size = BatchPlan(40, 16, 0), 16 // (world_size * accumulation)
    shares = [
        clips_of(
            train_loader(
                Numbers(),
                plan,
                start_step=0,
                total_steps=3,
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
            )
        )
        for rank in range(world_size)
    ]
    for step in range(3):
        epoch, within = divmod(step, 2)
        expected = [(epoch, int(i)) for i in plan.batch(epoch, within)]
        joint = [
            clip
            for micro in range(accumulation)
            for rank in range(world_size)
            for clip in shares[rank][step * accumulation + micro]
        ]
        assert joint == expected
        assert all(len(batch) == size for batch in shares[0])


def test_an_uneven_share_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be shared evenly by 3 processes"):
        train_loader(Numbers(), BatchPlan(40, 16, 0), start_step=0, total_steps=1, world_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_any_step_yields_the_same_batches(workers: int) -> None:
    plan = BatchPlan(40, 8, 0)
    straight = clips_of(train_loader(Numbers(), plan, start_step=0, total_steps=12, accumulation=2))
    assert len(straight) == 24
    for start in (3, 5, 11, 12):
        loader = train_loader(
            Numbers(), BatchPlan(40, 8, 0), start_step=start, total_steps=12, accumulation=2, workers=workers
        )
        assert len(loader) == 2 * (12 - start)
        assert clips_of(loader) == straight[2 * start :]


def test_workers_live_through_epochs() -> None:
    loader = train_loader(Numbers(), BatchPlan(40, 8, 0), start_step=0, total_steps=25, workers=2)
    processes = [int(batch["video"][0, 2, 0, 0, 0]) for batch in loader]
    assert len(set(processes)) == 2
    assert os.getpid() not in processes


def test_evaluation_visits_each_clip_once_in_order() -> None:
    for workers in (0, 2):
        loader = eval_loader(Numbers(), np.array([7, 3, 5, 1, 0]).tolist(), 2, workers)
        assert [batch["index"].tolist() for batch in loader] == [[7, 3], [5, 1], [0]]
    assert list(eval_loader(Numbers(), [], 2, 0)) == []


def test_a_batch_has_trimmed_tokens_and_faults() -> None:
    batch = next(iter(eval_loader(Numbers(), [4, 5], 2, 0)))
    assert batch["tokens"].shape == (2, 8)
    assert batch["faults"] == []


class Failing(Numbers):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        if index == 5:
            if self.how == "user":
                raise UserError("clip.mp4: is broken")
            if self.how == "bug":
                raise ZeroDivisionError("ten\nlines")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(epoch, index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_user_error_in_a_worker_arrives_as_it_is(workers: int) -> None:
    batches = iter(eval_loader(Failing("user"), range(8), 2, workers))
    assert next(batches)["index"].tolist() == [0, 1]
    with pytest.raises(UserError, match=r"^clip\.mp4: is broken$"):
        list(batches)


def test_a_bug_in_a_worker_is_one_error_with_the_clip() -> None:
    with pytest.raises(UserError, match=r"failed on clip 5: ZeroDivisionError: ten"):
        list(eval_loader(Failing("bug"), range(8), 2, 1))
    with pytest.raises(ZeroDivisionError):
        list(eval_loader(Failing("bug"), range(8), 2, 0))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_killed_worker_is_one_clear_error(start_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGOHOD_START_METHOD", start_method)
    with pytest.raises(UserError, match=r"a loader process died .*lower data\.workers"):
        list(eval_loader(Failing("kill"), range(8), 2, 2))


IN_LITTLE_SHARED_MEMORY = """
import logging, os, sys
sys.path[:0] = sys.argv[1:3]
import torch
from test_loader import Numbers
from egohod.config import UserError
from egohod.data.loader import BatchPlan, eval_loader, train_loader

class Big(Numbers):
    def sample(self, epoch, index):
        return super().sample(epoch, index) | {"video": torch.full((3, 4, 64, 64), index, dtype=torch.uint8)}

logging.basicConfig(level=logging.INFO)
train = train_loader(Big(), BatchPlan(40, 8, 0), start_step=0, total_steps=8, workers=2)
for loader in (train, eval_loader(Big(), range(40), 8, 2)):
    for batch in loader:
        assert (batch["video"].flatten(1) == batch["index"][:, None] % 256).all()
        batch["video"] += 1
    print("whole")
del loader, batch, train
assert os.system("mount -o remount,size=4k,nr_inodes=1 /dev/shm") == 0
try:
    next(iter(eval_loader(Big(), range(40), 8, 2)))
except UserError as error:
    print("error:", error)
"""


def with_shared_memory(size: str, code: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where /dev/shm has ``size``; its arguments are the folders of the project and of this file."""
    command = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
    if sys.platform != "linux" or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a /dev/shm of another size needs Linux and the right to make a mount namespace (unshare -rm)")
    command += [sys.executable, "-c", code, str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_batches_come_through_pipes_where_shared_memory_is_small() -> None:
    """A batch has 400 kB, /dev/shm 200; then not even a semaphore has room."""
    done = with_shared_memory("200k", IN_LITTLE_SHARED_MEMORY, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["whole", "whole"]
    assert done.stderr.count("docker run --shm-size") == 1
    assert lines[2].startswith("error: data.workers=2: no loader process can be started")
    assert lines[2].endswith("data.workers=0 decodes in the process itself")
    assert "Traceback" not in done.stderr


ROOM_FOR_FEW_BATCHES = """
import logging, sys
sys.path[:0] = sys.argv[1:3]
import torch
from test_loader import Numbers
from egohod.data.loader import eval_loader

class Large(Numbers):
    sample_bytes = 3 * 4 * 256 * 256

    def sample(self, epoch, index):
        return super().sample(epoch, index) | {"video": torch.full((3, 4, 256, 256), index % 256, dtype=torch.uint8)}

logging.basicConfig(level=logging.INFO)
for _ in range(2):
    batches = 0
    for batch in eval_loader(Large(400), range(400), 8, 4, prefetch=4):
        assert (batch["video"].flatten(1) == batch["index"][:, None] % 256).all()
        batches += 1
    print(batches)
"""


def test_four_workers_that_fill_the_shared_memory_lose_no_batch_and_are_announced() -> None:
    """Room for three batches of 6.3 MB, with up to 18 on their way: a bus error would end a worker."""
    done = with_shared_memory("28m", ROOM_FOR_FEW_BATCHES, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["50", "50"]
    assert done.stderr.count("docker run --shm-size=1g") == 1
    assert "hold up to 0.11 GB in it (1 training processes x (4 workers x 4 batches ready + 2) x 6 MB)" in done.stderr


def test_the_warning_of_too_little_shared_memory_says_what_fits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for free, expected in (
        (25e9, None),
        (20e9, "--shm-size=23g, or --ipc=host; or data.prefetch=1"),
        (8e9, "--shm-size=23g, or --ipc=host; or data.prefetch=1 data.workers=4"),
        (64e6, "--shm-size=23g, or --ipc=host"),
    ):
        monkeypatch.setattr(loader, "_has_warned_of_pipes", False)
        monkeypatch.setattr(loader, "_free_shared_memory", lambda free=free: free)
        caplog.clear()
        # The recipe: 256 clips of 4 frames at 224 px, eight workers.
        check_shared_memory(256 * 3 * 4 * 224**2, 8, 2)
        assert [record.getMessage().partition("cure: docker run ")[2] for record in caplog.records] == (
            [expected] if expected else []
        )


@pytest.mark.parametrize(
    ("workers", "pinned", "free", "more", "cure"),
    [
        # Eleven hold three each as well, and twelve cannot hold fewer.
        (12, True, 5.5e9, 2, "6g, or --ipc=host; or data.prefetch=1 data.workers=11"),
        (8, True, 5.2e9, 2, "6g, or --ipc=host"),
        (8, False, 9e9, 33, "11g, or --ipc=host"),
    ],
)
def test_shared_memory_for_the_micro_batches_of_a_whole_step(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    workers: int,
    pinned: bool,
    free: float,
    more: int,
    cure: str,
) -> None:
    """32 micro-batches of 154 MB a step: the workers hold them all, and those without pinned copies are held twice."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(loader, "_has_warned_of_pipes", False)
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: free)
    ready = -(-32 // workers)
    check_shared_memory(256 * 3 * 4 * 224**2, workers, ready, 32, pinned)
    (record,) = caplog.records
    assert f"{workers} workers x {ready} batches ready + {more})" in record.getMessage()
    assert record.getMessage().endswith(f"--shm-size={cure}")


def test_workers_follow_the_cores_and_the_processes_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    class Node(Distributed):
        """Processes that see the given cores."""

        cores: ClassVar[list[list[int]]] = []

        def gather_objects(self, value: Any) -> list[Any]:
            assert value[1] == self.cores[self.rank]
            return [(value[0], cores) for cores in self.cores] + [("another node", [0, 1])]

    for cores, quota, expected in (
        ([list(range(96))] * 8, math.inf, 11),  # torchrun: all see all
        ([list(range(12 * rank, 12 * rank + 12)) for rank in range(8)], math.inf, 11),  # Slurm: each its own
        ([list(range(2))], math.inf, 1),
        ([list(range(2))] * 4, math.inf, 1),
        ([list(range(256))], math.inf, 16),
        ([list(range(96))] * 2, 10.0, 4),  # docker run --cpus=10
    ):
        monkeypatch.setattr(Node, "cores", cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(cores[0]))
        monkeypatch.setattr(loader, "core_quota", lambda quota=quota: quota)
        node = Node(0, len(cores), torch.device("cpu"), None)
        assert worker_count(None, node) == expected, cores
        assert worker_count(3, node) == 3
    monkeypatch.setattr(sys, "platform", "darwin")  # whose loader processes are spawned
    assert (worker_count(None, node), worker_count(3, node)) == (4, 3)


def test_a_containers_limit_of_cores(tmp_path: Path) -> None:
    for text, expected in (("max 100000\n", math.inf), ("250000 100000\n", 2.5), ("damaged", math.inf)):
        (tmp_path / "cpu.max").write_text(text)
        assert core_quota(tmp_path / "cpu.max") == expected
    assert core_quota(tmp_path / "none") == math.inf


class Threaded(Numbers):
    decoder = "cuda"


def test_what_the_gpu_decodes_is_read_by_threads_of_this_process() -> None:
    plan = BatchPlan(40, 8, 0)
    expected = clips_of(train_loader(Numbers(), plan, start_step=0, total_steps=12, accumulation=2))
    threads = train_loader(Threaded(), plan, start_step=0, total_steps=12, accumulation=2, workers=3)
    assert threads.num_workers == 0
    assert clips_of(threads) == expected
    process = {int(batch["video"][0, 2, 0, 0, 0]) for batch in threads}
    assert process == {os.getpid()}

    class Broken(Threaded):
        def sample(self, epoch: int, index: int) -> dict[str, Any]:
            if index == 5:
                raise UserError("clip.mp4: is broken")
            return super().sample(epoch, index)

    with pytest.raises(UserError, match=r"^clip\.mp4: is broken$"):
        list(eval_loader(Broken(), range(8), 2, 2))

    released = threading.Event()

    class Slow(Threaded):
        def sample(self, epoch: int, index: int) -> dict[str, Any]:
            released.wait()
            return super().sample(epoch, index)

    with pytest.raises(UserError, match=r"no batch of clips came for 0.1 s"):
        list(eval_loader(Slow(), range(8), 2, 2, timeout=0.1))
    released.set()


def test_threads_that_decode_on_the_gpu_do_not_queue_behind_the_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are imitated: each thread has one of its own, on the GPU of the process."""
    streams: dict[int, str] = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of GPU {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.update({threading.get_ident(): stream}))

    class Streamed(Threaded):
        def sample(self, epoch: int, index: int) -> dict[str, Any]:
            assert streams[threading.get_ident()] == "a stream of GPU 3"
            return super().sample(epoch, index)

    assert len(list(eval_loader(Streamed(), range(8), 2, 2))) == 4
    assert threading.get_ident() not in streams, "the training step's stays"


class Benchmarked(Numbers):
    """A part of a data set, the clips ``rows`` of it; the 'video' holds the process and the data set's number."""

    decoder, read_ahead, sample_bytes = "pyav", 0, 0

    def __init__(self, number: int, size: int = 40) -> None:
        super().__init__(size)
        self.number, self.origin, self.rows = number, self, np.arange(size)

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        fault = "damaged" if index == 9 else None
        video = torch.tensor([os.getpid(), self.number])
        return {"video": None if fault else video, "index": index, "fault": fault}


def test_benchmarks_share_their_workers_until_the_last_is_done() -> None:
    first, second = Benchmarked(0), Benchmarked(1, 20)
    part = copy.copy(second)
    part.rows = np.array([3, 9, 14, 19])
    shared = EvalLoader()
    for each in (first, second):
        shared.add(each)  # type: ignore[arg-type]
    how: dict[str, Any] = {"timeout": 60.0, "stop": None, "pin_memory": False}
    processes = []
    for _ in range(2):  # two evaluations of a run
        pids = set()
        for dataset, indices in ((first, [0, 1, 2, 7, 8]), (part, [0, 1, 2, 3]), (second, [4]), (first, [])):
            batches = list(shared.read(dataset, indices, 2, 2, **how))  # type: ignore[arg-type]
            faults = {row: text for batch in batches for row, text in batch["faults"].items()}
            assert faults == ({1: "damaged"} if dataset is part else {})
            read = [int(index) for batch in batches for index in batch["index"]]
            assert read == [index for index in indices if index not in faults]
            videos = torch.cat([batch["video"] for batch in batches]) if batches else torch.zeros(0, 2)
            assert set(videos[:, 1].tolist()) == ({dataset.number} if indices else set())
            pids |= set(videos[:, 0].tolist())
        assert len(pids) == 2
        assert os.getpid() not in pids
        processes.append(pids)
        shared.finish(first)  # type: ignore[arg-type]
        assert all(psutil.pid_exists(pid) for pid in pids)
        shared.finish(second)  # type: ignore[arg-type]
        assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not processes[0] & processes[1]


def test_a_benchmark_that_fails_leaves_no_workers() -> None:
    shared, dataset = EvalLoader(), Benchmarked(0)
    shared.add(dataset)  # type: ignore[arg-type]
    batches = shared.read(dataset, range(40), 2, 2, timeout=60.0, stop=None, pin_memory=False)  # type: ignore[arg-type]
    pid = int(next(batches)["video"][0, 0])
    assert psutil.pid_exists(pid)
    batches.close()
    assert not psutil.pid_exists(pid)


def test_other_processes_may_take_the_shared_memory_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    batches = list(eval_loader(Numbers(), range(4), 2, 2))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3]]


def test_a_batch_that_cannot_be_sent_is_one_clear_error() -> None:
    loader = eval_loader(Numbers(), range(8), 2, 2, collate=lambda samples: {"function": lambda: samples})
    with pytest.raises(UserError, match=r"could not hand over a batch: .*(lambda|pickle)"):
        next(iter(loader))


class Stuck(Numbers):
    """As on a file system that does not answer, from the third clip on."""

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        while index > 1:
            signal.pause()
        return super().sample(epoch, index)


def test_waiting_for_a_batch_ends() -> None:
    batches = iter(eval_loader(Stuck(), range(4), 2, 2, timeout=1.5))
    next(batches)
    with pytest.raises(UserError, match=r"no batch of clips came for 1.5 s \(data.timeout\)"):
        next(batches)


def test_a_request_to_stop_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()
    batches = iter(eval_loader(Stuck(), range(4), 2, 2, stop=stop))
    next(batches)
    threading.Timer(0.5, stop.request, ["SIGTERM received"]).start()
    with pytest.raises(Interrupted, match="SIGTERM received"):
        next(batches)
    # One of several processes does not leave in peace while the others wait for it.
    monkeypatch.setattr("egohod.data.loader._LEAVE_SECONDS", 0.5)
    plan = BatchPlan(4, 2, 0)
    batches = iter(train_loader(Stuck(), plan, start_step=0, total_steps=2, world_size=2, workers=1, stop=stop))
    with pytest.raises(UserError, match="SIGTERM received, but the clips of the step to finish did not come"):
        list(batches)


class Signalled(Numbers):
    """Sends its own process the signals that a terminal or a scheduler sends to the whole group."""

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return super().sample(epoch, index) | {"index": torch.get_num_threads()}


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_leave_signals_to_the_main_process_and_use_one_thread(
    start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGOHOD_START_METHOD", start_method)
    batches = list(eval_loader(Signalled(), range(4), 2, 2))
    assert [batch["index"].tolist() for batch in batches] == [[1, 1], [1, 1]]


ORPHANS = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from test_loader import Numbers
from egohod.data.loader import eval_loader

class Stuck(Numbers):
    def sample(self, epoch, index):
        if index:
            os.write(1, b"stuck\\n")
            while True:
                signal.pause()
        return super().sample(epoch, index)

for batch in eval_loader(Stuck(), range(3), 1, 2):
    pass
"""


def test_workers_end_with_a_killed_parent() -> None:
    root, here = Path(__file__).parents[2], Path(__file__).parent
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, str(root), str(here)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pipe = parent.stdout.fileno()
    output = b""
    while output.count(b"stuck") < 2:
        output += os.read(pipe, 100)
    parent.kill()
    parent.wait()
    # The pipe ends when the last process that holds it is gone; these would hold it for ever.
    ready, _, _ = select.select([pipe], [], [], 60)
    assert ready, "workers outlived their parent"
    assert os.read(pipe, 100) == b""
    parent.stdout.close()


def test_a_program_ends_although_it_never_finished_its_batches(demo_world: Path, program: Command) -> None:
    """Workers ignore SIGTERM; Python's own way to end them at exit would wait for ever."""
    code = (
        "import sys\nfrom egohod.data.config import SourceConfig\n"
        "from egohod.data.dataset import ClipDataset, collate_views\n"
        "from egohod.data.loader import eval_loader\nfrom egohod.data.formats import read_clips\n"
        "from egohod.data.dataset import Tokenizer\nfolder = sys.argv[1]\n"
        "source = SourceConfig(metadata=folder + '/hod.csv', root=folder + '/videos')\n"
        "clips = ClipDataset([(read_clips(source), source)], size=32, num_frames=2, tokenizer=Tokenizer())\n"
        "kept = iter(eval_loader(clips, range(8), 1, 2, collate=collate_views))\nnext(kept)\n"
        "print('left in the middle')\n"
    )
    done = program("-c", code, str(demo_world / "val"))
    assert done.returncode == 0, done.stderr
    assert "left in the middle" in done.stdout


@pytest.mark.parametrize(("accumulation", "given", "used"), [(1, 2, 2), (3, 2, 2), (6, 2, 3), (7, 2, 4), (6, 5, 5)])
def test_workers_hold_the_micro_batches_of_a_whole_step(accumulation: int, given: int, used: int) -> None:
    plan = BatchPlan(84, 42, 0)
    loader = train_loader(
        Numbers(), plan, start_step=0, total_steps=1, accumulation=accumulation, workers=2, prefetch=given
    )
    assert loader.prefetch_factor == used
