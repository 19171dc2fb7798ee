"""The structured pipeline: budgets met, floors kept, repairs against their definitions, and every score with every repair."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.accounting import flops_per_token
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.errors import InputError
from bitpress.engine.methods import registry
from bitpress.engine.methods.repair import FITS, as_normed, judging, least_squares, repaired, rescaling, sums_of
from bitpress.engine.methods.structured import StructuredMethod, StructuredOptions, Units, budget_of, remove_bottom_up, select
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import Scene
from bitpress.engine.sublayers import Key, Stream

Build = Callable[..., Loaded]
IDS = torch.randint(2, 300, (6, 24), generator=torch.Generator().manual_seed(1))
TOKENS = CalibrationSet("made up", 0, "sha", IDS)
NAMES = [name for name, method in registry.all_methods().items() if isinstance(method, StructuredMethod)]
REPAIRS = ("none", "bias", "rescale", "least_squares", "catch_up")


def made(loaded: Loaded, method: str, options: dict[str, Any], **fields: Any) -> Any:
    plan = Recipe.from_dict({"model": "llama", "stages": [{"method": method, "options": options}], **fields})
    return compress(loaded, plan, calibration=TOKENS)


def drift(loaded: Loaded, model: torch.nn.Module) -> float:
    """Mean square distance of the last hidden states."""
    states = [net(input_ids=IDS, output_hidden_states=True).hidden_states[-1].float() for net in (loaded.model, model)]
    return float((states[0] - states[1]).square().mean())


def linear_share(recipe: Recipe, loaded: Loaded) -> float:
    head = 2 * loaded.anatomy.vocab * loaded.anatomy.hidden
    return (flops_per_token(recipe, loaded.anatomy) - head) / (flops_per_token(None, loaded.anatomy) - head)


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_met_and_nearly_used(in_memory: Build, name: str) -> None:
    loaded = in_memory("llama")
    result = made(loaded, name, {"remove": 0.3, "multiple": 4})
    share = linear_share(result.recipe, loaded)
    assert 0.62 < share <= 0.7 + 1e-9
    for block in result.model.model.layers:
        assert block.self_attn.q_proj.out_features >= 32
        assert block.mlp.down_proj.in_features % 4 == 0 < block.mlp.down_proj.in_features
    with torch.no_grad():
        assert result.model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("unit", ["group", "head"])
def test_every_repair_with_every_unit(in_memory: Build, repair: str, unit: str) -> None:
    loaded = in_memory("qwen2")
    result = made(loaded, "wanda-structured", {"remove": 0.3, "repair": repair, "unit": unit, "multiple": 2})
    assert linear_share(result.recipe, loaded) <= 0.75  # a single head carries a part of its keys and values, which stay with its group
    plain = made(loaded, "wanda-structured", {"remove": 0.3, "unit": unit, "multiple": 2})
    assert result.recipe.structure.remove_neurons == plain.recipe.structure.remove_neurons
    if repair in FITS:
        assert drift(loaded, result.model) < 0.7 * drift(loaded, plain.model)


@settings(max_examples=20, deadline=None)
@given(remove=st.floats(0.05, 0.75), seed=st.integers(0, 99), multiple=st.sampled_from((1, 4, 8)))
def test_selection_never_spends_more_than_the_budget(in_memory: Build, remove: float, seed: int, multiple: int) -> None:
    scene = Scene(in_memory("llama"), Recipe(model="llama"), IDS)
    units = Units(scene, StructuredOptions(remove=remove, multiple=multiple))
    generator = torch.Generator().manual_seed(seed)
    scores = {key: torch.rand(units.count(key), generator=generator) for key in units.keys}
    budget = budget_of(units, remove)
    kept = select(units, scores, budget)
    assert sum(units.cost(key) * len(stay) for key, stay in kept.items()) <= budget + 1e-6
    for key, stay in kept.items():
        assert len(stay) >= units.floor(key)
        assert key.kind == "heads" or len(stay) == units.count(key) or len(stay) % multiple == 0
        assert stay == sorted(set(stay))


def test_shares_of_the_recipe_are_met_block_by_block(in_memory: Build) -> None:
    shares = {"neurons": [{"keep": 0.5}, {"match": "blocks:0", "keep": 1.0}], "heads": {"match": "blocks:2", "keep": 0.5}}
    result = made(in_memory("llama"), "magnitude-structured", {}, structure=shares)
    layers = result.model.model.layers
    assert [block.mlp.down_proj.in_features for block in layers] == [128, 64, 64]
    assert [block.self_attn.k_proj.out_features for block in layers] == [32, 32, 16]
    assert Recipe.from_dict({"model": "m", "structure": shares}).structure.units(in_memory("llama").anatomy)[2] == (2, 1, 64)


def test_uniform_takes_the_same_share_everywhere(in_memory: Build) -> None:
    layers = made(in_memory("llama"), "magnitude-structured", {"remove": 0.5, "allocation": "uniform", "multiple": 1}).model.model.layers
    assert {(block.mlp.down_proj.in_features, block.self_attn.q_proj.out_features) for block in layers} == {(64, 32)}


def test_too_much_is_refused_with_what_is_possible(in_memory: Build) -> None:
    with pytest.raises(InputError, match=r"95% of the block linears cannot be removed. At most \d+% can go"):
        made(in_memory("llama"), "magnitude-structured", {"remove": 0.95})
    with pytest.raises(InputError, match="fused"):
        made(in_memory("gpt2"), "magnitude-structured", {"remove": 0.2})


def test_repairs_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 50, 6, generator=generator) + 0.5, torch.randn(3, 6, generator=generator)
    wanted, goal = x @ weight.t(), torch.randn(2, 50, 3, generator=generator)
    sums, kept, groups = sums_of([x], [wanted], as_normed([goal])), torch.tensor([0, 2, 3, 5]), torch.tensor([0, 0, 1, 2])
    weigh_M1 = 1 / goal.flatten(0, 1).square().mean(1, keepdim=True).sqrt()  # as the next norm does
    x_MF, y_Md = weigh_M1 * x.flatten(0, 1), weigh_M1 * wanted.flatten(0, 1)
    fitted = least_squares(kept, sums, weight[:, kept], ridge=0.0)
    expected = torch.linalg.lstsq(x_MF[:, kept], y_Md).solution.t()
    assert torch.allclose(fitted, expected, atol=1e-3)
    near = repaired("least_squares", weight, kept, groups, sums)[0]
    assert (near - weight[:, kept]).norm() < (fitted - weight[:, kept]).norm()
    short = sums_of([x[:, :2]], [wanted[:, :2]], as_normed([goal[:, :2]]))  # 4 tokens, fewer than the 6 features
    assert (least_squares(torch.arange(6), short, weight) - weight).abs().max() < 1e-4, "nothing has gone: nothing changes"
    same, bias = repaired("bias", weight, kept, groups, sums)
    assert torch.equal(same, weight[:, kept])
    assert bias is not None
    mean_F = (weigh_M1 * x_MF).sum(0) / weigh_M1.square().sum()
    assert torch.allclose(bias, weight[:, [1, 4]] @ mean_F[[1, 4]], atol=1e-5)
    scale = rescaling(weight, kept, groups, sums)
    columns = torch.stack([(x_MF[:, kept[groups == unit]] @ weight[:, kept[groups == unit]].t()).flatten() for unit in range(3)], dim=1).double()
    inner = columns.t() @ columns
    aim = columns.t() @ y_Md.flatten().double()
    damped, right = torch.cat((inner, torch.eye(3, dtype=torch.float64))), torch.cat((aim - inner.sum(1), torch.zeros(3, dtype=torch.float64)))
    change = torch.linalg.lstsq(damped, right).solution
    assert torch.allclose(scale, 1 + change, atol=1e-4)


def test_a_fit_aims_at_what_its_sublayer_lost_and_catching_up_at_what_all_below_lost_too(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the neurons of block 0 go and nothing else: only catching up changes the matrices above."""
    monkeypatch.setattr("bitpress.engine.scene.compute_dtype", lambda device: torch.float32)
    changed = {}
    for repair in FITS:
        scene = Scene(in_memory("llama"), Recipe(model="llama"), IDS)
        units, before = Units(scene, StructuredOptions()), dict(scene.model.named_parameters())
        kept = {key: list(range(units.count(key) // (1 + (key == Key(0, "neurons"))))) for key in units.keys}
        remove_bottom_up(scene, units, lambda key, *_, kept=kept: kept[key], repair)
        after = scene.model.named_parameters()
        changed[repair] = {name for name, weight in after if weight.shape == before[name].shape and not torch.allclose(weight, before[name], atol=1e-5)}
    assert changed["least_squares"] == set()
    assert "model.layers.1.self_attn.o_proj.weight" in changed["catch_up"]


def test_one_token_that_is_huge_in_the_stream_does_not_decide_the_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, kept = torch.randn(1, 60, 4, generator=generator), torch.randn(3, 4, generator=generator), torch.tensor([0, 1, 2])
    wanted, goal = x @ weight.t(), torch.randn(1, 60, 3, generator=generator)
    alone = least_squares(kept, sums_of([x[:, 1:]], [wanted[:, 1:]], as_normed([goal[:, 1:]])), weight[:, kept])
    wanted[:, 0] += 20_000
    goal[:, 0] += 20_000
    assert (least_squares(kept, sums_of([x], [wanted], as_normed([goal])), weight[:, kept]) - alone).abs().max() < 0.1


def test_a_fit_that_learns_noise_by_heart_is_not_taken() -> None:
    """Features say nothing of what is wanted: no fit is better on other tokens than the weights as they were."""
    generator = torch.Generator().manual_seed(2)
    kept, old = torch.arange(24), torch.zeros(3, 24)
    x = [torch.randn(2, 8, 24, generator=generator) for _ in range(4)]
    noise, alike = [torch.randn(2, 8, 3, generator=generator) for _ in range(4)], [torch.ones(2, 8)] * 4
    told = [part @ torch.ones(24, 3) for part in x]
    groups = torch.arange(24)
    held = judging(x, noise, alike)
    assert held is not None
    assert repaired("least_squares", old, kept, groups, sums_of(x, noise, alike))[0].norm() > 1
    assert repaired("least_squares", old, kept, groups, sums_of(x, noise, alike), held)[0].norm() < 1
    found = repaired("least_squares", old, kept, groups, sums_of(x, told, alike), judging(x, told, alike))[0]
    assert torch.allclose(found, torch.ones(3, 24), atol=0.1)
    assert judging(x[:3], noise[:3], alike[:3]) is None


def test_a_stream_reaches_what_the_model_reaches(in_memory: Build) -> None:
    loaded = in_memory("llama")
    scene = Scene(loaded, Recipe(model="llama"), IDS)
    stream = Stream(scene.model, scene)
    for block in range(2):
        stream.move(stream.catch(block).output)
    expected = scene.model(input_ids=IDS[:4], output_hidden_states=True).hidden_states[2]
    assert torch.allclose(stream.hidden[0].float(), expected.float(), rtol=0.02, atol=0.05)
    assert Key(0, "heads") < Key(0, "neurons") < Key(1, "heads")
