"""How fast a model of some shape decodes, bfloat16 against 4 bits, with random weights: `python -m bitpress.engine.decode_shape`.

For shapes whose weights are not at hand, such as a 7B model's on a GPU. Knows sizes; what such a model writes means nothing.
A table goes to stderr, JSON to stdout. Without a GPU the large shapes are refused with exit code 2.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bitpress.engine.decode import Decoder
from bitpress.engine.decode_batch import BatchDecoder
from bitpress.engine.decode_bench import BatchTeller, of_all_rows
from bitpress.engine.measure.latency import Plan, measure_latency
from bitpress.engine.model import surgery
from bitpress.kernels.formats import PackedTensor
from bitpress.kernels.layout import UniformLayout
from bitpress.kernels.packed import PackedLinear
from bitpress.kernels.random_weights import random_packed

LINEARS, HEAD = UniformLayout(4, 64), UniformLayout(8, 0, True)
BATCHES = (1, 16)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    width: int
    neurons: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def config(self) -> LlamaConfig:
        """As transformers takes it."""
        return LlamaConfig(hidden_size=self.width, intermediate_size=self.neurons, num_hidden_layers=self.blocks, num_attention_heads=self.heads,
                           num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary, max_position_embeddings=4096, tie_word_embeddings=False)  # fmt: skip


SHAPES = {"7b": Shape(4096, 11008, 32, 32, 32, 32000), "8b": Shape(4096, 14336, 32, 32, 8, 128256), "tiny": Shape(64, 128, 2, 4, 2, 96)}


def random_dense(shape: Shape, device: str) -> nn.Module:
    """A bfloat16 Llama of this shape."""
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16)
    return model.eval()


def random_packed_model(shape: Shape, device: str) -> nn.Module:
    """The same with packed linears: codes are drawn once a shape of matrix and lie anew for each."""
    model, drawn = random_dense(shape, device), dict[tuple[int, int, UniformLayout], PackedTensor]()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            layout = HEAD if name == "lm_head" else LINEARS
            sizes = (module.out_features, module.in_features)
            first = drawn.setdefault((*sizes, layout), random_packed(sizes, layout))
            tensors = {part: tensor.to(device, copy=True) for part, tensor in first.tensors.items()}
            surgery.replace(model, name, PackedLinear(PackedTensor(layout, sizes, tensors)))
    return model


def table(shape: Shape, device: str, plan: Plan) -> dict[str, Any]:
    """Returns {shape, device, rows}: for each batch and side decode and prefill tokens a second of all rows, and the ratio to dense."""
    models, rows = {"dense": random_dense(shape, device), "4-bit": random_packed_model(shape, device)}, []
    prompt_T = torch.randint(shape.vocabulary, (plan.prompt,), generator=torch.Generator().manual_seed(0)).to(device)
    for batch in BATCHES:
        sides = {side: _decoder(model, plan, batch) for side, model in models.items()}
        found = {side: of_all_rows(latency, batch) for side, latency in measure_latency(sides, prompt_T, plan).items()}
        for side, latency in found.items():
            gain = latency.decode_tokens_per_s / found["dense"].decode_tokens_per_s
            rows.append({"batch": batch, "side": side, "decode_tokens_per_s": latency.decode_tokens_per_s, "prefill_tokens_per_s": latency.prefill_tokens_per_s,
                         "times_dense": gain, "conditions": {**latency.conditions, **sides[side].conditions}})  # fmt: skip
    return {"shape": asdict(shape), "device": device, "rows": rows}


def _decoder(model: nn.Module, plan: Plan, batch: int) -> Decoder | BatchTeller:
    length = plan.prompt + plan.new
    return Decoder(model, None, length) if batch == 1 else BatchTeller(BatchDecoder(model, batch, None, length))


def main(arguments: list[str] | None = None) -> int:
    """0 when all was measured, 2 for a large shape without a GPU."""
    asked = argparse.ArgumentParser(description="Decode a model of some shape with random weights.")
    asked.add_argument("--shape", choices=tuple(SHAPES), default="7b")
    name = asked.parse_args(arguments).shape
    if name != "tiny" and not torch.cuda.is_available():
        print(f"There is no CUDA device here, and a {name} model is slow without one. Try --shape tiny.", file=sys.stderr)
        return 2
    found = table(SHAPES[name], "cuda" if torch.cuda.is_available() else "cpu", Plan(prompt=32, new=32, rounds=5, seconds=20.0))
    for row in found["rows"]:
        print(f"batch {row['batch']:>3} {row['side']:<6} {row['decode_tokens_per_s']:9.1f} tokens/s {row['times_dense']:5.2f}x dense", file=sys.stderr)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
