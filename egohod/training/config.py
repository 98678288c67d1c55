"""Settings of a training run and its optimisation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from egohod.errors import UserError
from egohod.knobs import knob, part
from egohod.model.config import LoraConfig

_CLOCK = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*(second|minute|hour)s?\s*$", re.IGNORECASE)
_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(step|epoch|sample)s?\s*$", re.IGNORECASE)


@dataclass
class TrainConfig:
    """The run and its optimisation."""

    # The run: where it writes, how long it is, and how many clips make a step.
    output: str = knob("runs/pretrain", "run folder: checkpoints, metrics.jsonl, TensorBoard, environment.json")
    duration: str = knob("15 epochs", "length of the run in steps, epochs or samples")
    global_batch_size: int = knob(2048, "clips per optimizer step over all processes (upstream: 128 x 16)", low=1)
    max_batch_per_process: int | None = knob(
        None,
        "clips per process in one forward pass; larger batches are accumulated with the same loss; null is what fits "
        "the memory",
        low=1,
    )
    # What of the model is trained.
    trainable: str = knob(
        "all",
        "trainable parameters: adapters is the motion adapters, the temporal embedding and the projections of a "
        "slow-fast model; lora the same parts of any model and low-rank parts of the blocks' weights (train.lora); "
        "last_blocks the last train.last_blocks blocks of the vision tower and all after them; vision all but the text "
        "tower; heads the classification heads alone",
        choices=("all", "adapters", "lora", "last_blocks", "vision", "heads"),
    )
    last_blocks: int = knob(4, "number of blocks, for train.trainable=last_blocks", low=1)
    lora: LoraConfig = part(LoraConfig)
    # Optimizer and regularisation. Defaults are upstream's pretraining; AVION's for classes are named beside them.
    optimizer: str = knob("adamw", "adamw; sgd as AVION fine-tunes for classes", choices=("adamw", "sgd"))
    momentum: float = knob(0.9, "of SGD", low=0, high=0.999)
    layer_decay: float = knob(
        1.0,
        "layer-wise learning rate decay of the vision tower: rate of a block over that of the next one; 1: none",
        above=0,
        high=1,
    )
    mixup: float = knob(0.0, "classes: mixup's alpha; AVION fine-tunes with 0.8; 0 is off", low=0)
    cutmix: float = knob(
        0.0, "classes: cutmix's alpha; AVION fine-tunes with 1.0; with mixup, one of the two at random", low=0
    )
    ema: float = knob(
        0.0,
        "decay per step of an exponential moving average of the weights, with timm's warm-up; the average is what is "
        "evaluated and saved; 0 is off",
        low=0,
        high=0.99999,
    )
    # The learning rate at every step.
    lr: float = knob(4e-5, "peak learning rate; upstream's base recipe at a global batch of 2,048", above=0)
    lr_reference_batch: int | None = knob(
        None,
        "batch size that lr, lr_start and lr_end are given for: they are multiplied by global_batch_size over this, as "
        "AVION does for classes (128); null: no scaling",
        low=1,
    )
    # In lists, not tuples: YAML and omegaconf have no tuples.
    betas: list[float] = knob([0.9, 0.999], "AdamW's betas")
    eps: float = knob(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = knob(
        0.01, "upstream's; none on biases, norms and other tensors of one dimension or less", low=0
    )
    decay_positions: bool = knob(
        True,
        "weight decay on the positional embeddings of both towers, as upstream pretrains; false, as AVION fine-tunes, "
        "leaves them out (the temporal embedding is decayed by both)",
    )
    schedule: str = knob(
        "constant",
        "learning rate schedule; upstream's is constant, cosine decays to lr_end",
        choices=("constant", "cosine"),
    )
    warmup: str = knob("0 steps", "linear warm-up from lr_start, in steps, epochs or samples")
    lr_start: float = knob(1e-6, "learning rate at the start of the warm-up", low=0)
    lr_end: float = knob(1e-5, "learning rate at the end of the cosine", low=0)
    clip_norm: float | None = knob(None, "maximum gradient norm; upstream does not clip", above=0)
    # The machine. None of it changes what is computed but for rounding.
    device: str = knob(
        "auto",
        "auto is the GPU if there is one, a Mac's (mps) for evaluation and search alone; cpu never looks for one",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    precision: str = knob(
        "auto",
        "auto is bf16 where the hardware computes it fast, fp32 elsewhere; fp16 uses a loss scaler; fp32 multiplies in "
        "TF32 on GPUs that have it",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    gradient_dtype: str = knob(
        "fp32",
        "type in which several processes exchange gradients; bf16 halves the traffic of slow networks and rounds each "
        "gradient to 8 bits of mantissa (relative error up to 1/256 per rounding); losses and accumulation stay exact",
        choices=("fp32", "bf16"),
    )
    sharding: str = knob(
        "none",
        "what each of several processes holds: none, all weights (DistributedDataParallel); fsdp, a part of weights, "
        "gradients and averages (FSDP2), for models that do not fit one GPU; hsdp, a part of its node's, so that no "
        "weights are sent between nodes. docs/large_models.md",
        choices=("none", "fsdp", "hsdp"),
    )
    shard_processes: int | None = knob(
        None, "hsdp: processes that a copy of the weights is split over; null is those of one node", low=2
    )
    deterministic: bool = knob(
        False,
        "only algorithms that compute the same bits every time, so that a resumed run on the same GPUs equals an "
        "uninterrupted one bit for bit; slower on GPUs. On CPUs this is so without it. docs/reliability.md",
    )
    seed: int = knob(0, "all randomness follows from it", low=0, high=2**63 - 1)
    resume: str = knob(
        "auto",
        "auto resumes the newest intact checkpoint of the run folder, none starts from the beginning, else the path of "
        "a checkpoint",
    )
    collective_timeout: float = knob(
        1800.0,
        "seconds that a process waits for the others in a collective operation before the run ends, as when one of "
        "them hangs; longer than data.timeout and than a checkpoint ever takes to write. A process that dies is "
        "noticed at once",
        low=1,
    )
    stop_seconds: float = knob(
        20.0,
        "seconds that a step of several micro-batches may still take after a signal; then it is given up between two "
        "of them and the step before it is saved. Less than the scheduler's notice (torchrun 30 s, Slurm as in "
        "exps/: 120 s) minus the time to save",
        low=0,
    )
    # What is written, and how often.
    log_every: str = knob("10 steps", "interval of metrics; in between, nothing waits for the device")
    save_every: str = knob(
        "1 epochs",
        "interval of checkpoints in steps, epochs or samples, or by the clock of the first process in seconds, minutes "
        "or hours ('10 minutes'); a step that is evaluated in between is saved if it is among keep_best",
    )
    async_save: bool = knob(
        False,
        "write checkpoints in the background: training pauses while the state is copied to the memory of the first "
        "process (weights, AdamW's two moments, the average: 12 to 16 bytes a parameter for the rest of the run), not "
        "while files are written. The last checkpoint of a run, and that of a signal, is always waited for",
    )
    keep_last: int = knob(2, "newest checkpoints kept", low=1)
    keep_best: int = knob(1, "best checkpoints kept, by evaluate.best", low=0)
    trackers: list[str] = knob(
        ["tensorboard"],
        "where metrics go beside metrics.jsonl; each is imported only if it is named, and configured by its own "
        "environment variables (WANDB_MODE=offline, TRACKIO_DIR, MLFLOW_TRACKING_URI)",
        choices=("tensorboard", "wandb", "trackio", "mlflow"),
    )
    peak_tflops: float | None = knob(
        None,
        "dense matrix TFLOP/s of one device in train.precision, for MFU in the log; null looks the GPU's name up in "
        "the table of egohod/training/telemetry.py",
        above=0,
    )
    profile: list[int] = knob(
        [],
        "first and last step to record with torch.profiler on the first process, e.g. [20, 22]: a trace and a table of "
        "operators in the run folder; recording slows these steps; [] is none",
        low=1,
    )
    memory_history: bool = knob(
        False,
        "GPU: record the Python stack of every allocation for the snapshot that is written when memory runs out; the "
        "snapshot itself is always written. Costs time of the host at each allocation",
    )

    @staticmethod
    def convert_old_keys(section: dict[str, Any], below: dict[str, Any]) -> list[tuple[str, str]]:
        """Drop ``peer_timeout``: it bounded silence, a collective also waits while a checkpoint is written."""
        if "peer_timeout" not in section:
            return []
        # Its 120 seconds would end a run that writes a large checkpoint to a slow disk.
        del section["peer_timeout"]
        return [("train.peer_timeout", "train.collective_timeout, which is longer and keeps its own value")]


def duration_in_steps(text: str, *, steps_per_epoch: int, global_batch_size: int, key: str = "duration") -> int:
    """Number of optimisation steps in ``"500 steps"``, ``"1.5 epochs"`` or ``"4e6 samples"``.

    Anything above zero counts as at least one step. Raises :class:`UserError` naming ``key``.
    """
    match = _DURATION.match(text)
    if not match:
        by_clock = ", or '10 minutes'" if key == "train.save_every" else ""
        raise UserError(
            f"{key}: '{text}' is not a duration; write e.g. '500 steps', '1.5 epochs' or '4e6 samples'{by_clock}"
        )
    amount, unit = float(match.group(1)), match.group(2).lower()
    if not math.isfinite(amount):
        raise UserError(f"{key}: '{text}' is too long")
    # An epoch is whole steps: the clips that fill no batch are left for the next shuffle.
    steps = amount * {"step": 1.0, "epoch": float(steps_per_epoch), "sample": 1.0 / global_batch_size}[unit]
    return max(1, round(steps)) if steps > 0 else 0


def clock_seconds(text: str) -> float | None:
    """The seconds of ``"90 seconds"``, ``"10 minutes"`` or ``"1.5 hours"``; None for any other text."""
    match = _CLOCK.match(text)
    return float(match.group(1)) * {"second": 1, "minute": 60, "hour": 3600}[match.group(2).lower()] if match else None
