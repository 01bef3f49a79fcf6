"""Building a `tokenizers` backend from the parts other formats store: SentencePiece pieces, or BPE merges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from outrider.errors import TokenizerError

_SPACE = "▁"
# Types of a piece, as sentencepiece_model.proto numbers them; GGUF uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
#: What splits text before byte-level BPE, by GGUF's name for it.
_PRE_TOKENIZERS = {"default": False, "gpt-2": False, "smollm": True}


@dataclass(frozen=True)
class Piece:
    """An entry of a SentencePiece vocabulary; its id is its place in the list."""

    text: str
    score: float
    type: int = NORMAL


@dataclass(frozen=True)
class PieceRules:
    """How a SentencePiece model treats text around its pieces."""

    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    bos_id: int = -1


def from_pieces(pieces: Sequence[Piece], rules: PieceRules) -> tokenizers.Tokenizer:
    """Rebuild a SentencePiece model in `tokenizers`, with identical ids.

    SentencePiece's BPE joins, at each step, the adjacent pair whose joined piece has the best score, so
    the merge list is every split of every piece into two pieces, ordered by the joined piece's score.

    Raises:
        TokenizerError: there is no piece for unknown text or for the start mark, or there are symbols that
            SentencePiece cuts out before it joins pieces.
    """
    unknown = next((piece.text for piece in pieces if piece.type == UNKNOWN), None)
    if unknown is None or rules.bos_id >= len(pieces):
        raise TokenizerError("the vocabulary is incomplete: it lacks the unknown piece or the start mark")
    if any(piece.type == USER_DEFINED for piece in pieces):
        raise TokenizerError("user-defined symbols cannot be rebuilt with the same ids; use its tokenizer.json")
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, list(_merges(pieces)), unk_token=unknown, fuse_unk=True,
                                              byte_fallback=rules.byte_fallback))
    steps: list[Any] = []
    if rules.charsmap:
        steps.append(normalizers.Precompiled(rules.charsmap))
    if rules.remove_extra_whitespaces:
        # Spaces only; a line break stays, as SentencePiece has it.
        steps += [normalizers.Replace(tokenizers.Regex(pattern), space)
                  for pattern, space in ((r"\A +", ""), (" {2,}", " "))]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(f"{_SPACE}+\\z"), ""))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         *([decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else [])])
    _add_special(backend, [piece.text for piece in pieces if piece.type in (UNKNOWN, CONTROL)])
    if rules.bos_id >= 0:
        _start_with(backend, pieces[rules.bos_id].text, rules.bos_id)
    return backend


def from_merges(tokens: Sequence[str], merges: Sequence[str], *, types: Sequence[int], pre: str = "default",
                bos_id: int = -1) -> tokenizers.Tokenizer:
    """Build a byte-level BPE from its vocabulary and merges ("left right" each).

    Raises:
        TokenizerError: a pre-tokenizer Outrider does not know.
    """
    if pre not in _PRE_TOKENIZERS:
        raise TokenizerError(f"pre-tokenizer '{pre}' is not known; there are: {', '.join(_PRE_TOKENIZERS)}")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if _PRE_TOKENIZERS[pre]:
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, [token for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL)])
    if bos_id >= 0:
        _start_with(backend, tokens[bos_id], bos_id)
    return backend


def _add_special(backend: tokenizers.Tokenizer, names: list[str]) -> None:
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in names])


def _start_with(backend: tokenizers.Tokenizer, name: str, index: int) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, index)])


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """Yield every pair of pieces that makes a piece, best joined piece first."""
    # Control and byte pieces are not made by joining, however they are spelt.
    ranks = {piece.text: index for index, piece in enumerate(pieces) if piece.type in (NORMAL, USER_DEFINED)}
    for piece in sorted((pieces[index] for index in ranks.values()), key=lambda piece: -piece.score):
        text = piece.text
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))
                  if text[:cut] in ranks and text[cut:] in ranks]
        yield from sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
