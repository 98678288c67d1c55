"""Checkpoints and tokenizers that the transformers library itself writes; skipped where it is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import egohod
from egohod.data.dataset import Tokenizer, tokenizer_for, trim
from egohod.errors import UserError
from egohod.model.checkpoints import Family, read_weights
from egohod.model.config import ModelConfig
from tests.model.field_files import OWN_VIT, SIGLIP, TEXT, on_timm

transformers = pytest.importorskip("transformers", reason="needs transformers, which the project does not require")

TOLERANCE = {"atol": 2e-5, "rtol": 0}
VOCABULARY, LENGTH = 99, 24
VISION = {
    "hidden_size": 48, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def text_of(width: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
    return {**sizes, **ids, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, **more}


def write_hub(folder: Path, kind: str, activation: str, **options: Any) -> Any:
    """A model of transformers with random weights, saved by itself; open_clip's configuration of the same beside it."""
    torch.manual_seed(0)
    vision = VISION | {"hidden_act": activation}
    words = {"vocab_size": VOCABULARY, "context_length": LENGTH, "heads": 2, "mlp_ratio": 4.0}
    if kind == "CLIP":
        parts = {"text_config": text_of(32, hidden_act=activation), "vision_config": vision, "projection_dim": 40}
        model = transformers.CLIPModel(transformers.CLIPConfig(**parts))
        config = {"embed_dim": 40, "vision_cfg": OWN_VIT, "text_cfg": TEXT | words}
        config |= {"quick_gelu": activation == "quick_gelu"}
    else:
        text = text_of(48, projection_size=48, hidden_act="gelu_pytorch_tanh")
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        tower = SIGLIP | words | {"act_kwargs": {"approximate": "tanh"}}
        config = {"embed_dim": 48, "vision_cfg": on_timm("tiny_siglip", "map", "none"), "text_cfg": tower}
        config |= {"init_logit_bias": -10, "custom_text": True}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder, **options)
    (folder / "open_clip").mkdir()
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return model


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}], ids=["one-file", "shards"])
@pytest.mark.parametrize(
    ("kind", "activation", "backbone"),
    [
        ("CLIP", "quick_gelu", {}),
        ("CLIP", "gelu", {}),
        ("SigLIP", "gelu", {"mlp_ratio": 3.0}),
        ("SigLIP", "gelu_pytorch_tanh", {"mlp_ratio": 3.0, "act_layer": "gelu_tanh"}),
    ],
)
def test_both_towers_give_transformers_features(
    tmp_path: Path, kind: str, activation: str, backbone: dict[str, Any], options: dict[str, Any]
) -> None:
    theirs = write_hub(tmp_path, kind, activation, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(options)
    weights = read_weights(tmp_path)
    assert weights.family is Family.TRANSFORMERS
    assert weights.settings == ({"model.activation": activation} if kind == "CLIP" else {})
    model = egohod.create_model(f"open_clip/{tmp_path}/open_clip", num_frames=1, backbone=backbone).eval()
    report = egohod.load_weights(model, tmp_path)
    assert {*report.missing} == {"visual.temporal_embedding"}
    assert not report.dropped
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(3, VOCABULARY - 3, (5, LENGTH))
    tokens[:, 9], tokens[:, 10:] = VOCABULARY - 1, 0
    with torch.inference_mode():
        expected = theirs(pixel_values=images, input_ids=tokens)
        torch.testing.assert_close(model.encode_video(images.unsqueeze(2)), expected.image_embeds, **TOLERANCE)
        torch.testing.assert_close(model.encode_text(tokens), expected.text_embeds, **TOLERANCE)
    torch.testing.assert_close(model.logit_scale, theirs.logit_scale.reshape(()))
    assert (model.logit_bias is None) == (kind == "CLIP")
    if model.logit_bias is not None:
        torch.testing.assert_close(model.logit_bias, theirs.logit_bias.reshape(()))


def test_siglip_2_of_variable_resolution_is_refused(tmp_path: Path) -> None:
    vision = {name: value for name, value in VISION.items() if name != "image_size"} | {"num_patches": 16}
    config = transformers.Siglip2Config(text_config=text_of(48, projection_size=48), vision_config=vision)
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="NaFlex"):
        read_weights(tmp_path)


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    """A tiny tokenizer with the ids of Gemma's, which SigLIP 2 has: padding 0, end of text 1."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["c cuts the onion with the knife", "c opens the drawer"], trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    folder = tmp_path / "gemma"
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return folder


def read_tokenizer(folder: Path, **changes: Any) -> Tokenizer:
    """SigLIP 2's, from a folder whose tokenizer_config.json has other values."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tokenizer_for(ModelConfig(text="ViT-B-16-SigLIP2", tokenizer=str(folder)))


def test_texts_are_padded_behind_their_end(gemma: Path) -> None:
    tokenize = read_tokenizer(gemma)
    tokens = tokenize(["C cuts the onion!", "", "opens the drawer " * 50])
    assert (tokens.shape, tokens.dtype) == ((3, 64), torch.int64)
    ends = [int((row == 1).int().argmax()) for row in tokens[:2]]
    assert (ends[0] > 2, ends[1]) == (True, 0)
    for row, end in zip(tokens[:2], ends, strict=True):
        assert not row[end + 1 :].any()
        assert row[: end + 1].all()
    # The end stays last of a text that is cut.
    assert tokens[2, -1] == 1
    # As SigLIP 2 was trained: neither case nor punctuation.
    assert torch.equal(tokenize(["c CUTS, the onion"]), tokens[:1])
    assert trim(tokens[:2]).shape[1] < 64
    # Gemma's class pads in front unless its files say otherwise.
    assert torch.equal(read_tokenizer(gemma, padding_side="left")(["C cuts the onion!"]), tokens[:1])


def test_code_in_the_folder_of_a_tokenizer_is_not_run(
    gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gemma / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    # Whoever has a terminal would be asked, and may answer yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="no readable tokenizer"):
        read_tokenizer(gemma, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    assert not (tmp_path / "ran").exists()
