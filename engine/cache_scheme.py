"""What the KV cache becomes: codes, a latent or a window, and what of that does not fit a model. Knows anatomies; holds no cache."""

from typing import Annotated, Literal

from pydantic import Field

from bitpress.engine.fields import Bits, GroupSize, Keep, Rank, Strict, Whole
from bitpress.engine.model.anatomy import Anatomy, Part

CACHED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")  # decoded by our own loop


class CacheSide(Strict):
    """Width of the cached keys or values; `axis` is what shares a scale."""

    bits: Bits
    axis: Literal["channel", "token"]
    group_size: GroupSize = 32


class CacheRank(Strict):
    """The cache holds the middle of factored key and value matrices: a share `keep` of their width, or `ranks`, one a block.

    heads: the rows of all heads are factored together (joint), or those of each head by themselves (each).
    """

    keep: Keep = 1.0
    ranks: tuple[Rank, ...] | None = None
    sides: Literal["both", "keys", "values"] = "both"
    heads: Literal["joint", "each"] = "joint"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the matrices that are factored."""
        return {"both": ("k", "v"), "keys": ("k",), "values": ("v",)}[self.sides]


class CacheWindow(Strict):
    """Tokens that stay in the cache: the first `sinks` and the last `recent`; those between are forgotten."""

    sinks: Annotated[Whole, Field(ge=0)] = 4
    recent: Annotated[Whole, Field(ge=1)]


class KVCache(Strict):
    """What the KV cache becomes; the last `residual_window` tokens stay dense."""

    keys: CacheSide | None = None
    values: CacheSide | None = None
    residual_window: Annotated[Whole, Field(ge=0)] = 0
    rank: CacheRank | None = None
    window: CacheWindow | None = None


def latent_width(latent: CacheRank, part: Part, anatomy: Anatomy) -> int:
    """Numbers a token that a latent cache holds of one side of a block; 0 where the share leaves less than one a head."""
    if latent.ranks is not None:
        return latent.ranks[part.block or 0]
    runs = anatomy.kv_heads if latent.heads == "each" else 1
    return runs * int(latent.keep * part.out_features / runs + 1e-9)


def cache_problems(cache: KVCache | None, anatomy: Anatomy) -> list[tuple[str, str, str]]:
    """What of a cache scheme does not fit a model: (field, what is wrong, what would be right)."""
    if cache is None:
        return []
    found = []
    if not (cache.keys or cache.values or cache.rank or cache.window):
        found.append(("kv_cache", "Nothing of the cache is changed.", "Set keys, values, rank or window, or remove the field."))
    if anatomy.architecture not in CACHED:
        found.append(("kv_cache", f"The cache of {anatomy.architecture} is not our own.", f"Use one of {', '.join(CACHED)}, or remove the field."))
    if cache.window and (cache.keys or cache.values or cache.rank):
        found.append(("kv_cache.window", "Forgotten tokens and a compressed cache cannot be had together.", "Set `window`, or the others."))
    for side, scheme in (("keys", cache.keys), ("values", cache.values)):
        found += [(f"kv_cache.{side}.group_size", *told) for told in _side_problems(scheme, anatomy)]
    found += [("kv_cache.rank", *told) for told in _latent_problems(cache.rank, anatomy)]
    return found


def _side_problems(side: CacheSide | None, anatomy: Anatomy) -> list[tuple[str, str]]:
    if side is None:
        return []
    if side.axis == "channel" and side.group_size == 0:
        return [("A channel has no row of tokens that ends.", "Give a number of tokens, such as 32.")]
    width = anatomy.kv_heads * anatomy.head_dim
    if side.axis == "token" and side.group_size > width:
        return [(f"{side.group_size} is more than the {width} channels that a token has.", f"Give at most {width}, or 'row'.")]
    return []


def _latent_problems(latent: CacheRank | None, anatomy: Anatomy) -> list[tuple[str, str]]:
    """What of a latent cache does not fit: (what is wrong, what would be right)."""
    if latent is None:
        return []
    parts = [part for part in anatomy.linears if part.role in latent.roles]
    if len(parts) != len(latent.roles) * anatomy.blocks:
        return [("This model has no key and value matrices of their own: they are fused.", "Remove the rank; keys and values can still have fewer bits.")]
    if latent.ranks is not None and len(latent.ranks) != anatomy.blocks:
        return [(f"There are {len(latent.ranks)} ranks for {anatomy.blocks} blocks.", "Give one a block, or only keep.")]
    found, runs = [], anatomy.kv_heads if latent.heads == "each" else 1
    widths = {part.name: latent_width(latent, part, anatomy) for part in parts}
    if past := next((part for part in parts if widths[part.name] > min(part.out_features, part.in_features)), None):
        found.append((f"Rank {widths[past.name]} is past the {past.out_features} that {past.name} can have.", f"Use at most {past.out_features}."))
    if any(width % runs for width in widths.values()):
        found.append((f"The ranks do not split over {runs} heads.", f"Use multiples of {runs}, or heads: joint."))
    if not all(widths.values()):
        least = runs / min(part.out_features for part in parts)
        found.append((f"keep {latent.keep:g} leaves less than one number a head: no rank meets it.", f"Use at least {least:.3g}."))
    return found
