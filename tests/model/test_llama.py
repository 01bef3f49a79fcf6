"""The module against `transformers`' LlamaForCausalLM: every variant, whole and through the cache."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from outrider.errors import DecodingError
from outrider.model import KVCache, Llama, load_model
from outrider.model.llama import rope_tables
from tests.conftest import tiny_config, tiny_model

TOLERANCE = 1e-4
VOCABULARY, CONTEXT = 97, 64

HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
# The short original context makes every kind of frequency (kept, blended, stretched) occur within CONTEXT.
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "theta1e6": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
VARIANTS = list(itertools.product(HEADS, ("tied", "untied"), ROPE, (None, 16)))


def reference_model(heads: str = "gqa", tied: str = "untied", rope: str = "default",
                    head_dim: int | None = None, seed: int = 0) -> LlamaForCausalLM:
    """transformers' model with random weights that make logits of ordinary size, norms included."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=HEADS[heads], head_dim=head_dim, rms_norm_eps=1e-5,
        max_position_embeddings=CONTEXT, tie_word_embeddings=tied == "tied", rope_parameters=dict(ROPE[rope]))
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.3 if parameter.dim() == 2 else 1 + 0.2 * noise)
    return model


def random_tokens(*shape: int, seed: int = 1, size: int = VOCABULARY) -> Tensor:
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def name_of(variant: tuple[str, str, str, int | None]) -> str:
    heads, tied, rope, head_dim = variant
    return f"{heads}-{tied}-{rope}-{'wide' if head_dim else 'default'}"


@pytest.fixture(scope="module", params=VARIANTS, ids=name_of)
def pair(request: pytest.FixtureRequest,
         tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Tensor, Tensor]:
    """One variant: our model, tokens [3, CONTEXT], and transformers' logits for them."""
    theirs = reference_model(*request.param)
    folder = tmp_path_factory.mktemp("variant")
    theirs.save_pretrained(folder)
    tokens = random_tokens(3, CONTEXT)
    logits = theirs(tokens).logits
    assert logits.std() > 0.5, "logits so small would agree whatever we did"
    return load_model(folder), tokens, logits


def test_whole_sequence(pair: tuple[Llama, Tensor, Tensor]) -> None:
    model, tokens, logits = pair
    assert_close(model(tokens), logits)


def test_token_by_token(pair: tuple[Llama, Tensor, Tensor]) -> None:
    model, tokens, logits = pair
    cache = KVCache(model.config, 3, CONTEXT)
    steps = [model(tokens[:, t:t + 1], cache) for t in range(CONTEXT)]
    assert_close(torch.cat(steps, 1), logits)
    assert cache.lengths == [CONTEXT] * 3


def test_in_chunks(pair: tuple[Llama, Tensor, Tensor]) -> None:
    model, tokens, logits = pair
    cache = KVCache(model.config, 3, CONTEXT)
    parts = [model(part, cache) for part in tokens.split([7, 1, 20, 2, 34], 1)]
    assert_close(torch.cat(parts, 1), logits)


def test_ragged_batch(pair: tuple[Llama, Tensor, Tensor]) -> None:
    """Sequences with different numbers of cached positions, extended together, are each as if alone."""
    model, tokens, logits = pair
    starts = [0, 5, 33]
    cache = KVCache(model.config, 3, CONTEXT)
    for row, start in enumerate(starts):
        if start:
            alone = cache.row(row)
            model(tokens[row:row + 1, :start], alone)
            cache.lengths[row] = alone.lengths[0]
    offset = 0
    for count in (1, 6, 1, 20):
        part = torch.stack([tokens[row, s + offset:s + offset + count] for row, s in enumerate(starts)])
        together = model(part, cache)
        for row, start in enumerate(starts):
            assert_close(together[row], logits[row, start + offset:start + offset + count])
        offset += count
        assert cache.lengths == [start + offset for start in starts]


def test_truncate_then_extend(pair: tuple[Llama, Tensor, Tensor]) -> None:
    """What was cut off leaves no trace, also when the rows are cut to different lengths."""
    model, tokens, logits = pair
    cache = KVCache(model.config, 3, CONTEXT)
    model(tokens[:, :20], cache)
    model(random_tokens(3, 30, seed=9), cache)
    cache.truncate([20, 20, 20])
    assert_close(model(tokens[:, 20:40], cache), logits[:, 20:40])
    cache.truncate([0, 11, 40])
    part = torch.stack([tokens[0, :9], tokens[1, 11:20], tokens[2, 40:49]])
    expected = torch.stack([logits[0, :9], logits[1, 11:20], logits[2, 40:49]])
    assert_close(model(part, cache), expected)


def test_every_position_is_causal() -> None:
    model = tiny_model(num_key_value_heads=2)
    tokens = random_tokens(1, 12, size=300)
    before = model(tokens)
    for place in range(12):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 300
        after = model(changed)
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.allclose(before[:, place:], after[:, place:])


@pytest.mark.parametrize("lengths", [[6], [3, 6], [0, 6]])
def test_a_full_cache_is_an_error_and_leaves_it_as_it_was(lengths: list[int]) -> None:
    model = tiny_model()
    cache = KVCache(model.config, len(lengths), 8)
    for row, length in enumerate(lengths):
        if length:
            alone = cache.row(row)
            model(random_tokens(1, length, size=300), alone)
            cache.lengths[row] = length
    keys = cache.keys.clone()
    with pytest.raises(DecodingError, match="holds 8 positions and 9 are needed"):
        model(random_tokens(len(lengths), 3, size=300), cache)
    assert cache.lengths == lengths
    assert torch.equal(cache.keys, keys)
    model(random_tokens(len(lengths), 2, size=300), cache)  # exactly full is fine
    assert max(cache.lengths) == 8


def test_more_positions_than_the_rotary_tables_hold() -> None:
    model = tiny_model(max_position_embeddings=16)
    model(random_tokens(1, 16, size=300))
    with pytest.raises(DecodingError, match=r"17 positions.*16"):
        model(random_tokens(1, 17, size=300))
    cache = KVCache(model.config, 1, 32)
    model(random_tokens(1, 16, size=300), cache)
    with pytest.raises(DecodingError, match=r"17 positions.*16"):
        model(random_tokens(1, 1, size=300), cache)


@pytest.mark.parametrize("lengths", [[4], [-1], [3, 3]])
def test_a_cache_cannot_be_truncated_to_what_it_does_not_hold(lengths: list[int]) -> None:
    model = tiny_model()
    cache = KVCache(model.config, 1, 8)
    model(random_tokens(1, 3, size=300), cache)
    with pytest.raises(ValueError):  # noqa: PT011 - a programming error; the words do not matter
        cache.truncate(lengths)
    assert cache.lengths == [3]


def test_a_batch_that_is_not_the_caches() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="2 sequences"):
        model(random_tokens(2, 3, size=300), KVCache(model.config, 1, 8))


def test_bfloat16_keeps_exact_rotary_angles() -> None:
    """The tables stay in float32 when weights are cast: bfloat16 cannot count past 256 positions."""
    config = tiny_config(max_position_embeddings=4_096)
    cos, sin = rope_tables(config)
    angles = torch.arange(4_096, dtype=torch.float64)  # the first frequency is 1
    torch.testing.assert_close(cos[:, 0].double(), angles.cos(), rtol=0, atol=1e-3)
    torch.testing.assert_close(sin[:, 0].double(), -angles.sin(), rtol=0, atol=1e-3)


def test_gradients_agree_with_transformers(tmp_path: Path) -> None:
    """Training goes through the same module: the joined matrices receive the split ones' gradients."""
    theirs = reference_model("gqa", "tied")
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).requires_grad_(True)
    theirs.requires_grad_(True)
    tokens = random_tokens(2, 16)
    for model in (ours, theirs):
        output = model(tokens)
        logits = output if isinstance(output, Tensor) else output.logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()

    def gradient(model: torch.nn.Module, name: str) -> Tensor:
        found = model.get_parameter(name).grad
        assert found is not None
        return found

    for joined, parts in {
        "layers.0.attention.qkv": [f"layers.0.self_attn.{part}_proj" for part in "qkv"],
        "layers.1.mlp.gate_up": ["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"],
        "layers.1.mlp.down": ["layers.1.mlp.down_proj"],
        "embedding": ["embed_tokens"],
    }.items():
        expected = torch.cat([gradient(theirs, f"model.{part}.weight") for part in parts])
        assert_close(gradient(ours, f"{joined}.weight"), expected)


def test_fresh_weights_are_as_described() -> None:
    """N(0, 0.02); projections into the residual stream smaller by sqrt(2 x layers); norms at one."""
    model = Llama(tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=8))
    model.reset_parameters(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        expected = 0.02 / 4 if name.endswith(("output.weight", "down.weight")) else 0.02
        # 65,536 draws or more: the sample's deviation is off by 3 % once in about 10^25 cases.
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
    again = Llama(model.config)
    again.reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_tied_head_is_the_embedding() -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.head.weight is model.embedding.weight
    assert tiny_model().head.weight is not model.embedding.weight
