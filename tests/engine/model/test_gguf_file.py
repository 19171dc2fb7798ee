"""GGUF files become ordinary folders; damaged and foreign ones are refused before any weight is touched."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.model import gguf_file

HEADS, KV_HEADS = 4, 2
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight", "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight", "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight", "mlp.down_proj.weight": "ffn_down.weight",
}  # fmt: skip


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return NAMES[name]
    block, suffix = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{block}.{NAMES[suffix]}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps a Llama's rotary pairs side by side: rows (0, h/2), (1, h/2 + 1), ... of each head."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(path: Path, model: Any, tokenizer: Any, form: gguf.GGMLQuantizationType, architecture: str = "llama") -> None:
    """A Llama of the tests as a GGUF file, matrices in `form`, norms in F32."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    inner = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<bos>", "<eos>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in inner["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.float().numpy()
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        weight = interleaved(weight, heads) if heads else weight
        kind = form if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(tiny_models: Any) -> Any:
    return tiny_models("llama")


@pytest.fixture
def source(tmp_path: Path, llama: Any, tiny_tokenizer: Any) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, tiny_tokenizer, gguf.GGMLQuantizationType.F32)
    return path


@pytest.mark.parametrize("form", ["F32", "Q8_0", "Q4_1"])
def test_the_folder_loads_plainly_and_computes_the_same(tmp_path: Path, llama: Any, tiny_tokenizer: Any, story: str, form: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, folder = tmp_path / "tiny.gguf", tmp_path / "out"
    folder.mkdir()
    write_gguf(path, llama, tiny_tokenizer, gguf.GGMLQuantizationType[form])
    gguf_file.convert(path, folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tiny_tokenizer(story, return_tensors="pt").input_ids[:, :100]
    assert tokenizer(story).input_ids[:100] == ids[0].tolist()
    assert tokenizer.chat_template == TEMPLATE
    with torch.inference_mode():
        found, wanted = model.float()(ids).logits, llama(ids).logits
    tolerance = {"F32": 0.02, "Q8_0": 0.05, "Q4_1": 0.5}[form]
    assert ((found - wanted).norm() / wanted.norm()).item() < tolerance


def test_the_formats_and_the_architecture_are_named(source: Path, tmp_path: Path, llama: Any, tiny_tokenizer: Any) -> None:
    assert gguf_file.formats_of(gguf_file.open_gguf(source)) == {"F32": 29}
    path = tmp_path / "q8.gguf"
    write_gguf(path, llama, tiny_tokenizer, gguf.GGMLQuantizationType.Q8_0)
    reader = gguf_file.open_gguf(path)
    assert gguf_file.architecture_of(reader) == "llama"
    assert gguf_file.formats_of(reader) == {"Q8_0": 22, "F32": 7}


@pytest.mark.parametrize("kept", [0, 3, 20, 900, 0.5, 0.999])
def test_a_truncated_file_is_refused(source: Path, tmp_path: Path, kept: float) -> None:
    data = source.read_bytes()
    source.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="not a complete GGUF file") as refusal:
        gguf_file.convert(source, tmp_path / "out")
    assert refusal.value.why and refusal.value.remedy
    assert not list((tmp_path / "out").iterdir())


def test_another_format_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    with pytest.raises(InputError, match="begins with"):
        gguf_file.open_gguf(path)


@pytest.mark.parametrize("at", [8, 16, 24, 40])
def test_a_corrupt_header_is_refused(source: Path, at: int) -> None:
    data = bytearray(source.read_bytes())
    data[at : at + 8] = b"\xff" * 8
    source.write_bytes(data)
    with pytest.raises(InputError, match="not a complete GGUF file"):
        gguf_file.open_gguf(source)


def test_a_foreign_architecture_is_named(tmp_path: Path, llama: Any, tiny_tokenizer: Any) -> None:
    path = tmp_path / "odd.gguf"
    write_gguf(path, llama, tiny_tokenizer, gguf.GGMLQuantizationType.F32, architecture="oddity")
    (tmp_path / "out").mkdir()
    with pytest.raises(BitpressError, match="'oddity'"):
        gguf_file.convert(path, tmp_path / "out")


def test_a_stop_is_heard_and_the_library_is_left_as_it_was(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    reader_class, calls = gguf.GGUFReader, []
    with pytest.raises(Cancelled):
        gguf_file.convert(source, tmp_path / "out", should_stop=lambda: bool(calls.append(1)) or len(calls) == 2)
    assert len(calls) == 2 and gguf.GGUFReader is reader_class
    assert not list((tmp_path / "out").glob("*.safetensors"))
