"""What every runner shares: its arguments, the tokens, and how the weights are handed back. Runs in a rival's environment; knows nothing of Bitpress.

A runner quantises all linears of a model but its head and writes what they now stand for, dense, by layer name.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def arguments() -> argparse.Namespace:
    """Command line of a runner."""
    ask = argparse.ArgumentParser()
    ask.add_argument("--model", required=True, help="folder with safetensors and tokenizer")
    ask.add_argument("--calibration", required=True, type=Path, help="safetensors with `ids`, int64 [S, L]")
    ask.add_argument("--bits", type=int, required=True)
    ask.add_argument("--group", type=int, required=True)
    ask.add_argument("--out", required=True, type=Path)
    return ask.parse_args()


def sequences(say: argparse.Namespace) -> torch.Tensor:
    """The calibration tokens, int64 [S, L]."""
    return load_file(say.calibration)["ids"]


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Everything with a two-dimensional weight that is no embedding and no head, by name."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2 and not isinstance(module, torch.nn.Embedding) and "lm_head" not in name:
            found[name] = module
    return found


def hand_back(say: argparse.Namespace, weights: dict[str, torch.Tensor], seconds: float, version: str) -> None:
    """Write the weights and say how long it took."""
    save_file({name: weight.detach().float().contiguous() for name, weight in weights.items()}, say.out)
    print(json.dumps({"seconds": round(seconds, 2), "version": version}), flush=True)
