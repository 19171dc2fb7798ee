"""The tiny model itself and its training: a small Llama in plain torch, Muon for matrices, AdamW for the embedding.

Knows shapes, loss and optimisers; parameter names are transformers' own, so that what is trained is what is stored.
Refuses to know where the tokens came from (`make_tiny`) or how anything is compressed.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

WIDTH, HIDDEN, BLOCKS, HEADS, CONTEXT, VOCAB = 192, 512, 6, 3, 256, 2048
BOS, EOS = 1, 2
IGNORED = -100
MATRIX_LR, EMBED_LR, WARM_UP = 0.02, 0.004, 40


def initial_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Float32 weights under transformers' names. What writes into the residual stream starts at zero."""
    shapes = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH)}
    shapes |= {"mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH)}
    weights = {"model.embed_tokens.weight": torch.randn(VOCAB, WIDTH, generator=generator) * 0.02}
    for block in range(BLOCKS):
        name = f"model.layers.{block}."
        for suffix, shape in shapes.items():
            weights[f"{name}{suffix}.weight"] = torch.randn(*shape, generator=generator) * WIDTH**-0.5
        weights[f"{name}self_attn.o_proj.weight"] = torch.zeros(WIDTH, WIDTH)
        weights[f"{name}mlp.down_proj.weight"] = torch.zeros(WIDTH, HIDDEN)
        weights[f"{name}input_layernorm.weight"] = torch.ones(WIDTH)
        weights[f"{name}post_attention_layernorm.weight"] = torch.ones(WIDTH)
    weights["model.norm.weight"] = torch.ones(WIDTH)
    return weights


def _rotary() -> tuple[torch.Tensor, torch.Tensor]:
    width = WIDTH // HEADS
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(CONTEXT)[:, None] * frequency.repeat(2)[None]
    return angle.cos(), angle.sin()


COS, SIN = _rotary()


def _rotate(x: torch.Tensor) -> torch.Tensor:
    half, length = x.shape[-1] // 2, x.shape[-2]
    return x * COS[:length] + torch.cat([-x[..., half:], x[..., :half]], -1) * SIN[:length]


def _norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (WIDTH,), gain, 1e-5)


def _attention(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    rows, length, _ = x.shape
    q, k, v = (
        F.linear(x, weights[f"{name}{part}_proj.weight"]).view(rows, length, HEADS, -1).transpose(1, 2) for part in "qkv"
    )
    out = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
    return F.linear(out.transpose(1, 2).reshape(rows, length, WIDTH), weights[f"{name}o_proj.weight"])


def _mlp(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    gate, up = F.linear(x, weights[f"{name}gate_proj.weight"]), F.linear(x, weights[f"{name}up_proj.weight"])
    return F.linear(F.silu(gate) * up, weights[f"{name}down_proj.weight"])


def token_losses(weights: dict[str, torch.Tensor], tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats. Tokens and targets are [row, position]; IGNORED targets do not count."""
    x = F.embedding(tokens, weights["model.embed_tokens.weight"])
    for block in range(BLOCKS):
        name = f"model.layers.{block}."
        x = x + _attention(_norm(x, weights[f"{name}input_layernorm.weight"]), weights, f"{name}self_attn.")
        x = x + _mlp(_norm(x, weights[f"{name}post_attention_layernorm.weight"]), weights, f"{name}mlp.")
    logits = F.linear(_norm(x, weights["model.norm.weight"]), weights["model.embed_tokens.weight"])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def orthogonalised(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """A stack [n, rows, cols] with every singular value brought near one, by a quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum whose update is orthogonalised; matrices of one shape are worked on together."""

    def __init__(self, parameters: list[torch.Tensor], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
        for parameter in parameters:
            self.groups[tuple(parameter.shape)].append(parameter)
        self.buffers = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float, decay: float = 0.1) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in group])
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalised(gradient.lerp(buffer, self.momentum)) * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * decay).sub_(change, alpha=rate)


def rate_at(step: int, steps: int) -> float:
    """Share of the full learning rate: a short warm-up, then half a cosine down to a fiftieth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def batch_at(stream: torch.Tensor, step: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets [rows, CONTEXT] of a step: each epoch cuts the stream at a new offset and shuffles the cuts.

    Guessing that an unfinished story breaks off teaches nothing, so BOS is never a target.
    """
    cuts = (len(stream) - CONTEXT - 1) // CONTEXT
    epoch, at = divmod(step * rows, cuts - cuts % rows)
    generator = torch.Generator().manual_seed(seed + epoch)
    offset = int(torch.randint(CONTEXT, (1,), generator=generator))
    chosen = torch.randperm(cuts, generator=generator)[at : at + rows] * CONTEXT + offset
    windows = stream[chosen[:, None] + torch.arange(CONTEXT + 1)].long()
    targets = windows[:, 1:].clone()
    return windows[:, :-1], targets.masked_fill_(targets == BOS, IGNORED)


@torch.inference_mode()
def held_out_loss(weights: dict[str, torch.Tensor], stories: list[list[int]]) -> float:
    """Mean nats a token over stories, each [BOS, ..., EOS] and cut to CONTEXT tokens after BOS."""
    total = count = 0.0
    for story in stories:
        ids = torch.tensor(story[: CONTEXT + 1])[None]
        total += token_losses(weights, ids[:, :-1], ids[:, 1:]).item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


class Training:
    """Weights, optimisers and log of one training; `checkpoint` is where it goes on from."""

    def __init__(self, work: Path, steps: int, rows: int, seed: int) -> None:
        self.checkpoint, self.log = work / "checkpoint.pt", work / "training.jsonl"
        self.steps, self.rows, self.seed, self.done = steps, rows, seed, 0
        self.weights = initial_weights(torch.Generator().manual_seed(seed))
        for weight in self.weights.values():
            weight.requires_grad_(True)
        matrices = [w for name, w in self.weights.items() if w.ndim == 2 and "layers" in name]
        others = [w for name, w in self.weights.items() if not (w.ndim == 2 and "layers" in name)]
        self.loss = torch.compile(token_losses, dynamic=False)  # a third faster: half the time is not in the products
        self.muon, self.adam = Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        if self.checkpoint.exists():
            self._restore()

    def _restore(self) -> None:
        kept = torch.load(self.checkpoint, weights_only=True)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(kept["weights"][name])
        self.muon.buffers, self.done = kept["momentum"], kept["done"]
        self.adam.load_state_dict(kept["adam"])

    def save(self) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        state = {"weights": weights, "momentum": self.muon.buffers, "done": self.done, "adam": self.adam.state_dict()}
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def step(self, stream: torch.Tensor) -> float:
        """One update; returns the training loss before it, in nats a token."""
        share = rate_at(self.done, self.steps)
        loss = self.loss(self.weights, *batch_at(stream, self.done, self.rows, self.seed))
        loss.backward()
        self.muon.step(MATRIX_LR * share)
        self.adam.param_groups[0]["lr"] = EMBED_LR * share
        self.adam.step()
        for weight in self.weights.values():
            weight.grad = None
        self.done += 1
        return loss.item()

    def run(self, stream: torch.Tensor, held_out: list[list[int]], every: int = 25) -> None:
        """Train to the last step, writing a log line and a checkpoint `every` so many steps."""
        begun, losses = time.time(), []
        while self.done < self.steps:
            losses.append(self.step(stream))
            if self.done % every == 0 or self.done == self.steps:
                self._write(sum(losses) / len(losses), held_out_loss(self.weights, held_out[:60]), time.time() - begun)
                losses = []
                self.save()

    def _write(self, loss: float, held_out: float, seconds: float) -> None:
        rate = MATRIX_LR * rate_at(self.done - 1, self.steps)
        line = {"step": self.done, "loss": round(loss, 4), "lr": round(rate, 6), "held_out_loss": round(held_out, 4)}
        line |= {"tokens": self.done * self.rows * CONTEXT, "seconds": round(seconds, 1)}
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)
