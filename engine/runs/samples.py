"""Continue a prompt with several models in turn, token by token, so that all columns stream together. Knows writers; no orders, no screens.

Every side gets the same prompt, sampling and seed. Beside a side that is not the dense model, the dense model reads along
on the very same prefix, so that each token carries its KL divergence; its time is not counted.
"""

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from bitpress.engine.decode import Decoder, context_overflow
from bitpress.engine.errors import InputError
from bitpress.engine.generate import Sampling, Token, Writer, encode
from bitpress.engine.runs.events import json_line
from bitpress.engine.runs.task import Task

DENSE = "dense"


def parse_sampling(values: dict[str, Any]) -> Sampling:
    """Sampling from plain values `{max_new, temperature, top_p, seed, stop}`. Raises InputError for others and for wrong ones."""
    try:
        sampling = Sampling(**{**values, "stop": tuple(values.get("stop") or ())})
        sampling.check()
        return sampling
    except TypeError as error:
        raise InputError("This sampling cannot be used.", f"{error}.", "It has max_new, temperature, top_p, seed and stop.") from None


def prompt_ids(tokenizer: Any, prompt: str, needs_bos: bool) -> list[int]:
    """The prompt's tokens; BOS first for a model that is measured with it. Raises InputError for an empty prompt."""
    ids = encode(tokenizer, prompt)
    bos = tokenizer.bos_token_id
    return [bos, *ids] if needs_bos and bos is not None and ids[0] != bos else ids


class TimedDecoder(Decoder):
    """A decoder that counts the seconds of its first piece and of its steps."""

    first_s = steps_s = 0.0
    steps = 0

    def prefill(self, ids: Tensor | list[int]) -> Tensor:
        """As `Decoder.prefill`."""
        began = time.perf_counter()
        logits_V = super().prefill(ids)
        self.first_s = time.perf_counter() - began
        return logits_V

    def step(self, token_id: int) -> Tensor:
        """As `Decoder.step`."""
        began = time.perf_counter()
        logits_V = super().step(token_id)
        self.steps_s, self.steps = self.steps_s + time.perf_counter() - began, self.steps + 1
        return logits_V

    def figures(self) -> dict[str, float]:
        """`ttft_s`, and `tokens_per_s` once there was a step. Of this one text: no warm-up, no repeats."""
        return {"ttft_s": self.first_s} | ({"tokens_per_s": self.steps / self.steps_s} if self.steps else {})


class Chorus:
    """Several sides on one prompt. models: side -> model; `dense` is what the others' divergence is from.

    Raises InputError when prompt and new tokens do not fit the context.
    """

    def __init__(self, tokenizer: Any, dense: nn.Module, models: dict[str, nn.Module], ids: list[int], sampling: Sampling) -> None:
        length = len(ids) + sampling.max_new
        self.decoders = {side: TimedDecoder(model, tokenizer, length) for side, model in models.items()}
        for decoder in self.decoders.values():
            if decoder.max_length < length:
                raise context_overflow(len(ids), sampling.max_new, decoder.max_length)
        readers = {side: None if side == DENSE else Decoder(dense, tokenizer, length) for side in models}
        self.writers = {side: Writer(decoder, tokenizer, ids, sampling, readers[side]) for side, decoder in self.decoders.items()}
        self.said: dict[str, list[Token]] = {side: [] for side in models}

    def tokens(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(side, `{index, token, text, logprob, rank, top, kl}`) in turn, until every side has ended."""
        singing = {side: iter(writer) for side, writer in self.writers.items()}
        while singing:
            for side in list(singing):
                token = next(singing[side], None)
                if token is None:
                    del singing[side]
                    continue
                self.said[side].append(token)
                values = token.as_dict()
                yield side, {"index": len(self.said[side]) - 1, "token": values.pop("id"), **values}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Side -> number of tokens, why it ended, ttft_s, tokens_per_s."""
        return {side: {"tokens": len(said), "ended": self.writers[side].ended, **self.decoders[side].figures()} for side, said in self.said.items()}


def perform(task: Task, chorus: Chorus, prompt: str) -> list[dict[str, Any]]:
    """Tell every token as an event; gives `{prompt, side, text, tokens: [...], ended, ttft_s, tokens_per_s}` a side. Raises Cancelled between tokens."""
    for side, token in chorus.tokens():
        task.check()
        task.emit("sample", {"prompt": prompt, "side": side, **token})
    return [
        {"prompt": prompt, "side": side, "text": chorus.writers[side].text, **figures, "tokens": [token.as_dict() for token in chorus.said[side]]}
        for side, figures in chorus.summary().items()
    ]


def keep(task: Task, samples: list[dict[str, Any]]) -> None:
    """Append finished generations to `samples.jsonl`."""
    with (task.run.path / "samples.jsonl").open("ab") as file:
        for sample in samples:
            file.write(json_line(sample))
