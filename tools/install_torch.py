"""Install torch into the running Python, choosing the small CPU build where there is no accelerator.

On Linux, PyPI's own torch brings gigabytes of CUDA packages. So, on a machine without an NVIDIA or AMD
driver: if pip would resolve to a build without them (a local wheel, a mirror), that is taken; else the
CPU build comes from PyTorch's index. Set TORCH_INDEX_URL to decide yourself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SERIES = "2.13"
FIRST = f"torch=={SERIES}.0"
RANGE = f"torch>={SERIES},<2.14"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def installed() -> bool:
    """Return whether a torch of the right series is there."""
    try:
        return importlib.metadata.version("torch").startswith(f"{SERIES}.")
    except importlib.metadata.PackageNotFoundError:
        return False


def has_accelerator() -> bool:
    """Return whether an NVIDIA or AMD driver is there."""
    return any(shutil.which(tool) for tool in ("nvidia-smi", "rocminfo")) or Path("/dev/kfd").exists()


def pip(*arguments: str) -> int:
    """Run pip of this Python."""
    return subprocess.call([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", *arguments])


def resolves_without_cuda(requirement: str) -> bool:
    """Return whether pip, as configured here, would install `requirement` without CUDA packages."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps",
                   "--dry-run", "--ignore-installed", "--report", str(report), requirement]
        if subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) or not report.exists():
            return False
        needs = json.loads(report.read_text())["install"][0]["metadata"].get("requires_dist", [])
    return not any(re.match(r"(nvidia|cuda|triton)", need) for need in needs)


def main() -> int:
    """Install torch unless it is there; return pip's exit code."""
    if installed():
        return 0
    if index := os.environ.get("TORCH_INDEX_URL"):
        return pip(RANGE, "--index-url", index)
    if sys.platform != "linux" or has_accelerator():
        return pip(RANGE)
    if resolves_without_cuda(FIRST):
        return pip(FIRST)
    print("no accelerator found: installing torch's CPU build", flush=True)
    return pip(RANGE, "--index-url", CPU_INDEX) and pip(RANGE)


if __name__ == "__main__":
    sys.exit(main())
