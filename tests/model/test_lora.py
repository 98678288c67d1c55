"""Low-rank training: how a model starts, what of it learns, and that the merged weights are the trained model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from egohod.errors import UserError
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.checkpoints import from_tensors, load_weights
from egohod.model.config import FastPathConfig, LoraConfig, ModelConfig
from egohod.model.cost import count_flops, predict, saved_bytes
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.model.lora import add_low_rank, merge_low_rank
from egohod.training.config import TrainConfig
from egohod.training.step import build_optimizer

RANK = 4


def build(name: str = "DEMO_SMALL", classes: dict[str, int] | None = None, **settings: Any) -> DualEncoder:
    torch.manual_seed(0)
    fast = FastPathConfig(slow_frames=2, pool="both")
    return create_model(ModelConfig(name=name, num_frames=4, fast=fast, **settings), classes=classes)


def low_rank(model: DualEncoder, moved: bool = True, **settings: Any) -> DualEncoder:
    """``model`` with low-rank parts, ``moved`` with its adapters away from the zeros that they start with."""
    add_low_rank(model, LoraConfig(rank=RANK, alpha=8.0, **settings))
    model.freeze("lora")
    for name, parameter in model.named_parameters():
        if moved and name.endswith((".lora.up", ".adapter.up_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def inputs(size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.tensor([[49406, 320, 49407], [49406, 1000, 49407], [49406, 33, 49407]])
    return torch.randn(3, 3, 4, size, size, generator=generator), tokens


def backward(output: dict[str, Tensor]) -> None:
    ContrastiveLoss()(**output)["loss"].backward()


@pytest.mark.parametrize("name", ["DEMO_SMALL", "DEMO_SMALL_Slowfast"])
def test_a_model_starts_as_its_base_under_the_same_names(name: str) -> None:
    model = build(name)
    before, expected = dict(model.state_dict()), model(*inputs())
    low_rank(model, moved=False)
    for key, value in model(*inputs()).items():
        assert torch.equal(value, expected[key]), key
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    # Three blocks of vision and two of text, with four layers each.
    assert {key.rpartition(".lora.")[2] for key in after.keys() - before.keys()} == {"up", "down", "scale"}
    assert len(after) - len(before) == 3 * 4 * 5


@pytest.mark.parametrize("name", ["DEMO_SMALL", "DEMO_SMALL_Slowfast"])
def test_of_the_blocks_only_the_low_rank_parts_learn(name: str) -> None:
    model = low_rank(build(name))
    backward(model(*inputs()))
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(model.get_parameter(key).grad.abs().sum() > 0 for key in trained)  # type: ignore[union-attr]
    blocks = {key for key in trained if ".resblocks." in key and ".adapter." not in key}
    assert blocks == {key for key, _ in model.named_parameters() if ".lora." in key}
    rest = {key for key in trained - blocks if ".adapter." not in key}
    small = {"visual.temporal_embedding", "visual.image_projection", "textual.text_projection"}
    assert rest == small | ({"slowfast_projection"} if "Slowfast" in name else set())


def test_the_fast_path_trains_no_low_rank_part() -> None:
    """They are the backbone's weights, which belong to the slow path."""
    model = low_rank(build("DEMO_SMALL_Slowfast"))
    video, _ = inputs()
    model.visual.fast(video).square().sum().backward()
    assert model.visual.transformer.resblocks[0].adapter.up_proj.weight.grad is not None
    assert not [key for key, parameter in model.named_parameters() if ".lora." in key and parameter.grad is not None]
    model.visual(video[:, :, ::2]).square().sum().backward()
    parts = [key for key, _ in model.named_parameters() if key.startswith("visual.") and ".lora." in key]
    assert all(model.get_parameter(key).grad is not None for key in parts)
    plain = build("DEMO_SMALL_Slowfast")
    load_weights(plain, from_tensors("merged", model.state_dict()))
    torch.testing.assert_close(plain.visual.fast(video), model.visual.fast(video), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["DEMO_SMALL", "DEMO_SMALL_Slowfast"])
def test_merged_weights_are_a_plain_model_with_the_same_features(name: str) -> None:
    model, plain = low_rank(build(name)), build(name)
    report = load_weights(plain, from_tensors("run", model.state_dict()))
    assert report.notes == ["20 low-rank parts are added to their weights"]
    assert not report.missing
    assert not report.dropped
    expected = model(*inputs())
    for key, value in plain(*inputs()).items():
        torch.testing.assert_close(value, expected[key], atol=2e-6, rtol=1e-5)


def test_merging_gives_the_same_bits_on_any_number_of_threads() -> None:
    """A run that starts from merged weights keeps their checksum."""
    tensors = low_rank(build()).state_dict()
    threads = torch.get_num_threads()
    results = []
    for number in (1, 3):
        torch.set_num_threads(number)
        results.append(merge_low_rank(tensors)[0])
    torch.set_num_threads(threads)
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize("change", ["checkpointed", "copied", pytest.param("compiled", marks=pytest.mark.ci)])
def test_what_a_step_does_to_a_model_changes_nothing(change: str) -> None:
    model = low_rank(build("DEMO_SMALL_Slowfast"))
    backward(model(*inputs()))
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    if change == "checkpointed":
        model.set_grad_checkpointing(2)
    elif change == "compiled":
        model.compile_towers(backend="aot_eager")
    else:  # as a moving average is
        original = model
        model = copy.deepcopy(original)
        for parameter in original.parameters():
            parameter.data.zero_()
    backward(model(*inputs()))
    for key, parameter in model.named_parameters():
        if expected[key] is None:
            assert parameter.grad is None, key
        else:
            torch.testing.assert_close(parameter.grad, expected[key], atol=1e-6, rtol=1e-4, msg=key)


def test_layers_and_towers_are_chosen() -> None:
    model = low_rank(build(), layers=["qkv"], towers=["visual"])
    parts = {key.split(".lora.")[0] for key in model.state_dict() if ".lora." in key}
    assert parts == {f"visual.transformer.resblocks.{i}.attn" for i in range(3)}
    # The text tower of a model with heads is not used.
    model = low_rank(build(classes={"action": 3}))
    assert not [key for key in model.state_dict() if key.startswith("textual.") and ".lora." in key]
    with pytest.raises(UserError, match=r"trains no layer of train\.lora\.layers=.* in train\.lora\.towers=\['textual"):
        low_rank(build(classes={"action": 3}), towers=["textual"])


def test_a_part_has_the_learning_rate_of_its_block() -> None:
    model = low_rank(build())
    optimizer = build_optimizer(model, TrainConfig(layer_decay=0.5))
    scales = {parameter: group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    of_block = [scales[block.attn.lora.up] for block in model.visual.transformer.resblocks]
    assert of_block == pytest.approx([0.5**3, 0.5**2, 0.5])


@pytest.mark.parametrize(
    "tower",
    [
        # Its attention reads qkv.weight and never calls the layer.
        pytest.param(lambda: Eva(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2), id="eva"),
        pytest.param(
            lambda: Eva(
                img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, qkv_fused=False, swiglu_mlp=True
            ),
            id="eva, apart",
        ),
        pytest.param(
            lambda: VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2), id="vit"
        ),
    ],
)
def test_blocks_of_timm_learn_in_every_part(tower: Any) -> None:
    torch.manual_seed(0)
    visual = tower()
    picture = torch.randn(2, 3, 32, 32)
    expected = visual(picture)
    add_low_rank(SimpleNamespace(visual=visual, heads=None), LoraConfig(rank=RANK, towers=["visual"]))  # type: ignore[arg-type]
    assert torch.equal(visual(picture), expected)
    parts = {key: parameter for key, parameter in visual.named_parameters() if ".lora." in key}
    for parameter in parts.values():
        torch.nn.init.normal_(parameter, std=0.1)
    output = visual(picture)
    output.square().sum().backward()
    assert len(parts) >= 2 * 2 * 4
    assert not [key for key, parameter in parts.items() if parameter.grad is None or not parameter.grad.any()]
    plain = tower()
    plain.load_state_dict(merge_low_rank(visual.state_dict())[0])
    torch.testing.assert_close(plain(picture), output, atol=1e-5, rtol=1e-5)


def test_a_step_computes_and_keeps_less() -> None:
    """No gradients of whole weights, and none of their averages."""
    steps, saved = [], []
    for model in (build("DEMO"), low_rank(build("DEMO"))):
        clips = inputs(40)
        steps.append(count_flops(lambda model=model, clips=clips: backward(model(*clips))))
        saved.append(saved_bytes(lambda model=model, clips=clips: model(*clips), model))
    assert steps[1] < 0.8 * steps[0]
    config, settings = ModelConfig(name="DEMO", num_frames=4), LoraConfig(rank=RANK)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    memory, whole = predict(config, learning=trained, lora=settings), predict(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    trained_count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert memory.state == pytest.approx(4 * (count + 3 * trained_count), rel=0.05)
    assert memory.state < 0.5 * whole.state
    # Texts of the whole context length are predicted; the clips' share is the larger one.
    assert memory.per_clip == pytest.approx(whole.per_clip * saved[1] / saved[0], rel=0.1)


def test_parts_without_their_weight_are_refused() -> None:
    tensors = low_rank(build()).state_dict()
    alone = {key: value for key, value in tensors.items() if ".mlp.c_fc.weight" not in key}
    with pytest.raises(UserError, match=r"low-rank part of \S+c_fc without all else of it; open the run or checkpoint"):
        merge_low_rank(alone)
    name = "visual.transformer.resblocks.0.attn.lora.down"
    with pytest.raises(UserError, match="of another shape than"):
        merge_low_rank(tensors | {name: tensors[name][:, 1:]})
