"""A text as windows of token ids. Knows tokenizers and windows; refuses to know what the windows are for.

A text is tokenised once as a whole; windows do not overlap and the tail that fills none is dropped (METHODS 0.2).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitpress.engine.data.texts import TextSample
from bitpress.engine.errors import InputError
from bitpress.engine.home import text_dir


def token_windows(tokenizer: Any, sample: TextSample, window: int, count: int | None = None, needs_bos: bool = False) -> Tensor:
    """The first `count` (None: all) windows of the text, int64 [n, window].

    BOS stands where the tokenizer puts it: once at the start of the text, or nowhere. With `needs_bos` every window begins
    with it and holds window - 1 tokens of text. Fewer windows come back when the text has fewer. Raises InputError when it has none.
    """
    windows = _all_windows(tokenizer, sample, window, needs_bos)
    return windows if count is None else windows[:count]


def calibration_ids(tokenizer: Any, sample: TextSample, sequences: int, length: int, seed: int = 0, needs_bos: bool = False) -> Tensor:
    """`sequences` windows drawn without replacement from all over the text, int64 [n, length]; all of them when it has fewer.

    Raises InputError when `sample` is an evaluation part, or too short for one window.
    """
    if sample.part == "evaluation":
        why = "Figures on a text that a method has seen say nothing."
        raise InputError(f"The evaluation part of {sample.id} cannot be calibrated on.", why, "Use its calibration part.")
    windows = _all_windows(tokenizer, sample, length, needs_bos)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:sequences]]


def ids_digest(ids: Tensor) -> str:
    """sha256 of token ids and their shape."""
    array = ids.cpu().to(torch.int64).contiguous().numpy()
    return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of all that decides how a tokenizer cuts text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()


def token_ids(tokenizer: Any, sample: TextSample, special: bool = True) -> Tensor:
    """The whole text as int64 [T], kept on disk between runs; `special` lets the tokenizer add its own BOS."""
    path = text_dir() / "tokens" / f"{sample.sha256[:16]}-{tokenizer_digest(tokenizer)[:16]}-{'special' if special else 'plain'}.npy"
    kept = _read(path)
    if kept is None:
        ids = tokenizer(sample.text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
        kept = np.asarray(ids, dtype=np.int32)
        _write(path, kept)
    return torch.from_numpy(kept.astype(np.int64))


def _all_windows(tokenizer: Any, sample: TextSample, window: int, needs_bos: bool) -> Tensor:
    ids = token_ids(tokenizer, sample, special=not needs_bos)
    body = window - 1 if needs_bos else window
    if body < 1 or len(ids) < body:
        why = f"It has {len(ids):,} tokens; one window needs {body:,}."
        raise InputError(f"The {sample.part} part of {sample.id} is too short.", why, "Choose a longer text or shorter windows.")
    windows = ids[: len(ids) // body * body].view(-1, body)
    return _with_bos(tokenizer, windows) if needs_bos else windows


def _with_bos(tokenizer: Any, windows: Tensor) -> Tensor:
    if tokenizer.bos_token_id is None:
        raise InputError("This model needs a BOS token and its tokenizer has none.", "", "Check its tokenizer files.")
    return torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id), windows], dim=1)


def _read(path: Path) -> np.ndarray | None:
    """The kept ids; None where there are none or the file was damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _write(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.npy")
    np.save(partial, ids)
    partial.replace(path)
