"""Decoding with and without a draft, in one process, alternating, so that the machine's mood cancels out."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from outrider.benchmarks.provenance import provenance
from outrider.console import Silent, Watcher
from outrider.corpus.sources import JSONL_SUFFIXES, Source
from outrider.decoding import Decoder, Generation, Sampling, Statistics, TorchEngine
from outrider.decoding.decoder import Method
from outrider.errors import SourceError

#: In a text file, a line of its own between two prompts.
PROMPT_SEPARATOR = "---"


@dataclass
class PromptResult:
    """One prompt: what was said with and without the draft, and how fast."""

    prompt: str
    plain_tokens: list[int]
    draft_tokens: list[int]
    plain_rates: list[float] = field(default_factory=list)
    draft_rates: list[float] = field(default_factory=list)
    text: str = ""
    drafted: list[bool] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether both said the same tokens."""
        return self.plain_tokens == self.draft_tokens

    @property
    def speedup(self) -> float:
        """Ratio of the median rates."""
        return statistics.median(self.draft_rates) / statistics.median(self.plain_rates)


@dataclass
class DecodeBenchmark:
    """All prompts together.

    Attributes:
        comparable: whether outputs must agree token for token (greedy, or coupled sampling); under rejection
            sampling only their distributions agree.
    """

    prompts: list[PromptResult]
    plain: Statistics
    draft: Statistics
    comparable: bool
    provenance: dict[str, Any]
    settings: dict[str, Any]

    @property
    def identical(self) -> int:
        """How many prompts gave the same tokens both ways."""
        return sum(result.identical for result in self.prompts)

    @property
    def speedup(self) -> float:
        """Tokens per second over all prompts and repeats, with the draft against without."""
        return self.draft.tokens_per_second / self.plain.tokens_per_second

    @property
    def speedup_geometric_mean(self) -> float:
        """Geometric mean over prompts of each prompt's speed-up."""
        return math.exp(statistics.fmean(math.log(result.speedup) for result in self.prompts))

    def dump(self) -> dict[str, Any]:
        """Return everything as JSON types (schema in docs/formats.md)."""
        return {
            "format": "outrider-decode-benchmark", "version": 1,
            "provenance": self.provenance, "settings": self.settings,
            "prompts": len(self.prompts), "comparable": self.comparable, "identical": self.identical,
            "speedup": self.speedup, "speedup_geometric_mean": self.speedup_geometric_mean,
            "plain": self.plain.dump(), "draft": self.draft.dump(),
            "results": [{"prompt": r.prompt, "text": r.text, "identical": r.identical, "speedup": r.speedup,
                         "plain_tokens_per_second": statistics.median(r.plain_rates),
                         "draft_tokens_per_second": statistics.median(r.draft_rates)} for r in self.prompts],
        }


def benchmark_decode(decoder: Decoder, prompts: list[str], *, max_new_tokens: int = 128,
                     sampling: Sampling | None = None, width: int | Literal["auto"] = "auto",
                     method: Method = "rejection", repeats: int = 2, settings: dict[str, Any] | None = None,
                     watcher: Watcher | None = None) -> DecodeBenchmark:
    """Decode every prompt with and without the draft, `repeats` times, changing which goes first.

    One untimed request of each kind goes before. Only decoding is timed, not the prompt's pass, which is
    the same for both.
    """
    watcher, sampling = watcher or Silent(), sampling or Sampling()
    if not sampling.greedy and sampling.seed is None:
        sampling = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=0)

    def decode(prompt: str, speculate: bool, limit: int = max_new_tokens) -> Generation:
        return decoder.generate(prompt, max_new_tokens=limit, sampling=sampling, width=width, method=method,
                                speculate=speculate)

    for speculate in (False, True):
        decode(prompts[0], speculate, min(16, max_new_tokens))
    plain, draft = Statistics(), Statistics()
    results: list[PromptResult | None] = [None] * len(prompts)
    done, total = 0, repeats * len(prompts)
    for repeat in range(repeats):
        for index, prompt in enumerate(prompts):
            order = (False, True) if (repeat + index) % 2 == 0 else (True, False)
            pair = {speculate: decode(prompt, speculate) for speculate in order}
            plain.add(pair[False].statistics)
            draft.add(pair[True].statistics)
            result = results[index] or PromptResult(
                prompt, pair[False].ids, pair[True].ids, text=pair[True].text,
                drafted=[token.drafted for token in pair[True].tokens])
            if pair[True].ids != pair[False].ids:
                result.draft_tokens = pair[True].ids  # a difference in any repeat counts
            result.plain_rates.append(pair[False].statistics.tokens_per_second)
            result.draft_rates.append(pair[True].statistics.tokens_per_second)
            results[index] = result
            done += 1
            watcher.update(done, total, f"{plain.tokens_per_second:.0f} tokens/s alone, "
                                        f"{draft.tokens_per_second:.0f} with the draft")
    comparable = sampling.greedy or method == "coupled"
    device = decoder.target.device if isinstance(decoder.target, TorchEngine) else None
    return DecodeBenchmark(
        [result for result in results if result is not None], plain, draft, comparable,
        provenance(device) if device is not None else {},
        {**(settings or {}), "max_new_tokens": max_new_tokens, "width": width, "method": method, "repeats": repeats,
         "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
         "seed": sampling.seed})


def read_prompts(path: str | Path, limit: int = 0) -> list[str]:
    """Read prompts: the field `prompt` of a `.jsonl` file (plain, gz, zst), or a text file in which a line
    `---` stands between two prompts.

    Raises:
        SourceError: no such file, or no prompt in it.
    """
    path = Path(path)
    texts = [document.text for document in Source(str(path), text_field="prompt").documents()]
    if not path.name.endswith(JSONL_SUFFIXES):
        texts = ["\n".join(block) for text in texts for block in _blocks(text)]
    prompts = [text for text in texts if text.strip()]
    if not prompts:
        raise SourceError(f"{path} holds no prompt")
    return prompts[:limit] if limit else prompts


def _blocks(text: str) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    # Not `splitlines`, which also breaks at characters that are part of a text.
    for line in text.replace("\r\n", "\n").removesuffix("\n").split("\n"):
        if line.strip() == PROMPT_SEPARATOR:
            blocks.append([])
        else:
            blocks[-1].append(line)
    return blocks
