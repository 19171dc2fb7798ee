"""Decoding at batch 1 with a static KV cache, over dense or packed layers alike. Knows token ids and logits; no text and no sampling.

Llama, Mistral, Qwen2 and Qwen3 run in a loop of our own (`_OwnLoop`): fused q-k-v and gate-up, a cache allocated once, the
same code whatever the layers hold, so that a speed-up is the layers' and not the loop's. Every other model runs through
transformers' forward with its cache (`TransformersLoop`), behind the same calls. Shape letters: T positions, D hidden
width, H heads, C channels of a head, V vocabulary.

Types on a CPU, the same for dense and packed: steps and short pieces (up to 8 tokens) in bfloat16, since reading the
weights is all that costs; longer pieces in what the machine multiplies fastest (`compute_dtype`); the cache in bfloat16.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.engine import decode_graph
from bitpress.engine.decode_block import Block, Norm
from bitpress.engine.decode_plain import TransformersLoop
from bitpress.engine.errors import InputError
from bitpress.engine.model.load import compute_dtype
from bitpress.kernels import cpu_step
from bitpress.kernels.attention import attend_back, attends
from bitpress.kernels.cpu_token import EndParts, TokenStep
from bitpress.kernels.rows import join

Turn = Callable[[Block, Tensor, Tensor], Tensor]
OWN_LOOP = ("llama", "mistral", "qwen2", "qwen3")
MOVING_ROPE = ("dynamic", "longrope")  # frequencies that change with the length: no table holds them
SHORT = 8  # tokens up to which a piece is bound by reading the weights, as a step is
LOGIT_ROWS = 256  # positions whose logits exist at a time


class Decoder:
    """A model ready to write one sequence, token by token.

    model: a causal language model of transformers, its linears dense or packed. max_length: positions the cache has room
    for; None for the model's whole context. dtype: one type for everything, None for the rule above. Building a decoder
    joins q, k, v and gate, up in the model's own storage; weights in another type than the steps' are copied. Raises InputError
    as `check_cache`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, max_length: int | None = None, dtype: torch.dtype | None = None) -> None:
        self.tokenizer = tokenizer
        self.model: Any = model  # families agree on names, not on a type
        self.max_length = room_for(model, max_length)
        self.device = next(model.parameters()).device
        self.step_dtype, self.piece_dtype = step_types(model, self.device, dtype)
        self.reason = why_not_own(model, self.max_length)
        check_cache(model, self.max_length)
        with torch.inference_mode(False), torch.no_grad():
            self._loop: _OwnLoop | TransformersLoop = self._own_loop() if self.reason is None else TransformersLoop(self)

    def _own_loop(self) -> "_OwnLoop":
        if getattr(self.model, "kv_scheme", None) is None:
            return self._plain_loop()
        from bitpress.engine.kv_loop import CacheLoop  # built on this module

        return CacheLoop(self)

    def _plain_loop(self) -> "_OwnLoop":
        """Where a step can be captured and replayed, the loop whose steps have static shapes."""
        recorder = decode_graph.recorder_for(self.device)
        if recorder is None:
            return _OwnLoop(self)
        from bitpress.engine.decode_batch import BatchLoop  # built on this module

        return BatchLoop(self, 1, recorder)

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return self._loop.position

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache's tensors that hold the tokens so far; 0 where the cache is not our own."""
        return self._loop.cache_bytes

    @property
    def conditions(self) -> dict[str, str]:
        """What a figure measured with this decoder holds under, for its protocol."""
        names = (("step_dtype", self.step_dtype), ("prefill_dtype", self.piece_dtype), ("kv_dtype", self._loop.cache_dtype))
        loop = "transformers, cache: " + self.reason if self.reason else "own, static cache"
        scheme = getattr(self.model, "kv_scheme", None)
        held = {} if scheme is None else {"kv_cache": scheme.model_dump_json(exclude_none=True)}
        return {"loop": loop, **{key: str(value).removeprefix("torch.") for key, value in names}, **held, **self._loop.extra_conditions}

    def reset(self) -> None:
        """Forget all tokens."""
        self._loop.reset()

    @torch.inference_mode()
    def prefill(self, ids: Tensor | list[int]) -> Tensor:
        """Start anew on a prompt. ids: [T] or [1, T], at least one. Returns the next token's logits [V], float32. Raises InputError beyond the length."""
        self.reset()
        return self._loop.logits(self.extend(ids)[-1:])[0]

    @torch.inference_mode()
    def step(self, token_id: int) -> Tensor:
        """Add one token. Returns the next one's logits [V], float32. Raises InputError when the cache is full."""
        if self.position >= self.max_length:
            raise context_overflow(self.position, 1, self.max_length)
        return self._loop.next_logits(token_id)

    @torch.inference_mode()
    def extend(self, ids: Tensor | list[int]) -> Tensor:
        """Add tokens. ids: [T] or [1, T]. Returns their last hidden states [T, D], before the head."""
        ids_T = torch.as_tensor(ids, dtype=torch.long, device=self.device).reshape(-1)
        if not len(ids_T):
            raise InputError("There is no token to start from.", "The prompt is empty and the model has no start token.", "Write at least one word.")
        if self.position + len(ids_T) > self.max_length:
            raise context_overflow(self.position, len(ids_T), self.max_length)
        return self._loop.extend(ids_T)

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V], float32, of what `extend` returned."""
        return self._loop.logits(hidden_TD)

    @torch.inference_mode()
    def log_probabilities(self, ids: Tensor | list[int]) -> Iterator[Tensor]:
        """Start anew and yield float32 log-probabilities [<= 256, V] of what follows each position of ids, slice by slice."""
        self.reset()
        hidden_TD = self.extend(ids)
        for piece_TD in hidden_TD.split(LOGIT_ROWS):
            yield self._loop.logits(piece_TD).log_softmax(dim=-1)


def context_overflow(prompt: int, new: int, limit: int) -> InputError:
    """The refusal of more tokens than there is room for."""
    what = f"A prompt of {prompt} tokens and {new} new ones do not fit."
    return InputError(what, f"There is room for {limit} together.", f"Shorten the prompt, or ask for at most {max(0, limit - prompt)} new tokens.")


def room_for(model: Any, max_length: int | None) -> int:
    """Positions of a cache: so many as are asked for, at most the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(length for length in (max_length, context, 1 << 20) if length)


def step_types(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """(type of steps, type of longer pieces)."""
    if dtype is not None:
        return dtype, dtype
    if device.type == "cpu":
        return torch.bfloat16, compute_dtype("cpu")
    own = next(model.parameters()).dtype
    return own, own


def why_not_own(model: Any, max_length: int) -> str | None:
    """Why our own loop cannot run this model, in words; None when it can."""
    config = model.config.get_text_config()
    if config.model_type not in OWN_LOOP:
        return f"our own loop does not know {config.model_type or type(model).__name__} models"
    if any(module._forward_pre_hooks for module in model.modules()):
        return "something is done to the inputs of a layer (a rotation)"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in MOVING_ROPE:
        return f"positions of type {rope} change with the length"
    window = getattr(config, "sliding_window", None)
    sliding = config.model_type == "mistral" or "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if window and sliding and window < max_length:
        return f"attention slides over {window} tokens, fewer than {max_length}"
    return None


def check_cache(model: Any, max_length: int = 1) -> None:
    """Raises InputError for a model with a compressed cache that only transformers' loop can run: it would keep a plain one."""
    reason = why_not_own(model, max_length)
    if reason and getattr(model, "kv_scheme", None) is not None:
        why = f"{reason[0].upper()}{reason[1:]}."
        raise InputError("The KV cache of this model cannot be compressed.", why, "Leave out `kv_cache`, or what stands against it.")


class _OwnLoop:
    """Llama-like blocks, each over its own part of a static cache: [1, KV heads of keys then of values, position, channel]."""

    def __init__(self, decoder: Decoder) -> None:
        model, config = decoder.model, decoder.model.config.get_text_config()
        self.step_dtype, self.piece_dtype, self.cache_dtype, self.position = decoder.step_dtype, decoder.piece_dtype, decoder.step_dtype, 0
        self.embed, self.blocks = model.model.embed_tokens, [Block(block, config.hidden_act, self.step_dtype) for block in model.model.layers]
        self.norm, self.head = Norm(model.model.norm, self.step_dtype), join([model.get_output_embeddings()], self.step_dtype)
        attention = model.model.layers[0].self_attn
        self.channels, self.scale = attention.head_dim, attention.scaling
        self.cos, self.sin = self._rotary(model.model.rotary_emb, decoder)
        self._allocate(decoder)
        plain = all(block.activation is F.silu and not block.head_norms and block.key_head_of is None for block in self.blocks)
        self.fused_steps = plain and decoder.device.type == "cpu" and self.step_dtype == torch.bfloat16 and cpu_step.available()

    @property
    def extra_conditions(self) -> dict[str, str]:
        """What a figure of this loop holds under, beside the types."""
        return {}

    @cached_property
    def whole_step(self) -> TokenStep | None:
        """All blocks of a step as one call; None where they differ in shape or some part has no such path. Laying codes out takes a moment."""
        alike = len({(block.heads, block.kv_heads, block.neurons) for block in self.blocks}) == 1
        return TokenStep.of([block.parts for block in self.blocks], self.ends) if alike else None

    @property
    def ends(self) -> EndParts:
        """What stands before and behind the blocks."""
        return EndParts(self.embed, (self.norm.weight_D, self.norm.epsilon), self.head)

    def _allocate(self, decoder: Decoder) -> None:
        sizes = [2 * block.kv_heads for block in self.blocks]  # planes of keys and values of each block, in one tensor
        joined = torch.empty(sum(sizes), decoder.max_length, self.channels, dtype=self.cache_dtype, device=decoder.device)
        self.caches = [part[None] for part in joined.split(sizes)]
        self.cache = joined.view(len(sizes), 1, sizes[0], *joined.shape[1:]) if len(set(sizes)) == 1 else joined

    @property
    def cache_bytes(self) -> int:
        """Bytes of the positions that are filled."""
        return sum(cache[:, :, : self.position].numel() * cache.element_size() for cache in self.caches)

    def _rotary(self, rotary: nn.Module, decoder: Decoder) -> tuple[Tensor, Tensor]:
        """Tables [position, 1, C]. The sine's first half is negated, so that turning is x * cos + roll(x, C / 2) * sin."""
        positions = torch.arange(decoder.max_length, device=decoder.device)[None]
        cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=decoder.device), positions)
        half = self.channels // 2
        return cos[0][:, None], torch.cat((-sin[0][:, :half], sin[0][:, half:]), dim=-1)[:, None]

    def _turning(self, start: int, stop: int, dtype: torch.dtype) -> Turn:
        """What turns the queries and keys [T, heads of q, k and v, C] of these positions, writes keys and values, and returns the queries."""
        if self.fused_steps and dtype == torch.bfloat16:
            cos_TC, sin_TC = self.cos[start:stop, 0], self.sin[start:stop, 0]
            return lambda block, qkv_THC, new: cpu_step.turn_rows(qkv_THC, cos_TC, sin_TC, new, block.heads)
        angles = self._angles(start, stop, dtype)

        def turn(block: Block, qkv_THC: Tensor, new: Tensor) -> Tensor:
            cos, sin = angles[block.heads, block.kv_heads]
            qkv_THC = block.normed_heads(qkv_THC)
            qkv_THC = torch.addcmul(qkv_THC * cos, qkv_THC.roll(self.channels // 2, -1), sin)
            new.copy_(qkv_THC[:, block.heads :].transpose(0, 1))
            return qkv_THC[:, : block.heads]

        return turn

    def _angles(self, start: int, stop: int, dtype: torch.dtype) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """For each pair of head counts that blocks have, cosines and sines [T, heads of q, k and v, C] of these positions.

        Values are turned by 0, so that one product does for all.
        """
        made = {}
        for heads, kv_heads in {(block.heads, block.kv_heads) for block in self.blocks}:
            cos, sin = (table[start:stop].to(dtype).expand(-1, heads + kv_heads, -1) for table in (self.cos, self.sin))
            still = (0, 0, 0, kv_heads)
            made[heads, kv_heads] = F.pad(cos, still, value=1.0), F.pad(sin, still)
        return made

    def reset(self) -> None:
        self.position = 0

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V], float32."""
        return self.head(hidden_TD.to(self._dtype_for(len(hidden_TD)))).float()

    def next_logits(self, token_id: int) -> Tensor:
        """Add one token; the next one's logits [V], float32."""
        step = self.whole_step if self.fused_steps else None
        if step is None or step.ends is None:
            return self.logits(self.extend(torch.tensor([token_id], device=self.cos.device)))[0]
        at, first = self.position, self.blocks[0]
        x_1D = self.room_1D if step.looks_up else self.embed(torch.tensor([token_id])).to(self.step_dtype).contiguous()
        self.position = at + 1
        return step.logits(token_id, x_1D, self.cos[at, 0], self.sin[at, 0], self.cache, at, first.heads, self.scale, first.neurons)

    @cached_property
    def room_1D(self) -> Tensor:
        """Where a step keeps a token's state."""
        return torch.empty(1, self.norm.width, dtype=self.step_dtype)

    def _dtype_for(self, length: int) -> torch.dtype:
        return self.step_dtype if length <= SHORT else self.piece_dtype

    def extend(self, ids_T: Tensor) -> Tensor:
        start, stop = self.position, self.position + len(ids_T)
        dtype = self._dtype_for(len(ids_T))
        if len(ids_T) == 1 and self.fused_steps:
            return self._step(ids_T)
        turn = self._turning(start, stop, dtype)
        x_TD = self.embed(ids_T).to(dtype)
        for block, cache in zip(self.blocks, self.caches, strict=True):
            x_TD = x_TD + block.out(self._attend(block, block.attention_norm(x_TD), turn, cache, start))
            x_TD = x_TD + block.down(block.gated(block.gate_up(block.mlp_norm(x_TD))))
        self.position = stop
        return self.norm(x_TD)

    def _step(self, ids_1: Tensor) -> Tensor:
        """One token on a CPU: the same sums as below with one call where torch takes several, or with one for all blocks."""
        at = self.position
        x_1D, cos_C, sin_C = self.embed(ids_1).to(self.step_dtype), self.cos[at, 0], self.sin[at, 0]
        if self.whole_step is not None:
            first = self.blocks[0]
            self.position = at + 1
            return self.norm(self.whole_step(x_1D.contiguous(), cos_C, sin_C, self.cache, at, first.heads, self.scale, first.neurons))
        for block, cache in zip(self.blocks, self.caches, strict=True):
            qkv = block.qkv(block.attention_norm(x_1D))
            x_1D = x_1D + block.out(cpu_step.attend_one(qkv, cos_C, sin_C, cache[0], at, block.heads, self.scale))
            x_1D = x_1D + block.down(block.gated(block.gate_up(block.mlp_norm(x_1D))))
        self.position = at + 1
        return self.norm(x_1D)

    def _attend(self, block: Block, x_TD: Tensor, turn: Turn, cache: Tensor, start: int) -> Tensor:
        """Write the positions from `start` on to the cache and mix what they see: [T, heads * C], before the output matrix."""
        stop = start + len(x_TD)
        qkv_THC = block.qkv(x_TD).view(len(x_TD), -1, self.channels)
        query_THC = turn(block, qkv_THC, cache[0, :, start:stop])
        keys, values = cache[:, : block.kv_heads, :stop], cache[:, block.kv_heads :, :stop]
        if block.key_head_of is not None:
            keys, values = (side.index_select(1, block.key_head_of) for side in (keys, values))
        mix = self._mix_one if len(x_TD) == 1 else self._mix
        return mix(query_THC, keys, values)

    def _mix_one(self, query_1HC: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Query heads that share a key head stand in for positions: nothing is repeated and nothing masked."""
        query = query_1HC.view(1, keys.shape[1], -1, self.channels)
        return F.scaled_dot_product_attention(query, keys, values, scale=self.scale).view(1, -1)

    def _mix(self, query_THC: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if attends(query_THC.transpose(0, 1)[None], keys, values):
            return attend_back(query_THC.transpose(0, 1)[None], keys, values, self.scale).view(len(query_THC), -1)
        length, repeats = len(query_THC), query_THC.shape[1] // keys.shape[1]
        keys, values = (side.to(query_THC.dtype).repeat_interleave(repeats, dim=1) for side in (keys, values))
        query, mask = query_THC.transpose(0, 1)[None], None
        if self.position:
            mask = torch.ones(length, keys.shape[2], dtype=torch.bool, device=keys.device).tril(self.position)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        return mixed[0].transpose(0, 1).reshape(length, -1)
