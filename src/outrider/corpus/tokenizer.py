"""Tokenizers: a `tokenizer.json`, a SentencePiece `.model`, or a byte-pair encoding trained here.

All three become one `tokenizers.Tokenizer`, so everything downstream sees one interface and one file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import DecodeStream

from outrider.corpus.backends import Piece, PieceRules, from_pieces
from outrider.errors import MissingExtraError, TokenizerError
from outrider.files import write_json, write_text_atomic

END_OF_TEXT = "<|endoftext|>"
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", END_OF_TEXT)
_EOS_NAMES = ("</s>", END_OF_TEXT, "<|end_of_text|>", "<eos>", "<|im_end|>")
# Model types in sentencepiece_model.proto.
_UNIGRAM, _BPE = 1, 2


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: the `tokenizers.Tokenizer` underneath.
        bos_id: id of the token that starts a document, if there is one.
        eos_id: id of the token that ends a document, if there is one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos: str | None = None, eos: str | None = None) -> None:
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        # "</s>" typed in a document is four characters of text, not the end of the document.
        self.backend.encode_special_tokens = True
        self._vocabulary = backend.get_vocab(with_added_tokens=True)
        self.bos_id = self._find(bos, _BOS_NAMES)
        self.eos_id = self._find(eos, _EOS_NAMES)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, a SentencePiece `.model`, or a folder that holds either.

        Raises:
            TokenizerError: no such file, or not a tokenizer.
            MissingExtraError: a `.model` is given and sentencepiece is not installed.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
            if not found:
                raise TokenizerError(f"{path} holds neither tokenizer.json nor tokenizer.model")
            path = found[0]
        if not path.is_file():
            raise TokenizerError(f"no tokenizer file {path}")
        if path.suffix == ".model":
            return cls(_from_sentencepiece(path))
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is not a tokenizer.json: {error}") from error
        names = _configured_names(path.with_name("tokenizer_config.json"))
        return cls(backend, bos=names.get("bos_token"), eos=names.get("eos_token"))

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
        """Train a byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019) of `vocab_size` tokens.

        Its one special token, `<|endoftext|>`, has id 0 and starts every encoded text.

        Raises:
            TokenizerError: `vocab_size` is too small to hold the 256 bytes, or there was no text.
        """
        if vocab_size < 257:
            raise TokenizerError(f"a byte-level vocabulary needs at least 257 tokens, not {vocab_size}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=show_progress,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
        backend.train_from_iterator(texts, trainer)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._vocabulary.values()) + 1

    @property
    def sha256(self) -> str:
        """Hash of what `save` writes to `tokenizer.json`."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with the marks the tokenizer itself puts around a text (such as BOS)."""
        return self.backend.encode(text).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts at once on all threads."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids))

    def token_text(self, token: int) -> str | None:
        """Return how the vocabulary spells `token`, or None if it has no such id."""
        return self.backend.id_to_token(token)

    def stream(self) -> TextStream:
        """Return a decoder that is fed one token at a time."""
        return TextStream(self.backend)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and a `tokenizer_config.json` that `AutoTokenizer` opens."""
        folder = Path(folder)
        write_text_atomic(folder / "tokenizer.json", self._json())
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for key, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if token is not None:
                config[key] = self.token_text(token)
        write_json(folder / "tokenizer_config.json", config)

    def _json(self) -> str:
        return self.backend.to_str(pretty=False)

    def _find(self, name: str | None, usual: tuple[str, ...]) -> int | None:
        names = (name,) if name is not None else usual
        return next((self._vocabulary[n] for n in names if n in self._vocabulary), None)


class TextStream:
    """Turns tokens into text as they come, holding back bytes that do not yet make a character."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token: int) -> str:
        """Return the text that `token` completes; empty while a character is still open."""
        return self._stream.step(self._backend, token) or ""


def _configured_names(path: Path) -> dict[str, str]:
    """Return bos_token and eos_token as a `tokenizer_config.json` names them, if it is there."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    names = {}
    for key in ("bos_token", "eos_token"):
        value = values.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def _from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """Read a SentencePiece model (BPE or unigram)."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError as error:
        raise MissingExtraError("sentencepiece", "data", f"reading the SentencePiece model {path}") from error
    from google.protobuf.message import DecodeError

    proto = schema.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise TokenizerError(f"{path} is not a SentencePiece model") from error
    if not proto.pieces:
        raise TokenizerError(f"{path} is not a SentencePiece model: it has no pieces")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise TokenizerError(f"{path}: SentencePiece model type {trainer.model_type} is not supported; BPE and "
                             "unigram are")
    return from_pieces([Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces], PieceRules(
        unigram=trainer.model_type == _UNIGRAM, byte_fallback=trainer.byte_fallback,
        add_dummy_prefix=normalizer.add_dummy_prefix, charsmap=normalizer.precompiled_charsmap,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces, bos_id=trainer.bos_id))
