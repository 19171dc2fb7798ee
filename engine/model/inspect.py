"""Name the parts of a loaded model: blocks, linears by role, embedding, head. Knows torch modules; changes nothing.

Families: Llama, Mistral, Qwen2/3, Gemma, GPT-2 (Conv1D), OPT, GPT-NeoX/Pythia, Phi, BERT, DistilBERT. Any other model falls back to what
can be seen: its longest list of blocks, and role "other" for linears whose name says nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import ROLES, Anatomy, Part
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.model.weight_stats import matrix_stats

if TYPE_CHECKING:
    from bitpress.engine.model.load import Loaded

LINEARS = (nn.Linear, Conv1D)
DEFAULT_CONTEXT = 2048  # for a model whose config names no limit

ROLE_OF_LEAF = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "qkv_proj": "qkv", "c_attn": "qkv", "query_key_value": "qkv", "o_proj": "o", "out_proj": "o",
    "query": "q", "key": "k", "value": "v", "q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "o", "lin1": "fc1", "lin2": "fc2",
    "gate_proj": "gate", "up_proj": "up", "gate_up_proj": "gate_up", "down_proj": "down",
    "fc1": "fc1", "fc2": "fc2", "c_fc": "fc1", "dense_h_to_4h": "fc1", "dense_4h_to_h": "fc2", "fc_in": "fc1", "fc_out": "fc2",
}  # fmt: skip
# Names that mean one thing in attention and another in the MLP: GPT-2's c_proj, the dense of GPT-NeoX and Phi.
OUTPUTS = ("c_proj", "dense")
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def anatomy_of(model: nn.Module, model_id: str) -> Anatomy:
    """The parts of a causal language model. Raises InputError when it has no list of blocks with linears, or no embedding."""
    prefix, blocks = block_list(model)
    config = _text_config(model)
    embedding, head = _ends(model, prefix)
    linears = tuple(_linears(blocks, prefix))
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    head_dim = _head_dim(config, heads, embedding)
    params = list(model.parameters())
    return Anatomy(
        model=model_id,
        architecture=(getattr(config, "architectures", None) or [type(model).__name__])[0],
        fingerprint=fingerprint(model),
        blocks=len(blocks),
        hidden=linears[0].in_features,
        ffn=_ffn(linears),
        heads=heads,
        kv_heads=_kv_heads(config, linears, heads, head_dim),
        head_dim=head_dim,
        vocab=embedding.out_features,
        context=int(getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT),
        tied=head is None,
        params=sum(weight.numel() for weight in params),
        bytes=sum(weight.nbytes for weight in params),
        itemsize=params[0].element_size(),
        block_rest_params=sum(weight.numel() for weight in blocks[0].parameters()) - sum(part.numel for part in linears if part.block == 0),
        block_prefix=prefix,
        linears=linears,
        embedding=embedding,
        head=head,
    )


def write_inspection(loaded: Loaded, folder: Path, on_layer: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write `anatomy.json`, `stats/<layer>.json` for every block linear and `stats/index.json` into `folder`, for readers without torch.

    `weight_stats.py` documents a layer's record. The index is {"v": 1, "model", "fingerprint", "layers": {name: the record without its
    curves}} and is written last: where it is, all of `stats` is. `on_layer(done, total)` is called after each layer.
    """
    stats = folder / "stats"
    stats.mkdir(parents=True, exist_ok=True)
    (stats / "index.json").unlink(missing_ok=True)
    parts = loaded.anatomy.linears
    layers = {}
    for done, record in enumerate(_records(loaded.model, parts), start=1):
        (stats / f"{record['layer']}.json").write_text(json.dumps(record))
        layers[record["layer"]] = {key: value for key, value in record.items() if key not in ("v", "layer", "histogram", "spectrum")}
        on_layer(done, len(parts))
    index = {"v": 1, "model": loaded.anatomy.model, "fingerprint": loaded.anatomy.fingerprint, "layers": layers}
    (stats / "index.json").write_text(json.dumps(index))
    loaded.anatomy.save(folder / "anatomy.json")


def _records(model: nn.Module, parts: tuple[Part, ...]) -> Iterator[dict[str, Any]]:
    """Every layer's record, in order. One thread a layer, not all threads on one: the matrices are small, and threads that
    wait for each other at every operation come to a crawl on a machine that is busy with something else."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(lambda part: _layer_record(model, part), parts)
    finally:
        torch.set_num_threads(threads)


def _layer_record(model: nn.Module, part: Part) -> dict[str, Any]:
    weight_NK = linear_weight(get(model, part.name)).float()
    place = {"v": 1, "layer": part.name, "role": part.role, "block": part.block, "shape": list(weight_NK.shape)}
    return {**place, **matrix_stats(weight_NK.cpu())}


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, modules) of the transformer blocks: the longest outermost ModuleList that holds linears. Raises InputError when there is none."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inside_another and any(isinstance(inner, LINEARS) for inner in module.modules()):
            found.append((name, module))
    if not found:
        raise InputError("This model has no blocks that can be told apart.", "It holds no list of modules with linears.", "Choose a transformer.")
    return max(found, key=lambda item: len(item[1]))


def fingerprint(model: nn.Module) -> str:
    """sha256 over name, shape, type and bytes of every weight, sorted by name; a tied weight counts once."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        raw = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear; GPT-2's Conv1D stores the transpose."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _part(name: str, module: nn.Module, role: str, block: int | None = None) -> Part:
    outputs, inputs = matrix_shape(module)
    bias = getattr(module, "bias", None) is not None
    return Part(name=name, role=role, block=block, out_features=outputs, in_features=inputs, bias=bias, fused=FUSED.get(role, ()))


def _linears(blocks: nn.ModuleList, prefix: str) -> Iterator[Part]:
    """Block by block, in the order of ROLES, which is the order in which they run."""
    for index, block in enumerate(blocks):
        parts = [_part(f"{prefix}.{index}.{name}", inner, role_of(name), index) for name, inner in block.named_modules() if isinstance(inner, LINEARS)]
        yield from sorted(parts, key=lambda part: ROLES.index(part.role))


def role_of(name: str) -> str:
    """The role of a linear by its name inside its block, "other" when the name says nothing."""
    path = name.split(".")
    if path[-2:] == ["intermediate", "dense"]:
        return "fc1"
    if path[-1] in OUTPUTS:
        return "o" if any("attn" in step or "attention" in step for step in path[:-1]) else "fc2"
    return ROLE_OF_LEAF.get(path[-1], "other")


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _ends(model: nn.Module, prefix: str) -> tuple[Part, Part | None]:
    """Embedding, and head unless it is the embedding's own matrix."""
    outside = {name: module for name, module in model.named_modules() if not name.startswith(prefix + ".")}
    embeddings = {name: module for name, module in outside.items() if isinstance(module, nn.Embedding)}
    if not embeddings:
        raise InputError("This model has no token embedding.", "", "Choose a language model.")
    name = _token_embedding(model, embeddings)
    embedding = embeddings[name]
    vocab, width = embedding.weight.shape
    part = Part(name=name, role="embedding", out_features=vocab, in_features=width)
    heads = [item for item in outside.items() if isinstance(item[1], nn.Linear) and item[1].out_features == vocab]
    if not heads or heads[-1][1].weight is embedding.weight:
        return part, None
    return part, _part(heads[-1][0], heads[-1][1], "head")


def _token_embedding(model: nn.Module, embeddings: dict[str, nn.Embedding]) -> str:
    """The one the model itself names, else the one with the most rows: positions are mostly fewer than tokens."""
    own = getattr(model, "get_input_embeddings", lambda: None)()
    named = [name for name, module in embeddings.items() if module is own]
    return named[0] if named else max(embeddings, key=lambda name: embeddings[name].num_embeddings)


def _head_dim(config: Any, heads: int, embedding: Part) -> int:
    """0 where the config names no heads: what is not known is not made up."""
    if not heads:
        return 0
    return int(getattr(config, "head_dim", None) or getattr(config, "hidden_size", embedding.in_features) // heads)


def _kv_heads(config: Any, linears: tuple[Part, ...], heads: int, head_dim: int) -> int:
    key = next((part for part in linears if part.role == "k"), None)
    if key is not None and head_dim:
        return key.out_features // head_dim
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _ffn(linears: tuple[Part, ...]) -> int:
    """Neurons of one MLP: the inputs of its last matrix, or the widest input where no role tells which that is."""
    last = next((part for part in linears if part.role in ("down", "fc2")), None)
    return last.in_features if last else max(part.in_features for part in linears if part.block == 0)
