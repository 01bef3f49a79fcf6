"""Reading GGUF files of the Llama architecture, tensor by tensor, whatever they are quantised to.

The `gguf` package knows the file and the quantisations; here their names and layout become Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outrider.errors import ConfigError, MissingExtraError, ModelFolderError, first_line
from outrider.model.config import ModelConfig, validated

_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
          "output.weight": "lm_head.weight"}
_INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
#: Computed here from the configuration; some files carry them.
_IGNORED = ("rope_freqs.weight",)


@dataclass(frozen=True)
class GGUFVocabulary:
    """The tokenizer's parts, as the file stores them."""

    model: str
    pre: str
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]
    bos_id: int
    eos_id: int
    add_bos: bool
    add_space_prefix: bool


class GGUFFile:
    """An open GGUF file of the Llama architecture.

    Raises:
        ModelFolderError: not GGUF, cut short, another architecture, or an unknown quantisation.
        MissingExtraError: the `gguf` package is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise MissingExtraError("gguf", "export", f"reading {path}") from error
        self.path = Path(path)
        self._dequantize = gguf.quants.dequantize
        try:
            self._reader = gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
            raise ModelFolderError(f"{path} is not a whole GGUF file: {first_line(error)}") from error
        architecture = self._value("general.architecture")
        if architecture != "llama":
            raise ModelFolderError(f"{path} holds the architecture {architecture!r}; Outrider reads 'llama'")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors if tensor.name not in _IGNORED}
        self._check_tensors()

    @property
    def quantisations(self) -> dict[str, int]:
        """How many tensors have which type."""
        counts: dict[str, int] = {}
        for tensor in self._tensors.values():
            counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
        return counts

    def config(self) -> ModelConfig:
        """Return the shape.

        Raises:
            ConfigError: a key is missing, or a feature Outrider does not compute.
        """
        heads = self._required("llama.attention.head_count")
        if (kind := self._value("llama.rope.scaling.type", "none")) not in ("none", "linear"):
            raise ConfigError(f"{self.path}: rope scaling {kind!r} is not supported")
        factor = self._value("llama.rope.scaling.factor", 0)
        embedding = self._tensors["token_embd.weight"]
        return validated(ModelConfig, {
            "vocab_size": int(embedding.shape[1]),
            "hidden_size": self._required("llama.embedding_length"),
            "intermediate_size": self._required("llama.feed_forward_length"),
            "num_hidden_layers": self._required("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._value("llama.attention.head_count_kv", heads),
            "head_dim": self._value("llama.attention.key_length", self._value("llama.rope.dimension_count", 0)),
            "max_position_embeddings": self._required("llama.context_length"),
            "rms_norm_eps": self._required("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self._value("llama.rope.freq_base", 10_000.0),
            "rope_scaling": {"rope_type": "linear", "factor": factor} if kind == "linear" else None,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
            "eos_token_ids": [e for e in [self._value("tokenizer.ggml.eos_token_id")] if e is not None],
        }, str(self.path))

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (Hugging Face name, float32 array), one tensor in memory at a time."""
        config = self.config()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for name, tensor in self._tensors.items():
            try:
                values = self._dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            except NotImplementedError as error:
                raise ModelFolderError(
                    f"{self.path}: {name} is quantised as {tensor.tensor_type.name}, which cannot be read") from error
            part = name.split(".")[2] if name.startswith("blk.") else name
            values = values.reshape(tuple(int(size) for size in reversed(tensor.shape)))
            yield _hf_name(name), unpermute(values, heads[part]) if part in heads else values

    def vocabulary(self) -> GGUFVocabulary:
        """Return the tokenizer's parts.

        Raises:
            ModelFolderError: the file carries none.
        """
        tokens = self._value("tokenizer.ggml.tokens")
        if not tokens:
            raise ModelFolderError(f"{self.path} carries no tokenizer; name one with --tokenizer")
        kind = self._required("tokenizer.ggml.model")
        return GGUFVocabulary(
            model=kind, pre=self._value("tokenizer.ggml.pre", "default"), tokens=tokens,
            scores=self._value("tokenizer.ggml.scores", [0.0] * len(tokens)),
            types=self._value("tokenizer.ggml.token_type", [1] * len(tokens)),
            merges=self._value("tokenizer.ggml.merges", []),
            bos_id=self._value("tokenizer.ggml.bos_token_id", -1),
            eos_id=self._value("tokenizer.ggml.eos_token_id", -1),
            add_bos=self._value("tokenizer.ggml.add_bos_token", kind == "llama"),
            add_space_prefix=self._value("tokenizer.ggml.add_space_prefix", kind == "llama"))

    def _check_tensors(self) -> None:
        if "token_embd.weight" not in self._tensors:
            raise ModelFolderError(f"{self.path} lacks the tensor token_embd.weight")
        for name in self._tensors:
            _hf_name(name)
        size = self.path.stat().st_size
        for name, tensor in self._tensors.items():
            if tensor.data_offset + tensor.n_bytes > size:
                raise ModelFolderError(f"{self.path} is cut short: {name} lies beyond its end")

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        value = self._value(key)
        if value is None:
            raise ModelFolderError(f"{self.path} lacks the key {key}")
        return value


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection from interleaved pairs to Hugging Face's halves.

    GGUF and llama2.c rotate neighbours (0, 1), (2, 3), ..; Hugging Face rotates (0, D/2), (1, D/2 + 1), ..
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3).reshape(rows, width))


def _hf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _INNER and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.weight"
    raise ModelFolderError(f"tensor {name} has no place in a Llama; the file holds another architecture")
