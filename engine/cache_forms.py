"""The cache forms that are shown side by side, and a run's record of them. Knows recipes and one JSON file; no torch, so that the screens can hold it."""

from contextlib import suppress
from pathlib import Path

from bitpress.engine.errors import InputError
from bitpress.engine.kv_ranks import cache_of, kept_losses, spread_ranks
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import CacheRank, KVCache, Recipe

DENSE, LATENT, CODED, BOTH = "dense", "LoRC, 60%", "KIVI, 4 bit", "both"
SPLIT = "KIVI keys, LoRC values"
KEEP, VALUES, WINDOW = 0.6, 0.88, 32  # shares of the width; 4-bit keys and so many values are 60% of the bytes
CODES = {"keys": {"bits": 4, "axis": "channel"}, "values": {"bits": 4, "axis": "token"}, "residual_window": WINDOW}


def forms(anatomy: Anatomy, stats: Path | None = None) -> dict[str, Recipe]:
    """A recipe for each form. Ranks fall from the first block to the last where the spectra are known (`stats`), else all are alike.

    Values beside coded keys are there where it is known what each rank loses: which blocks keep how much decides what they are worth.
    """
    latent, lost = CacheRank(keep=KEEP), kept_losses(stats, anatomy) if stats is not None else None
    if stats is not None:
        with suppress(InputError):  # never inspected: the same rank everywhere
            latent = cache_of(anatomy, stats, KEEP).rank or latent
    coded = KVCache.model_validate(CODES)
    made = {DENSE: None, LATENT: KVCache(rank=latent), CODED: coded, BOTH: coded.model_copy(update={"rank": latent})}
    if lost is not None:
        spread = CacheRank(keep=VALUES, ranks=spread_ranks(lost, VALUES, anatomy.kv_heads), sides="values", heads="each")
        made[SPLIT] = coded.model_copy(update={"values": None, "rank": spread})
    return {name: _plan(anatomy.model, cache) for name, cache in made.items()}


def _plan(model: str, cache: KVCache | None) -> Recipe:
    method = "mixed-values" if cache and cache.rank and cache.rank.sides == "values" else "lorc"
    stages = [{"method": method}] if cache and cache.rank else []
    return Recipe.from_dict({"model": model, "stages": stages, **({"kv_cache": cache.model_dump(exclude_none=True)} if cache else {})})
