"""Finished layers on disk: one safetensors file a layer, written whole or not at all. Knows files; runs no method.

A file's tensors are the stored, canonical ones, so their bytes are what `engine.accounting` says. One metadata entry,
`bitpress`, holds JSON with sorted keys {v, layer, layout, shape, method, error, made_from, sha256}; nothing in a file depends on
when or how often it was written. A layer made from another model, recipe or calibration text is refused, never reused.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitpress.engine.errors import BitpressError
from bitpress.kernels.formats import PackedTensor
from bitpress.kernels.layout import DenseLayout, Layout, layout_from_dict, layout_to_dict

LAYER_VERSION = 1
DENSE = "weight"  # the one tensor of a layer that is stored dense
BIAS = "bias"


@dataclass(frozen=True)
class StoredLayer:
    """One finished matrix: packed codes, or dense weights [N, K]; the methods that made it and its relative weight error."""

    layer: str
    content: PackedTensor | Tensor
    method: str
    error: float
    bias_N: Tensor | None = None  # in place of the layer's own

    @property
    def nbytes(self) -> int:
        """Stored bytes of the matrix, and of a bias that belongs to it."""
        return self.content.nbytes + (0 if self.bias_N is None else self.bias_N.nbytes)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file."""
        held = self.content.tensors if isinstance(self.content, PackedTensor) else {DENSE: self.content}
        return held if self.bias_N is None else {**held, BIAS: self.bias_N}

    @property
    def layout(self) -> Layout:
        """How it is stored."""
        return self.content.layout if isinstance(self.content, PackedTensor) else DenseLayout(self.content.element_size())


@dataclass(frozen=True)
class MadeFrom:
    """What a run's layers depend on, as hashes: weights of the dense model, recipe, calibration tokens.

    calibration: empty when no method looked at text; None, for a reader that has no text at hand, is not compared.
    """

    model: str
    recipe: str
    calibration: str | None = ""

    def first_change(self, record: dict[str, str]) -> str | None:
        """The first field in which a finished layer's record differs."""
        return next((name for name, value in asdict(self).items() if value is not None and record.get(name) != value), None)


class LayerStore:
    """The folder `layers/` of one run."""

    def __init__(self, run_folder: Path) -> None:
        """run_folder: the run's; `layers/` is made in it when the first layer is saved."""
        self.folder = Path(run_folder) / "layers"

    def path(self, layer: str) -> Path:
        """The file of a layer."""
        return self.folder / f"{layer}.safetensors"

    def names(self) -> list[str]:
        """The layers that are here, sorted."""
        return sorted(path.name.removesuffix(".safetensors") for path in self.folder.glob("*.safetensors"))

    def save(self, stored: StoredLayer, made_from: MadeFrom) -> None:
        """Write a layer: temporary file, flushed to the disk, renamed. Raises BitpressError with bytes needed and free when the disk is full."""
        write_tensors(self.path(stored.layer), stored.tensors, _metadata(stored, made_from))

    def load(self, layer: str, made_from: MadeFrom) -> StoredLayer | None:
        """A finished layer; None when there is none yet. Raises BitpressError when the file is damaged or made from something else."""
        path = self.path(layer)
        if not path.exists():
            return None
        record, tensors = read_tensors(path)
        if changed := made_from.first_change(record["made_from"]):
            raise mismatch(layer, changed)
        layout, shape, bias_N = layout_from_dict(record["layout"]), tuple(record["shape"]), tensors.pop(BIAS, None)
        content = tensors[DENSE] if isinstance(layout, DenseLayout) else PackedTensor(layout, shape, tensors)
        return StoredLayer(layer, content, record["method"], record["error"], bias_N)

    def check(self, layers: Iterable[str]) -> None:
        """Raises BitpressError when a file here is of a layer that the recipe does not change: the run was of another recipe."""
        if strangers := sorted(set(self.names()) - set(layers)):
            raise mismatch(strangers[0], "recipe")


class ShapeStore:
    """The file `shape.safetensors` of one run: what its stages chose to remove, and the weights that they repaired."""

    def __init__(self, run_folder: Path) -> None:
        self.path = Path(run_folder) / "shape.safetensors"

    def save(self, chosen: dict[str, Any], tensors: dict[str, Tensor], made_from: MadeFrom) -> None:
        """Write it: whole or not at all. chosen: plain values. Raises BitpressError as `LayerStore.save`."""
        record = {"v": LAYER_VERSION, "chosen": chosen, "made_from": asdict(made_from), "sha256": digest_of_tensors(tensors)}
        write_tensors(self.path, tensors, json.dumps(record, sort_keys=True))

    def load(self, made_from: MadeFrom) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """(what was chosen, repaired weights by name); None when nothing was chosen yet. Raises BitpressError as `LayerStore.load`."""
        if not self.path.exists():
            return None
        record, tensors = read_tensors(self.path)
        if changed := made_from.first_change(record["made_from"]):
            raise mismatch("shape", changed)
        return record["chosen"], tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: str) -> None:
    """Write a file of tensors whole or not at all. Raises BitpressError with bytes needed and free when the disk is full."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"bitpress": metadata})
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(partial, data)
        partial.replace(path)
    except OSError as error:
        _remove(partial)
        raise _cannot_write(path, len(data), error) from error


def _metadata(stored: StoredLayer, made_from: MadeFrom) -> str:
    record = {
        "v": LAYER_VERSION,
        "layer": stored.layer,
        "layout": layout_to_dict(stored.layout),
        "shape": list(stored.content.shape),
        "method": stored.method,
        "error": stored.error,
        "made_from": asdict(made_from),
        "sha256": digest_of_tensors(stored.tensors),
    }
    return json.dumps(record, sort_keys=True)


def digest_of_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path, digest: Callable[[dict[str, Tensor]], str] = digest_of_tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(record, tensors) of a file that `write_tensors` wrote. Raises BitpressError when it is damaged or of another version.

    digest: what the record's `sha256` was made by.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["bitpress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict: iterating over it fails
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]) from error
    if record.get("v") != LAYER_VERSION:
        raise _damaged(path, f"Its version is {record.get('v')}; this Bitpress reads {LAYER_VERSION}.")
    if record["sha256"] != digest(tensors):
        raise _damaged(path, "Its bytes are not those that were written.")
    return record, tensors


def write_durably(path: Path, data: bytes) -> None:
    """Write and flush to the disk itself. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # what cannot be removed is overwritten by the next try
        return


def _cannot_write(path: Path, needed: int, error: OSError) -> BitpressError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        remedy = f"Check that {path.parent} can be written to, then resume the run."
        return BitpressError(f"{path.name} cannot be written.", f"{error.strerror or error}.", remedy)
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    why = f"{path.name} needs {needed:,} bytes; {free:,} are free."
    return BitpressError("The disk is full.", why, "Free some space, then resume the run; the layers finished so far are kept.")


def mismatch(layer: str, changed: str) -> BitpressError:
    """The refusal of a finished file that was made from something else than what is at hand."""
    why = f"The {changed} is not the one it was made from."
    return BitpressError(f"The finished layer {layer} cannot be reused.", why, f"Start a new run, or put the old {changed} back and resume.")


def _damaged(path: Path, why: str) -> BitpressError:
    return BitpressError(f"The finished layer {path.name} is damaged.", why, "Delete that file and resume the run; only this layer is made again.")
