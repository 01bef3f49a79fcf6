"""`outrider data prepare` against the bare tokenizer, on the same text and threads, alternating."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from outrider.benchmarks.provenance import provenance
from outrider.corpus import Source, Tokenizer, prepare


def benchmark_prepare(source: Source, tokenizer_path: str | Path, repeats: int = 3) -> dict[str, Any]:
    """Return tokens/s of the whole of `prepare` and of `encode_batch_fast` alone, and their ratio.

    The bare tokenizer is given all texts in memory at once and its results are thrown away; `prepare`
    also reads, hashes, splits, writes and flushes to disk.
    """
    tokenizer = Tokenizer.load(tokenizer_path)
    texts = [document.text for document in source.documents()]
    bare, whole = [], []
    tokens = 0
    for _ in range(repeats):
        started = time.perf_counter()
        encodings = tokenizer.backend.encode_batch_fast(texts)
        bare.append(time.perf_counter() - started)
        tokens = sum(len(encoding) for encoding in encodings)
        del encodings
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            prepare([source], Path(folder) / "corpus", tokenizer=tokenizer)
            whole.append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(bare, whole, strict=True)]
    return {"format": "outrider-prepare-benchmark", "version": 1, "provenance": provenance(torch.device("cpu")),
            "source": source.spec, "tokens": tokens, "repeats": repeats,
            "encode_tokens_per_second": tokens / statistics.median(bare),
            "prepare_tokens_per_second": tokens / statistics.median(whole),
            "ratio": statistics.median(ratios)}
