"""Write several texts at once, each as `generate` would write it alone. Knows prompts and rows; leaves the forward to `decode_batch`.

A model that no batch can be decoded of (another family, a compressed cache) writes the same texts one after another, and the answer says why.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine.decode import Decoder, room_for
from bitpress.engine.decode_batch import BatchDecoder, why_not_batched
from bitpress.engine.errors import InputError
from bitpress.engine.generate import Generation, Pen, Sampling, Token, encode, generate

Prompts = Sequence[str | list[int]]


@dataclass(frozen=True)
class Batch:
    """What was written, in the order of the prompts. reason: why not at once, None when it was. seconds: of all; each text has the seconds until it ended."""

    texts: tuple[Generation, ...]
    seconds: float
    reason: str | None = None

    @property
    def tokens_per_s(self) -> float:
        """Of all texts together, their prompts' reading included in the time."""
        return sum(len(text.tokens) for text in self.texts) / self.seconds


def generate_batch(model: nn.Module | BatchDecoder, tokenizer: Any, prompts: Prompts, sampling: Sampling | Sequence[Sampling] | None = None,
                   on_token: Callable[[int, Token], None] | None = None, should_stop: Callable[[], bool] = lambda: False) -> Batch:  # fmt: skip
    """Continue several prompts.

    model: one to build a decoder of, or a BatchDecoder with a row for every prompt. sampling: one for all, each with its seed, or one for
    each. on_token: called with the prompt's number, from 0, and each token as it is chosen. A text is the one that it would be alone.
    Raises InputError as `generate`, with the prompt's number; and without prompts, or for more than there are rows.
    """
    samplings = _samplings(sampling, len(prompts))
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    plain = model.model if isinstance(model, BatchDecoder) else model
    room = model.max_length if isinstance(model, BatchDecoder) else room_for(model, None)
    _check_room(ids, samplings, room)
    longest = max(len(each) + choice.max_new for each, choice in zip(ids, samplings, strict=True))
    reason = None if isinstance(model, BatchDecoder) else why_not_batched(model, longest)
    if reason:
        return _one_by_one(plain, tokenizer, ids, samplings, on_token, should_stop, reason)
    decoder = model if isinstance(model, BatchDecoder) else BatchDecoder(model, len(ids), tokenizer, longest)
    if len(ids) > decoder.size:
        raise InputError(f"{len(ids)} prompts were given.", f"The batch has room for {decoder.size}.", "Give fewer, or a larger batch.")
    pens = [Pen(plain, tokenizer, each, choice) for each, choice in zip(ids, samplings, strict=True)]
    return _Choir(decoder, pens, on_token or (lambda *_: None), should_stop).sing()


def _samplings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    if not count:
        raise InputError("There is no prompt.", "", "Give at least one.")
    found = [sampling or Sampling()] * count if isinstance(sampling, Sampling | None) else list(sampling)
    if len(found) != count:
        raise InputError(f"{len(found)} samplings were given for {count} prompts.", "", "Give one for all, or one for each.")
    for each in found:
        each.check()
    return found


def _check_room(ids: list[list[int]], samplings: list[Sampling], room: int) -> None:
    """Raises InputError that names every prompt that does not fit."""
    over = [(number, len(each), choice.max_new) for number, (each, choice) in enumerate(zip(ids, samplings, strict=True), 1)
            if len(each) + choice.max_new > room]  # fmt: skip
    if over:
        told = "; ".join(f"prompt {number} of {length} tokens and {new} new ones" for number, length, new in over)
        raise InputError(f"These do not fit: {told}.", f"There is room for {room} tokens together.", "Shorten those prompts, or ask for fewer new tokens.")


class _Choir:
    """The loop: read every prompt, then choose for every text that goes on, tell, and step them all."""

    def __init__(self, decoder: BatchDecoder, pens: list[Pen], on_token: Callable[[int, Token], None], should_stop: Callable[[], bool]) -> None:
        self.decoder, self.pens, self.on_token, self.should_stop = decoder, pens, on_token, should_stop
        self.said: list[list[Token]] = [[] for _ in pens]
        self.ends_s: list[float] = [0.0] * len(pens)
        self.began = time.monotonic()

    def sing(self) -> Batch:
        """Until every text has ended, or somebody stops all."""
        for row in range(self.decoder.size):
            self.decoder.drop(row)
        logits_PV: Tensor = torch.stack([self.decoder.prefill(row, pen.ids) for row, pen in enumerate(self.pens)])
        next_ids = [0] * self.decoder.size
        while True:
            self._choose(logits_PV.log_softmax(-1).cpu(), next_ids)
            if all(pen.done for pen in self.pens):
                return self._batch()
            logits_PV = self.decoder.step(next_ids)[: len(self.pens)]

    def _choose(self, logp_PV: Tensor, next_ids: list[int]) -> None:
        for row, pen in enumerate(self.pens):
            if pen.done:
                continue
            token = pen.take(logp_PV[row])
            if token is not None:
                self.said[row].append(token)
                next_ids[row] = token.id
                self.on_token(row, token)
            if self.should_stop():
                self._cancel()
            if pen.done:
                self.decoder.drop(row)
                self.ends_s[row] = time.monotonic() - self.began

    def _cancel(self) -> None:
        """A text that had its last token is done, not cancelled."""
        for row, pen in enumerate(self.pens):
            if not pen.done:
                pen.ended, self.ends_s[row] = "cancelled", time.monotonic() - self.began

    def _batch(self) -> Batch:
        texts = (Generation(pen.text + pen.pieces.flush(), tuple(said), pen.ended, len(pen.ids), seconds)
                 for pen, said, seconds in zip(self.pens, self.said, self.ends_s, strict=True))  # fmt: skip
        return Batch(tuple(texts), time.monotonic() - self.began)


def _one_by_one(model: nn.Module, tokenizer: Any, ids: list[list[int]], samplings: list[Sampling], on_token: Callable[[int, Token], None] | None,
                should_stop: Callable[[], bool], reason: str) -> Batch:  # fmt: skip
    """The same texts with one decoder. Once stopped, those that were not begun are empty and cancelled."""
    longest = max(len(each) + choice.max_new for each, choice in zip(ids, samplings, strict=True))
    decoder, began, texts, stopped = Decoder(model, tokenizer, longest), time.monotonic(), [], False
    for row, (each, choice) in enumerate(zip(ids, samplings, strict=True)):
        if stopped:
            texts.append(Generation("", (), "cancelled", len(each), 0.0))
            continue
        tell = None if on_token is None else lambda token, row=row: on_token(row, token)
        texts.append(generate(decoder, tokenizer, each, choice, tell, should_stop))
        stopped = texts[-1].ended == "cancelled"
    return Batch(tuple(texts), time.monotonic() - began, reason)
