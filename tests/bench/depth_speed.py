"""What half of the blocks gone brings in speed, beside what bytes and FLOPs allow: LayerChop on SmolLM2-135M, in our own decode loop.

Run it as a program on a quiet machine: `python tests/bench/depth_speed.py`. Dense and chopped, with the head in bfloat16 and in 8 bits, are timed in turn
in one process. Decode at batch 1 reads every weight once a token: its bound is bytes over bytes. A prompt costs multiply-adds: its bound is theirs, the
head once. Exits with 1 where less than 0.95 of a bound is reached.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitpress.engine.accounting import weight_bytes_per_token
from bitpress.engine.compress import compress
from bitpress.engine.decode import Decoder
from bitpress.engine.measure.latency import Latency, Plan, measure_latency
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import compute_dtype, load
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.resident import compute_in

REACH = 0.95
HEADS = {"bfloat16": 16, "8-bit": 8}


@dataclass(frozen=True)
class Row:
    """One head: how many times as fast the chopped model is as the dense one with the same head, and at most could be."""

    head: str
    decode: float
    decode_bound: float
    prefill: float
    prefill_bound: float
    noisy: list[str]

    @property
    def reached(self) -> bool:
        """Whether both are near enough to their bounds."""
        return self.decode >= REACH * self.decode_bound and self.prefill >= REACH * self.prefill_bound


def plan_of(model_id: str, bits: int, remove: float) -> Recipe:
    """A dense or chopped model with its head, which is the embedding, in so many bits."""
    chop: dict[str, Any] = {"stages": [{"method": "layerchop", "options": {"remove": remove}}]} if remove else {}
    return Recipe.from_dict({"model": model_id, **chop, **({"embedding": {"bits": bits}} if bits < 16 else {})})


def prompt_work(recipe: Recipe, anatomy: Anatomy, tokens: int) -> int:
    """Multiply-adds of a prompt: the block linears and the attention for every token, the head for the last one."""
    reduced = recipe.reduced(anatomy)
    attention = sum(reduced.units_of(block).heads for block in reduced.present) * anatomy.head_dim * tokens  # 2 products over half of the tokens on average
    return tokens * (reduced.linear_params + attention) + anatomy.vocab * anatomy.hidden


def rows(model_id: str, remove: float, plan: Plan) -> list[Row]:
    """Make the four models, time them in turn, and set each pair beside its bounds."""
    loaded = load(model_id)
    made = {(name, gone): compress(loaded, plan_of(model_id, bits, gone)) for name, bits in HEADS.items() for gone in (0.0, remove)}
    compute_in(compute_dtype(), *(each.model for each in made.values()))
    fitted = plan.fitted(loaded.anatomy.context)
    prompt_T = torch.randint(loaded.anatomy.vocab, (fitted.prompt,), generator=torch.Generator().manual_seed(0))
    decoders = {f"{name} {gone}": Decoder(each.model, None, fitted.prompt + fitted.new) for (name, gone), each in made.items()}
    found = measure_latency(decoders, prompt_T, fitted)
    return [_row(name, *((made[name, gone].recipe, found[f"{name} {gone}"]) for gone in (0.0, remove)), loaded.anatomy, fitted) for name in HEADS]


def _row(head: str, dense: tuple[Recipe, Latency], chopped: tuple[Recipe, Latency], anatomy: Anatomy, plan: Plan) -> Row:
    (whole, slow), (less, fast) = dense, chopped
    return Row(
        head,
        decode=fast.decode_tokens_per_s / slow.decode_tokens_per_s,
        decode_bound=weight_bytes_per_token(whole, anatomy) / weight_bytes_per_token(less, anatomy),
        prefill=fast.prefill_tokens_per_s / slow.prefill_tokens_per_s,
        prefill_bound=prompt_work(whole, anatomy, plan.prompt) / prompt_work(less, anatomy, plan.prompt),
        noisy=[*slow.conditions["noisy"], *fast.conditions["noisy"]],
    )


def main(asked: argparse.Namespace) -> int:
    """Print a table to stderr and rows as JSON to stdout."""
    found = rows(asked.model, asked.remove, Plan(prompt=asked.prompt, new=asked.new, rounds=asked.rounds, seconds=asked.seconds))
    for row in found:
        told = f"decode x{row.decode:.2f} of at most x{row.decode_bound:.2f} ({row.decode / row.decode_bound:.2f})"
        told += f", prefill x{row.prefill:.2f} of at most x{row.prefill_bound:.2f} ({row.prefill / row.prefill_bound:.2f})"
        print(f"{row.head} head: {told}{'; noisy: ' + '; '.join(row.noisy) if row.noisy else ''}", file=sys.stderr)
    print(json.dumps([asdict(row) for row in found], indent=1))
    return 0 if all(row.reached for row in found) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time a model with half of its blocks.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--remove", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=12.0)
    sys.exit(main(parser.parse_args()))
