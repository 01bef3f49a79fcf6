"""The Llama family: shape, module, and Hugging Face folders.

    model = load_model("path/to/folder")
    logits = model(tokens)            # [batch, time] ids -> [batch, time, vocab]
"""

from typing import TYPE_CHECKING, Any

from outrider.model.config import ModelConfig, RopeScaling
from outrider.model.presets import PRESETS, preset

if TYPE_CHECKING:
    from outrider.model.folder import load_config, load_model, save_model
    from outrider.model.llama import KVCache, Llama

__all__ = ["PRESETS", "KVCache", "Llama", "ModelConfig", "RopeScaling",
           "load_config", "load_model", "preset", "save_model"]


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for (PEP 562)."""
    if name in ("Llama", "KVCache"):
        from outrider.model import llama

        return getattr(llama, name)
    if name in ("load_model", "save_model", "load_config"):
        from outrider.model import folder

        return getattr(folder, name)
    raise AttributeError(f"module 'outrider.model' has no attribute {name!r}")
