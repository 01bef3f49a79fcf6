"""Where a measurement came from, so that it can be made again."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from outrider import __version__
from outrider.devices import device_name


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the command, the date, and versions of what ran it."""
    program = Path(sys.argv[0]).name
    return {
        "command": shlex.join([program, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "outrider": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}", "device": device_name(device),
        "threads": torch.get_num_threads(),
    }
