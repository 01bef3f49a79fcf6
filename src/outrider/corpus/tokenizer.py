"""Tokenizers: a `tokenizer.json`, a SentencePiece `.model`, or a byte-pair encoding trained here.

All three become one `tokenizers.Tokenizer`, so everything downstream sees one interface and one file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from outrider.corpus.backends import Piece, PieceRules, from_pieces
from outrider.errors import MissingExtraError, TokenizerError
from outrider.files import write_json, write_text_atomic

END_OF_TEXT = "<|endoftext|>"
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", END_OF_TEXT)
_EOS_NAMES = ("</s>", END_OF_TEXT, "<|end_of_text|>", "<eos>", "<|im_end|>")
#: The 256 bytes and one mark.
LEAST_VOCABULARY = 257
MOST_VOCABULARY = 1 << 20
#: Model type in sentencepiece_model.proto.
_SENTENCEPIECE_BPE = 2


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
            return _from_sentencepiece(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is not a tokenizer.json: {' '.join(str(error).split())}") from error
        if not backend.get_vocab_size(with_added_tokens=True):
            raise TokenizerError(f"{path} is not a usable tokenizer.json: it has no tokens")
        names = _configured_names(path.with_name("tokenizer_config.json"))
        return cls(backend, bos=names.get("bos_token"), eos=names.get("eos_token"))

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
        """Train a byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019) of `vocab_size` tokens.

        Its one special token, `<|endoftext|>`, has id 0 and starts every encoded text.

        Raises:
            TokenizerError: `vocab_size` is too small to hold the 256 bytes, or there was no text.
        """
        if not LEAST_VOCABULARY <= vocab_size <= MOST_VOCABULARY:
            raise TokenizerError(f"a byte-level vocabulary has from {LEAST_VOCABULARY} to {MOST_VOCABULARY:,} tokens, "
                                 f"not {vocab_size}")
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
    def marks_start(self) -> bool:
        """Whether every encoded text begins with BOS by itself."""
        return self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    @property
    def sha256(self) -> str:
        """Hash of what `save` writes to `tokenizer.json`."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with the marks the tokenizer itself puts around a text (such as BOS)."""
        try:
            return self.backend.encode(text).ids
        except TypeError as error:  # a lone surrogate: how Python carries bytes that are not UTF-8
            raise TokenizerError("the text is not valid UTF-8") from error

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts at once on all threads."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids))

    def token_text(self, token: int) -> str | None:
        """Return how the vocabulary spells `token`, or None if it has no such id."""
        return self.backend.id_to_token(token)

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """Return a decoder that is fed one token at a time, for text that goes on from `context`."""
        return TextStream(self.backend, context)

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
    """Turns tokens into text as they come, holding back bytes that do not yet make a character.

    With each token a few before it are decoded again, as how a token is spelt may depend on them.
    """

    # Tokens of the prompt that are decoded with the first new ones.
    _CONTEXT = 8

    def __init__(self, backend: tokenizers.Tokenizer, context: Sequence[int] = ()) -> None:
        self._backend = backend
        self._ids = list(context[-self._CONTEXT:])
        self._given = len(self._ids)

    def feed(self, token: int) -> str:
        """Return the text that `token` completes; empty while a character is still open."""
        self._ids.append(token)
        return self._advance(hold=True)

    def finish(self) -> str:
        """Return what is still held back: bytes of an unfinished character, as U+FFFD."""
        return self._advance(hold=False)

    def _advance(self, *, hold: bool) -> str:
        before, now = self._backend.decode(self._ids[:self._given]), self._backend.decode(self._ids)
        if hold and now.endswith("\ufffd"):
            return ""
        self._ids, self._given = self._ids[self._given:], len(self._ids) - self._given
        # A prompt may end inside a character, whose replacement then gives way to the character.
        differ = (index for index, (old, new) in enumerate(zip(before, now, strict=False)) if old != new)
        return now[next(differ, min(len(before), len(now))):]


def _configured_names(path: Path) -> dict[str, str]:
    """Return bos_token and eos_token as a `tokenizer_config.json` names them, if it is there."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} does not hold a JSON object")
    names = {}
    for key in ("bos_token", "eos_token"):
        value = values.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def _from_sentencepiece(path: Path) -> Tokenizer:
    """Read a SentencePiece BPE model; what could not be rebuilt with identical ids is refused."""
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
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if not proto.pieces or not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise TokenizerError(f"{path} is not a whole SentencePiece model")
    known = normalizer.name == "identity" or (normalizer.name == "nmt_nfkc" and normalizer.remove_extra_whitespaces)
    if trainer.model_type != _SENTENCEPIECE_BPE or trainer.treat_whitespace_as_suffix or not known:
        raise TokenizerError(f"{path} is a kind of SentencePiece model that cannot be rebuilt with the same ids "
                             "(BPE without special normalisation can); use its tokenizer.json")
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    try:
        backend = from_pieces(pieces, PieceRules(
            byte_fallback=trainer.byte_fallback, add_dummy_prefix=normalizer.add_dummy_prefix,
            remove_extra_whitespaces=normalizer.remove_extra_whitespaces, charsmap=normalizer.precompiled_charsmap,
            bos_id=trainer.bos_id))
        # An absent mark is named by the empty string, which no vocabulary holds.
        names = [pieces[index].text if index >= 0 else "" for index in (trainer.bos_id, trainer.eos_id)]
    except IndexError as error:
        raise TokenizerError(f"{path} is not a whole SentencePiece model: a mark has no piece") from error
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
    return Tokenizer(backend, bos=names[0], eos=names[1])
