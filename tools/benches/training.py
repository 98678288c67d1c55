"""Benchmarks of a training step, ``step``, ``slowfast``, ``accumulation`` and ``memory`` of ``tools/bench.py``; and how
all measure.

``step``: forward, loss and backward of both towers on random clips. Operations are counted as they happen (PyTorch's
FlopCounterMode, attention included) in the plain form: all tokens pass every block, 77 text tokens. The fraction of
peak is that nominal work per second over a large matrix product's, both in the same precision, in alternating rounds
of one run. Memory is measured in a fresh process per variant. ``--against`` times the step of a second model in turns
with the first; where one tower is timm's CLIP ViT and the other ours, of the same sizes, they get the same weights and
their features are compared.

``slowfast``: a co-training step beside the same step with all weights trained. In the twin step the blocks' weights
receive gradients from the fast path as well, which is the same computation forward and a weight gradient more for
every frozen product backward. Operations and bytes saved for the backward pass are counted on fake tensors, so they
are the same on every machine; seconds are the best of alternating rounds, by the clock and, without a GPU, of
processor time, which other work on the machine changes less.

``accumulation``: the real loader and the real step of cached features around a model and a decoder that sleep, so that
waiting is all that is measured and any machine gives the same. A forward pass sleeps once, a backward pass twice as
long, and the workers together decode exactly as fast as the step computes: the ideal step is that of batches in memory.

``memory``: frames, checkpointing and batch against predicted peak memory: weights, gradients and AdamW's moments, plus
what autograd saves per clip, counted on fake tensors. ``tools/gpu_check.py`` measures it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from _common import markdown_table
from omegaconf import OmegaConf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from egohod.config import model_config
from egohod.data.loader import BatchPlan, ClipLoader, train_loader
from egohod.distributed import pick_device, pick_precision
from egohod.errors import UserError
from egohod.loss.config import LossConfig
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model import timm_vision, vision
from egohod.model.config import ModelConfig
from egohod.model.cost import SHARE, clip_flops, count_flops, predict, saved_bytes, split_state
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.model.timm_vision import TimmTransformer
from egohod.model.vision import VideoTransformer, VisionTower
from egohod.training.build import split_batch
from egohod.training.step import forward_backward
from egohod.training.train import ArrivingBatches

# Side and number of the matrix products of a round: large enough to be bound by arithmetic, less than a second in all.
MATMUL_SIZE, MATMULS_PER_ROUND = {"cpu": 2048, "cuda": 8192}, {"cpu": 4, "cuda": 50}
# CLIP's: the text tower reads its feature at the highest token, so that random tokens must stay below.
START_OF_TEXT, END_OF_TEXT = 49406, 49407
# The machines of the memory table: what research groups and clusters mostly have.
DEVICES_GB, PROCESSES = (24, 80), (1, 4, 8)


# --------------------------------------------------------------------------------------------------
# How all benchmarks measure
# --------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """What some work returned, its seconds by the clock, and its CPU seconds, those of ended children included."""

    result: Any
    seconds: float
    cpu: float


def timed(work: Callable[[], Any], device: torch.device | None = None) -> Timed:
    """Run ``work`` until ``device`` has finished it."""
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start, cpu = time.perf_counter(), cpu_seconds()
    result = work()
    if on_gpu:
        # Kernels are queued: without this only the launches would be timed.
        torch.cuda.synchronize(device)
    return Timed(result, time.perf_counter() - start, cpu_seconds() - cpu)


def alternate(
    rounds: int, ways: Mapping[str, Callable[[], Any]], device: torch.device | None = None
) -> dict[str, list[Timed]]:
    """Time all ways in turns, so that a noisy machine disturbs all of them alike."""
    runs: dict[str, list[Timed]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            runs[name].append(timed(work, device))
    return runs


def cpu_seconds(*processes: int) -> float:
    """CPU time of this process and of its children that have ended, or of one of both."""
    # Not os.times(), which counts in ticks of 10 ms: reading one clip takes about as long.
    chosen = processes or (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(each)[:2]) for each in chosen)


def matmul_round(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """A round of large matrix products, and its operations: what steps are compared with."""
    side, repeats = MATMUL_SIZE[device.type], MATMULS_PER_ROUND[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def matmuls() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return matmuls, repeats * 2.0 * side**3


def peak_bytes() -> int:
    """The peak resident memory of this process; macOS counts bytes, Linux kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def json_of(command: list[str]) -> dict[str, Any]:
    """What a benchmark prints in a process of its own, whose memory is not this one's."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    # The last line: libraries may print others before.
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------
# What step and slowfast share
# --------------------------------------------------------------------------------------------------


def _add_step_options(parser: argparse.ArgumentParser, *, model: str, frames: int, batch_size: int) -> None:
    add = parser.add_argument
    add("overrides", nargs="*", metavar="model.KEY=VALUE", help="settings of --model, such as model.image_size=64")
    add("--model", default=model, help=f"geometry, timm/NAME or open_clip/NAME (default: {model})")
    add("--frames", type=int, default=frames, help=f"frames per clip (default: {frames})")
    add("--batch_size", type=int, default=batch_size, help=f"clips per step (default: {batch_size})")
    add("--text_length", type=int, default=77, help="text tokens computed (default: 77, no cutting)")
    add("--rounds", type=int, default=3, help="timed steps, after one to warm up (default: 3)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))


def _model_config(options: argparse.Namespace, slowfast: bool, **more: Any) -> ModelConfig:
    """The model of a benchmark of models with one path or two. Raises :class:`UserError`."""
    for text in options.overrides:
        if not text.startswith("model.") or text.startswith("model.name="):
            raise UserError(f"{text}: overrides are of the form model.KEY=VALUE; the name is --model")
    settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist(options.overrides))
    config = model_config(options.model, **settings.get("model", {}) | {"num_frames": options.frames} | more)
    if config.geometry().slowfast != slowfast:
        # The other benchmark is for it: its numbers make no sense here.
        raise UserError(f"--model {options.model} has {'one path' if slowfast else 'two paths'}")
    return config


def _prepare(
    options: argparse.Namespace, config: ModelConfig
) -> tuple[DualEncoder, Callable[[], None], torch.device, torch.dtype]:
    """The model and a function that runs one step of it on fixed random data."""
    device = pick_device(options.device)
    dtype = pick_precision(options.precision, device)
    # Random clips: the time of a step does not depend on what they show.
    torch.manual_seed(0)
    model, loss_fn = create_model(config, LossConfig()).to(device), ContrastiveLoss()
    size, context, last = model.geometry.image_size, model.geometry.context_length, model.geometry.vocab_size - 1
    # SigLIP's text tower computes its padding too.
    options.text_length = context if model.textual.needs_padding else min(options.text_length, context)
    video = torch.randn(options.batch_size, 3, options.frames, size, size, device=device)
    tokens = torch.randint(1, last - 1, (options.batch_size, options.text_length), device=device)
    tokens[:, 0], tokens[:, -1] = last - 1, last

    def step() -> None:
        # As in training, where gradients are freed and not overwritten.
        model.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = model(video, tokens)
        loss_fn(**output)["loss"].backward()

    return model, step, device, dtype


def _head(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    result = {name: vars(options)[name] for name in ("model", "frames", "batch_size", "text_length")}
    return result | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
    }


# --------------------------------------------------------------------------------------------------
# step
# --------------------------------------------------------------------------------------------------


def step_options(parser: argparse.ArgumentParser) -> None:
    _add_step_options(parser, model="CLIP_VITB16", frames=4, batch_size=4)
    help_text = "torch.compile: block by block, as training does, or each tower as a whole"
    parser.add_argument("--compile", nargs="?", const="blocks", choices=("blocks", "towers"), help=help_text)
    parser.add_argument("--no_memory", action="store_true", help="leave the memory variants out")
    parser.add_argument("--against", metavar="MODEL", help="a second model to time in turns with --model")
    # Of the processes that this benchmark starts itself.
    parser.add_argument("--memory_of", choices=("plain", "checkpointed"), help=argparse.SUPPRESS)


def step(options: argparse.Namespace) -> dict[str, Any]:
    """A training step: seconds, share of the matmul peak (the best round of each counts), memory by variant."""
    if options.memory_of:
        return _step_memory(options)
    config, memory = _model_config(options, slowfast=False), {}
    # Before this process grows: Linux passes its own peak on to its children.
    for variant in () if options.no_memory else ("plain", "checkpointed"):
        # The peak of a process can only be read once, so each variant gets a process of its own.
        command = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], "--json", "--memory_of", variant]
        memory[variant] = json_of(command)
    model, run_step, device, dtype = _prepare(options, config)
    counted = count_flops(run_step)  # also the warm-up
    ways = {"step": run_step}
    if options.against:
        peer_options = argparse.Namespace(**vars(options) | {"model": options.against, "overrides": []})
        peer, ways["against"], *_ = _prepare(peer_options, _model_config(peer_options, slowfast=False))
        ways["against"]()  # warm-up
    start_up = {}
    if options.compile:
        if options.compile == "blocks":
            model.compile_towers()
        else:  # what that is compared with
            model.visual.compile(fullgraph=True)
            model.textual.compile(fullgraph=True, dynamic=True)
        first = timed(run_step, device)
        # Processor time too: kernels for a CPU are compiled by processes, which compete with other work.
        start_up = {"start_up_seconds": first.seconds, "start_up_cpu_seconds": first.cpu}
    matmuls, operations = matmul_round(device, dtype)
    matmuls()  # warm-up
    runs = alternate(options.rounds, {"matmul": matmuls} | ways, device)
    # The best of both: noise of the machine only ever makes a round slower.
    best = min(run.seconds for run in runs["step"])
    peak = operations / min(run.seconds for run in runs["matmul"])
    against: dict[str, Any] = {}
    if options.against:
        # Processor time too, which other work on the machine changes less.
        theirs, cpu = (min(getattr(run, kind) for run in runs["against"]) for kind in ("seconds", "cpu"))
        against = {"against": options.against, "against_step_seconds": theirs, "step_over_against": best / theirs}
        against["step_cpu_over_against"] = min(run.cpu for run in runs["step"]) / cpu
        against["features_difference"] = _features_difference(model, peer)
    nominal = options.batch_size * _nominal_flops(config, options)
    formula = options.batch_size * clip_flops(model.geometry, options.frames, options.text_length).step
    return _head(options, device, dtype) | {
        "compiled": options.compile,
        **start_up,
        "step_seconds": best,
        "clips_per_second": options.batch_size / best,
        **against,
        "nominal_tflop": nominal / 1e12,
        "counted_tflop": counted / 1e12,
        "counted_over_formula": counted / formula,
        "matmul_peak_gflops": peak / 1e9,
        "fraction_of_peak_nominal": nominal / best / peak,
        "fraction_of_peak_counted": counted / best / peak,
        "memory": memory,
    }


def _step_memory(options: argparse.Namespace) -> dict[str, float]:
    blocks = "all" if options.memory_of == "checkpointed" else "none"
    config = _model_config(options, slowfast=False, checkpoint_blocks=blocks)
    model, run_step, device, dtype = _prepare(options, config)
    # The second step has the gradients of the first in memory, as in training.
    run_step()
    run_step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()
    size = model.geometry.image_size

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            video = torch.zeros(1, 3, options.frames, size, size, device=device)
            tokens = torch.ones(1, options.text_length, dtype=torch.long, device=device)
            output = model(video, tokens)
        return output["video_features"].sum() + output["text_features"].sum()

    return {"peak_gb": round(peak / 1e9, 3), "saved_per_clip_mb": round(saved_bytes(forward, model) / 1e6, 1)}


def give_weights(ours: VideoTransformer, theirs: TimmTransformer) -> None:
    """Give a tower on timm's CLIP ViT the weights of ours of the same sizes, and the eps of its norms."""
    state = {f"visual.{name}": value for name, value in ours.state_dict().items()}
    # A product with flattened patches here, a convolution there.
    state["visual.conv1.weight"] = state["visual.conv1.weight"].view_as(theirs.patch_embed.proj.weight)
    converted = checkpoint_filter_fn(state, theirs)
    theirs.load_state_dict(
        {name.replace("blocks.", "transformer.resblocks.", 1): value for name, value in converted.items()}
    )
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            # Upstream's; timm's CLIP has OpenAI's.
            module.eps = ours.ln_pre.eps


def _features_difference(one: DualEncoder, other: DualEncoder) -> float | None:
    """Largest difference of the features of random clips on the same weights; None if the towers are no such pair."""
    ours, theirs = (one, other) if isinstance(one.visual, VideoTransformer) else (other, one)
    sizes = ("image_size", "patch_size", "vision_width", "vision_layers", "vision_heads", "embed_dim", "pool")
    if not isinstance(ours.visual, VideoTransformer) or not isinstance(theirs.visual, TimmTransformer):
        return None
    if any(getattr(ours.geometry, name) != getattr(theirs.geometry, name) for name in sizes):
        return None
    try:
        give_weights(ours.visual, theirs.visual)
    except RuntimeError:
        return None  # of the same sizes, but no CLIP
    size = ours.geometry.image_size
    video = torch.randn(2, 3, ours.num_frames, size, size).to(ours.logit_scale.device)
    with torch.no_grad():
        features = [model.eval().encode_video(video, normalize=False) for model in (ours, theirs)]
    return (features[0] - features[1]).abs().max().item()


def _nominal_flops(config: ModelConfig, options: argparse.Namespace) -> int:
    """Operations per clip of a plain implementation, which takes all tokens through the last block."""
    # On the meta device nothing is computed: only the shapes count.
    with torch.device("meta"):
        twin = create_model(config)
        size = twin.geometry.image_size
        video = torch.empty(2, 3, options.frames, size, size)
        tokens = torch.zeros(2, options.text_length, dtype=torch.long)

    def plain() -> None:
        tokens_in, chosen = twin.visual.embed(video)
        dense = twin.visual.transformer(tokens_in, None, twin.visual.rotations(options.frames, chosen))
        pooled = twin.visual.pooled(dense)
        (pooled.sum() + twin.textual(tokens).sum()).backward()

    return count_flops(plain) // 2


# --------------------------------------------------------------------------------------------------
# slowfast
# --------------------------------------------------------------------------------------------------


def slowfast_options(parser: argparse.ArgumentParser) -> None:
    _add_step_options(parser, model="CLIP_VITB16_Slowfast", frames=16, batch_size=2)
    parser.add_argument("--no_time", action="store_true", help="only count")


def slowfast(options: argparse.Namespace) -> dict[str, Any]:
    """Cost of a co-training step, of the step with all weights trained, and their ratios."""
    device = pick_device(options.device)
    dtype = pick_precision(options.precision, device)
    config = _model_config(options, slowfast=True)
    pairs = count_slowfast(config, options.batch_size, options.text_length, dtype)
    if not options.no_time:
        pairs |= _time_slowfast(options, config)
    result = _head(options, device, dtype)
    for name, (ours, twin) in pairs.items():
        result |= {name: ours, f"{name}_all_trained": twin, f"{name}_ratio": ours / twin}
    return result


@contextmanager
def all_trained(model: DualEncoder) -> Iterator[None]:
    """Within, the fast path trains the blocks' weights too: the same outputs, all gradients."""
    tower = model.visual

    def embed(video: Tensor, motion: Tensor | None = None, frozen: bool = False) -> tuple[Tensor, Tensor | None]:
        return VisionTower.embed(tower, video, motion)

    def call(module: torch.nn.Module, *inputs: Any) -> Tensor:
        return module(*inputs)

    with ExitStack() as stack:
        for module in (vision, timm_vision):
            stack.enter_context(mock.patch.object(module, "call_frozen", call))
        stack.enter_context(mock.patch.object(tower, "embed", embed))
        yield


def count_slowfast(
    config: ModelConfig, batch_size: int, text_length: int, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """TFLOP of a step, and GB that autograd saves for its backward pass: (co-training, all trained)."""
    counts = []
    # Fake tensors have shapes but no content: a step of the published size is counted on any machine in seconds.
    with FakeTensorMode():
        model = create_model(config)
        size = model.geometry.image_size
        video = torch.empty(batch_size, 3, config.num_frames, size, size)
        tokens = torch.zeros(batch_size, text_length, dtype=torch.long)

        def forward() -> dict[str, Tensor]:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                return model(video, tokens)

        def step() -> None:
            ContrastiveLoss()(**forward())["loss"].backward()

        for variant in (nullcontext(), all_trained(model)):
            with variant:
                counts.append((count_flops(step) / 1e12, saved_bytes(forward, model) / 1e9))
    (flops, saved), (all_flops, all_saved) = counts
    return {"tflop": (flops, all_flops), "saved_gb": (saved, all_saved)}


def _time_slowfast(options: argparse.Namespace, config: ModelConfig) -> dict[str, tuple[float, float]]:
    """Seconds of a step, by the clock and of the processor: (co-training, all trained)."""
    model, run_step, device, _ = _prepare(options, config)
    for block in model.visual.transformer.resblocks:
        # An adapter at its zero start is the same work, but no kernel should be able to exploit the zeros.
        torch.nn.init.normal_(block.adapter.up_proj.weight, std=0.02)

    def run_twin() -> None:
        with all_trained(model):
            run_step()

    runs = alternate(options.rounds + 1, {"ours": run_step, "twin": run_twin}, device)
    # The first round is the warm-up.
    ours, twin = (runs[name][1:] for name in ("ours", "twin"))
    pairs = {"step_seconds": (min(run.seconds for run in ours), min(run.seconds for run in twin))}
    if device.type == "cpu":
        pairs["step_cpu_seconds"] = (min(run.cpu for run in ours), min(run.cpu for run in twin))
    return pairs


# --------------------------------------------------------------------------------------------------
# accumulation
# --------------------------------------------------------------------------------------------------


def accumulation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--passes", type=int, nargs="+", default=[32, 64], help="micro-batches of a step (default: 32 64)")
    add("--forward_ms", type=float, default=20.0, help="time of a forward pass of one micro-batch (default: 20)")
    add("--workers", type=int, default=8, help="loader processes (default: 8)")
    add("--steps", type=int, default=3, help="timed steps, after one to warm up (default: 3)")


def accumulation(options: argparse.Namespace) -> dict[str, Any]:
    """Step of cached features with decoding as fast as computing, over the step with all clips in memory."""
    result: dict[str, Any] = {"workers": options.workers, "forward_ms": options.forward_ms}
    for passes in options.passes:
        clips = SleepingClips(0.0)
        sample = [clips[(0, index)] for index in range(passes)]
        ideal = min(_sleeping_steps(iter(sample * (options.steps + 1)), passes, options, whole=True))
        # Processes and pipes take time too, more on a busy machine: what is left for the sleep is measured.
        clips = SleepingClips(options.workers * ideal / passes)
        batches = iter(_sleeping_loader(clips, passes, options, passes))
        # The first step has the start of the workers in it.
        drained = [timed(partial(list, islice(batches, passes))).seconds for _ in range(3)][-1]
        clips = SleepingClips(options.workers * (2 * ideal - drained) / passes)
        result[f"{passes}_ideal_seconds"] = ideal
        # A loader that knows of no accumulation, as it was before, and one that does.
        for name, accumulation in (("whole_batch_first", 1), ("as_they_arrive", passes)):
            batches = iter(_sleeping_loader(clips, passes, options, accumulation))
            seconds = _sleeping_steps(batches, passes, options, whole=accumulation == 1)
            # Not the best one: a step after one that was held up finds all its clips ready.
            result[f"{passes}_{name}_over_ideal"] = statistics.median(seconds[1:]) / ideal
    return result


def _sleeping_loader(clips: SleepingClips, passes: int, options: argparse.Namespace, accumulation: int) -> ClipLoader:
    """Micro-batches of one clip for all steps, one to warm up included."""
    steps = (options.steps + 1) * passes // accumulation
    plan = BatchPlan(len(clips), accumulation, 0)
    return train_loader(
        clips, plan, start_step=0, total_steps=steps, workers=options.workers, accumulation=accumulation
    )


class SleepingClips:
    """A dataset of small clips, each of which takes ``seconds`` to read."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __len__(self) -> int:
        return 1 << 14

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        time.sleep(self._seconds)
        # CLIP's tokens, as collate trims texts at their end.
        tokens = torch.tensor([START_OF_TEXT, END_OF_TEXT])
        return {"video": torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "tokens": tokens, "index": key[1], "fault": ""}


class _Sleep(torch.autograd.Function):
    """The identity, whose backward pass takes ``seconds``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradients[0], None


def _sleeping_steps(
    batches: Iterator[dict[str, Any]], passes: int, options: argparse.Namespace, whole: bool
) -> list[float]:
    """Seconds of each step, with ``whole`` only when its batch is complete."""
    model, forward_seconds = torch.nn.Linear(4, 4), options.forward_ms / 1000

    def forward(_: dict[str, Any]) -> dict[str, Tensor]:
        time.sleep(forward_seconds)
        features = _Sleep.apply(model(torch.eye(4)), 2 * forward_seconds)
        return {"video_features": features, "text_features": features, "logit_scale": torch.ones(())}

    def step() -> None:
        arriving = ArrivingBatches(batches, passes)
        ready = list(islice(batches, passes)) if whole else arriving
        forward_backward(forward, model, ready, ContrastiveLoss())

    return [timed(step).seconds for _ in range(options.steps + 1)]


# --------------------------------------------------------------------------------------------------
# memory
# --------------------------------------------------------------------------------------------------


def memory_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="CLIP_VITB16", help="geometry, timm/NAME or open_clip/NAME")
    add("--frames", type=int, nargs="+", default=[4, 16], help="frames per clip (default: 4 16)")
    add("--batches", type=int, nargs="+", default=[8, 32, 128], help="clips at a time (8 32 128)")
    add("--global_batch_size", type=int, default=2048, help="clips per step (default: 2048)")
    add("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Predicted peak memory on a GPU by frames, checkpointing and clips at a time."""
    # The device only matters to an automatic precision, which is no choice here.
    dtype, rows = pick_precision(options.precision, torch.device("cpu")), []
    for frames in options.frames:
        for checkpointing in (False, True):
            config = ModelConfig(
                name=options.model, num_frames=frames, checkpoint_blocks="all" if checkpointing else "none"
            )
            memory = predict(config, dtype=dtype)
            fits: dict[int, dict[int, str]] = {}
            for size in DEVICES_GB:
                # Processes -> clips at a time x passes per step; '-' where not even one clip fits.
                largest = memory.fits(size * 1e9)
                batch = options.global_batch_size
                fits[size] = {
                    n: "{} x {}".format(*split_batch(batch, n, largest)) if largest >= 1 else "-" for n in PROCESSES
                }
            peaks = {batch: memory.peak(batch) / 1e9 for batch in options.batches}
            row = {"frames": frames, "checkpointing": checkpointing, "mb_per_clip": memory.per_clip / 1e6}
            rows.append(row | {"peak_gb": peaks, "fits": fits})
    result = {"model": options.model, "precision": options.precision, "global_batch_size": options.global_batch_size}
    return result | {"rows": rows}


def memory_text(result: dict[str, Any]) -> str:
    # Markdown: it is the table of docs/large_batches.md.
    rows = result["rows"]
    head = ["frames", "checkpointing", "MB a clip", *(f"{batch} clips" for batch in rows[0]["peak_gb"])]
    head += [f"{n} x {size} GB" for size in DEVICES_GB for n in PROCESSES]
    lines = []
    for row in rows:
        cells = [str(row["frames"]), "yes" if row["checkpointing"] else "no", f"{row['mb_per_clip']:.0f}"]
        cells += [f"{peak:.1f}" for peak in row["peak_gb"].values()]
        lines.append(cells + [row["fits"][size][n] for size in DEVICES_GB for n in PROCESSES])
    title = (
        f"{result['model']}, {result['precision']}: peak GB by clips at a time, and how a step of "
        f"{result['global_batch_size']} clips is split (clips at a time x passes, {SHARE:.0%} of the memory used)"
    )
    return "\n".join([title, *markdown_table(head, lines)])


# --------------------------------------------------------------------------------------------------
# Models beyond one GPU's memory
# --------------------------------------------------------------------------------------------------

# Over how many processes the weights are split, and processes of the run: nodes of eight GPUs.
SPLITS = ((1, 8), (1, 64), (8, 8), (8, 64), (64, 64))
LARGE = (
    *("CLIP_VITG14", "CLIP_VITG14_Slowfast"),
    *("timm/vit_so400m_patch14_siglip_378", "timm/vit_giantopt_patch16_siglip_384"),
)


def sharding_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="+", default=LARGE, help=f"default: {' '.join(LARGE)}")
    add("--frames", type=int, nargs="+", default=[4, 16], help="frames per clip (default: 4 16; of two paths 16 alone)")
    add("--gigabytes", type=float, default=80, help="of one GPU (default: 80)")
    add("--global_batch_size", type=int, default=2048, help="clips per step (default: 2048)")


def sharding(options: argparse.Namespace) -> dict[str, Any]:
    """Predicted memory of models whose weights are whole or split over processes (train.sharding), in bf16."""
    rows = []
    for name in options.models:
        for frames in [16] if name.endswith("_Slowfast") else options.frames:
            for checkpointing in ("none", "all"):
                config = ModelConfig(name=name, num_frames=frames, checkpoint_blocks=checkpointing)
                whole = predict(config, dtype=torch.bfloat16)
                # The weights of a large model are gigabytes; here only their shapes exist.
                with torch.device("meta"):
                    model = create_model(config)
                parameters = sum(each.numel() for each in model.parameters())
                row: dict[str, Any] = {
                    "model": name, "frames": frames, "checkpointing": checkpointing, "parameters": parameters,
                    "mb_per_clip": whole.per_clip / 1e6, "state_gb": {}, "fits": {},
                }  # fmt: skip
                for parts, processes in SPLITS:
                    # Weight, gradient and AdamW's two moments in float32.
                    state = split_state(model, 16 * parameters, torch.bfloat16, parts) if parts > 1 else whole.state
                    memory = replace(whole, state=state)
                    largest = memory.fits(options.gigabytes * 1e9)
                    size, passes = split_batch(options.global_batch_size, processes, max(largest, 1))
                    row["state_gb"][parts] = state / 1e9
                    row["fits"][f"{parts}/{processes}"] = f"{size} x {passes}" if largest >= 1 else "-"
                rows.append(row)
    return {"gigabytes": options.gigabytes, "global_batch_size": options.global_batch_size, "rows": rows}


def sharding_text(result: dict[str, Any]) -> str:
    # Markdown: it is the table of docs/large_models.md.
    names = {1: "none", 8: "over 8", 64: "over 64"}
    head = ["model", "M parameters", "frames", "blocks checkpointed", "MB a clip"]
    for parts in names:
        head += [f"{names[parts]}: state, GB"]
        head += [f"{names[parts]}: {processes} GPUs" for each, processes in SPLITS if each == parts]
    lines = []
    for row in result["rows"]:
        cells = [row["model"], f"{row['parameters'] / 1e6:,.0f}", str(row["frames"]), row["checkpointing"]]
        cells += [f"{row['mb_per_clip']:.0f}"]
        for parts in names:
            cells += [f"{row['state_gb'][parts]:.1f}"]
            cells += [row["fits"][f"{parts}/{processes}"] for each, processes in SPLITS if each == parts]
        lines.append(cells)
    title = (
        f"bf16, GPUs of {result['gigabytes']:g} GB: what does not depend on the batch, and how a step of "
        f"{result['global_batch_size']} clips is split (clips at a time x passes, {SHARE:.0%} of the memory used)"
    )
    return "\n".join([title, *markdown_table(head, lines)])
