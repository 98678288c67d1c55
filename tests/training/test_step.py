"""One optimisation step: no waiting for the device, non-finite numbers skipped, the schedule, accumulation."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from egohod.config import Config, load
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.loss.config import LossConfig
from egohod.model.config import geometry
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.runtime import Interrupted
from egohod.training.build import split_batch
from egohod.training.step import DeviceCopies, Stopwatch, TrainStep, learning_rates
from egohod.training.telemetry import MetricWindow
from tests.support import ROOT

SIDE = geometry("DEMO").image_size
HERE = Distributed(0, 1, torch.device("cpu"), None)


def config(**train: Any) -> Config:
    cfg = Config(loss=LossConfig(learn_temperature=True))
    cfg.model.name, cfg.model.num_frames = "DEMO", 2
    for name, value in {"lr": 1e-3, "precision": "fp32", **train}.items():
        assert hasattr(cfg.train, name)
        setattr(cfg.train, name, value)
    return cfg


def build(cfg: Config, total: int = 10) -> tuple[DualEncoder, TrainStep]:
    torch.manual_seed(0)
    model = create_model(cfg.model, cfg.loss)
    return model, TrainStep(model, cfg, HERE, total_steps=total, steps_per_epoch=10)


def batch(size: int = 4, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 49000, (size, 8), generator=generator)
    tokens[:, -1] = 49407
    return {
        "video": torch.randint(256, (size, 3, 2, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        "tokens": tokens,
    }


class Waits(TorchDispatchMode):
    """Notes every operation that would make the host wait for a GPU."""

    OPS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.OPS:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_never_waits_for_the_device(chunks: int, clip_norm: float | None) -> None:
    _, step = build(config(clip_norm=clip_norm))
    window = MetricWindow()
    window.add(step(1, [batch()] * chunks))
    with Waits() as waits:
        window.add(step(2, [batch()] * chunks))
    # On a CPU the optimizer hears of a non-finite gradient on the spot; on a GPU the fused kernel reads the flag
    # there. Everything else must be free of waits.
    assert [name for name in waits.seen if name] == []
    with Waits() as waits:
        means = window.means()
    assert means["skipped"] == 0


class Queue:
    """A CUDA stream that notes in ``log`` what is queued: (stream, operation, value)."""

    def __init__(self, name: str, log: list[tuple[str, str, int]]) -> None:
        self.name, self.log = name, log

    def put(self, operation: str, value: int) -> None:
        self.log.append((self.name, operation, value))

    def record_event(self) -> int:
        self.put("record", len(self.log))
        return len(self.log) - 1

    def wait_event(self, event: int) -> None:
        self.put("wait", event)


def test_the_next_batch_is_copied_while_the_last_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the order in which copies, reads, events and waits are queued on its two streams."""
    log: list[tuple[str, str, int]] = []
    computing, copying = Queue("computing", log), Queue("copying", log)
    current, alive = [computing], weakref.WeakSet["Copy"]()

    class Copy:
        """A batch on the device."""

    class Clips:
        """A batch in page-locked memory."""

        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: torch.device, non_blocking: bool) -> Copy:
            assert (device.type, non_blocking) == ("cuda", True)
            current[-1].put("copy", self.number)
            copy = Copy()
            alive.add(copy)
            return copy

    @contextmanager
    def stream(queue: Queue) -> Iterator[None]:
        current.append(queue)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    to_device = DeviceCopies(torch.device("cuda", 0))
    for number in range(5):
        to_device(Clips(number))  # type: ignore[arg-type]
        computing.put("read", number)
        assert len(alive) == min(number + 1, 2), "memory for two batches, however far the host is ahead"

    def awaited(name: str, before: int) -> int:
        """The last entry that ``name`` has waited for when it gets to entry ``before``; a queue runs in its order."""
        return max((value for stream, what, value in log[:before] if (stream, what) == (name, "wait")), default=-1)

    for number in range(5):
        copied, read = log.index(("copying", "copy", number)), log.index(("computing", "read", number))
        # It is complete when it is read.
        event = awaited("computing", read)
        assert log[event][0] == "copying"
        assert event > copied
        if number >= 2:
            # What was in this memory has been read; of the batch in between nothing is waited for, which is the point.
            event = awaited("copying", copied)
            assert log[event][0] == "computing"
            first, second = (log.index(("computing", "read", number - behind)) for behind in (2, 1))
            assert first < event < second
    # On the CPU there is nothing to copy.
    clips = torch.zeros(2)
    assert DeviceCopies(torch.device("cpu"))(clips) is clips


def test_nor_does_a_step_without_the_slow_path() -> None:
    cfg = config()
    cfg.model.name, cfg.model.fast.slow_frames, cfg.model.fast.slow_every = "DEMO_Slowfast", 1, 2
    _, step = build(cfg)
    step(1, [batch()])
    with Waits() as waits:
        step(2, [batch()])
    assert waits.seen == []


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing(poison: str) -> None:
    model, step = build(config())
    step(1, [batch()])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = {k: v.clone() for k, v in step.state_dict()[1]["optimizer"]["state"][3].items()}
    parameter = model.visual.conv1.weight
    if poison == "loss":
        model.visual.image_projection.data[0, 0] = math.nan
        hook = None
    else:
        hook = parameter.register_hook(lambda grad: grad * math.inf)
    metrics = step(2, [batch()])
    assert metrics["skipped"] == 1
    if hook:
        hook.remove()
    model.visual.image_projection.data[0, 0] = before["visual.image_projection"][0, 0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for key, value in step.state_dict()[1]["optimizer"]["state"][3].items():
        assert torch.equal(value, optimizer[key]), key
    assert step(3, [batch()])["skipped"] == 0
    assert not torch.equal(parameter, before["visual.conv1.weight"])


def test_a_run_of_skipped_steps_ends_with_advice() -> None:
    from egohod.training.train import FEWEST_SKIPPED, require_finite

    for skipped, steps, ends in ((FEWEST_SKIPPED, FEWEST_SKIPPED, True), (3, 3, False), (20, 21, False)):
        window = MetricWindow()
        for step in range(steps):
            window.add({"loss": torch.tensor(1.0), "skipped": torch.tensor(float(step < skipped))})
        if ends:
            with pytest.raises(UserError, match="non-finite"):
                require_finite(window.means())
        else:
            require_finite(window.means())


def test_skipped_steps_are_counted_over_windows_and_checkpoints() -> None:
    skipped, finite = ({"loss": torch.tensor(1.0), "skipped": torch.tensor(value)} for value in (1.0, 0.0))
    window, counts = MetricWindow(), []
    for steps in ([skipped] * 3, [finite] + [skipped] * 3, [skipped] * 5, [skipped] * 2):
        for step in steps:
            window.add(step)
        # As through a checkpoint; training.pt is read with weights_only.
        state, window = window.state_dict(), MetricWindow()
        window.load_state_dict(state, torch.device("cpu"))
        counts.append(window.means()["consecutive_skips"])
    assert counts == [3, 3, 8, 10]
    window = MetricWindow()
    window.load_state_dict({"sums": {"skipped": torch.tensor(4.0)}, "count": 4}, torch.device("cpu"))
    window.add(skipped)
    assert window.means()["consecutive_skips"] == 1  # an earlier release's checkpoint


def test_the_window_leaves_skipped_steps_out_of_its_means() -> None:
    window = MetricWindow()

    def add(loss: float, skipped: float) -> None:
        # Accuracy and logit_scale of a skipped step are finite, and no less meaningless.
        scalars = {"loss": loss, "accuracy": 0.5, "logit_scale": 14.0, "skipped": skipped}
        window.add({name: torch.tensor(value) for name, value in scalars.items()})

    for loss, skipped in ((2.0, 0.0), (math.nan, 1.0), (4.0, 0.0), *[(math.inf, 1.0)] * 7):
        add(loss, skipped)
    means = {"loss": 3.0, "accuracy": 0.5, "logit_scale": 14.0}
    assert window.means() == means | {"skipped": 8.0, "steps": 10.0, "consecutive_skips": 7.0}
    add(math.nan, 1.0)
    nothing = window.means()
    assert all(math.isnan(nothing[name]) for name in means)
    assert (nothing["skipped"], nothing["steps"]) == (1.0, 1.0)


def test_accumulated_chunks_give_the_step_of_the_whole_batch() -> None:
    whole, chunks = batch(8), [batch(8), batch(8)]
    for key in whole:
        chunks[0][key], chunks[1][key] = whole[key][:4], whole[key][4:]
    one, step_one = build(config())
    two, step_two = build(config())
    first, second = step_one(1, [whole]), step_two(1, chunks)
    torch.testing.assert_close(first["loss"], second["loss"], atol=1e-6, rtol=0)
    torch.testing.assert_close(first["grad_norm"], second["grad_norm"], atol=1e-5, rtol=1e-5)
    for (name, value), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert value.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(value.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["DEMO", "DEMO_Slowfast"])
def test_the_box_loss_in_chunks_is_that_of_the_whole_batch(name: str) -> None:
    whole, boxes = batch(8), torch.rand(8, 4, 3, 4)
    boxes[0], boxes[3, 1] = math.nan, math.nan
    whole |= {"video": whole["video"].repeat_interleave(2, dim=2), "boxes": boxes}
    results = []
    for chunks in (1, 4):
        cfg = config()
        cfg.model.name, cfg.model.num_frames, cfg.loss.boxes = name, 4, 2.0
        model, step = build(cfg)
        parts = [{key: value.chunk(chunks)[i] for key, value in whole.items()} for i in range(chunks)]
        metrics = step(1, parts)
        results.append((metrics["loss"], metrics["box_error"], model.visual.box_head.box.weight.detach()))  # type: ignore[union-attr]
    assert 0 < results[0][1] < 1
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def with_negatives(size: int = 8, count: int = 1) -> dict[str, Any]:
    """A batch with ``count`` negatives of each clip, of which some are none."""
    negatives = torch.stack([batch(size, seed=1 + i)["tokens"] for i in range(count)], dim=1)
    return batch(size) | {"negatives": negatives, "has_negative": torch.arange(size * count).view(size, -1) % 3 > 0}


def chunked(whole: dict[str, Any], chunks: int) -> list[dict[str, Any]]:
    """Micro-batches of a batch, whose labels are a dictionary."""
    parts = [{name: value.chunk(chunks)[i] for name, value in whole.items() if name != "labels"} for i in range(chunks)]
    for i, part in enumerate(parts):
        if "labels" in whole:
            part["labels"] = {name: value.chunk(chunks)[i] for name, value in whole["labels"].items()}
    return parts


@pytest.mark.parametrize(("name", "opposites"), [("egonce", 0.0), ("egonce_pp", 0.0), ("egonce_pp", 1.0)])
def test_tags_and_replaced_captions_in_chunks_are_those_of_the_whole_batch(name: str, opposites: float) -> None:
    results = []
    tags = {"verb_tags": torch.arange(8)[:, None] // 3 + 1, "noun_tags": torch.arange(8)[:, None] % 2 + 1}
    for chunks in (1, 4):
        cfg = config()
        cfg.loss.name, cfg.loss.opposites, cfg.loss.replacements = name, opposites, 3
        model, step = build(cfg)
        whole = with_negatives(count=cfg.loss.negatives) if cfg.loss.negatives else batch(8)
        with Waits() as waits:
            metrics = step(1, chunked(whole | {"labels": tags}, chunks))
        assert not waits.seen
        results.append([*metrics.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert ("replaced_accuracy" in metrics) == (name == "egonce_pp")
        assert ("opposite_accuracy" in metrics) == (opposites > 0)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_opposites_in_chunks_are_those_of_the_whole_batch(loss: str) -> None:
    results = []
    for chunks in (1, 4):
        cfg = config()
        cfg.loss.name, cfg.loss.opposites, cfg.loss.separation = loss, 1.0, 2.0
        model, step = build(cfg)
        parts = [{key: value.chunk(chunks)[i] for key, value in with_negatives().items()} for i in range(chunks)]
        with Waits() as waits:
            metrics = step(1, parts)
        # On a CPU one_hot of the sigmoid loss looks at its labels.
        assert loss == "sigmoid" or not waits.seen
        results.append([*metrics.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert {"opposite_accuracy", "opposite_cosine"} < metrics.keys()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_weight_of_opposites_follows_from_the_step_alone() -> None:
    cfg = config()
    cfg.loss.opposites, cfg.loss.opposites_schedule, cfg.loss.opposites_hold = 1.0, "linear", 0.0
    # The first and the last of ten steps, without a step between: nothing is counted.
    losses = [build(cfg)[1](number, [with_negatives()])["loss"] for number in (1, 10)]
    cfg.loss.opposites_schedule = "constant"
    constant = [build(cfg)[1](number, [with_negatives()])["loss"] for number in (1, 10)]
    assert torch.equal(losses[0], constant[0])
    assert losses[1] < constant[1]
    cfg.loss.opposites = 0.0
    plain = build(cfg)[1](10, [batch(8)])["loss"]
    torch.testing.assert_close(losses[1], plain)


def test_gradients_are_clipped_to_clip_norm() -> None:
    model, step = build(config(clip_norm=0.01))
    norm = step(1, [batch()])["grad_norm"]
    assert norm > 0.01
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.01, rel=1e-3)


def test_no_decay_on_biases_norms_and_temperature() -> None:
    model, step = build(config())
    names = {id(p): name for name, p in model.named_parameters()}
    for group in step._optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0) == (parameter.ndim <= 1), names[id(parameter)]


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_positional_embeddings_are_decayed_as_in_the_recipe(layer_decay: float) -> None:
    for decay_positions in (True, False):
        model, step = build(config(decay_positions=decay_positions, layer_decay=layer_decay, weight_decay=0.1))
        names = {id(p): name for name, p in model.named_parameters()}
        without = {
            names[id(parameter)]
            for group in step._optimizer.param_groups
            for parameter in group["params"]
            if group["weight_decay"] == 0 and parameter.ndim > 1
        }
        positions = {"visual.positional_embedding", "textual.positional_embedding"}
        assert without == (set() if decay_positions else positions)


def test_learning_rates_scale_with_the_batch_where_the_recipe_is_avions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["EK100_ANNOTATIONS", "EK100_VIDEOS", "EGTEA_ANNOTATIONS", "EGTEA_VIDEOS", "START_WEIGHTS"]:
        monkeypatch.setenv(name, "/somewhere")
    folder = ROOT / "configs" / "finetune"
    expected = {
        ("ek100_cls", 512): (0.012, 4e-6, 4e-5),
        ("ek100_cls", 64): (1.5e-3, 5e-7, 5e-6),
        ("egtea", 128): (3e-3, 1e-6, 1e-5),
        ("ek100_mir", 512): (2e-5, 1e-6, 1e-5),
        ("ek100_mir", 256): (2e-5, 1e-6, 1e-5),
    }
    for (name, batch_size), rates in expected.items():
        cfg = load(folder / f"{name}.yml", [f"train.global_batch_size={batch_size}"])
        assert learning_rates(cfg.train) == pytest.approx(rates), name
        assert (cfg.train.decay_positions, cfg.data.flip) == (False, 0.0)
    # What reaches the optimizer: first step, peak, last step of 3 + 7.
    _, step = build(
        config(
            **{"lr": 3e-3, "lr_start": 1e-6, "lr_end": 1e-5, "lr_reference_batch": 128, "global_batch_size": 512},
            **{"optimizer": "sgd", "schedule": "cosine", "warmup": "3 steps"},
        )
    )
    rates = []
    for i in range(10):
        step._schedule.step_update(i)
        rates.append(step.lr)
    assert [rates[0], rates[3]] == pytest.approx([4e-6, 0.012])
    assert rates[9] == pytest.approx(4e-5 + 0.5 * (0.012 - 4e-5) * (1 + math.cos(math.pi * 6 / 7)))


def test_warmup_peaks_one_step_after_avions() -> None:
    """Step by step, 4 of 10 steps being warm-up; AVION's list computed by hand (docs/finetuning.md)."""
    avion = [0.1, 0.4, 0.7, 1.0, 1.0, 0.933013, 0.75, 0.5, 0.25, 0.066987]
    _, step = build(config(lr=1.0, lr_start=0.1, lr_end=0.0, warmup="4 steps", schedule="cosine"))
    ours = []
    for i in range(10):
        step._schedule.step_update(i)
        ours.append(step.lr)
    assert ours[:4] == pytest.approx([0.1, 0.325, 0.55, 0.775])
    assert ours[4:] == pytest.approx(avion[4:], abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_of_one_step_has_the_peak_rate_and_no_warning(schedule: str, caplog: pytest.LogCaptureFixture) -> None:
    _, step = build(config(schedule=schedule, lr=1e-3, lr_end=1e-5), total=1)
    step(1, [batch()])
    assert step.lr == 1e-3
    assert "Cosine annealing" not in caplog.text


def test_learning_rates() -> None:
    rates = {}
    for schedule in ("constant", "cosine"):
        _, step = build(config(lr=1e-3, lr_start=1e-5, lr_end=1e-4, warmup="2 steps", schedule=schedule), total=10)
        rates[schedule] = []
        for i in range(1, 11):
            step._schedule.step_update(i - 1)
            rates[schedule].append(step.lr)
    assert rates["constant"] == pytest.approx([1e-5, (1e-5 + 1e-3) / 2] + [1e-3] * 8)
    cosine = [1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates["cosine"][2:] == pytest.approx(cosine)


def test_a_learned_temperature_is_clamped() -> None:
    cfg = config()
    cfg.loss.max_logit_scale = 15.0
    model, step = build(cfg)
    model.logit_scale.data.fill_(10.0)
    step(1, [batch()])
    assert model.logit_scale.exp().item() == pytest.approx(15.0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_stays_close_to_float32(precision: str) -> None:
    """The GPU types, emulated on the CPU: same code path, coarser numbers; fp16 goes through the loss scaler."""
    losses = []
    for name in ("fp32", precision):
        _, step = build(config(precision=name))
        metrics = step(1, [batch()])
        assert metrics["skipped"] == 0
        losses.append(metrics["loss"])
    torch.testing.assert_close(losses[0], losses[1], atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("batch_size", "world", "largest", "expected"),
    [(64, 1, 64, (64, 1)), (64, 2, 64, (32, 1)), (64, 2, 12, (8, 4)), (6, 1, 4, (3, 2)), (7, 1, 4, (1, 7))],
)
def test_batches_are_split_evenly(batch_size: int, world: int, largest: int, expected: tuple[int, int]) -> None:
    assert split_batch(batch_size, world, largest) == expected


def test_clips_to_be_mixed_are_held_in_pairs_where_that_is_possible() -> None:
    assert split_batch(60, 1, 15) == (15, 4)
    assert split_batch(60, 1, 15, even=True) == (12, 5)
    assert split_batch(15, 1, 15, even=True) == (15, 1)


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="the nearest sizes are 63 and 66"):
        split_batch(64, 3, 64)


class DueAfter:
    """Wants to give a step up at the given question, and notes that it could."""

    def __init__(self, questions: int) -> None:
        self._left = questions

    def is_due(self) -> bool:
        self._left -= 1
        return self._left < 0

    def agree(self) -> None:
        if self._left < 0:
            raise Interrupted("SIGUSR1 received")


@pytest.mark.parametrize("questions", [0, 2, 4])
def test_a_step_that_is_given_up_leaves_no_trace(questions: int) -> None:
    """In the first pass, and in the second one after gradients of some micro-batches."""
    chunks = [batch(2, seed) for seed in range(4)]
    states = []
    for interrupted in (False, True):
        _, step = build(config(ema=0.9))
        step(1, chunks)
        if interrupted:
            with pytest.raises(Interrupted, match="SIGUSR1"):
                step(2, chunks, DueAfter(questions))
        metrics = step(2, chunks)
        states.append((step.state_dict(), metrics))
    (weights, training), metrics = states[0]
    (others, other_training), other_metrics = states[1]
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name
    assert str(training["optimizer"]) == str(other_training["optimizer"])
    assert all(torch.equal(value, other_metrics[name]) for name, value in metrics.items())


def test_a_step_of_one_micro_batch_is_never_given_up() -> None:
    _, step = build(config())
    assert step(1, [batch()], DueAfter(0))["skipped"] == 0


def test_the_parts_of_a_step_are_timed() -> None:
    _, step = build(config())
    step(1, [batch()])
    assert step.stopwatch.seconds().keys() == {"data", "features", "loss", "backward", "optimizer"}
    begin = time.perf_counter()
    step(2, [batch(), batch()])
    passed, parts = time.perf_counter() - begin, step.stopwatch.seconds()
    assert parts.keys() == {"data", "features", "loss", "forward", "backward", "optimizer"}
    assert 0.5 * passed < sum(parts.values()) <= passed
    assert step.stopwatch.seconds() == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_parts_of_many_steps_are_added_up_without_waiting(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are imitated: each is recorded 2 ms after the one before, and nobody may wait before the sums are read."""
    waits, now = [], 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            nonlocal now
            now += 2
            self.time = now

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            waits.append(self.time)

        def elapsed_time(self, other: Event) -> float:
            return other.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device(device))
    for _ in range(5000):
        for part in ("data", "features", ""):
            watch.enter(part)
    assert len(watch._marks) < 10_000
    assert not waits
    sums = watch.seconds()
    assert sums.keys() == {"data", "features"}
    if device == "cuda":
        assert waits == [30_000]
        assert sums == pytest.approx({"data": 10.0, "features": 10.0})
    assert watch.seconds() == {}
