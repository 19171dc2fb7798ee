"""The compressed KV cache: codes against a plain reference, bytes against the tensors, the latent cache exact at full rank, bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.accounting import cache_bytes, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.decode import Decoder
from bitpress.engine.errors import InputError
from bitpress.engine.kv_cache import Coded, CodedRows, decode, encode, rows_for
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.measure.logits import CacheScorer, scorer_of
from bitpress.engine.measure.perplexity import measure_pair
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import CacheSide, KVCache, Recipe
from bitpress.kernels import cpu_build

Build = Callable[..., Loaded]
IDS = torch.arange(96).view(2, 48) * 7 % 320
TOKENS = CalibrationSet("made up", 0, "sha", IDS)
CPU = torch.device("cpu")
KIVI = {"keys": {"bits": 2, "axis": "channel", "group_size": 8}, "values": {"bits": 2, "axis": "token", "group_size": 8}, "residual_window": 8}

KIVI_32 = {"keys": {"bits": 4, "axis": "channel", "group_size": 32}, "values": {"bits": 4, "axis": "token", "group_size": 32}, "residual_window": 8}


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def plain(groups: Tensor, bits: int) -> Tensor:
    """The codes' values, one group after the other."""
    low = groups.amin(-1, keepdim=True).bfloat16().float()
    step = ((groups.amax(-1, keepdim=True) - low) / (2**bits - 1)).bfloat16().float()
    return low + ((groups - low) / step).round().clamp(0, 2**bits - 1) * step


def test_golden_group() -> None:
    group = torch.tensor([[0.9, -0.3, 0.1, -1.2, 0.45, 0, -0.05, 0.7]])
    made = decode(encode(group, 2), 2, 8, torch.float32)
    assert torch.allclose(made, torch.tensor([[0.9, -0.5, 0.2, -1.2, 0.2, 0.2, 0.2, 0.9]]), atol=0.01)
    assert torch.equal(made, plain(group, 2))
    still = decode(encode(torch.full((1, 8), 3.0), 4), 4, 8, torch.float32)
    assert torch.equal(still, torch.full((1, 8), 3.0)), "a group without a spread"


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 13), min_size=1, max_size=8), bits=st.sampled_from((2, 3, 4, 8)), window=st.integers(0, 12),
    axis=st.sampled_from(("channel", "token")), width=st.sampled_from((8, 12, 20)),
)  # fmt: skip
def test_rows_are_what_the_plain_rule_makes_of_them_however_they_come(pieces: list[int], bits: int, window: int, axis: str, width: int) -> None:
    size, total = 8, sum(pieces)
    x_SD = rows(total, width)
    side = CacheSide(bits=bits, axis=axis, group_size=size)  # type: ignore[arg-type]
    held = CodedRows(side, window, total + size, width, torch.float32, CPU)
    for piece in x_SD.split(pieces):
        held.append(piece)
    old = max(0, total - window)
    if axis == "channel":
        old -= old % size
        made = plain(x_SD[:old].reshape(-1, size, width).transpose(1, 2), bits).transpose(1, 2).reshape(-1, width)
    else:
        made = torch.cat([plain(part, bits) for part in x_SD[:old].split(size, dim=1)], dim=1)
    assert torch.allclose(held.read(), torch.cat((made, x_SD[old:])), atol=1e-5)
    held.reset()
    assert held.read().shape == (0, width) and held.nbytes == 0


def test_forgotten_rows_are_those_between() -> None:
    cache = KVCache.model_validate({"window": {"sinks": 2, "recent": 3}})
    held = rows_for(cache, None, 99, 1, torch.float32, CPU)
    for token in range(10):
        held.append(torch.tensor([[float(token)]]))
    assert held.read()[:, 0].tolist() == [0, 1, 6, 7, 8, 9], "the row that just came and the five that were kept"
    assert held.nbytes == 5 * 4


# In a model ------------------------------------------------------------------------------------------------------


def recipe(cache: dict[str, Any], **more: Any) -> Recipe:
    stages = [{"method": more.pop("method", "lorc")}] if "rank" in cache else []
    return Recipe.from_dict({"model": "llama", "kv_cache": cache, "stages": stages, **more})


def made(in_memory: Build, cache: dict[str, Any], family: str = "llama", **more: Any) -> Any:
    return compress(in_memory(family), recipe(cache, **more), calibration=TOKENS).model


def stepped(model: Any, ids_T: Tensor, prompt: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    decoder = Decoder(model, dtype=dtype)
    return torch.stack([decoder.prefill(ids_T[:prompt]), *(decoder.step(int(token)) for token in ids_T[prompt:])])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rank", [{"keep": 1.0}, {"keep": 1.0, "heads": "each"}, {"keep": 1.0, "sides": "values"}, {"keep": 1.0, "sides": "keys"}])
def test_a_latent_cache_of_full_rank_gives_the_logits_of_the_dense_model(in_memory: Build, family: str, rank: dict[str, Any]) -> None:
    dense, latent = stepped(in_memory(family).model, IDS[0]), stepped(made(in_memory, {"rank": rank}, family), IDS[0])
    assert torch.allclose(dense, latent, atol=1e-4 * float(dense.abs().max()))


@pytest.mark.parametrize("heads", ["joint", "each"])
def test_a_latent_cache_gives_what_the_factored_model_gives_without_one(in_memory: Build, heads: str) -> None:
    model = made(in_memory, {"rank": {"keep": 0.5, "heads": heads}})
    with torch.no_grad():
        whole = model(input_ids=IDS[:1]).logits[0]
    assert torch.allclose(stepped(model, IDS[0]), whole[19:], atol=1e-4 * float(whole.abs().max()))
    assert model.model.layers[0].self_attn.k_proj.layout.exact == 16


@pytest.mark.skipif(cpu_build.library() is None, reason="no compiled library")
@pytest.mark.parametrize("cache", [{"rank": {"keep": 0.6}}, {"rank": {"keep": 0.5, "heads": "each"}}, KIVI_32, {"rank": {"keep": 0.6}, **KIVI_32}])
def test_a_step_in_cpp_is_the_step_of_torch(in_memory: Build, cache: dict[str, Any]) -> None:
    model = made(in_memory, cache).bfloat16()
    ours, theirs = Decoder(model, dtype=torch.bfloat16), Decoder(model, dtype=torch.bfloat16)
    vars(theirs._loop)["in_place"] = None
    for decoder in (ours, theirs):
        decoder.prefill(IDS.flatten()[:20])
    assert ours._loop.whole_step is not None, "all blocks in one call"  # type: ignore[union-attr]
    for token in IDS.flatten()[20:90]:
        found, wanted = ours.step(int(token)), theirs.step(int(token))
        assert float((found - wanted).norm() / wanted.norm()) < 0.05 and ours.cache_bytes == theirs.cache_bytes
    vars(ours._loop)["whole_step"] = None
    assert torch.allclose(ours.step(7), theirs.step(7), atol=0.05 * float(found.abs().max())), "call by call"


@pytest.mark.parametrize("method", ["lorc", "svd-llm"])
def test_more_rank_loses_less(in_memory: Build, method: str) -> None:
    dense = stepped(in_memory("llama").model, IDS[0])
    gaps = [float((stepped(made(in_memory, {"rank": {"keep": keep}}, method=method), IDS[0]) - dense).norm()) for keep in (0.25, 0.5, 0.75, 1.0)]
    assert gaps == sorted(gaps, reverse=True)


def test_ranks_may_differ_by_block_and_the_value_factor_could_be_absorbed(in_memory: Build) -> None:
    model = made(in_memory, {"rank": {"ranks": [30, 20, 10], "sides": "values"}})
    assert [block.self_attn.v_proj.layout.exact for block in model.model.layers] == [30, 20, 10]
    value, out = model.model.layers[2].self_attn.v_proj, model.model.layers[2].self_attn.o_proj.weight
    left_NR, right_RK = value.packed.part("left").tensors["weight"], value.packed.part("right").tensors["weight"]
    x_1K = rows(1, 64)
    heads = torch.cat([left_NR.view(2, 16, -1)[head // 2] @ (right_RK @ x_1K[0]) for head in range(4)])
    absorbed_NHR = torch.stack([out.view(-1, 4, 16)[:, head] @ left_NR.view(2, 16, -1)[head // 2] for head in range(4)], 1)
    assert torch.allclose(absorbed_NHR.sum(1) @ (right_RK @ x_1K[0]), out @ heads, atol=1e-5), "one token mixed alone"


CACHES: list[dict[str, Any]] = [
    KIVI,
    {"rank": {"keep": 0.6}},
    {"rank": {"keep": 0.6, "heads": "each"}, **KIVI},
    {"rank": {"keep": 0.5, "sides": "values"}, "values": {"bits": 4, "axis": "token", "group_size": "row"}},
    {"keys": {"bits": 3, "axis": "token"}},
    {"window": {"sinks": 2, "recent": 9}},
]


@pytest.mark.parametrize("cache", CACHES)
def test_the_tensors_have_the_bytes_that_are_said(in_memory: Build, cache: dict[str, Any]) -> None:
    loaded, plan = in_memory("llama"), recipe(cache)
    decoder = Decoder(compress(loaded, plan).model, dtype=torch.bfloat16)
    decoder.prefill(IDS[0, :11])
    for token in IDS[0, 11:]:
        decoder.step(int(token))
        assert decoder.cache_bytes == cache_bytes(plan, loaded.anatomy, decoder.position)
    assert decoder.cache_bytes < cache_bytes(None, loaded.anatomy, 48)
    assert KVCache.model_validate_json(decoder.conditions["kv_cache"]) == plan.kv_cache, "a figure says which cache it was taken with"
    dense = Decoder(loaded.model, dtype=torch.bfloat16)
    assert "kv_cache" not in dense.conditions
    dense.prefill(IDS[0])
    assert dense.cache_bytes == cache_bytes(None, loaded.anatomy, 48) == 48 * loaded.anatomy.kv_bytes_per_token


@pytest.mark.parametrize("cache", CACHES)
def test_quality_is_measured_through_the_cache(in_memory: Build, cache: dict[str, Any]) -> None:
    model, loaded = made(in_memory, cache), in_memory("llama")
    assert isinstance(scorer_of(model), CacheScorer)
    quality = measure_pair(loaded.model, model, IDS, early_stop=False)
    assert 0 < quality.kl()[0] < 10
    exact = measure_pair(loaded.model, made(in_memory, {**KIVI, "residual_window": 64}), IDS, early_stop=False)
    assert exact.kl()[0] < 1e-6, "a window as long as the text leaves nothing to code"


def test_eight_bits_lose_less_than_two_and_a_window_less_than_none(in_memory: Build) -> None:
    dense = stepped(in_memory("llama").model, IDS[0])

    def gap(bits: int, window: int) -> float:
        sides = {side: {**KIVI[side], "bits": bits} for side in ("keys", "values")}  # type: ignore[dict-item]
        return float((stepped(made(in_memory, {**sides, "residual_window": window}), IDS[0]) - dense).norm())

    assert gap(8, 0) < gap(4, 0) < gap(2, 0) and gap(2, 24) < gap(2, 0)


def test_a_window_forgets_what_is_between(in_memory: Build) -> None:
    model = made(in_memory, {"window": {"sinks": 2, "recent": 6}})
    other = IDS[0].clone()
    other[12:30] = (other[12:30] + 5) % 320  # behind the sinks and long before the window
    decoder, second = Decoder(model, dtype=torch.float32), Decoder(model, dtype=torch.float32)
    first_block = [stepped_first_block(each, ids_T) for each, ids_T in ((decoder, IDS[0]), (second, other))]
    assert torch.equal(*first_block)


def stepped_first_block(decoder: Decoder, ids_T: Tensor) -> Tensor:
    """Keys of the first block that are held after the text, one token at a time; they depend on the tokens alone."""
    decoder.reset()
    for token in ids_T:
        decoder.step(int(token))
    return decoder._loop.sides[0][0].rows.read()  # type: ignore[union-attr]


def test_a_finished_run_brings_its_cache(in_memory: Build, tmp_path: Any) -> None:
    loaded, plan = in_memory("llama"), recipe({"rank": {"keep": 0.5}, **KIVI}, structure={"drop_blocks": [0]})
    result = compress(loaded, plan, store=LayerStore(tmp_path))
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    assert result.bytes == size_of(plan, loaded.anatomy).bytes
    again = load_compressed(tmp_path, loaded)
    assert torch.equal(stepped(result.model, IDS[0]), stepped(again, IDS[0]))
    decoder = Decoder(again, dtype=torch.bfloat16)
    decoder.prefill(IDS[0])
    assert decoder.cache_bytes == cache_bytes(plan, loaded.anatomy, 48)


@pytest.mark.parametrize(
    ("cache", "wrong", "right"),
    [
        ({"residual_window": 8}, "Nothing of the cache", "Set keys"),
        ({"keys": {"bits": 4, "axis": "channel", "group_size": "row"}}, "no row of tokens", "such as 32"),
        ({"values": {"bits": 4, "axis": "token", "group_size": 64}}, "64 is more than the 32", "at most 32"),
        ({"rank": {"keep": 0.01}}, "less than one number a head: no rank meets it", "at least 0.0312"),
        ({"rank": {"keep": 0.05, "heads": "each"}}, "less than one number a head", "at least 0.0625"),
        ({"rank": {"ranks": [8, 8, 8, 33]}}, "past the 32", "at most 32"),
        ({"rank": {"ranks": [8, 8, 8, 7], "heads": "each"}}, "do not split over 2 heads", "multiples of 2"),
        ({"rank": {"ranks": [8]}}, "1 ranks for 4 blocks", "one a block"),
        ({"window": {"recent": 8}, **KIVI}, "cannot be had together", "Set `window`"),
    ],
)
def test_what_does_not_fit_is_named(paper: Callable[..., Anatomy], cache: dict[str, Any], wrong: str, right: str) -> None:
    (problem,) = recipe(cache).validate_for(paper())
    assert wrong in problem.wrong and right in problem.right and problem.field.startswith("kv_cache")


def test_a_cache_that_would_not_be_used_is_refused_before_the_work(in_memory: Build) -> None:
    """A rotation turns inputs as they come, which our own loop does not do, and no other has these caches."""
    values = {"model": "m", "schemes": [{"match": "*", "weights": {"bits": 4, "group_size": 8}}], "stages": [{"method": "rotation"}, {"method": "rtn"}]}
    loaded, said = in_memory("llama"), []
    with pytest.raises(InputError, match="rotation"):
        compress(loaded, Recipe.from_dict({**values, "kv_cache": KIVI}), emit=lambda kind, _: said.append(kind))
    assert "layer_done" not in said
    rotated = compress(loaded, Recipe.from_dict(values)).model
    rotated.kv_scheme = KVCache.model_validate(KIVI)
    with pytest.raises(InputError, match="rotation"):
        Decoder(rotated, max_length=16)


def test_models_whose_heads_do_not_fit(paper: Callable[..., Anatomy]) -> None:
    other = paper().model_copy(update={"architecture": "GPT2LMHeadModel"})
    (problem,) = recipe(KIVI).validate_for(other)
    assert "cache of GPT2LMHeadModel" in problem.wrong
    fused = paper().model_copy(update={"linears": tuple(part for part in paper().linears if part.role != "v")})
    assert "fused" in recipe({"rank": {"keep": 0.5}}).validate_for(fused)[0].wrong
    with pytest.raises(InputError, match="0 is no rank"):
        recipe({"rank": {"ranks": [0]}})


def test_codes_are_named_tensors_of_the_stated_types() -> None:
    coded = encode(rows(3, 16).view(3, 2, 8), 3)
    assert isinstance(coded, Coded) and coded.codes.shape == (3, 2, 3)
    assert {tensor.dtype for tensor in coded} == {torch.uint8, torch.bfloat16}
