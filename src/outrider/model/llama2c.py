"""Reading llama2.c's `.bin` files (version 0: seven integers, then float32 weights kind by kind)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from outrider.errors import ModelFolderError
from outrider.model.config import ModelConfig, validated
from outrider.model.gguf import unpermute

_HEADER = 7 * 4
# Version 1 and 2 start with this; their layouts differ.
_MAGIC = 0x616B3432


class Llama2CFile:
    """An open llama2.c checkpoint, memory-mapped.

    Raises:
        ModelFolderError: not such a file, or its size is not what its header calls for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        if size < _HEADER:
            raise ModelFolderError(f"{path} is too short for a llama2.c checkpoint")
        header = np.fromfile(self.path, dtype="<i4", count=7)
        if int(header[0]) == _MAGIC:
            raise ModelFolderError(f"{path} is a newer llama2.c export; export it with --version 0")
        dim, hidden, layers, heads, kv_heads, vocabulary, positions = (int(value) for value in header)
        if min(dim, hidden, layers, heads, kv_heads, abs(vocabulary), positions) <= 0 or dim % heads:
            raise ModelFolderError(f"{path} is not a llama2.c checkpoint: its header makes no sense")
        self._config = validated(ModelConfig, {
            "vocab_size": abs(vocabulary), "hidden_size": dim, "intermediate_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "max_position_embeddings": positions, "tie_word_embeddings": vocabulary > 0,
            "bos_token_id": 1, "eos_token_ids": (2,)}, str(path))
        expected = _HEADER + 4 * sum(int(np.prod(shape)) for _, shape in self._layout())
        if size != expected:
            raise ModelFolderError(
                f"{path} has {size} bytes where its header calls for {expected}: cut short or altered")

    def config(self) -> ModelConfig:
        """Return the shape."""
        return self._config

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (Hugging Face name, float32 array)."""
        data = np.memmap(self.path, dtype="<f4", mode="r", offset=_HEADER)
        heads = {"q_proj": self._config.num_attention_heads, "k_proj": self._config.num_key_value_heads}
        start = 0
        for name, shape in self._layout():
            count = int(np.prod(shape))
            block = data[start:start + count].reshape(shape)
            start += count
            if not name:
                continue
            if "{}" not in name:
                yield name, np.array(block)
                continue
            part = name.split(".")[-2]
            for layer in range(self._config.num_hidden_layers):
                values = np.array(block[layer])
                yield name.format(layer), unpermute(values, heads[part]) if part in heads else values

    def _layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return names and shapes in the file's order; an unnamed block is passed over."""
        c = self._config
        layers, width, hidden = c.num_hidden_layers, c.hidden_size, c.intermediate_size
        kv = c.num_key_value_heads * c.head_dim
        prefix = "model.layers.{}."
        blocks: list[tuple[str, tuple[int, ...]]] = [
            ("model.embed_tokens.weight", (c.vocab_size, width)),
            (prefix + "input_layernorm.weight", (layers, width)),
            (prefix + "self_attn.q_proj.weight", (layers, width, width)),
            (prefix + "self_attn.k_proj.weight", (layers, kv, width)),
            (prefix + "self_attn.v_proj.weight", (layers, kv, width)),
            (prefix + "self_attn.o_proj.weight", (layers, width, width)),
            (prefix + "post_attention_layernorm.weight", (layers, width)),
            (prefix + "mlp.gate_proj.weight", (layers, hidden, width)),
            (prefix + "mlp.down_proj.weight", (layers, width, hidden)),
            (prefix + "mlp.up_proj.weight", (layers, hidden, width)),
            ("model.norm.weight", (width,)),
            ("", (2, c.max_position_embeddings, c.head_dim // 2)),  # rotary tables, computed here
        ]
        if not c.tie_word_embeddings:
            blocks.append(("lm_head.weight", (c.vocab_size, width)))
        return blocks
