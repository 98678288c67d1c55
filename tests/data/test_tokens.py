import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from egohod.data.dataset import Tokenizer, trim
from egohod.data.table import choose_text

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
