"""Shapes: the presets, the arithmetic on them, and both generations of Hugging Face's `config.json`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError
from outrider.model import PRESETS, Llama, ModelConfig, RopeScaling, preset
from tests.conftest import tiny_config

LINEAR = RopeScaling(rope_type="linear", factor=4.0)
LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=64)


def hf(**changes: Any) -> dict[str, Any]:
    """A minimal `config.json`, with keys changed; None takes a key out."""
    values = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4, **changes}
    return {key: value for key, value in values.items() if value is not None}


def module_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())


def test_amd_135m_is_exact() -> None:
    config = preset("amd-135m")
    assert config.model_dump() == {
        "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64,
        "max_position_embeddings": 2_048, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "rope_scaling": None,
        "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_ids": (2,),
    }
    assert config.num_parameters == 134_105_856
    assert config.num_matmul_parameters == 134_105_856 - 32_000 * 768 - 25 * 768  # no look-up, no norms
    assert round(config.num_matmul_parameters / 1e6, 1) == 109.5
    assert round(config.training_flops_per_token(2_048) / 1e6, 1) == 883.6


@pytest.mark.parametrize("name", PRESETS)
def test_num_parameters_is_the_modules_own_count(name: str) -> None:
    assert preset(name).num_parameters == module_parameters(preset(name))


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1}, {"num_key_value_heads": 2, "head_dim": 16},
])
def test_num_parameters_of_other_shapes(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    assert config.num_parameters == module_parameters(config)
    # The head is a product even when its matrix is the embedding's.
    untied = config.model_copy(update={"tie_word_embeddings": False})
    assert config.num_matmul_parameters == untied.num_parameters - 300 * 32 - 5 * 32


@pytest.mark.parametrize(("name", "millions"), [("draft-1m", 1), ("nano-5m", 5), ("micro-15m", 15)])
def test_small_presets_are_about_the_size_in_their_name(name: str, millions: int) -> None:
    assert preset(name).num_parameters == pytest.approx(millions * 1e6, rel=0.15)


def test_presets_of_known_models_have_their_shape() -> None:
    assert preset("tinyllama-1.1b").num_parameters == 1_100_048_384  # the model's published count
    codellama = preset("codellama-7b")
    assert (codellama.vocab_size, codellama.rope_theta) == (32_016, 1e6)
    assert codellama.num_parameters == 6_738_546_688


def test_preset_overrides_and_refusals() -> None:
    assert preset("nano-5m", vocab_size=999).vocab_size == 999
    with pytest.raises(ConfigError, match=r"no model preset 'nope'.*amd-135m"):
        preset("nope")
    with pytest.raises(ConfigError, match="not divisible"):
        preset("nano-5m", num_attention_heads=7)
    with pytest.raises(ConfigError, match="unknown key 'hiden_size'"):
        preset("nano-5m", hiden_size=7)


def test_defaults_of_heads() -> None:
    config = tiny_config(num_attention_heads=4)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert tiny_config(num_attention_heads=5, head_dim=6).head_dim == 6  # explicit: width need not divide


@pytest.mark.parametrize("heads", [4.0, "4"])
def test_head_dim_default_does_not_depend_on_how_the_number_is_written(heads: Any) -> None:
    # JSON may hold 4.0 where 4 is meant; pydantic takes it, so the default must be worked out from it too.
    assert tiny_config(num_attention_heads=heads).head_dim == 8


@pytest.mark.parametrize(("changes", "says"), [
    ({"num_attention_heads": 5}, "not divisible"),
    ({"num_key_value_heads": 3}, "not a multiple"),
    ({"num_key_value_heads": 8}, "not a multiple"),
    ({"head_dim": 7}, "odd"),
    ({"num_attention_heads": 32}, "odd"),           # a head of width 1
    ({"vocab_size": 0}, "vocab_size"),
    ({"hidden_size": -32}, "hidden_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
])
def test_impossible_shapes(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        ModelConfig.from_hf(hf(**changes))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json")


@pytest.mark.parametrize(("context", "layers", "heads", "dim"), [
    (1, 1, 2, 4), (128, 3, 4, 8), (64, 2, 2, 32)])
def test_training_flops_are_palms_convention(context: int, layers: int, heads: int, dim: int) -> None:
    # An explicit head_dim makes attention's width differ from the hidden width.
    config = tiny_config(num_hidden_layers=layers, num_attention_heads=heads, head_dim=dim)
    expected = 6 * config.num_matmul_parameters + 12 * layers * heads * dim * context
    assert config.training_flops_per_token(context) == expected


def test_kv_bytes_per_token_is_what_the_cache_takes() -> None:
    from outrider.model import KVCache

    config = tiny_config(num_key_value_heads=2, head_dim=16)
    cache = KVCache(config, 1, 10, dtype=torch.bfloat16)
    assert config.kv_bytes_per_token(2) * 10 == cache.keys.nbytes + cache.values.nbytes


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1e6,
         "bos_token_id": 1, "eos_token_ids": (2,), "rms_norm_eps": 1e-6, "initializer_range": 0.01,
         "max_position_embeddings": 512},
    {"eos_token_ids": (2, 7)},
])
def test_round_trip_through_config_json(scaling: RopeScaling | None, changes: dict[str, Any]) -> None:
    config = tiny_config(rope_scaling=scaling, **changes)
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config
    # A reader of either generation finds all of the rotary settings on its own.
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    new = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    assert ModelConfig.from_hf(old) == config
    assert ModelConfig.from_hf(new) == config


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
def test_transformers_reads_what_is_written(scaling: RopeScaling | None) -> None:
    from transformers import LlamaConfig

    config = tiny_config(rope_scaling=scaling, rope_theta=5e5, num_key_value_heads=2, eos_token_ids=(3, 4))
    theirs = LlamaConfig.from_dict(config.to_hf("bfloat16"))
    rope: Any = theirs.rope_parameters
    assert rope["rope_theta"] == 5e5
    assert rope["rope_type"] == ("default" if scaling is None else scaling.rope_type)
    if scaling is not None:
        assert rope["factor"] == scaling.factor
    assert (theirs.num_key_value_heads, theirs.head_dim, theirs.eos_token_id) == (2, 8, [3, 4])
    assert theirs.rms_norm_eps == 1e-5
    assert theirs.dtype == torch.bfloat16


ORIGINAL = "original_max_position_embeddings"
LLAMA3_JSON = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 64}


@pytest.mark.parametrize(("values", "theta", "scaling"), [
    ({}, 10_000.0, None),
    ({"rope_theta": 1e6}, 1e6, None),                                                     # transformers 4
    ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}}, 1e6, LINEAR),  # before 4.43
    ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 5e5, LINEAR),
    ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_JSON}}, 5e5, LLAMA3),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),        # transformers 5
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}, 5e5, LINEAR),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_JSON}}, 5e5, LLAMA3),
])
def test_both_generations_of_rope_keys(values: dict[str, Any], theta: float,
                                       scaling: RopeScaling | None) -> None:
    config = ModelConfig.from_hf(hf(**values))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_absent_and_null_keys_take_llamas_defaults() -> None:
    config = ModelConfig.from_hf({**hf(), "num_key_value_heads": None, "head_dim": None, "rope_scaling": None,
                                  "eos_token_id": None, "attention_bias": False})
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10_000.0)
    assert config.eos_token_ids == ()
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(("values", "says"), [
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"model_type": "mistral"}, "mistral"),
    ({"model_type": None}, "model_type"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_JSON, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_scaling": "linear"}, "rope"),            # an object is called for
    ({"rope_parameters": ["llama3"]}, "rope"),
    ({"vocab_size": None}, "vocab_size"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
])
def test_refusals(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        ModelConfig.from_hf(hf(**values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lacks", ["low_freq_factor", "high_freq_factor"])
def test_llama3_scaling_is_not_completed_by_guesses(lacks: str) -> None:
    # transformers cannot compute these either: other values give other logits without a word.
    incomplete = {key: value for key, value in LLAMA3_JSON.items() if key != lacks}
    with pytest.raises(ConfigError, match=lacks):
        ModelConfig.from_hf(hf(rope_scaling={"rope_type": "llama3", **incomplete}))


def test_llama3_scaling_without_its_original_context_is_as_in_transformers() -> None:
    from transformers import LlamaConfig

    incomplete = {key: value for key, value in LLAMA3_JSON.items() if key != ORIGINAL}
    values = hf(max_position_embeddings=256,
                rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **incomplete})
    theirs: Any = LlamaConfig.from_dict(json.loads(json.dumps(values))).rope_parameters
    try:
        config = ModelConfig.from_hf(values)
    except ConfigError:
        return  # refusing is as good: nothing is computed wrongly
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position_embeddings == theirs[ORIGINAL]


def test_configs_do_not_change() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="frozen"):
        tiny_config().vocab_size = 5
