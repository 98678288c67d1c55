"""Telemetry of a run: a console line, metrics.jsonl, TensorBoard, environment.json."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from egohod.config import Config, to_yaml
from egohod.distributed import Distributed
from egohod.runtime import time_left, write_text

log = logging.getLogger(__name__)

# What a result may depend on: the version of each goes into environment.json.
PACKAGES = (
    *("torch", "torchvision", "timm", "open_clip_torch", "decord", "av", "torchcodec"),
    *("numpy", "pyarrow", "omegaconf"),
)


class Clock:
    """Training time, with the waiting for data counted apart and pauses (evaluation, saving) left out."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetching of a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around anything that is not training."""
        start = time.perf_counter()
        yield
        # As if the lap had begun later: clips a second are those of training alone.
        self._start += time.perf_counter() - start

    def step(self) -> None:
        """One optimisation step is done."""
        self._steps += 1

    def lap(self) -> tuple[int, float, float]:
        """Steps, seconds, and seconds of waiting for data since the last lap."""
        now = time.perf_counter()
        # Not zero, by which speeds would be divided.
        lap = self._steps, max(now - self._start, 1e-9), self._waited
        self._start, self._waited, self._steps = now, 0.0, 0
        return lap


@dataclass(frozen=True)
class Share:
    """One process's part of a line of the log, since the last line."""

    host: str
    steps: int
    seconds: float
    waited: float  # seconds, for data
    forward: float  # seconds, from the start of a step to its first collective
    memory_gb: float
    clips_lost: int


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
        self._board: Any = None
        try:
            # Here: with a protobuf that does not fit, the import alone fails, which would end --help too.
            from torch.utils.tensorboard import SummaryWriter

            # Drops the events of the steps that come again.
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step or None)
        except OSError:
            raise
        except Exception as error:  # protobuf raises many kinds; metrics.jsonl holds the same
            log.warning(
                "no TensorBoard, metrics.jsonl only: %s: %s; pip install --force-reinstall tensorboard protobuf",
                type(error).__name__, next(iter(str(error).splitlines()), ""),
            )  # fmt: skip
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
        if not self._active:
            return
        if len(shares) > 1:
            speed |= self._stragglers.update(shares)
        shown = {name: value for name, value in (metrics | speed).items() if name not in ("steps", "consecutive_skips")}
        self.write(step, {f"train/{name}": value for name, value in shown.items()})
        eta = time_left((self._total - step) * self._seconds_per_step, rate=1.0)
        skipped = f"  skipped {metrics['skipped']:.0f}" if metrics.get("skipped") else ""
        lost = f"  {speed['clips_lost']:.0f} clips lost" if speed["clips_lost"] else ""
        log.info(
            "step %d/%d  loss %.4f  acc %.3f  lr %.2e  grad %.2f  %.1f clips/s  waits %.0f %%  %.1f GB  ETA %s%s%s",
            step, self._total, metrics["loss"], metrics["accuracy"], metrics["lr"], metrics["grad_norm"],
            speed["clips_per_second"], 100 * speed["data_wait"], speed["memory_gb"], eta, skipped, lost,
        )  # fmt: skip

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics of any kind to metrics.jsonl and TensorBoard."""
        if not self._active:
            return
        try:
            # A window in which every step was skipped has no mean: null, as JSON has no NaN.
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in metrics.items():
                    self._board.add_scalar(name, value, step)
                self._board.flush()
        except OSError as error:
            log.error("metrics of step %d not written: %s; training continues", step, error.strerror or error)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        # Also after an error: TensorBoard's thread would keep its last events.
        if not self._active:
            return
        try:
            self._file.close()
            if self._board is not None:
                self._board.close()
        except OSError as error:  # a lost folder, whose own error ends the run and must not be replaced
            log.error("metrics not written: %s", error.strerror or error)


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
    versions: dict[str, str | None] = {}
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
    here = Path(__file__).resolve().parent
    try:
        head, status = (
            subprocess.run(["git", *command.split()], cwd=here, capture_output=True, text=True, check=True).stdout
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
