"""The two scripts behind make: choosing torch's build, and the check of an accelerator."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1] / "tools"
RANGE = "torch>=2.13,<2.14"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Install:
    """tools/install_torch.py on a Linux machine without torch, driver or setting; pip is never run.

    Attributes:
        calls: what pip was asked for.
        codes: exit codes it gives, zero when there is none left.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.codes: list[int] = []
        self.monkeypatch = monkeypatch
        self.module = load("install_torch")
        self.let(pip=self._pip, installed=lambda: False, has_accelerator=lambda: False,
                 resolves_without_cuda=lambda requirement: False)
        monkeypatch.setattr(subprocess, "call", lambda *arguments, **options: pytest.fail(f"ran {arguments}"))
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.delenv("TORCH_INDEX_URL", raising=False)

    def _pip(self, *arguments: str) -> int:
        self.calls.append(arguments)
        return self.codes.pop(0) if self.codes else 0

    def let(self, **functions: Callable[..., object]) -> None:
        for name, function in functions.items():
            self.monkeypatch.setattr(self.module, name, function)

    def main(self) -> int:
        return self.module.main()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    return Install(monkeypatch)


def test_torch_that_is_there_is_left_alone(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install.let(installed=lambda: True)
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.invalid/simple")
    assert install.main() == 0
    assert install.calls == []


def test_without_an_accelerator_the_small_build_is_taken(install: Install) -> None:
    assert install.main() == 0
    assert install.calls == [(RANGE, "--index-url", CPU_INDEX)]


def test_a_small_build_that_pip_finds_by_itself_is_taken(install: Install) -> None:
    asked: list[str] = []
    install.let(resolves_without_cuda=lambda requirement: not asked.append(requirement))
    assert install.main() == 0
    assert install.calls == [tuple(asked)]
    assert asked[0].startswith("torch==2.13.")


@pytest.mark.parametrize("codes", [[1, 0], [1, 1]])
def test_an_index_out_of_reach_falls_back_to_pips_own(install: Install, codes: list[int]) -> None:
    install.codes = list(codes)
    assert install.main() == codes[1]
    assert install.calls == [(RANGE, "--index-url", CPU_INDEX), (RANGE,)]


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_with_a_driver_or_elsewhere_pip_decides(install: Install, monkeypatch: pytest.MonkeyPatch,
                                                platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    install.let(has_accelerator=lambda: platform == "linux")
    install.codes = [7]
    assert install.main() == 7
    assert install.calls == [(RANGE,)]


@pytest.mark.parametrize("accelerator", [False, True])
def test_the_index_of_the_persons_choice_comes_first(install: Install, monkeypatch: pytest.MonkeyPatch,
                                                     accelerator: bool) -> None:
    install.let(has_accelerator=lambda: accelerator)
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.invalid/rocm")
    assert install.main() == 0
    assert install.calls == [(RANGE, "--index-url", "https://example.invalid/rocm")]


@pytest.mark.parametrize(("version", "there"), [
    ("2.13.0", True), ("2.13.2+cpu", True), ("2.12.9", False), ("2.130.0", False), ("2.14.0", False),
    (None, False)])
def test_installed_means_of_the_right_series(monkeypatch: pytest.MonkeyPatch, version: str | None,
                                             there: bool) -> None:
    def found(package: str) -> str:
        assert package == "torch"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    assert load("install_torch").installed() == there


@pytest.mark.parametrize(("tools", "kfd", "expected"), [
    (set(), False, False), ({"nvidia-smi"}, False, True), ({"rocminfo"}, False, True), (set(), True, True)])
def test_a_driver_shows_an_accelerator(monkeypatch: pytest.MonkeyPatch, tools: set[str], kfd: bool,
                                       expected: bool) -> None:
    module = load("install_torch")
    monkeypatch.setattr(module.shutil, "which", lambda tool: tool if tool in tools else None)
    monkeypatch.setattr(module.Path, "exists", lambda path: kfd and str(path) == "/dev/kfd")
    assert module.has_accelerator() == expected


def pip_that_reports(requires: list[str] | None, code: int = 0) -> Callable[..., int]:
    """A pip whose dry run resolves torch to a package with these requirements, or to nothing."""

    def call(command: list[str], **options: object) -> int:
        assert "--dry-run" in command, "only asking: nothing may be installed"
        assert command[-1] == "torch==2.13.0"
        if requires is not None:
            report = {"install": [{"metadata": {"name": "torch", "requires_dist": requires}}]}
            Path(command[command.index("--report") + 1]).write_text(json.dumps(report))
        return code

    return call


@pytest.mark.parametrize(("requires", "code", "small"), [
    (["filelock", "sympy>=1.13"], 0, True), ([], 0, True),
    (["filelock", "nvidia-cublas==13.0; platform_system == 'Linux'"], 0, False),
    (["cuda-toolkit[cudart]==13.0"], 0, False), (["triton==3.7"], 0, False), (["filelock"], 1, False),
    (None, 0, False), (None, 1, False),
])
def test_what_pip_would_take_is_looked_at(monkeypatch: pytest.MonkeyPatch, requires: list[str] | None,
                                          code: int, small: bool) -> None:
    module = load("install_torch")
    monkeypatch.setattr(subprocess, "call", pip_that_reports(requires, code))
    assert module.resolves_without_cuda("torch==2.13.0") == small


def accelerator(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_gpu_check_without_an_accelerator_says_so_and_succeeds(monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    accelerator(monkeypatch, False, False)
    monkeypatch.setattr(subprocess, "call", lambda *a, **k: pytest.fail("nothing to run"))
    assert load("gpu_check").main() == 0
    assert "no accelerator" in capsys.readouterr().out


@pytest.mark.parametrize(("cuda", "mps"), [(True, False), (False, True)])
@pytest.mark.parametrize(("tests", "benchmarks"), [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_gpu_check_runs_both_and_fails_if_either_does(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool,
                                                      tests: int, benchmarks: int) -> None:
    accelerator(monkeypatch, cuda, mps)
    ran: list[str] = []

    def call(command: list[str]) -> int:
        assert command[0] == sys.executable
        ran.append(" ".join(command[1:]))
        return [tests, benchmarks][len(ran) - 1]

    monkeypatch.setattr(subprocess, "call", call)
    assert bool(load("gpu_check").main()) == bool(tests or benchmarks)
    assert ran == ["-m pytest -m accelerator", "-m outrider bench gpu"]
