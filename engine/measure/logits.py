"""From token ids to logits, a slice of positions at a time. Knows how a causal model splits into backbone and head; no losses.

The logits of one window of 2,048 tokens over 49,152 tokens of vocabulary take 400 MB in float32, and a divergence needs
several copies. So the backbone runs over the whole window once and the head over at most 256 positions at a time.
"""

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput

from bitpress.engine.decode import Decoder

MAX_POSITIONS = 256
SLICE_NUMBERS = 1 << 24  # logits a slice may hold: 64 MB in float32, whatever the vocabulary
PROBE_TOKENS = 8
CACHE_PIECE = 32  # tokens read at once through a compressed cache: the usual group of keys


class _Given(nn.Module):
    """Stands where the backbone was: hands back the hidden states it is given, in the kind of output the backbone makes."""

    kind: type[ModelOutput] = BaseModelOutputWithPast

    @property
    def decoder(self) -> "_Given":
        """OPT calls `model.decoder`, one level below its backbone."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> ModelOutput:
        return self.kind(last_hidden_state=inputs_embeds)


class Scorer(Protocol):
    """A causal model in two steps, so that logits can be made a few positions at a time."""

    vocab: int
    device: torch.device

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """What `logits` needs of every position, [B, T, D]; no KV cache is kept."""

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Logits [P, V] of P positions, in whatever type the head computes in."""


class SplitScorer:
    """A model as backbone and head.

    The head is the model's own `forward` with the backbone taken out, so a family's soft cap, scale or bias of the logits
    is honoured without being known here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.vocab, self.device = _vocab(model), _device(model)
        whole: Any = model  # nn.Module does not declare what transformers adds
        self._backbone = whole.base_model
        self._given = _Given()
        self._head = copy.copy(model)
        self._head._modules = {**model._modules, whole.base_model_prefix: self._given}

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Hidden states behind the final norm."""
        output = self._backbone(input_ids=ids_BT, use_cache=False)
        self._given.kind = type(output)
        return output.last_hidden_state

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """The model's own head on a slice of hidden states."""
        return self._head(inputs_embeds=hidden_PD[None], use_cache=False).logits[0]


class WholeScorer:
    """A model that cannot be split: its logits are made for the whole window at once, which costs memory and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        self.vocab, self.device = _vocab(model), _device(model)
        self._model = model

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """The logits themselves."""
        return self._model(input_ids=ids_BT, use_cache=False).logits

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """They are there already."""
        return hidden_PD


class CacheScorer:
    """A model with a compressed cache: every window is read in short pieces through the cache, as it would be in decoding.

    A piece's own tokens are seen as they are, so a token sees between `residual_window` and that many and a piece's more
    in full, where decoding has them leave the window one by one or a chunk at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.vocab, self.device = _vocab(model), _device(model)
        self._model = model
        self._decoder: Decoder | None = None

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Hidden states behind the final norm, a sequence at a time."""
        return torch.stack([self._read(ids_T) for ids_T in ids_BT])

    def _read(self, ids_T: Tensor) -> Tensor:
        decoder = self._reader(len(ids_T))
        decoder.reset()
        return torch.cat([decoder.extend(piece) for piece in ids_T.split(CACHE_PIECE)])

    def _reader(self, length: int) -> Decoder:
        if self._decoder is None or self._decoder.max_length < length:
            self._decoder = Decoder(self._model, None, length, next(self._model.parameters()).dtype)
        return self._decoder

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """The decoder's own head."""
        return self._reader(1).logits(hidden_PD)


def scorer_of(model: nn.Module) -> Scorer:
    """What scores a model: through its cache where that is compressed, else as `plain_scorer`."""
    return plain_scorer(model) if getattr(model, "kv_scheme", None) is None else CacheScorer(model)


def plain_scorer(model: nn.Module) -> Scorer:
    """The split of a model where it reproduces the model's own logits on a few tokens, else the model whole. Looks at no cache, and has gradients."""
    if answers_once(model):
        return WholeScorer(model)
    has_backbone = isinstance(model, PreTrainedModel) and model.base_model is not model
    if has_backbone and _reproduces(split := SplitScorer(model), model):
        return split
    return WholeScorer(model)


def answers_once(model: nn.Module) -> bool:
    """Whether a model classifies whole sequences: its logits are [B, C], and no position has any of its own."""
    return "ForSequenceClassification" in type(model).__name__


@torch.inference_mode()
def _reproduces(split: Scorer, model: nn.Module) -> bool:
    """A number from another function than the model's own would be wrong, so the split is tried before it is trusted."""
    ids_BT = torch.arange(1, PROBE_TOKENS + 1, device=split.device)[None] % split.vocab
    whole_TV = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    return torch.allclose(split.logits(split.hidden(ids_BT)[0]).float(), whole_TV, rtol=1e-2, atol=1e-2, equal_nan=True)


def _vocab(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def slices(positions: int, vocab: int) -> Iterator[slice]:
    """Cut `positions` into runs of at most 256, fewer where the vocabulary is so large that 256 would not stay small."""
    step = min(MAX_POSITIONS, max(1, SLICE_NUMBERS // vocab))
    return (slice(start, start + step) for start in range(0, positions, step))
