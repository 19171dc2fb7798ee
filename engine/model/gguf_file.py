"""Turn any GGUF file that transformers can read into an ordinary Hugging Face folder of bf16 weights.

Knows how to tell a damaged file from an unsupported one before any weight is touched, and which traces of the old
quantisation must go so that the folder loads like any other. Refuses to know where the file came from. The weights come
out dense, but carry the rounding of the file's own format for ever: `formats_of` names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.model.folders import ShouldStop, check_stop, never

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"
AGAIN = "Fetch or export the file again and compare its checksum with the publisher's."


def _damaged(path: Path, why: str) -> InputError:
    return InputError(what=f"{path.name} is not a complete GGUF file.", why=why, remedy=AGAIN)


def open_gguf(path: Path) -> GGUFReader:
    """The file's header and tensor directory, torch-free, checked against its length.

    Raises InputError when the file is no GGUF, is cut short, or its directory makes no sense.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != MAGIC:
        raise _damaged(path, f"it begins with {magic!r}, a GGUF file with {MAGIC!r}.")
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader trusts what it reads: a damaged header can fail anywhere
        raise _damaged(path, f"its header or a tensor's data breaks off ({type(error).__name__}: {error}).") from error
    _check_extent(path, reader)
    return reader


def _check_extent(path: Path, reader: GGUFReader) -> None:
    end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    if not reader.tensors or "general.architecture" not in reader.fields:
        raise _damaged(path, "it names no tensors or no architecture.")
    if end > path.stat().st_size:
        raise _damaged(path, f"its tensors end at byte {end:,} and the file at {path.stat().st_size:,}.")


def architecture_of(reader: GGUFReader) -> str:
    """The file's `general.architecture`, such as `llama`."""
    return str(reader.fields["general.architecture"].contents())


def formats_of(reader: GGUFReader) -> dict[str, int]:
    """How many tensors the file holds in each storage format, most first, such as {"Q4_1": 210, "F32": 61}."""
    return dict(Counter(tensor.tensor_type.name for tensor in reader.tensors).most_common())


def convert(source: Path, folder: Path, should_stop: ShouldStop = never) -> None:
    """Write `folder` (which must exist) as a Hugging Face model from the GGUF file `source`: bf16 safetensors, config,
    tokenizer with its chat template, generation config.

    Raises InputError when the file is damaged, BitpressError when transformers does not know its architecture or it
    lacks a tokenizer, Cancelled between the two long steps when told to stop.
    """
    reader = open_gguf(source)
    architecture, formats = architecture_of(reader), formats_of(reader)
    check_stop(should_stop, f"Converting {source.name}")
    try:
        with _read_once(reader):
            _save_tokenizer(source, folder)
            check_stop(should_stop, f"Converting {source.name}")
            _save_model(source, folder)
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise _unsupported(source, architecture, formats, error) from error


@contextmanager
def _read_once(reader: GGUFReader) -> Iterator[None]:
    """Lend transformers our reader and one name map: it would parse the file three times more, and build the map once a
    module, which is most of the minute that a large vocabulary takes. A transformers that asks otherwise is only slower.
    """
    import gguf

    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (lambda *_args, **_options: reader), cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = kept


def _save_tokenizer(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(folder)


def _save_model(source: Path, folder: Path) -> None:
    """Dequantise in float32, store in bf16, and forget that the weights were ever quantised: transformers would
    otherwise refuse to save them, or write a config that asks for a quantiser on loading."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)


def _unsupported(source: Path, architecture: str, formats: dict[str, int], error: Exception) -> BitpressError:
    stored = ", ".join(f"{name} x {count}" for name, count in formats.items())
    why = f"transformers cannot read architecture {architecture!r} stored as {stored} ({type(error).__name__}: {error})."
    remedy = "Use a GGUF of a Llama-like model with its tokenizer inside, or the model's safetensors folder."
    return BitpressError(what=f"{source.name} cannot be converted.", why=why[:600], remedy=remedy)
