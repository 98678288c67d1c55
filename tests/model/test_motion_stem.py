"""The motion stem: nothing at the start, any geometry, what it learns, and that all else of a run works with it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import main_eval
import main_pretrain
from egohod import api
from egohod.config import Config
from egohod.errors import UserError
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.checkpoints import from_tensors, load_weights, read_weights, upstream_state
from egohod.model.config import GEOMETRIES, FastPathConfig, Geometry, ModelConfig, geometry
from egohod.model.cost import clip_flops, count_flops, predict, saved_bytes
from egohod.model.dual_encoder import DualEncoder, EgoVideo, create_model
from egohod.model.vision import MotionStem, VideoTransformer, slow_frames
from egohod.training.step import build_optimizer, forward_backward
from tests.support import losses, newest
from tools import convert_checkpoint

STEM = "visual.motion_stem."
MODELS = [("DEMO", "fast"), ("DEMO_Slowfast", "fast"), ("DEMO_Slowfast", "both")]


def build(name: str = "DEMO", paths: str = "fast", frames: int = 8, **options: Any) -> DualEncoder:
    """With a stem of eight channels, unless the options say otherwise."""
    torch.manual_seed(0)
    fast = FastPathConfig(stem_paths=paths)
    options = {"motion_stem": 8, "temporal_init": "sinusoidal"} | options
    return create_model(ModelConfig(name=name, num_frames=frames, fast=fast, **options))


def wake(model: DualEncoder) -> DualEncoder:
    """A stem, and adapters, that do something."""
    generator = torch.Generator().manual_seed(3)
    stem = model.visual.motion_stem
    assert stem is not None
    with torch.no_grad():
        stem.project.weight.copy_(0.1 * torch.randn(stem.project.weight.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if name.endswith("up_proj.weight"):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def backward(model: DualEncoder, clips: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    ContrastiveLoss()(**model(clips, tokens))["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=rtol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("name", "paths"), MODELS)
def test_trained_weights_give_the_same_features_to_the_bit(name: str, paths: str, clips: Tensor) -> None:
    """Also with the last convolution's values far from zero: nothing but the projection holds them back."""
    trained, model = build(name, motion_stem=None), build(name, paths)
    report = load_weights(model, from_tensors("trained", trained.state_dict()))
    assert set(report.missing) == {each for each in model.state_dict() if each.startswith(STEM)}
    assert set(report.missing.values()) == {"the file has no motion stem (model.motion_stem)"}
    with torch.no_grad():
        assert model.visual.motion(clips).abs().max() > 1  # type: ignore[union-attr]
        assert torch.equal(model.encode_video(clips), trained.encode_video(clips))
        assert not torch.equal(wake(model).encode_video(clips), trained.encode_video(clips))


def test_other_weights_of_a_seed_are_those_without_a_stem() -> None:
    without, model = build(motion_stem=None).state_dict(), build().state_dict()
    assert all(torch.equal(model[name], value) for name, value in without.items())


@pytest.mark.parametrize(("name", "paths"), MODELS)
def test_the_projection_learns_from_the_first_step_and_all_else_from_the_second(
    name: str, paths: str, clips: Tensor, tokens: Tensor
) -> None:
    model = build(name, paths)
    gradients = backward(model, clips, tokens)
    learning = {each for each, value in gradients.items() if value.abs().max() > 0}
    assert {each for each in learning if each.startswith(STEM)} == {f"{STEM}project.weight", f"{STEM}project.bias"}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    gradients = backward(model, clips, tokens)
    for each, parameter in model.named_parameters():
        if each.startswith(STEM):
            assert gradients[each].abs().max() > 0, each
        assert not parameter.requires_grad or each in gradients, f"{each}: DDP would wait for it"


@pytest.mark.parametrize(
    ("size", "patch", "frames"),
    [(40, 8, 16), (24, 8, 1), (42, 14, 3), (33, 11, 5), (20, 4, 2), (12, 2, 3), (96, 32, 4)],
)
def test_any_geometry_has_a_vector_for_each_patch_where_the_patch_is(size: int, patch: int, frames: int) -> None:
    torch.manual_seed(0)
    grid = size // patch
    stem, video = MotionStem(16, grid, patch, channels=8), torch.zeros(1, 3, frames, size, size)
    with torch.no_grad():
        plain = stem(video)
        frame, row, column = frames - 1, grid - 1, grid // 2
        place = (slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch))
        video[0, :, frame, place[0], place[1]] = torch.randn(3, patch, patch)
        change = (stem(video) - plain).norm(dim=2)
    assert plain.shape == (1, frames * grid**2, 16)
    # In its own frame, at this patch or, as the convolutions see neighbours, beside it.
    most = int(change[0].view(frames, -1)[frame].argmax())
    assert abs(most // grid - row) <= 1
    assert abs(most % grid - column) <= 1


@torch.no_grad()
def test_frame_order_is_seen_without_a_temporal_embedding(clips: Tensor) -> None:
    model = wake(build(temporal_init="zeros"))
    assert (model.encode_video(clips) - model.encode_video(clips.flip(2))).abs().max() > 1e-2
    # The same of a clip's frames in their order, whichever clips are beside it: no statistics of a batch.
    torch.testing.assert_close(model.encode_video(clips[:1]), model.encode_video(clips)[:1], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("tubes", [False, True])
def test_patch_dropout_drops_stem_vectors_with_their_patches(clips: Tensor, tubes: bool) -> None:
    visual = wake(build(patch_dropout=0.75, patch_dropout_tubes=tubes)).visual
    motion = visual.motion(clips)
    whole = visual.eval().embed(clips, motion)[0]
    part, chosen = visual.train().embed(clips, motion)
    assert chosen is not None
    expected = whole[:, 1:].gather(1, chosen.unsqueeze(2).expand(-1, -1, whole.shape[2]))
    torch.testing.assert_close(part[:, 1:], expected, atol=1e-5, rtol=0)


def moving_dots(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips of a dot that moves right (label 1) or left (0) over noise: a clip played backwards is the other label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    y, x = (torch.rand(count, 1, generator=generator) * span + 16 - span / 2 for span in (24, 12))
    x = x + (2 * labels - 1).unsqueeze(1) * 1.5 * (torch.arange(6) - 2.5)
    pixels = torch.arange(32) + 0.5
    square = (pixels - x.unsqueeze(2)).square().unsqueeze(2) + (pixels - y).square().view(count, 1, 32, 1)
    noise = 0.5 * torch.rand(count, 3, 1, 32, 32, generator=generator) - 0.3
    return 2 * torch.exp(-square / 4).unsqueeze(1) + noise, labels


def test_direction_is_learned_in_forty_steps_and_not_without() -> None:
    shape = Geometry("TINY", 32, 8, 48, 2, 2, 32, 1, 2, embed_dim=2)
    test, labels = moving_dots(200, seed=99)
    accuracy = {}
    for stem in (None, 32):
        torch.manual_seed(0)
        config = ModelConfig(num_frames=6, temporal_init="sinusoidal", spatial_init="sinusoidal", motion_stem=stem)
        visual = VideoTransformer(shape, config)
        optimizer = torch.optim.AdamW(visual.parameters(), lr=1e-3)
        for step in range(40):
            video, target = moving_dots(32, seed=step)
            optimizer.zero_grad()
            F.cross_entropy(visual(video), target).backward()
            optimizer.step()
        with torch.no_grad():
            forward, reverse = (visual(video).argmax(dim=1) for video in (test, test.flip(2)))
        accuracy[stem] = [
            (answers == right).float().mean() for answers, right in ((forward, labels), (reverse, 1 - labels))
        ]
    assert min(accuracy[32]) > 0.95
    assert max(accuracy[None]) < 0.75


@pytest.mark.parametrize(("name", "paths"), MODELS)
def test_gradient_checkpointing_saves_memory_and_changes_nothing(
    name: str, paths: str, clips: Tensor, tokens: Tensor
) -> None:
    flags = {"motion_stem": 32, "checkpoint_blocks": "all"}
    plain, thrifty = wake(build(name, paths, motion_stem=32)), wake(build(name, paths, **flags))
    assert_close(backward(thrifty, clips, tokens), backward(plain, clips, tokens))
    whole, kept = (saved_bytes(partial(each.visual.motion, clips), each) for each in (plain, thrifty))
    # The frames, of which everything else is computed again.
    assert kept == clips.nbytes < whole / 3
    # What the prediction allows for while a block is computed again is enough for the stem, too.
    config = ModelConfig(name=name, num_frames=8, **flags)
    assert whole < len(clips) * predict(config).working


@pytest.mark.parametrize(
    ("name", "paths"), [MODELS[0], *(pytest.param(*each, marks=pytest.mark.ci) for each in MODELS[1:])]
)
def test_compiled_equals_eager(
    name: str, paths: str, clips: Tensor, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    # Compiling takes time by the block.
    monkeypatch.setitem(GEOMETRIES, name, replace(geometry(name), vision_layers=1))
    expected = backward(wake(build(name, paths)), clips, tokens)
    model = wake(build(name, paths, checkpoint_blocks="none" if name == "DEMO" else "all"))
    model.compile_towers(backend="aot_eager")  # every graph is whole, or this raises
    assert_close(backward(model, clips, tokens), expected, rtol=1e-3)


@pytest.mark.parametrize(("name", "paths"), [MODELS[0], MODELS[2]])
def test_cached_accumulation_is_the_joint_batch(name: str, paths: str, clips: Tensor, tokens: Tensor) -> None:
    model = wake(build(name, paths))
    expected = backward(model, clips, tokens)
    model.zero_grad()
    chunks = list(zip(clips.split(1), tokens.split(1), strict=True))
    forward_backward(lambda chunk: model(*chunk), model, chunks, ContrastiveLoss())
    assert_close({each: p.grad for each, p in model.named_parameters() if p.grad is not None}, expected)


def test_features_under_autocast(clips: Tensor, tokens: Tensor) -> None:
    model = wake(build())
    exact = model(clips, tokens)["video_features"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(clips, tokens)["video_features"]
    assert rough.dtype is torch.float32
    assert (rough * exact).sum(dim=1).min() > 0.99


@pytest.mark.parametrize("paths", ["fast", "both"])
def test_the_frozen_backbone_learns_from_the_slow_path_only(paths: str, clips: Tensor, tokens: Tensor) -> None:
    """As without a stem. On the slow path its vectors are those of the slow frames, computed from all frames."""
    model = wake(build("DEMO_Slowfast", paths))
    assert isinstance(model, EgoVideo)
    whole, taken = backward(model, clips, tokens), slow_frames(8, 4)
    model.zero_grad()
    with torch.no_grad():
        fast, motion = model.visual.fast(clips), model.visual.motion(clips)
    assert motion is not None
    on_slow = motion.view(3, 8, 25, -1)[:, taken].flatten(1, 2) if paths == "both" else None
    slow = model.visual(clips[:, :, taken], on_slow)
    features = F.normalize(torch.cat((slow, fast), dim=1) @ model.slowfast_projection, dim=-1)
    torch.testing.assert_close(features, model.encode_video(clips), atol=1e-6, rtol=0)
    ContrastiveLoss()(features, model.encode_text(tokens), model.logit_scale.exp())["loss"].backward()
    for name in ("ln_pre.weight", "class_embedding", "transformer.resblocks.0.mlp.c_fc.weight", "ln_post.bias"):
        torch.testing.assert_close(whole[f"visual.{name}"], model.visual.get_parameter(name).grad, atol=1e-7, rtol=1e-4)
    slow_gradient = model.visual.get_parameter("motion_stem.project.weight").grad
    assert (slow_gradient is not None) == (paths == "both")


def test_which_parameters_are_trained_and_how() -> None:
    model = build("DEMO_Slowfast")
    cfg = Config()
    cfg.train.layer_decay, cfg.train.weight_decay = 0.5, 0.1
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates, decays = {}, {}
    for group in build_optimizer(model, cfg.train).param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]], decays[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    stem = [name for name in rates if name.startswith(STEM)]
    assert len(stem) == 3 * 3 + 2
    # In front of the blocks like the patch embedding, so a fine-tuning changes both alike.
    assert {rates[name] for name in stem} == {rates["visual.conv1.weight"]}
    assert {decays[name] for name in stem if model.get_parameter(name).ndim == 1} == {0.0}
    for part, expected in (("adapters", True), ("vision", True), ("last_blocks", False), ("heads", False)):
        model = build("DEMO_Slowfast")
        model.freeze(part, last_blocks=1)
        assert all(model.get_parameter(name).requires_grad == expected for name in stem), part


@pytest.mark.parametrize(("name", "paths"), MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_operations_are_counted(name: str, paths: str, dropout: float, clips: Tensor, tokens: Tensor) -> None:
    model = wake(build(name, paths, motion_stem=32, patch_dropout=dropout))
    sizes = (model.geometry, 8, tokens.shape[1], dropout, FastPathConfig(stem_paths=paths))
    counted = count_flops(lambda: model(clips, tokens))
    assert counted == pytest.approx(3 * clip_flops(*sizes, motion_stem=32).forward, rel=0.03)
    counted = count_flops(lambda: backward(model, clips, tokens))
    assert counted == pytest.approx(3 * clip_flops(*sizes, motion_stem=32).step, rel=0.03)
    assert clip_flops(*sizes, motion_stem=32).step > 1.05 * clip_flops(*sizes).step


def test_operations_at_the_published_sizes() -> None:
    """On the meta device, so nothing is computed: sizes of patch for which the frames are no exact half."""
    for name in ("CLIP_VITB16", "CLIP_VITL14"):
        with torch.device("meta"):
            model = create_model(ModelConfig(name=name, num_frames=4, motion_stem=32))
            size = model.geometry.image_size
            video, tokens = torch.empty(2, 3, 4, size, size), torch.zeros(2, 77, dtype=torch.long)
        counted = count_flops(partial(backward, model, video, tokens))
        assert counted == pytest.approx(2 * clip_flops(model.geometry, 4, 77, motion_stem=32).step, rel=0.03)
        assert clip_flops(model.geometry, 4, 77, motion_stem=32).step < 1.1 * clip_flops(model.geometry, 4, 77).step


def test_weights_with_a_stem_in_a_model_without() -> None:
    state = wake(build()).state_dict()
    with pytest.raises(
        UserError, match=r"a part that the model has not, motion stem \(model\.motion_stem\) .*adapt=true"
    ):
        load_weights(build(motion_stem=None), from_tensors("x", state))
    report = load_weights(build(motion_stem=None), from_tensors("x", state), adapt=True)
    assert {name for name in report.dropped if name.startswith(STEM)} == {name for name in state if STEM in name}
    with pytest.raises(UserError, match=r"motion_stem\.spatial\.0\.weight is \[8, 6, 1, 5, 5\] there and \[16, "):
        load_weights(build(motion_stem=16), from_tensors("x", state))
    assert from_tensors("x", state).model_knobs["motion_stem"] == 8
    with pytest.raises(UserError, match=r"has a motion stem, which upstream's model cannot have"):
        upstream_state(from_tensors("x", state))


def test_a_run_resumes_exactly_and_its_folder_says_how_to_load_it(
    tiny_config: Path, tmp_path: Path, demo_world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slowfast = ["model.name=DEMO_Slowfast", "model.fast.stem_paths=both", "model.motion_stem=8", "train.ema=0.9"]
    command = ["--config_file", str(tiny_config), *slowfast]
    caplog.set_level(logging.INFO)
    assert main_pretrain.main([*command, "train.duration=3 steps", f"train.output={tmp_path}/straight"]) == 0
    assert "motion stem " in caplog.text
    assert main_pretrain.main([*command, "train.duration=2 steps"]) == 0
    assert main_pretrain.main([*command, "train.duration=3 steps"]) == 0
    straight, resumed = (newest(tmp_path / name).weights for name in ("straight", "run"))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    assert straight[f"{STEM}project.weight"].abs().max() > 0
    for knob in ("model.motion_stem=16", "model.fast.stem_paths=fast"):
        with pytest.raises(UserError, match=rf"was trained with {knob.partition('=')[0]}=\w+, this run has \w+"):
            main_pretrain.main([*command, knob, "train.duration=4 steps"])
    # Neither an evaluation nor Python code needs to name the stem; another use of the same weights is refused.
    evaluation = ["--config_file", str(tiny_config), "--checkpoint", f"{tmp_path}/run", "--output", f"{tmp_path}/found"]
    assert main_eval.main([*evaluation, f"evaluate.demo_test={demo_world}/test", "evaluate.cache=null"]) == 0
    assert json.loads((tmp_path / "found" / "results.json").read_text())["metrics"]
    model, _, _ = api.create_model_and_transforms("DEMO_Slowfast", tmp_path / "run")
    assert torch.equal(model.state_dict()[f"{STEM}project.weight"], straight[f"{STEM}project.weight"])
    assert isinstance(model, EgoVideo)
    assert model.visual.stem_paths == "both"
    # As one file, too.
    assert convert_checkpoint.main([str(tmp_path / "run"), str(tmp_path / "one.safetensors")]) == 0
    converted = read_weights(tmp_path / "one.safetensors")
    assert "a motion stem and motion adapters" in convert_checkpoint.inspect(converted)["motion"]
    assert (converted.model_knobs["motion_stem"], converted.model_knobs["fast.stem_paths"]) == (8, "both")
    start = ["model.weights.source=checkpoint", f"model.weights.path={tmp_path}/run", f"train.output={tmp_path}/next"]
    with pytest.raises(UserError, match=r"they were trained with model\.fast\.stem_paths=both, not fast"):
        main_pretrain.main([*command, *start, "model.fast.stem_paths=fast"])
