"""Engines: one model's weights and the key-value cache of B sequences.

Every backend satisfies the same contract (tests/decoding/test_engine.py). Positions are kept per sequence,
so that sequences of different lengths can be extended together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from outrider.decoding.packed import pack_linears
from outrider.devices import pick_device, synchronize
from outrider.errors import DecodingError
from outrider.model.config import ModelConfig
from outrider.model.folder import load_model
from outrider.model.llama import KVCache, Llama

#: Prompt tokens in one pass while filling the cache: bounds the memory logits and attention take.
PREFILL_CHUNK = 512


class Engine(Protocol):
    """What decoding needs of a model."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Cached positions of each sequence."""
        ...

    def start(self, batch: int, capacity: int) -> None:
        """Forget everything and make room for `batch` sequences of `capacity` positions."""
        ...

    def prefill(self, prompts: list[list[int]]) -> None:
        """Cache the prompts, one per sequence, of any lengths (also none)."""
        ...

    def extend(self, tokens: Tensor) -> Tensor:
        """Append `tokens` [B, n] to the sequences; return logits [B, n, V]."""
        ...

    def truncate(self, lengths: list[int]) -> None:
        """Forget all but the first `lengths[b]` positions of sequence b."""
        ...

    def synchronize(self) -> None:
        """Wait until results are there (for timing)."""
        ...


class TorchEngine:
    """The PyTorch engine: CPU, CUDA, ROCm and MPS."""

    def __init__(self, model: Llama) -> None:
        """Take over `model`. On a CPU its linear layers are replaced by packed ones."""
        self.model = model.eval().requires_grad_(False)
        self.device, self.dtype = model.device, model.dtype
        self.packed = self.device.type == "cpu" and pack_linears(model)
        self._cache: KVCache | None = None

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> TorchEngine:
        """Read a model folder; `dtype` defaults to float32 on a CPU and to the stored type elsewhere."""
        place = pick_device(device)
        if dtype is None and place.type == "cpu":
            dtype = torch.float32
        return cls(load_model(folder, dtype=dtype, device=place))

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.model.config

    @property
    def cache(self) -> KVCache:
        """The cache; `start` must have been called."""
        if self._cache is None:
            raise RuntimeError("Engine.start was not called")
        return self._cache

    @property
    def lengths(self) -> list[int]:
        """Cached positions of each sequence."""
        return list(self.cache.lengths)

    @torch.inference_mode()
    def start(self, batch: int, capacity: int) -> None:
        """Forget everything and make room; an earlier cache that is large enough is used again."""
        if capacity > self.config.max_position_embeddings:
            raise DecodingError(
                f"{capacity} positions are needed and the model has {self.config.max_position_embeddings} "
                "(max_position_embeddings); shorten the prompt or ask for fewer tokens"
            )
        if self._cache is None or self._cache.batch != batch or self._cache.capacity < capacity:
            self._cache = KVCache(self.config, batch, capacity, dtype=self.dtype, device=self.device)
        self._cache.truncate([0] * batch)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> None:
        """Cache the prompts, each in chunks."""
        for index, prompt in enumerate(prompts):
            row = self.cache.row(index)
            for first in range(0, len(prompt), PREFILL_CHUNK):
                tokens = torch.tensor([prompt[first:first + PREFILL_CHUNK]], device=self.device)
                self.model.hidden_states(tokens, row)
            self.cache.lengths[index] = row.lengths[0]

    @torch.inference_mode()
    def extend(self, tokens: Tensor) -> Tensor:
        """Append `tokens` [B, n]; return logits [B, n, V] on the engine's device."""
        return self.model(tokens.to(self.device), self.cache)

    def truncate(self, lengths: list[int]) -> None:
        """Forget all but the first `lengths[b]` positions of sequence b."""
        self.cache.truncate(lengths)

    def synchronize(self) -> None:
        """Wait for the device."""
        synchronize(self.device)
