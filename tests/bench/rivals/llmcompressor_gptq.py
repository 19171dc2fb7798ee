"""GPTQ by llm-compressor: asymmetric integers in groups, its own defaults otherwise."""

import time
from importlib.metadata import version

import torch
from common import arguments, hand_back, linears, sequences
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

say = arguments()
ids = sequences(say).tolist()
model = AutoModelForCausalLM.from_pretrained(say.model, dtype=torch.float32)
data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
weights = QuantizationArgs(num_bits=say.bits, type="int", symmetric=False, strategy="group", group_size=say.group)
plan = GPTQModifier(config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"])
tokenizer = AutoTokenizer.from_pretrained(say.model)
started = time.perf_counter()
oneshot(model=model, dataset=data, recipe=plan, max_seq_length=len(ids[0]), num_calibration_samples=len(ids), tokenizer=tokenizer)
hand_back(say, {name: layer.weight for name, layer in linears(model).items()}, time.perf_counter() - started, f"llmcompressor {version('llmcompressor')}")
