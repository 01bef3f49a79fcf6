"""The plan, against AMD-135M's published figures and arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.corpus import TokenCorpus
from outrider.devices import PEAK_BF16, device_name, pick_device
from outrider.errors import ConfigError, OutriderError
from outrider.model import Llama, preset
from outrider.recipe import Recipe
from outrider.training import train
from outrider.training.plan import ASSUMED_MFU, PLANNED_DEVICES, plan
from tests.conftest import Cli, tiny_config

AMD: dict[str, Any] = {
    "name": "amd", "model": {"preset": "amd-135m"}, "data": {"path": "nowhere/yet"},
    "training": {"tokens": "670B", "batch_tokens": 1024 * 2048, "context": 2048, "micro_batch": 16},
}


def test_amd_135m_has_its_published_figures() -> None:
    """134.1M parameters, 883.6 MFLOP a token (PaLM), 670B tokens in steps of 1,024 x 2,048."""
    made = plan(Recipe.build(AMD))
    assert made.parameters == 134_105_856
    assert round(made.flops_per_token / 1e6, 1) == 883.6
    assert made.matmul_parameters == made.parameters - 32_000 * 768 - 25 * 768
    assert made.flops_per_token == 6 * made.matmul_parameters + 12 * 12 * 768 * 2048
    assert made.steps == -(-670_000_000_000 // (1024 * 2048))
    assert made.tokens == made.steps * 1024 * 2048
    assert made.total_flops == pytest.approx(made.flops_per_token * made.tokens)
    assert made.epochs is None
    # Its authors report six days on 32 dies, 19.7 % of peak: 40 % on one die takes 32 x 6 x 19.7 / 40 days.
    assert made.time_seconds["MI250"] / 86_400 == pytest.approx(32 * 6 * 19.7 / 40, rel=0.01)


def test_parameters_are_those_of_the_model_itself() -> None:
    with torch.device("meta"):
        model = Llama(preset("amd-135m"))
    assert plan(Recipe.build(AMD)).parameters == sum(p.numel() for p in model.parameters())


def test_time_is_flops_over_the_stated_share_of_peak() -> None:
    made = plan(Recipe.build(AMD))
    for name in PLANNED_DEVICES:
        assert made.assumed_mfu[name] == ASSUMED_MFU
        assert made.time_seconds[name] == pytest.approx(made.total_flops / (PEAK_BF16[name] * ASSUMED_MFU))
    here = device_name(pick_device("auto"))
    assert made.time_seconds[here] > 0
    assert made.assumed_mfu.keys() == made.time_seconds.keys()


def test_memory_and_disk_are_counted_in_float32() -> None:
    made = plan(Recipe.build({**AMD, "snapshots": {"keep": 3}}))
    assert made.state_bytes == 4 * 4 * made.parameters  # weights, gradient, two moments
    assert made.snapshot_bytes == 3 * 4 * made.parameters
    # Those kept, the one being written, and the model at the end.
    assert made.disk_bytes == 4 * made.snapshot_bytes + 4 * made.parameters


def test_activations_grow_with_the_micro_batch() -> None:
    one, sixteen, all_ = (plan(Recipe.build({**AMD, "training": {**AMD["training"], "micro_batch": n}}))
                          for n in (1, 16, 0))
    assert sixteen.activation_bytes == 16 * one.activation_bytes
    assert all_.activation_bytes == 1024 * one.activation_bytes


def test_the_snapshot_a_run_writes_is_as_large_as_planned(tmp_path: Path, recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file)
    train(recipe)
    newest = max((tmp_path / "run" / "snapshots").iterdir())
    found = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    # Beside the tensors: headers, the random state, and a step count for each parameter.
    assert plan(recipe).snapshot_bytes <= found <= plan(recipe).snapshot_bytes + 20_000


def test_a_prepared_corpus_gives_epochs_and_vocabulary(recipe_file: Path, corpus: Path) -> None:
    made = plan(Recipe.load(recipe_file))
    assert made.epochs == pytest.approx(2560 / len(TokenCorpus(corpus)))
    assert made.parameters == tiny_config().num_parameters


def test_fine_tuning_takes_the_folders_shape(recipe_file: Path, model_folder: Path) -> None:
    made = plan(Recipe.load(recipe_file, [f"model={{start_from='{model_folder}'}}"]))
    assert made.parameters == tiny_config().num_parameters


def test_an_unknown_vocabulary_is_not_made_up(recipe_file: Path) -> None:
    """Without preset, vocab_size or corpus nobody knows the vocabulary; a plan for one token misleads."""
    with pytest.raises(OutriderError, match="vocab"):
        plan(Recipe.load(recipe_file, ["data.path='nowhere/yet'"]))


def test_an_impossible_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="context"):
        plan(Recipe.build({**AMD, "training": {**AMD["training"], "context": 4096}}))


def test_the_command_prints_the_same(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "amd.toml"
    path.write_text('name = "amd"\nmodel = {preset = "amd-135m"}\ndata = {path = "nowhere/yet"}\n'
                    "training = {tokens = 1, batch_tokens = 2048, context = 2048}\n")
    result = cli("plan", path, "--set", "training.tokens=670B", "--set", "training.batch_tokens=2M",
                 "--set", "training.context=2000", "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    expected = plan(Recipe.load(
        path, ["training.tokens=670B", "training.batch_tokens=2M", "training.context=2000"]))
    timed = ("time_seconds", "assumed_mfu")  # this machine's own entry is measured anew
    assert {key: value for key, value in printed.items() if key not in timed} == \
        {key: value for key, value in expected.dump().items() if key not in timed}
    assert {name: printed["time_seconds"][name] for name in PLANNED_DEVICES} == \
        {name: expected.time_seconds[name] for name in PLANNED_DEVICES}
    assert list(tmp_path.iterdir()) == [path], "a plan leaves nothing behind"
