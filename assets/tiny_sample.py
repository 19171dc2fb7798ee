"""Text sampled from stories-15m in big batches: what the tiny model learns from.

Knows a Llama with tied embeddings well enough to decode 256 rows at once on a CPU, and where one story ends. Refuses to
know what the text is for.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

SEED = 15
ROWS, CONTEXT = 256, 256
KEPT_TOKENS = 4096  # of the teacher's 32,000: the rest hold 0.03% of the probability and over half of the cost
TEMPERATURE = 0.9
BOS = 1


class Sampler:
    """Batched sampling from a Llama with tied embeddings: static KV cache, one head matrix cut to the tokens in use.

    Caches are [layer, row, head, position, head width], float32.
    """

    def __init__(self, folder: Path) -> None:
        self.weights = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.width, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.embedding = self.weights["model.embed_tokens.weight"]
        self.kept = torch.arange(len(self.embedding))
        self.cos, self.sin = self._rotary()
        self._fuse()

    def _rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        frequency = 10000.0 ** (-torch.arange(0, self.width, 2) / self.width)
        angle = torch.arange(CONTEXT)[:, None] * frequency.repeat(2)[None]
        return angle.cos(), angle.sin()

    def _fuse(self) -> None:
        """q, k, v as one matrix and gate, up as one: fewer, larger products; the norms' gains go into them."""
        self.qkv, self.gate_up = [], []
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            attention = torch.cat([self.weights[f"{name}self_attn.{p}_proj.weight"] for p in "qkv"])
            mlp = torch.cat([self.weights[f"{name}mlp.{p}_proj.weight"] for p in ("gate", "up")])
            self.qkv.append(attention * self.weights[f"{name}input_layernorm.weight"])
            self.gate_up.append(mlp * self.weights[f"{name}post_attention_layernorm.weight"])
        self.head = self.embedding * self.weights["model.norm.weight"]

    def keep(self, tokens: torch.Tensor) -> None:
        """Only these tokens can be sampled from now on."""
        self.kept = tokens
        self.head = (self.embedding * self.weights["model.norm.weight"])[tokens].contiguous()

    def _rms(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos[position] + turned * self.sin[position]

    def _attend(self, layer: int, x: torch.Tensor, cache: torch.Tensor, position: int) -> torch.Tensor:
        rows = len(x)
        q, k, v = F.linear(self._rms(x), self.qkv[layer]).view(rows, 3, self.heads, self.width).unbind(1)
        cache[0, layer, :, :, position], cache[1, layer, :, :, position] = self._rotate(k, position), v
        keys, values = cache[0, layer, :, :, : position + 1], cache[1, layer, :, :, : position + 1]
        out = F.scaled_dot_product_attention(self._rotate(q, position)[:, :, None], keys, values)
        return F.linear(out.reshape(rows, -1), self.weights[f"model.layers.{layer}.self_attn.o_proj.weight"])

    def _logits(self, tokens: torch.Tensor, cache: torch.Tensor, position: int) -> torch.Tensor:
        x = self.embedding[tokens]
        for layer in range(self.layers):
            x = x + self._attend(layer, x, cache, position)
            gate, up = F.linear(self._rms(x), self.gate_up[layer]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, self.weights[f"model.layers.{layer}.mlp.down_proj.weight"])
        return F.linear(self._rms(x), self.head)

    @torch.inference_mode()
    def sample(self, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [rows, CONTEXT], each row begun by BOS, and the mean probability of each kept token."""
        cache = torch.zeros(2, self.layers, rows, self.heads, CONTEXT, self.width)
        tokens = torch.full((rows, CONTEXT), BOS)
        mean = torch.zeros(len(self.kept))
        for position in range(CONTEXT - 1):
            logits = self._logits(tokens[:, position], cache, position)
            chances = (logits / TEMPERATURE).softmax(-1)
            mean += chances.mean(0)
            tokens[:, position + 1] = self.kept[draw(chances, generator)]
        return tokens, mean / (CONTEXT - 1)


def draw(chances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index a row by inverting the running sum; torch.multinomial would draw a number for every cell."""
    level = torch.rand(len(chances), 1, generator=generator)
    sums = chances.cumsum(-1)
    return torch.searchsorted(sums, level * sums[:, -1:])[:, 0].clamp_(max=chances.shape[1] - 1)


def stories_of(row: list[int], tokenizer: Tokenizer) -> list[dict[str, object]]:
    """The stories in one sampled row; `finished` says whether the teacher came to the end before the row did."""
    cuts = [at for at, token in enumerate(row) if token == BOS] + [len(row)]
    found = []
    for start, end in itertools.pairwise(cuts):
        text = tokenizer.decode(row[start + 1 : end], skip_special_tokens=True).strip()
        found.append({"text": text, "finished": end < len(row)})
    return [story for story in found if len(story["text"]) > 40]


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def sample_part(sampler: Sampler, tokenizer: Tokenizer, index: int, path: Path) -> None:
    """One batch of stories into a JSON-lines file; its seed is its number, so parts may be made in any order."""
    begun = time.time()
    tokens, _ = sampler.sample(ROWS, torch.Generator().manual_seed(SEED * 1000 + index))
    stories = [story for row in tokens.tolist() for story in stories_of(row, tokenizer)]
    write_atomically(path, "".join(json.dumps(story, ensure_ascii=False) + "\n" for story in stories))
    rate = tokens.numel() / (time.time() - begun)
    print(f"part {index}: {len(stories)} stories, {rate:,.0f} tokens/s", flush=True)


def sample(teacher: Path, work: Path, parts: int) -> None:
    """Sample `parts` batches of ROWS x CONTEXT tokens, skipping those that are there already."""
    folder = work / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    sampler, tokenizer = Sampler(teacher), Tokenizer.from_file(str(teacher / "tokenizer.json"))
    _, mean = sampler.sample(64, torch.Generator().manual_seed(SEED))
    kept = mean.argsort(descending=True)[:KEPT_TOKENS].sort().values
    print(f"{KEPT_TOKENS} tokens hold {mean[kept].sum():.4%} of the teacher's probability", flush=True)
    sampler.keep(kept)
    for index in range(parts):
        path = folder / f"part-{index:04d}.jsonl"
        if not path.exists():
            sample_part(sampler, tokenizer, index, path)
