"""Parts of ``tools/gpu_check.py`` that need no data: the machine, exactness, and what steps cost.

A part is a generator of rows. A row is a dict of what was measured by column; ``left out`` has the reason why a row
could not be measured here, ``failed`` what went wrong. Nothing is measured in a way of its own: clocks and matrix
products are those of ``tools/bench.py``, models, batches and steps those that a run builds from its configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import re
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from _common import ROOT
from benches.golden import golden_model, golden_schema, golden_tensors, golden_video
from benches.training import END_OF_TEXT, START_OF_TEXT, alternate, matmul_round, slowfast, timed
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.nn import attention as sdpa
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function

from egohod.config import Config, load_leniently
from egohod.data.decoders import choose_decoder
from egohod.data.labels import ClassSpace
from egohod.distributed import Distributed, inference_precision, pick_precision
from egohod.errors import UserError
from egohod.knobs import knobs
from egohod.loss.config import LOSSES
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import IMAGE_STATS, FastPathConfig, Geometry, ModelConfig
from egohod.model.cost import clip_flops
from egohod.model.dual_encoder import DualEncoder
from egohod.model.vision import KERNELS, kernel_fault
from egohod.runtime import nvidia_driver, usable_cores
from egohod.training.build import build_model, micro_batches, predict_memory, try_batch
from egohod.training.step import TrainStep
from egohod.training.telemetry import peak_flops, step_flops

Row = dict[str, Any]

BASE, EGOVIDEO = "configs/config/clip_base.yml", "configs/config/egovideo_base.yml"
# Without what a recipe reads from files: weights, and class names from which heads start.
WITHOUT_DATA = ("model.weights.source=scratch", "model.head_start=random")
# As many as EPIC-KITCHENS-100 has pairs of a verb and a noun, of 40 nouns each; and all its noun classes.
CLASSES, NOUNS, NOUN_CLASSES = 3806, 40, 300
# A step of seconds is timed once, a short one at most three times: more rows are worth more than more digits.
MOST_RUNS, ENOUGH_SECONDS = 3, 1.0
# Calls of the CUDA runtime in which the host waits for the device, and what makes them in PyTorch.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique")
# Largest differences to the golden numbers: of pooled features and dense tokens in float32 (the project's parity
# target), and of features in half precision as a share of their norm, five times what is usual: a wrong kernel differs
# by far more.
POOLED, DENSE, GRADIENT_NORM = 2e-5, 1e-4, 1e-3
HALF = {"tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}
# For steps whose number of clips is given: auto follows from a micro-batch that is chosen.
NOTHING_RECOMPUTED = "model.checkpoint_blocks=none"
# Settings whose effect on a step of ViT-B/16 is measured.
SETTINGS = ("model.residual=float32", *(f"model.attention={name}" for name in ("flash", "cudnn", "efficient")))


@dataclass(frozen=True)
class Check:
    """What every part is given; ``tiny`` replaces every model by the demo's, to test the parts themselves."""

    run: Distributed
    """This process, as a run of its own (of :func:`collectives <benches.gpu_runs.collectives>` one of several)."""
    tiny: bool = False

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return self.run.device

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    @cached_property
    def peak(self) -> float:
        """Operations a second of large matrix products in the precision of training."""
        return matmul_peak(self.device, pick_precision("auto", self.device))


# --------------------------------------------------------------------------------------------------
# What the parts share
# --------------------------------------------------------------------------------------------------


def attempt(head: Row, work: Callable[[], Row]) -> Row:
    """``head`` with what ``work()`` measured, or with what went wrong: one row must not cost the others."""
    # Here and not after the work: the exception of an earlier row may hold its tensors until then.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return head | work()
    except torch.OutOfMemoryError:
        return head | {"failed": "out of memory"}
    except Exception as error:  # whatever a kernel, compiler or driver raises is the result of the row
        traceback.print_exc()
        return head | {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def missing_decoder(name: str) -> str | None:
    """Why ``data.decoder=name`` does not load here; None if it does."""
    try:
        choose_decoder(name)
    except UserError as error:
        return str(error)[:200]
    return None


def recipe_config(path: str | Path, check: Check, *overrides: str) -> Config:
    """The configuration of a recipe without its data; environment variables that it needs may be missing."""
    cfg = load_leniently(ROOT / path, [*WITHOUT_DATA, "model.compile=false", *overrides])[0]
    # One process splits nothing; its step is that of whole weights.
    cfg.train.sharding = "none"
    if check.tiny:
        cfg.model.name = "DEMO_Slowfast" if cfg.model.geometry().slowfast else "DEMO"
        # What the recipe's own backbone or towers need.
        cfg.model.image_size, cfg.model.backbone, cfg.model.rope_time, cfg.model.text = None, {}, False, ""
    return cfg


def build(cfg: Config, check: Check) -> DualEncoder:
    """The model of a run with random weights, initialised on the device, where it takes no time."""
    classes = None
    if cfg.model.heads != "none":
        columns = tuple(cfg.data.labels.columns)
        keys = [(str(i),) if len(columns) == 1 else tuple(map(str, divmod(i, NOUNS))) for i in range(CLASSES)]
        classes = ClassSpace(columns, tuple(keys), tuple(" ".join(key) for key in keys))
    with check.device:
        return build_model(cfg, check.run, classes)


def random_batch(cfg: Config, model: DualEncoder, clips: int, check: Check) -> dict[str, Any]:
    """A micro-batch as the loader gives it, on the host, with the labels that the loss of ``cfg`` needs."""
    device, size = check.device, model.geometry.image_size
    # Drawn on the device, which is faster by far; what a step costs does not depend on what clips show.
    video = torch.randint(256, (clips, 3, cfg.model.num_frames, size, size), dtype=torch.uint8, device=device)
    tokens = torch.randint(1, START_OF_TEXT, (clips, model.geometry.context_length), device=device)
    tokens[:, 0], tokens[:, -1] = START_OF_TEXT, END_OF_TEXT
    labels: dict[str, Tensor] = {}
    target = LOSSES[cfg.loss.name].target
    if target == "class":
        labels = {f"{name}_label": torch.randint(count, (clips,)) for name, count in model.classes.items()}
    elif target == "relevancy":
        for kind in ("clip", "text"):
            labels[f"{kind}_verbs"] = torch.randint(97, (clips,))
            labels[f"{kind}_nouns"] = (torch.rand(clips, NOUN_CLASSES) < 0.01).float()

    def on_host(tensor: Tensor) -> Tensor:
        # Page-locked as in training: a copy of other memory makes the host wait.
        return tensor.cpu().pin_memory() if check.on_gpu else tensor

    batch: dict[str, Any] = {"video": on_host(video), "tokens": on_host(tokens)}
    return batch | ({"labels": {name: on_host(label) for name, label in labels.items()}} if labels else {})


def best_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the best run: noise of the machine only ever makes one slower."""
    seconds: list[float] = []
    while len(seconds) < MOST_RUNS and sum(seconds) < ENOUGH_SECONDS:
        seconds.append(timed(run, device).seconds)
    return min(seconds)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of large matrix products in ``dtype``."""
    matmuls, operations = matmul_round(device, dtype)
    matmuls()  # warm-up
    return operations / best_seconds(matmuls, device)


class Steps:
    """The training step of a configuration on a random micro-batch, and what it costs."""

    def __init__(self, cfg: Config, check: Check, model: DualEncoder, micro_batch: int) -> None:
        self.cfg, self.check, self.model, self.micro_batch = cfg, check, model, micro_batch
        self._step = TrainStep(self.model, cfg, check.run, total_steps=10_000, steps_per_epoch=1000)
        self._batch = random_batch(cfg, self.model, self.micro_batch, check)
        self._number = 0

    def __call__(self, passes: int = 1) -> dict[str, Tensor]:
        """One step of ``passes`` micro-batches."""
        return self.on(*[self._batch] * passes)

    def on(self, *micro_batches: dict[str, Any]) -> dict[str, Tensor]:
        """One step of other micro-batches."""
        self._number += 1
        return self._step(self._number, list(micro_batches))

    def measure(self, peak: float) -> Row:
        """Speed and memory of a step of one micro-batch; ``peak`` is the matrix products' operations a second."""
        device = self.check.device
        start = timed(self, device).seconds
        # The optimizer allocates its averages in the first step: only later ones have all of them at their peak.
        if self.check.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = best_seconds(self, device)
        rate = self.micro_batch / seconds
        work = rate * step_flops(self.cfg, self.model)
        predicted = predict_memory(self.cfg, self.check.run, self.model).peak(self.micro_batch)
        row = {
            "micro-batch": self.micro_batch,
            "predicted GB": predicted / 1e9,
            "peak GB": torch.cuda.max_memory_allocated(device) / 1e9 if self.check.on_gpu else None,
            "reserved GB": torch.cuda.max_memory_reserved(device) / 1e9 if self.check.on_gpu else None,
            "first step s": start,
            "step s": seconds,
            "clips/s": rate,
            "TFLOP/s": work / 1e12,
            "MFU": work / peak,
        }
        return {name: value for name, value in row.items() if value is not None}


# --------------------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------------------


def machine(check: Check) -> Iterator[Row]:
    """Driver, libraries, attention kernels and decoders that load, and the rates that all else is compared with."""
    cuda: Any = torch.cuda
    items: dict[str, Callable[[], Any]] = {
        "torch": lambda: f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}",
        "driver": nvidia_driver,
        "cuDNN": torch.backends.cudnn.version,
        "cores, memory": lambda: f"{usable_cores()}, {psutil.virtual_memory().total / 1e9:.0f} GB",
        "/dev/shm": lambda: f"{shutil.disk_usage('/dev/shm').total / 1e9:.1f} GB",
    }
    if check.on_gpu:
        major, minor = cuda.get_device_capability(check.device)
        items |= {
            "GPU": lambda: f"{cuda.device_count()} x {cuda.get_device_name(check.device)}, sm_{major}{minor}",
            "GPU memory": lambda: f"{cuda.get_device_properties(check.device).total_memory / 1e9:.1f} GB",
            "NCCL": lambda: ".".join(map(str, cuda.nccl.version())),
            "architectures of this torch": lambda: ", ".join(cuda.get_arch_list()),
            "bf16": lambda: "native" if cuda.is_bf16_supported(including_emulation=False) else "emulated",
        }
    for name, backend in KERNELS.items():
        fault = kernel_fault(backend, check.device, torch.bfloat16, head_width=64)
        items[f"attention, {name}"] = partial(str, f"does not load: {fault[:100]}" if fault else "loads")
    rules = {name: entry.metadata for name, entry, _ in knobs(Config)}
    for name in rules["data.decoder"]["choices"]:
        items[f"decoder, {name}"] = lambda name=name: missing_decoder(name) or f"{choose_decoder(name)[0]} loads"
    for name, read in items.items():
        yield attempt({"item": name}, lambda read=read: {"value": read()})
    for name, dtype in _precisions(check).items():

        def products(name: str = name, dtype: torch.dtype = dtype) -> Row:
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            rate, text = matmul_peak(check.device, dtype), ""
            # The table has the rates of tensor cores, which products of float32 do not use without TF32.
            cfg = recipe_config(BASE, check, f"train.precision={'fp32' if name == 'tf32' else name}")
            if name != "fp32" and (sheet := peak_flops(cfg, check.run)):
                text = f", {rate / sheet:.0%} of the data sheet's"
            return {"value": f"{rate / 1e12:.3g} TFLOP/s{text}"}

        yield attempt({"item": f"matrix products, {name}"}, products)
    yield attempt({"item": "copies within the device"}, lambda: {"value": f"{_copy_rate(check) / 1e9:,.0f} GB/s"})


def _precisions(check: Check) -> dict[str, torch.dtype]:
    """Precisions to compare; in half precision a CPU may take a hundred times as long."""
    exact = {"fp32": torch.float32}
    half = {"tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return exact | half if check.on_gpu else exact


def _copy_rate(check: Check) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(int(2e9 if check.on_gpu else 2e7), dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    target.copy_(source)  # warm-up
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source), check.device)


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


def parity(check: Check) -> Iterator[Row]:
    """Outputs against the golden numbers of the original implementation, by precision."""
    model = golden_model(ModelConfig(name="CLIP_VITB16", num_frames=4)).to(check.device)
    visual, video = model.visual, golden_video().to(check.device)
    of_video, of_texts = golden_tensors("vit_b16_T4"), golden_tensors("text_b")
    tokens, index = of_texts["tokens"].long().to(check.device), of_video["token_index"].long().to(check.device)
    outputs: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "text": (lambda: model.textual(tokens), of_texts["embed"]),
        "vision": (lambda: visual(video), of_video["pooled"]),
        # Pooled features alone would not do: with the frames reversed they move by 1.5e-3 only.
        "dense tokens": (
            lambda: (visual.transformer(visual.embed(video)[0]) @ visual.image_projection)[:, index],
            of_video["dense_tokens"],
        ),
    }
    for precision in _precisions(check):
        for name, (run, expected) in outputs.items():
            yield attempt(
                {"output": name, "precision": precision},
                partial(_difference, check, precision, run, expected, DENSE if name == "dense tokens" else POOLED),
            )
        yield attempt(
            {"output": "norms of gradients", "precision": precision}, partial(_gradients, check, precision, model)
        )
    if check.tiny:
        # Half precision on a CPU: the small tower alone, which is quick even where bf16 is emulated.
        half = partial(_difference, check, "bf16", *outputs["text"], POOLED)
        yield attempt({"output": "text", "precision": "bf16"}, half)
        return
    published = FastPathConfig(position="after", pool="cls")
    fast = golden_model(ModelConfig(name="CLIP_VITB16_Slowfast", num_frames=16, fast=published)).to(check.device)
    clip, expected = golden_video(frames=16).to(check.device), golden_tensors("slowfast_b16_T16_in16")["pooled"]
    for precision in _precisions(check):
        compare = partial(_difference, check, precision, lambda: fast.visual.fast(clip), expected, POOLED)
        yield attempt({"output": "EgoVideo's fast path", "precision": precision}, compare)


def _computing_in(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Evaluation's switches; without them products of float32 run in TF32, as in training (``setup``)."""
    return nullcontext() if precision == "tf32" else inference_precision(device, pick_precision(precision, device))


@torch.no_grad()
def _difference(check: Check, precision: str, run: Callable[[], Tensor], expected: Tensor, absolute: float) -> Row:
    with _computing_in(precision, check.device):
        output = run().float().cpu()
    assert output.shape == expected.shape, f"{output.shape} instead of {expected.shape}"
    largest = float((output - expected).abs().max())
    share = float((output - expected).norm() / expected.norm())
    # In half precision an absolute limit would depend on how large the numbers are.
    value, limit = (largest, absolute) if precision == "fp32" else (share, HALF[precision])
    row = {"largest difference": largest, "share of the norm": share, "limit": limit}
    return row if value <= limit else row | {"failed": "beyond its limit"}


def _gradients(check: Check, precision: str, model: DualEncoder) -> Row:
    """The largest relative difference of the norm of a parameter's gradient, in a training step of two clips."""
    reference = golden_schema()["clip_b16_train_B2"]["grad_norms"]
    tokens = golden_tensors("text_b")["tokens"][:2].long().to(check.device)
    model.zero_grad()
    with _computing_in(precision, check.device):
        output = model(golden_video(batch=2).to(check.device), tokens)
    # As a run: the loss outside of autocast, and scaled in fp16, in which small gradients would be zero. Without
    # autocast the backward pass needs the same switches as the forward pass.
    scale = 2.0**16 if precision == "fp16" else 1.0
    with _computing_in("fp32" if precision == "fp32" else "tf32", check.device):
        (scale * ContrastiveLoss()(**output)["loss"]).backward()
    norms = {name: float(p.grad.norm()) / scale for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    worst = max(abs(norms[name] - norm) / norm for name, norm in reference.items())
    # In half precision small gradients have few digits, and how few depends on the order of sums: no limit for them.
    row: Row = {"share of the norm": worst} | ({"limit": GRADIENT_NORM} if precision == "fp32" else {})
    return row if precision != "fp32" or worst <= GRADIENT_NORM else row | {"failed": "beyond its limit"}


# --------------------------------------------------------------------------------------------------
# Steps of the recipes
# --------------------------------------------------------------------------------------------------


def steps(check: Check) -> Iterator[Row]:
    """One step of every recipe as a run of its header's command would take it on this GPU, not compiled."""
    for names, path in computations(check).items():
        yield attempt({"recipe": names}, partial(measure_step, path, check, is_tried=True))


def checkpointing(check: Check) -> Iterator[Row]:
    """The same steps with blocks that are never, partly or always recomputed, each with the clips that then fit."""
    for names, path in computations(check, sizes=False).items():
        depth = recipe_config(path, check).model.geometry().vision_layers
        for blocks in ("none", depth // 2, "all"):
            override = f"model.checkpoint_blocks={blocks}"
            yield attempt({"recipe": names, "setting": override}, partial(measure_step, path, check, override))


def compiled(check: Check) -> Iterator[Row]:
    """Each recipe compiled; beside it the same step in eager mode."""
    for names, path in computations(check, sizes=False).items():
        # An attempt each, which also frees the memory before the next.
        eager = attempt({"recipe": names}, partial(measure_step, path, check))
        fast = attempt({}, partial(measure_step, path, check, "model.compile=true"))
        if "failed" not in eager | fast:
            fast |= {"eager clips/s": eager["clips/s"], "speed-up": fast["clips/s"] / eager["clips/s"]}
        yield eager | fast
        if check.tiny:  # compiling takes a CPU a minute a model
            return


def settings(check: Check) -> Iterator[Row]:
    """ViT-B/16 with single settings changed, not compiled; the first row has none changed."""
    for overrides in ((), *((each,) for each in SETTINGS)):
        yield attempt({"setting": " ".join(overrides) or "-"}, partial(measure_step, BASE, check, *overrides))


def measure_step(path: str | Path, check: Check, *overrides: str, is_tried: bool = False) -> Row:
    """A step of a recipe with the micro-batch that this GPU would take of the recipe's batch.

    With ``is_tried`` the predicted micro-batch is tried first, as a run does unless its configuration sets one.
    """
    # Measured before the model fills the memory.
    peak, cfg, processes = check.peak, recipe_config(path, check, *overrides), processes_of(ROOT / path)
    # One process of the run, so its share of the batch.
    cfg.train.global_batch_size //= processes
    model = build(cfg, check)
    micro_batch, passes = (2, 1) if check.tiny else micro_batches(cfg, check.run, model)
    row: Row = {"processes": processes, "blocks recomputed": model.visual.transformer.checkpoint_blocks}
    if is_tried and not cfg.train.max_batch_per_process:
        predicted = micro_batch
        micro_batch, tried = try_batch(cfg, check.run, model, predicted)
        passes = passes * predicted // micro_batch
        row |= {"tried GB": tried / 1e9} if check.on_gpu else {}
        row |= {"predicted micro-batch": predicted} if micro_batch != predicted else {}
    return row | {"passes": passes} | Steps(cfg, check, model, micro_batch).measure(peak)


def processes_of(path: Path) -> int:
    """How many processes the command in a configuration's header starts, over all nodes."""
    text = path.read_text(encoding="utf-8")
    options = (re.search(rf"^# Command:.*?--{name}=(\d+)", text, re.MULTILINE) for name in ("nproc_per_node", "nnodes"))
    return math.prod(int(match[1]) for match in options if match)


def computations(check: Check, *, sizes: bool = True) -> dict[str, Path]:
    """The recipes in configs/: names of those that compute the same, and the file of the first.

    Without ``sizes`` two recipes are the same where they differ only in how many clips are held at a time.
    """
    alike: dict[str, list[Path]] = {}
    for folder in ("config", "presets", "finetune"):
        for path in sorted((ROOT / "configs" / folder).glob("*.yml")):
            # Bases are never run alone, evaluations do not train, and the demo is for CPUs.
            if path.stem.startswith(("default_", "demo_")) or path.stem.endswith("_eval"):
                continue
            cfg = recipe_config(path, check)
            train, share = cfg.train, cfg.train.global_batch_size // processes_of(path)
            held = min(share, train.max_batch_per_process or share)
            model = {name: value for name, value in dataclasses.asdict(cfg.model).items() if name != "weights"}
            if not sizes:
                held = 0
                model = {name: value for name, value in model.items() if "checkpoint" not in name}
            work = (LOSSES[cfg.loss.name].path, train.trainable, train.optimizer, train.mixup > 0, train.ema > 0)
            alike.setdefault(json.dumps([held, model, work], default=str), []).append(path)

    def name(path: Path) -> str:
        return str(path.relative_to(ROOT / "configs").with_suffix("")).removeprefix("config/")

    return {", ".join(map(name, group)): group[0] for group in alike.values()}


# --------------------------------------------------------------------------------------------------
# EgoVideo, attention, waits, accumulation
# --------------------------------------------------------------------------------------------------


def egovideo(check: Check) -> Iterator[Row]:
    """A co-training step of both paths, against the same step with all weights trained (operations: 0.85)."""
    name, frames, batch = ("DEMO_Slowfast", 16, 2) if check.tiny else ("CLIP_VITB16_Slowfast", 16, 16)
    options = argparse.Namespace(model=name, frames=frames, batch_size=batch, text_length=77, rounds=MOST_RUNS)
    options.device, options.precision, options.no_time, options.overrides = check.device.type, "auto", False, []
    result = attempt({}, lambda: slowfast(options))
    if "failed" in result:
        yield result
    columns = {"co-training": "", "all trained": "_all_trained", "ratio": "_ratio"}
    for measured in [name for name in result if f"{name}_ratio" in result]:
        numbers = {column: result[f"{measured}{ending}"] for column, ending in columns.items()}
        yield {"measured": measured, "clips": batch} | numbers


def attention(check: Check) -> Iterator[Row]:
    """Attention kernels in bf16, 12 heads of 64, at the tokens of 4 and 16 frames."""
    shapes = ((50, 2),) if check.tiny else ((785, 32), (3137, 8))
    list_of = getattr(sdpa, "list_flash_attention_impls", list)  # newer versions of torch have it
    for tokens, clips in shapes:
        for name, backend in KERNELS.items():
            # The plain kernel saves all scores: a row of its own shows what the others are for.
            head = {"tokens": tokens, "clips": clips, "kernel": name}
            yield attempt(head, partial(_time_attention, check, tokens, clips, backend))
        for name in list_of():
            head = {"tokens": tokens, "clips": clips, "kernel": f"flash, {name}"}
            yield attempt(head, partial(_time_other_flash, check, tokens, clips, name))


def _time_attention(check: Check, tokens: int, clips: int, backend: SDPBackend) -> Row:
    shape = (clips, 12, tokens, 64)
    query, key, value, gradient = (
        torch.randn(shape, device=check.device, dtype=torch.bfloat16, requires_grad=i < 3) for i in range(4)
    )
    times = 1 if check.tiny else 20

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    def backward() -> None:
        for _ in range(times):
            torch.autograd.grad(output, (query, key, value), gradient, retain_graph=True)

    try:
        output = forward()
        backward()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return {"left out": str(error).splitlines()[0][:100]}
    ahead = best_seconds(lambda: [forward() for _ in range(times)], check.device) / times
    back = best_seconds(backward, check.device) / times
    # Two products forward; five backward, of which one is computed again.
    work = 4.0 * clips * 12 * tokens**2 * 64
    speeds = {"forward TFLOP/s": work / ahead / 1e12, "backward TFLOP/s": 2.5 * work / back / 1e12}
    return {"forward ms": 1000 * ahead, "backward ms": 1000 * back, **speeds}


def _time_other_flash(check: Check, tokens: int, clips: int, name: str) -> Row:
    try:
        sdpa.activate_flash_attention_impl(name)
    except Exception as error:  # whatever the import of a package that is not installed raises
        return {"left out": str(error).splitlines()[0][:100]}
    try:
        return _time_attention(check, tokens, clips, SDPBackend.FLASH_ATTENTION)
    finally:
        sdpa.restore_flash_attention_impl()


def waits(check: Check) -> Iterator[Row]:
    """Calls within a training step in which the host waits for the device (none is meant to), by torch.profiler."""
    cases = {"one pass": (BASE, 1, ()), "two passes": (BASE, 2, ()), "EgoVideo": (EGOVIDEO, 1, ())}
    cases["clipped gradients"] = (BASE, 1, ("train.clip_norm=1",))
    for name, (path, passes, overrides) in cases.items():
        yield attempt({"step": name}, partial(_profile, check, path, passes, overrides))


def _profile(check: Check, path: str, passes: int, overrides: Sequence[str]) -> Row:
    cfg = recipe_config(path, check, NOTHING_RECOMPUTED, *overrides)
    step = Steps(cfg, check, build(cfg, check), 2 if check.tiny else 16)
    for _ in range(2):  # the first ones allocate
        step(passes)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if check.on_gpu else [])
    if check.on_gpu:
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        with record_function("training step"):
            step(passes)
        if check.on_gpu:
            torch.cuda.synchronize()
    row = {"passes": passes} | waits_in(profiler.events(), check.on_gpu)
    return row | {"failed": "the host waits for the device"} if check.on_gpu and row["waits"] else row


def waits_in(events: Sequence[Any], on_gpu: bool) -> Row:
    """Waits of the host between start and end of "training step", and the share of its time that kernels run.

    A CPU waits for nothing: counted instead is what reads a number, which its fused optimizer does too.
    """
    names, cpu = WAITS if on_gpu else READS, torch.autograd.DeviceType.CPU
    whole = next(each.time_range for each in events if each.name == "training step" and each.device_type == cpu)
    calls = Counter(
        each.name
        for each in events
        if each.name in names and whole.start <= each.time_range.start and each.time_range.end <= whole.end
    )
    row: Row = {"waits": calls.total(), "calls": ", ".join(f"{count} x {name}" for name, count in calls.items())}
    # The device's time line also has the annotated regions, which cover its kernels.
    kernels = [each.time_range for each in events if each.device_type != cpu and not each.is_user_annotation]
    if kernels:
        span = max(each.end for each in kernels) - min(each.start for each in kernels)
        busy = sum(each.end - each.start for each in kernels)
        row |= {"kernels": len(kernels), "step ms": span / 1000, "device busy": busy / span}
    return row


def accumulation(check: Check) -> Iterator[Row]:
    """Cached accumulation of batches that are in memory: the ideal is a forward pass more for each micro-batch."""
    cfg = recipe_config(BASE, check, NOTHING_RECOMPUTED)
    step = Steps(cfg, check, build(cfg, check), 2 if check.tiny else 32)
    step()
    forward = clip_flops(step.model.geometry, cfg.model.num_frames, step.model.geometry.context_length).forward
    once = best_seconds(step, check.device)
    for passes in (2, 4) if check.tiny else (8, 32):

        def measure(passes: int = passes) -> Row:
            step(passes)
            seconds = best_seconds(lambda: step(passes), check.device)
            ideal = passes * once * (1 + forward / step_flops(cfg, step.model))
            clips = passes * step.micro_batch
            return {"step s": seconds, "ideal s": ideal, "ratio": seconds / ideal, "clips/s": clips / seconds}

        yield attempt({"micro-batch": step.micro_batch, "passes": passes}, measure)


# --------------------------------------------------------------------------------------------------
# A peer
# --------------------------------------------------------------------------------------------------


def peer(check: Check) -> Iterator[Row]:
    """Ours against the same step written plainly on open_clip's ViT and text tower, in turns; above 1 ours is faster.

    Frames are tiles of one square picture, so that both attend over the same tokens with the same sizes, batch,
    precision and optimizer. Ours also computes the gradient norm, the checks of a run, and normalises pixels alike.
    """
    base = [("CLIP_VITB16", 4, 64), ("CLIP_VITB16", 16, 16)]
    cases = [("DEMO", 4, 2)] if check.tiny else [*base, ("CLIP_VITL14_336PX", 4, 8)]
    # Compiled last: to compile the peer may take the rest of the part's time.
    for is_compiled, rows in ((False, cases), (True, [] if check.tiny else base)):
        for name, frames, clips in rows:
            head = {"model": name, "frames": frames, "clips": clips, "compiled": is_compiled}
            yield attempt(head, partial(_against_peer, check, name, frames, clips, is_compiled))


def _against_peer(check: Check, name: str, frames: int, clips: int, is_compiled: bool) -> Row:
    wanted = [f"model.name={name}", f"model.num_frames={frames}", f"model.compile={str(is_compiled).lower()}"]
    wanted.append(NOTHING_RECOMPUTED)
    cfg, device = load_leniently(ROOT / BASE, [*WITHOUT_DATA, *wanted])[0], check.device
    resident = []

    def allocated() -> int:
        return torch.cuda.memory_allocated(device) if check.on_gpu else 0

    before = allocated()
    ours = Steps(cfg, check, build(cfg, check), clips)
    batch = random_batch(cfg, ours.model, clips, check)
    ours()
    resident.append(allocated() - before)
    plain = plain_step(ours.model.geometry, frames, batch, cfg, check, is_compiled)
    plain()
    resident.append(allocated() - before - resident[0])
    ways: dict[str, Callable[[], Any]] = {"ours": ours, "peer": plain}
    # The second run of each sees the memory of its optimizer.
    runs = alternate(1 + MOST_RUNS, ways, device)
    best = {way: min(run.seconds for run in runs[way][1:]) for way in ways}
    row: Row = {"ours clips/s": clips / best["ours"], "peer clips/s": clips / best["peer"]}
    row["speed ratio"] = best["peer"] / best["ours"]
    if check.on_gpu:
        for (way, run), others in zip(ways.items(), reversed(resident), strict=True):
            torch.cuda.reset_peak_memory_stats(device)
            run()
            row[f"{way} GB"] = (torch.cuda.max_memory_allocated(device) - before - others) / 1e9
    return row


def plain_step(
    shape: Geometry, frames: int, batch: Mapping[str, Tensor], cfg: Config, check: Check, is_compiled: bool
) -> Callable[[], Tensor]:
    """A training step on open_clip's CLIP, as its own training loop takes it; returns the loss."""
    rows = math.isqrt(frames)
    assert rows * rows == frames, "frames must tile a square"
    vision = CLIPVisionCfg(
        layers=shape.vision_layers,
        width=shape.vision_width,
        head_width=shape.vision_width // shape.vision_heads,
        patch_size=shape.patch_size,
        image_size=rows * shape.image_size,
    )
    text = CLIPTextCfg(width=shape.text_width, heads=shape.text_heads, layers=shape.text_layers)
    with check.device:
        clip = CLIP(shape.embed_dim, vision, text, output_dict=True)
    model: nn.Module = torch.compile(clip) if is_compiled else clip  # type: ignore[assignment]
    train, dtype = cfg.train, pick_precision(cfg.train.precision, check.device)
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=train.lr, betas=(0.9, 0.999), eps=train.eps, weight_decay=train.weight_decay, fused=True
    )
    loss_fn = ClipLoss()
    # [B, 3, T, H, W] -> [B, 3, rows * H, rows * W], once: a peer's loader would have done it.
    side = shape.image_size
    picture = (
        batch["video"].unflatten(2, (rows, rows)).permute(0, 1, 2, 4, 3, 5).reshape(-1, 3, rows * side, rows * side)
    )
    picture = picture.pin_memory() if check.on_gpu else picture.contiguous()
    mean, std = (torch.tensor(each, device=check.device).view(3, 1, 1) for each in IMAGE_STATS["clip"])

    def step() -> Tensor:
        image = (picture.to(check.device, non_blocking=True).float() / 255 - mean) / std
        tokens = batch["tokens"].to(check.device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(check.device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = model(image, tokens)
        loss = loss_fn(**{name: value.float() for name, value in output.items()})
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    return step
