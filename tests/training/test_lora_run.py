"""Low-rank training as a run: small checkpoints, exact resume, the merged model, and two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import egohod
import main_pretrain
from egohod.config import load
from egohod.errors import UserError
from egohod.model.config import FastPathConfig, LoraConfig, ModelConfig
from egohod.model.dual_encoder import DualEncoder, EgoVideo, create_model
from egohod.model.lora import add_low_rank
from egohod.training.checkpoint import open_weights
from tests.support import Command, ShortRun, losses, newest
from tests.training.test_resume import assert_same

# Everything that a step may have: several micro-batches, a moving average, rates by layer, recomputed blocks.
SETTINGS = ["train.trainable=lora", "train.lora.rank=4", "train.lora.alpha=8", "train.ema=0.9", "train.layer_decay=0.8"]
SETTINGS += ["train.max_batch_per_process=4", "model.checkpoint_blocks=2", "model.num_frames=5"]
SETTINGS += ["model.activation=quick_gelu", "model.weights.source=checkpoint"]


def test_a_resumed_run_is_exact_its_checkpoints_small_and_its_merged_weights_the_model(
    tiny_config: Path, short_run: ShortRun, tmp_path: Path, inside: Command
) -> None:
    start = f"model.weights.path={short_run.folder}"
    command = ["--config_file", str(tiny_config), *SETTINGS, start]
    straight, broken = tmp_path / "straight", tmp_path / "run"
    assert main_pretrain.main([*command, "train.duration=4 steps", f"train.output={straight}"]) == 0
    assert main_pretrain.main([*command, "train.duration=2 steps"]) == 0
    assert main_pretrain.main([*command, "train.duration=4 steps"]) == 0
    assert losses(broken)[2:] == losses(straight)[2:]
    one, other = newest(straight), newest(broken)
    assert_same(one.weights, other.weights)
    assert_same(one.training, other.training)

    # The base has everything else.
    small = ("visual.temporal_embedding", "visual.image_projection", "textual.text_projection", "logit_scale")
    assert all(".lora." in name or name in small for name in one.weights)
    assert sum(value.numel() for value in one.weights.values()) < 300_000
    base = newest(short_run.folder).weights
    whole = open_weights(broken)
    assert whole.tensors.keys() == base.keys()
    assert not [name for name in whole.tensors if ".lora." in name]
    changed = {name for name, value in whole.tensors.items() if not torch.equal(value, base[name])}
    assert "visual.transformer.resblocks.3.attn.in_proj_weight" in changed
    assert "textual.transformer.resblocks.1.attn.out_proj.weight" in changed
    assert not [name for name in changed if ".ln_" in name or name.endswith("bias") or "conv1" in name]

    # What is loaded or exported is a plain model with the features of the trained one.
    trained = create_model(load(tiny_config, [*SETTINGS, start]).model)
    egohod.load_weights(trained, short_run.folder)
    add_low_rank(trained, LoraConfig(rank=4, alpha=8.0))
    trained.load_state_dict(trained.state_dict() | one.weights)
    export = tmp_path / "merged.safetensors"
    done = inside("convert_checkpoint.py", broken, export)
    assert done.returncode == 0, done.stderr
    video = torch.randn(2, 3, 5, 40, 40, generator=torch.Generator().manual_seed(0))
    for source in (broken, export):
        model, _, tokenizer = egohod.create_model_and_transforms("DEMO", source)
        assert len(model.state_dict()) == len(base)
        tokens = tokenizer(["#C C opens the jar", "#C C closes the jar"])
        with torch.no_grad():
            for key, value in model(video, tokens).items():
                torch.testing.assert_close(value, trained.eval()(video, tokens)[key], atol=2e-6, rtol=1e-5)
    with pytest.raises(UserError, match=r"low-rank part of \S+ without all else of it; open the run or checkpoint"):
        egohod.load_weights(model, newest(broken).path / "model.safetensors")

    # Another run may start from it, low-rank again: its base is the merged weights.
    second = [*command[:-1], f"model.weights.path={broken}", f"train.output={tmp_path}/second"]
    assert main_pretrain.main([*second, "train.duration=1 steps"]) == 0
    assert open_weights(tmp_path / "second").tensors.keys() == base.keys()
    with pytest.raises(UserError, match=r"was trained with train\.lora=\{.*'alpha': 8"):
        main_pretrain.main([*command, "train.lora.alpha=4", "train.duration=5 steps"])


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("train.lora.rank=0", r"train\.lora\.rank is 0, but must be at least 1"),
        ("train.lora.layers=[]", r"train\.lora\.layers=\[\] names nothing that is trained"),
        ("train.lora.layers=[qkw]", r"must be one of qkv, proj, mlp; did you mean qkv\?"),
        ("train.lora.towers=[text]", r"must be one of visual, textual"),
        ("loss.separation=1", r"freezes without textual in train\.lora\.towers"),
    ],
)
def test_mistakes_are_named(tiny_config: Path, setting: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        load(tiny_config, ["train.trainable=lora", "train.lora.towers=[visual]", setting])


def low_rank(name: str) -> DualEncoder:
    torch.manual_seed(0)
    fast = FastPathConfig(slow_frames=2, pool="both", slow_every=2)
    model = create_model(ModelConfig(name=name, num_frames=4, fast=fast, checkpoint_blocks="1"))
    add_low_rank(model, LoraConfig(rank=4))
    model.freeze("lora")
    for key, parameter in model.named_parameters():
        if key.endswith((".lora.up", ".adapter.up_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def share(rank: int) -> tuple[Tensor, Tensor]:
    video = torch.randn(1, 3, 4, 40, 40, generator=torch.Generator().manual_seed(rank))
    return video, torch.tensor([[49406, 320 + rank, 49407]])


def similarity(output: dict[str, Tensor]) -> Tensor:
    return (output["video_features"] * output["text_features"]).sum(dim=1).mean()


def in_two_processes(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in ("DEMO", "DEMO_Slowfast"):
        model = low_rank(name)
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        for _ in range(2):  # a parameter that never gets a gradient is noticed in the second step
            parallel.zero_grad()
            similarity(parallel(*share(rank))).backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        torch.save(gradients, folder / f"{name}{rank}")
        if isinstance(model, EgoVideo):
            parallel.zero_grad()
            with model.without_slow_path():
                similarity(parallel(*share(rank))).backward()
            assert not [
                key for key, p in model.named_parameters() if ".lora." in key and "visual" in key and p.grad is not None
            ]
    dist.destroy_process_group()


@pytest.mark.ci
def test_two_processes_give_the_mean_gradient(tmp_path: Path) -> None:
    mp.spawn(in_two_processes, (tmp_path,), nprocs=2)
    for name in ("DEMO", "DEMO_Slowfast"):
        model = low_rank(name)
        sum(similarity(model(*share(rank))) / 2 for rank in (0, 1)).backward()  # type: ignore[union-attr]
        for rank in (0, 1):
            gradients = torch.load(tmp_path / f"{name}{rank}", weights_only=True)
            assert gradients.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
            for key, gradient in gradients.items():
                torch.testing.assert_close(gradient, model.get_parameter(key).grad, atol=1e-6, rtol=1e-4, msg=key)
