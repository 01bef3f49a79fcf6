"""Model folders: what transformers writes is read, what is written transformers reads, damage is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import outrider.model.folder as folder_module
from outrider.corpus import Tokenizer
from outrider.errors import DiskError, ModelFolderError
from outrider.model import load_config, load_model, save_model
from tests.conftest import tiny_model
from tests.model.test_llama import TOLERANCE, assert_close, random_tokens, reference_model

#: A language model's weights as any process may see them.
State = dict[str, torch.Tensor]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def copy_of(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[State], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# What we write


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True, "num_key_value_heads": 2}, {"num_key_value_heads": 1, "head_dim": 16},
])
def test_transformers_opens_what_is_saved(tmp_path: Path, corpus: Path, changes: dict[str, Any]) -> None:
    model = tiny_model(3, **changes)
    folder = save_model(model, tmp_path / "out", tokenizer_from=corpus)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = random_tokens(2, 40, size=300)
    assert_close(model(tokens), theirs(tokens).logits.detach())
    text = "def add(a, b):\n    return a + b  # sum \u00e9"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == Tokenizer.load(folder).encode(text)
    assert Tokenizer.load(folder).encode(text) == Tokenizer.load(corpus).encode(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_is_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(3, num_key_value_heads=2, eos_token_ids=(5, 6), bos_token_id=4)
    folder = save_model(model, tmp_path / "out", dtype=dtype)
    loaded = load_model(folder)
    assert loaded.config == model.config
    assert loaded.dtype == dtype
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for (name, ours), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours.to(dtype), theirs), name
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (4, [5, 6])


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    folder = save_model(tiny_model(tie_word_embeddings=True), tmp_path / "out")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = load_model(folder)
    assert loaded.head.weight is loaded.embedding.weight


def test_extra_files_go_along(tmp_path: Path) -> None:
    folder = save_model(tiny_model(), tmp_path / "out", extra_files={"README.md": "# A card \u00e9\n"})
    assert (folder / "README.md").read_text(encoding="utf-8") == "# A card \u00e9\n"


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    folder = save_model(tiny_model(1), tmp_path / "out", extra_files={"old.txt": "old"})
    before = contents(folder)
    with pytest.raises(DiskError, match="exists already"):
        save_model(tiny_model(2), folder)
    assert contents(folder) == before
    save_model(tiny_model(2), folder, replace=True)
    assert not (folder / "old.txt").exists(), "the old folder is replaced, not written over"
    assert torch.equal(load_model(folder).embedding.weight, tiny_model(2).embedding.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [
    OSError(errno.ENOSPC, "No space left on device"),
    # What safetensors 0.8 raises on a full disk (seen on a 1 MB tmpfs): not an OSError.
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
], ids=["os", "safetensors"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_full_disk_leaves_things_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                failure: Exception, replace: bool) -> None:
    folder = tmp_path / "out"
    if replace:
        save_model(tiny_model(1), folder)
    before = contents(tmp_path)

    def half_written(tensors: State, path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half a file")
        raise failure

    monkeypatch.setattr(folder_module, "save_file", half_written)
    with pytest.raises(DiskError, match="disk is full") as caught:
        save_model(tiny_model(2), folder, replace=replace)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
    assert folder.exists() == replace


def test_any_other_failure_also_leaves_things_as_they_were(tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tiny_model(1), tmp_path / "out")
    before = contents(tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(2), folder, replace=True)
    assert contents(tmp_path) == before


# What transformers writes


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("rope", ["default", "llama3"])
def test_reads_a_sharded_folder(tmp_path: Path, tied: str, rope: str) -> None:
    theirs = reference_model("gqa", tied, rope)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = random_tokens(2, 50)
    assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits)


def test_reads_bfloat16(tmp_path: Path) -> None:
    half: Any = reference_model().bfloat16()
    half.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens(2, 50)
    assert load_model(tmp_path).dtype == torch.bfloat16
    as_float = load_model(tmp_path, dtype=torch.float32)
    assert as_float.dtype == torch.float32
    assert_close(as_float(tokens), theirs(tokens).logits.detach())


@pytest.mark.parametrize("stored", [False, True])
def test_reads_tied_models_with_and_without_their_head(tmp_path: Path, stored: bool) -> None:
    theirs = reference_model("mha", "tied")
    theirs.save_pretrained(tmp_path)

    def set_head(tensors: State) -> None:
        tensors.pop("lm_head.weight", None)
        if stored:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(tmp_path, set_head)
    loaded = load_model(tmp_path)
    assert loaded.head.weight is loaded.embedding.weight
    tokens = random_tokens(2, 20)
    assert_close(loaded(tokens), theirs(tokens).logits)


def test_stored_rotary_frequencies_of_old_exports_are_ignored(tmp_path: Path, model_folder: Path) -> None:
    folder = copy_of(model_folder, tmp_path)
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    tokens = random_tokens(1, 20, size=300)
    assert torch.equal(load_model(folder)(tokens), load_model(model_folder)(tokens))


# The hub


def make_hub_cache(home: Path, name: str, source: Path) -> None:
    """Lay a model out as the hub's client keeps a downloaded snapshot."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_hub_ids_are_found_in_the_local_cache_or_refused(tmp_path: Path, model_folder: Path) -> None:
    make_hub_cache(tmp_path / "home", "someone/tiny-model", model_folder)
    # A process of its own, because the hub's client reads these variables when it is imported.
    script = """
import torch
from outrider.errors import ModelFolderError
from outrider.model import load_model
print(load_model("someone/tiny-model")(torch.arange(12)[None]).double().sum().item())
try:
    load_model("someone/other-model")
except ModelFolderError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(variable, None)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment,
                            capture_output=True, text=True, check=True, timeout=120)
    total, error = result.stdout.splitlines()  # two lines: the error is one
    expected = load_model(model_folder)(torch.arange(12)[None]).double().sum().item()
    assert float(total) == pytest.approx(expected, abs=TOLERANCE)
    assert "someone/other-model" in error
    assert "Hugging Face Hub" in error


def test_only_safe_files_are_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_model("someone/tiny-model").config == load_config(model_folder)
    [(name, patterns)] = asked
    assert name == "someone/tiny-model"
    for pattern in patterns:
        assert not pattern.endswith((".bin", ".pt", ".pth", "*")), "a pickle might come"


# Damage

INDEX = "model.safetensors.index.json"


def cut(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def overwrite(folder: Path, at: int, data: bytes) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(at)
        file.write(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text('{"model_type": '), "not valid JSON"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xff"}'), "config.json"),
    "config not an object": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "config of another family": (lambda f: edit_config(f, model_type="gpt2"), "gpt2"),
    "config impossible": (lambda f: edit_config(f, num_attention_heads=3, head_dim=None), "divisible"),
    "config rope not an object": (lambda f: edit_config(f, rope_scaling="linear"), "rope"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
                    "lacks model.safetensors"),
    "missing tensor": (lambda f: edit_weights(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
                       "lacks the tensor model.layers.1.mlp.up_proj.weight"),
    "missing head": (lambda f: edit_weights(f, lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "extra tensor": (lambda f: edit_weights(f, lambda t: t.update(
        {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})), "q_proj.bias"),
    "more layers than called for": (lambda f: edit_config(f, num_hidden_layers=1), "model.layers.1."),
    "wrong shape": (lambda f: edit_weights(f, lambda t: t.update({"model.norm.weight": torch.ones(33)})),
                    "model.norm.weight has shape [33], config.json calls for [32]"),
    "transposed": (lambda f: edit_weights(f, lambda t: t.update(
        {"model.layers.0.mlp.down_proj.weight": torch.ones(48, 32)})), "down_proj.weight has shape [48, 32]"),
    "one that broadcasts": (lambda f: edit_weights(f, lambda t: t.update(
        {"model.layers.0.mlp.down_proj.weight": torch.ones(1, 48)})), "down_proj.weight has shape [1, 48]"),
    "other vocabulary": (lambda f: edit_config(f, vocab_size=301), "has shape [300, 32]"),
    "empty weights": (lambda f: cut(f, 0), "damaged"),
    "header cut": (lambda f: cut(f, 0.001), "damaged"),
    "data cut": (lambda f: cut(f, 0.7), "damaged"),
    "header length absurd": (lambda f: overwrite(f, 0, b"\xff" * 8), "damaged"),
    "header not JSON": (lambda f: overwrite(f, 8, b"garbage!"), "damaged"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "damaged"),
    "index not an object": (lambda f: (f / INDEX).write_text("[]"), "damaged"),
    "index lacks its map": (lambda f: (f / INDEX).write_text("{}"), "damaged"),
    "index of numbers": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), "damaged"),
    "index names a missing shard": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}'),
        "lacks model-1-of-2.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path, model_folder: Path, damage: str) -> None:
    folder = copy_of(model_folder, tmp_path)
    spoil, says = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(ModelFolderError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert says in message
    assert str(folder) in message, "says where"
    assert "\n" not in message


def test_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for path, says in ((tmp_path / "nope", "no model folder"), ("nope", "no model folder"),
                       (file, "is a file")):
        with pytest.raises(ModelFolderError, match=says) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


def test_a_local_path_is_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models/nope` beside an existing `models` is a typing mistake, not a hub id."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelFolderError, match="no model folder models/nope"):
        load_model("models/nope")
