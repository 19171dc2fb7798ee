"""Bolaco: centred directions and a bias, the bias in files and bytes; pooled covariance; ranks searched within their window."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.engine import rank_search
from bitpress.engine.accounting import removed_share, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.errors import InputError
from bitpress.engine.kv_ranks import cache_of, progressive_ranks
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.catalogue import check_stages
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.rank_search import QUARTERS, Space, search_ranks
from bitpress.engine.recipe import RankScheme, Recipe, Scheme
from bitpress.engine.statistics import STATISTICS
from bitpress.kernels.packed import PackedLinear

Build = Callable[..., Loaded]
TOKENS = CalibrationSet("made up", 0, "sha", torch.arange(192).view(8, 24) * 7 % 320)


def inputs(columns: int, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(6 * columns, columns, generator=made) * torch.linspace(2, 0.1, columns) + 3 * torch.randn(columns, generator=made)


def statistics(x_MK: Tensor) -> dict[str, Tensor]:
    found = {}
    for name in ("mean", "pooled_covariance"):
        statistic = STATISTICS[name]()
        for group in x_MK.split(len(x_MK) // 2):
            statistic.add(group)
        found[name] = statistic.result()
    return found


def outcome(weight: Tensor, x_MK: Tensor, rank: int, bias: bool) -> Any:
    method = registry.linear("bolaco")
    return method.apply(weight, Scheme(rank=RankScheme(rank=rank, bias=bias)), statistics(x_MK), method.parse({}))


def gap(weight: Tensor, x_MK: Tensor, made: Any) -> float:
    bias = 0 if made.bias_N is None else made.bias_N
    return float((x_MK @ weight.t() - x_MK @ made.weight_NK.t() - bias).square().sum())


def test_pooled_covariance_is_centred_on_each_group_and_averaged() -> None:
    x_MK = inputs(6)
    halves = x_MK.split(len(x_MK) // 2)
    expected = sum(torch.cov(half.t().double(), correction=0) for half in halves) / 2
    assert torch.allclose(statistics(x_MK)["pooled_covariance"], expected, atol=1e-4)
    assert torch.allclose(statistics(x_MK)["mean"], x_MK.double().mean(0), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_is_exact(bias: bool) -> None:
    x_MK, weight = inputs(12), torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    made = outcome(weight, x_MK, 10, bias)
    assert gap(weight, x_MK, made) < 1e-4
    assert (made.bias_N is not None) == bias


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_bias_reduces_the_error(rank: int) -> None:
    x_MK, weight = inputs(12), torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    with_bias, without = outcome(weight, x_MK, rank, True), outcome(weight, x_MK, rank, False)
    assert gap(weight, x_MK, with_bias) < gap(weight, x_MK, without)
    bare = with_bias._replace(bias_N=None)
    assert gap(weight, x_MK, with_bias) < gap(weight, x_MK, bare)


def recipe(**more: Any) -> Recipe:
    lines = [{"match": "role:q, role:up", "rank": {"keep": 0.5, "bias": True, **more.pop("rank", {})}}]
    return Recipe.from_dict({"model": "llama", "schemes": lines, "stages": [{"method": "bolaco"}], **more})


@pytest.mark.parametrize(("family", "rank"), [("llama", {}), ("qwen2", {}), ("llama", {"factors": {"bits": 8, "group_size": 16}})])
def test_the_bias_is_kept_counted_and_added_to_the_layers_own(in_memory: Build, tmp_path: Any, family: str, rank: dict[str, Any]) -> None:
    loaded, plan = in_memory(family), recipe(rank=rank)
    made = compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    assert made.bytes == size_of(plan, loaded.anatomy).bytes
    layer = made.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, PackedLinear) and layer.bias is not None
    own = loaded.model.model.layers[0].self_attn.q_proj.bias
    assert own is None or not torch.equal(layer.bias, own)
    with torch.no_grad():
        once, again = (model(input_ids=TOKENS.ids_SL).logits for model in (made.model, load_compressed(tmp_path, loaded)))
    assert torch.equal(once, again)


def test_only_bolaco_gives_a_bias(paper: Callable[..., Anatomy]) -> None:
    plan = recipe(stages=[{"method": "svd"}])
    found = check_stages(plan, paper(), registry.catalogue())
    assert "no stage does that" in found[0].wrong and "method: bolaco" in found[0].right


# The search ------------------------------------------------------------------------------------------------------


def dimensions() -> dict[str, Any]:
    return {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}  # ranks of eight are too coarse for width 64


@pytest.mark.parametrize(("kind", "variables"), [("5x1", 5), ("5x4", 20)])
def test_every_allocation_tried_has_the_wanted_size_and_leaves_values_whole(in_memory: Build, kind: Any, variables: int) -> None:
    loaded = in_memory("llama", **dimensions())
    before = {name: surgery.linear_weight(surgery.get(loaded.model, name)).clone() for name in loaded.anatomy.by_name if "proj" in name}
    seen: list[Any] = []
    trials, lines = search_ranks(loaded, TOKENS.ids_SL, TOKENS.ids_SL.flip(0), 0.7, kind, evaluations=8, on_trial=seen.append)
    assert seen == trials and len(trials) == 8 and all(len(trial.ratios) == variables for trial in trials)
    assert all(0.6 <= trial.keep <= 0.7 + 1e-9 for trial in trials)
    best = min(trials, key=lambda trial: trial.objective)
    plan = Recipe.from_dict({"model": "llama", "schemes": lines, "stages": [{"method": "bolaco"}]})
    assert removed_share(plan, loaded.anatomy) == pytest.approx(1 - best.keep)
    schemes = plan.resolve(loaded.anatomy)
    assert all(scheme.rank is None for name, scheme in schemes.items() if "v_proj" in name)
    after = {name: surgery.linear_weight(surgery.get(loaded.model, name)) for name in before}
    assert all(torch.equal(before[name], after[name]) for name in before) and loaded.model.model.layers[0].self_attn.q_proj.bias is None


def test_kept_prefixes_change_no_figure(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = in_memory("llama", **dimensions())
    kept, _ = search_ranks(loaded, TOKENS.ids_SL, TOKENS.ids_SL, 0.7, "5x4", evaluations=6, seed=3)
    monkeypatch.setattr(rank_search, "PREFIXES", 0)
    fresh, _ = search_ranks(loaded, TOKENS.ids_SL, TOKENS.ids_SL, 0.7, "5x4", evaluations=6, seed=3)
    assert [trial.objective for trial in kept] == [trial.objective for trial in fresh]


def test_a_share_that_no_ranks_meet_is_refused(in_memory: Build) -> None:
    loaded = in_memory("llama", **dimensions())
    with pytest.raises(InputError, match=r"No ranks keep 5%.*values being left whole"):
        search_ranks(loaded, TOKENS.ids_SL, TOKENS.ids_SL, 0.05)
    with pytest.raises(InputError, match="nothing to search"):
        Space(in_memory("gpt2").anatomy.model_copy(update={"linears": ()}), QUARTERS)


def test_a_search_as_a_recipe_tells_its_trials(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, told = in_memory("llama", **dimensions()), []
    ids_SL = torch.randint(2, 320, (20, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(rank_search, "calibration_set", lambda *_: CalibrationSet("made up", 0, "sha", ids_SL))
    plan = Recipe.from_dict({"model": "llama", "calibration": {"sequences": 4}})
    found, trials = rank_search.search_recipe(loaded, plan, 0.3, "5x1", 3, lambda kind, data: told.append((kind, data)))
    assert [data for kind, data in told if kind == "trial"] == trials and len(trials) == 3
    assert found.stages[0].method == "bolaco" and removed_share(found, loaded.anatomy) == pytest.approx(1 - min(trials, key=lambda t: t["objective"])["keep"])
    assert found.validate_for(loaded.anatomy) == []


# Ranks of a latent cache -----------------------------------------------------------------------------------------


def test_progressive_ranks_fall_and_meet_the_budget() -> None:
    ranks = progressive_ranks([50.0] * 6, 192, 0.6)
    assert list(ranks) == sorted(ranks, reverse=True) and ranks[0] > ranks[-1]
    assert 0.6 * 192 * 6 - 6 <= sum(ranks) <= 0.6 * 192 * 6
    assert ranks[-1] / ranks[0] == pytest.approx(0.5, abs=0.02)
    assert progressive_ranks([9.0, 4.0], 192, 1.0) == (192, 192)
    assert all(rank % 3 == 0 for rank in progressive_ranks([5.0, 7.0, 9.0], 192, 0.5, runs=3))
    assert len(set(progressive_ranks([1.0, 1.0, 1.0], 192, 0.5))) == 1, "nothing grows: all alike"
    with pytest.raises(InputError, match=r"No ranks keep 0\.1%"):
        progressive_ranks([5.0, 7.0], 32, 0.001)


def test_spectra_give_the_conditions(paper: Callable[..., Anatomy], tmp_path: Any) -> None:
    anatomy = paper()
    with pytest.raises(InputError, match="spectra of this model are not known"):
        cache_of(anatomy, tmp_path, 0.5)
    for part in anatomy.linears:
        (tmp_path / f"{part.name}.json").write_text(json.dumps({"spectrum": {"index": [1, 2], "value": [1.0, 0.1]}}))
    cache = cache_of(anatomy, tmp_path, 0.5, "each")
    assert cache.rank is not None and cache.rank.ranks is not None
    assert sum(cache.rank.ranks) <= 0.5 * 32 * 4 and all(rank % 2 == 0 for rank in cache.rank.ranks)
    plan = Recipe.from_dict({"model": "paper", "kv_cache": cache.model_dump(exclude_none=True, mode="json"), "stages": [{"method": "lorc"}]})
    assert plan.validate_for(anatomy) == [] and check_stages(plan, anatomy, registry.catalogue()) == []
