"""Lets models attend by the project's own kernel where there is one. Knows transformers' registry of attentions; refuses to know methods.

Every model that is loaded has it, dense and compressed alike. It steps aside, to torch's function, for whatever the kernel is
not made for: masks that say more than looking back, other types and devices, gradients, single tokens.
"""

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitpress.kernels.attention import attend_back, attends

NAME = "bitpress"
SPECIAL = ("dropout", "softcap", "position_bias", "cache")  # what only torch's function understands


def use_own(model: nn.Module) -> None:
    """Let a model that attends by torch's function attend by ours where that is possible; a model that attends otherwise stays as it is."""
    config: Any = model.config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = NAME


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: query [B, H, T, C], key and value [B, G, T, C]; returns [B, T, H, C]."""
    told = more.get("is_causal")
    causal = mask is None and (told if told is not None else getattr(module, "is_causal", True))
    if not causal or any(more.get(name) not in (None, 0.0) for name in SPECIAL) or not attends(query, key, value):
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    scale = more.get("scaling")
    return attend_back(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
