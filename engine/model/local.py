"""Judge files a person brings, without running or loading them: where they lie, what they are, what they hold.

Knows the configured roots, the formats that can carry code, safetensors headers, config.json and GGUF metadata. Refuses
to import torch or transformers: it is safe for the process that draws the screens.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bitpress.engine.errors import InputError
from bitpress.engine.home import home

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
HEADER_LIMIT = 100_000_000
TO_SAFETENSORS = (
    "Convert it where you trust it: load it with transformers and call "
    "model.save_pretrained(FOLDER, safe_serialization=True), then add FOLDER."
)


class Facts(BaseModel):
    """What a model's files say about it. `bytes` is what the weights take as stored; `blocks` 0 when config hides it."""

    params: int
    blocks: int
    bytes: int
    context: int | None = None


def allowed_roots() -> list[Path]:
    """Folders that paths may lie in: `BITPRESS_ROOTS` (colon-separated), else the home folder; and Bitpress's own uploads."""
    chosen = [part for part in os.environ.get("BITPRESS_ROOTS", "").split(":") if part]
    roots = [Path(part).expanduser() for part in chosen] or [Path.home()]
    return [root.resolve() for root in (*roots, home() / "uploads")]


def confined(path: str | Path) -> Path:
    """The real path behind `path`, symlinks followed. Raises InputError when it is missing or outside every root."""
    real = Path(path).expanduser().resolve()
    roots = allowed_roots()
    if not any(real.is_relative_to(root) for root in roots):
        allowed = ", ".join(map(str, roots))
        remedy = "Move it there, or have whoever starts the server add its folder to BITPRESS_ROOTS."
        raise InputError(what=f"{path} may not be read.", why=f"it really lies at {real}, outside {allowed}.", remedy=remedy)
    if not real.exists():
        raise InputError(what=f"{path} is not there.", why="no file or folder has that name.", remedy="Check the path.")
    return real


def refuse_pickle(path: Path) -> None:
    """Raise InputError for formats that run code when they are opened."""
    if path.suffix.lower() in PICKLES:
        why = f"{path.suffix} files are Python pickles: opening one runs whatever code is inside."
        raise InputError(what=f"{path.name} is refused.", why=why, remedy=TO_SAFETENSORS)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(what=f"{path.name} cannot be read.", why=f"{error}.", remedy="Export the model again.") from error
    if not isinstance(value, dict):
        raise InputError(what=f"{path.name} cannot be used.", why="it is no JSON object.", remedy="Export the model again.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files. Raises InputError, saying how to convert, when it has none."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickles = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICKLES]
        for path in pickles:
            refuse_pickle(path)
        remedy = "Choose the folder that holds config.json and *.safetensors, or a .gguf file."
        raise InputError(what=f"{folder.name} holds no model.", why="there is no .safetensors file in it.", remedy=remedy)
    return found


def refuse_remote_code(folder: Path) -> None:
    """Raise InputError when config or tokenizer asks for Python code of its own to be run."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and read_json(folder / name).get("auto_map"):
            why = f"its {name} has an auto_map: loading it would run Python code that came with it."
            remedy = "Use a model whose architecture transformers knows, or export it without auto_map."
            raise InputError(what=f"{folder.name} is refused.", why=why, remedy=remedy)


def check_folder(folder: Path) -> Facts:
    """Judge a Hugging Face folder by its files alone. Raises InputError when it cannot or must not be loaded."""
    if not (folder / "config.json").is_file():
        remedy = "Choose the folder that holds config.json beside the weights."
        raise InputError(what=f"{folder.name} holds no model.", why="there is no config.json in it.", remedy=remedy)
    files = weight_files(folder)
    refuse_remote_code(folder)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        why, remedy = f"it has none of {', '.join(TOKENIZERS)}.", "Save the tokenizer into the same folder."
        raise InputError(what=f"{folder.name} has no tokenizer.", why=why, remedy=remedy)
    return _folder_facts(read_json(folder / "config.json"), files)


def _folder_facts(config: dict[str, Any], files: list[Path]) -> Facts:
    sizes = [tensor_sizes(path) for path in files]
    text = config.get("text_config") or config
    blocks = text.get("num_hidden_layers") or text.get("n_layer") or text.get("num_layers") or 0
    context = text.get("max_position_embeddings") or text.get("n_positions") or text.get("max_seq_len")
    return Facts(params=sum(p for p, _ in sizes), bytes=sum(b for _, b in sizes), blocks=int(blocks), context=context)


def tensor_sizes(path: Path) -> tuple[int, int]:
    """(parameters, bytes) of a safetensors file, from its header alone. Raises InputError when it is damaged."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(HEADER_LIMIT, path.stat().st_size):
                raise ValueError(f"its header claims {length:,} bytes")
            header = json.loads(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        params, end = sum(math.prod(t["shape"]) for t in tensors), max((t["data_offsets"][1] for t in tensors), default=0)
        if 8 + length + end != path.stat().st_size:
            raise ValueError(f"its tensors end at byte {8 + length + end:,} and the file at {path.stat().st_size:,}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        remedy = "Copy or download the file again."
        raise InputError(what=f"{path.name} is damaged.", why=f"{error}.", remedy=remedy) from error
    return params, end


def check_gguf(path: Path) -> Facts:
    """Judge a GGUF file by its header. `bytes` is its bf16 size, which is what it will take once converted."""
    from bitpress.engine.model.gguf_file import architecture_of, open_gguf

    reader = open_gguf(path)
    prefix = architecture_of(reader)
    numbers = {key: reader.fields.get(f"{prefix}.{key}") for key in ("block_count", "context_length")}
    blocks, context = (int(field.contents()) if field else 0 for field in numbers.values())
    params = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return Facts(params=params, blocks=blocks, bytes=2 * params, context=context or None)


def check(path: str | Path) -> tuple[Path, Facts]:
    """The real path of a folder, safetensors file or GGUF file, and its facts.

    A safetensors file stands for its folder. Every file that would be read must lie in a configured root. Raises
    InputError for anything missing, outside, damaged, pickled, or in need of its own code.
    """
    real = confined(path)
    refuse_pickle(real)
    if real.suffix.lower() == ".gguf":
        return real, check_gguf(real)
    folder = confined(Path(path).expanduser().parent) if real.suffix == ".safetensors" else real
    if not folder.is_dir():
        remedy = "Choose a folder with config.json and *.safetensors, or a .gguf file."
        raise InputError(what=f"{real.name} is no model.", why=f"{real.suffix or 'such'} files are not read.", remedy=remedy)
    for file in folder.iterdir():
        if file.suffix in (".safetensors", ".json", ".model", ".jinja"):
            confined(file)
    return folder, check_folder(folder)
