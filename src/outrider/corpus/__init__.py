"""Text to token shards to batches.

    manifest = prepare(["stdlib", "books"], "data/demo", tokenizer="bpe:4096")
    corpus = TokenCorpus("data/demo", "train")
"""

from outrider.corpus.batches import IGNORED, Batch, Position, ShuffledBatches, Windows
from outrider.corpus.prepare import prepare
from outrider.corpus.shards import Manifest, TokenCorpus, verify_corpus
from outrider.corpus.sources import Document, Source
from outrider.corpus.tokenizer import Tokenizer

__all__ = ["IGNORED", "Batch", "Document", "Manifest", "Position", "ShuffledBatches", "Source", "TokenCorpus",
           "Tokenizer", "Windows", "prepare", "verify_corpus"]
