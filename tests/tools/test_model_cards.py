"""Model cards: their numbers against the models, the page of the docs, and mistakes."""

from __future__ import annotations

import re

import model_cards
import pytest
import torch

import egohod
from egohod.errors import UserError
from egohod.model.cards import UNKNOWN, published_weights
from egohod.model.config import FastPathConfig
from egohod.model.cost import clip_flops
from tests.support import ROOT


def test_the_page_of_the_docs_is_current() -> None:
    assert model_cards.page() == (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


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
    assert not published_weights("open_clip/ViT-none")
    assert not published_weights("timm/none")


def test_models_are_listed_and_a_wrong_name_has_a_nearest_one() -> None:
    assert "CLIP_VITB16" in egohod.list_models()
    assert egohod.list_models("*_Slowfast")
    assert all(name.endswith("_Slowfast") for name in egohod.list_models("*_Slowfast"))
    with pytest.raises(UserError, match=r"VITB.*did you mean CLIP_VITB16\?"):
        egohod.model_info("CLIP_VITB")
    with pytest.raises(UserError, match="num_frame"):
        egohod.model_info("DEMO", num_frame=8)
    page = model_cards.page(["DEMO_SMALL"])
    assert len(re.findall(r"^\| `", page, re.MULTILINE)) == 1
