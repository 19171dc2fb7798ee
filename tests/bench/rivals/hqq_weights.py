"""HQQ by its own library, groups along the inputs."""

import time
from importlib.metadata import version

import torch
from common import arguments, hand_back, linears
from hqq.core.quantize import Quantizer
from transformers import AutoModelForCausalLM

say = arguments()
model = AutoModelForCausalLM.from_pretrained(say.model, dtype=torch.float32)
made, started = {}, time.perf_counter()
for name, layer in linears(model).items():
    codes, meta = Quantizer.quantize(layer.weight.data, nbits=say.bits, group_size=say.group, axis=1, device="cpu", compute_dtype=torch.float32)
    made[name] = Quantizer.dequantize(codes, meta).reshape(layer.weight.shape)
hand_back(say, made, time.perf_counter() - started, f"hqq {version('hqq')}")
