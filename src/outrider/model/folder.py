"""Hugging Face model folders: `config.json`, `model.safetensors` (or an index of several), tokenizer files.

Weights are read tensor by tensor into the model, so memory holds the model once. No pickle is read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from outrider.errors import ConfigError, ModelFolderError, first_line
from outrider.files import atomic_folder, write_json
from outrider.model.config import ModelConfig
from outrider.model.llama import Llama, rope_tables

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OUTER = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
          "head.weight": "lm_head.weight"}
_INNER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def load_model(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Llama:
    """Read a model folder, or a Hugging Face Hub id (`owner/name`), into a `Llama` in evaluation mode.

    Args:
        folder: a folder in Hugging Face's layout.
        dtype: element type of the weights in memory; default: the type they are stored in.
        device: where to put them.

    Returns:
        The model. Called on token ids [batch, time] it returns logits [batch, time, vocab].

    Raises:
        ModelFolderError: a file is missing or damaged, or tensors do not fit `config.json`.
    """
    folder = resolve_folder(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    files = _tensor_files(folder)
    names = _tensor_names(files)
    model.to_empty(device=device)
    model.tie_weights()  # `to_empty` gave head and embedding storage of their own
    _restore_buffers(model)
    expected = dict(_hf_views(model))
    _check_names(folder, config, expected, names)
    if dtype is None:
        dtype = _stored_dtype(folder, names)
    _cast_weights(model, dtype)
    expected = dict(_hf_views(model))
    with torch.no_grad():
        for path, stored in files.items():
            with _open(path) as tensors:
                for name in stored:
                    if name in expected:
                        _copy(path, name, tensors.get_tensor(name), expected[name])
    return model.eval().requires_grad_(False)


def save_model(model: Llama, folder: str | Path, *, tokenizer_from: str | Path | None = None,
               dtype: torch.dtype = torch.float32, replace: bool = False,
               extra_files: dict[str, str] | None = None) -> Path:
    """Write `model` as a Hugging Face folder that `AutoModelForCausalLM` opens. Atomic.

    Args:
        model: what to write.
        folder: where.
        tokenizer_from: a folder whose tokenizer files go along.
        dtype: element type on disk.
        replace: whether an existing folder may be replaced.
        extra_files: further text files, by name (a model card, the recipe).
    """
    folder = Path(folder)
    with atomic_folder(folder, replace=replace) as staging:
        write_json(staging / "config.json", model.config.to_hf(str(dtype).removeprefix("torch.")))
        tensors = {name: view.detach().to("cpu", dtype).contiguous().clone() for name, view in _hf_views(model)}
        write_tensors(tensors, staging / "model.safetensors")
        generation: dict[str, Any] = {"_from_model_config": True}
        for key in ("bos_token_id", "eos_token_id"):
            value = model.config.to_hf()[key]
            if value is not None:
                generation[key] = value
        write_json(staging / "generation_config.json", generation)
        if tokenizer_from is not None:
            for name in TOKENIZER_FILES:
                if (source := Path(tokenizer_from) / name).is_file():
                    shutil.copyfile(source, staging / name)
        for name, text in (extra_files or {}).items():
            (staging / name).write_text(text, encoding="utf-8")
    return folder


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file; what the system refuses is raised as the `OSError` it is."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), str(error)) from error
        raise


def load_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` of a model folder.

    Raises:
        ModelFolderError: no such folder or file, not JSON, or a shape Outrider does not compute.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelFolderError(f"{folder} is not a model folder: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelFolderError(f"{path} does not hold a JSON object")
    try:
        return ModelConfig.from_hf(values)
    except ConfigError as error:
        raise ModelFolderError(f"{path}: {str(error).removeprefix('config.json: ')}") from error


def resolve_folder(folder: str | Path) -> Path:
    """Return `folder` itself if it exists, or the local copy of a Hugging Face Hub id, fetched if need be."""
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelFolderError(f"{folder} is a file; give the folder that holds config.json")
    if not _HUB_ID.fullmatch(str(folder)) or path.parent.is_dir():
        raise ModelFolderError(f"no model folder {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except Exception as error:  # the hub's client raises many kinds; the reason is in the first line
        raise ModelFolderError(
            f"no folder {folder}, and the Hugging Face Hub did not give it: {first_line(error)}") from error


def _hf_views(model: Llama) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) for every stored tensor; parts of joined matrices are views."""
    config = model.config
    query, key_value = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    for name, parameter in model.named_parameters():  # a tied head is listed once, as the embedding
        if name in _OUTER:
            yield _OUTER[name], parameter
            continue
        _, index, inner = name.split(".", 2)
        prefix = f"model.layers.{index}."
        if inner == "attention.qkv.weight":
            parts = parameter.split([query, key_value, key_value])
            yield from zip((f"{prefix}self_attn.{p}_proj.weight" for p in "qkv"), parts, strict=True)
        elif inner == "mlp.gate_up.weight":
            parts = parameter.chunk(2)
            yield from zip((f"{prefix}mlp.{p}_proj.weight" for p in ("gate", "up")), parts, strict=True)
        else:
            yield prefix + _INNER[inner], parameter


def _cast_weights(model: Llama, dtype: torch.dtype) -> None:
    """Change the weights' type but leave the rotary tables in float32: their angles need its precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _restore_buffers(model: Llama) -> None:
    """Recompute the rotary tables, which `to_empty` left without values."""
    cos, sin = rope_tables(model.config)
    model.cos, model.sin = cos.to(model.device), sin.to(model.device)


def _tensor_files(folder: Path) -> dict[Path, list[str]]:
    """Return each safetensors file and the tensors it holds."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not all(isinstance(shard, str) for shard in shards):
                raise ValueError("it names something that is no file")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelFolderError(f"{index} is damaged: {error}") from error
    else:
        shards = ["model.safetensors"]
    files: dict[Path, list[str]] = {}
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise ModelFolderError(f"{folder} lacks {shard}")
        with _open(path) as tensors:
            files[path] = list(tensors.keys())
    return files


def _tensor_names(files: dict[Path, list[str]]) -> dict[str, Path]:
    # Old exports keep the rotary frequencies, which are computed here.
    return {name: path for path, names in files.items() for name in names if not name.endswith("rotary_emb.inv_freq")}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path} is damaged: {error}") from error


def _check_names(folder: Path, config: ModelConfig, expected: dict[str, Tensor], found: dict[str, Path]) -> None:
    extra = found.keys() - expected.keys()
    if config.tie_word_embeddings:
        extra = extra - {"lm_head.weight"}  # some exports write the tied head as well
    if missing := sorted(expected.keys() - found.keys()):
        raise ModelFolderError(f"{folder} lacks the tensor {missing[0]} ({len(missing)} missing)")
    if extra:
        raise ModelFolderError(f"{folder} holds a tensor its config.json does not call for: {sorted(extra)[0]}")


def _stored_dtype(folder: Path, names: dict[str, Path]) -> torch.dtype:
    name, path = "model.norm.weight", names["model.norm.weight"]
    with _open(path) as tensors:
        return tensors.get_tensor(name).dtype


def _copy(path: Path, name: str, source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        raise ModelFolderError(
            f"{path}: {name} has shape {list(source.shape)}, config.json calls for {list(target.shape)}"
        )
    target.copy_(source)
