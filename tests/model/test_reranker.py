"""The reranking head: its tokens, its start, any batch of pairs as pairs alone, and its file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from egohod.data.dataset import Tokenizer
from egohod.errors import UserError
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import create_model
from egohod.model.reranker import Reranker, RerankerShape, grid_tokens, load_reranker

SHAPE = RerankerShape(video_width=12, text_width=8, frames=3, grid=2, width=16, parts=3, heads=2, encoder="abc")


def pairs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    clips, words = torch.randn(5, 12, 12, generator=generator), torch.randn(4, 6, 8, generator=generator)
    return clips, words, mask, torch.rand(5, 4, generator=generator)


def trained() -> Reranker:
    """As after training: a new head adds nothing."""
    torch.manual_seed(0)
    head = Reranker(SHAPE).eval()
    torch.nn.init.normal_(head.target.weight)
    return head


def test_a_new_head_keeps_the_ranking_of_the_dual_encoder() -> None:
    clips, words, mask, cosines = pairs()
    torch.testing.assert_close(Reranker(SHAPE)(clips, words, mask, cosines), 10 * cosines)


@torch.no_grad()
def test_pairs_of_a_batch_are_pairs_alone_and_padding_counts_nothing() -> None:
    head, (clips, words, mask, cosines) = trained(), pairs()
    whole = head(clips, words, mask, cosines)
    for i in range(5):
        for j in range(4):
            length = int(mask[j].sum())
            alone = head(
                clips[i : i + 1], words[j : j + 1, :length], mask[j : j + 1, :length], cosines[i, j].view(1, 1)
            )
            torch.testing.assert_close(alone[0, 0], whole[i, j], atol=1e-5, rtol=1e-5)
    # Words, places and times are read.
    assert not torch.allclose(head(clips.flip(1), words, mask, cosines), whole)
    assert not torch.allclose(head(clips, words.flip(0), mask, cosines), whole)


@pytest.mark.parametrize("name", ["DEMO", "DEMO_Slowfast"])
@torch.no_grad()
def test_tokens_of_both_kinds_of_towers_are_averages_of_regions(name: str) -> None:
    model = create_model(ModelConfig(name=name, num_frames=4)).eval()
    size = model.geometry.image_size
    video = torch.randn(2, 3, 4, size, size)
    tokens = model.visual.tokens(video)
    assert tokens.shape == (2, 4 * model.geometry.patches_per_frame, model.geometry.vision_width)
    one, four = grid_tokens(model, video, 1), grid_tokens(model, video, 2)
    assert (one.shape[1], four.shape[1]) == (4, 16)
    torch.testing.assert_close(one[:, 2], tokens.unflatten(1, (4, -1))[:, 2].mean(dim=1))
    # The feature of a clip follows from the same tokens.
    if name == "DEMO":
        x, _ = model.visual.embed(video)
        whole = model.visual.transformer(x)
        torch.testing.assert_close(whole[:, model.visual.prefix_tokens :], tokens)


@torch.no_grad()
def test_the_text_towers_states_end_in_its_feature() -> None:
    model, tokens = create_model(ModelConfig(name="DEMO")).eval(), Tokenizer()(["opens the jar", "closes it"])
    states = model.textual.states(model.textual.padded(tokens))
    last = model.textual.ln_final(states[torch.arange(2), tokens.argmax(dim=1)]) @ model.textual.text_projection
    torch.testing.assert_close(last, model.textual(tokens))


def test_a_file_holds_the_weights_and_what_they_need(tmp_path: Path) -> None:
    head, path = trained(), tmp_path / "new" / "rerank.safetensors"
    head.save(path)
    again = load_reranker(path)
    assert dataclasses.asdict(again.shape) == dataclasses.asdict(SHAPE)
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(*pairs()), head(*pairs()))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rerank.safetensors"
    for content in (b"", b"no file of this kind" * 9):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"rerank\.safetensors: not a reranker of tools/train_reranker\.py"):
            load_reranker(path)
    trained().save(path)
    weights = load_reranker(path).state_dict()
    for wrong in ({"parts": 10**9}, {"width": 10**9}, {"width": 15}, {"heads": 0}, {"grid": "two"}, {"encoder": 5}):
        save_file(weights, path, {"reranker": json.dumps(dataclasses.asdict(SHAPE) | wrong)})
        with pytest.raises(UserError, match="not a reranker"):
            load_reranker(path)
    save_file(
        weights | {"log_scale": torch.tensor(torch.nan)}, path, {"reranker": json.dumps(dataclasses.asdict(SHAPE))}
    )
    with pytest.raises(UserError, match=r"rerank\.safetensors: has weights that are NaN"):
        load_reranker(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a reranker"):
        load_reranker(path)
    with pytest.raises(UserError, match="not a reranker"):
        load_reranker(tmp_path / "none.safetensors")
