"""Which widths auto-round's AutoScheme gives to which linears at a mean of so many bits, scales and zeros counted. Quantises nothing."""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from common import linears, sequences
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDTHS = (2, 3, 4, 8)


def arguments() -> argparse.Namespace:
    """Command line of this runner."""
    ask = argparse.ArgumentParser()
    ask.add_argument("--model", required=True)
    ask.add_argument("--calibration", required=True, type=Path, help="safetensors with `ids`, int64 [S, L]")
    ask.add_argument("--average", required=True, type=float)
    ask.add_argument("--group", required=True, type=int)
    ask.add_argument("--out", required=True, type=Path, help="JSON of bits by layer name")
    return ask.parse_args()


if __name__ == "__main__":
    say = arguments()
    ids, tokenizer = sequences(say), AutoTokenizer.from_pretrained(say.model)
    texts = say.out.with_suffix(".texts.json")
    texts.write_text(json.dumps([{"text": tokenizer.decode(row)} for row in ids]))
    model = AutoModelForCausalLM.from_pretrained(say.model, dtype=torch.bfloat16)
    options = [QuantizationScheme(bits=bits, group_size=say.group, sym=False, act_bits=16) for bits in WIDTHS]
    length = ids.shape[1] - 8  # decoded and encoded again, a text may lose a token or two; shorter ones would be dropped
    wanted = AutoScheme(avg_bits=say.average, options=options, nsamples=len(ids), seqlen=length, dataset=str(texts), batch_size=len(ids), device_map="cpu")
    started = time.perf_counter()
    rounder = AutoRound(model, tokenizer, scheme=wanted, iters=0, dataset=str(texts), nsamples=len(ids), seqlen=length, device_map="cpu")
    rounder.post_init()
    seconds = time.perf_counter() - started
    found = {name: int(rounder.layer_config[name]["bits"]) for name in linears(model)}
    say.out.write_text(json.dumps(found))
    print(json.dumps({"seconds": round(seconds, 2), "version": f"auto-round {version('auto-round')}"}), flush=True)
