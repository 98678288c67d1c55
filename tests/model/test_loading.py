"""Putting weights into a model: what is taken, resized, dropped and missing, and all or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egohod.errors import UserError
from egohod.loss.config import LossConfig
from egohod.model.checkpoints import (
    PROJECTIONS,
    Family,
    WeightReport,
    from_tensors,
    load_weights,
    read_weights,
    upstream_state,
)
from egohod.model.config import GEOMETRIES, FastPathConfig, Geometry, ModelConfig, geometry
from egohod.model.dual_encoder import DualEncoder, create_model
from tests.model.field_files import (
    State,
    open_clip_state,
    openai_state,
    plain,
    two_blocks,
    write_archive,
    write_avion,
    write_safetensors,
    write_upstream,
)
from tests.model.field_files import upstream_state as of_upstream

DEMO = geometry("DEMO")
TEMPORAL, SPATIAL = "visual.temporal_embedding", "visual.positional_embedding"


def copy(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def loaded(model: nn.Module, state: State) -> WeightReport:
    return load_weights(model, from_tensors("checkpoint", state))


def refuse(model: nn.Module, state: State, message: str, **options: object) -> None:
    """Loading fails with ``message`` in one line, and the model stays as it was."""
    before = copy(model)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(model, from_tensors("x.safetensors", state), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"half loaded: {name}"


def accounted(report: WeightReport, model: nn.Module, file: int) -> None:
    """Every tensor of the file and of the model is in exactly one list."""
    used = [*report.taken, *report.resized]
    assert sorted([*used, *report.missing]) == sorted(model.state_dict())
    assert len(used) + len(report.dropped) == file


# --------------------------------------------------------------------------------------------------
# Starting from CLIP
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["OpenAI's archive", "OpenAI's state dict", "open_clip's safetensors"])
def test_the_published_start_leaves_projections_and_temperature(
    demo_model: DualEncoder, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "clip.pt"
    state = open_clip_state(DEMO) if "open_clip" in kind else openai_state(DEMO)
    if kind == "OpenAI's archive":
        write_archive(path, state)
    elif kind == "OpenAI's state dict":
        torch.save({"state_dict": state}, path)
    else:
        write_safetensors(path, state)
    before = copy(demo_model)
    report = load_weights(demo_model, read_weights(path))
    after = demo_model.state_dict()
    unchanged = {name for name in after if torch.equal(after[name], before[name])}
    # The offset is the sigmoid loss's alone.
    assert unchanged == set(report.missing) == {*PROJECTIONS, TEMPORAL} - {"logit_bias"}
    accounted(report, demo_model, len(state))
    torch.testing.assert_close(after["visual.conv1.weight"], state["visual.conv1.weight"].flatten(1).float())
    torch.testing.assert_close(after["textual.ln_final.bias"], state["ln_final.bias"].float())
    text = str(report)
    assert text.startswith(f"{path} ({report.family}): {len(report.taken)} tensors taken over")
    assert f"{TEMPORAL} (the file has no temporal embedding)" in text
    assert "visual.image_projection, textual.text_projection, logit_scale (started anew)" in text


def test_the_models_projections_can_stay(demo_model: DualEncoder, tmp_path: Path) -> None:
    state = open_clip_state(DEMO) | {"logit_scale": torch.tensor(4.6052)}
    weights = read_weights(write_safetensors(tmp_path / "clip.safetensors", state))
    report = load_weights(demo_model, weights, projections="keep")
    assert set(report.missing) == {TEMPORAL}
    assert torch.equal(demo_model.visual.image_projection, state["visual.proj"])
    assert torch.equal(demo_model.textual.text_projection, state["text_projection"])
    assert demo_model.logit_scale.item() == pytest.approx(4.6052)
    assert report.notes == ["temperature 0.0700 replaced by the file's 0.0100"]
    with pytest.raises(UserError, match="projections is 'yes', but must be auto, fresh or keep"):
        load_weights(demo_model, weights, projections="yes")


def test_projections_of_another_space_name_both_ways_out(demo_model: DualEncoder, tmp_path: Path) -> None:
    weights = read_weights(write_safetensors(tmp_path / "clip.safetensors", open_clip_state(DEMO, embed_dim=96)))
    with pytest.raises(UserError, match=r"image_projection is \[128, 96\] there and \[128, 128\] here \(model\.embed_dim=96 .*projections=fresh"):  # fmt: skip # noqa: E501
        load_weights(demo_model, weights, projections="keep")
    assert load_weights(demo_model, weights).family is Family.OPEN_CLIP
    wide = create_model(ModelConfig(name="DEMO", embed_dim=96))
    load_weights(wide, weights, projections="keep")
    assert wide.encode_text(torch.ones(1, 4, dtype=torch.long)).shape == (1, 96)
    assert wide.geometry.embed_dim == 96


def test_patch_embedding_of_a_convolution_means_the_same(demo_model: DualEncoder, tmp_path: Path) -> None:
    state = openai_state(DEMO)
    torch.save(state, tmp_path / "clip.pt")
    load_weights(demo_model, read_weights(tmp_path / "clip.pt"))
    size, stride = DEMO.image_size, DEMO.patch_size
    frame = torch.randn(1, 3, size, size)
    convolved = F.conv2d(frame, state["visual.conv1.weight"].float(), stride=stride).flatten(2).mT
    visual = demo_model.visual
    nn.init.zeros_(visual.positional_embedding)
    nn.init.zeros_(visual.temporal_embedding)
    ours = visual.embed(frame.unsqueeze(2))[0][:, 1:]
    torch.testing.assert_close(ours, visual.ln_pre(convolved), atol=1e-4, rtol=1e-4)


def test_it_computes_what_open_clip_computes(tmp_path: Path) -> None:
    """One frame through a model that took everything, beside the library that the weights come from."""
    import open_clip

    torch.manual_seed(0)
    theirs = open_clip.CLIP(
        64,
        {"image_size": 40, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
        {"width": 128, "layers": 2, "heads": 4},
    ).eval()
    for module in theirs.visual.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    torch.save(theirs.state_dict(), tmp_path / "open_clip.pt")
    model = create_model(ModelConfig(name="DEMO", embed_dim=64, num_frames=1)).eval()
    load_weights(model, read_weights(tmp_path / "open_clip.pt"), projections="keep")
    frame, tokens = torch.randn(2, 3, 40, 40), torch.randint(1, 49000, (2, 77))
    tokens[:, 9] = 49407
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_video(frame.unsqueeze(2)), theirs.encode_image(frame, normalize=True), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            model.encode_text(tokens), theirs.encode_text(tokens, normalize=True), atol=1e-5, rtol=1e-4
        )


# --------------------------------------------------------------------------------------------------
# Trained video models
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["b16_flash", "b16_plain", "b16_plain_conv"])
def test_upstreams_files_give_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    state = of_upstream(kind)
    model = create_model(ModelConfig(name=two_blocks(monkeypatch, "CLIP_VITB16"), num_frames=4))
    report = load_weights(model, read_weights(write_upstream(tmp_path / "base_best.pt", state)))
    assert (report.family, report.missing, report.dropped, report.resized) == (Family.UPSTREAM, {}, {}, {})
    accounted(report, model, len(state))
    loaded = model.state_dict()
    for name, value in plain(state).items():
        assert torch.equal(loaded[name], value.float().view_as(loaded[name])), name


def test_upstreams_large_model_equals_its_own_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-L/14 at 336 px with the real names and shapes, two blocks deep: read, written again, read again."""
    state = of_upstream("l14_336_flash")
    weights = read_weights(write_upstream(tmp_path / "large_best.pt", state))
    again = upstream_state(weights)
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(again[name], value), name
    name = two_blocks(monkeypatch, "CLIP_VITL14_336PX")
    model = create_model(ModelConfig(name=name, num_frames=4)).eval()
    load_weights(model, weights)
    exported = read_weights(write_safetensors(tmp_path / "again.safetensors", again))
    assert exported.spelling == "flash"
    features = []
    video, tokens = torch.randn(1, 3, 1, 336, 336), torch.tensor([[49406, 320, 49407]])
    with torch.no_grad():
        for each in (weights, exported):
            loaded(model, {key: torch.zeros_like(value) for key, value in model.state_dict().items()})
            load_weights(model, each)
            features.append(torch.cat((model.encode_video(video), model.encode_text(tokens))))
    assert torch.equal(*features)
    assert features[0].norm() > 1


@pytest.mark.parametrize("kind", ["slowfast_b16_flash", "slowfast_l14_336_flash"])
def test_slow_fast_names_are_ours_but_for_the_spelling(tmp_path: Path, kind: str) -> None:
    """A stand-in for the slow-fast model: every live name and shape of upstream's, in the plain spelling."""
    state = of_upstream(kind)
    live = {name: value for name, value in plain(state).items() if ".adapter_2." not in name and ".conv2d." not in name}
    model = named(live)
    report = load_weights(model, read_weights(write_upstream(tmp_path / "slowfast.pt", state)))
    assert not report.missing
    assert not report.resized
    accounted(report, model, len(state))
    for name, value in live.items():
        assert torch.equal(model.state_dict()[name], value.float()), name
    assert set(upstream_state(from_tensors("x", copy(model)))) == set(state) - set(report.dropped)


def test_upstreams_adapters_stand_where_they_were_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the default arrangement the same weights would be another model, and no shape would tell."""
    weights = read_weights(write_upstream(tmp_path / "slowfast.pt", of_upstream("slowfast_b16_flash")))
    name = two_blocks(monkeypatch, "CLIP_VITB16_Slowfast")
    with pytest.raises(UserError, match=r"trained with model\.fast\.position=after, not before"):
        load_weights(create_model(ModelConfig(name=name, num_frames=16)), weights)
    fast = FastPathConfig(position="after", pool="cls")
    report = load_weights(create_model(ModelConfig(name=name, num_frames=16, fast=fast)), weights)
    assert not report.missing
    assert not report.resized


def named(state: State) -> nn.Module:
    """A module with parameters of these names."""
    module = nn.Module()
    for name, value in state.items():
        *path, last = name.split(".")
        inner = module
        for part in path:
            if part not in inner._modules:
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.register_parameter(last, nn.Parameter(torch.zeros(value.shape)))
    return module


def test_avions_space_of_256_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = of_upstream("b16_flash")
    for name in ("visual.image_projection", "textual.text_projection"):
        state[name] = state[name][:, :256].clone()
    weights = read_weights(write_avion(tmp_path / "avion.pt", state))
    name = two_blocks(monkeypatch, "CLIP_VITB16")
    with pytest.raises(UserError, match=r"\[768, 256\] there and \[768, 512\] here \(model\.embed_dim=256"):
        load_weights(create_model(ModelConfig(name=name)), weights)
    report = load_weights(create_model(ModelConfig(name=name, embed_dim=256, image_stats="avion")), weights)
    assert (report.family, report.missing) == (Family.AVION, {})
    assert "image_stats" not in str(report)
    # Training on in a space of one's own.
    report = load_weights(create_model(ModelConfig(name=name)), weights, projections="fresh")
    assert set(report.missing) == {*PROJECTIONS} - {"logit_bias"}


def test_a_run_may_start_from_avion_with_other_statistics_after_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = read_weights(write_avion(tmp_path / "avion.pt", of_upstream("b16_flash")))
    name = two_blocks(monkeypatch, "CLIP_VITB16")
    report = load_weights(create_model(ModelConfig(name=name)), weights)
    assert report.notes[-1] == "AVION trains with model.image_stats=avion, here it is clip"
    assert report.notes[-1] in caplog.text


# --------------------------------------------------------------------------------------------------
# Strictness
# --------------------------------------------------------------------------------------------------


OFF_BY_ONE = (
    *("visual.class_embedding", "visual.conv1.weight", "visual.ln_pre.bias", "visual.image_projection"),
    *(f"visual.transformer.resblocks.3.{name}" for name in ("attn.in_proj_weight", "mlp.c_fc.bias", "ln_2.weight")),
    *("textual.token_embedding.weight", "textual.text_projection"),
)


def test_a_shape_off_by_one_is_named_with_both_shapes(demo_model: DualEncoder) -> None:
    for name in OFF_BY_ONE:
        value = demo_model.get_parameter(name)
        rows = len(value)
        wrong = dict(demo_model.state_dict()) | {name: torch.zeros(rows + 1, *value.shape[1:])}
        refuse(demo_model, wrong, rf"{name} is \[{rows + 1}.*\] there and \[{rows}.*\] here", adapt=True)
    grid = dict(demo_model.state_dict()) | {SPATIAL: torch.zeros(27, 128)}
    refuse(
        demo_model, grid, r"x\.safetensors.*DEMO, 8 frames.*positional_embedding is \[27, 128\] there and \[26, 128\]"
    )


def test_lacking_and_unknown_tensors(demo_model: DualEncoder) -> None:
    whole = dict(demo_model.state_dict())
    lacking = {name: value for name, value in whole.items() if name != "visual.ln_pre.bias"}
    refuse(demo_model, lacking, r"it lacks visual\.ln_pre\.bias", adapt=True)
    unknown = whole | {"visual.head.weight": torch.ones(1)}
    refuse(demo_model, unknown, r"unknown tensors visual\.head\.weight", adapt=True)
    last = {name: value for name, value in whole.items() if name.startswith("visual.transformer.resblocks.3.")}
    deeper = whole | {name.replace(".3.", ".4."): value for name, value in last.items()}
    refuse(demo_model, deeper, r"unknown tensors visual\.transformer\.resblocks\.4\..* and 9 more")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_weights(demo_model: DualEncoder, tmp_path: Path, dtype: torch.dtype) -> None:
    state = copy(demo_model) | {"visual.ln_pre.bias": torch.zeros(128).to(dtype)}
    path = write_safetensors(tmp_path / "x.safetensors", state)
    with pytest.raises(UserError, match=rf"ln_pre\.bias holds {str(dtype).removeprefix('torch.')}, no floating-point"):
        load_weights(demo_model, read_weights(path))


def test_numbers_that_are_not_finite(demo_model: DualEncoder) -> None:
    state = copy(demo_model)
    state["visual.ln_pre.bias"][3] = float("nan")
    refuse(demo_model, state, r"not finite in visual\.ln_pre\.bias")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_become_the_models(demo_model: DualEncoder, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in copy(demo_model).items()}
    loaded(demo_model, state)
    for name, value in demo_model.state_dict().items():
        assert value.dtype is torch.float32
        assert torch.equal(value, state[name].float())


def test_the_offset_of_the_sigmoid_loss_may_come_and_go(demo_model: DualEncoder) -> None:
    sigmoid = create_model(ModelConfig(name="DEMO", num_frames=8), LossConfig(name="sigmoid", bias=-3.0))
    report = loaded(sigmoid, copy(demo_model))
    assert list(report.missing) == ["logit_bias"]
    assert sigmoid.logit_bias is not None
    assert sigmoid.logit_bias.item() == -3.0
    assert list(loaded(demo_model, copy(sigmoid)).dropped) == ["logit_bias"]
    assert "logit_bias" not in upstream_state(from_tensors("x", copy(sigmoid)))
    # It was learned with the file's temperature, so it is kept, or not, with that.
    assert sigmoid.logit_bias is not None
    state = copy(sigmoid) | {"logit_bias": torch.tensor(-16.0)}
    for projections, offset in (("fresh", -3.0), ("keep", -16.0)):
        load_weights(sigmoid, from_tensors("x", state), projections=projections)
        assert sigmoid.logit_bias.item() == offset


# --------------------------------------------------------------------------------------------------
# Adapting
# --------------------------------------------------------------------------------------------------


def adapted(model: nn.Module, state: State, name: str) -> tuple[Tensor, WeightReport]:
    """Without the knob it is an error that names it; with it, the resized tensor."""
    refuse(model, state, rf"{name} is \[.*\] there and \[.*\] here \(model\.weights\.adapt=true resizes it\)")
    report = load_weights(model, from_tensors("x", state), adapt=True)
    assert list(report.resized) == [name]
    accounted(report, model, len(state))
    return model.state_dict()[name], report


def test_another_frame_count_is_interpolated(demo_model: DualEncoder, clips: Tensor) -> None:
    model = create_model(ModelConfig(name="DEMO", num_frames=4)).eval()
    value, report = adapted(model, copy(demo_model), TEMPORAL)
    assert report.resized[TEMPORAL] == "[8, 128] -> [4, 128]"
    own = copy(demo_model)[TEMPORAL]
    torch.testing.assert_close(value, own.view(4, 2, 128).mean(1))
    # The same as when the file's own model is shown four frames.
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(clips[:, :, :4]), demo_model.eval().encode_video(clips[:, :, :4]))


@pytest.mark.parametrize("size", [24, 64])
def test_another_patch_grid_is_resized_bicubically(
    demo_model: DualEncoder, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setitem(GEOMETRIES, "SIZED", Geometry("SIZED", size, 8, 128, 4, 4, 128, 2, 4, 128))
    model = create_model(ModelConfig(name="SIZED", num_frames=8))
    own = copy(demo_model)
    value, _ = adapted(model, own, SPATIAL)
    expected = timm.layers.resample_abs_pos_embed(own[SPATIAL][None], [size // 8, size // 8])[0]
    torch.testing.assert_close(value, expected)
    assert torch.equal(value[0], own[SPATIAL][0]), "CLS stays"


def test_a_grid_that_is_no_square_cannot_be_adapted(demo_model: DualEncoder) -> None:
    for places in (1, 25, 31):
        state = copy(demo_model) | {SPATIAL: torch.zeros(places, 128)}
        refuse(demo_model, state, rf"\[{places}, 128\] there .*no square of patches and CLS", adapt=True)
    refuse(demo_model, copy(demo_model) | {SPATIAL: torch.zeros(37, 64)}, r"\[37, 64\] there", adapt=True)
    refuse(demo_model, copy(demo_model) | {TEMPORAL: torch.zeros(0, 128)}, r"\[0, 128\] there", adapt=True)


@pytest.mark.parametrize("length", [32, 120])
def test_another_text_length_keeps_the_first_positions(
    demo_model: DualEncoder, monkeypatch: pytest.MonkeyPatch, tokens: Tensor, length: int
) -> None:
    longer = Geometry("TEXT", 40, 8, 128, 4, 4, 128, 2, 4, 128, context_length=length)
    monkeypatch.setitem(GEOMETRIES, "TEXT", longer)
    model = create_model(ModelConfig(name="TEXT", num_frames=8)).eval()
    fresh = copy(model)["textual.positional_embedding"]
    value, _ = adapted(model, copy(demo_model), "textual.positional_embedding")
    own = copy(demo_model)["textual.positional_embedding"]
    assert torch.equal(value[:77], own[:length])
    assert torch.equal(value[77:], fresh[77:])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), demo_model.eval().encode_text(tokens))


def test_parts_start_anew_or_are_left_out_only_with_adapt(demo_model: DualEncoder) -> None:
    own = copy(demo_model)
    parts = {
        **{f"visual.transformer.resblocks.{i}.adapter.gamma": torch.ones(1) for i in range(4)},
        "slowfast_projection": torch.ones(256, 128),
    }
    slowfast = named(own | parts)
    refuse(slowfast, own, r"it lacks the motion adapters \(.*and 1 more\); model\.weights\.adapt=true starts them anew")
    report = load_weights(slowfast, from_tensors("x", own), adapt=True)
    assert report.missing.keys() == parts.keys()
    refuse(
        demo_model, own | parts, r"a part that the model has not, motion adapters .*; model\.weights\.adapt=true leaves"
    )
    report = load_weights(demo_model, from_tensors("x", own | parts), adapt=True)
    assert report.dropped.keys() == parts.keys()
    # Half a part is damage, whatever the options.
    half = own | {name: value for name, value in parts.items() if ".2." not in name}
    refuse(slowfast, half, r"it lacks visual\.transformer\.resblocks\.2\.adapter\.gamma", adapt=True)


def test_an_image_model_has_no_order_to_lose(demo_model: DualEncoder) -> None:
    """AVION saves no temporal embedding for one frame; that is a missing part, which is reported and needs adapt."""
    state = {name: value for name, value in copy(demo_model).items() if name != TEMPORAL}
    refuse(demo_model, state, r"it lacks the temporal embedding .*adapt=true")
    assert list(load_weights(demo_model, from_tensors("x", state), adapt=True).missing) == [TEMPORAL]
