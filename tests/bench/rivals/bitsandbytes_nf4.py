"""NF4 by bitsandbytes: blocks of the asked group along the inputs, scales not quantised again."""

import time
from importlib.metadata import version

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from common import arguments, hand_back, linears
from transformers import AutoModelForCausalLM

say = arguments()
model = AutoModelForCausalLM.from_pretrained(say.model, dtype=torch.float32)
made, started = {}, time.perf_counter()
for name, layer in linears(model).items():
    codes, state = quantize_4bit(layer.weight.data.contiguous(), blocksize=say.group, quant_type="nf4", compress_statistics=False)
    made[name] = dequantize_4bit(codes, state).reshape(layer.weight.shape)
hand_back(say, made, time.perf_counter() - started, f"bitsandbytes {version('bitsandbytes')}")
