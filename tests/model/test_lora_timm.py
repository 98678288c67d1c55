"""Low-rank training of towers on timm's backbones."""

from __future__ import annotations

import pytest
import torch

from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.cards import model_info
from egohod.model.config import LoraConfig
from egohod.model.cost import predict
from egohod.model.lora import add_low_rank, merge_low_rank
from tests.model.test_timm_vision import ALL, build, clips, config


@pytest.mark.parametrize("slowfast", [False, True])
@pytest.mark.parametrize("family", ALL)
def test_every_part_learns_and_merged_weights_are_a_plain_model(family: str, slowfast: bool) -> None:
    video = clips(side=ALL[family][2])
    tokens = torch.tensor([[49406, 320, 49407], [49406, 1000, 49407]])
    # Some draw random positions in training mode.
    model = build(family, slowfast).eval()
    before = model(video, tokens)
    add_low_rank(model, LoraConfig(rank=4))
    for key, value in model(video, tokens).items():
        assert torch.equal(value, before[key]), key
    model.freeze("lora")
    for name, parameter in model.named_parameters():
        if name.endswith(".lora.up"):
            torch.nn.init.normal_(parameter, std=0.02)
    output = model(video, tokens)
    ContrastiveLoss()(**output)["loss"].backward()
    parts = {name: parameter for name, parameter in model.named_parameters() if ".lora." in name}
    of_vision = {name for name in parts if name.startswith("visual.")}
    # Queries, keys and values may be one matrix, the MLP have two or three.
    assert len(of_vision) >= 2 * 2 * 4
    assert not [name for name, parameter in parts.items() if parameter.grad is None or not parameter.grad.any()]
    blocks = {name for name, parameter in model.named_parameters() if ".resblocks." in name and parameter.requires_grad}
    assert {name for name in blocks if ".adapter." not in name} == parts.keys()
    plain = build(family, slowfast).eval()
    plain.load_state_dict(merge_low_rank(model.state_dict())[0])
    for key, value in plain(video, tokens).items():
        torch.testing.assert_close(value, output[key], atol=5e-6, rtol=1e-5)


def test_memory_and_cards_follow() -> None:
    shape = config("dinov3")
    learning = set(dict(build("dinov3").named_parameters()))
    low, whole = predict(shape, learning=set(), lora=LoraConfig(rank=4)), predict(shape, learning=learning)
    assert low.state < whole.state
    card = model_info("timm/vit_base_patch16_dinov3", num_frames=2)
    assert card.tokens == 1 + 4 + 2 * (card.resolution // 16) ** 2
    assert card.vision_parameters > 80e6
    assert card.weights[0].licence == "dinov3-license"
