"""The decoding loop: propose, verify, keep what stands."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from outrider.corpus.tokenizer import Tokenizer
from outrider.decoding.control import MAX_WIDTH, AdaptiveWidth, Controller, CostModel, FixedWidth, Round
from outrider.decoding.engine import Engine, TorchEngine
from outrider.decoding.proposers import ModelProposer, Proposal, Proposer
from outrider.decoding.sampling import Sampling, SeededChoices, SharedNoise, probabilities
from outrider.decoding.statistics import Statistics
from outrider.decoding.verification import Verdict, verify_matching, verify_rejection
from outrider.decoding.vocabulary import shared_vocabulary
from outrider.errors import DecodingError
from outrider.model.folder import resolve_folder

Method = Literal["rejection", "coupled"]
# What is timed before the first round: target passes over so many tokens, proposals of such a length.
_TIMED_WIDTHS = (1, 2, 3, 4, 5, 7, 9)
_TIMED_DRAFT = 4
_TIMES = 3


@dataclass(frozen=True)
class Token:
    """One token given out, and whether the draft had guessed it."""

    id: int
    drafted: bool


@dataclass
class Generation:
    """The result of one request.

    Attributes:
        text: the new text, without special tokens and without the stop string.
        tokens: the new tokens, EOS included if it was reached.
        finish: why it ended: "stop" (EOS or a stop string) or "length".
        statistics: counts and times.
        seed: the seed that was used, drawn or given; None when greedy.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"
    statistics: Statistics = field(default_factory=Statistics)
    seed: int | None = None

    @property
    def ids(self) -> list[int]:
        """The new token ids."""
        return [token.id for token in self.tokens]


class Decoder:
    """A target, its tokenizer, and optionally a proposer. Requests are served one at a time."""

    def __init__(self, target: Engine, tokenizer: Tokenizer, proposer: Proposer | None = None) -> None:
        self.target, self.tokenizer, self.proposer = target, tokenizer, proposer
        self._costs: CostModel | None = None

    @classmethod
    def load(cls, target: str | Path, draft: str | Path | None = None, *, device: str = "auto",
             dtype: torch.dtype | None = None) -> Decoder:
        """Read a target and, if given, a draft from model folders.

        Raises:
            ModelFolderError: a folder lacks a file or holds a damaged one.
            DecodingError: the two disagree about what a token id means.
        """
        folder = resolve_folder(target)
        tokenizer = Tokenizer.load(folder)
        engine = TorchEngine.load(folder, device=device, dtype=dtype)
        if draft is None:
            return cls(engine, tokenizer)
        draft_folder = resolve_folder(draft)
        draft_tokenizer = Tokenizer.load(draft_folder)
        draft_engine = TorchEngine.load(draft_folder, device=device, dtype=dtype)
        shared = shared_vocabulary(engine.config, draft_engine.config, tokenizer, draft_tokenizer)
        return cls(engine, tokenizer, ModelProposer(draft_engine, shared, engine.config.vocab_size))

    def generate(self, prompt: str | Sequence[int], *, max_new_tokens: int = 128, sampling: Sampling | None = None,
                 width: int | Literal["auto"] = "auto", method: Method = "rejection",
                 stop: Sequence[str] = (), speculate: bool = True) -> Generation:
        """Decode one request to its end; see `stream`."""
        result = Generation()
        for _ in self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, width=width, method=method,
                             stop=stop, speculate=speculate, into=result):
            pass
        return result

    def stream(self, prompt: str | Sequence[int], *, max_new_tokens: int = 128, sampling: Sampling | None = None,
               width: int | Literal["auto"] = "auto", method: Method = "rejection", stop: Sequence[str] = (),
               speculate: bool = True, into: Generation | None = None) -> Iterator[list[Token]]:
        """Decode one request, yielding the tokens of each round as they are settled.

        Args:
            prompt: text, or token ids.
            max_new_tokens: how many tokens at most.
            sampling: how to choose; greedy by default.
            width: tokens to draft each round, or "auto" for whatever is fastest.
            method: how sampled proposals are verified: "rejection" keeps the target's distribution and
                accepts most; "coupled" also makes a seed give the same text with any draft or none.
            stop: strings at whose first occurrence the text ends.
            speculate: False decodes with the target alone.
            into: where text, tokens and statistics are collected.

        Raises:
            DecodingError: an empty prompt, a parameter out of range, more positions than the model has, or
                a model that returns NaN.
        """
        result = into if into is not None else Generation()
        context = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        sampling = sampling or Sampling()
        proposer = self.proposer if speculate else None
        request = _Request(self, context, max_new_tokens, sampling, method, tuple(stop), proposer, result)
        yield from request.run(width)

    def costs(self, context: Sequence[int], capacity: int) -> CostModel:
        """Return measured costs: target and draft are timed once, on the first request, whose `context` the
        target has just cached; every round after that keeps them current.
        """
        if self._costs is None:
            self._costs = CostModel()
            before = self.target.lengths
            room = self.target.config.max_position_embeddings - len(context)
            for n in _TIMED_WIDTHS[:1] + tuple(n for n in _TIMED_WIDTHS[1:] if n <= room):
                self._costs.target[n] = min(self._timed_pass(n, before) for _ in range(_TIMES))
            if self.proposer is not None:
                # Greedily: a sampled guess would use up chance that belongs to the request.
                self.proposer.begin(context, capacity, Sampling(), None)
                self._costs.draft = min(self._timed_proposal(self.proposer, context) for _ in range(_TIMES))
        return self._costs

    def _timed_proposal(self, proposer: Proposer, context: Sequence[int]) -> float:
        started = time.perf_counter()
        drafted = len(proposer.propose(context, _TIMED_DRAFT).tokens)
        proposer.synchronize()
        return (time.perf_counter() - started) / max(1, drafted)

    def _timed_pass(self, n: int, before: list[int]) -> float:
        started = time.perf_counter()
        self.target.extend(torch.zeros((1, n), dtype=torch.long))
        self.target.synchronize()
        seconds = time.perf_counter() - started
        self.target.truncate(before)
        return seconds


class _Request:
    """One request on its way through the loop."""

    def __init__(self, decoder: Decoder, context: list[int], max_new_tokens: int, sampling: Sampling, method: Method,
                 stop: tuple[str, ...], proposer: Proposer | None, result: Generation) -> None:
        self.decoder, self.target = decoder, decoder.target
        self.context, self.sampling, self.stop, self.result = context, sampling, stop, result
        self.proposer = proposer
        self.max_new_tokens = max_new_tokens
        self._check(method)
        if not sampling.greedy:
            result.seed = sampling.seed if sampling.seed is not None else secrets.randbits(62)
            self.chance = (SharedNoise if method == "coupled" else SeededChoices)(result.seed)
        else:
            self.chance = None
        self.eos = set(self.target.config.eos_token_ids)
        self.text = decoder.tokenizer.stream(context)

    def run(self, width: int | Literal["auto"]) -> Iterator[list[Token]]:
        """Prefill, then rounds until the end."""
        statistics, started = self.result.statistics, time.perf_counter()
        # Room for a whole proposal, and for the timing passes, beyond the last token asked for.
        capacity = min(len(self.context) + self.max_new_tokens + MAX_WIDTH + 1,
                       self.target.config.max_position_embeddings)
        self.target.start(1, capacity)
        self.target.prefill([self.context[:-1]])
        controller = self._controller(width, capacity)
        if self.proposer is not None:
            self.proposer.begin(self.context, capacity, self.sampling, self.chance)
        self.target.synchronize()
        statistics.prefill_seconds = time.perf_counter() - started
        while len(self.result.tokens) < self.max_new_tokens:
            tokens = self._round(controller)
            statistics.total_seconds = time.perf_counter() - started
            if self.result.finish == "length" and len(self.result.tokens) == self.max_new_tokens:
                self.result.text += self.text.finish()
            yield tokens
            if self.result.finish == "stop":
                return

    def _round(self, controller: Controller) -> list[Token]:
        """Propose, verify, keep: one pass of the target."""
        left = self.max_new_tokens - len(self.result.tokens)
        # The last token comes from the target anyway, and the cache may not run over.
        room = self.target.config.max_position_embeddings - len(self.context)
        budget = min(controller.width(), left - 1, room) if self.proposer is not None else 0
        started = time.perf_counter()
        proposal = Proposal([])
        if self.proposer is not None and budget > 0:
            proposal = self.proposer.propose(self.context, budget)
            self.proposer.synchronize()
        drafted = time.perf_counter()
        logits = self.target.extend(torch.tensor([[self.context[-1], *proposal.tokens]]))[0]
        verdict = self._verify(logits, proposal)
        self.target.truncate([len(self.context) + verdict.accepted])
        verified = time.perf_counter()
        statistics = self.result.statistics
        statistics.record_round(len(proposal.tokens), verdict.accepted)
        statistics.draft_seconds += drafted - started
        statistics.target_seconds += verified - drafted
        controller.observe(Round(len(proposal.tokens), verdict.accepted, drafted - started, verified - drafted))
        return self._keep([*(Token(token, True) for token in proposal.tokens[:verdict.accepted]),
                           Token(verdict.token, False)])

    def _verify(self, logits: Tensor, proposal: Proposal) -> Verdict:
        """Return how much of `proposal` stands under the target's `logits` [n + 1, V]."""
        best, ids = logits.max(-1)
        if not torch.isfinite(best).all():
            raise DecodingError("the target returned NaN or infinite logits; its weights are damaged or overflow "
                                "in this precision")
        if self.chance is None:
            return verify_matching(ids.tolist(), proposal.tokens)
        laws = probabilities(logits, self.sampling)
        if isinstance(self.chance, SharedNoise):
            picks = [self.chance.pick(law, len(self.context) + index) for index, law in enumerate(laws)]
            return verify_matching(picks, proposal.tokens)
        return verify_rejection(laws, proposal.laws, proposal.tokens, self.chance)

    def _keep(self, tokens: list[Token]) -> list[Token]:
        """Take the settled tokens up to EOS, a stop string, or the limit."""
        kept: list[Token] = []
        for token in tokens[:self.max_new_tokens - len(self.result.tokens)]:
            kept.append(token)
            self.context.append(token.id)
            self.result.tokens.append(token)
            self.result.statistics.generated += 1
            if token.id in self.eos:
                self.result.text += self.text.finish()
                self.result.finish = "stop"
                break
            self.result.text += self.text.feed(token.id)
            if self._cut_at_stop():
                self.result.finish = "stop"
                break
        return kept

    def _cut_at_stop(self) -> bool:
        ends = [index for index in (self.result.text.find(string) for string in self.stop) if index >= 0]
        if ends:
            self.result.text = self.result.text[:min(ends)]
        return bool(ends)

    def _controller(self, width: int | Literal["auto"], capacity: int) -> Controller:
        fixed = None if width == "auto" else FixedWidth(width)  # refused if out of range, used or not
        if self.proposer is None:
            return FixedWidth(0)
        return fixed or AdaptiveWidth(self.decoder.costs(self.context, capacity))

    def _check(self, method: str) -> None:
        limit = self.target.config.max_position_embeddings
        if not self.context:
            raise DecodingError("the prompt is empty and the tokenizer adds no start token; give at least one token")
        if self.max_new_tokens < 1:
            raise DecodingError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}")
        if len(self.context) + self.max_new_tokens > limit:
            raise DecodingError(
                f"the prompt's {len(self.context)} tokens and {self.max_new_tokens} new ones exceed the model's "
                f"{limit} positions; shorten the prompt or ask for at most {max(0, limit - len(self.context))}"
            )
        if method not in ("rejection", "coupled"):
            raise DecodingError(f"no verification method '{method}'; use rejection or coupled")
        if any(not string for string in self.stop):
            raise DecodingError("a stop string must not be empty")
        vocabulary = self.target.config.vocab_size
        outside = next((token for token in self.context if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise DecodingError(f"token {outside} of the prompt is outside the model's vocabulary of {vocabulary}")
