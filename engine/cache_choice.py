"""The widest KV cache within a budget, and what its width is foretold to lose. Knows cache schemes and scores; torch-free.

A cache's width costs nothing but cache, so the widest one that fits is the best one, whatever else is chosen.
"""

from collections.abc import Mapping

from bitpress.engine.accounting import cache_bytes
from bitpress.engine.cache_scheme import CacheSide, KVCache, cache_problems
from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.sensitivity_file import CACHE_BITS, cache_layer

WINDOW = 32  # tokens that stay dense
DENSE_BITS = 16


def cache_of(bits: int) -> KVCache | None:
    """Keys by channel and values by token at this width, the newest tokens dense; None for 16."""
    if bits == DENSE_BITS:
        return None
    return KVCache(keys=CacheSide(bits=bits, axis="channel"), values=CacheSide(bits=bits, axis="token"), residual_window=WINDOW)


def bytes_per_token(cache: KVCache | None, anatomy: Anatomy) -> float:
    """What a token's keys and values take, over a context that is full."""
    return cache_bytes(Recipe(model=anatomy.model, kv_cache=cache), anatomy, anatomy.context) / anatomy.context


def widest(limit: float, anatomy: Anatomy, table: Mapping[str, Mapping[str, float]]) -> tuple[KVCache | None, float]:
    """The widest cache within `limit` bytes a token, and the divergence that its width is foretold to cost.

    table: option -> layer -> score. Raises InputError for a limit that no width meets, a model whose cache is not our own, and missing scores.
    """
    for bits in (DENSE_BITS, *CACHE_BITS):
        cache = cache_of(bits)
        if bytes_per_token(cache, anatomy) <= limit * (1 + 1e-9):
            if cache and (wrong := cache_problems(cache, anatomy)):
                raise InputError("The cache of this model cannot be made smaller.", wrong[0][1], "Leave this budget away.")
            return cache, _harm(bits, anatomy, table)
    least = bytes_per_token(cache_of(CACHE_BITS[-1]), anatomy)
    what = f"A budget of {limit:.4g} bytes for the KV cache of a token cannot be met."
    raise InputError(what, f"At {CACHE_BITS[-1]} bits it takes {least:.5g} bytes.", f"Ask for {int(least) + 1} bytes or more.")


def _harm(bits: int, anatomy: Anatomy, table: Mapping[str, Mapping[str, float]]) -> float:
    if bits == DENSE_BITS:
        return 0.0
    scores = [table.get(f"{bits}-bit", {}).get(cache_layer(block)) for block in range(anatomy.blocks)]
    if None in scores:
        raise InputError("No sensitivity of the KV cache is kept.", "It was measured by an older Bitpress.", "Measure the sensitivity again, with --force.")
    return float(sum(score for score in scores if score is not None))
