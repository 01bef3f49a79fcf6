"""What needs an accelerator (`make gpu-check`), and the benchmark's own code at a small size on the CPU."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from outrider.benchmarks.accelerator import WIDTHS, benchmark_accelerator
from outrider.decoding import Decoder
from outrider.devices import peak_flops, pick_device
from outrider.errors import Interrupted
from outrider.model import load_model
from outrider.recipe import Recipe
from outrider.training import train
from outrider.training.telemetry import read_metrics
from tests.conftest import TEXTS, tiny_model

PRESENT = torch.cuda.is_available() or torch.backends.mps.is_available()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def needs_one(test):
    skip = pytest.mark.skipif(not PRESENT, reason="no accelerator (CUDA, ROCm or MPS) on this machine")
    return pytest.mark.accelerator(skip(test))


@pytest.fixture
def device() -> torch.device:
    return pick_device("auto")


def losses(path: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(path) if "loss" in record]


@needs_one
@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}], ids=str)
def test_logits_are_those_of_the_cpu(device: torch.device, shape: dict) -> None:
    here, there = tiny_model(3, **shape), tiny_model(3, **shape).to(device)
    tokens = torch.randint(0, 300, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(there(tokens.to(device)).cpu(), here(tokens), rtol=1e-3, atol=1e-3)


@needs_one
@pytest.mark.parametrize("width", [1, 4, "auto"])
def test_greedy_decoding_with_a_draft_loses_nothing(model_folder: Path, draft_folder: Path,
                                                    width: int | str) -> None:
    decoder = Decoder.load(model_folder, draft_folder, dtype=torch.float32)
    assert decoder.target.config.vocab_size == 300
    for prompt in (text[:20] for text in TEXTS[:4]):
        plain = decoder.generate(prompt, max_new_tokens=48, speculate=False)
        with_draft = decoder.generate(prompt, max_new_tokens=48, width=width)  # type: ignore[arg-type]
        assert with_draft.ids == plain.ids
        assert with_draft.text == plain.text


@needs_one
def test_greedy_decoding_says_what_the_cpu_says(model_folder: Path) -> None:
    on_cpu, on_gpu = (Decoder.load(model_folder, device=name, dtype=torch.float32)
                      for name in ("cpu", "auto"))
    for prompt in (text[:20] for text in TEXTS[:4]):
        expected = on_cpu.generate(prompt, max_new_tokens=16).ids
        assert on_gpu.generate(prompt, max_new_tokens=16).ids == expected


@needs_one
def test_training_in_bf16_follows_the_cpu_in_fp32(tmp_path: Path, recipe_file: Path) -> None:
    """A seed gives the same weights and the same data on every device."""
    on_gpu = train(Recipe.load(recipe_file, ["training.precision='bf16'"]))
    on_cpu = train(Recipe.load(recipe_file, ["training.device='cpu'", f"output='{tmp_path / 'cpu'}'"]))
    assert losses(on_gpu.metrics) == pytest.approx(losses(on_cpu.metrics), abs=0.05)
    assert losses(on_gpu.metrics)[-1] < losses(on_gpu.metrics)[0]
    assert all(torch.isfinite(p).all() for p in load_model(on_gpu.model).parameters())


@needs_one
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_stopped_run_continues(tmp_path: Path, recipe_file: Path, kind: str) -> None:
    """An accelerator's sums may differ in their last bit from run to run, so losses are close, not equal."""

    class Stop:
        def update(self, done: float, total: float | None, note: str) -> None:
            if done == 4:
                signal.raise_signal(signal.SIGTERM)

    undisturbed = train(Recipe.load(recipe_file, [f"optimizer.kind='{kind}'",
                                                  f"output='{tmp_path / 'whole'}'"]))
    recipe = Recipe.load(recipe_file, [f"optimizer.kind='{kind}'"])
    with pytest.raises(Interrupted):
        train(recipe, watcher=Stop())
    torch.manual_seed(99)
    continued = train(recipe, resume=True, warn=lambda line: None)
    assert len(losses(continued.metrics)) == 10
    assert losses(continued.metrics) == pytest.approx(losses(undisturbed.metrics), rel=1e-3)


def check_schema(result: dict) -> None:
    assert result.keys() == {"format", "version", "provenance", "target_decode", "draft_decode", "training"}
    assert result["format"] == "outrider-accelerator-benchmark"
    assert result["version"] == 1
    assert result["provenance"].keys() >= {"command", "date", "outrider", "torch", "python", "system",
                                           "device"}
    for part in ("target_decode", "draft_decode"):
        decode = result[part]
        assert decode.keys() == {"parameters", "context", "dtype", "seconds_by_tokens", "tokens_per_second",
                                 "bytes_read", "bandwidth_share"}
        assert list(decode["seconds_by_tokens"]) == [str(width) for width in WIDTHS]
        assert all(seconds > 0 for seconds in decode["seconds_by_tokens"].values())
        assert decode["tokens_per_second"] == pytest.approx(1 / decode["seconds_by_tokens"]["1"])
    assert result["target_decode"]["parameters"] > result["draft_decode"]["parameters"]
    assert result["training"]
    for entry in result["training"]:
        assert entry.keys() == {"parameters", "context", "windows", "compile", "tokens_per_second", "mfu",
                                "peak_memory_bytes"}
        assert entry["tokens_per_second"] > 0


@needs_one
def test_the_small_benchmark_runs_here(tmp_path: Path, device: torch.device) -> None:
    path = benchmark_accelerator(tmp_path, small=True)
    assert path is not None
    result = json.loads(path.read_text())
    check_schema(result)
    assert all((entry["mfu"] is None) == (peak_flops(device, "bf16") is None) for entry in result["training"])


def test_the_benchmark_writes_its_schema_on_a_cpu(tmp_path: Path) -> None:
    """A bandwidth nobody stated is null, not a guess."""
    path = benchmark_accelerator(tmp_path / "new" / "results", "cpu", small=True)
    assert path is not None
    assert path.parent == tmp_path / "new" / "results"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    result = json.loads(path.read_text())
    check_schema(result)
    assert result["target_decode"]["bandwidth_share"] is None
    assert [entry["compile"] for entry in result["training"]] == [False]
    assert result["training"][0]["mfu"] > 0
    assert result["training"][0]["peak_memory_bytes"] is None


def test_a_cpu_is_no_accelerator(tmp_path: Path) -> None:
    assert benchmark_accelerator(tmp_path, "cpu") is None
    assert list(tmp_path.iterdir()) == []
