"""Both towers of open_clip's models: the features, settings and weights of its own, at tiny sizes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import egohod
from egohod.errors import UserError
from egohod.model.checkpoints import Family, read_weights
from egohod.model.config import IMAGE_STATS, ImageStats, geometry, image_stats, stats_name
from tests.model.field_files import (
    HALVES,
    OPEN_CLIP_FAMILIES,
    SIGLIP,
    State,
    tiny_siglip,
    write_open_clip,
    write_safetensors,
)

# open_clip's own tolerance for another order of sums: float32, features of about unit length.
TOLERANCE = {"atol": 2e-5, "rtol": 0}


def some_tokens(family: str) -> Tensor:
    """As many tokens as the tower reads, and zeros behind some of them."""
    text = OPEN_CLIP_FAMILIES[family][0]["text_cfg"]
    tokens = torch.randint(3, text["vocab_size"], (5, text["context_length"]))
    tokens[:, 9] = 2  # the end of text for pooling by it
    if "hf_tokenizer_name" not in text and text.get("pool_type", "argmax") == "argmax":
        tokens[:, 9] = text["vocab_size"] - 1
    tokens[:, 10:] = 0
    return tokens


@pytest.mark.parametrize("family", OPEN_CLIP_FAMILIES)
def test_both_towers_give_open_clips_features(tmp_path: Path, family: str) -> None:
    theirs = write_open_clip(tmp_path, family)
    model = egohod.create_model(f"open_clip/{tmp_path}", num_frames=1).eval()
    report = egohod.load_weights(model, tmp_path)
    assert not report.dropped
    # A whole model: its projections and its temperature are taken too.
    assert {*report.missing} == {"visual.temporal_embedding"}
    images, tokens = torch.randn(3, 3, 32, 32), some_tokens(family)
    with torch.inference_mode():
        for normalize in (True, False):
            expected = theirs.encode_image(images, normalize=normalize)  # type: ignore[operator]
            torch.testing.assert_close(model.encode_video(images.unsqueeze(2), normalize), expected, **TOLERANCE)
            expected = theirs.encode_text(tokens, normalize=normalize)  # type: ignore[operator]
            torch.testing.assert_close(model.encode_text(tokens, normalize), expected, **TOLERANCE)
            # Columns of zeros are cut before they reach the device.
            torch.testing.assert_close(model.encode_text(tokens[:, :16], normalize), expected, **TOLERANCE)
    torch.testing.assert_close(model.logit_scale, theirs.logit_scale)
    assert (model.logit_bias is None) == (theirs.logit_bias is None)
    if model.logit_bias is not None:
        torch.testing.assert_close(model.logit_bias, theirs.logit_bias)
    config, pixels = OPEN_CLIP_FAMILIES[family]
    assert model.geometry.image_size == 32
    assert model.image_stats == (tuple(pixels["mean"]), tuple(pixels["std"]))
    assert model.activation == ("quick_gelu" if config.get("quick_gelu") else "gelu")
    assert model.geometry.context_length == config["text_cfg"]["context_length"]


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------


def test_a_name_of_open_clip_says_all_of_both_towers() -> None:
    shape = geometry("open_clip/ViT-B-16-SigLIP2")
    assert (shape.backbone, shape.image_size, shape.pool) == ("vit_base_patch16_siglip_224", 224, "map")
    assert (shape.projection, shape.embed_dim, shape.context_length, shape.vocab_size) == ("none", 768, 64, 256_000)
    assert (shape.text.causal, shape.text.pool, shape.text.projection) == (False, "last", "linear")
    assert (shape.text.activation, shape.text.tokenizer) == ("gelu_tanh", "timm/ViT-B-16-SigLIP2")
    assert (shape.image_stats, shape.logit_bias) == (IMAGE_STATS["inception"], -10.0)
    # A vision transformer of open_clip itself is our own tower, with the norms of OpenAI's model.
    shape = geometry("open_clip/ViT-B-16-quickgelu_Slowfast")
    assert (shape.backbone, shape.activation, shape.norm_eps, shape.slowfast) == ("", "quick_gelu", 1e-5, True)
    assert shape.image_stats == IMAGE_STATS["clip"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-16-SigLIP3", r"open_clip has no model 'ViT-B-16-SigLIP3' \(the nearest are .*ViT-B-16-SigLIP2"),
        ("RN50", "its vision tower is a ResNet, which is not supported"),
        ("ViT-H-14-CLIPA", "vision transformer with no_ln_pre, which is not supported"),
        ("convnext_base", "ConvNeXt, no plain vision transformer; the nearest vision transformers are"),
        ("roberta-ViT-B-32", "has hf_model_name, which is not supported"),
        ("coca_ViT-B-32", "is of CoCa, which is not supported"),
    ],
)
def test_models_of_another_kind_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        egohod.create_model(f"open_clip/{name}")


def test_statistics_have_names_and_numbers() -> None:
    for name in IMAGE_STATS:
        assert stats_name(image_stats(name)) == name
    own = ImageStats((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert image_stats(stats_name(own)) == own
    assert stats_name(ImageStats((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))) == "clip"
    for wrong in ("openai", "0.5,0.5/0.5,0.5", "0.5,0.5,0.5/0,1,1"):
        with pytest.raises(UserError, match="must be auto, clip, avion"):
            egohod.create_model("DEMO", image_stats=wrong)


def test_a_text_tower_goes_with_another_vision_tower(tmp_path: Path) -> None:
    theirs = write_open_clip(tmp_path, "SigLIP 2")
    model = egohod.create_model("DEMO", text=str(tmp_path)).eval()
    assert (model.geometry.embed_dim, model.geometry.image_size) == (48, 40)
    state = {f"textual.{name}": value for name, value in theirs.text.state_dict().items()}  # type: ignore[union-attr]
    model.load_state_dict(state, strict=False)
    tokens = some_tokens("SigLIP 2")
    expected = theirs.encode_text(tokens)  # type: ignore[operator]
    torch.testing.assert_close(model.encode_text(tokens, normalize=False), expected, **TOLERANCE)
    with pytest.raises(UserError, match=r"its 48 dimensions are the shared space, which would have 32"):
        egohod.create_model(f"open_clip/{tmp_path}", embed_dim=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hf_tokenizer_name": "../../x:y"}, r"'\.\./\.\./x:y', no repository; set model\.tokenizer"),
        ({"hf_tokenizer_name": 5}, "its tokenizer is 5, cleaned by"),
        ({"hf_tokenizer_name": "a\0b"}, "its tokenizer is "),
        ({"tokenizer_kwargs": {"clean": "away"}}, "cleaned by 'away'"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_open_clip(tmp_path, "SigLIP")
    path = tmp_path / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["text_cfg"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        egohod.create_model_and_transforms(str(tmp_path))


def test_the_resolution_is_that_of_the_configuration(tmp_path: Path) -> None:
    """Also where the name of a backbone says another one."""
    write_open_clip(tmp_path, "SigLIP")
    path = tmp_path / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["vision_cfg"]["image_size"] = 48
    path.write_text(json.dumps(content))
    model = egohod.create_model(f"open_clip/{tmp_path}", num_frames=1)
    assert (model.geometry.image_size, model.visual.pos_embed.shape[1]) == (48, 36)
    with pytest.raises(UserError, match=r"pos_embed is \[1, 16, 48\] there and \[1, 36, 48\] here .*adapt=true"):
        egohod.load_weights(model, tmp_path)


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def in_transformers(state: State) -> State:
    """Weights of open_clip's model in the published layout of ``CLIPModel`` and ``SiglipModel``."""
    result: State = {}
    blocks = {"visual.transformer.resblocks": "vision_model", "visual.trunk.blocks": "vision_model"}
    blocks |= {"transformer.resblocks": "text_model", "text.transformer.resblocks": "text_model"}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "norm1": "layer_norm1", "norm2": "layer_norm2"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}
    parts |= {"attn.proj": "self_attn.out_proj"}
    starts = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
        "visual.trunk.norm": "vision_model.post_layernorm", "visual.proj": "visual_projection.weight",
        "visual.trunk.attn_pool.latent": "vision_model.head.probe",
        "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
        "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
        "visual.trunk.attn_pool.mlp": "vision_model.head.mlp",
        "text.text_projection": "text_model.head", "text_projection": "text_projection.weight",
        "ln_final": "text_model.final_layer_norm", "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
    }  # fmt: skip
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if block := re.fullmatch(r"(.*(?:resblocks|trunk\.blocks))\.(\d+)\.(.*)", name):
            tower, number, part = block.groups()
            place = f"{blocks[tower]}.encoder.layers.{number}"
            if third := re.fullmatch(r"attn\.(?:in_proj_|qkv\.)(weight|bias)", part):
                for letter, each in zip("qkv", value.chunk(3), strict=True):
                    result[f"{place}.self_attn.{letter}_proj.{third[1]}"] = each
            else:
                part = part.rpartition(".")[0]
                result[f"{place}.{parts.get(part, part)}.{kind}"] = value
        elif name.startswith(("visual.trunk.attn_pool.q.", "visual.trunk.attn_pool.kv.")):
            both = [state[f"visual.trunk.attn_pool.{part}.{kind}"] for part in ("q", "kv")]
            result[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat(both)
        else:
            is_text = name.startswith("text.") and stem != "text.text_projection"
            name = name.removeprefix("text.") if is_text else name
            start = next((each for each in starts if name == each or name.startswith(f"{each}.")), name)
            value = value[0] if name == "visual.trunk.pos_embed" else value
            value = value.T if name in ("visual.proj", "text_projection") else value
            result[starts.get(start, start) + name.removeprefix(start)] = value
    return result


@pytest.mark.parametrize("family", ["CLIP", "SigLIP 2"])
def test_names_of_transformers_are_the_same_weights(tmp_path: Path, family: str) -> None:
    state = write_open_clip(tmp_path, family).state_dict()
    ours = read_weights(tmp_path).tensors
    hub = tmp_path / "hub"
    hub.mkdir()
    theirs = in_transformers(state) | {"text_model.embeddings.position_ids": torch.arange(24)}
    assert {name.split(".")[0] for name in theirs} >= {"vision_model", "text_model", "logit_scale"}
    write_safetensors(hub / "model.safetensors", theirs, format="pt")
    (hub / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    weights = read_weights(hub)
    assert weights.family is Family.TRANSFORMERS
    assert weights.settings == {"model.image_stats": "inception"}
    assert weights.dropped == {"text_model.embeddings.position_ids": "constants"}
    assert weights.tensors.keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in weights.tensors.items())
    # Pixels divided by these would be infinite, or no numbers.
    for mean, std in ((0.5, 0.0), (float("nan"), 0.5)):
        (hub / "preprocessor_config.json").write_text(json.dumps({"image_mean": [mean] * 3, "image_std": [std] * 3}))
        with pytest.raises(UserError, match=r"model\.image_stats is"):
            read_weights(hub)
    (hub / "preprocessor_config.json").unlink()
    if family == "SigLIP 2":
        patches = "vision_model.embeddings.patch_embedding.weight"
        write_safetensors(hub / "model.safetensors", theirs | {patches: theirs[patches].flatten(1)})
        with pytest.raises(UserError, match="NaFlex"):
            read_weights(hub)


def write_form(folder: Path, form: str, state: State) -> Path:
    """``state`` as one of the forms that are read; the path to open."""
    folder.mkdir()
    if form == "one pickle":
        torch.save({"state_dict": state, "epoch": 3}, folder / "epoch_3.pt")
        return folder / "epoch_3.pt"
    if form == "a folder with pickle":
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    if form == "one safetensors":
        return write_safetensors(folder / "weights.safetensors", state)
    if form == "a folder":
        write_safetensors(folder / "open_clip_model.safetensors", state)
        # Of the same model for transformers, which does not count.
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
        return folder
    suffix = "safetensors" if form.endswith("safetensors") else "bin"
    index: dict[str, str] = {}
    for number, part in enumerate((list(state)[::2], list(state)[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.{suffix}"
        tensors = {name: state[name] for name in part}
        if suffix == "bin":
            torch.save(tensors, folder / shard)
        else:
            write_safetensors(folder / shard, tensors)
        index |= dict.fromkeys(part, shard)
    path = folder / f"model.{suffix}.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    return folder if form.startswith("a folder") else path


FORMS = (
    *("one safetensors", "one pickle", "a folder", "a folder with pickle", "a folder of shards, safetensors"),
    *("an index of shards, safetensors", "a folder of shards, bin"),
)


@pytest.mark.parametrize("family", ["CLIP", "SigLIP 2", "EVA-CLIP", "PE", "a projection behind the backbone"])
def test_every_form_of_file_with_any_prefix_is_the_same_weights(tmp_path: Path, family: str) -> None:
    """Also in half precision, and with the names of transformers where it has the model."""
    state = write_open_clip(tmp_path / "hub", family).state_dict()
    model = egohod.create_model(f"open_clip/{tmp_path}/hub", num_frames=1)
    egohod.load_weights(model, tmp_path / "hub")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    prefixes = ["", "module.", "_orig_mod.module.", "module._orig_mod.", "model."]
    layouts = {"open_clip": state} | (
        {"transformers": in_transformers(state)} if family in ("CLIP", "SigLIP 2") else {}
    )
    for number, (form, (layout, weights)) in enumerate(itertools.product(FORMS, layouts.items())):
        prefix, is_half = prefixes[number % len(prefixes)], number % 3 == 1
        named = {prefix + name: value.bfloat16() if is_half else value for name, value in weights.items()}
        path = write_form(tmp_path / f"{number}", form, named)
        for value in model.state_dict().values():
            value.fill_(7.0)
        report = egohod.load_weights(model, path)
        case = f"{form}, {layout}, {prefix!r}"
        assert (report.dropped, {*report.missing}) == ({}, {"visual.temporal_embedding"}), case
        for name, value in model.state_dict().items():
            wanted = expected[name].bfloat16().float() if is_half else expected[name]
            assert name == "visual.temporal_embedding" or torch.equal(value, wanted), f"{case}: {name}"


def test_a_backbone_alone_is_the_vision_tower(tmp_path: Path) -> None:
    """As timm's files are: with a classifier, and the pixels that it expects in config.json."""
    torch.manual_seed(0)
    backbone = tiny_siglip(num_classes=10)
    write_safetensors(tmp_path / "model.safetensors", backbone.state_dict(), format="pt")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": HALVES}))
    weights = read_weights(tmp_path)
    assert (weights.family, weights.settings) == (Family.TIMM, {"model.image_stats": "inception"})
    assert {*weights.dropped} == {"head.weight", "head.bias"}
    # As scripts of timm save it.
    content = {
        "arch": "tiny_siglip",
        "state_dict": {f"module._orig_mod.{k}": v for k, v in backbone.state_dict().items()},
    }
    torch.save(content | {"state_dict_ema": backbone.state_dict()}, tmp_path / "last.pth.tar")
    assert read_weights(tmp_path / "last.pth.tar").tensors.keys() == weights.tensors.keys()
    model = egohod.create_model("timm/tiny_siglip", num_frames=1).eval()
    report = egohod.load_weights(model, tmp_path)
    assert {name.split(".")[0] for name in report.missing} == {"visual", "textual", "logit_scale"}
    assert {name for name in report.missing if name.startswith("visual")} == {
        "visual.image_projection",
        "visual.temporal_embedding",
    }
    images = torch.randn(2, 3, 32, 32)
    backbone.reset_classifier(0)
    expected = backbone.eval()(images) @ model.visual.image_projection
    torch.testing.assert_close(model.visual(images.unsqueeze(2)), expected, **TOLERANCE)
    # Another grid of patches.
    larger = egohod.create_model("timm/tiny_siglip", num_frames=1, image_size=48)
    with pytest.raises(UserError, match=r"pos_embed is \[1, 16, 48\] there and \[1, 36, 48\] here .*adapt=true"):
        egohod.load_weights(larger, tmp_path)
    assert "visual.pos_embed" in egohod.load_weights(larger, tmp_path, adapt=True).resized


def test_weights_of_another_text_tower_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("SigLIP", "words")]
    write_open_clip(folders[0], "SigLIP")
    write_open_clip(folders[1], "SigLIP")
    path = folders[1] / "open_clip_config.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"vocab_size": 91}, r"token_embedding\.weight is \[90, 48\] there and \[91, 48\] here \(it is of another"),
        ({"proj_bias": False}, r"it lacks textual\.text_projection \(its text tower is another one, which model\.text"),
    ):
        changed = content["model_cfg"] | {"text_cfg": SIGLIP | change}
        path.write_text(json.dumps(content | {"model_cfg": changed}))
        model = egohod.create_model(f"open_clip/{folders[1]}", num_frames=1)
        with pytest.raises(UserError, match=message):
            egohod.load_weights(model, folders[0])
