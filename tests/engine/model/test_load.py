"""Loading a folder, and everything that must be refused with words that help."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.engine.errors import InputError
from bitpress.engine.model import load as loading
from bitpress.engine.model.load import compute_dtype, load


@pytest.fixture
def folder(tiny_llama_dir, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_loads_in_its_stored_type(tiny_llama_dir):
    loaded = load(tiny_llama_dir)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert (loaded.model_id, loaded.path, loaded.anatomy.itemsize) == ("tiny-llama", tiny_llama_dir, 2)
    assert loaded.tokenizer.decode(loaded.tokenizer("the little bear").input_ids) == "the little bear"


def test_the_stored_type_is_that_of_the_weights_not_of_the_config(folder):
    change_config(folder, dtype="bfloat16")
    change_weights(folder, lambda weights: weights.update({name: value.to(torch.float16) for name, value in weights.items()}))
    assert loading.stored_dtype(folder) == torch.float16
    assert next(load(folder).model.parameters()).dtype == torch.float16
    assert next(load(folder, dtype=torch.float32).model.parameters()).dtype == torch.float32


def test_weights_are_those_of_the_file(tiny_llama_dir):
    stored, loaded = load_file(tiny_llama_dir / "model.safetensors"), load(tiny_llama_dir).model
    assert all(torch.equal(weight, stored[name]) for name, weight in loaded.named_parameters())


def test_compute_dtype_follows_the_machine():
    flags = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert compute_dtype() is (torch.bfloat16 if flags else torch.float32)
    assert compute_dtype("cuda") is torch.bfloat16


def refuse(folder, *said):
    with pytest.raises(InputError) as caught:
        load(folder)
    assert caught.value.what
    assert caught.value.remedy
    assert all(word in str(caught.value) for word in said), str(caught.value)


def test_pickles_are_refused_with_the_way_to_convert_them(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "pickle", "safe_serialization")
    refuse(folder / "pytorch_model.bin", "pickle")


def test_code_that_comes_with_a_model_is_never_run(folder):
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    refuse(folder, "auto_map")


def test_a_cut_file_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refuse(folder, "model.safetensors", "damaged")


def test_garbage_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json at all}")
    refuse(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refuse(folder, name.replace("model.safetensors", ".safetensors"))


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("config.json", "[1]"), ("tokenizer.json", "{}")])
def test_a_broken_file_is_refused(folder, name, text):
    (folder / name).write_text(text)
    refuse(folder)


@pytest.mark.parametrize("kind", ["bert", "t5", "vit", "no-such-model", None])
def test_what_is_no_causal_language_model_is_refused(folder, kind):
    change_config(folder, model_type=kind)
    refuse(folder, "causal language model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder, value):
    change_weights(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    refuse(folder, "model.layers.1.mlp.up_proj.weight")


def test_a_missing_tensor_is_not_made_up(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refuse(folder, "incomplete", "up_proj")


def test_a_config_that_disagrees_with_the_weights_is_refused(folder):
    change_config(folder, intermediate_size=96)
    refuse(folder)


def test_codes_instead_of_weights_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(folder, "already quantised")


def test_integers_instead_of_weights_are_refused(folder):
    change_weights(folder, lambda weights: weights.update({name: value.to(torch.int8) for name, value in weights.items()}))
    refuse(folder, "I8")


def test_an_unknown_id_and_a_bare_gguf_are_refused(bitpress_home):
    refuse("no-such-model", "no-such-model")
    refuse("some/file.gguf", "GGUF")
