"""Named model shapes. A recipe's `[model] preset = "..."` picks one and may override its fields."""

from __future__ import annotations

from typing import Any

from outrider.errors import ConfigError
from outrider.model.config import ModelConfig, validated

_LLAMA2_VOCABULARY = {"vocab_size": 32_000, "bos_token_id": 1, "eos_token_ids": (2,)}

PRESETS: dict[str, dict[str, Any]] = {
    # Laptop sizes. Byte-pair vocabularies trained on the corpus itself keep the embedding small.
    "draft-1m": {"vocab_size": 4_096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "max_position_embeddings": 1_024, "tie_word_embeddings": True},
    "nano-5m": {"vocab_size": 4_096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5,
                "num_attention_heads": 4, "max_position_embeddings": 1_024, "tie_word_embeddings": True},
    "micro-15m": {"vocab_size": 4_096, "hidden_size": 384, "intermediate_size": 1_024, "num_hidden_layers": 8,
                  "num_attention_heads": 6, "max_position_embeddings": 1_024, "tie_word_embeddings": True},
    # AMD-Llama-135M exactly: 134.1M parameters, untied head, Llama-2 tokenizer.
    "amd-135m": {**_LLAMA2_VOCABULARY, "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12,
                 "num_attention_heads": 12, "max_position_embeddings": 2_048},
    # Shapes of models Outrider drafts for, used by the benchmarks with random weights.
    "tinyllama-1.1b": {**_LLAMA2_VOCABULARY, "hidden_size": 2_048, "intermediate_size": 5_632,
                       "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
                       "max_position_embeddings": 2_048},
    "codellama-7b": {**_LLAMA2_VOCABULARY, "vocab_size": 32_016, "hidden_size": 4_096, "intermediate_size": 11_008,
                     "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 16_384,
                     "rope_theta": 1e6},
}


def preset(name: str, /, **overrides: Any) -> ModelConfig:
    """Return the shape called `name`, with fields replaced by `overrides`.

    Raises:
        ConfigError: no such preset, or an override that makes the shape impossible.
    """
    if name not in PRESETS:
        raise ConfigError(f"no model preset '{name}'; there are: {', '.join(PRESETS)}")
    return validated(ModelConfig, {**PRESETS[name], **overrides}, f"model preset '{name}'")
