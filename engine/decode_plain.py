"""Decoding through transformers' own forward and cache, for families that our loop does not know. Knows token ids and logits.

Shape letters as in `decode`.
"""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitpress.kernels.packed import PackedEmbedding, PackedLinear


class TransformersLoop:
    """transformers' own forward. Models that keep no cache are run anew on the whole prefix."""

    def __init__(self, decoder: Any) -> None:
        """decoder: the `decode.Decoder` that it works for, whose types it settles."""
        self.model, self.device = _in_dtype(decoder.model, decoder.step_dtype), decoder.device
        decoder.piece_dtype = decoder.step_dtype  # one copy of the weights, one type
        self.cache_dtype = decoder.step_dtype
        self.reset()

    cache_bytes = 0
    extra_conditions: ClassVar[dict[str, str]] = {}

    def reset(self) -> None:
        """Forget all tokens."""
        self.position, self.keeps_cache = 0, True
        self.cache: Any = None
        self.seen_T: Tensor | None = None

    def extend(self, ids_T: Tensor) -> Tensor:
        """Logits stand in for hidden states here: forwards of all families agree on no other output."""
        given_T = ids_T if self.keeps_cache or self.seen_T is None else torch.cat((self.seen_T, ids_T))
        more = {"past_key_values": self.cache, "use_cache": True} if self.keeps_cache else {}
        output = self.model(input_ids=given_T[None], **more)
        self.cache = getattr(output, "past_key_values", None)
        self.keeps_cache = self.cache is not None
        self.seen_T = ids_T if self.seen_T is None else torch.cat((self.seen_T, ids_T))
        self.position += len(ids_T)
        return output.logits[0, -len(ids_T) :]

    def logits(self, hidden_TV: Tensor) -> Tensor:
        """[T, V], float32."""
        return hidden_TV.float()

    def next_logits(self, token_id: int) -> Tensor:
        """Add one token; the next one's logits [V], float32."""
        return self.logits(self.extend(torch.tensor([token_id], device=self.device)))[0]


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself when its dense weights have this type, else a copy that has; packed codes are shared, never copied."""
    if all(weight.dtype == dtype for weight in model.parameters()):
        return model
    packed = [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    shared = {id(buffer): buffer for module in packed for buffer in module.buffers()}
    return copy.deepcopy(model, memo=shared).to(dtype)
