"""Bits per byte of a model folder on a prepared corpus."""

from __future__ import annotations

from pathlib import Path

import torch

from outrider.corpus import TokenCorpus, Tokenizer, Windows
from outrider.corpus.shards import Split
from outrider.devices import pick_device
from outrider.errors import ConfigError, CorpusError
from outrider.model.folder import load_model, resolve_folder
from outrider.model.likelihood import Score, score

BATCH_TOKENS = 16_384


def evaluate_corpus(model: str | Path, corpus: str | Path, *, split: Split = "validation", context: int = 0,
                    tokens: int = 0, device: str = "auto", precision: str = "fp32") -> Score:
    """Score a model folder on a split of a corpus.

    Args:
        model: a model folder or hub id.
        corpus: a folder made by `outrider.corpus.prepare` with the model's tokenizer.
        split: which split.
        context: tokens a window predicts; 0 takes the model's own, at most 1,024.
        tokens: about how many tokens to use, from the start; 0 means all.
        device: auto, cpu, cuda or mps.
        precision: "fp32" or "bf16".

    Raises:
        ConfigError: the corpus was prepared with another tokenizer.
        CorpusError, ModelFolderError: an input is missing or damaged.
    """
    folder, place = resolve_folder(model), pick_device(device)
    text = TokenCorpus(corpus, split)
    if len(text) < 2:
        raise CorpusError(f"the {split} split of {corpus} is empty; prepare it with --validation 0.01")
    if Tokenizer.load(folder).sha256 != text.manifest.tokenizer.sha256:
        raise ConfigError(f"{corpus} was prepared with another tokenizer than {folder} has; "
                          f"prepare it again with --tokenizer {folder}")
    loaded = load_model(folder, dtype=torch.float32, device=place)
    limit = loaded.config.max_position_embeddings
    if not 0 <= context <= limit or tokens < 0:
        raise ConfigError(f"context {context} and tokens {tokens} must be 0 or more, and context at most the model's "
                          f"{limit} positions")
    context = context or min(limit, 1_024)
    batches = Windows(text, context).in_order(max(1, BATCH_TOKENS // context), tokens)
    return score(loaded, batches, text.bytes_per_token, place, precision)
