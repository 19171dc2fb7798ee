"""Writes a dense model as a GGUF file of 4-bit weights, so that llama.cpp can be timed on the same weights. Knows Llama's layout only.

Linears become Q4_0 and the embedding, which is the head too where they are tied, Q8_0. The file has no vocabulary: token ids go in
and come out. Its rotary channels are interleaved, a query's or key's two halves row by row, as llama.cpp expects them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bitpress.engine.errors import InputError
from bitpress.engine.model.load import Loaded

NAMES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_gguf(loaded: Loaded, path: Path) -> None:
    """Write the model's weights. Raises InputError for a model that is not built as Llama is."""
    import gguf

    config: Any = loaded.model.config
    if config.model_type != "llama":
        why = f"It is built as {config.model_type}, and this writer knows llama only."
        raise InputError(f"{loaded.model_id} cannot be written as a GGUF file.", why, "Name a GGUF file of the same weights (--rival-file).")
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, config)
    q4, q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
    for name, weight in tensors_of(loaded).items():
        kind = q8 if name in ("token_embd.weight", "output.weight") else q4
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def tensors_of(loaded: Loaded) -> dict[str, np.ndarray]:
    """Weights by the names of the file, float32."""
    config: Any = loaded.model.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    state, found = loaded.model.state_dict(), {}
    for part in loaded.anatomy.linears:
        weight = state[f"{part.name}.weight"]
        found[f"blk.{part.block}.{NAMES[part.role]}.weight"] = _real(_interleaved(weight, heads[part.role]) if part.role in heads else weight)
    for name, value in state.items():
        *_, block, norm, _ = ("", "", *name.split("."))
        if norm in NORMS:
            found[f"blk.{block}.{NORMS[norm]}.weight"] = _real(value)
    ends = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"} | ({} if config.tie_word_embeddings else {"output": "lm_head"})
    return found | {f"{name}.weight": _real(state[f"{ours}.weight"]) for name, ours in ends.items()}


def _interleaved(weight_NK: Tensor, heads: int) -> Tensor:
    return weight_NK.view(heads, 2, -1, weight_NK.shape[1]).transpose(1, 2).reshape(weight_NK.shape)


def _real(values: Tensor) -> np.ndarray:
    return values.float().contiguous().numpy()
