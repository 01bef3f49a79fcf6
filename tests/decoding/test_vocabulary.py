"""How many ids a target and a draft have in common, from their configurations and tokenizers."""

from __future__ import annotations

import pytest
import tokenizers

from outrider.corpus import Tokenizer
from outrider.decoding.vocabulary import shared_vocabulary
from outrider.errors import DecodingError
from tests.conftest import SHARED, TEXTS, tiny_config


def spelling(*words: str) -> Tokenizer:
    """A tokenizer whose ids spell `words`."""
    vocabulary = {word: index for index, word in enumerate(words)}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0])))


def shared(target: tuple[int, Tokenizer], draft: tuple[int, Tokenizer]) -> int:
    return shared_vocabulary(tiny_config(target[0]), tiny_config(draft[0]), target[1], draft[1])


@pytest.mark.parametrize(("target", "draft", "expected"), [
    (300, 300, 300),
    (316, 300, 300),   # CodeLlama's 32,016 against its draft's 32,000
    (300, 316, 300),
    (300, 7, 7),
    (1, 300, 1),
])
def test_the_smaller_model_decides(tokenizer: Tokenizer, target: int, draft: int, expected: int) -> None:
    assert shared((target, tokenizer), (draft, tokenizer)) == expected


def test_more_rows_than_tokens_mean_nothing_to_either() -> None:
    short, long = spelling("a", "b", "c"), spelling("a", "b", "c", "d")
    assert shared((8, short), (8, short)) == 8
    assert shared((8, long), (8, short)) == 8
    assert shared((8, short), (8, long)) == 8


@pytest.mark.parametrize("place", range(4))
def test_a_disagreement_at_any_id_is_refused_and_named(place: int) -> None:
    words = ["a", "b", "c", "d"]
    other = list(words)
    other[place] = "x\ny"  # a line break in a token must not break the message's one line
    for target, draft in ((words, other), (other, words)):
        with pytest.raises(DecodingError, match=f"id {place} ") as caught:
            shared((4, spelling(*target)), (4, spelling(*draft)))
        assert "\n" not in str(caught.value)
        assert "tokenizer" in str(caught.value)


def test_a_disagreement_beyond_the_shared_ids_does_not_matter() -> None:
    ours, theirs = spelling("a", "b", "c"), spelling("a", "b", "x")
    assert shared((3, ours), (2, theirs)) == 2
    assert shared((2, ours), (3, theirs)) == 2


def test_two_trained_tokenizers_disagree(tokenizer: Tokenizer) -> None:
    other = Tokenizer.train_bpe([text[::-1] for text in TEXTS], 300)
    with pytest.raises(DecodingError, match="different tokenizers"):
        shared((300, tokenizer), (300, other))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development assets are not there")
def test_the_llama_2_tokenizer_agrees_with_itself_in_both_formats() -> None:
    folder = SHARED / "assets" / "tokenizers"
    pytest.importorskip("sentencepiece", reason="needs the data extra")
    ours = Tokenizer.load(folder / "llama2-tokenizer.json")
    theirs = Tokenizer.load(folder / "llama2-tokenizer.model")
    assert shared((32_016, ours), (32_000, theirs)) == 32_000
