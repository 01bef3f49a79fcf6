"""Models of other formats become folders that say the same."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from outrider.convert import convert
from outrider.corpus import Tokenizer
from outrider.errors import OutriderError, TokenizerError
from outrider.model import Llama, load_model
from outrider.model.folder import _hf_views
from tests.conftest import tiny_model

_GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def tensors(model: Llama) -> dict[str, np.ndarray]:
    """Hugging Face's tensors, with query and key rows in the interleaved order of GGUF and llama2.c."""
    config, found = model.config, {}
    for name, view in _hf_views(model):
        values = view.detach().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                halves = values.reshape(heads, 2, config.head_dim // 2, -1)
                values = halves.transpose(0, 2, 1, 3).reshape(values.shape)
        found[name] = np.ascontiguousarray(values)
    return found


def write_llama2c(path: Path, model: Llama) -> None:
    c, parts = model.config, tensors(model)
    order = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layers = range(c.num_hidden_layers)
    sign = 1 if c.tie_word_embeddings else -1
    header = np.array([c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads,
                       c.num_key_value_heads, sign * c.vocab_size, c.max_position_embeddings], "<i4")
    kinds = ["input_layernorm", *order, "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]
    blocks = [parts["model.embed_tokens.weight"],
              *(parts[f"model.layers.{i}.{kind}.weight"] for kind in kinds for i in layers),
              parts["model.norm.weight"], np.zeros((2, c.max_position_embeddings, c.head_dim // 2), "f4")]
    if not c.tie_word_embeddings:
        blocks.append(parts["lm_head.weight"])
    path.write_bytes(header.tobytes() + b"".join(block.astype("<f4").tobytes() for block in blocks))


def write_gguf(path: Path, model: Llama, tokenizer: Tokenizer | None = None, architecture: str = "llama",
               kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> None:
    c, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    if tokenizer is not None:
        model_part = json.loads(tokenizer.backend.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(sorted(model_part["vocab"], key=model_part["vocab"].get))
        writer.add_token_types([3] + [1] * (tokenizer.vocab_size - 1))
        writer.add_token_merges([" ".join(pair) for pair in model_part["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_add_bos_token(True)
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    for name, values in tensors(model).items():
        if name in outer:
            writer.add_tensor(outer[name], values)
            continue
        _, _, index, inner = name.split(".", 3)
        target = f"blk.{index}.{_GGUF_NAMES[inner.removesuffix('.weight')]}.weight"
        if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def same_logits(one: Llama, other: Llama, tolerance: float) -> None:
    tokens = torch.arange(40)[None] % one.config.vocab_size
    assert torch.allclose(one(tokens), other(tokens), atol=tolerance, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_llama2c(tmp_path: Path, corpus: Path, tied: bool, kv_heads: int) -> None:
    model = tiny_model(tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    write_llama2c(tmp_path / "m.bin", model)
    convert(tmp_path / "m.bin", tmp_path / "out", tokenizer=corpus, dtype="float32")
    same_logits(model, load_model(tmp_path / "out"), 1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gguf(tmp_path: Path, tokenizer: Tokenizer, tied: bool, kv_heads: int) -> None:
    model = tiny_model(tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    same_logits(model, load_model(tmp_path / "out"), 1e-5)
    for text in ("def add(a, b):\n    return 1\n", "  two  é 🙂"):
        assert Tokenizer.load(tmp_path / "out").encode(text) == tokenizer.encode(text)


def test_quantised_gguf_is_what_the_gguf_package_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    model = tiny_model(hidden_size=64, intermediate_size=96)
    write_gguf(tmp_path / "m.gguf", model, tokenizer, kind=kind)
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    name = "model.layers.1.mlp.down_proj.weight"
    ours = dict(_hf_views(load_model(tmp_path / "out")))[name].numpy()
    theirs = gguf.quants.dequantize(gguf.quants.quantize(tensors(model)[name], kind), kind)
    assert np.array_equal(ours, theirs)


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model()
    write_gguf(tmp_path / "whole.gguf", model, tokenizer)
    whole = (tmp_path / "whole.gguf").read_bytes()
    write_gguf(tmp_path / "other.gguf", model, tokenizer, architecture="falcon")
    for size in (4, 20, 1_000, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"cut{size}.gguf").write_bytes(whole[:size])
    write_llama2c(tmp_path / "m.bin", model)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:-4])
    (tmp_path / "junk.bin").write_bytes(b"\xff" * 100)
    for path in [*tmp_path.glob("cut*"), tmp_path / "other.gguf", tmp_path / "junk.bin", tmp_path / "missing"]:
        with pytest.raises(OutriderError) as caught:
            convert(path, tmp_path / "out", tokenizer=None)
        assert "\n" not in str(caught.value), path
    with pytest.raises(TokenizerError, match="--tokenizer"):
        convert(tmp_path / "m.bin", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
