"""Decoding with a draft, without changing what the target says.

    result = generate("models/target", "models/draft", "def add(a, b):", max_new_tokens=64)
    print(result.text, result.statistics.mean_accepted_length)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider.decoding.decoder import Decoder, Generation, Token
from outrider.decoding.engine import Engine, TorchEngine
from outrider.decoding.sampling import Sampling
from outrider.decoding.statistics import Statistics

__all__ = ["Decoder", "Engine", "Generation", "Sampling", "Statistics", "Token", "TorchEngine", "generate"]


def generate(target: str | Path | Decoder, draft: str | Path | None, prompt: str | Sequence[int], *,
             max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             seed: int | None = None, device: str = "auto", **options: Any) -> Generation:
    """Decode `prompt` with `target`, drafting with `draft` if one is given.

    Args:
        target: a model folder, or a `Decoder` that already holds target and draft.
        draft: a model folder, or None.
        prompt: text or token ids.
        max_new_tokens: how many tokens at most.
        temperature: 0 is greedy; see `Sampling` for this and the next three.
        top_k: only the k most likely tokens; 0 means all.
        top_p: nucleus probability.
        seed: makes sampling repeatable.
        device: auto, cpu, cuda or mps.
        **options: `width`, `method`, `stop`, `speculate` of `Decoder.stream`.

    Returns:
        Text, tokens and statistics. In float32 a greedy result is, token for token, what the target says alone.

    Raises:
        OutriderError: a folder is damaged, the models do not go together, or a parameter is out of range.
    """
    decoder = target if isinstance(target, Decoder) else Decoder.load(target, draft, device=device)
    return decoder.generate(prompt, max_new_tokens=max_new_tokens,
                            sampling=Sampling(temperature, top_k, top_p, seed), **options)
