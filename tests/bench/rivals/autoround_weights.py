"""Signed-gradient rounding by auto-round, 50 iterations a block."""

import time
from importlib.metadata import version

import torch
from auto_round import AutoRound
from common import arguments, hand_back, linears, sequences
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    say = arguments()
    ids, tokenizer = sequences(say), AutoTokenizer.from_pretrained(say.model)
    model = AutoModelForCausalLM.from_pretrained(say.model, dtype=torch.bfloat16)
    rows = list(ids.split(1))  # the tokens themselves: text would be cut into tokens again, and not into the same ones
    started = time.perf_counter()
    made = AutoRound(
        model,
        tokenizer,
        bits=say.bits,
        group_size=say.group,
        sym=False,
        iters=50,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map="cpu",
        dataset=rows,
        enable_torch_compile=False,
    ).quantize()
    model = made[0] if isinstance(made, tuple) else made
    hand_back(say, {name: layer.weight for name, layer in linears(model).items()}, time.perf_counter() - started, f"auto-round {version('auto-round')}")
