"""Parts of ``tools/gpu_check.py`` that run what a user runs: loading, saving and resuming, evaluating, collectives.

Clips are stand-ins, rendered and encoded here: what decoding costs does not depend on what they show.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benches import data as videos
from benches.gpu import (
    BASE,
    CLASSES,
    NOTHING_RECOMPUTED,
    NOUNS,
    Check,
    Row,
    Steps,
    attempt,
    best_seconds,
    build,
    measure_step,
    missing_decoder,
    recipe_config,
)
from benches.training import timed

from egohod.data.loader import train_loader, worker_count
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.runner import benchmark, execution_of
from egohod.training.build import build_dataset, build_plan
from egohod.training.train import TrainingData, train

# Clips of EPIC-KITCHENS-100's validation split.
EVALUATED = 9668
# Float32 without TF32 takes ten times as long as bf16: a part of the clips shows its speed.
EXACT_SHARE = 32
# A run that saves half-way, and the same run resumed from there.
RUN_STEPS, SAVED_AT, BATCH = 4, 2, 32
DETERMINISTIC = "train.deterministic=true"


def _workers(check: Check) -> int:
    return 1 if check.tiny else worker_count(None, check.run)


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


def loader(check: Check) -> Iterator[Row]:
    """ViT-B/16 fed from H.264 files of 426x320: the loader alone, steps on one batch, and steps fed by the loader."""
    batch, workers = 2 if check.tiny else 64, _workers(check)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Each measurement is an epoch of three batches for each worker.
        videos.make_videos(folder, 1, 3 * workers * batch, videos.KEYFRAME_EVERY)
        for decoder in ("auto", "cuda"):
            if reason := missing_decoder(decoder):
                yield {"decoder": decoder, "left out": reason}
            else:
                yield attempt({"decoder": decoder}, partial(_fed, check, folder, batch, workers, decoder))


def data_overrides(folder: Path, batch: int, workers: int) -> list[str]:
    """The clips of :func:`benches.data.make_videos` as the training data of a recipe."""
    source = "data.train.ego4d"
    return [
        f"{source}.metadata={folder}/clips.csv",
        f"{source}.root={folder}/videos",
        f"{source}.layout=chunks",
        f"data.workers={workers}",
        f"train.global_batch_size={batch}",
        f"train.max_batch_per_process={batch}",
    ]


def _fed(check: Check, folder: Path, batch: int, workers: int, decoder: str) -> Row:
    wanted = [*data_overrides(folder, batch, workers), f"data.decoder={decoder}", NOTHING_RECOMPUTED]
    cfg = recipe_config(BASE, check, *wanted)
    step = Steps(cfg, check, build(cfg, check), batch)
    step()
    alone = best_seconds(step, check.device)
    dataset = build_dataset(cfg, step.model.geometry.image_size)
    plan = build_plan(cfg, dataset)

    def batches(epoch: int) -> Iterator[dict[str, Any]]:
        start = epoch * 3 * workers
        each = iter(
            train_loader(
                dataset, plan, start_step=start, total_steps=start + 3 * workers, workers=workers,
                prefetch=cfg.data.prefetch, pin_memory=check.on_gpu,
            )
        )  # fmt: skip
        # Workers start together and so finish their first batches together: from here on it is their usual speed.
        for _ in range(workers):
            next(each)
        return each

    steps = 2 * workers
    clips, fetched = steps * batch, batches(0)
    loaded = timed(lambda: [each["video"].to(check.device, non_blocking=True) for each in fetched], check.device)
    # Not earlier, or its workers would decode while the others are measured.
    fed = batches(1)
    together = timed(lambda: [step.on(each) for each in fed], check.device)
    return {
        "decodes": dataset.decoder,
        "workers": workers,
        "frames": cfg.model.num_frames,
        "loader clips/s": clips / loaded.seconds,
        "steps clips/s": batch / alone,
        "fed clips/s": clips / together.seconds,
        "share of steps": alone * steps / together.seconds,
    }


# --------------------------------------------------------------------------------------------------
# Saving and resuming
# --------------------------------------------------------------------------------------------------


def resume(check: Check) -> Iterator[Row]:
    """A run that saves half-way against the same run resumed from there: the weights at the end, bit for bit."""
    with tempfile.TemporaryDirectory() as name:
        videos.make_videos(Path(name), 1, RUN_STEPS * BATCH, videos.KEYFRAME_EVERY)
        for overrides in ((), ("train.async_save=true",)):
            yield attempt({"setting": " ".join(overrides) or "-"}, partial(_resumed, check, Path(name), overrides))


def deterministic(check: Check) -> Iterator[Row]:
    """The same with train.deterministic=true, and a step's speed with it."""
    # A part of its own: PyTorch's switch is one of the process, and cuBLAS reads it when it starts.
    with tempfile.TemporaryDirectory() as name:
        videos.make_videos(Path(name), 1, RUN_STEPS * BATCH, videos.KEYFRAME_EVERY)
        row = attempt({"setting": DETERMINISTIC}, partial(_resumed, check, Path(name), (DETERMINISTIC,)))
    if not row.get("equal bit for bit", True):
        row["failed"] = "a resumed run differs"
    yield row
    yield attempt({"setting": f"a step with {DETERMINISTIC}"}, partial(measure_step, BASE, check, DETERMINISTIC))


def _resumed(check: Check, folder: Path, overrides: Sequence[str]) -> Row:
    batch = 2 if check.tiny else BATCH
    run = [f"train.duration={RUN_STEPS} steps", f"train.save_every={SAVED_AT} steps", "train.log_every=1 steps"]
    run += data_overrides(folder, batch, _workers(check))
    first, second = folder / "first", folder / "second"
    for each in (first, second):
        shutil.rmtree(each, ignore_errors=True)

    def weights_of(output: Path) -> tuple[dict[str, torch.Tensor], float]:
        """The weights of a run at its end, and its seconds."""
        cfg = recipe_config(BASE, check, *run, f"train.output={output}", *overrides)
        model = build(cfg, check)
        dataset = build_dataset(cfg, model.geometry.image_size)
        data = TrainingData(dataset, build_plan(cfg, dataset), batch, 1)
        seconds = timed(lambda: train(cfg, check.run, model, data, ()), check.device).seconds
        return {name: value.cpu() for name, value in model.state_dict().items()}, seconds

    once, whole = weights_of(first)
    checkpoint = first / "checkpoints" / f"step-{SAVED_AT:08d}"
    (second / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint, second / "checkpoints" / checkpoint.name)
    again, rest = weights_of(second)
    # The line of the step after the save has its seconds; that of the last step is after the last line.
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    pause = next(line["train/seconds_save"] for line in lines if "train/seconds_save" in line)
    largest = max(float((once[name].float() - again[name].float()).abs().max()) for name in once)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    return {
        "equal bit for bit": all(torch.equal(once[name], again[name]) for name in once),
        "largest difference": largest,
        "checkpoint GB": size / 1e9,
        "save s": pause,
        "whole run s": whole,
        "resumed run s": rest,
    }


# --------------------------------------------------------------------------------------------------
# Evaluating
# --------------------------------------------------------------------------------------------------


def evaluation(check: Check) -> Iterator[Row]:
    """EK100-CLS at full size by ViT-B/16, 16 frames a clip, on stand-in clips (short side 256): scores are chance."""
    clips = 24 if check.tiny else EVALUATED
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos.write_chunk(folder / "videos" / "v" / "0000.mp4", 0, videos.ORIGINAL_KEYFRAME_EVERY)
        root = videos.chunked(folder, 1)
        # The complete benchmark first: the time of the part may end within the other.
        for precision, count in (("bf16", clips), ("fp32", max(12, clips // EXACT_SHARE))):
            write_ek100(folder / precision, count, 12 if check.tiny else CLASSES)
            head = {"precision": precision, "clips": count}
            yield attempt(head, partial(_evaluate, check, folder / precision, root, precision))


def _evaluate(check: Check, annotations: Path, root: Path, precision: str) -> Row:
    wanted = ["model.num_frames=16", f"evaluate.precision={precision}", f"data.workers={_workers(check)}"]
    cfg = recipe_config(BASE, check, *wanted)
    model = build(cfg, check)
    setting = BenchmarkConfig(kind="ek100_cls", metadata=str(annotations), root=str(root), layout="chunks")
    cls = benchmark(cfg, "ek100_cls", setting, execution_of(cfg, check.run))
    result, seconds, _ = timed(lambda: cls.measure(model), check.device)
    encoded = result.report.seconds
    return {
        "classes": len(cls.tasks[0].texts),
        "seconds": seconds,
        "of them clips": encoded,
        "clips/s": result.report.clips / encoded,
        "waits for clips": result.report.waiting / encoded,
        "top-1": next(score.value for name, score in result.scores["plain"].items() if name.endswith("top1")),
    }


def write_ek100(folder: Path, clips: int, classes: int) -> None:
    """Annotation files like EPIC-KITCHENS-100's, of one video of 15 s, with a narration for every class."""
    folder.mkdir()
    head = ["narration_id", "video_id", "start_timestamp", "stop_timestamp", "narration"]
    head += ["verb", "verb_class", "noun", "noun_class"]
    for name, count in (("EPIC_100_train", classes), ("EPIC_100_validation", clips)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            for i in range(count):
                verb, noun = divmod(i % classes, NOUNS)
                start = timedelta(seconds=i * 0.37 % (videos.CHUNK_SECONDS - videos.CLIP_SECONDS))
                times = (f"0{each}0"[:11] for each in (start, start + timedelta(seconds=videos.CLIP_SECONDS)))
                words = f"verb{verb}", f"noun{noun}"
                writer.writerow([f"{name}_{i}", "v", *times, " ".join(words), words[0], verb, words[1], noun])


# --------------------------------------------------------------------------------------------------
# Collectives
# --------------------------------------------------------------------------------------------------


def collectives(check: Check) -> Iterator[Row]:
    """All-reduce and all-gather over this machine's GPUs; bus GB/s is what each link carries (nccl-tests' busbw)."""
    # The part starts the tool again, once for each GPU; these processes have the rows.
    if check.run.world_size > 1:
        yield from _bandwidths(check)
        return
    processes = torch.cuda.device_count() if check.on_gpu else 2
    if processes < 2:
        yield {"left out": "there is one GPU only"}
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    subprocess.run([*launcher, *sys.argv], check=True)


def _bandwidths(check: Check) -> Iterator[Row]:
    run, others = check.run, check.run.world_size - 1
    for size in (1e4, 1e5) if check.tiny else (1e6, 1e8, 1e9):
        # Bytes of the whole result of both operations; a multiple of every number of processes in use.
        whole = torch.ones(int(size) // 4 // 840 * 840, device=run.device)
        part = whole[: len(whole) // run.world_size].clone()
        ways = {
            "all-reduce": (lambda whole=whole: dist.all_reduce(whole), 2),
            "all-gather": (lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part), 1),
        }
        for name, (work, times) in ways.items():
            work()  # NCCL connects in the first call
            # A fixed number: processes that stopped by their own clocks would wait for one another for ever.
            seconds = min(timed(work, run.device).seconds for _ in range(5))
            bus = times * others / run.world_size * whole.nbytes / seconds
            yield {
                "operation": name,
                "processes": f"{run.world_size} over {run.backend}",
                "MB": whole.nbytes / 1e6,
                "ms": 1000 * seconds,
                "bus GB/s": bus / 1e9,
            }
