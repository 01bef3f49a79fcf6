"""Picking a device, its precision, and the peak that utilisation is measured against."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from outrider.devices import (
    autocast,
    cores,
    device_name,
    measured_matmul,
    peak_flops,
    pick_device,
    synchronize,
)
from outrider.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def having(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Pretend to have so many CUDA devices, and MPS or not."""

    def set_(cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return set_


@pytest.mark.parametrize(("cuda", "mps", "name", "expected"), [
    (0, False, "auto", "cpu"), (0, True, "auto", "mps"), (1, False, "auto", "cuda"),
    (2, True, "auto", "cuda"), (2, True, "cpu", "cpu"), (2, False, "cuda:1", "cuda:1"),
    (1, False, "cuda:0", "cuda:0"),
    (0, True, "mps", "mps"),
])
def test_the_best_device_or_the_one_asked_for(having: Callable[[int, bool], None], cuda: int, mps: bool,
                                              name: str, expected: str) -> None:
    having(cuda, mps)
    assert pick_device(name) == torch.device(expected)


@pytest.mark.parametrize(("cuda", "mps", "name"), [
    (0, True, "cuda"), (1, False, "cuda:1"), (2, False, "cuda:9"), (1, False, "mps"), (0, False, "meta"),
    (0, False, "xpu"), (0, False, "gpu"), (0, False, ""), (0, False, "cuda:x"), (0, False, "CPU "),
])
def test_a_device_that_is_not_there_is_one_line(having: Callable[[int, bool], None], cuda: int, mps: bool,
                                                name: str) -> None:
    having(cuda, mps)
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    assert f"'{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_autocast_changes_matrix_products_only_when_asked() -> None:
    a = torch.ones(4, 4)
    with autocast(CPU, "bf16"):
        assert torch.mm(a, a).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert torch.mm(a, a).dtype == torch.float32


def test_the_cpu_has_a_measured_peak() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        peak = peak_flops(CPU, precision)
        assert peak is not None
        assert peak > 0
        assert peak == measured_matmul(dtype) == peak_flops(CPU, precision), "timed once, or MFU would jump"


@pytest.mark.parametrize(("name", "teraflops"), [
    ("NVIDIA H200", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA A10G", 70), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("Tesla V100-SXM2-32GB", 125),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71), ("AMD Instinct MI250X", 181),
    ("AMD Instinct MI300X", 1307), ("AMD Instinct MI325X", 1307), ("AMD Instinct MI355X", 2500),
])
def test_known_accelerators_have_their_makers_figure(monkeypatch: pytest.MonkeyPatch, name: str,
                                                     teraflops: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU, "bf16") == teraflops * 1e12
    assert peak_flops(GPU, "fp32") == pytest.approx(teraflops * 1e12 / 16)


@pytest.mark.parametrize("name", ["Nobody's GPU", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA A10"])
def test_an_unknown_accelerator_has_no_figure(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also one whose name merely begins like a known one's: a wrong peak is a wrong MFU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU, "bf16") is None
    assert peak_flops(GPU, "fp32") is None


def test_apples_gpu_has_no_figure() -> None:
    assert peak_flops(torch.device("mps"), "bf16") is None


def test_names_say_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_name(GPU) == "NVIDIA H200"
    assert device_name(CPU).endswith(f", {torch.get_num_threads()} threads")
    assert device_name(CPU).split(",")[0].strip()
    assert "Apple" in device_name(torch.device("mps"))


def test_waiting_for_a_cpu_is_nothing() -> None:
    synchronize(CPU)


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the machine: in a container these differ."""
    monkeypatch.setattr("outrider.devices.os.sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert cores() == 3
    monkeypatch.delattr("outrider.devices.os.sched_getaffinity")
    monkeypatch.setattr("outrider.devices.os.cpu_count", lambda: None)
    assert cores() == 1
