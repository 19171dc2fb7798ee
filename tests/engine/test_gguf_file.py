"""A file for llama.cpp holds the model's weights under its names and in its order of channels."""

from pathlib import Path

import gguf
import pytest
import torch

from bitpress.engine.errors import InputError
from bitpress.engine.gguf_file import write_gguf
from bitpress.engine.model.load import Loaded


@pytest.fixture
def written(in_memory, tmp_path: Path) -> tuple[Loaded, dict[str, torch.Tensor]]:
    loaded = in_memory("llama")
    write_gguf(loaded, tmp_path / "model.gguf")
    read = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    return loaded, {each.name: torch.tensor(gguf.quants.dequantize(each.data, each.tensor_type)).reshape(each.shape[::-1].tolist()) for each in read}


def test_every_weight_is_there_within_its_rounding(written: tuple[Loaded, dict[str, torch.Tensor]]) -> None:
    loaded, tensors = written
    state = loaded.model.state_dict()
    assert len(tensors) == len(state) - ("lm_head.weight" in state and loaded.model.config.tie_word_embeddings)
    down, embedding = state["model.layers.0.mlp.down_proj.weight"], state["model.embed_tokens.weight"]
    for name, weight, bits in (("blk.0.ffn_down.weight", down, 4), ("token_embd.weight", embedding, 8)):
        error = (tensors[name] - weight.float()).abs().amax() / weight.float().abs().amax()
        assert 0 < error < 1.01 / 2 ** (bits - 1), name
    assert torch.equal(tensors["output_norm.weight"], state["model.norm.weight"].float())


def test_rotary_halves_are_interleaved_head_by_head(written: tuple[Loaded, dict[str, torch.Tensor]]) -> None:
    loaded, tensors = written
    weight, heads = loaded.model.state_dict()["model.layers.0.self_attn.q_proj.weight"].float(), loaded.model.config.num_attention_heads
    size = len(weight) // heads
    found = tensors["blk.0.attn_q.weight"].view(heads, size, -1)
    for head in range(heads):
        for channel in range(size):
            ours = weight[head * size + channel // 2 + (channel % 2) * size // 2]
            assert (found[head, channel] - ours).norm() < 0.2 * ours.norm()


def test_another_family_is_refused(in_memory, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written as a GGUF"):
        write_gguf(in_memory("opt"), tmp_path / "model.gguf")
