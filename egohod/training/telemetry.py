"""Telemetry of a run: a console line, metrics.jsonl, trackers such as TensorBoard, environment.json, profiles."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import platform
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from egohod.config import IS_CHECKOUT, PROJECT, Config, to_yaml
from egohod.distributed import Distributed, first_lines, pick_precision
from egohod.errors import UserError
from egohod.model.cost import clip_flops, count_step
from egohod.model.dual_encoder import DualEncoder
from egohod.runtime import time_left, write_text

log = logging.getLogger(__name__)

# What a result may depend on: the version of each goes into environment.json.
PACKAGES = (
    *("torch", "torchvision", "timm", "open_clip_torch", "decord", "av", "torchcodec"),
    *("numpy", "pyarrow", "omegaconf"),
)


# Dense matrix TFLOP/s in bf16 or fp16 with float32 sums, from the makers' data sheets (half of those with sparsity),
# by a part of the name that CUDA gives. The first that fits counts, so the longer names come first.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 149.7,
    "RTX A6000": 154.8,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 182.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}
# The parts of a step as they are reported, and what the stopwatch of the step calls them.
PARTS = {
    "data": ("data",),
    "forward": ("features", "loss", "forward"),
    "backward": ("backward",),
    "optimizer": ("optimizer",),
}


class Lap(NamedTuple):
    """What happened since the last line of the log."""

    steps: int
    seconds: float
    """Training time without pauses, at least 1e-9: speeds are divided by it."""
    text_tokens: int
    paused: dict[str, float]
    """Seconds of evaluation and save."""


class Clock:
    """Training time, with pauses (evaluation, saving) counted apart."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._steps = self._text_tokens = 0
        self._paused: dict[str, float] = {}

    @contextmanager
    def paused(self, part: str) -> Iterator[None]:
        """Around anything that is not training."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        # As if the lap had begun later: clips a second are those of training alone.
        self._start += seconds
        self._paused[part] = self._paused.get(part, 0.0) + seconds
        log.info("%s took %.1f s", part, seconds)

    def step(self, text_tokens: int) -> None:
        """One optimisation step is done, in which this process computed so many tokens of texts."""
        self._steps += 1
        self._text_tokens += text_tokens

    def lap(self) -> Lap:
        """What is counted since the last lap."""
        now = time.perf_counter()
        lap = Lap(self._steps, max(now - self._start, 1e-9), self._text_tokens, self._paused)
        self._start, self._steps, self._text_tokens, self._paused = now, 0, 0, {}
        return lap


@dataclass(frozen=True)
class Share:
    """One process's part of a line of the log, since the last line."""

    host: str
    steps: int
    seconds: float
    parts: dict[str, float]
    """Seconds by part, as the step's stopwatch names them, and those of evaluation and save."""
    memory_gb: float
    clips_lost: int

    @property
    def waited(self) -> float:
        """Seconds of waiting for data."""
        return self.parts.get("data", 0.0)

    @property
    def forward(self) -> float:
        """Seconds of computing before the first collective of a step."""
        return self.parts.get("features", 0.0)


class Stragglers:
    """Warn of a process that keeps the others waiting, not of one that was late once.

    A synchronous step takes every process the same time, so whole steps show nothing: what is compared is the time
    until the first collective of a step, which is waiting for clips and the forward pass.
    """

    def __init__(self, ratio: float = 1.5, windows: int = 3) -> None:
        self._ratio, self._windows = ratio, windows
        self._slowest, self._times = -1, 0

    def update(self, shares: Sequence[Share]) -> dict[str, float]:
        """Smallest, median and largest compute seconds of a step, and the rank of the largest."""
        # What a step takes a process before its first collective; after that it may wait for the others.
        seconds = [(share.waited + share.forward) / max(share.steps, 1) for share in shares]
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        # The median of the others: of two processes it is the other one, and a second slow one does not hide the first.
        others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
        slow = rank if seconds[rank] > self._ratio * others else -1
        self._times = self._times + 1 if slow == self._slowest else 1
        self._slowest = slow
        if slow >= 0 and self._times % self._windows == 0:
            share = shares[rank]
            cause = "waiting for clips" if share.waited > share.forward else "computing"
            log.warning(
                "rank %d on %s is the slowest for %d windows: %.2f s a step before it meets the others, mostly %s; "
                "others need %.2f s",
                rank, share.host, self._times, seconds[rank], cause, others,
            )  # fmt: skip
        return {
            "compute_seconds_min": min(seconds),
            "compute_seconds_median": statistics.median(seconds),
            "compute_seconds_max": seconds[rank],
            "slowest_rank": float(rank),
        }


class MetricWindow:
    """Means over the steps since the last log line, summed on the device so that no step waits for a number."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        # Skipped steps since the last finite one, also of earlier windows: a scalar on the device.
        self._consecutive: torch.Tensor | float = 0.0

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Add one step's scalars, of which ``skipped`` is 1 if the step changed no weight, else 0."""
        skipped = metrics["skipped"].detach().float()
        finite = 1 - skipped
        for name, value in metrics.items():
            # A loss that is NaN would make the mean meaningless, and the finite numbers of a skipped step (accuracy,
            # logit_scale) are not of a step either.
            value = torch.nan_to_num(value.detach().float(), nan=0.0, posinf=0.0, neginf=0.0)
            value = skipped if name == "skipped" else value * finite
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._consecutive = (self._consecutive + 1) * skipped
        self._count += 1

    def means(self) -> dict[str, float]:
        """The means over the steps that were not skipped, NaN where all were; starts a new window.

        Reads them from the device, the only wait of a step. ``skipped`` and ``steps`` are numbers of steps since the
        last call, ``consecutive_skips`` is that of the steps since the last finite one, also of earlier windows.
        """
        assert self._sums, "a window of no steps has no means"
        # One copy for all of them: each .item() would wait for the device by itself.
        *values, consecutive = torch.stack([*self._sums.values(), torch.as_tensor(self._consecutive)]).tolist()
        sums, count = dict(zip(self._sums, values, strict=True)), self._count
        skipped = sums.pop("skipped")
        self._sums, self._count = {}, 0
        good = count - skipped
        means = {name: value / good if good else float("nan") for name, value in sums.items()}
        return means | {"skipped": skipped, "steps": float(count), "consecutive_skips": consecutive}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: a run interrupted within a window logs the same means as one that was not."""
        sums = {name: value.cpu() for name, value in self._sums.items()}
        return {"sums": sums, "count": self._count, "consecutive_skips": float(self._consecutive)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue the window of a checkpoint."""
        # Copied, as the values of a checkpoint are mapped from its file.
        self._sums = {name: value.to(device, copy=True) for name, value in state["sums"].items()}
        self._count = state["count"]
        # Earlier releases did not count them.
        self._consecutive = torch.tensor(state.get("consecutive_skips", 0.0), device=device)


class Telemetry:
    """Writes metrics of the main process; on others every call does nothing.

    A run that resumes at ``start_step`` writes the later lines again; with ``evaluates_first`` also those of the
    evaluation of ``start_step``.
    """

    def __init__(
        self, run: Path, cfg: Config, dist: Distributed, *, total_steps: int, start_step: int, evaluates_first: bool
    ) -> None:
        self._active, self._total, self._batch = dist.is_main, total_steps, cfg.train.global_batch_size
        self._seconds_per_step: float | None = None
        self._stragglers = Stragglers()
        if not self._active:
            return
        run.mkdir(parents=True, exist_ok=True)
        _truncate(run / "metrics.jsonl", start_step, evaluates_first)
        self._file = (run / "metrics.jsonl").open("a")
        self._trackers = start_trackers(run, cfg, start_step)
        write_text(run / "config.yml", to_yaml(cfg))
        write_text(run / "environment.json", json.dumps(environment(cfg, dist), indent=1))

    def training(self, step: int, metrics: dict[str, float], shares: Sequence[Share]) -> None:
        """Log the means of a window that ended with step ``step`` (counted from 1); ``shares`` in rank order."""
        steps, seconds = shares[0].steps, shares[0].seconds
        # Smoothed, so that one slow window does not move the end of the run by hours.
        recent, before = seconds / max(steps, 1), self._seconds_per_step
        self._seconds_per_step = recent if before is None else 0.7 * before + 0.3 * recent
        speed = {
            "clips_per_second": steps * self._batch / seconds,
            # Of the process that waits longest, and that holds most: nothing runs faster than these.
            "data_wait": max(share.waited / share.seconds for share in shares),
            "memory_gb": max(share.memory_gb for share in shares),
            "clips_lost": float(sum(share.clips_lost for share in shares)),
        }
        # Per step, the mean of all processes: where one computes, another may wait for it.
        for name, parts in PARTS.items():
            total = sum(share.parts.get(part, 0.0) for share in shares for part in parts)
            speed[f"seconds_{name}"] = total / (len(shares) * max(steps, 1))
        # Pauses since the line before, on the process that took longest; most lines have none.
        for name in ("evaluation", "save"):
            if paused := max(share.parts.get(name, 0.0) for share in shares):
                speed[f"seconds_{name}"] = paused
        if not self._active:
            return
        if len(shares) > 1:
            speed |= self._stragglers.update(shares)
        shown = {name: value for name, value in (metrics | speed).items() if name not in ("steps", "consecutive_skips")}
        self.write(step, {f"train/{name}": value for name, value in shown.items()})
        eta = time_left((self._total - step) * self._seconds_per_step, rate=1.0)
        skipped = f"  skipped {metrics['skipped']:.0f}" if metrics.get("skipped") else ""
        lost = f"  {speed['clips_lost']:.0f} clips lost" if speed["clips_lost"] else ""
        computing = "".join(f"  {name} {100 * speed[f'seconds_{name}'] / recent:.0f} %" for name in list(PARTS)[1:])
        mfu = f"  MFU {100 * metrics['mfu']:.0f} %" if "mfu" in metrics else ""
        log.info(
            "step %d/%d  loss %.4f  acc %.3f  lr %.2e  grad %.2f  %.1f clips/s%s  waits %.0f %%%s  %.1f GB  ETA %s%s%s",
            step, self._total, metrics["loss"], metrics["accuracy"], metrics["lr"], metrics["grad_norm"],
            speed["clips_per_second"], mfu, 100 * speed["data_wait"], computing, speed["memory_gb"], eta, skipped, lost,
        )  # fmt: skip

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics of any kind to metrics.jsonl and the trackers."""
        if not self._active:
            return
        try:
            # A window in which every step was skipped has no mean: null, as JSON has no NaN.
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        except OSError as error:
            log.error("metrics of step %d not written: %s; training continues", step, error.strerror or error)
        for name, tracker in self._trackers.items():
            try:
                tracker.write(step, metrics)
            except Exception as error:  # a server that is away for a moment; metrics.jsonl has the same
                reason = first_lines(error, 1)
                log.error("metrics of step %d not sent to %s: %s; training continues", step, name, reason)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        # Also after an error: TensorBoard's thread would keep its last events.
        if not self._active:
            return
        for close in (self._file.close, *(tracker.close for tracker in self._trackers.values())):
            try:
                close()
            except Exception as error:  # a lost folder, whose own error ends the run and must not be replaced
                log.error("metrics not written: %s", first_lines(error, 1))


# --------------------------------------------------------------------------------------------------
# Trackers
# --------------------------------------------------------------------------------------------------


class Tracker(NamedTuple):
    """Where metrics go beside metrics.jsonl."""

    write: Callable[[int, dict[str, float]], None]
    """Adds the metrics of a step by name; those of an interrupted run may come again."""
    close: Callable[[], None]
    """Sends what is left."""


def require_trackers(cfg: Config) -> None:
    """Raise :class:`UserError` unless all of ``train.trackers`` are installed; imports none of them."""
    for name in cfg.train.trackers:
        # TensorBoard is the default, and a run without it loses nothing: metrics.jsonl has the same.
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers names {name}, which is not installed: pip install {name}")


def start_trackers(run: Path, cfg: Config, start_step: int) -> dict[str, Tracker]:
    """The trackers of ``train.trackers`` by name; a resumed run continues what it began there.

    Raises :class:`UserError` if one cannot be imported or started. Only TensorBoard is then left out with a warning.
    """
    # The ids that they gave to this run; a run that starts anew in a used folder must not continue the old one there.
    path = run / "trackers.json"
    ids: dict[str, str] = json.loads(path.read_text()) if start_step and path.is_file() else {}
    trackers: dict[str, Tracker] = {}
    for name in cfg.train.trackers:
        try:
            if name == "tensorboard":
                trackers[name] = _start_tensorboard(run, start_step)
            elif name == "mlflow":
                trackers[name] = _start_mlflow(run, cfg, ids)
            else:
                trackers[name] = _start_wandb(name, run, cfg, ids)
        except Exception as error:  # protobuf raises many kinds, and so do servers and accounts
            if name == "tensorboard":
                if isinstance(error, OSError):  # its files are in the run folder, which is lost then
                    raise
                is_absent = isinstance(error, ModuleNotFoundError) and error.name == "tensorboard"
                cure = "tensorboard, or train.trackers=[]" if is_absent else "--force-reinstall tensorboard protobuf"
                log.warning("no TensorBoard, metrics.jsonl only: %s; pip install %s", first_lines(error, 1), cure)
                continue
            raise UserError(f"train.trackers: {name} does not start: {first_lines(error, 1)}") from error
    if ids:
        write_text(path, json.dumps(ids))
    return trackers


def _start_tensorboard(run: Path, start_step: int) -> Tracker:
    """Event files in the run folder."""
    # Imported here, since with a protobuf that does not fit the import fails, which would end even --help.
    from torch.utils.tensorboard import SummaryWriter

    # Drops the events of the steps that come again.
    board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step or None)

    def write(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            board.add_scalar(name, value, step)
        board.flush()

    return Tracker(write, board.close)


def _start_wandb(name: str, run: Path, cfg: Config, ids: dict[str, str]) -> Tracker:
    """Weights & Biases, or Trackio, which has the same calls and keeps its data on this machine."""
    module: Any = importlib.import_module(name)
    number = ids.setdefault(name, secrets.token_hex(4))
    # Trackio continues a run by its name, Weights & Biases by its id, under whatever name.
    own = {"id": number, "dir": str(run)} if name == "wandb" else {}
    module.init(project="egohod", name=f"{run.name}-{number}", config=dataclasses.asdict(cfg), resume="allow", **own)
    # Steps that come again after a resume are dropped there; they have the same values.
    return Tracker(lambda step, metrics: module.log(metrics, step=step), module.finish)


def _start_mlflow(run: Path, cfg: Config, ids: dict[str, str]) -> Tracker:
    """MLflow: the server of ``MLFLOW_TRACKING_URI``, else a database in the run folder."""
    module: Any = importlib.import_module("mlflow")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        module.set_tracking_uri(f"sqlite:///{run.resolve() / 'mlflow.db'}")
    module.set_experiment("egohod")
    started = module.start_run(run_id=ids.get("mlflow"), run_name=None if "mlflow" in ids else run.name)
    ids["mlflow"] = started.info.run_id
    # As a file: MLflow refuses parameters that a resumed run has changed, such as train.duration.
    module.log_dict(dataclasses.asdict(cfg), "config.json")

    def write(step: int, metrics: dict[str, float]) -> None:
        module.log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    return Tracker(write, module.end_run)


# --------------------------------------------------------------------------------------------------
# Speed, profile and memory
# --------------------------------------------------------------------------------------------------


def step_flops(cfg: Config, model: DualEncoder, text_length: float | None = None) -> float:
    """Operations of one clip's forward and backward pass with ``text_length`` tokens computed (None: all).

    Nothing that is computed twice counts twice. By formula, and counted where not all weights are trained.
    """
    geometry = model.geometry
    length = geometry.context_length if text_length is None else round(text_length)
    if model.textual.needs_padding:
        length = geometry.context_length
    # With heads the text tower computes nothing.
    length = 0 if model.heads is not None else length
    if (trainable := cfg.train.trainable) != "all":
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        lora = cfg.train.lora if trainable == "lora" else None
        return count_step(cfg.model, max(length, 1), loss=cfg.loss, heads=model.classes, learning=learning, lora=lora)
    return clip_flops(
        geometry, cfg.model.num_frames, length, cfg.model.patch_dropout, cfg.model.fast,
        boxes=cfg.loss.boxes > 0, texts=1 + cfg.loss.negatives, motion_stem=cfg.model.motion_stem,
    ).step  # fmt: skip


def peak_flops(cfg: Config, dist: Distributed) -> float | None:
    """Dense matrix FLOP/s of this process's device in the precision of training, None if it is not in the table."""
    if cfg.train.peak_tflops:
        return cfg.train.peak_tflops * 1e12
    if dist.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(dist.device)
    tera = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    if tera is not None and pick_precision(cfg.train.precision, dist.device) == torch.float32:
        # TF32 has half the speed of bf16 on all cards that have it, which are those of Ampere and later.
        tera = tera / 2 if torch.cuda.get_device_capability(dist.device)[0] >= 8 else None
    return tera and tera * 1e12


def throughput(
    cfg: Config, model: DualEncoder, dist: Distributed, clips_per_second: float, text_length: float
) -> dict[str, float]:
    """Tokens per second of all processes, TFLOP/s of each, and MFU (the share of the peak) if the peak is given.

    Model FLOPs utilisation as in PaLM (2204.02311): the operations that the model needs, without those that
    checkpointing and cached accumulation repeat. Left out where not all weights are trained, which counting would need.
    """
    geometry, fast = model.geometry, cfg.model.fast
    places = geometry.patches_per_frame * (1 - cfg.model.patch_dropout)
    tokens = geometry.prefix_tokens + cfg.model.num_frames * places
    if geometry.slowfast:
        tokens += (geometry.prefix_tokens + fast.slow_frames * places) / fast.slow_every
    texts = 0.0 if model.heads is not None else text_length * (1 + cfg.loss.negatives)
    result = {"tokens_per_second": clips_per_second * (tokens + texts)}
    if cfg.train.trainable == "all":
        done = clips_per_second * step_flops(cfg, model, text_length) / dist.world_size
        result["tflops"] = done / 1e12
        if peak := peak_flops(cfg, dist):
            result["mfu"] = done / peak
    return result


class StepProfiler:
    """torch.profiler over the steps of ``train.profile`` on the first process: a trace and a table in the run folder.

    The trace (``profile/steps-20-22.json.gz``, for ui.perfetto.dev or chrome://tracing) has the parts of each step by
    name. The step before the first one, if the run has it, is a warm-up that is discarded: a profiler's start is slow.
    """

    def __init__(self, cfg: Config, dist: Distributed, start_step: int) -> None:
        first, self._last = cfg.train.profile if cfg.train.profile and dist.is_main else (0, 0)
        self._first = max(first, start_step + 1)
        self._warm_up = int(first > start_step + 1)
        self._folder = Path(cfg.train.output) / "profile"
        self._on_gpu = dist.device.type == "cuda"
        self._profile: torch.profiler.profile | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around each step of the run, counted from 1."""
        if step == self._first - self._warm_up and self._first <= self._last:
            recorded = self._last - self._first + 1
            # Without a choice of activities it records those of the CPU and of a GPU, if there is one.
            self._profile = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=0, warmup=self._warm_up, active=recorded, repeat=1),
                on_trace_ready=self._write,
            )
            self._profile.start()
        yield
        if self._profile is not None:
            # Writes after the last one.
            self._profile.step()
            if step == self._last:
                self._profile.stop()
                self._profile = None

    def _write(self, profile: torch.profiler.profile) -> None:
        name = f"steps-{self._first}-{self._last}"
        try:
            self._folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            order = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
            write_text(self._folder / f"{name}.txt", profile.key_averages().table(sort_by=order, row_limit=40))
            log.info("profile of steps %d to %d: %s", self._first, self._last, self._folder / f"{name}.json.gz")
        except OSError as error:
            log.error("profile not written: %s; training continues", error.strerror or error)

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:  # the run ends within the window: what there is is written
            self._profile.stop()


def snapshot_on_out_of_memory(cfg: Config, dist: Distributed) -> None:
    """On a GPU, write what fills its memory to ``memory-rank0.pickle`` when an allocation fails, once per process.

    For pytorch.org/memory_viz. The allocator calls back at the moment of the failure: afterwards, when the exception
    has unwound the step, most of it would be free again.
    """
    if dist.device.type != "cuda":
        return
    if cfg.train.memory_history:
        # A bound, or days of allocations would fill the memory of the host.
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=200_000)
    path = Path(cfg.train.output) / f"memory-rank{dist.rank}.pickle"
    is_written = False

    def write(device: int, size: int, total: int, free: int) -> None:
        nonlocal is_written
        if is_written:
            return
        is_written = True
        try:
            torch.cuda.memory._dump_snapshot(str(path))
            log.error("out of memory at an allocation of %.2f GB: snapshot in %s", size / 1e9, path)
        except OSError as error:
            log.error("out of memory; no snapshot: %s", error.strerror or error)

    # Private, and the only way to be called in time. A build of PyTorch for the CPU has no such function.
    torch._C._cuda_attach_out_of_memory_observer(write)  # type: ignore[attr-defined]


def memory_gb(device: torch.device) -> float:
    """Peak memory of the GPU, or the present size of this process and its loader workers on the CPU, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    total = 0
    process = psutil.Process()
    for member in [process, *process.children(recursive=True)]:
        try:
            # USS leaves out what forked workers share with this process.
            info = member.memory_full_info()
            total += info.rss if member.pid == process.pid else info.uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 1e9


def environment(cfg: Config, dist: Distributed) -> dict[str, Any]:
    """Versions, machine and command: what is needed to reproduce a result."""
    # Not by an import: the root of the package, with its public interface, stands above this module.
    versions: dict[str, str | None] = {"egohod": sys.modules["egohod"].__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None  # optional, as some decoders are
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "device": str(dist),
        "cuda": torch.version.cuda,
        "processes": dist.world_size,
        "cpus": os.cpu_count(),
        "commit": git_commit(),
        # Two runs with the same hash had the same settings, whatever their files are called.
        "config_sha256": hashlib.sha256(to_yaml(cfg).encode()).hexdigest(),
    }


def git_commit() -> str | None:
    """Commit of the code that runs, with ``+changes`` if the working tree differs; None outside a checkout."""
    if not IS_CHECKOUT:
        return None  # an installed package, whose environment may be inside a checkout of another project
    try:
        head, status = (
            subprocess.run(["git", *command.split()], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
            for command in ("rev-parse HEAD", "status --porcelain")
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+changes" if status.strip() else "")


def _truncate(path: Path, step: int, evaluates_first: bool) -> None:
    """Drop the lines that a resumed run will write again, and a last line that a kill cut short.

    With ``evaluates_first`` the evaluation of ``step`` is among them.
    """
    if not path.is_file():
        return
    lines = []
    # What a damaged disk left of a line is no UTF-8, and no JSON either.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            metrics = json.loads(line)
            is_repeated = evaluates_first and metrics["step"] == step and "train/loss" not in metrics
            if metrics["step"] <= step and not is_repeated:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    # Under another name first: a kill here must not cost the metrics of days.
    write_text(path, "".join(lines))
