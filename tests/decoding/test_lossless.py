"""The first promise: speculation never changes what the target would have said.

Greedy and coupled decoding are compared token for token with the target alone, for drafts of every kind;
rejection sampling is compared with the exact law. Float32, random weights: logits are far enough apart
(checked below) that the order of summing cannot turn a choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import tokenizers
import torch
from torch import Tensor

import outrider.decoding.decoder as decoder_module
from outrider.corpus import Tokenizer
from outrider.decoding import Decoder, Generation, Sampling, Statistics, TorchEngine, generate
from outrider.decoding.control import FixedWidth
from outrider.decoding.proposers import ModelProposer, Proposal, Proposer
from outrider.decoding.sampling import SeededChoices, probabilities
from outrider.errors import DecodingError, ModelFolderError
from outrider.model import Llama, ModelConfig, save_model
from tests.conftest import TEXTS, tiny_config, tiny_model
from tests.decoding.test_sampling import FALSE_ALARM, chi_square_p

VOCABULARY, LENGTH = 300, 24
WIDTHS: list[int | Literal["auto"]] = [*range(9), "auto"]
PROMPTS = [(5,), (17, 40, 99), tuple(range(30, 50))]


def target_model(**changes: Any) -> Llama:
    """The target; the same weights each time."""
    return tiny_model(0, **changes)


@cache
def says(prompt: tuple[int, ...], length: int = LENGTH) -> tuple[int, ...]:
    """What the target says to `prompt` when asked one whole sequence at a time: no cache, no loop of ours."""
    model, context = target_model(), list(prompt)
    for _ in range(length):
        best = model(torch.tensor([context]))[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-3, "too close: rounding might decide; take other weights"
        context.append(int(best.indices[0]))
    return tuple(context[len(prompt):])


# Drafts of every kind


def resized(model: Llama, vocabulary: int) -> Llama:
    """The same model with ids taken away or added, so that it agrees where it can."""
    other = tiny_model(7, vocab_size=vocabulary)
    weights = model.state_dict()
    kept = min(vocabulary, model.config.vocab_size)
    with torch.no_grad():
        for name, parameter in other.state_dict().items():
            if name in ("embedding.weight", "head.weight"):
                parameter[:kept] = weights[name][:kept]
            else:
                parameter.copy_(weights[name])
    return other


def changed(model: Llama, how: Callable[[Tensor], Any]) -> Llama:
    with torch.no_grad():
        for parameter in model.parameters():
            how(parameter)
    return model


def noisy() -> Llama:
    generator = torch.Generator().manual_seed(3)
    return changed(target_model(), lambda p: p.add_(0.02 * torch.randn(p.shape, generator=generator)))


@dataclass
class Knowing:
    """Knows what the target says, and says at which places of a proposal it will be right.

    `right(context length, place)` tells whether to propose the true token there; None ends the proposal.
    """

    right: Callable[[int, int], bool | None]
    prompt: tuple[int, ...] = ()

    def begin(self, prompt: Sequence[int], capacity: int, sampling: Sampling, chance: object) -> None:
        self.prompt = tuple(prompt)

    def propose(self, context: Sequence[int], budget: int) -> Proposal:
        known = says(self.prompt)[len(context) - len(self.prompt):]
        tokens: list[int] = []
        for place, token in enumerate(known[:budget]):
            right = self.right(len(context), place)
            if right is None:
                break
            tokens.append(token if right else (token + 1) % VOCABULARY)
        return Proposal(tokens)

    def synchronize(self) -> None:
        pass


def draft(model: Llama) -> ModelProposer:
    shared = min(VOCABULARY, model.config.vocab_size)
    return ModelProposer(TorchEngine(model), shared, VOCABULARY)


DRAFTS: dict[str, Callable[[], Proposer]] = {
    "random": lambda: draft(tiny_model(2)),
    "itself": lambda: draft(target_model()),
    "noisy": lambda: draft(noisy()),
    "other depth": lambda: draft(tiny_model(4, num_hidden_layers=4)),
    "grouped heads": lambda: draft(tiny_model(5, num_hidden_layers=1, num_key_value_heads=1)),
    "larger vocabulary": lambda: draft(resized(target_model(), 340)),
    "smaller vocabulary": lambda: draft(resized(target_model(), 200)),
    "short": lambda: draft(target_model(max_position_embeddings=26)),
    "damaged": lambda: draft(changed(target_model(), lambda p: p.fill_(torch.nan))),
    "always wrong": lambda: Knowing(lambda length, place: False),
    "right, then wrong": lambda: Knowing(lambda length, place: place < length % 5),
    "wrong, then right": lambda: Knowing(lambda length, place: place > 0),
    "hesitant": lambda: Knowing(lambda length, place: True if place < length % 3 else None),
}


@pytest.fixture(scope="module", params=DRAFTS)
def decoder(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Decoder:
    """One decoder for all of a draft's tests: what one request leaves behind must not reach the next."""
    return Decoder(TorchEngine(target_model()), tokenizer, DRAFTS[request.param]())


def check_statistics(result: Generation, *, cut: bool = False) -> None:
    """Relations that hold for every request; `cut` where EOS or a stop string may end a round early."""
    s = result.statistics
    assert s.generated == len(result.tokens)
    assert 0 <= s.accepted <= s.evaluated <= s.drafted
    assert s.evaluated == sum(s.evaluated_per_position)
    assert s.accepted == sum(s.accepted_per_position)
    assert all(a <= e for a, e in zip(s.accepted_per_position, s.evaluated_per_position, strict=True))
    # Place i + 1 has its say exactly where place i stood and there was a place i + 1.
    assert all(e <= a for a, e in zip(s.accepted_per_position, s.evaluated_per_position[1:], strict=False))
    assert sum(s.widths.values()) == s.target_passes
    assert sum(width * times for width, times in s.widths.items()) == s.drafted
    assert s.acceptance_rate == (s.accepted / s.drafted if s.drafted else None)
    stood = sum(token.drafted for token in result.tokens)
    if cut:
        assert s.generated <= s.accepted + s.target_passes
        assert stood <= s.accepted
    else:
        assert s.generated == s.accepted + s.target_passes
        assert stood == s.accepted
    assert s.mean_accepted_length == pytest.approx(1 + s.accepted / s.target_passes)


# Greedy


@pytest.mark.parametrize("width", WIDTHS)
def test_greedy_is_what_the_target_says_alone(decoder: Decoder, width: int | Literal["auto"]) -> None:
    for prompt in PROMPTS:
        limits = range(1, 13) if prompt == PROMPTS[1] else (LENGTH,)
        for limit in limits:
            result = decoder.generate(prompt, max_new_tokens=limit, width=width)
            assert result.ids == list(says(prompt)[:limit])
            assert result.finish == "length"
            assert result.seed is None
            check_statistics(result)


def test_the_target_alone_is_what_the_target_says(tokenizer: Tokenizer) -> None:
    without = Decoder(TorchEngine(target_model()), tokenizer)
    idle = Decoder(TorchEngine(target_model()), tokenizer, DRAFTS["itself"]())
    for prompt in PROMPTS:
        for result in (without.generate(prompt, max_new_tokens=LENGTH),
                       idle.generate(prompt, max_new_tokens=LENGTH, speculate=False)):
            assert result.ids == list(says(prompt))
            assert result.statistics.target_passes == LENGTH
            assert result.statistics.drafted == 0
            check_statistics(result)


def test_the_drafts_are_what_their_names_say(tokenizer: Tokenizer) -> None:
    """Were all drafts equally bad, the tests above would show little."""
    results = {name: Decoder(TorchEngine(target_model()), tokenizer, make()).generate(
        PROMPTS[1], max_new_tokens=LENGTH, width=4) for name, make in DRAFTS.items()}
    rates = {name: result.statistics.acceptance_rate for name, result in results.items()}
    assert rates["itself"] == 1
    assert rates["larger vocabulary"] == 1
    assert rates["always wrong"] == rates["wrong, then right"] == 0
    assert rates["hesitant"] == 1
    for name in ("noisy", "smaller vocabulary", "right, then wrong"):
        assert 0 < (rates[name] or 0) < 1, name
    assert max(says(PROMPTS[1])) >= 200, "the target says ids that the smaller draft lacks"
    # The short draft has 26 positions: 3 of the prompt, 23 of 24 tokens.
    assert results["itself"].statistics.target_passes == -(-LENGTH // 5)
    assert Decoder(TorchEngine(target_model()), tokenizer, DRAFTS["short"]()).generate(
        PROMPTS[2], max_new_tokens=LENGTH, width=4).statistics.drafted < 8


@pytest.mark.parametrize("name", ["itself", "random", "right, then wrong"])
@pytest.mark.parametrize("place", range(12))
def test_stops_at_the_end_of_text_wherever_it_comes(tokenizer: Tokenizer, name: str, place: int) -> None:
    """EOS first, last or amid a proposal's accepted tokens, or as the target's own: nothing follows it."""
    expected = says(PROMPTS[1])[:place + 1]
    eos = expected[-1]
    if eos in expected[:-1]:
        expected = expected[:expected.index(eos) + 1]
    decoder = Decoder(TorchEngine(target_model(eos_token_ids=(299, eos))), tokenizer, DRAFTS[name]())
    for width in WIDTHS:
        for limit in (len(expected), len(expected) + 1, LENGTH):
            result = decoder.generate(PROMPTS[1], max_new_tokens=limit, width=width)
            assert result.ids == list(expected)
            assert result.finish == "stop"
            check_statistics(result, cut=True)


@pytest.mark.parametrize("name", ["itself", "noisy", "short"])
@pytest.mark.parametrize("new", [1, 2, 3, 9, 20])
def test_up_to_the_models_last_position(tokenizer: Tokenizer, name: str, new: int) -> None:
    """Neither proposals nor the timing of passes may run over the positions that there are."""
    limit = 48
    model = target_model(max_position_embeddings=limit)
    prompt = [(7 * i) % VOCABULARY for i in range(limit - new)]
    context = list(prompt)
    for _ in range(new):
        context.append(int(model(torch.tensor([context]))[0, -1].argmax()))
    for width in WIDTHS:
        decoder = Decoder(TorchEngine(target_model(max_position_embeddings=limit)), tokenizer, DRAFTS[name]())
        assert decoder.generate(prompt, max_new_tokens=new, width=width).ids == context[len(prompt):]


def test_an_abandoned_request_leaves_nothing_behind(decoder: Decoder) -> None:
    for rounds in range(4):
        stream = decoder.stream(PROMPTS[0], max_new_tokens=LENGTH, width=3)
        for _ in itertools.islice(stream, rounds):
            pass
        stream.close()  # type: ignore[attr-defined]
        assert decoder.generate(PROMPTS[1], max_new_tokens=LENGTH, width=3).ids == list(says(PROMPTS[1]))


# Coupled sampling


SAMPLINGS = [Sampling(1.0, seed=0), Sampling(0.7, top_k=20, seed=1), Sampling(1.3, top_p=0.8, seed=2),
             Sampling(0.9, top_k=50, top_p=0.9, seed=3)]


@pytest.fixture(scope="module")
def sampled_alone(tokenizer: Tokenizer) -> list[list[int]]:
    """What the target samples without a draft, for each of SAMPLINGS."""
    alone = Decoder(TorchEngine(target_model()), tokenizer)
    return [alone.generate(PROMPTS[1], max_new_tokens=16, sampling=sampling, method="coupled").ids
            for sampling in SAMPLINGS]


@pytest.mark.parametrize("width", [0, 1, 2, 5, 8, "auto"])
def test_coupled_sampling_is_the_same_with_any_draft_or_none(decoder: Decoder, sampled_alone: list[list[int]],
                                                             width: int | Literal["auto"]) -> None:
    for sampling, expected in zip(SAMPLINGS, sampled_alone, strict=True):
        result = decoder.generate(PROMPTS[1], max_new_tokens=16, sampling=sampling, method="coupled",
                                  width=width)
        assert result.ids == expected
        assert result.seed == sampling.seed
        check_statistics(result)


def test_coupling_lets_a_right_draft_be_right(tokenizer: Tokenizer) -> None:
    decoder = Decoder(TorchEngine(target_model()), tokenizer, DRAFTS["itself"]())
    for sampling in SAMPLINGS:
        result = decoder.generate(PROMPTS[0], max_new_tokens=LENGTH, sampling=sampling, method="coupled",
                                  width=5)
        assert result.statistics.acceptance_rate == 1


def test_seeds_give_different_texts(tokenizer: Tokenizer) -> None:
    decoder = Decoder(TorchEngine(target_model()), tokenizer, DRAFTS["noisy"]())
    for method in ("coupled", "rejection"):
        texts = {tuple(decoder.generate(PROMPTS[0], max_new_tokens=8, sampling=Sampling(1.0, seed=seed),
                                        method=method).ids) for seed in range(8)}
        assert len(texts) == 8


# Rejection sampling, end to end


SMALL = 5


def small_target() -> Llama:
    # Few tokens: the law of three of them can be written down.
    model = tiny_model(1, vocab_size=SMALL, num_hidden_layers=1)
    return changed(model, lambda p: p.mul_(1.5) if p.dim() == 2 else p)


def small_draft(vocabulary: int, seed: int) -> ModelProposer:
    model = tiny_model(seed, vocab_size=vocabulary, num_hidden_layers=1)
    return ModelProposer(TorchEngine(model), min(vocabulary, SMALL), SMALL)


def exact_law(model: Llama, prompt: list[int], length: int, sampling: Sampling) -> Tensor:
    """The law of the next `length` tokens [SMALL ** length], by asking the model every prefix."""
    laws = [1.0]
    for count in range(length):
        prefixes = [[*prompt, *p] for p in itertools.product(range(SMALL), repeat=count)]
        each = probabilities(model(torch.tensor(prefixes))[:, -1], sampling).double()
        laws = [before * float(p) for before, law in zip(laws, each, strict=True) for p in law]
    return torch.tensor(laws, dtype=torch.float64)


class Stubborn:
    """Proposes the same tokens always, without chance: the draft=None side of rejection sampling."""

    def begin(self, prompt: Sequence[int], capacity: int, sampling: Sampling, chance: object) -> None:
        pass

    def propose(self, context: Sequence[int], budget: int) -> Proposal:
        return Proposal([1, 3, 0, 2][:budget])

    def synchronize(self) -> None:
        pass


SMALL_DRAFTS: dict[str, Callable[[], Proposer | None]] = {
    "none": lambda: None,
    "different": lambda: small_draft(SMALL, 8),
    "smaller": lambda: small_draft(SMALL - 2, 9),
    "larger": lambda: small_draft(SMALL + 4, 6),
    "determined": Stubborn,
}


@pytest.mark.parametrize(("name", "length", "width", "sampling"), [
    ("none", 2, 0, Sampling(1.0)),
    ("different", 2, 1, Sampling(1.0)),
    ("different", 3, 2, Sampling(1.0)),
    ("different", 3, 2, Sampling(0.8, top_k=4, top_p=0.9)),
    ("smaller", 3, 2, Sampling(1.2)),
    ("larger", 3, 2, Sampling(1.0, top_k=4)),
    ("determined", 3, 2, Sampling(1.0)),
])
def test_rejection_sampling_has_the_targets_law(tokenizer: Tokenizer, name: str, length: int, width: int,
                                                sampling: Sampling) -> None:
    """Texts over many seeds against the exact law (chi-square; the seeds are fixed)."""
    prompt = [2, 0, 4]
    law = exact_law(small_target(), prompt, length, sampling)
    assert float(law.sum()) == pytest.approx(1, abs=1e-6)
    decoder = Decoder(TorchEngine(small_target()), tokenizer, SMALL_DRAFTS[name]())
    counts = torch.zeros(SMALL**length, dtype=torch.long)
    accepted = drafted = 0
    for seed in range(1_200):
        result = decoder.generate(prompt, max_new_tokens=length, width=width, sampling=Sampling(
            sampling.temperature, sampling.top_k, sampling.top_p, seed))
        counts[int("".join(map(str, result.ids)), SMALL)] += 1
        accepted += result.statistics.accepted
        drafted += result.statistics.drafted
    if width:
        assert 0.1 < accepted / drafted < 0.95, "both acceptance and rejection must be exercised"
    assert chi_square_p(counts, law) > FALSE_ALARM


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_draft_does_not_reach_a_sampled_text(tokenizer: Tokenizer, value: float) -> None:
    """With top-k 1 sampling is without chance, so every text but the target's own is wrong."""
    proposer = draft(changed(target_model(), lambda p: p.fill_(value)))
    decoder = Decoder(TorchEngine(target_model()), tokenizer, proposer)
    try:
        result = decoder.generate(PROMPTS[1], max_new_tokens=LENGTH, width=4,
                                  sampling=Sampling(1.0, top_k=1, seed=0))
    except DecodingError:
        return  # saying so is as good
    assert result.ids == list(says(PROMPTS[1]))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=0)])
@pytest.mark.parametrize("method", ["rejection", "coupled"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_target_is_an_error(tokenizer: Tokenizer, sampling: Sampling,
                                      method: Literal["rejection", "coupled"], value: float) -> None:
    broken = changed(target_model(), lambda p: p.view(-1)[:1].fill_(value))
    for proposer in (None, DRAFTS["random"]()):
        with pytest.raises(DecodingError, match="NaN or infinite") as caught:
            Decoder(TorchEngine(broken), tokenizer, proposer).generate(
                PROMPTS[1], max_new_tokens=4, sampling=sampling, method=method, width=2)
        assert "\n" not in str(caught.value)


# The draft's own cache


def continuation(model: Llama, context: Sequence[int], count: int, shared: int = VOCABULARY) -> list[int]:
    """What a fresh draft greedily says after `context`; ids that it lacks are its stand-in's."""
    size = model.config.vocab_size
    stand_in = (model.config.eos_token_ids or (0,))[0]
    tokens = list(context)
    for _ in range(count):
        known = [token if token < size else stand_in for token in tokens]
        tokens.append(int(model(torch.tensor([known]))[0, -1, :shared].argmax()))
    return tokens[len(context):]


def grown(proposal: list[int], agree: Sequence[bool]) -> list[int]:
    """Tokens that agree with the proposal at some places and not at others, and run past its end."""
    places = [*proposal, *([11] * len(agree))]
    return [token if same else (token + 1) % VOCABULARY for token, same in zip(places, agree, strict=False)]


PATTERNS = [agree for n in (1, 2, 3, 4) for agree in itertools.product((True, False), repeat=n)]


@pytest.mark.parametrize("budget", [1, 3])
def test_a_draft_is_right_after_any_history(budget: int) -> None:
    """Whatever of its proposal stood, also where a later token coincides, however long it was idle."""
    model = tiny_model(2, num_hidden_layers=1)
    proposer = ModelProposer(TorchEngine(tiny_model(2, num_hidden_layers=1)), VOCABULARY, VOCABULARY)
    for first, second in itertools.product(PATTERNS, PATTERNS[::3]):
        context = list(PROMPTS[1])
        proposer.begin(context, 64, Sampling(), None)
        for agree in (first, second, ()):
            proposal = proposer.propose(context, budget).tokens
            assert proposal == continuation(model, context, budget)
            context += grown(proposal, agree)


class Watched:
    """A proposer whose every proposal is compared with a fresh draft's."""

    def __init__(self, inner: ModelProposer, fresh: Llama, shared: int) -> None:
        self.inner, self.fresh, self.shared, self.rounds = inner, fresh, shared, 0
        self.begin, self.synchronize = inner.begin, inner.synchronize

    def propose(self, context: Sequence[int], budget: int) -> Proposal:
        proposal = self.inner.propose(context, budget)
        assert proposal.tokens == continuation(self.fresh, context, len(proposal.tokens), self.shared)
        room = self.fresh.config.max_position_embeddings - len(context) + 1
        assert len(proposal.tokens) == max(0, min(budget, room))
        self.rounds += 1
        return proposal


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 200, 340])
@pytest.mark.parametrize("positions", [20, 128])
@pytest.mark.parametrize("width", [1, 2, 4, 8, "auto"])
def test_every_proposal_is_a_fresh_drafts(tokenizer: Tokenizer, vocabulary: int, positions: int,
                                          width: int | Literal["auto"]) -> None:
    def make() -> Llama:
        model = resized(noisy(), vocabulary)
        other = Llama(model.config.model_copy(update={
            "max_position_embeddings": positions, "eos_token_ids": (6,)})).eval().requires_grad_(False)
        other.load_state_dict(model.state_dict())
        return other

    shared = min(vocabulary, VOCABULARY)
    watched = Watched(ModelProposer(TorchEngine(make()), shared, VOCABULARY), make(), shared)
    decoder = Decoder(TorchEngine(target_model()), tokenizer, watched)
    for prompt in PROMPTS:
        assert decoder.generate(prompt, max_new_tokens=LENGTH, width=width).ids == list(says(prompt))
    assert watched.rounds > 0


def test_idle_rounds_between_proposals(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller may skip the draft for any number of rounds."""
    for pattern in itertools.product((0, 1, 3), repeat=4):
        widths = itertools.cycle(pattern)
        monkeypatch.setattr(FixedWidth, "width", lambda self, widths=widths: next(widths))
        watched = Watched(ModelProposer(TorchEngine(noisy()), VOCABULARY, VOCABULARY), noisy(), VOCABULARY)
        decoder = Decoder(TorchEngine(target_model()), tokenizer, watched)
        assert decoder.generate(PROMPTS[1], max_new_tokens=16, width=3).ids == list(says(PROMPTS[1])[:16])


def test_drawn_proposals_come_with_the_law_they_were_drawn_from() -> None:
    """Laws are the draft's own under the request's sampling, padded to the target's vocabulary."""
    model, sampling = resized(target_model(), 200), Sampling(0.8, top_k=30, top_p=0.95)
    proposer = draft(resized(target_model(), 200))
    context = list(PROMPTS[1])
    proposer.begin(context, 64, sampling, SeededChoices(1))
    proposal = proposer.propose(context, 5)
    assert proposal.laws is not None
    assert proposal.laws.shape == (5, VOCABULARY)
    logits = model(torch.tensor([context + proposal.tokens]))[0, len(context) - 1:-1]
    expected = torch.nn.functional.pad(probabilities(logits, sampling), (0, 100))
    torch.testing.assert_close(proposal.laws, expected, rtol=1e-3, atol=1e-5)
    assert all(law[token] > 0 for law, token in zip(proposal.laws, proposal.tokens, strict=True))


# Text: an engine that says what a test wants


class Speaking:
    """An engine whose most likely token at each position is the next one of a script."""

    def __init__(self, script: list[int], config: ModelConfig) -> None:
        self.config, self._script, self._length = config, script, 0

    @property
    def lengths(self) -> list[int]:
        return [self._length]

    def start(self, batch: int, capacity: int) -> None:
        self._length = 0

    def prefill(self, prompts: list[list[int]]) -> None:
        self._length += len(prompts[0])

    def extend(self, tokens: Tensor) -> Tensor:
        places = range(self._length + 1, self._length + 1 + tokens.shape[1])
        best = [self._script[place] if place < len(self._script) else 0 for place in places]
        self._length += tokens.shape[1]
        return torch.nn.functional.one_hot(torch.tensor(best), self.config.vocab_size)[None] * 20.0

    def truncate(self, lengths: list[int]) -> None:
        [self._length] = lengths

    def synchronize(self) -> None:
        pass


def speaking(tokenizer: Tokenizer, prompt: str, text: str, guess: int = 3) -> tuple[Decoder, list[int]]:
    """A decoder that answers `prompt` with `text`, drafting rightly `guess` tokens; and the ids of `text`."""
    start, ids = tokenizer.encode(prompt), tokenizer.encode(text)[1:]  # without the mark of a text's start
    script = start + ids
    config = tiny_config(eos_token_ids=(tokenizer.eos_id,), max_position_embeddings=1_024)

    class Guessing(Stubborn):
        def propose(self, context: Sequence[int], budget: int) -> Proposal:
            return Proposal(script[len(context):len(context) + min(budget, guess)])

    return Decoder(Speaking([*script, config.eos_token_ids[0]], config), tokenizer, Guessing()), ids


ACCENTS = "x = 'na\u00efve \u4f60\u597d \U0001f642' # \u20ac\n"


@pytest.mark.parametrize("text", [TEXTS[0], ACCENTS, "\n\n  \t", "\u00e9"])
def test_text_is_the_decoded_ids(tokenizer: Tokenizer, text: str) -> None:
    decoder, ids = speaking(tokenizer, "def f():", text)
    result = decoder.generate("def f():", max_new_tokens=200)
    assert result.text == text
    assert result.finish == "stop"
    assert result.ids == [*ids, tokenizer.eos_id]


def test_text_that_ends_amid_a_character(tokenizer: Tokenizer) -> None:
    """Cut by the limit, a character of which some bytes are missing shows as it does when ids are decoded."""
    decoder, ids = speaking(tokenizer, "def f():", ACCENTS)
    for limit in range(1, len(ids) + 1):
        result = decoder.generate("def f():", max_new_tokens=limit)
        assert result.ids == ids[:limit]
        assert result.text == tokenizer.decode(ids[:limit])


def test_an_end_of_text_amid_a_character(tokenizer: Tokenizer) -> None:
    """The model itself may stop there: the bytes it said show, as they do at the limit."""
    start, ids = tokenizer.encode("x"), tokenizer.encode(ACCENTS)[1:]
    config = tiny_config(eos_token_ids=(tokenizer.eos_id,))
    for said in range(len(ids)):
        script = [*start, *ids[:said], config.eos_token_ids[0]]
        result = Decoder(Speaking(script, config), tokenizer).generate("x", max_new_tokens=len(ids) + 1)
        assert result.finish == "stop"
        assert result.text == tokenizer.decode(ids[:said])


def test_a_prompt_that_ends_amid_a_character(tokenizer: Tokenizer) -> None:
    """A text cut by the limit may be handed in again as ids: what is said next must not be lost."""
    ids = tokenizer.encode(ACCENTS)
    config = tiny_config(eos_token_ids=(tokenizer.eos_id,))
    for known in range(1, len(ids)):
        decoder = Decoder(Speaking([*ids, config.eos_token_ids[0]], config), tokenizer)
        result = decoder.generate(ids[:known], max_new_tokens=len(ids) - known + 1)
        assert result.ids == [*ids[known:], tokenizer.eos_id]
        # All whole characters said are there; how the one that was open shows is left to taste.
        said = tokenizer.decode(ids[known:]).lstrip("\ufffd")
        assert result.text.endswith(said)


@pytest.mark.parametrize("width", [0, 1, 5])
@pytest.mark.parametrize("stop", ["a + b", "return", "\n", "\n\n\nclass", "d", "def", "+ 0\n", "Thing0:"])
def test_stop_strings_end_the_text_where_they_begin(tokenizer: Tokenizer, stop: str, width: int) -> None:
    decoder, ids = speaking(tokenizer, "# code\n", TEXTS[0])
    assert stop in TEXTS[0]
    result = decoder.generate("# code\n", max_new_tokens=200, stop=["never said", stop], width=width)
    assert result.text == TEXTS[0][:TEXTS[0].index(stop)]
    assert result.finish == "stop"
    # No token is given out behind the one that completed the stop string.
    said = next(n for n in range(len(ids) + 1) if stop in tokenizer.decode(ids[:n]))
    assert result.ids == ids[:said]
    check_statistics(result, cut=True)


def test_the_first_stop_string_in_the_text_counts(tokenizer: Tokenizer) -> None:
    decoder, _ = speaking(tokenizer, "# code\n", TEXTS[0])
    # The last two are completed by one and the same token.
    for stop in (["class", "return"], ["return", "class"], ["urn", "return"], ["return", "urn"]):
        assert decoder.generate("# code\n", stop=stop).text == TEXTS[0][:TEXTS[0].index("return")]


def test_a_stop_string_in_the_prompt_does_not_count(tokenizer: Tokenizer) -> None:
    decoder, _ = speaking(tokenizer, "return # and ", "def f(): pass")
    assert decoder.generate("return # and ", stop=["return"]).text == "def f(): pass"


def test_text_goes_on_from_the_prompt() -> None:
    """Prompt and text join to what all ids decode to, also where a tokenizer drops a text's first space."""
    words = ["<s>", "</s>", "\u2581def", "\u2581f", "\u2581return", "\u2581x"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: index for index, word in enumerate(words)}, unk_token="<s>"))
    backend.decoder = tokenizers.decoders.Sequence([  # as Llama 2's
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    spaced = Tokenizer(backend)
    prompt, ids = [2, 3], [4, 5]
    config = tiny_config(vocab_size=6, eos_token_ids=(1,))
    result = Decoder(Speaking([*prompt, *ids, 1], config), spaced).generate(prompt, max_new_tokens=2)
    assert result.ids == ids
    assert spaced.decode(prompt) + result.text == spaced.decode(prompt + ids) == "def f return x"


# The rest of the interface


@pytest.mark.parametrize("width", [0, 3, "auto"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=5)])
def test_streaming_yields_the_same_tokens(decoder: Decoder, width: int | Literal["auto"],
                                          sampling: Sampling) -> None:
    into = Generation()
    rounds = []
    for tokens in decoder.stream(PROMPTS[1], max_new_tokens=LENGTH, width=width, sampling=sampling,
                                 method="coupled", into=into):
        assert tokens, "a round settles at least one token"
        rounds.append(tokens)
        assert into.tokens == [token for tokens in rounds for token in tokens], "settled as it is yielded"
    assert len(rounds) == into.statistics.target_passes
    assert [token.id for tokens in rounds for token in tokens] == decoder.generate(
        PROMPTS[1], max_new_tokens=LENGTH, width=width, sampling=sampling, method="coupled").ids
    # The target's own token ends each round; all before it were guessed.
    for tokens in rounds:
        assert [token.drafted for token in tokens] == [True] * (len(tokens) - 1) + [False]


@pytest.mark.parametrize("method", ["rejection", "coupled"])
def test_a_seed_repeats(decoder: Decoder, method: Literal["rejection", "coupled"]) -> None:
    def run(seed: int | None) -> Generation:
        return decoder.generate(PROMPTS[1], max_new_tokens=16, width=3, method=method,
                                sampling=Sampling(1.0, seed=seed))

    assert run(4).ids == run(4).ids
    drawn = run(None)
    assert drawn.seed is not None
    assert run(drawn.seed).ids == drawn.ids, "a drawn seed is reported and repeats the text"
    assert run(None).seed != drawn.seed


def test_measuring_costs_takes_nothing_from_the_seed(tokenizer: Tokenizer,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request with width "auto" is timed; its text must be the one its seed gives later too."""
    monkeypatch.setattr(decoder_module, "AdaptiveWidth", lambda costs: FixedWidth(3))
    decoder = Decoder(TorchEngine(target_model()), tokenizer, DRAFTS["noisy"]())
    first, second = (decoder.generate(PROMPTS[1], max_new_tokens=16, width="auto",
                                      sampling=Sampling(1.0, seed=9)).ids for _ in range(2))
    assert first == second


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Path]:
    """A target and a draft that is partly right, on disk with their tokenizer."""
    place = tmp_path_factory.mktemp("pair")
    return (save_model(target_model(), place / "target", tokenizer_from=corpus),
            save_model(noisy(), place / "draft", tokenizer_from=corpus))


def test_generate_from_folders(folders: tuple[Path, Path], tokenizer: Tokenizer) -> None:
    target, with_draft = folders
    alone = generate(target, None, "def add", max_new_tokens=LENGTH, device="cpu")
    ids = tokenizer.encode("def add")
    assert alone.ids == list(says(tuple(ids)))
    for source in (str(with_draft), with_draft):
        result = generate(str(target), source, "def add", max_new_tokens=LENGTH, device="cpu", width=4)
        assert (result.ids, result.text) == (alone.ids, alone.text)
        assert result.statistics.accepted > 0
    loaded = Decoder.load(target, with_draft, device="cpu")
    again = generate(loaded, None, ids, max_new_tokens=LENGTH, width=2)
    assert again.ids == alone.ids
    assert again.statistics.drafted > 0, "a Decoder brings its own draft"
    sampled = [generate(target, source, "def add", max_new_tokens=8, temperature=0.8, top_k=40, top_p=0.9,
                        seed=3, device="cpu", method="coupled").ids for source in (None, with_draft)]
    assert sampled[0] == sampled[1]


def test_generate_refuses_models_that_do_not_go_together(folders: tuple[Path, Path], tmp_path: Path) -> None:
    target, _ = folders
    stranger = save_model(tiny_model(2), tmp_path / "stranger")
    with pytest.raises(Exception, match="tokenizer"):
        generate(target, stranger, "x", device="cpu")
    Tokenizer.train_bpe([text[::-1] for text in TEXTS], 300).save(stranger)
    with pytest.raises(DecodingError, match="different tokenizers"):
        generate(target, stranger, "x", device="cpu")
    with pytest.raises(ModelFolderError, match="no model folder"):
        generate(target, tmp_path / "nothing", "x", device="cpu")


@pytest.mark.parametrize(("options", "says_"), [
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [3, VOCABULARY]}, f"token {VOCABULARY} of the prompt"),
    ({"prompt": [-1]}, "token -1 of the prompt"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 128}, "exceed the model's 128 positions.*at most 125"),
    ({"prompt": [1] * 129}, "exceed the model's 128 positions"),
    ({"width": -1}, "from 0 to 16"),
    ({"width": 17}, "from 0 to 16"),
    ({"method": "tree"}, "tree"),
    ({"stop": [""]}, "stop string"),
])
def test_requests_that_cannot_be_served(tokenizer: Tokenizer, options: dict[str, Any], says_: str) -> None:
    decoder = Decoder(TorchEngine(target_model()), tokenizer, DRAFTS["random"]())
    prompt = options.pop("prompt", list(PROMPTS[1]))
    with pytest.raises(DecodingError, match=says_) as caught:
        decoder.generate(prompt, **{"max_new_tokens": 4, **options})
    assert "\n" not in str(caught.value)
    # And the next one is served as ever.
    assert decoder.generate(PROMPTS[1], max_new_tokens=4).ids == list(says(PROMPTS[1])[:4])


def test_statistics_add_up_over_requests(decoder: Decoder) -> None:
    results = [decoder.generate(prompt, max_new_tokens=LENGTH, width=4) for prompt in PROMPTS]
    total = Statistics()
    for result in results:
        total.add(result.statistics)
        times = result.statistics
        assert 0 <= times.draft_seconds + times.target_seconds <= times.total_seconds
    assert total.generated == len(PROMPTS) * LENGTH
    assert total.target_passes == sum(result.statistics.target_passes for result in results)
