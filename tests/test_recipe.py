"""Recipes: what is written is what is meant, and what cannot be is refused before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider.model import ModelConfig
from outrider.recipe import Recipe, parse_count

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.toml"))

SMALLEST: dict[str, Any] = {"name": "small", "model": {"preset": "draft-1m"}, "data": {"path": "data/x"},
                            "training": {"tokens": 1000}}
SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 1024}


def changed(**dotted: Any) -> dict[str, Any]:
    """Return the smallest recipe with `section__key=value` set."""
    values = json.loads(json.dumps(SMALLEST))
    for key, value in dotted.items():
        *sections, last = key.split("__")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
    return values


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


TOML = """
name = "demo"
[model]
preset = "draft-1m"
num_hidden_layers = 3
[data]
path = "data/demo"
[training]
tokens = "2M"
batch_tokens = 2_048
context = 256
[optimizer]
lr = 3e-4
betas = [0.9, 0.99]
"""


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return write(tmp_path / "demo.toml", TOML)


# Reading.


def test_a_file_is_read(demo: Path) -> None:
    recipe = Recipe.load(demo)
    assert (recipe.name, recipe.data.path, recipe.training.tokens) == ("demo", "data/demo", 2_000_000)
    assert (recipe.training.batch_tokens, recipe.training.context) == (2048, 256)
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (3e-4, (0.9, 0.99))
    assert recipe.model_shape(4096).num_hidden_layers == 3
    assert recipe.folder == Path("runs/demo")
    assert Recipe.load(demo, ["output=elsewhere/x"]).folder == Path("elsewhere/x")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_in_the_project_loads(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.steps > 0
    assert Recipe.build(recipe.dump()) == recipe


@pytest.mark.parametrize(("text", "number"), [
    ("1", 1), ("670_000", 670_000), ("1_000", 1000), ("2k", 2000), ("2K", 2000), ("2M", 2_000_000), ("2 M", 2_000_000),
    ("1.5B", 1_500_000_000), ("0.5m", 500_000), ("670B", 670_000_000_000), ("1T", 10**12), (" 3M ", 3_000_000),
    ("1.000001M", 1_000_001)])
def test_counts(text: str, number: int) -> None:
    assert parse_count(text) == number
    assert Recipe.build(changed(training__tokens=text)).training.tokens == number
    assert type(Recipe.build(changed(training__tokens=text)).training.tokens) is int


@pytest.mark.parametrize("text", [
    "", " ", "M", "_", "2X", "2MB", "-2M", "2M M", "1e6", "1.5.2M", "two", "0x10", "2,000", "1.5", "0.0001k", "inf",
    "nan", "1__0.M"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        Recipe.build(changed(training__tokens=text))


@pytest.mark.parametrize("value", [True, 1.5, float("nan"), float("inf"), None, [], [5], {}, {"a": 1}])
def test_values_that_are_no_count(value: object) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        Recipe.build(changed(training__tokens=value))


@pytest.mark.parametrize(("tokens", "batch", "steps"), [(1, 512, 1), (512, 512, 1), (513, 512, 2), ("1M", 1024, 977)])
def test_steps_reach_the_tokens(tokens: object, batch: int, steps: int) -> None:
    recipe = Recipe.build(changed(training__tokens=tokens, training__batch_tokens=batch, training__context=256))
    assert recipe.steps == steps
    assert recipe.batch_windows == batch // 256


# Overrides.


@pytest.mark.parametrize(("override", "expected"), [
    ("training.tokens=3M", 3_000_000), ("training.tokens=3_000", 3000), ('training.tokens="3k"', 3000),
    (" training.tokens = 7 ", 7)])
def test_overrides_replace_a_value(demo: Path, override: str, expected: int) -> None:
    assert Recipe.load(demo, [override]).training.tokens == expected


def test_overrides_of_every_type(demo: Path) -> None:
    recipe = Recipe.load(demo, [
        "name=other", "data.path=/some where/else", "optimizer.lr=1e-3", "optimizer.betas=[0.8, 0.9]",
        "training.compile=true", "schedule.kind=wsd", "snapshots.every=5", "model.num_hidden_layers=7",
        "training.seed=0"])
    assert (recipe.name, recipe.data.path) == ("other", "/some where/else")
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1e-3, (0.8, 0.9))
    assert (recipe.training.compile, recipe.schedule.kind, recipe.snapshots.every) == (True, "wsd", 5)
    assert recipe.model_shape(4096).num_hidden_layers == 7
    assert recipe.training.context == 256  # what is not named stays


def test_the_last_override_wins(demo: Path) -> None:
    assert Recipe.load(demo, ["training.tokens=1M", "training.tokens=2k"]).training.tokens == 2000


def test_overrides_may_name_a_section_the_file_lacks(demo: Path) -> None:
    assert Recipe.load(demo, ["logging.tensorboard=true"]).logging.tensorboard is True


@pytest.mark.parametrize("override", [
    "training.tokens", "=5", "", ".=5", "training.=5", ".tokens=5", "training..tokens=5", "name.deeper=5",
    "training.tokens.deeper=5", "training=5", "training.tokens="])
def test_overrides_that_make_no_sense(demo: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        Recipe.load(demo, [override])


# What is refused.


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        Recipe.build(values, "some.toml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("change", [
    {"training__tokens": 0}, {"training__tokns": 5}, {"training__batch_tokens": 700}, {"model__preset": "nonexistent"},
    {"model__hiden_size": 5}, {"model__num_attention_heads": 3}, {"model__max_position_embeddings": 64}, {"model": {}}],
    ids=str)
def test_the_message_says_where(change: dict[str, Any]) -> None:
    assert refused(changed(**change)).startswith("some.toml: ")


@pytest.mark.parametrize(("key", "meant"), [
    ("training__tokns", "tokens"), ("training__batch_token", "batch_tokens"), ("optimizer__learning_rat", None),
    ("optimiser", "optimizer"), ("trainig", "training"), ("schedule__warm_up", "warmup"), ("evaluation__evry", "every"),
    ("data__pth", "path"), ("nam", "name"), ("model__hiden_size", "hidden_size"), ("model__pre_set", "preset"),
    ("model__num_layers", "num_hidden_layers")])
def test_an_unknown_key_is_refused_with_the_nearest(key: str, meant: str | None) -> None:
    message = refused(changed(**{key: {} if key in ("optimiser", "trainig") else 5}))
    assert f"unknown key '{key.replace('__', '.').removeprefix('model.')}'" in message.replace("'model.", "'")
    if meant is not None:
        assert f"did you mean '{meant}'" in message
    else:
        assert "lr" in message  # nothing is near: the known ones are listed


@pytest.mark.parametrize("key", ["name", "overrides", "self", "values"])
def test_an_unknown_key_of_the_model_with_an_unlucky_name(key: str) -> None:
    assert key in refused(changed(**{f"model__{key}": 5}))


IMPOSSIBLE: dict[str, list[Any]] = {
    "name": ["", "a b", "a/b", "../x", ".", "..", 5, None, "a\n"],
    "output": [5, None],
    "model": ["nano-5m", 5, None, {}],
    "model__preset": ["nonexistent", "", 5],
    "data__path": [5, None],
    "training__tokens": [0, -1],
    "training__batch_tokens": [0, -512, 511, 513],
    "training__context": [0, 1, -5],
    "training__micro_batch": [-1, 1.5],
    "training__precision": ["fp16", "int8", "", 32],
    "training__clip": [-1, float("nan"), "x"],
    "training__seed": [-1, 1.5, "x"],
    "training__threads": [-1],
    "training__compile": ["perhaps", 5],
    "optimizer__kind": ["sgd", ""],
    "optimizer__lr": [0, -1e-3, 1.5, float("nan"), float("inf"), "fast"],
    "optimizer__betas": [[0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 0.95, 0.99], 0.9, "x", [float("nan"), 0.9]],
    "optimizer__eps": [0, -1, float("nan"), float("inf")],
    "optimizer__weight_decay": [-0.1, float("nan"), float("inf")],
    "schedule__kind": ["linear"],
    "schedule__warmup": [-1, 1.5, "x"],
    "schedule__final": [-0.1, 1.1, float("nan")],
    "schedule__decay": [0, -1, 1.1, float("nan")],
    "evaluation__every": [-1, "x"],
    "snapshots__every": [-1],
    "snapshots__keep": [0, -1],
    "logging__tensorboard": ["x"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values])
def test_impossible_values(key: str, value: object) -> None:
    assert key.split("__")[-1] in refused(changed(**{key: value}))


IMPOSSIBLE_SHAPES: dict[str, list[Any]] = {
    "hidden_size": [0, -32, 33, 1.5, "wide", None, True],
    "num_attention_heads": [0, -4, 5, 64, "x"],       # 5 does not divide 32; 64 leave no room for a head
    "num_key_value_heads": [-1, 3, 8],
    "head_dim": [-2, 7],
    "num_hidden_layers": [0, -1, "x"],
    "intermediate_size": [0, -1],
    "max_position_embeddings": [0, -1, 511],          # the default context is 512
    "vocab_size": [0, -1],
    "rope_theta": [0, -1, float("inf"), float("nan")],
    "rms_norm_eps": [0, -1, float("nan")],
    "rope_scaling": [5, "x", {}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "linear", "factor": 0}],
}


@pytest.mark.parametrize("start", ["preset", "fields"])
@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in IMPOSSIBLE_SHAPES.items() for value in values])
def test_impossible_shapes(start: str, key: str, value: object) -> None:
    # From a preset or field by field, a shape is checked when the recipe is read, not when training starts.
    base = {"preset": "draft-1m"} if start == "preset" else {}
    refused(changed(model={**base, **SHAPE, key: value}))


def test_heads_that_do_not_divide_the_width_are_named() -> None:
    message = refused(changed(model={**SHAPE, "num_attention_heads": 5}))
    assert "hidden_size 32" in message
    assert "num_attention_heads 5" in message


@pytest.mark.parametrize("start", ["preset", "fields"])
def test_a_context_longer_than_the_positions(start: str) -> None:
    base = {"preset": "draft-1m"} if start == "preset" else SHAPE
    model = {**base, "max_position_embeddings": 256}
    assert Recipe.build(changed(model=model, training__context=256)).training.context == 256
    message = refused(changed(model=model, training__context=512))
    assert "context 512" in message
    assert "256" in message


@pytest.mark.parametrize(("context", "batch"), [(512, 700), (100, 512), (512, 256), (3, 16_384)])
def test_a_batch_that_is_no_multiple_of_the_context(context: int, batch: int) -> None:
    message = refused(changed(training__context=context, training__batch_tokens=batch))
    assert str(context) in message
    assert str(batch) in message


def test_a_number_written_as_text_means_the_number_or_nothing() -> None:
    # "32" for 32 is an easy slip in TOML; what must not happen is a shape with heads of no width.
    for key, value in SHAPE.items():
        try:
            recipe = Recipe.build(changed(model={**SHAPE, key: str(value)}))
        except ConfigError:
            continue
        assert recipe.model_shape(300) == ModelConfig(vocab_size=300, **SHAPE)


@pytest.mark.parametrize("key", ["name", "model", "data", "training"])
def test_a_missing_section_is_named(key: str) -> None:
    values = changed()
    del values[key]
    assert key in refused(values)


@pytest.mark.parametrize("model", [
    {"preset": "draft-1m", "start_from": "x"}, {"start_from": "x", "hidden_size": 64},
    {"hidden_size": 64}])
def test_a_model_is_a_preset_or_a_folder_or_a_whole_shape(model: dict[str, Any]) -> None:
    refused(changed(model=model))


@pytest.mark.parametrize("text", [
    b"", b"name = ", b"= 5", b"[[[", b"\xff\xfe", b"name = 'a'\nname = 'b'", b"{}", b"\0"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"r\.toml") as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.toml", tmp_path):
        with pytest.raises(ConfigError, match="no recipe"):
            Recipe.load(path)


# The shape.


def test_the_vocabulary_follows_the_tokenizer() -> None:
    fields = Recipe.build(changed(model=SHAPE))
    assert fields.model_shape(777).vocab_size == 777
    preset = Recipe.build(changed())
    assert preset.model_shape(300).vocab_size == 4096
    assert preset.model_shape(5000).vocab_size == 5000
    fixed = Recipe.build(changed(model__vocab_size=1000))
    assert fixed.model_shape(1000).vocab_size == 1000
    with pytest.raises(ConfigError, match="1001"):
        fixed.model_shape(1001)


# The resolved copy.


@pytest.mark.parametrize("values", [
    changed(), changed(model=SHAPE), changed(model={"start_from": "runs/x/model"}),
    changed(training__tokens="1.5B", optimizer__betas=[0.8, 0.95], schedule__kind="wsd", logging__tensorboard=True),
    changed(model__rope_scaling={"rope_type": "linear", "factor": 2.0}, output="else/where")],
    ids=["preset", "fields", "folder", "many", "scaling"])
def test_the_resolved_copy_builds_the_same_recipe(values: dict[str, Any]) -> None:
    recipe = Recipe.build(values)
    copy = json.loads(json.dumps(recipe.dump()))  # as it is kept with a run
    again = Recipe.build(copy)
    assert again == recipe
    assert again.dump() == copy
    assert type(copy["training"]["tokens"]) is int
    # Every key is there, so that a default that changes later does not change an old run.
    for section, model in Recipe.model_fields.items():
        fields = getattr(model.annotation, "model_fields", None)
        if fields is not None:
            assert set(fields) <= set(copy[section])


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.build(changed())
    for owner, key in ((recipe, "name"), (recipe.training, "tokens"), (recipe.model, "preset")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(owner, key, "x")


def test_recipes_need_no_torch() -> None:
    # Reading one on a laptop, or in a launcher, must be quick.
    script = "import sys; sys.modules['torch'] = None; import outrider.recipe; print('ok')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr
