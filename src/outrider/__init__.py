"""Outrider: train the small model that makes your large one fast.

The rooms, in the order data flows: `outrider.corpus` (text to token shards), `outrider.model` (the Llama
family), `outrider.training`, `outrider.decoding`, `outrider.evaluation`, `outrider.benchmarks`.
"""

from outrider.errors import OutriderError

__version__ = "0.1.0"
__all__ = ["OutriderError", "__version__"]
