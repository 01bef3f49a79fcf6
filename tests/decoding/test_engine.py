"""The engine contract: one suite that every backend must pass.

A backend is a function from a seed to (engine, reference), where `reference` maps tokens [B, T] to the
logits [B, T, V] that the same weights give in one plain forward pass.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from outrider.decoding import Engine, TorchEngine
from outrider.decoding.engine import PREFILL_CHUNK
from outrider.decoding.packed import PackedLinear, pack_linears
from outrider.errors import DecodingError
from outrider.model import Llama
from tests.conftest import tiny_config, tiny_model

#: Float32 sums of up to 2,048 terms in another order: about 100 roundings of logits near 10.
TOLERANCE = 1e-4
Backend = Callable[[int], tuple[Engine, Callable[[Tensor], Tensor]]]

needs_packing = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


def large_model(seed: int, dtype: torch.dtype = torch.float32) -> Llama:
    """The smallest shape with layers on both sides of the size from which packing pays."""
    model = Llama(tiny_config(2_048, hidden_size=512, intermediate_size=2_048, num_attention_heads=8,
                              num_key_value_heads=4, max_position_embeddings=640))
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model.to(dtype).eval().requires_grad_(False)


def small_model(seed: int) -> Llama:
    return tiny_model(seed, num_key_value_heads=2, max_position_embeddings=640)


def plain(seed: int) -> tuple[Engine, Callable[[Tensor], Tensor]]:
    engine = TorchEngine(small_model(seed))
    assert not engine.packed
    return engine, small_model(seed)


def packed(seed: int) -> tuple[Engine, Callable[[Tensor], Tensor]]:
    engine = TorchEngine(large_model(seed))
    assert engine.packed
    return engine, large_model(seed)


BACKENDS = [pytest.param(plain, id="torch"), pytest.param(packed, id="torch-packed", marks=needs_packing)]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[Engine, Callable[[Tensor], Tensor]]:
    return request.param(5)


@pytest.fixture
def engine(backend: tuple[Engine, Callable[[Tensor], Tensor]]) -> Engine:
    return backend[0]


@pytest.fixture
def reference(backend: tuple[Engine, Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    return backend[1]


def tokens_for(engine: Engine, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(engine.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


# Contract


def test_extend_is_the_whole_forward_pass(engine: Engine, reference: Callable[[Tensor], Tensor]) -> None:
    tokens = tokens_for(engine, 1, 40)
    engine.start(1, 40)
    assert engine.lengths == [0]
    logits = engine.extend(tokens)
    assert logits.shape == (1, 40, engine.config.vocab_size)
    close(logits, reference(tokens))
    assert engine.lengths == [40]


@pytest.mark.parametrize("sizes", [(1,) * 12, (2,) * 6, (3, 4, 5), (5, 1, 4, 2), (11, 1), (1, 11), (4, 4, 4)])
def test_any_chunking(engine: Engine, reference: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> None:
    tokens = tokens_for(engine, 1, 12)
    engine.start(1, 12)
    parts = [engine.extend(part) for part in tokens.split(sizes, 1)]
    close(torch.cat(parts, 1), reference(tokens))


@pytest.mark.parametrize("length", [0, 1, 2, 30, PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 600])
def test_prefill_is_extend_without_logits(engine: Engine, reference: Callable[[Tensor], Tensor],
                                          length: int) -> None:
    tokens = tokens_for(engine, 1, length + 3)
    engine.start(1, length + 3)
    engine.prefill([tokens[0, :length].tolist()])
    assert engine.lengths == [length]
    close(engine.extend(tokens[:, length:]), reference(tokens)[:, length:])


def test_truncate_forgets(engine: Engine, reference: Callable[[Tensor], Tensor]) -> None:
    """Cut to every length, then go on along another path: only the kept prefix may matter."""
    tokens, other = tokens_for(engine, 1, 10), tokens_for(engine, 1, 10, seed=9)
    for keep in range(11):
        engine.start(1, 16)
        engine.extend(tokens)
        engine.truncate([keep])
        assert engine.lengths == [keep]
        path = torch.cat([tokens[:, :keep], other[:, :5]], 1)
        close(engine.extend(other[:, :5]), reference(path)[:, keep:])


def test_speculative_use(engine: Engine, reference: Callable[[Tensor], Tensor]) -> None:
    """Rounds as the decoding loop makes them: n + 1 tokens in, some taken back, for every (n, accepted)."""
    engine.start(1, 200)
    context = tokens_for(engine, 1, 4)[0].tolist()
    engine.prefill([context[:-1]])
    wrong = tokens_for(engine, 8, seed=3).tolist()
    for drafted, accepted in [(n, k) for n in range(6) for k in range(n + 1)]:
        fed = torch.tensor([[context[-1], *wrong[:drafted]]])
        logits = engine.extend(fed)
        close(logits, reference(torch.tensor([[*context[:-1], *fed[0].tolist()]]))[:, len(context) - 1:])
        engine.truncate([len(context) + accepted])
        context += [*wrong[:accepted], int(logits[0, accepted].argmax())]


@pytest.mark.parametrize("lengths", [(0, 0), (3, 3, 3), (0, 1, 7), (9, 2), (5, 0, 0, 12)])
def test_sequences_of_different_lengths(engine: Engine, reference: Callable[[Tensor], Tensor],
                                        lengths: tuple[int, ...]) -> None:
    """B sequences with ragged prompts, extended together, are each as if alone; also after ragged cuts."""
    tokens = tokens_for(engine, len(lengths), 30)
    alone = [reference(row[None])[0] for row in tokens]
    engine.start(len(lengths), 32)
    engine.prefill([tokens[b, :n].tolist() for b, n in enumerate(lengths)])
    assert engine.lengths == list(lengths)
    at = list(lengths)
    for count in (1, 4, 1, 6):
        fed = torch.stack([tokens[b, n:n + count] for b, n in enumerate(at)])
        logits = engine.extend(fed)
        for b, n in enumerate(at):
            close(logits[b], alone[b][n:n + count])
        at = [n + count for n in at]
        assert engine.lengths == at
    cuts = [max(0, n - 2 * b) for b, n in enumerate(at)]
    engine.truncate(cuts)
    logits = engine.extend(torch.stack([tokens[b, n:n + 3] for b, n in enumerate(cuts)]))
    for b, n in enumerate(cuts):
        close(logits[b], alone[b][n:n + 3])


def test_start_forgets_and_may_reuse(engine: Engine, reference: Callable[[Tensor], Tensor]) -> None:
    """Whatever came before, and whatever size it had, a started engine knows nothing of it."""
    for batch, capacity in ((1, 24), (1, 12), (3, 12), (1, 48), (1, 12)):
        engine.start(batch, capacity)
        assert engine.lengths == [0] * batch
        tokens = tokens_for(engine, batch, 12, seed=capacity)
        close(engine.extend(tokens), reference(tokens))


def test_more_than_the_capacity(engine: Engine, reference: Callable[[Tensor], Tensor]) -> None:
    limit = engine.config.max_position_embeddings
    engine.start(1, limit)
    engine.prefill([tokens_for(engine, limit)[:limit - 2].tolist()])
    with pytest.raises(DecodingError, match=f"{limit + 1}"):
        engine.extend(tokens_for(engine, 1, 3))
    assert engine.lengths == [limit - 2], "a refused request leaves the engine as it was"
    tokens = torch.cat([tokens_for(engine, 1, limit)[:, :limit - 2], tokens_for(engine, 1, 2)], 1)
    close(engine.extend(tokens[:, -2:]), reference(tokens)[:, -2:])
    with pytest.raises(DecodingError, match=f"{limit}"):
        engine.extend(tokens_for(engine, 1, 1))


def test_a_capacity_the_model_does_not_have(engine: Engine) -> None:
    limit = engine.config.max_position_embeddings
    engine.start(1, limit)
    with pytest.raises(DecodingError, match=rf"{limit + 1} positions.*has {limit}"):
        engine.start(1, limit + 1)


def test_synchronize_can_be_called_at_any_time(engine: Engine) -> None:
    engine.start(1, 8)
    engine.synchronize()
    logits = engine.extend(tokens_for(engine, 1, 3))
    before = logits.clone()
    engine.synchronize()
    assert torch.equal(logits, before)
    assert engine.lengths == [3]


# PyTorch alone


def test_an_engine_must_be_started() -> None:
    with pytest.raises(RuntimeError, match="start"):
        _ = TorchEngine(small_model(0)).lengths


def test_load_takes_float32_on_a_cpu(tmp_path: Path) -> None:
    from outrider.model import save_model

    folder = save_model(tiny_model(3), tmp_path / "half", dtype=torch.bfloat16)
    assert TorchEngine.load(folder, device="cpu").dtype == torch.float32
    engine = TorchEngine.load(folder, device="cpu", dtype=torch.bfloat16)
    engine.start(1, 8)
    assert engine.extend(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


# Packed linear layers


@needs_packing
def test_packing_takes_the_large_layers_only() -> None:
    model = large_model(0)
    assert pack_linears(model)
    kinds = {name: isinstance(model.get_submodule(name), PackedLinear)
             for name in ("head", "layers.0.mlp.gate_up", "layers.1.mlp.down", "layers.0.attention.qkv")}
    # 512 x 2,048 elements and more against 512 x 1,024.
    assert kinds == {"head": True, "layers.0.mlp.gate_up": True, "layers.1.mlp.down": True,
                     "layers.0.attention.qkv": False}


@needs_packing
def test_packed_agrees_with_plain() -> None:
    """Either side of the number of rows at which the kernel changes; tolerance as above."""
    model = large_model(1)
    other = copy.deepcopy(model)
    assert pack_linears(other)
    for batch, time in itertools.product((1, 2, 5), (1, 2, 3, 4, 5, 9, 17)):
        tokens = torch.randint(2_048, (batch, time), generator=torch.Generator().manual_seed(time))
        close(other(tokens), model(tokens))


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("keep_plain", [True, False])
def test_one_packed_layer_against_float64(rows: int, keep_plain: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1_024, 1_024, generator=generator)
    x = torch.randn(2, rows, 1_024, generator=generator)
    exact = x.double() @ weight.double().T
    ours = PackedLinear(weight, keep_plain=keep_plain)(x)
    # Sums of 1,024 products of size about 1: an error of 2^-24 in each of 1,024 additions of up to 100.
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-3)


@needs_packing
def test_packed_bfloat16_agrees_with_plain() -> None:
    # bfloat16 keeps 8 bits, so two orders of summing differ by a few 2^-8 of logits up to about 10.
    model = large_model(1, torch.bfloat16)
    other = copy.deepcopy(model)
    assert pack_linears(other)
    assert isinstance(other.get_submodule("layers.0.attention.qkv"), PackedLinear), "smaller ones pay too"
    tokens = torch.randint(2_048, (1, 12), generator=torch.Generator().manual_seed(2))
    plain_logits, packed_logits = model(tokens).float(), other(tokens).float()
    assert (packed_logits - plain_logits).abs().max() < 0.05 * plain_logits.abs().max()


@needs_packing
def test_packing_leaves_a_tied_embedding_alone() -> None:
    config = large_model(0).config.model_copy(update={"tie_word_embeddings": True})
    model = Llama(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.eval().requires_grad_(False)
    tokens = torch.arange(10)[None]
    before = model(tokens)
    assert pack_linears(model)
    close(model(tokens), before)
    assert model.embedding.weight.shape == (2_048, 512)


def test_nothing_to_pack() -> None:
    model = small_model(0)
    names = [type(module).__name__ for module in model.modules()]
    assert not pack_linears(model)
    assert [type(module).__name__ for module in model.modules()] == names


@needs_packing
def test_no_packing_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 keeps both layouts, so a model that would fill the memory stays as it is."""
    model = large_model(0)
    monkeypatch.setattr("outrider.decoding.packed.physical_memory", lambda: sum(
        parameter.nbytes for parameter in model.parameters()))
    assert not pack_linears(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
