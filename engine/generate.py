"""Write text: greedy or sampled, token by token, each with what the model thought of it. Knows sampling and text; leaves the forward to `decode`.

Log-probabilities are natural, in float32, of the model itself: temperature and top-p shape the choice, never the figures.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine.decode import Decoder, context_overflow
from bitpress.engine.errors import InputError

ALTERNATIVES = 5
WINDOW = 8  # tokens decoded to tell one piece: enough to hold a character and the word before it
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for half a character


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: the most likely one. top_p: the smallest set of tokens with this share of the probability.

    seed: of this generation alone; two models with the same seed draw the same random numbers. stop: pieces of text after
    which to end, besides the model's own end tokens.
    """

    max_new: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises InputError for values that mean nothing."""
        if self.max_new < 1:
            raise InputError(f"max_new is {self.max_new}.", "At least one token must be asked for.", "Choose 1 or more.")
        if not 0 <= self.temperature <= 10:
            raise InputError(f"temperature is {self.temperature}.", "It lies between 0 (most likely token) and 10.", "Choose 0 to 1.5.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}.", "It is a share of the probability, above 0 and at most 1.", "Choose 1 to switch it off.")


@dataclass(frozen=True)
class Token:
    """One written token. text: the piece it adds (empty while a character is incomplete). rank: 0 for the most likely.

    top: the five most likely pieces with their probabilities. kl: divergence of this model from the reference at this
    position, in nats, None without a reference.
    """

    id: int
    text: str
    logprob: float
    rank: int
    top: tuple[tuple[str, float], ...]
    kl: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for an event; `kl` is left out when there is none."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Generation:
    """A finished text, prompt left out. ended: "stop" (end token or stop text), "length" (max_new) or "cancelled"."""

    text: str
    tokens: tuple[Token, ...]
    ended: str
    prompt_tokens: int
    seconds: float


class Detokenizer:
    """Token ids to text, piece by piece. A piece waits until its last character is whole; together the pieces are the decoded whole."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids, self.shown = list(prompt_ids), self._decode(prompt_ids)
        self._forget()

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def push(self, token_id: int) -> str:
        """The text that this token completes, "" while it completes none."""
        self.ids.append(token_id)
        text = self._decode(self.ids)
        return "" if text.endswith(BROKEN) else self._advance(text)

    def flush(self) -> str:
        """What is left when no token follows: broken bytes as the tokenizer writes them."""
        return self._advance(self._decode(self.ids))

    def _advance(self, text: str) -> str:
        piece, self.shown = text[len(self.shown) :], text
        self._forget()
        return piece

    def _forget(self) -> None:
        """Keep only the last tokens, so that a piece costs the same in a long text; unless that cuts a character in two."""
        text = self._decode(self.ids[-WINDOW:])
        if not text.startswith(BROKEN):
            self.ids, self.shown = self.ids[-WINDOW:], text


def generate(model: nn.Module | Decoder, tokenizer: Any, prompt: str | list[int], sampling: Sampling | None = None,
             on_token: Callable[[Token], None] | None = None, should_stop: Callable[[], bool] = lambda: False, reference: Decoder | None = None) -> Generation:
    """Continue a prompt.

    model: a Decoder, kept between calls, or a model to build one from. prompt: text, or token ids where a model wants a start
    token of its own. on_token: called with each token as it is chosen. reference: a decoder of the dense model; it reads
    the same tokens, and each token gets the KL divergence from it. Raises InputError when prompt and new tokens do not fit
    the context, the prompt is empty or sampling values mean nothing.
    """
    sampling = sampling or Sampling()
    sampling.check()
    decoder = model if isinstance(model, Decoder) else Decoder(model, tokenizer)
    ids = encode(tokenizer, prompt)
    for reader in (decoder, *([reference] if reference else [])):
        if len(ids) + sampling.max_new > reader.max_length:
            raise context_overflow(len(ids), sampling.max_new, reader.max_length)
    writer = Writer(decoder, tokenizer, ids, sampling, reference)
    began, tokens = time.monotonic(), []
    for token in writer:
        tokens.append(token)
        if on_token:
            on_token(token)
        if should_stop():
            writer.ended = "cancelled"
            break
    return Generation(writer.text + writer.pieces.flush(), tuple(tokens), writer.ended, len(ids), time.monotonic() - began)


class Pen:
    """One text as it is written: chooses each token, tells its piece, knows when to end. `text` grows with every piece; `ended` says why it stopped."""

    def __init__(self, model: nn.Module, tokenizer: Any, ids: list[int], sampling: Sampling) -> None:
        self.tokenizer, self.ids, self.sampling = tokenizer, ids, sampling
        self.pieces, self.text, self.ended = Detokenizer(tokenizer, ids), "", "length"
        self.ends = end_tokens(model, tokenizer)
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.written = 0

    @property
    def done(self) -> bool:
        """Whether no token may follow."""
        return self.ended != "length" or self.written == self.sampling.max_new

    def take(self, logp_V: Tensor, kl: float | None = None) -> Token | None:
        """The next token from its log-probabilities, float32 on the CPU; None when it is one that ends the text."""
        token_id = choose(logp_V, self.sampling, self.generator)
        if token_id in self.ends:
            self.ended = "stop"
            return None
        piece = self.pieces.push(token_id)
        self.text, self.written = self.text + piece, self.written + 1
        if any(stop in self.text for stop in self.sampling.stop):
            self.ended = "stop"
        return Token(token_id, piece, float(logp_V[token_id]), int((logp_V > logp_V[token_id]).sum()), _likeliest(self.tokenizer, logp_V), kl)


class Writer(Pen):
    """The loop of one text: choose, tell, step."""

    def __init__(self, decoder: Decoder, tokenizer: Any, ids: list[int], sampling: Sampling, reference: Decoder | None) -> None:
        super().__init__(decoder.model, tokenizer, ids, sampling)
        self.decoder, self.reference = decoder, reference

    def __iter__(self) -> Iterator[Token]:
        given: list[int] = []
        while not self.done:
            logp_V = _next(self.decoder, self.ids, given)
            kl = None if self.reference is None else float(divergence(_next(self.reference, self.ids, given), logp_V))
            token = self.take(logp_V, kl)
            if token is None:
                return
            given = [token.id]
            yield token


def _next(decoder: Decoder, prompt: list[int], given: list[int]) -> Tensor:
    """Log-probabilities [V] after the prompt, or after one more token. On the CPU, where choosing is cheap."""
    logits_V = decoder.step(given[0]) if given else decoder.prefill(prompt)
    return logits_V.log_softmax(-1).cpu()


def choose(logp_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id from float32 log-probabilities: the most likely at temperature 0, else drawn from the nucleus (Holtzman et al., 2020)."""
    if sampling.temperature == 0:
        return int(logp_V.argmax())
    p_V, ids_V = (logp_V / sampling.temperature).softmax(-1).sort(descending=True)
    nucleus_V = p_V * (p_V.cumsum(-1) - p_V < sampling.top_p)
    return int(ids_V[torch.multinomial(nucleus_V, 1, generator=generator)])


def _likeliest(tokenizer: Any, logp_V: Tensor) -> tuple[tuple[str, float], ...]:
    best = logp_V.topk(min(ALTERNATIVES, len(logp_V)))
    return tuple((tokenizer.decode([index]), math.exp(value)) for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True))


def divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) in nats over the last axis, at least 0: [] for [V], [T] for [T, V]. A token p never gives adds nothing."""
    terms = torch.where(logp == -math.inf, 0.0, logp.exp() * (logp - logq))
    return terms.sum(-1).clamp(min=0)


def encode(tokenizer: Any, prompt: str | list[int]) -> list[int]:
    """The prompt's token ids, as the tokenizer puts start tokens; its BOS alone for an empty prompt. Raises InputError when nothing is left."""
    ids = list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise InputError("The prompt is empty.", "There is no token to continue.", "Write at least one word.")
    return ids


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Ids that end a text: those of the model's generation config, and the tokenizer's own."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return {index for index in (*ids, tokenizer.eos_token_id) if index is not None}


def teacher_forced(decoder: Decoder, ids: Tensor | list[int]) -> Tensor:
    """Log-probabilities [T - 1], float32, that a model gives to each token of a text after those before it."""
    ids_T = torch.as_tensor(ids, dtype=torch.long).reshape(-1)
    found, start = [], 1
    for logp_TV in decoder.log_probabilities(ids_T[:-1]):
        next_T = ids_T[start : start + len(logp_TV)].to(logp_TV.device)
        found.append(logp_TV.gather(1, next_T[:, None])[:, 0])
        start += len(logp_TV)
    return torch.cat(found).cpu()


def divergence_along(dense: Decoder, other: Decoder, ids: Tensor | list[int]) -> list[float]:
    """KL(dense || other) in nats of what follows each position of a text but the last: T - 1 numbers, in slices of 256 positions."""
    ids_T = torch.as_tensor(ids, dtype=torch.long).reshape(-1)[:-1]
    pairs = zip(dense.log_probabilities(ids_T), other.log_probabilities(ids_T), strict=True)
    return [value for logp_TV, logq_TV in pairs for value in divergence(logp_TV, logq_TV.to(logp_TV.device)).tolist()]
