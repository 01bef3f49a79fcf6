"""Which tokens a target and a draft have in common."""

from __future__ import annotations

from outrider.corpus.tokenizer import Tokenizer
from outrider.errors import DecodingError
from outrider.model.config import ModelConfig


def shared_vocabulary(target: ModelConfig, draft: ModelConfig, target_tokenizer: Tokenizer,
                      draft_tokenizer: Tokenizer) -> int:
    """Return how many ids, from 0, mean the same to both models.

    Sizes come from the two configurations (CodeLlama has 32,016 ids, its draft 32,000): the draft may
    propose any id below the smaller one.

    Raises:
        DecodingError: an id below it is spelt differently by the two tokenizers.
    """
    shared = min(target.vocab_size, draft.vocab_size)
    for token in range(shared):
        ours, theirs = target_tokenizer.token_text(token), draft_tokenizer.token_text(token)
        # A model may have more rows than its tokenizer has tokens; such ids mean nothing to either.
        if ours != theirs and ours is not None and theirs is not None:
            raise DecodingError(
                f"draft and target have different tokenizers: id {token} is {theirs!r} for the draft and {ours!r} "
                "for the target; use a draft trained with the target's tokenizer"
            )
    return shared
