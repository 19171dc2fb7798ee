"""Decoding several sequences at once over the blocks of `decode`. Knows token ids, rows and logits; no text and no sampling.

Every sequence has a row of a static cache and a position of its own. A prompt is read by itself, exactly as alone; a step adds one
token to every row in the same operations on the same tensors, whatever the positions are: nothing is read back and nothing branches on
data, so that it can be captured. Attention looks at a window of positions, the smallest power of two that holds the longest sequence,
masked by each row's own position. Shape letters: B sequences, S positions of the window, D hidden width, H heads, C channels of a head, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.engine import decode_graph
from bitpress.engine.decode import Decoder, _OwnLoop, context_overflow, room_for, step_types, why_not_own
from bitpress.engine.decode_block import Block
from bitpress.engine.errors import InputError

WINDOW = 128  # positions of the smallest window
ALONE = "Write the texts one after another with Decoder, or `bitpress generate` with one prompt."


class BatchDecoder:
    """A model ready to write `size` sequences at once.

    model: as for `Decoder`, of a family that has a loop of our own. max_length: positions of each sequence; None for the model's context.
    dtype: one type for everything, None for the rule of `decode`. compiled: steps through `torch.compile`, where that can be.
    Raises InputError for a size below 1 and for a model that `why_not_batched` names.
    """

    def __init__(self, model: nn.Module, size: int, tokenizer: Any = None, max_length: int | None = None, dtype: torch.dtype | None = None,
                 compiled: bool = False) -> None:  # fmt: skip
        if size < 1:
            raise InputError(f"A batch of {size} cannot be decoded.", "It has at least one sequence.", "Choose 1 or more.")
        self.model: Any = model
        self.tokenizer, self.size, self.max_length = tokenizer, size, room_for(model, max_length)
        reason = why_not_batched(model, self.max_length)
        if reason:
            raise InputError("This model cannot be decoded in a batch.", f"{reason[0].upper()}{reason[1:]}.", ALONE)
        self.device = next(model.parameters()).device
        self.step_dtype, self.piece_dtype = step_types(model, self.device, dtype)
        self.lengths, self.dropped = [0] * size, [True] * size
        with torch.inference_mode(False), torch.no_grad():
            self._loop = BatchLoop(self, size, decode_graph.recorder_for(self.device), compiled)

    @property
    def conditions(self) -> dict[str, str]:
        """As `Decoder.conditions`."""
        prefill, step = self.piece_dtype, self._loop.dtype
        names = {"step_dtype": step, "prefill_dtype": prefill, "kv_dtype": self._loop.cache_dtype}
        types = {key: str(value).removeprefix("torch.") for key, value in names.items()}
        return {"loop": "own, static cache, a batch", **types, **self._loop.extra_conditions}

    @torch.inference_mode()
    def prefill(self, row: int, ids: Tensor | list[int]) -> Tensor:
        """Start a row anew on a prompt, whatever the other rows do. ids: [T]. Returns the next token's logits [V], float32.

        Raises InputError for an empty prompt and one that is longer than there is room for.
        """
        ids_T = torch.as_tensor(ids, dtype=torch.long, device=self.device).reshape(-1)
        if not len(ids_T):
            raise InputError(f"Prompt {row + 1} is empty.", "There is no token to start from.", "Write at least one word.")
        if len(ids_T) > self.max_length:
            raise context_overflow(len(ids_T), 0, self.max_length)
        self.lengths[row], self.dropped[row] = len(ids_T), False
        return self._loop.fill(row, ids_T)

    @torch.inference_mode()
    def step(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Add one token to every row. ids: [B], any for rows that are dropped. Returns logits [B, V], float32; those of dropped rows mean nothing.

        Raises InputError when a row that is written is full, or the number of tokens is another than that of rows.
        """
        ids_B = torch.as_tensor(ids, dtype=torch.long)
        if ids_B.shape != (self.size,):
            raise InputError(f"Tokens of shape {list(ids_B.shape)} were given.", f"A step of this batch takes {self.size}.", "Give one for each row.")
        active = [row for row in range(self.size) if not self.dropped[row]]
        full = next((row for row in active if self.lengths[row] >= self.max_length), None)
        if full is not None:
            raise context_overflow(self.lengths[full], 1, self.max_length)
        for row in active:
            self.lengths[row] += 1
        return self._loop.step(ids_B, max((self.lengths[row] for row in active), default=1))

    def drop(self, row: int) -> None:
        """A finished sequence: it goes on being stepped with the others, to no effect."""
        self.dropped[row] = True


def why_not_batched(model: Any, max_length: int) -> str | None:
    """Why a model cannot be decoded in a batch, in words; None when it can."""
    if getattr(model, "kv_scheme", None) is not None:
        return "its KV cache is compressed, and that cache holds one sequence"
    return why_not_own(model, room_for(model, max_length))


class BatchLoop(_OwnLoop):
    """The same blocks, each over a cache [B, KV heads of keys then of values, position, channel]. `caches` shows the row that a prompt is read into."""

    def __init__(self, decoder: Decoder | BatchDecoder, size: int, recorder: decode_graph.Recorder | None = None, compiled: bool = False) -> None:
        self.size, self.capacity = size, decoder.max_length
        super().__init__(cast(Decoder, decoder))  # whose model, device, types and length are all that it asks for
        self.fused_steps = False  # that path knows one row
        self.dtype = self._dtype_for(size)
        device = decoder.device
        self.ids_B, self.positions_B, self.rows_B = (torch.zeros(size, dtype=torch.long, device=device) for _ in range(3))
        self.rows_B += torch.arange(size, device=device)
        self.places_S = torch.arange(self.capacity, device=device)
        self.stepper = decode_graph.Stepper(self.run, self.positions_B, recorder, compiled)

    @property
    def extra_conditions(self) -> dict[str, str]:
        """Whether steps are replayed, and why not."""
        return self.stepper.words

    def _allocate(self, decoder: Decoder | BatchDecoder) -> None:
        """Zeros: a masked position counts nothing, but no number times nothing is no number."""
        room = decoder.max_length, self.channels
        self.held = [torch.zeros(self.size, 2 * block.kv_heads, *room, dtype=self.cache_dtype, device=decoder.device) for block in self.blocks]
        self._show(0)

    def _show(self, row: int) -> None:
        self.caches = [cache[row : row + 1] for cache in self.held]

    def fill(self, row: int, ids_T: Tensor) -> Tensor:
        """Read a prompt into a row, as `Decoder.prefill`. Returns [V], float32."""
        self._show(row)
        self.reset()
        hidden_TD = self.extend(ids_T)
        self.positions_B[row] = len(ids_T)
        return self.logits(hidden_TD[-1:])[0]

    def step(self, ids_B: Tensor, longest: int) -> Tensor:
        """One token for every row. longest: positions that the longest sequence has with it. Returns [B, V], float32."""
        self.ids_B.copy_(ids_B)
        return self.stepper(window(longest, self.capacity))

    def next_logits(self, token_id: int) -> Tensor:
        """As the loop of one sequence, for row 0."""
        self.ids_B.fill_(token_id)
        self.positions_B.fill_(self.position)  # tokens may have come in pieces since the last step
        self.position += 1
        return self.stepper(window(self.position, self.capacity))[0]

    def run(self, seen: int) -> Tensor:
        """The step on the tensors `ids_B`, `positions_B` and the cache, of which it looks at `seen` positions. Moves every position on by one."""
        cos, sin = (table[self.positions_B].to(self.dtype) for table in (self.cos, self.sin))
        mask = (self.places_S[:seen] <= self.positions_B[:, None])[:, None, None]
        x_BD = self.embed(self.ids_B).to(self.dtype)
        for block, cache in zip(self.blocks, self.held, strict=True):
            x_BD = x_BD + block.out(self._attend_rows(block, block.attention_norm(x_BD), cos, sin, cache, mask))
            x_BD = x_BD + block.down(block.gated(block.gate_up(block.mlp_norm(x_BD))))
        self.positions_B.add_(1).clamp_(max=self.capacity - 1)  # a dropped row stays inside its cache
        return self.logits(self.norm(x_BD))

    def _attend_rows(self, block: Block, x_BD: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        """Write each row's key and value at its position and mix what it may see: [B, heads * C]. cos, sin: [B, 1, C]. mask: bool [B, 1, 1, S]."""
        qkv_BHC = block.qkv(x_BD).view(self.size, -1, self.channels)
        query, key, value = qkv_BHC.split((block.heads, block.kv_heads, block.kv_heads), dim=1)
        if block.head_norms:
            query, key = (norm(part) for norm, part in zip(block.head_norms, (query, key), strict=True))
        turned = torch.cat((query, key), dim=1)
        turned = torch.addcmul(turned * cos, turned.roll(self.channels // 2, -1), sin)
        cache[self.rows_B, :, self.positions_B] = torch.cat((turned[:, block.heads :], value), dim=1).to(cache.dtype)
        keys, values = cache[:, :, : mask.shape[-1]].to(x_BD.dtype).split(block.kv_heads, dim=1)
        if block.key_head_of is not None:
            keys, values = (side.index_select(1, block.key_head_of) for side in (keys, values))
        query = turned[:, : block.heads].reshape(self.size, keys.shape[1], -1, self.channels)  # heads that share a key head stand in for positions
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale).reshape(self.size, -1)


def window(longest: int, capacity: int) -> int:
    """Positions to look at: the smallest power of two from WINDOW on that holds the longest sequence, at most all."""
    seen = WINDOW
    while seen < longest:
        seen *= 2
    return min(seen, capacity)
