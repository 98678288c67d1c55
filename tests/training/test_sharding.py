"""Weights split over processes train as whole ones do: real processes over gloo, small models."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from benches.training import LARGE
from torch import Tensor, nn

from egohod.config import Config
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.loss.config import LossConfig
from egohod.model.config import Geometry, ModelConfig
from egohod.model.cost import predict, split_state
from egohod.model.dual_encoder import DualEncoder, EgoVideo, TextTower, create_model
from egohod.model.vision import SlowFastTransformer, VideoTransformer
from egohod.runtime import Interrupted
from egohod.training.build import freeze, sharing
from egohod.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore, read
from egohod.training.step import TrainStep
from egohod.training.train import StopDeadline
from tests.model.field_files import OPEN_CLIP_FAMILIES
from tests.ranks import Ranks, in_processes
from tests.support import ROOT, Command, losses, newest

STEPS, FRAMES, CLIPS = 20, 4, 8
# Parts of four processes differ in size: of 5 positions, 102 words, 18 channels; of an adapter's one gamma three have
# nothing.
TINY = Geometry("TINY", 32, 16, 36, 2, 2, 36, 2, 2, 18, vocab_size=102)


def config(**knobs: Any) -> Config:
    cfg = Config(loss=LossConfig(learn_temperature=True), model=ModelConfig(num_frames=FRAMES))
    cfg.model.fast.slow_frames, cfg.model.temporal_init = 2, "sinusoidal"
    cfg.train.global_batch_size, cfg.train.precision, cfg.train.lr, cfg.train.eps = CLIPS, "fp32", 1e-3, 1e-6
    for name, value in knobs.items():
        section, _, key = name.rpartition("__")
        parts = {"model": cfg.model, "fast": cfg.model.fast, "loss": cfg.loss, "train": cfg.train}
        part: Any = parts[section]
        assert hasattr(part, key), name
        setattr(part, key, value)
    return cfg


def build(cfg: Config, slowfast: bool = False) -> DualEncoder:
    """A model for which 20 steps take a second; the real vocabulary alone has six million weights."""
    torch.manual_seed(0)
    textual = TextTower(TINY, cfg.model)
    options: dict[str, Any] = {"geometry": TINY, "num_frames": FRAMES, "learn_temperature": True}
    model: DualEncoder
    if cfg.model.name != ModelConfig.name:
        model = create_model(cfg.model, cfg.loss, {"verb": 5} if cfg.loss.name == "classes" else None)
    elif slowfast:
        visual = SlowFastTransformer(TINY, cfg.model)
        model = EgoVideo(visual, textual, slow=cfg.model.fast.slow_frames, **options)
    else:
        model = DualEncoder(VideoTransformer(TINY, cfg.model), textual, **options)
    freeze(model, cfg)
    for name, parameter in model.named_parameters():
        # What does nothing yet would hide what goes wrong with it.
        if name.endswith(("adapter.up_proj.weight", "lora.up", "motion_stem.project.weight")):
            nn.init.normal_(parameter, std=0.1)
    return model


def micro_batches(step: int, here: Distributed, count: int, has_labels: bool = False) -> list[dict[str, Any]]:
    """This process's part of the clips of ``step``, the same clips for every number of processes."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, TINY.vocab_size - 1, (CLIPS, 8), generator=generator)
    tokens[:, -1] = TINY.vocab_size - 1
    shape = (CLIPS, 3, FRAMES, TINY.image_size, TINY.image_size)
    video = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    mine = (each.chunk(here.world_size)[here.rank].chunk(count) for each in (video, tokens))
    batches: list[dict[str, Any]] = [{"video": clips, "tokens": texts} for clips, texts in zip(*mine, strict=True)]
    for each in batches if has_labels else ():
        each["labels"] = {"verb_label": each["tokens"][:, 0] % 5}
    return batches


# Both paths, micro-batches of a process, and knobs.
Case = tuple[bool, int, dict[str, Any]]
Cases = dict[str, Case]
CASES: Cases = {
    "plain": (False, 1, {"train__clip_norm": 0.5, "train__layer_decay": 0.8}),
    "accumulated": (False, 2, {"model__checkpoint_blocks": "1", "train__ema": 0.9}),
    "slow-fast": (True, 2, {"model__checkpoint_blocks": "1", "fast__slow_every": 2}),
    "after its block": (True, 1, {"model__checkpoint_blocks": "all", "fast__position": "after", "fast__pool": "both"}),
    "adapters": (True, 2, {"train__trainable": "adapters", "train__optimizer": "sgd", "train__lr": 0.1}),
    "last block": (False, 1, {"train__trainable": "last_blocks", "train__last_blocks": 1}),
}
INTERRUPTED = (True, 2, CASES["slow-fast"][2] | {"train__ema": 0.5})
# Backbones of timm, text towers of open_clip, low-rank training, the motion stem.
_EVA = {"model__image_size": 32, "model__backbone": {"depth": 2, "embed_dim": 48, "num_heads": 4}}
OTHERS: Cases = {
    "SigLIP 2": (
        False, 2, {"model__name": "open_clip/SigLIP", "model__checkpoint_blocks": "1"}
        # A loss near 1, of which a part in ten millions is what may differ.
        | {"loss__name": "sigmoid", "loss__bias": -2.0, "loss__temperature": 0.5},
    ),
    "EVA on two paths": (
        True,
        2,
        {"model__name": "timm/eva02_base_patch16_clip_224_Slowfast", "model__text": "CLIP", "model__rope_time": True}
        | {"model__motion_stem": 4, "fast__stem_paths": "both", "fast__slow_every": 2, "train__ema": 0.9, **_EVA},
    ),
    "PE, low rank": (False, 1, {"model__name": "open_clip/PE", "train__trainable": "lora", "train__clip_norm": 0.5}),
    "own tower on two paths, low rank": (
        True, 2, {"model__name": "DEMO_SMALL_Slowfast", "model__text": "CLIP", "train__trainable": "lora"},
    ),
    # Its text tower computes nothing.
    "heads": (False, 2, {"model__name": "DEMO_SMALL", "loss__name": "classes", "train__layer_decay": 0.8}),
}  # fmt: skip


def run(step: TrainStep, here: Distributed, count: int, steps: int) -> Tensor:
    """Mean loss and gradient norm of each step: float32 [steps, 2]."""
    has_labels = step._inner.heads is not None
    lines = [step(number, micro_batches(number, here, count, has_labels)) for number in range(1, steps + 1)]
    means = torch.stack([torch.stack([each["loss"], each["grad_norm"]]) for each in lines])
    torch_dist.all_reduce(means)
    return means / here.world_size


def join(rank: int, world_size: int, folder: Path) -> Distributed:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    store = torch_dist.FileStore(str(folder / "store"), world_size)
    control = torch_dist.new_group(backend="gloo")
    return Distributed(rank, world_size, torch.device("cpu"), "gloo", control=control, store=store)


def leave(here: Distributed, folder: Path, results: dict[str, Any]) -> None:
    torch.save(results, folder / f"results-{here.rank}.pt")
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def all_cases(
    rank: int, world_size: int, folder: Path, shardings: dict[str, int | None], cases: Cases = CASES, steps: int = STEPS
) -> None:
    """All cases without sharding and with each of ``shardings``."""
    here, results = join(rank, world_size, folder), dict[str, Any]()
    for case, (slowfast, count, knobs) in cases.items():
        for sharding, processes in {"none": None, **shardings}.items():
            cfg = config(**knobs, train__sharding=sharding, train__shard_processes=processes)
            model = build(cfg, slowfast)
            step = TrainStep(model, cfg, here, total_steps=STEPS, steps_per_epoch=STEPS)
            lines = run(step, here, count, steps)
            held = sum(parameter.numel() for parameter in model.parameters())
            with step.gathered() as whole:
                evaluated = {name: value.clone() for name, value in whole.state_dict().items()}
            share = held / sum(evaluated[name].numel() for name, _ in model.named_parameters())
            results[f"{case}, {sharding}"] = {"lines": lines, "evaluated": evaluated, "share": share}
    leave(here, folder, results)


def check_cases(
    folder: Path, world_size: int, shardings: dict[str, int | None], cases: Cases = CASES, steps: int = STEPS
) -> None:
    in_processes(world_size, all_cases, folder, shardings, cases, steps)
    results = torch.load(folder / "results-0.pt", weights_only=True)
    for case in cases:
        whole = results[f"{case}, none"]
        assert whole["share"] == 1
        for sharding, processes in shardings.items():
            split, name = results[f"{case}, {sharding}"], f"{case}, {sharding}"
            # Scalars are not split, and a part of a short tensor is a whole row.
            assert split["share"] < 1.1 / (processes or world_size), name
            (loss, norm), (other_loss, other_norm) = split["lines"].T, whole["lines"].T
            torch.testing.assert_close(loss, other_loss, atol=1e-6, rtol=0, msg=f"{name}: {loss - other_loss}")
            torch.testing.assert_close(norm, other_norm, atol=0, rtol=1e-4, msg=name)
            for weight, value in whole["evaluated"].items():
                torch.testing.assert_close(
                    split["evaluated"][weight], value, atol=1e-4, rtol=0, msg=f"{name}: {weight}"
                )


@pytest.mark.ci
def test_two_processes_that_share_weights_equal_two_that_have_all(tmp_path: Path) -> None:
    check_cases(tmp_path, 2, {"fsdp": None})


@pytest.mark.ci
def test_four_processes_that_share_weights_equal_four_that_have_all(tmp_path: Path) -> None:
    check_cases(tmp_path, 4, {"fsdp": None, "hsdp": 2})


@pytest.mark.ci
@pytest.mark.parametrize("case", OTHERS)
def test_other_towers_split_over_two_processes_equal_whole_ones_and_resume(tmp_path: Path, case: str) -> None:
    slowfast, count, knobs = OTHERS[case]
    knobs = dict(knobs)
    for text in ("CLIP", "SigLIP", "PE"):
        # A vocabulary of the size that the clips of these tests have, instead of seconds a step.
        cfg = json.loads(json.dumps(OPEN_CLIP_FAMILIES[text][0]))
        cfg["text_cfg"] |= {"vocab_size": TINY.vocab_size, "context_length": 8}
        (tmp_path / text).mkdir()
        (tmp_path / text / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
        for key in ("model__name", "model__text"):
            if knobs.get(key, "").removeprefix("open_clip/") == text:
                knobs[key] = knobs[key].replace(text, str(tmp_path / text))
    for name in ("equal", "resumed"):
        (tmp_path / name).mkdir()
    check_cases(tmp_path / "equal", 2, {"fsdp": None}, {case: (slowfast, count, knobs)}, 6)
    check_interrupted(tmp_path / "resumed", 2, {"fsdp": None}, (slowfast, count, {"train__ema": 0.5} | knobs))


def all_tensors(step: TrainStep) -> dict[str, Tensor]:
    """Weights, their average and the optimizer's state, whole; collective."""
    named = {f"weights/{name}": (name, value) for name, value in step._inner.named_parameters()}
    named |= {f"average/{name}": (name, value) for name, value in step.ema_or_model.named_parameters()}
    for number, state in step._optimizer.state_dict()["state"].items():
        named |= {f"{key}/{step._names[number]}": (step._names[number], value) for key, value in state.items()}
    whole = step.shards.whole if step.shards else lambda _, value: value
    return {key: (whole(name, value) if value.ndim else value).detach().clone() for key, (name, value) in named.items()}


def interrupted(rank: int, world_size: int, folder: Path, shardings: dict[str, int | None], case: Case) -> None:
    """A run of six steps, and runs that go on from its checkpoint of the third: on as many processes, and on one."""
    here, results = join(rank, world_size, folder), dict[str, Any]()
    slowfast, count, knobs = case
    alone = Distributed(0, 1, here.device, None)

    def start(where: Distributed, sharding: str, checkpoint: Checkpoint | None = None) -> TrainStep:
        processes = shardings.get(sharding)
        cfg = config(**knobs, train__sharding=sharding, train__shard_processes=processes)
        step = TrainStep(build(cfg, slowfast), cfg, where, total_steps=STEPS, steps_per_epoch=STEPS)
        if checkpoint is not None:
            step.load_state_dict(checkpoint.weights, checkpoint.training, checkpoint.parts)
        return step

    def train(step: TrainStep, where: Distributed, first: int, last: int) -> Tensor:
        # As many passes of as many clips, whatever the number of processes.
        passes = count * world_size // where.world_size
        has_labels = step._inner.heads is not None
        lines = [step(number, micro_batches(number, where, passes, has_labels)) for number in range(first, last + 1)]
        return torch.stack([each["grad_norm"] for each in lines])

    for sharding in shardings:
        store = CheckpointStore(folder / sharding)
        step = start(here, sharding)
        norms = [train(step, here, 1, 3)]
        weights, training = step.state_dict()
        saved = all_tensors(step)
        if rank == 0:
            store.folder.parent.mkdir()
            store.prepare()
        torch_dist.barrier()
        assert step.shards is not None
        write = partial(step.shards.write, store.parts(3), training.pop("parts"))
        if rank == 0:
            store.save(3, weights, training, metrics={}, identity={}, write_parts=write)
        else:
            write()
        torch_dist.barrier()
        norms.append(train(step, here, 4, 6))
        results[sharding] = {"norms": norms[1], "weights": step.state_dict()[0]}
        checkpoint = read(store.path(3))
        step = start(here, sharding, checkpoint)
        resumed = {"norms": train(step, here, 4, 6), "weights": step.state_dict()[0]}
        results[f"{sharding}, resumed"] = resumed
        if rank == 0:
            step = start(alone, "none", checkpoint)
            results[f"{sharding}, state"] = saved, all_tensors(step)
            results[f"{sharding}, alone"] = {"norms": train(step, alone, 4, 6)}
        if sharding == "hsdp":
            results["hsdp, as fsdp"] = {"norms": train(start(here, "fsdp", checkpoint), here, 4, 6)}
    leave(here, folder, results)


def check_interrupted(
    folder: Path, world_size: int, shardings: dict[str, int | None], case: Case = INTERRUPTED
) -> None:
    in_processes(world_size, interrupted, folder, shardings, case)
    results = torch.load(folder / "results-0.pt", weights_only=True)
    for sharding in shardings:
        straight, resumed = results[sharding], results[f"{sharding}, resumed"]
        assert torch.equal(straight["norms"], resumed["norms"]), sharding
        assert straight["weights"].keys() == resumed["weights"].keys()
        for name, value in straight["weights"].items():
            assert torch.equal(value, resumed["weights"][name]), name
        # On one process the state is the same, of which the sums of the next step are rounded in another order.
        saved, loaded = results[f"{sharding}, state"]
        assert saved.keys() == loaded.keys()
        for name, value in saved.items():
            assert torch.equal(value, loaded[name]), name
        for other in ("alone", "as fsdp") if sharding == "hsdp" else ("alone",):
            norms = results[f"{sharding}, {other}"]["norms"]
            torch.testing.assert_close(norms, straight["norms"], atol=0, rtol=1e-4, msg=f"{sharding}, {other}: {norms}")
        path = CheckpointStore(folder / sharding).path(3)
        names = sorted(file.name for file in (path / "parts").iterdir())
        # Without its scalars, the rest of the optimizer's state is in the parts: twice the weights, and the weights
        # beside their average, each once, whichever of the processes that have a part has written it.
        parts = sum((path / "parts" / name).stat().st_size for name in names)
        trained = sum(4 * value.numel() for name, value in saved.items() if name.startswith("exp_avg/"))
        weights = sum(4 * value.numel() for name, value in saved.items() if name.startswith("weights/"))
        assert parts == pytest.approx(2 * trained + weights, rel=0.5)
        # Half written: a part is cut off, or is not there.
        last = path / "parts" / names[-1]
        last.write_bytes(last.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=f"{names[-1]}: damaged"):
            read(path)
        last.unlink()
        with pytest.raises(CheckpointError, match=f"{names[-1]}: .*No such file"):
            read(path)
        assert CheckpointStore(folder / sharding).newest() is None


@pytest.mark.ci
def test_two_processes_go_on_exactly(tmp_path: Path) -> None:
    check_interrupted(tmp_path, 2, {"fsdp": None})


@pytest.mark.ci
def test_four_processes_go_on_exactly(tmp_path: Path) -> None:
    check_interrupted(tmp_path, 4, {"fsdp": None, "hsdp": 2})


def special_cases(rank: int, world_size: int, folder: Path) -> None:
    """What needs no run with whole weights beside it."""
    here, results = join(rank, world_size, folder), dict[str, Any]()
    slowfast, count, knobs = CASES["slow-fast"]
    for backend in ("none", "aot_eager"):
        cfg = config(**knobs, train__sharding="fsdp")
        step = TrainStep(build(cfg, slowfast), cfg, here, total_steps=STEPS, steps_per_epoch=STEPS)
        if backend != "none" and step.shards is not None:
            step.shards.compile(backend)
        results[backend] = run(step, here, count, 3)

    # Half precision: blocks are gathered in it. The same numbers on all processes, and near those of float32.
    for precision, reduced in (("fp16", "fp32"), ("bf16", "bf16")):
        cfg = config(**knobs, train__sharding="fsdp", train__precision=precision, train__gradient_dtype=reduced)
        model = build(cfg, slowfast)
        step = TrainStep(model, cfg, here, total_steps=STEPS, steps_per_epoch=STEPS)
        if precision == "fp16":
            # From its own the scaler would skip these few steps until it has found one that fits.
            step._scaler._init_scale = 64.0  # type: ignore[attr-defined]
        results[precision] = run(step, here, count, 3)

    # A gradient that is not finite in the part of one process, or of each, is skipped by both.
    before = {name: value.clone() for name, value in step.state_dict()[0].items()}
    assert step.shards is not None
    forward, collect = step._forward, step.shards.collect_gradients

    def collect_infinite(ranks: tuple[int, ...]) -> None:
        collect()
        parts = [each.grad for each in model.parameters() if each.grad is not None and each.grad.numel()]
        parts[-1].flatten()[0] *= torch.inf if rank in ranks else 1

    results["skipped"] = []
    for ranks in ((1,), (0, 1)):
        step.shards.collect_gradients = partial(collect_infinite, ranks)  # type: ignore[method-assign]
        results["skipped"].append(step(4, micro_batches(4, here, 1))["skipped"])
    step.shards.collect_gradients = collect  # type: ignore[method-assign]
    results["same"] = all(torch.equal(value, before[name]) for name, value in step.state_dict()[0].items())

    # The disk of one process is full: nobody waits for it, and the next save succeeds.
    from egohod.training.sharding import HuggingFaceStorageWriter as Writer

    def write_nothing(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parts = step.state_dict()[1]["parts"]
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Writer, "write_data", write_nothing)
        with pytest.raises(UserError) as full:
            step.shards.write(folder / "full", parts)
    results["full"], results["files"] = str(full.value), list(step.shards.write(folder / "parts", parts))

    # Eighty micro-batches of 25 ms, during which one process alone is asked to stop.
    passes = 0

    def slow_forward(batch: dict[str, Any]) -> dict[str, Tensor]:
        nonlocal passes
        passes += 1
        if rank == 1 and passes == 4:
            here.stop.request("SIGTERM received")
        time.sleep(0.025)
        return forward(batch)

    step._forward = slow_forward  # type: ignore[method-assign]
    try:
        step(5, micro_batches(5, here, 1) * 80, StopDeadline(here, 0.1))
    except Interrupted as interruption:
        results["reason"] = str(interruption)
    results["passes"] = passes
    leave(here, folder, results)


@pytest.mark.ci
def test_sharded_blocks_are_compiled_rounded_skipped_and_given_up_alike(tmp_path: Path) -> None:
    in_processes(2, special_cases, tmp_path)
    results, others = (torch.load(tmp_path / f"results-{rank}.pt", weights_only=True) for rank in (0, 1))
    # A variant for the frozen path and one for the trained one: one for both would train too little or too much.
    torch.testing.assert_close(results["aot_eager"], results["none"], atol=1e-5, rtol=1e-4)
    for precision in ("fp16", "bf16"):
        torch.testing.assert_close(results[precision], results["none"], atol=0.05, rtol=0.05)
        assert not torch.equal(results[precision], results["none"])
    for each in (results, others):
        assert each["full"] == f"{tmp_path / 'full'}: process 1 failed: [Errno 28] No space left on device"
        assert len(each["files"]) == 2
        assert each["skipped"] == [1, 1]
        # Of the second process nothing is gathered.
        assert each["same"]
        # At the same place: one that is ahead would wait for weights that never come.
        assert each["passes"] == results["passes"] < 40
    assert [results["reason"], others["reason"]] == ["another process was asked to stop", "SIGTERM received"]


def test_sharding_needs_several_processes() -> None:
    cfg = config(train__sharding="fsdp")
    with pytest.raises(UserError, match="this run has one: start several with torchrun --nproc_per_node=N"):
        sharing(cfg, Distributed(0, 1, torch.device("cpu"), None))


def test_one_process_ends_with_a_message_and_a_dry_run_says_what_it_tries(inside: Command, tiny_config: Path) -> None:
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.sharding=fsdp"]
    done = inside(*command)
    assert done.returncode == 2
    assert done.stderr.count("error: train.sharding=fsdp splits the weights over processes, but this run has one") == 1
    done = inside(*command, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "fsdp, which this one process tries without" in done.stderr


def test_predicted_memory_of_split_weights() -> None:
    memory = ModelConfig(name="DEMO", num_frames=2)
    whole, half, quarter = (predict(memory, processes=processes) for processes in (1, 2, 4))
    state = 16 * sum(parameter.numel() for parameter in create_model(memory).parameters() if parameter.requires_grad)
    # What is gathered at a time does not depend on how many share it; what a clip keeps is the same.
    assert half.state - quarter.state == pytest.approx(state / 4, rel=1e-3)
    assert half.per_clip == quarter.per_clip == whole.per_clip


@pytest.mark.parametrize("name", LARGE)
def test_the_memory_table_of_the_docs_is_current(name: str) -> None:
    """Its part that takes no minutes: parameters and what does not depend on the batch."""
    frames = 16 if name.endswith("_Slowfast") else 4
    with torch.device("meta"):
        model = create_model(ModelConfig(name=name, num_frames=frames))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = (ROOT / "docs" / "large_models.md").read_text().splitlines()
    [row] = [row for row in rows if row.startswith(f"| {name} | {parameters / 1e6:,.0f} | {frames} | all |")]
    whole, over_8, over_64 = (row.split(" | ")[column] for column in (5, 8, 11))
    # With the copies for autocast of what is not in blocks.
    assert float(whole) == pytest.approx(16 * parameters / 1e9, rel=0.01)
    for text, processes in ((over_8, 8), (over_64, 64)):
        assert text == f"{split_state(model, 16 * parameters, torch.bfloat16, processes) / 1e9:.1f}"


class Nodes(Distributed):
    """The first process of a run whose processes are on these nodes."""

    hosts: Sequence[str] = ()

    def gather_objects(self, value: object) -> list[object]:
        return list(self.hosts)


@pytest.mark.parametrize(
    ("hosts", "processes", "result"),
    [
        ("aabb", None, 2),
        ("aaaa", None, 4),
        ("aaaa", 2, 2),
        ("aabb", 3, "cannot be split over 3 of 4 processes; set train.shard_processes to one of 2, 4"),
        ("abcd", None, "cannot be split over 1 of 4"),
        ("aaab", None, "the nodes have different numbers of processes"),
    ],
)
def test_hsdp_shares_weights_within_a_node(hosts: str, processes: int | None, result: int | str) -> None:
    dist = Nodes(0, len(hosts), torch.device("cpu"), "gloo")
    object.__setattr__(dist, "hosts", hosts)
    cfg = config(train__sharding="hsdp", train__shard_processes=processes)
    if isinstance(result, int):
        assert sharing(cfg, dist) == result
    else:
        with pytest.raises(UserError, match=result):
            sharing(cfg, dist)


# Sharded, with all that a checkpoint has to hold: averages of weights and of the optimizer, several micro-batches, both
# paths, checkpointed blocks, a step without the slow path.
SETTINGS = [
    "model.name=DEMO_Slowfast", "model.fast.slow_frames=2", "model.fast.slow_every=2", "model.checkpoint_blocks=1",
    "model.patch_dropout=0", "train.ema=0.9", "train.clip_norm=1", "train.max_batch_per_process=2",
    "train.save_every=5 steps",
]  # fmt: skip


def start(ranks: int, config: Path, run: Path, *knobs: str) -> str:
    """The log of a training run that ends well."""
    settings = ["--config_file", config, *SETTINGS, f"train.output={run}", *knobs]
    processes = Ranks(ranks, "main_pretrain.py", settings, run.parent / f"{run.name}_logs")
    assert processes.wait() == [0] * ranks, processes.log()
    return processes.log()


def assert_same_run(one: Path, other: Path, first: int = 0) -> None:
    assert losses(other) == losses(one)[first:]
    weights = newest(other).weights
    for name, weight in newest(one).weights.items():
        assert torch.equal(weight, weights[name]), name


def scores(run: Path) -> list[dict[str, float]]:
    """The benchmark's numbers of each evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [values for line in lines if (values := {name: line[name] for name in line if name.startswith("val/")})]


@pytest.mark.ci
def test_programs_on_two_processes_go_on_exactly_and_save_whole_weights(
    tiny_config: Path, demo_world: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    evaluated = [f"evaluate.demo_val={demo_world}/val", "evaluate.every=6 steps"]
    start(2, tiny_config, run, "train.sharding=fsdp", "train.async_save=true", *evaluated)
    folder = run / "checkpoints" / "step-00000005"
    assert len(list((folder / "parts").iterdir())) == 2
    # The moments of AdamW, which are twice the weights, and the weights beside their average are not in it.
    assert (folder / "training.pt").stat().st_size < (folder / "model.safetensors").stat().st_size / 10
    log = start(2, tiny_config, tmp_path / "resumed", "train.sharding=fsdp", f"train.resume={folder}")
    assert "resuming" in log
    assert_same_run(run, tmp_path / "resumed", 5)

    # The same run with whole weights; and either goes on from the other's checkpoint, on another number of processes.
    start(2, tiny_config, tmp_path / "whole", *evaluated)
    shapes = {name: value.shape for name, value in newest(tmp_path / "whole").weights.items()}
    assert {name: value.shape for name, value in newest(run).weights.items()} == shapes
    start(1, tiny_config, tmp_path / "alone", f"train.resume={folder}")
    from_whole = tmp_path / "whole" / "checkpoints" / "step-00000005"
    start(2, tiny_config, tmp_path / "split", "train.sharding=fsdp", f"train.resume={from_whole}")
    for (step, loss, _), (_, other, _) in zip(losses(run), losses(tmp_path / "whole"), strict=True):
        assert loss == pytest.approx(other, abs=1e-3), step
    for mine, theirs in zip(scores(run), scores(tmp_path / "whole"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-2)
    assert len(scores(run)) == 2
    for name in ("alone", "split"):
        for (step, loss, _), (_, other, _) in zip(losses(run)[5:], losses(tmp_path / name), strict=True):
            assert loss == pytest.approx(other, abs=1e-3), (name, step)

    # Half written: of what one process had to write there is a part.
    last = newest(run).path
    part = sorted((last / "parts").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"{part.name}: damaged"):
        read(last)
    part.unlink()
    with pytest.raises(CheckpointError, match=f"{part.name}: .*No such file"):
        read(last)
    assert newest(run).step == 10
    assert "trying the one before" in start(2, tiny_config, run, "train.sharding=fsdp", *evaluated)
    assert_same_run(run, tmp_path / "resumed", 5)
