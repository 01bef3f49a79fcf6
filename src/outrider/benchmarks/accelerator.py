"""Short decode and train benchmarks of one device: what share of its memory and its arithmetic is used.

Random weights: only shapes matter here. Acceptance is not measured, so speed-ups are not either.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from outrider.benchmarks.provenance import provenance
from outrider.console import console, count
from outrider.decoding import TorchEngine
from outrider.devices import autocast, device_name, look_up, peak_flops, pick_device, synchronize
from outrider.files import write_json
from outrider.model import Llama, preset
from outrider.model.config import ModelConfig
from outrider.model.likelihood import summed_loss
from outrider.recipe import OptimizerSection
from outrider.training.optimizers import build_optimizer

#: Memory bandwidth in bytes/s by a part of the device's name (makers' data sheets).
BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.04e12,
             "A100": 1.56e12, "L40S": 0.864e12, "RTX 4090": 1.008e12, "MI300X": 5.3e12, "MI325": 6.0e12,
             "MI250": 1.64e12}
WIDTHS = (1, 2, 4, 8, 16)
CONTEXT = 512


def benchmark_accelerator(out: str | Path, device: str = "auto", *, small: bool = False) -> Path | None:
    """Measure and write `OUT/DATE-DEVICE.json`; return its path, or None on a CPU (unless `small`)."""
    place = pick_device(device)
    if place.type == "cpu" and not small:
        return None
    target, draft = (preset("nano-5m"), preset("draft-1m")) if small else (preset("codellama-7b"), preset("amd-135m"))
    result: dict[str, Any] = {"format": "outrider-accelerator-benchmark", "version": 1, "provenance": provenance(place)}
    result["target_decode"] = _decode(target, place, 3 if small else 20)
    console.print(f"target: {_line(result['target_decode'])}")
    result["draft_decode"] = _decode(draft, place, 3 if small else 50)
    console.print(f"draft: {_line(result['draft_decode'])}")
    context, windows = (128, 2) if small else (2048, 16)
    result["training"] = [_train(draft, place, context, windows, compiled, 2 if small else 20)
                          for compiled in ((False,) if small or place.type != "cuda" else (False, True))]
    for entry in result["training"]:
        mfu = f"{100 * entry['mfu']:.1f} % MFU" if entry["mfu"] is not None else ""
        console.print(f"training, compile {entry['compile']}: {count(entry['tokens_per_second'])} tokens/s {mfu}")
    name = "".join(c if c.isalnum() else "-" for c in device_name(place).lower())[:40].strip("-")
    path = Path(out) / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H%M}-{name}.json"
    write_json(path, result)
    return path


def _decode(config: ModelConfig, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time a pass over n tokens at a context of 512, BF16, for several n."""
    with torch.device(device):
        model = Llama(config).to(torch.bfloat16)
    engine = TorchEngine(model)
    context = min(CONTEXT, config.max_position_embeddings // 2)
    engine.start(1, context + 2 * max(WIDTHS))
    engine.prefill([[1] * context])
    before = engine.lengths

    def one(n: int) -> Callable[[], None]:
        tokens = torch.zeros((1, n), dtype=torch.long, device=device)

        def run() -> None:
            engine.extend(tokens)
            engine.synchronize()
            engine.truncate(before)

        return run

    seconds = {n: _median(one(n), repeats) for n in WIDTHS}
    read = 2 * config.num_matmul_parameters + context * config.kv_bytes_per_token(2)
    bandwidth = look_up(BANDWIDTH, device_name(device))
    return {"parameters": config.num_parameters, "context": context, "dtype": "bfloat16",
            "seconds_by_tokens": seconds, "tokens_per_second": 1 / seconds[1], "bytes_read": read,
            "bandwidth_share": read / seconds[1] / bandwidth if bandwidth else None}


def _train(config: ModelConfig, device: torch.device, context: int, windows: int, compiled: bool,
           repeats: int) -> dict[str, Any]:
    """Time whole optimiser steps as the training loop takes them: BF16 autocast, clipping, fused AdamW."""
    model = Llama(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.to(device)
    forward: torch.nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
    optimizer = build_optimizer(model, OptimizerSection(), device)
    tokens = torch.randint(0, config.vocab_size, (windows, context + 1), device=device)

    def step() -> None:
        with autocast(device, "bf16"):
            loss = summed_loss(forward, tokens[:, :-1], tokens[:, 1:])
        (loss / (windows * context)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _median(step, repeats)
    speed = windows * context / seconds
    peak = peak_flops(device, "bf16")
    mfu = speed * config.training_flops_per_token(context) / peak if peak else None
    return {"parameters": config.num_parameters, "context": context, "windows": windows, "compile": compiled,
            "tokens_per_second": speed, "mfu": mfu,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


def _median(work: Callable[[], None], repeats: int) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _line(result: dict[str, Any]) -> str:
    share = result["bandwidth_share"]
    note = f", {100 * share:.0f} % of memory bandwidth" if share is not None else ""
    costs = ", ".join(f"{n}: {1e3 * s:.2f} ms" for n, s in result["seconds_by_tokens"].items())
    speed = f"{result['tokens_per_second']:.1f} tokens/s{note}"
    return f"{count(result['parameters'])} parameters, {speed}; by tokens {costs}"
