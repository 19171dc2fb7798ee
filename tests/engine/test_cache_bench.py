"""Cache forms measured: bytes are the tensors', a step behind noise costs what it costs, every form is in every record."""

from collections.abc import Callable
from typing import Any

import torch

from bitpress.engine.accounting import cache_bytes
from bitpress.engine.cache_bench import fill, measure_caches, step_times
from bitpress.engine.compress import compress
from bitpress.engine.decode import Decoder
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe

IDS = torch.arange(96).view(2, 48) * 7 % 320
CODES = {"keys": {"bits": 4, "axis": "channel"}, "values": {"bits": 4, "axis": "token"}, "residual_window": 8}


def plans() -> dict[str, Recipe]:
    latent = {"kv_cache": {"rank": {"keep": 0.5}}, "stages": [{"method": "lorc"}]}
    return {name: Recipe.from_dict({"model": "llama", **fields}) for name, fields in (("dense", {}), ("latent", latent), ("coded", {"kv_cache": CODES}))}


def test_a_filled_cache_has_the_bytes_of_so_many_tokens(in_memory: Callable[..., Loaded]) -> None:
    loaded = in_memory("llama")
    for plan in plans().values():
        decoder = Decoder(compress(loaded, plan).model if plan.kv_cache else loaded.model, None, 100, torch.bfloat16)
        fill(decoder, 90)
        assert decoder.position == 90 and decoder.cache_bytes == cache_bytes(plan, loaded.anatomy, 90)
    assert {len(taken) for taken in step_times({"one": decoder, "two": decoder}, 60, 3).values()} == {3}


def test_every_form_is_measured(in_memory: Callable[..., Loaded]) -> None:
    said: list[Any] = []
    found = measure_caches(in_memory("llama"), plans(), IDS, [64, 96], lambda kind, data: said.append((kind, data)))
    assert list(found["forms"]) == ["dense", "latent", "coded"] and found["forms"]["dense"]["ratio"] == 1.0
    assert all(set(form["steps"]) == {"64", "96"} and form["steps"]["64"]["ms"] > 0 for form in found["forms"].values())
    assert found["forms"]["coded"]["perplexity"] > 0 and found["windows"] == [2, 48]
    assert said[-1] == ("progress", {"done": 4, "total": 5})
