"""The order of windows: every token once an epoch, from any position, for any number of processes."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from outrider.corpus import IGNORED, Batch, Position, ShuffledBatches, TokenCorpus, Tokenizer, Windows, prepare
from outrider.corpus.batches import permute
from outrider.errors import CorpusError

KEYS = [(0, 0), (0, 1), (1, 0), (12345, 7), (2**40, 2**33)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> TokenCorpus:
    """A corpus of 99 tokens, over several shards, in which no token stands twice in a short stretch."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "a.txt").write_bytes(bytes(range(32, 127)) + b"\n\t\r")
    prepare([str(folder / "a.txt")], folder / "out", tokenizer=Tokenizer.train_bpe(["a"], 257), validation=0,
            shard_tokens=13)
    corpus = TokenCorpus(folder / "out")
    assert len(set(corpus.read(0, 999).tolist())) == len(corpus) == 99
    return corpus


# The permutation.


@pytest.mark.parametrize("key", KEYS)
def test_permute_is_a_bijection(key: tuple[int, int]) -> None:
    for count in range(1, 301):
        image = permute(np.arange(count), count, key)
        assert image.dtype == np.int64
        assert sorted(image.tolist()) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 300])
def test_permute_maps_each_index_by_itself(count: int) -> None:
    # So that no process needs to hold the permutation, or agree with others on what it asks for.
    whole = permute(np.arange(count), count, (3, 4))
    for index in range(count):
        assert permute(np.array([index]), count, (3, 4)).tolist() == [whole[index]]
    backwards = permute(np.arange(count)[::-1], count, (3, 4))
    assert backwards.tolist() == whole[::-1].tolist()
    assert permute(np.array([], np.int64), count, (3, 4)).tolist() == []


def test_permute_differs_with_seed_and_epoch() -> None:
    images = {key: tuple(permute(np.arange(300), 300, key)) for key in itertools.product(range(6), range(6))}
    assert len(set(images.values())) == 36
    # And not by a shift or a constant only: two epochs agree in about one place, as random orders do.
    for one, two in itertools.combinations(images.values(), 2):
        assert sum(a == b for a, b in zip(one, two, strict=True)) < 12


def test_permute_moves_everything_everywhere() -> None:
    # Over many epochs each of 8 windows comes in each of 8 places about equally often: 500 of 4,000.
    places = np.array([permute(np.arange(8), 8, (5, epoch)) for epoch in range(4_000)])
    for place in range(8):
        counts = np.bincount(places[:, place], minlength=8)
        assert (np.abs(counts - 500) < 5 * (4_000 * (1 / 8) * (7 / 8)) ** 0.5).all()


def test_permute_of_a_corpus_of_many_terabytes() -> None:
    count = 10**12 + 39
    image = permute(np.arange(count - 5_000, count), count, (1, 2))
    assert len(set(image.tolist())) == 5_000
    assert ((image >= 0) & (image < count)).all()


# Windows.


def counted(batches: list[Batch]) -> list[tuple[int, int]]:
    """Return every (input, target) that counts."""
    return [(int(i), int(t)) for batch in batches
            for i, t in zip(batch.inputs.ravel(), batch.targets.ravel(), strict=True) if t != IGNORED]


@pytest.mark.parametrize("context", [1, 2, 7, 13, 48, 49, 97, 98, 99, 200])
def test_every_token_but_the_first_is_predicted_once(small: TokenCorpus, context: int) -> None:
    windows = Windows(small, context)
    tokens = small.read(0, 999).tolist()
    assert len(windows) == -(-98 // context)
    batch = windows.batch(np.arange(len(windows)))
    assert batch.inputs.shape == batch.targets.shape == (len(windows), context)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert batch.tokens == 98
    assert counted([batch]) == list(itertools.pairwise(tokens))
    # Padding stands only at the end of the last window.
    assert (batch.targets[:-1] != IGNORED).all()
    rest = 98 - context * (len(windows) - 1)
    assert (batch.targets[-1, rest:] == IGNORED).all()
    assert (batch.targets[-1, :rest] != IGNORED).all()


@pytest.mark.parametrize("batch_windows", [1, 3, 14, 50])
def test_in_order(small: TokenCorpus, batch_windows: int) -> None:
    windows = Windows(small, 7)
    tokens = small.read(0, 999).tolist()
    batches = list(windows.in_order(batch_windows))
    assert counted(batches) == list(itertools.pairwise(tokens))
    assert all(len(batch.inputs) == batch_windows for batch in batches[:-1])


@pytest.mark.parametrize(("wanted", "got"), [(1, 7), (7, 7), (8, 14), (97, 98), (98, 98), (10_000, 98)])
def test_in_order_for_some_tokens(small: TokenCorpus, wanted: int, got: int) -> None:
    assert sum(batch.tokens for batch in Windows(small, 7).in_order(4, wanted)) == got


def test_a_corpus_of_one_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=tokenizer, validation=0)
    assert Windows(TokenCorpus(tmp_path / "out"), 4).batch(np.array([0])).tokens == 1  # BOS, a
    with pytest.raises(CorpusError, match="validation"):
        Windows(TokenCorpus(tmp_path / "out", "validation"), 4)


# Shuffled batches.


@pytest.mark.parametrize("batch_windows", [1, 2, 3, 5, 13, 14, 15, 40])
def test_every_window_once_an_epoch(small: TokenCorpus, batch_windows: int) -> None:
    batches = ShuffledBatches(Windows(small, 7), batch_windows, seed=3)
    position, seen = Position(), []
    for _ in range(14 * 5):  # 14 windows an epoch: five times as many batches as windows of one
        seen += batches.numbers(position).tolist()
        position = batches.advance(position)
    epochs = [seen[first:first + 14] for first in range(0, len(seen) - 13, 14)]
    assert len(epochs) == 5 * batch_windows
    for epoch in epochs:
        assert sorted(epoch) == list(range(14))
    orders = {tuple(epoch) for epoch in epochs[:5]}
    assert len(orders) == len(epochs[:5])


def test_a_whole_epoch_of_batches_counts_every_token_once(small: TokenCorpus) -> None:
    windows = Windows(small, 7)
    batches = ShuffledBatches(windows, 2, seed=1)
    tokens = small.read(0, 999).tolist()
    read = [batches.batch(batches.advance(Position(), step)) for step in range(7)]
    assert Counter(counted(read)) == Counter(itertools.pairwise(tokens))
    assert sum(batch.tokens for batch in read) == 98


@pytest.mark.parametrize("batch_windows", [1, 3, 14, 31])
def test_advancing_is_stepping(small: TokenCorpus, batch_windows: int) -> None:
    batches = ShuffledBatches(Windows(small, 7), batch_windows, seed=0)
    position = Position()
    for steps in range(60):
        assert batches.advance(Position(), steps) == position
        assert 0 <= position.window < 14
        assert batches.advance(position, 0) == position
        for more in (1, 5):
            assert batches.advance(position, more) == batches.advance(Position(), steps + more)
        position = batches.advance(position)
    assert position == Position(*divmod(60 * batch_windows, 14))


@pytest.mark.parametrize("batch_windows", [1, 4, 6, 14, 20])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_a_batch_exactly(small: TokenCorpus, batch_windows: int, world: int) -> None:
    batches = ShuffledBatches(Windows(small, 7), batch_windows, seed=9)
    position = Position()
    for _ in range(30):
        whole = batches.batch(position)
        shares = [batches.batch(position, rank=rank, world=world) for rank in range(world)]
        rows = Counter((tuple(i), tuple(t)) for share in shares
                       for i, t in zip(share.inputs.tolist(), share.targets.tolist(), strict=True))
        assert rows == Counter((tuple(i), tuple(t)) for i, t in
                               zip(whole.inputs.tolist(), whole.targets.tolist(), strict=True))
        sizes = [len(share.inputs) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert sum(share.tokens for share in shares) == whole.tokens
        position = batches.advance(position)


def test_the_seed_sets_the_order(small: TokenCorpus) -> None:
    windows = Windows(small, 7)
    orders = [ShuffledBatches(windows, 14, seed).numbers(Position()).tolist() for seed in (0, 1, 2, 0)]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


class Endless:
    """Stands for a corpus too large to walk through; reading it fails."""

    folder, split = Path("endless"), "train"

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, count: int) -> np.ndarray:
        raise AssertionError("finding the numbers of a batch must read no token")


def test_a_position_far_away_needs_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    # 10^12 windows an epoch, the millionth epoch: were anything counted through, this would not end.
    # How many values are permuted is counted too.
    asked: list[int] = []

    def counting(indices: np.ndarray, count: int, key: tuple[int, int]) -> np.ndarray:
        asked.append(len(indices))
        return permute(indices, count, key)

    monkeypatch.setattr("outrider.corpus.batches.permute", counting)
    windows = Windows(Endless(2_048 * 10**12 + 1), 2_048)  # type: ignore[arg-type]
    batches = ShuffledBatches(windows, 512, seed=5)
    assert len(windows) == 10**12
    position = Position(10**6, 10**12 - 100)  # the batch crosses into the next epoch
    numbers = batches.numbers(position)
    assert sum(asked) == 512
    assert sorted(asked) == [100, 412]
    assert ((numbers >= 0) & (numbers < 10**12)).all()
    assert numbers[:100].tolist() == permute(np.arange(10**12 - 100, 10**12), 10**12, (5, 10**6)).tolist()
    assert numbers[100:].tolist() == permute(np.arange(412), 10**12, (5, 10**6 + 1)).tolist()
    assert batches.advance(position) == Position(10**6 + 1, 412)
