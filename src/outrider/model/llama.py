"""The Llama family in one file: RMSNorm, rotary attention (multi-head or grouped), SwiGLU, KV cache.

Shapes use B (sequences), T (new positions), S (positions attended to), H (query heads), K (key-value
heads), D (head width), C (hidden width), V (vocabulary).

Query, key and value projections are one matrix, and so are the gate and up projections: fewer, larger
matrix products. `outrider.model.folder` splits and joins them when it writes and reads Hugging Face folders.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from outrider.errors import DecodingError
from outrider.model.config import ModelConfig


class KVCache:
    """Keys and values of B sequences in buffers of fixed size, written in place.

    `lengths[b]` positions of sequence b are valid; what lies beyond is overwritten by the next
    `Llama.forward`. Forgetting positions (a rejected proposal) is therefore only a smaller number.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, *,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Positions there is room for, per sequence."""
        return self.keys.shape[3]

    def row(self, index: int) -> KVCache:
        """Return sequence `index` alone, as a cache that shares this one's memory (but not its `lengths`)."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, index:index + 1], self.values[:, index:index + 1]
        view.lengths = [self.lengths[index]]
        return view

    def truncate(self, lengths: list[int]) -> None:
        """Keep only the first `lengths[b]` positions of each sequence."""
        for old, new in zip(self.lengths, lengths, strict=True):
            if not 0 <= new <= old:
                raise ValueError(f"cannot truncate a cache of {old} positions to {new}")
        self.lengths = list(lengths)


class _Placement:
    """Where one forward pass writes in the cache, at which positions, and what it may attend to.

    Computed once a pass and shared by every layer.
    """

    def __init__(self, tokens: Tensor, cache: KVCache | None) -> None:
        batch, time = tokens.shape
        device = tokens.device
        self.cache, self.mask, self.causal = cache, None, False
        starts = [0] if cache is None else cache.lengths
        if cache is not None:
            if batch != cache.batch:
                raise ValueError(f"{batch} sequences given to a cache of {cache.batch}")
            if max(starts) + time > cache.capacity:
                raise DecodingError(
                    f"the cache holds {cache.capacity} positions and {max(starts) + time} are needed; "
                    "shorten the prompt or allow a larger context"
                )
        self.start, self.end = min(starts), max(starts) + time
        self.uniform = self.end - self.start == time
        if self.uniform:
            self.causal = self.start == 0 and time > 1
            if self.start > 0 and time > 1:
                self.mask = torch.ones((time, self.end), dtype=torch.bool, device=device).tril_(self.start)
        else:
            offsets = torch.tensor(starts, device=device)[:, None]
            self.positions = offsets + torch.arange(time, device=device)
            self.mask = (torch.arange(self.end, device=device) <= self.positions[:, :, None])[:, None]

    def rows(self, table: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a rotary table's rows for the new positions, to be spread over the heads."""
        chosen = table[self.start:self.end] if self.uniform else table[self.positions]
        return chosen.to(dtype).unsqueeze(-2)

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write `key`, `value` [B, K, T, D] into the cache; return all that may be attended to [B, K, S, D]."""
        if self.cache is None:
            return key, value
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.uniform:
            keys[:, :, self.start:self.end] = key
            values[:, :, self.start:self.end] = value
        else:
            index = self.positions[:, None, :, None].expand_as(key)
            keys.scatter_(2, index, key)
            values.scatter_(2, index, value)
        return keys[:, :, :self.end], values[:, :, :self.end]


class Attention(nn.Module):
    """Causal self-attention with rotary positions; K < H query heads share key-value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        width = self.heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, width + 2 * self.kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, placement: _Placement, layer: int) -> Tensor:
        """Return attention's output [B, T, C] for `x` [B, T, C]."""
        batch, time, _ = x.shape
        qkv = self.qkv(x).view(batch, time, self.heads + 2 * self.kv_heads, self.head_dim)
        rotated = apply_rope(qkv[:, :, :self.heads + self.kv_heads], cos, sin)
        query = rotated[:, :, :self.heads].transpose(1, 2)
        key = rotated[:, :, self.heads:].transpose(1, 2)
        value = qkv[:, :, self.heads + self.kv_heads:].transpose(1, 2)
        key, value = placement.store(layer, key, value)
        y = F.scaled_dot_product_attention(
            query, key, value, attn_mask=placement.mask, is_causal=placement.causal,
            enable_gqa=self.heads != self.kv_heads)
        return self.output(y.transpose(1, 2).reshape(batch, time, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, C] for [B, T, C]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, placement: _Placement, layer: int) -> Tensor:
        """Return [B, T, C] for [B, T, C]."""
        x = x + self.attention(self.attention_norm(x), cos, sin, placement, layer)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """A Llama-family decoder (Touvron et al. 2023).

    Call it on token ids [B, T] for logits [B, T, V]. With a `KVCache` the tokens continue each
    cached sequence and the cache grows by T.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' element type."""
        return self.embedding.weight.dtype

    def tie_weights(self) -> None:
        """Make the head share the embedding's matrix where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: N(0, initializer_range), the two projections into the residual stream
        scaled by 1/sqrt(2 x layers) (GPT-2), norms at one.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                into_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
                scale = 1 / math.sqrt(2 * self.config.num_hidden_layers) if into_residual else 1.0
                nn.init.normal_(parameter, std=std * scale, generator=generator)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the normalised last hidden states [B, T, C] for `tokens` [B, T].

        Raises:
            DecodingError: more positions than the cache or the rotary tables hold.
        """
        placement = _Placement(tokens, cache)
        if placement.end > self.cos.shape[0]:
            raise DecodingError(
                f"{placement.end} positions asked of a model made for {self.cos.shape[0]} "
                "(max_position_embeddings); shorten the text"
            )
        x = self.embedding(tokens)
        cos, sin = placement.rows(self.cos, x.dtype), placement.rows(self.sin, x.dtype)
        for index, block in enumerate(self.layers):
            x = block(x, cos, sin, placement, index)
        if cache is not None:
            cache.lengths = [length + tokens.shape[1] for length in cache.lengths]
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return logits [B, T, V] for `tokens` [B, T]."""
        return self.head(self.hidden_states(tokens, cache))


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin [max_position_embeddings, D] (Su et al. 2021; halves layout of `transformers`).

    The first half of `sin` is negated so that rotating is `x * cos + roll(x, D/2) * sin`.
    """
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, _inverse_frequencies(config))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _inverse_frequencies(config: ModelConfig) -> Tensor:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: wavelengths longer than the original context are stretched, short ones kept.
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    smooth = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [B, T, heads, D] by the rows of `rope_tables` for its positions."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
