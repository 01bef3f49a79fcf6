"""Models of other formats into Hugging Face folders, a few tensors in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from outrider.console import Silent, Watcher, size
from outrider.corpus.backends import Piece, PieceRules, from_merges, from_pieces
from outrider.corpus.tokenizer import Tokenizer
from outrider.errors import ModelFolderError, TokenizerError
from outrider.files import atomic_folder, write_json
from outrider.model.config import ModelConfig
from outrider.model.folder import write_tensors
from outrider.model.gguf import GGUFFile, GGUFVocabulary
from outrider.model.llama2c import Llama2CFile

#: A safetensors file is closed once it has this many bytes, which bounds the memory.
FILE_BYTES = 512 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(source: str | Path, output: str | Path, *, tokenizer: str | Path | None = None, dtype: str = "bfloat16",
            replace: bool = False, watcher: Watcher | None = None) -> ModelConfig:
    """Turn a GGUF file or a llama2.c `.bin` into a model folder. Atomic.

    Args:
        source: the file.
        output: the folder to make.
        tokenizer: a tokenizer to put in instead of the file's own; llama2.c files need one.
        dtype: element type on disk: float32, bfloat16 or float16.
        replace: whether an existing folder may be replaced.
        watcher: told of progress.

    Raises:
        ModelFolderError: not such a file, cut short, another architecture, or an unknown quantisation.
        TokenizerError: no usable tokenizer.
    """
    source, watcher = Path(source), watcher or Silent()
    if dtype not in DTYPES:
        raise ModelFolderError(f"no element type '{dtype}'; use {', '.join(DTYPES)}")
    if not source.is_file():
        raise ModelFolderError(f"no file {source}")
    opened = GGUFFile(source) if _starts_with(source, b"GGUF") else Llama2CFile(source)
    config = opened.config()
    chosen = _tokenizer(opened, tokenizer)
    if chosen.vocab_size > config.vocab_size:
        raise TokenizerError(f"the tokenizer has {chosen.vocab_size} tokens and the model {config.vocab_size}")
    with atomic_folder(Path(output), replace=replace) as staging:
        _write_tensors(opened.tensors(), staging, DTYPES[dtype], watcher)
        write_json(staging / "config.json", config.to_hf(dtype))
        chosen.save(staging)
    return config


def _write_tensors(tensors: Iterable[tuple[str, np.ndarray]], folder: Path, dtype: torch.dtype,
                   watcher: Watcher) -> None:
    """Write tensors into files of bounded size, and an index if there is more than one."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    files: list[tuple[Path, list[str]]] = []
    held = total = 0

    def flush() -> None:
        nonlocal held
        path = folder / f"part-{len(files):05d}.safetensors"
        write_tensors(parts[0], path)
        files.append((path, list(parts[0])))
        parts[0], held = {}, 0

    for name, values in tensors:
        tensor = torch.from_numpy(np.require(values, requirements=["C", "W"])).to(dtype)
        parts[0][name] = tensor
        held, total = held + tensor.nbytes, total + tensor.nbytes
        watcher.update(total, None, f"{size(total)} written, {name}")
        if held >= FILE_BYTES:
            flush()
    if parts[0]:
        flush()
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, (path, names) in enumerate(files, 1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tokenizer(opened: GGUFFile | Llama2CFile, choice: str | Path | None) -> Tokenizer:
    if choice is not None:
        return Tokenizer.load(choice)
    if isinstance(opened, Llama2CFile):
        raise TokenizerError(f"{opened.path} carries no tokenizer; name one with --tokenizer")
    return gguf_tokenizer(opened.vocabulary(), opened.path)


def gguf_tokenizer(vocabulary: GGUFVocabulary, path: Path) -> Tokenizer:
    """Build the tokenizer a GGUF file carries.

    Raises:
        TokenizerError: a kind Outrider does not know.
    """
    bos = vocabulary.bos_id if vocabulary.add_bos else -1
    if vocabulary.model == "llama":
        pieces = [Piece(text, score, kind)
                  for text, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)]
        backend = from_pieces(pieces, PieceRules(add_dummy_prefix=vocabulary.add_space_prefix, bos_id=bos))
    elif vocabulary.model == "gpt2":
        backend = from_merges(vocabulary.tokens, vocabulary.merges, types=vocabulary.types, pre=vocabulary.pre,
                              bos_id=bos)
    else:
        raise TokenizerError(f"{path} has a tokenizer of kind {vocabulary.model!r}; name another with --tokenizer")
    names = {key: vocabulary.tokens[index] for key, index in (("bos", vocabulary.bos_id), ("eos", vocabulary.eos_id))
             if index >= 0}
    return Tokenizer(backend, **names)


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
