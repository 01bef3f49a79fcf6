"""What the doctor finds, and each piece of advice it gives."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider import __version__
from outrider.doctor import EXTRAS, Diagnosis, _advice, diagnose
from tests.conftest import Cli

HEALTHY: dict[str, Any] = {
    "outrider": __version__, "torch": "2.13.0", "build": "CPU", "devices": ["cpu: x"], "cores": 4,
    "threads": 4, "memory": 8 << 30, "free_disk": 100_000_000_000, "extras": {},
    "speed": {"cpu_fp32_flops": 1e11, "cpu_bf16_flops": 2e11, "cpu_copy_bytes": 2e10},
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine without drivers and with the right torch; a test changes what it wants."""
    state: dict[str, Any] = {"tools": set(), "version": "2.13.0+cpu", "cuda": False}
    monkeypatch.setattr("outrider.doctor.shutil.which", lambda tool: tool if tool in state["tools"] else None)
    monkeypatch.setattr("outrider.doctor.importlib.metadata.version", lambda package: state["version"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state["cuda"])
    return state


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def advice(**changes: Any) -> list[str]:
    return _advice(Diagnosis(**{**HEALTHY, **changes}))


@pytest.mark.usefixtures("machine")
def test_a_healthy_machine_needs_nothing() -> None:
    assert advice() == []


@pytest.mark.usefixtures("machine")
def test_without_the_speed_check_nothing_is_said_of_speed() -> None:
    assert advice(speed={}) == []


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("changes", "expected"), [
    ({"threads": 5}, "OMP_NUM_THREADS=4"),
    ({"free_disk": 9_999_999_999}, "10.0 GB of disk"),
    ({"free_disk": 0}, "0.0 GB of disk"),
    ({"speed": {**HEALTHY["speed"], "cpu_bf16_flops": 0.9e11}}, "training.precision=fp32"),
    ({"speed": {**HEALTHY["speed"], "cpu_copy_bytes": 4.9e9}}, "memory is slow"),
])
def test_each_trouble_has_its_own_advice(changes: dict[str, Any], expected: str) -> None:
    (line,) = advice(**changes)
    assert expected in line
    assert "\n" not in line


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("changes", [
    {"threads": 4}, {"threads": 1}, {"free_disk": 10_000_000_000},
    {"speed": {**HEALTHY["speed"], "cpu_bf16_flops": 1e11}},
    {"speed": {**HEALTHY["speed"], "cpu_copy_bytes": 5e9}},
])
def test_at_the_limit_all_is_well(changes: dict[str, Any]) -> None:
    assert advice(**changes) == []


@pytest.mark.parametrize(("tool", "expected"), [("nvidia-smi", "/cu1"), ("rocminfo", "/rocm")])
def test_a_driver_torch_cannot_use_is_named_with_its_cure(machine: dict[str, Any], tool: str,
                                                          expected: str) -> None:
    machine["tools"] = {tool}
    (line,) = advice()
    assert expected in line
    assert "pip install" in line
    machine["cuda"] = True
    assert advice() == []


@pytest.mark.parametrize(("version", "wrong"), [
    ("2.12.1", True), ("2.14.0", True), ("2.130.0", True), ("3.0.0", True), ("2.13.0", False),
    ("2.13.1+cu130", False),
])
def test_another_torch_is_named(machine: dict[str, Any], version: str, wrong: bool) -> None:
    machine["version"] = version
    found = advice()
    assert len(found) == wrong
    assert all(version in line and "torch>=2.13,<2.14" in line for line in found)


def test_a_fast_diagnosis(tmp_path: Path) -> None:
    found = diagnose(tmp_path, speed=False)
    assert found.outrider == __version__
    assert found.torch == torch.__version__
    assert found.devices[0].startswith("cpu: ")
    assert found.threads == torch.get_num_threads()
    assert found.cores >= 1
    assert found.memory is None or found.memory > 1 << 28
    assert 0 < found.free_disk <= shutil.disk_usage(tmp_path).total
    assert found.speed == {}
    assert found.extras.keys() == EXTRAS.keys()
    assert "pyarrow" not in found.extras["data"], "installed for the tests"
    assert json.loads(json.dumps(found.dump())) == found.dump()


def test_missing_packages_are_listed_by_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.doctor.importlib.util.find_spec", lambda name: None)
    assert diagnose(speed=False).extras == {extra: list(packages) for extra, packages in EXTRAS.items()}
    monkeypatch.setattr("outrider.doctor.importlib.util.find_spec", lambda name: object())
    assert not any(diagnose(speed=False).extras.values())


def test_every_accelerator_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert diagnose(speed=False).devices[1:3] == ["cuda:0: GPU 0", "cuda:1: GPU 1"]


def test_the_speed_check_measures_arithmetic_memory_training_and_decoding() -> None:
    speed = diagnose().speed
    assert {name.split("_", 1)[1] for name in speed} == {
        "fp32_flops", "bf16_flops", "copy_bytes", "train_tokens", "decode_tokens"}
    assert all(math.isfinite(value) and value > 0 for value in speed.values())


def test_the_command_prints_json_or_a_table(cli: Cli) -> None:
    found = cli("doctor", "--fast", "--json")
    assert found.returncode == 0, found.stderr
    printed = json.loads(found.stdout)
    assert printed.keys() == diagnose(speed=False).dump().keys()
    assert printed["torch"] == torch.__version__
