"""What pruning costs a small encoder that classifies sentences: SST-2, a BERT trained here from nothing, no training after anything has gone.

Run it as a program: `python tests/bench/encoder.py`. Accuracy on the test sentences with its 95% interval and, paired with the dense model, how many
answers changed. Words are a vocabulary of the training text, sentences are cut or filled to one length, and filling is read like any word: every
method sees the same sequences, without a mask.
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.model.inspect import anatomy_of
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe

LENGTH, WORDS = 32, 6000
SCORES = ("k-prune", "kwon", "mope", "llm-pruner", "flap", "wanda-structured", "magnitude-structured")

REPAIRED = (("k-prune", "none"), ("k-prune", "catch_up"), ("kwon", "least_squares"))


@dataclass(frozen=True)
class Row:
    """One model: share of right answers with its 95% interval, answers unlike the dense model's, share of the linears' weights left."""

    name: str
    accuracy: float
    low: float
    high: float
    changed: float
    linears_kept: float
    seconds: float


@dataclass(frozen=True)
class Sentences:
    """Word numbers [S, L] and labels [S]."""

    ids_SL: Tensor
    labels_S: Tensor


def read(part: str) -> list[tuple[list[str], int]]:
    """Words and label of every sentence of a part of SST-2, from BITPRESS_TEST_DATA."""
    path = Path(os.environ["BITPRESS_TEST_DATA"]) / "tasks" / "sst2" / f"{part}.tsv"
    with path.open(encoding="utf8", newline="") as file:
        return [(words.split(), int(label)) for words, label in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def numbered(sentences: list[tuple[list[str], int]], vocabulary: dict[str, int]) -> Sentences:
    """Sentences as numbers: 0 fills, 1 stands for words outside the vocabulary."""
    rows = [[vocabulary.get(word, 1) for word in words[:LENGTH]] for words, _ in sentences]
    return Sentences(torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows]), torch.tensor([label for _, label in sentences]))


def trained(text: Sentences, epochs: int, blocks: int) -> BertForSequenceClassification:
    """A small BERT that has learnt the labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": blocks, "num_attention_heads": 4, "intermediate_size": 512}
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=2, hidden_dropout_prob=0.2, **sizes))
    steps = epochs * math.ceil(len(text.ids_SL) / 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-4, total_steps=steps)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(text.ids_SL)).split(64):
            loss = model(input_ids=text.ids_SL[chosen], labels=text.labels_S[chosen]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch}: loss {float(loss):.3f}", file=sys.stderr)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def answers(model: Any, text: Sentences) -> Tensor:
    """The class that a model gives each sentence, [S]."""
    dtype = next(model.parameters()).dtype
    model.float()
    found = torch.cat([model(input_ids=ids).logits.argmax(1) for ids in text.ids_SL.split(128)])
    model.to(dtype)
    return found


def row(name: str, found_S: Tensor, dense_S: Tensor, text: Sentences, kept: float, seconds: float) -> Row:
    """Wilson's interval for the accuracy."""
    right, count, z = float((found_S == text.labels_S).float().mean()), len(found_S), 1.96
    middle = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(right * (1 - right) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Row(name, right, middle - half, middle + half, float((found_S != dense_S).float().mean()), kept, round(seconds, 1))


def main(asked: argparse.Namespace) -> None:
    """Train, prune by every score, and print a table."""
    training, test = read("train"), read("test")
    counts = Counter(word for words, _ in training for word in words)
    vocabulary = {word: number for number, (word, _) in enumerate(counts.most_common(WORDS - 2), start=2)}
    text, judged = numbered(training, vocabulary), numbered(test, vocabulary)
    model = trained(text, asked.epochs, asked.blocks)
    loaded = Loaded(model, None, anatomy_of(model, "encoder"), Path(), "encoder")
    sample = CalibrationSet("sst2/train", 0, "made here", text.ids_SL[torch.randperm(len(text.ids_SL))[: asked.sentences]])
    dense_S = answers(model, judged)
    rows = [row("dense", dense_S, dense_S, judged, 1.0, 0.0)]
    say(rows[0])
    for remove in asked.remove:
        for name, own in [(name, {}) for name in asked.scores] + [(name, {"repair": repair}) for name, repair in REPAIRED if name in asked.scores]:
            began, plan = time.perf_counter(), {"model": "encoder", "stages": [{"method": name, "options": {"remove": remove, **own}}]}
            made = compress(loaded, Recipe.from_dict(plan), calibration=sample)
            kept = made.recipe.reduced(loaded.anatomy).linear_params / loaded.anatomy.linear_params
            title = " ".join([f"{name} -{remove:.0%}", *(f"{key} {value}" for key, value in own.items())])
            rows.append(row(title, answers(made.model, judged), dense_S, judged, kept, time.perf_counter() - began))
            say(rows[-1])
    print(json.dumps([asdict(one) for one in rows], indent=1))


def say(one: Row) -> None:
    """A line of the table."""
    print(
        f"{one.name:40} {one.accuracy:.1%} [{one.low:.1%}, {one.high:.1%}]  changed {one.changed:.1%}  linears {one.linears_kept:.1%}  {one.seconds:.0f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prune a small classifier.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--remove", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    parser.add_argument("--scores", nargs="+", default=SCORES)
    main(parser.parse_args())
