"""`make gpu-check`: the tests marked `accelerator`, then the benchmarks. Without an accelerator it says so."""

from __future__ import annotations

import subprocess
import sys

import torch


def main() -> int:
    """Return 0 if everything passed, or there was nothing to check."""
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        print("gpu-check: no accelerator here; nothing to check")
        return 0
    tests = subprocess.call([sys.executable, "-m", "pytest", "-m", "accelerator"])
    benchmarks = subprocess.call([sys.executable, "-m", "outrider", "bench", "gpu"])
    return tests or benchmarks


if __name__ == "__main__":
    sys.exit(main())
