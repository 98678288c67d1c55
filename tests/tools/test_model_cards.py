"""Model cards: their numbers against the models, the page of the docs, and mistakes."""

from __future__ import annotations

import re

import model_cards
import open_clip
import pytest
import timm
import torch

import egohod
from egohod.config import model_config
from egohod.errors import UserError
from egohod.model.cards import UNKNOWN, published_weights
from egohod.model.config import GEOMETRIES, FastPathConfig, geometry
from egohod.model.cost import clip_flops
from tests.support import ROOT

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.ci
def test_the_page_of_the_docs_is_current() -> None:
    assert model_cards.page() == PAGE


def test_rows_of_the_docs_are_current() -> None:
    for name in (*GEOMETRIES, *model_cards.OTHERS):
        assert f"| `{name}` |" in PAGE
    rows = model_cards.page(["DEMO", "timm/vit_base_patch16_dinov3.lvd1689m", "open_clip/ViT-B-16"]).splitlines()
    rows = [row for row in rows if row.startswith("| `")]
    assert len(rows) > 3
    for row in rows:
        assert row in PAGE.splitlines()


@pytest.mark.parametrize("name", ["DEMO_SMALL", "DEMO_SMALL_Slowfast"])
def test_numbers_are_those_of_the_model(name: str) -> None:
    card, model = egohod.model_info(name), egohod.create_model(name)
    slowfast = name.endswith("Slowfast")
    assert (card.frames, card.resolution, card.patch_size, card.embed_dim) == (16 if slowfast else 4, 32, 8, 96)
    assert card.vision_parameters == sum(
        parameter.numel()
        for key, parameter in egohod.create_model(name, num_frames=card.frames).visual.named_parameters()
    )
    assert card.text_parameters == sum(parameter.numel() for parameter in model.textual.parameters())
    assert card.parameters >= card.vision_parameters + card.text_parameters
    assert card.tokens == (1 + 16 * 16 + 1 + 4 * 16 if slowfast else 1 + 4 * 16)
    formula = clip_flops(model.geometry, card.frames, 77, fast=FastPathConfig()).forward / 1e9
    assert card.gflops + card.text_gflops == pytest.approx(formula, rel=0.03)
    assert egohod.model_info(name, num_frames=8).gflops < 8 / card.frames * card.gflops * 1.1


def test_a_card_allocates_nothing() -> None:
    before = torch.get_rng_state()
    card = egohod.model_info("CLIP_VITL14_336PX_Slowfast")
    assert torch.equal(torch.get_rng_state(), before)
    # SPEC of upstream's slow-fast L, without the weights that it never uses.
    assert card.parameters == pytest.approx(460e6, rel=0.01)
    assert not card.weights


def test_licences_are_quoted_with_where_they_are_stated() -> None:
    for name in egohod.list_models():
        for each in published_weights(name):
            assert all(each), each
    (upstream,) = [each for each in published_weights("CLIP_VITL14_336PX") if "EgoHOD" in each.file]
    assert upstream.licence == UNKNOWN
    (dino,) = published_weights("timm/vit_base_patch16_dinov3.lvd1689m_Slowfast")
    assert dino.licence == "dinov3-license"
    assert dino.stated.startswith("pretrained_cfg of timm")
    assert {each.licence for each in published_weights("open_clip/ViT-B-16-SigLIP2")} == {UNKNOWN}
    by_file = {each.file: each for each in published_weights("open_clip/ViT-B-16")}
    assert by_file["ViT-B-16:laion2b_s34b_b88k"][2:] == ("MIT", "model card")
    assert by_file["ViT-B-16:openai"].licence == "MIT"
    assert by_file["ViT-B-16:metaclip_400m"].licence == "cc-by-nc-4.0"  # the same file in timm's list
    assert by_file["ViT-B-16:dfn2b"].licence == UNKNOWN
    assert not published_weights("open_clip/ViT-none")
    assert not published_weights("timm/none")


def test_models_are_listed_and_a_wrong_name_has_a_nearest_one() -> None:
    names = egohod.list_models()
    for name in ("CLIP_VITB16", "timm/vit_base_patch16_dinov3", "open_clip/ViT-B-16-SigLIP2"):
        assert name in names
    for name in ("timm/resnet50", "timm/deit_base_distilled_patch16_224", "open_clip/RN50", "open_clip/coca_base"):
        assert name not in names
    assert all(name.endswith("_Slowfast") for name in egohod.list_models("*_Slowfast"))
    assert {"timm/vit_base_patch16_siglip_224", "open_clip/ViT-B-16-SigLIP"} <= {*egohod.list_models("*SigLIP*")}
    assert egohod.list_models(["DEMO", "timm/eva02_base*clip*"]) == ["DEMO", "timm/eva02_base_patch16_clip_224"]
    tagged = egohod.list_models("timm/vit_base_patch16_siglip_224*", pretrained=True)
    assert "timm/vit_base_patch16_siglip_224.v2_webli" in tagged
    assert not egohod.list_models("none")
    with pytest.raises(UserError, match=r"VITB.*did you mean CLIP_VITB16\?"):
        egohod.model_info("CLIP_VITB")
    for name, near in (
        ("vit_base_patch16_clip_224", "timm/vit_base_patch16_clip_224"),
        ("ViT-B-16-SigLIP2", "open_clip/ViT-B-16-SigLIP2"),
    ):
        with pytest.raises(UserError, match=rf"did you mean {near}\?"):
            egohod.model_info(name)
    with pytest.raises(UserError, match="num_frame"):
        egohod.model_info("DEMO", num_frame=8)
    page = model_cards.page(["DEMO_SMALL"])
    assert len(re.findall(r"^\| `", page, re.MULTILINE)) == 1


@pytest.mark.ci
def test_listed_is_what_can_be_built() -> None:
    listed = {*egohod.list_models()}
    modules = ["vision_transformer", "eva", "deit"]
    names = [f"timm/{name}" for name in timm.list_models(module=modules) if not name.startswith("test_")]
    for name in [*names, *(f"open_clip/{name}" for name in open_clip.list_models())]:
        try:
            geometry(name)
        except UserError:
            assert name not in listed
        else:
            assert name in listed


def test_a_model_of_open_clip_has_a_card() -> None:
    card = egohod.model_info("open_clip/EVA02-B-16", num_frames=2)
    assert (card.frames, card.resolution, card.patch_size, card.embed_dim) == (2, 224, 16, 512)
    assert card.tokens == 1 + 2 * 14**2
    assert card.parameters == pytest.approx(149.7e6, rel=0.01)
    # 17.6 GFLOPs a picture, and what frames add by attending to each other.
    assert 2 * 33 < card.gflops < 2 * 40
    assert {each.file for each in card.weights} >= {"EVA02-B-16:merged2b_s8b_b131k"}


@pytest.mark.parametrize("name", ["timm/vit_base_patch16_siglip_224", "timm/vit_pe_core_tiny_patch16_384_Slowfast"])
def test_attention_pooling_is_counted(name: str) -> None:
    card = egohod.model_info(name, backbone={"depth": 1}, num_frames=4)
    formula = clip_flops(model_config(name, backbone={"depth": 1}).geometry(), 4, 77).forward / 1e9
    assert card.gflops + card.text_gflops == pytest.approx(formula, rel=0.03)
