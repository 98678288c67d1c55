import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from egohod.data.dataset import Tokenizer, tokenizer_for, trim
from egohod.data.table import choose_text
from egohod.errors import UserError
from egohod.model.config import ModelConfig

TEXTS = ["#C C moves the red cup", "a", "", "Ümläut & emoji \U0001f600 it's", "word " * 2000]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def test_tokens_are_open_clips_twice_in_a_row(tokenizer: Tokenizer) -> None:
    expected = SimpleTokenizer(context_length=77)(TEXTS)
    for _ in range(2):
        tokens = tokenizer(TEXTS)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, expected)


def test_ten_thousand_characters_end_with_end_of_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["stirs the pot " * 715])
    assert tokens.shape == (1, 77)
    assert tokens[0, -1] == tokens.max()
    assert torch.equal(trim(tokens), tokens)


def test_trim_keeps_the_last_end_of_text_of_the_batch(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["a", "picks up the knife from the table with the right hand"])
    trimmed = trim(tokens)
    assert trimmed.shape == (2, 16)
    assert torch.equal(trimmed.argmax(1), tokens.argmax(1))
    assert not tokens[:, 16:].any()
    assert trim(tokenizer(["a b c d e f"])).shape == (1, 8)  # 1 + 6 + 1 tokens fill the eight exactly


def test_choose_text() -> None:
    rng = np.random.default_rng(0)
    assert choose_text(("a", "b"), "first", rng) == "a"
    assert choose_text(("a", "b"), "concat", rng) == "a. b"
    # Exactly upstream's join: a full stop of the narration's own stays beside it.
    assert choose_text(("#C C cuts.", "#C C stirs"), "concat", rng) == "#C C cuts.. #C C stirs"
    assert {choose_text(("a", "b"), "random", rng) for _ in range(50)} == {"a", "b"}


# --------------------------------------------------------------------------------------------------
# Tokenizers of Hugging Face
# --------------------------------------------------------------------------------------------------

SIGLIP = ModelConfig(name="CLIP_VITB16", text="ViT-B-16-SigLIP")


class WordTokenizer:
    """Stands in for transformers' AutoTokenizer, which the tests do not install: words by their place in a list."""

    def __init__(self, folder: Path) -> None:
        self.words: list[str] = json.loads((folder / "tokenizer.json").read_text())

    @classmethod
    def from_pretrained(cls, folder: str, *, local_files_only: bool, **options: Any) -> "WordTokenizer":
        assert local_files_only, "whether anything is downloaded is decided before"
        return cls(Path(folder))

    def __call__(self, texts: list[str], max_length: int, **options: Any) -> types.SimpleNamespace:
        rows = [[*(2 + self.words.index(word) for word in text.split()), 1][:max_length] for text in texts]
        # SigLIP's padding is its end of text.
        return types.SimpleNamespace(input_ids=torch.tensor([row + [1] * (max_length - len(row)) for row in rows]))


def write_tokenizer(folder: Path, words: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return folder


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_tokenizer_that_is_not_local_is_not_fetched(no_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(timm/ViT-B-16-SigLIP\) is not in the local cache .*download=true"):
        tokenizer_for(SIGLIP)
    for folder, message in (("nowhere", "no such folder"), (".", r"it has no tokenizer_config\.json")):
        config = ModelConfig(text="ViT-B-16-SigLIP", tokenizer=str(tmp_path / folder))
        with pytest.raises(UserError, match=rf"model\.tokenizer=.*{message}"):
            tokenizer_for(config)
    # CLIP's is in open_clip's package.
    assert tokenizer_for(ModelConfig(text="EVA02-B-16")).context_length == 77


def test_a_tokenizer_of_hugging_face_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = ModelConfig(text="ViT-B-16-SigLIP", tokenizer=str(write_tokenizer(tmp_path, ["cut"])))
    with pytest.raises(UserError, match="pip install transformers"):
        tokenizer_for(config)


def test_a_tokenizer_is_looked_for_beside_the_weights_and_in_the_cache(
    no_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=WordTokenizer))
    folders = {
        "tokenizer": write_tokenizer(tmp_path / "own", ["one"]),
        "weights": write_tokenizer(tmp_path / "hub", ["two"]),
        "cache": write_tokenizer(no_cache / "models--timm--ViT-B-16-SigLIP" / "snapshots" / "0123", ["three"]),
    }
    (no_cache / "models--timm--ViT-B-16-SigLIP" / "refs").mkdir()
    (no_cache / "models--timm--ViT-B-16-SigLIP" / "refs" / "main").write_text("0123")
    config = ModelConfig(text="ViT-B-16-SigLIP", tokenizer=str(folders["tokenizer"]))
    config.weights.path = str(folders["weights"])
    for word in ("One", "two!", "(three)"):
        tokens = tokenizer_for(config)([word, f"{word} {word}"])
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [[2, *[1] * 63], [2, 2, *[1] * 62]]
        # The padding counts, so that nothing is cut.
        assert trim(tokens).shape == (2, 64)
        if config.tokenizer is None:
            config.weights.path = None
        config.tokenizer = None


def test_a_tokenizer_with_more_words_than_the_tower_is_of_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=WordTokenizer))
    folder = write_tokenizer(tmp_path, [*map(str, range(40_000))])
    tokenize = tokenizer_for(ModelConfig(text="ViT-B-16-SigLIP", tokenizer=str(folder)))
    tokenize(["31997"])
    with pytest.raises(UserError, match=r"has a token 32000, but the text tower has only 32,000"):
        tokenize(["31998"])
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no readable tokenizer"):
        tokenizer_for(ModelConfig(text="ViT-B-16-SigLIP", tokenizer=str(folder)))
