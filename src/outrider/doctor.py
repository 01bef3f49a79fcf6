"""What this machine has, how fast it is, and what to fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from outrider import __version__
from outrider.devices import cores, device_name, measured_matmul, physical_memory, pick_device, synchronize

#: Optional extras and the package that shows each is there.
EXTRAS = {"data": ("datasets", "pyarrow", "sentencepiece"), "eval": ("lm_eval",), "export": ("gguf", "onnxruntime"),
          "serve": ("starlette", "uvicorn"), "tensorboard": ("tensorboard",)}
_LITTLE_DISK = 10e9
_SLOW_COPY = 5e9


@dataclass
class Diagnosis:
    """Everything `outrider doctor` finds. Bytes, FLOP/s, bytes/s, tokens/s."""

    outrider: str
    torch: str
    build: str
    devices: list[str]
    cores: int
    threads: int
    memory: int | None
    free_disk: int
    extras: dict[str, list[str]]
    speed: dict[str, float] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """Return the findings as JSON types."""
        return asdict(self)


def diagnose(folder: str | Path = ".", *, speed: bool = True) -> Diagnosis:
    """Look at devices, threads, torch's build, extras and disk, and time a few things (about ten seconds)."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}" \
        if torch.version.cuda else "CPU"
    missing = {extra: [p for p in packages if importlib.util.find_spec(p) is None]
               for extra, packages in EXTRAS.items()}
    found = Diagnosis(
        outrider=__version__, torch=torch.__version__, build=build,
        devices=[f"{name}: {device_name(torch.device(name))}" for name in devices],
        cores=cores(), threads=torch.get_num_threads(), memory=physical_memory(),
        free_disk=shutil.disk_usage(folder).free, extras=missing)
    if speed:
        found.speed = _speed()
    found.advice = _advice(found)
    return found


def _speed() -> dict[str, float]:
    """Time matrix products, memory, and a step of training and decoding of a small model."""
    speeds = {"cpu_fp32_flops": measured_matmul(torch.float32), "cpu_bf16_flops": measured_matmul(torch.bfloat16),
              "cpu_copy_bytes": _copy_speed()}
    device = pick_device()
    speeds[f"{device.type}_train_tokens"] = _training_speed(device)
    speeds[f"{device.type}_decode_tokens"] = _decoding_speed(device)
    return speeds


def _copy_speed() -> float:
    source = torch.ones(32 << 20)
    target = torch.empty_like(source)
    best = min(_timed(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / best


def _small_model(device: torch.device) -> torch.nn.Module:
    from outrider.model import Llama, preset

    model = Llama(preset("nano-5m"))
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.to(device)


def _training_speed(device: torch.device) -> float:
    from outrider.devices import autocast
    from outrider.model.likelihood import summed_loss

    model = _small_model(device)
    tokens = torch.randint(0, 4096, (8, 257), device=device)

    def step() -> None:
        with autocast(device, "bf16"):
            loss = summed_loss(model, tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        model.zero_grad(set_to_none=True)
        synchronize(device)

    step()
    return 8 * 256 / min(_timed(step) for _ in range(3))


def _decoding_speed(device: torch.device) -> float:
    from outrider.decoding import TorchEngine

    engine = TorchEngine(_small_model(device))  # type: ignore[arg-type]
    engine.start(1, 256)
    token = torch.zeros((1, 1), dtype=torch.long)

    def step() -> None:
        engine.extend(token)
        engine.synchronize()

    times = [_timed(step) for _ in range(128)]
    return 1 / sorted(times)[len(times) // 2]


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _advice(found: Diagnosis) -> list[str]:
    advice = []
    if found.threads > found.cores:
        advice.append(f"PyTorch uses {found.threads} threads on {found.cores} cores: set OMP_NUM_THREADS={found.cores}")
    if found.free_disk < _LITTLE_DISK:
        advice.append(f"only {found.free_disk / 1e9:.1f} GB of disk are free here; snapshots may not fit")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        advice.append("there is an NVIDIA driver but this torch build cannot use it: "
                      "pip install 'torch>=2.13,<2.14' --index-url https://download.pytorch.org/whl/cu130")
    if shutil.which("rocminfo") and not torch.cuda.is_available():
        advice.append("there is a ROCm driver but this torch build cannot use it: "
                      "pip install 'torch>=2.13,<2.14' --index-url https://download.pytorch.org/whl/rocm7.1")
    if found.speed.get("cpu_bf16_flops", 0) < found.speed.get("cpu_fp32_flops", 0):
        advice.append("BF16 is slower than FP32 on this CPU: train with --set training.precision=fp32")
    if 0 < found.speed.get("cpu_copy_bytes", _SLOW_COPY) < _SLOW_COPY:
        advice.append("memory is slow (another program may be using it); decoding speed follows memory speed")
    version = importlib.metadata.version("torch")
    if not version.startswith("2.13."):
        advice.append(f"torch {version} is installed, Outrider is tested with 2.13: pip install 'torch>=2.13,<2.14'")
    return advice
