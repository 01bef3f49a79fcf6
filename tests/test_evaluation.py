"""Bits per byte against an independent computation with transformers' own loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider.corpus import TokenCorpus, Tokenizer, prepare
from outrider.corpus.shards import Split
from outrider.errors import ConfigError, CorpusError, ModelFolderError
from outrider.evaluation import evaluate_corpus
from outrider.model import save_model
from tests.conftest import TEXTS, tiny_model


def independent(model: Path, corpus: Path, split: Split, context: int,
                windows: int | None = None) -> tuple[float, int]:
    """Summed nats and tokens, one window at a time: transformers shifts the labels and takes the mean."""
    theirs = AutoModelForCausalLM.from_pretrained(model)
    text = TokenCorpus(corpus, split)
    stream = torch.from_numpy(text.read(0, len(text)))
    nats, tokens = 0.0, 0
    for start in list(range(0, len(stream) - 1, context))[:windows]:
        window = stream[None, start:start + context + 1]
        count = window.shape[1] - 1
        with torch.no_grad():
            nats += theirs(input_ids=window, labels=window).loss.item() * count
        tokens += count
    return nats, tokens


@pytest.mark.parametrize("split", ["validation", "train"])
@pytest.mark.parametrize("context", [16, 100, 128])
def test_agrees_with_transformers(model_folder: Path, corpus: Path, split: Split, context: int) -> None:
    score = evaluate_corpus(model_folder, corpus, split=split, context=context, device="cpu")
    nats, tokens = independent(model_folder, corpus, split, context)
    text = TokenCorpus(corpus, split)
    assert score.tokens == tokens == len(text) - 1, "every token but the very first is predicted, once"
    assert score.loss == pytest.approx(nats / tokens, rel=1e-5)
    # The text itself, not the manifest, says how many bytes there were.
    size = len(Tokenizer.load(corpus).decode(text.read(0, len(text)).tolist()).encode())
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_the_default_context_is_the_models_own(model_folder: Path, corpus: Path) -> None:
    assert evaluate_corpus(model_folder, corpus, device="cpu") == evaluate_corpus(
        model_folder, corpus, context=128, device="cpu")


@pytest.mark.parametrize("tokens", [1, 16, 17, 100])
def test_a_part_of_the_text_from_its_start(model_folder: Path, corpus: Path, tokens: int) -> None:
    score = evaluate_corpus(model_folder, corpus, context=16, tokens=tokens, device="cpu")
    nats, count = independent(model_folder, corpus, "validation", 16, windows=-(-tokens // 16))
    assert tokens <= score.tokens == count < tokens + 16
    assert score.loss == pytest.approx(nats / count, rel=1e-5)


def test_bfloat16_is_close_and_not_the_same(model_folder: Path, corpus: Path) -> None:
    exact = evaluate_corpus(model_folder, corpus, device="cpu")
    rounded = evaluate_corpus(model_folder, corpus, device="cpu", precision="bf16")
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert rounded.loss != exact.loss


def test_a_model_without_knowledge_pays_for_every_token(tmp_path: Path, corpus: Path) -> None:
    """All logits equal: log2(vocabulary) bits a token, whatever the text."""
    model = tiny_model(1)
    with torch.no_grad():
        model.head.weight.zero_()
    folder = save_model(model, tmp_path / "flat", tokenizer_from=corpus)
    score = evaluate_corpus(folder, corpus, device="cpu")
    assert score.loss == pytest.approx(math.log(300), rel=1e-5)


def test_another_tokenizer_is_refused(tmp_path: Path, model_folder: Path, corpus: Path) -> None:
    other = tmp_path / "other"
    prepare([str(write(tmp_path))], other, tokenizer=Tokenizer.train_bpe([t[::-1] for t in TEXTS], 300),
            validation=0.2)
    with pytest.raises(ConfigError, match="another tokenizer") as caught:
        evaluate_corpus(model_folder, other, device="cpu")
    assert "\n" not in str(caught.value)


def write(place: Path) -> Path:
    folder = place / "text"
    folder.mkdir()
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.py").write_text(text)
    return folder


def test_other_refusals(tmp_path: Path, model_folder: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"129.*128 positions"):
        evaluate_corpus(model_folder, corpus, context=129, device="cpu")
    with pytest.raises(CorpusError, match="not a prepared corpus"):
        evaluate_corpus(model_folder, tmp_path, device="cpu")
    with pytest.raises(ModelFolderError, match="no model folder"):
        evaluate_corpus(tmp_path / "nothing", corpus, device="cpu")
    whole = tmp_path / "whole"
    prepare([str(write(tmp_path))], whole, tokenizer=tokenizer, validation=0)
    with pytest.raises(CorpusError, match="validation split"):
        evaluate_corpus(model_folder, whole, device="cpu")


@pytest.mark.parametrize("context", [-1, -128])
def test_a_negative_context_has_no_meaning(model_folder: Path, corpus: Path, context: int) -> None:
    with pytest.raises(ConfigError, match="context"):
        evaluate_corpus(model_folder, corpus, context=context, device="cpu")
