"""Tuned diagonals: the start is the projection, gradients reach both diagonals only, the factors stay of their rank, training does not lose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.engine.accounting import size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.catalogue import check_stages
from bitpress.engine.methods.lowrank.bolaco_tuned import BolacoTuned, TunedFactors, TunedOptions
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import RankScheme, Recipe, Scheme

TOKENS = CalibrationSet("made up", 0, "sha", torch.randint(2, 320, (12, 24), generator=torch.Generator().manual_seed(0)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def started(rank: int, tuned: int) -> tuple[Tensor, dict[str, Tensor], TunedFactors]:
    weight_NK, x_MK = random(10, 14), random(60, 14, seed=1).double()
    stats = {"gram": x_MK.t() @ x_MK / 60}
    learned = BolacoTuned().start(weight_NK, Scheme(rank=RankScheme(rank=rank)), stats, TunedOptions(tuned=tuned))
    assert isinstance(learned, TunedFactors)
    return weight_NK, stats, learned


@pytest.mark.parametrize(("rank", "tuned"), [(4, 2), (3, 64), (10, 1)])
def test_the_start_is_the_projection_and_only_diagonals_are_trained(rank: int, tuned: int) -> None:
    weight_NK, stats, learned = started(rank, tuned)
    rom = registry.linear("rom")
    plain = rom.apply(weight_NK, Scheme(rank=RankScheme(rank=rank)), stats, rom.parse({}))
    assert torch.allclose(learned(), plain.weight_NK, atol=1e-5)
    (learned() * random(10, 14, seed=2)).sum().backward()
    trained = dict(learned.named_parameters())
    assert set(trained) == {"outputs", "directions"} and all(bool(each.grad.any()) for each in trained.values())
    assert [parameter for group in learned.rates() for parameter in group["params"]] == list(trained.values())


def test_what_is_stored_is_what_was_trained() -> None:
    _, _, learned = started(4, 2)
    with torch.no_grad():
        learned.outputs.copy_(random(10, seed=3))
        learned.directions.copy_(random(2, seed=4))
    outcome = learned.outcome()
    assert outcome.factors is not None and outcome.factors[0].weight_NK.shape == (10, 4)
    assert torch.allclose(outcome.weight_NK, learned(), atol=1e-6)
    by_hand = learned.left_NR[:, :2] @ learned.right_RK[:2]
    by_hand = by_hand + learned.outputs.diag() @ learned.left_NR[:, 2:] @ learned.directions.diag() @ learned.right_RK[2:]
    assert torch.allclose(learned(), by_hand, atol=1e-5)


def recipe(steps: int, method: str = "bolaco-tuned") -> Recipe:
    lines = [{"match": "role:q, role:up, role:down", "rank": {"keep": 0.5}}]
    return Recipe.from_dict({"model": "llama", "schemes": lines, "stages": [{"method": method, "options": {"steps": steps, "held_out": 4}}]})


def test_training_a_block_lowers_its_error_and_the_run_loads_again(in_memory: Callable[..., Loaded], tmp_path: Path) -> None:
    loaded, plan, told = in_memory("llama"), recipe(30), []

    def hear(kind: str, data: dict[str, Any]) -> None:
        told.extend([data] if kind == "block_loss" else [])

    result = compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS, emit=hear)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    last = {data["block"]: data for data in told}
    assert set(last) == set(range(loaded.anatomy.blocks)) and all(data["best"] < data["start"] for data in last.values())
    assert result.bytes == size_of(plan, loaded.anatomy).bytes
    with torch.no_grad():
        once, again = (model(input_ids=TOKENS.ids_SL).logits for model in (result.model, load_compressed(tmp_path, loaded)))
    assert torch.equal(once, again)


def test_it_gives_no_bias_and_no_codes(paper: Callable[..., Anatomy]) -> None:
    plan = Recipe.from_dict({"model": "m", "schemes": [{"match": "*", "rank": {"keep": 0.5, "bias": True}}], "stages": [{"method": "bolaco-tuned"}]})
    assert "no stage does that" in check_stages(plan, paper(), registry.catalogue())[0].wrong
    with pytest.raises(ValueError, match="without rank"):
        BolacoTuned().start(random(4, 4), Scheme(), {"gram": torch.eye(4)}, TunedOptions())
