"""Turn a llama2.c checkpoint (the `stories` family) into an ordinary Hugging Face Llama folder.

Knows the checkpoint's layout (seven int32, then float32 tensors in a fixed order), the tokenizer file's layout, and
that llama2.c keeps rotary pairs interleaved where transformers keeps them half-split. Refuses to know where the bytes
came from: fetching and checksums are `packages`, installing is `install`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitpress.engine.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HEADER = struct.Struct("<7i")
PIECE = struct.Struct("<fi")
BOS, EOS = 1, 2
FIRST_BYTE = 3
REMEDY = "Fetch the file again; if it is your own, export it with llama2.c's version 0 format."


@dataclass(frozen=True)
class LlamaShape:
    """The seven numbers of the header, in its order. `vocab` is always positive; `tied` says whether the head is
    the embedding (llama2.c writes a negative vocabulary when it is not)."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def _bad(why: str) -> InputError:
    return InputError(what="This is not a readable llama2.c checkpoint.", why=why, remedy=REMEDY)


def read_shape(data: bytes) -> LlamaShape:
    """The header of a checkpoint. Raises InputError when it is cut short or names an impossible shape."""
    if len(data) < HEADER.size:
        raise _bad(f"it has {len(data)} bytes and the header alone takes {HEADER.size}.")
    dim, hidden, layers, heads, kv_heads, vocab, context = HEADER.unpack_from(data)
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), context)
    if min(sizes) < 1 or max(sizes) > 1 << 20 or dim % heads or heads % kv_heads or (dim // heads) % 2:
        raise _bad(f"its header {sizes} is not the shape of any Llama model.")
    return LlamaShape(dim, hidden, layers, heads, kv_heads, abs(vocab), context, vocab > 0)


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's output rows from pairs (0,1),(2,3).. to pairs (0,h/2),(1,h/2+1)..; shape [out, in] kept."""
    out, width = rows.shape
    paired = rows.reshape(heads, out // heads // 2, 2, width)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(out, width)


def _stacks(shape: LlamaShape) -> list[tuple[str, tuple[int, ...]]]:
    """(suffix of the transformers name, shape) of each per-layer stack, in the order of the file."""
    d, h, kv = shape.dim, shape.hidden, shape.kv_heads * shape.head_dim
    return [
        ("input_layernorm", (d,)),
        ("self_attn.q_proj", (d, d)),
        ("self_attn.k_proj", (kv, d)),
        ("self_attn.v_proj", (kv, d)),
        ("self_attn.o_proj", (d, d)),
        ("post_attention_layernorm", (d,)),
        ("mlp.gate_proj", (h, d)),
        ("mlp.down_proj", (d, h)),
        ("mlp.up_proj", (h, d)),
    ]


class _Floats:
    """Walks the float32 part of a checkpoint."""

    def __init__(self, data: bytes) -> None:
        usable = (len(data) - HEADER.size) // 4
        self.values = np.frombuffer(data, dtype="<f4", offset=HEADER.size, count=usable)
        self.at = 0

    def take(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        if self.at + count > self.values.size:
            raise _bad(f"it ends after {self.values.size:,} numbers; its header promises at least {self.at + count:,}.")
        self.at += count
        return self.values[self.at - count : self.at].reshape(shape)


def read_checkpoint(data: bytes) -> tuple[LlamaShape, dict[str, np.ndarray]]:
    """The shape and the float32 weights of a checkpoint, under transformers' names and in its rotary layout.

    Linear weights are [out features, in features]. `lm_head.weight` is present only where the head is not tied.
    Raises InputError when the data is cut short or has bytes nothing accounts for.
    """
    shape = read_shape(data)
    floats = _Floats(data)
    tensors = {"model.embed_tokens.weight": floats.take(shape.vocab, shape.dim)}
    for suffix, size in _stacks(shape):
        for layer, weight in enumerate(floats.take(shape.layers, *size)):
            heads = {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.kv_heads}.get(suffix)
            tensors[f"model.layers.{layer}.{suffix}.weight"] = _half_split(weight, heads) if heads else weight
    tensors["model.norm.weight"] = floats.take(shape.dim)
    floats.take(2, shape.context, shape.head_dim // 2)  # rotary tables: transformers computes its own
    if not shape.tied:
        tensors["lm_head.weight"] = floats.take(shape.vocab, shape.dim)
    if floats.at * 4 + HEADER.size != len(data):
        raise _bad(f"{len(data) - HEADER.size - floats.at * 4:,} bytes follow the last weight.")
    return shape, tensors


def checkpoint_bytes(data: bytes) -> int:
    """How many leading bytes of `data` the checkpoint takes, from its header alone (a package may append others)."""
    shape = read_shape(data)
    per_layer = sum(int(np.prod(size)) for _, size in _stacks(shape))
    tables = shape.context * shape.head_dim
    matrices = shape.vocab * shape.dim * (1 if shape.tied else 2)
    return HEADER.size + 4 * (matrices + shape.layers * per_layer + shape.dim + tables)


def read_pieces(data: bytes, vocab: int) -> list[tuple[str, float]]:
    """The (piece, score) pairs of a llama2.c tokenizer file, spaces written the SentencePiece way.

    Raises InputError when the file holds fewer than `vocab` pieces or one that is not UTF-8.
    """
    pieces, at = [], 4  # the first int32 is the longest piece's length, of no use here
    for index in range(vocab):
        if at + PIECE.size > len(data):
            raise _bad(f"its tokenizer ends after {index:,} of {vocab:,} pieces.")
        score, length = PIECE.unpack_from(data, at)
        at += PIECE.size + length
        raw = data[at - length : at]
        if length < 0 or len(raw) != length:
            raise _bad(f"piece {index:,} of its tokenizer is cut short.")
        pieces.append((_piece_name(index, raw.decode("utf-8", errors="replace")), score))
    return pieces


def _piece_name(index: int, text: str) -> str:
    """SentencePiece's name of a piece: the file wraps <s> and </s> in new lines and may hold bytes as characters."""
    byte = index - FIRST_BYTE
    if 0 <= byte < 256 and text == chr(byte):
        return f"<0x{byte:02X}>"
    return ("<unk>", "<s>", "</s>")[index] if index < FIRST_BYTE else text.replace(" ", "▁")


def _merges(pieces: list[tuple[str, float]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way of joining two pieces into a third, best score of the third first: SentencePiece's own order."""
    ranked = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-score, left, right, piece[:cut], piece[cut:]))
    return [(left, right) for *_, left, right in sorted(ranked)]


def build_tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """A SentencePiece-style BPE with byte fallback that puts BOS in front of every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise _bad("its tokenizer names the same piece twice.")
    model = models.BPE(vocab, _merges(pieces, vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer


def llama_config(shape: LlamaShape, dtype: str = "float32") -> dict[str, object]:
    """The config.json of a Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": dtype,
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """tokenizer.json and the small tokenizer_config.json that makes AutoTokenizer take it as it is."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(source: Path, folder: Path) -> None:
    """Write `folder` (which must exist) as a Hugging Face Llama from `source`: a checkpoint with its tokenizer appended.

    Weights stay float32. A story ends where the next would begin, so generation stops at BOS as well as at EOS.
    Raises InputError when either part is cut short or makes no sense.
    """
    from safetensors.numpy import save_file

    data = source.read_bytes()
    cut = checkpoint_bytes(data)
    shape, tensors = read_checkpoint(data[:cut])
    tokenizer = build_tokenizer(read_pieces(data[cut:], shape.vocab))
    save_file({name: np.ascontiguousarray(w) for name, w in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", llama_config(shape))
    write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": [BOS, EOS]})
    write_tokenizer(tokenizer, folder, shape.context)
