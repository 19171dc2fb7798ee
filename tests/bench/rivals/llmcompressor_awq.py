"""AWQ by llm-compressor: its scale search, then rounding to nearest on asymmetric integers in groups.

Its scales stay folded into norms and neighbouring linears, so plain weights of linears alone do not say what it made. The
columns are therefore divided by what the norms and rows were divided by: the product of a norm's gain and the columns that read it.
"""

import time
from importlib.metadata import version

import torch
from common import arguments, hand_back, linears, sequences
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

say = arguments()
ids = sequences(say).tolist()
dense = AutoModelForCausalLM.from_pretrained(say.model, dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(say.model, dtype=torch.float32)
data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
weights = QuantizationArgs(num_bits=say.bits, type="int", symmetric=False, strategy="group", group_size=say.group)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
plan = [AWQModifier(), QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"])]
tokenizer = AutoTokenizer.from_pretrained(say.model)
started = time.perf_counter()
oneshot(model=model, dataset=data, recipe=plan, max_seq_length=len(ids[0]), num_calibration_samples=len(ids), tokenizer=tokenizer)
seconds = time.perf_counter() - started


READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def shares(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """By what each number of a norm was multiplied."""
    return torch.where(old.abs() > 1e-12, new / old, 1.0)


made = {}
for name, layer in linears(model).items():  # the weights are scaled but not yet rounded
    made[name] = fake_quantize(layer.weight.data, layer.weight_scale, layer.weight_zero_point, weights).float()
for before, after, index in zip(dense.model.layers, model.model.layers, range(len(model.model.layers)), strict=True):
    for norm, readers in READERS.items():
        factor = shares(getattr(before, norm).weight.data, getattr(after, norm).weight.data.float())
        for reader in readers:
            made[f"model.layers.{index}.{reader}"] *= factor
# Factors between up and down, and v and o, leave the product of both matrices as it is: nothing has to be undone for them.
hand_back(say, made, seconds, f"llmcompressor {version('llmcompressor')}")
