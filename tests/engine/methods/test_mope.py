"""MoPE's rounds: what has gone stays gone and is left out of the trials, groups hold neurons of like size, the budget is met."""

from collections.abc import Callable
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitpress.engine.methods import registry
from bitpress.engine.methods.prune.mope import Mope, MopeOptions, Trial, masks_of, modules_of, rounds_of
from bitpress.engine.methods.structured import Units, budget_of
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import Scene
from bitpress.engine.sublayers import Key, sizes_in_stream

IDS = torch.randint(2, 300, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def scene(in_memory: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr("bitpress.engine.scene.compute_dtype", lambda device: torch.float32)
    return Scene(in_memory("llama"), Recipe(model="llama"), IDS)


@given(remove=st.floats(0.01, 0.99), step=st.floats(0.01, 1.0))
def test_rounds_rise_in_steps_to_all_that_goes(remove: float, step: float) -> None:
    rounds = rounds_of(remove, step)
    assert rounds[-1] == remove
    assert all(0 < after - before <= step + 1e-9 for before, after in zip([0.0, *rounds], rounds, strict=False))


@given(seed=st.integers(0, 1000), left=st.integers(1, 40), groups=st.integers(1, 12))
def test_groups_hold_each_neuron_once_and_neighbours_by_size(seed: int, left: int, groups: int) -> None:
    luck = torch.Generator().manual_seed(seed)
    stay, sizes = sorted(torch.randperm(40, generator=luck)[:left].tolist()), torch.rand(40, generator=luck)
    key = Key(0, "neurons")
    found = modules_of(key, stay, {key: sizes}, groups)
    assert sorted(chain.from_iterable(found)) == stay
    assert [float(sizes[unit]) for group in found for unit in group] == sorted(float(sizes[unit]) for unit in stay)
    assert list(chain.from_iterable(modules_of(key, stay, None, groups))) == stay
    assert modules_of(Key(0, "heads"), [0, 2], None, groups) == [[0], [2]]


def test_a_trial_without_what_has_gone_is_one_of_the_smaller_model(scene: Scene) -> None:
    units = Units(scene, MopeOptions())
    kept = {key: list(range(units.count(key))) for key in units.keys}
    kept[Key(0, "heads")], kept[Key(1, "neurons")] = [1], list(range(24, units.count(Key(1, "neurons"))))
    trial = Trial(scene, IDS, masks_of(units, kept))
    trial.stand_at(1)
    found = trial.error_without(Key(1, "neurons"), torch.arange(24, 40))
    units.cut(kept)
    smaller = Trial(scene, IDS)
    smaller.stand_at(1)
    assert trial.whole == pytest.approx(smaller.whole, abs=1e-4)
    assert found == pytest.approx(smaller.error_without(Key(1, "neurons"), torch.arange(16)), abs=1e-4)


def test_rounds_meet_the_budget_and_nothing_comes_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = registry.get("mope"), []
    errors = Mope._errors

    def noted(self: Mope, scene: Scene, units: Units, options: MopeOptions, kept: dict[Key, list[int]], *rest: object) -> dict[Key, torch.Tensor]:
        seen.append({key: set(stay) for key, stay in kept.items()})
        return errors(self, scene, units, options, kept, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Mope, "_errors", noted)
    options = method.parse({"remove": 0.4, "rescore": 0.1, "neuron_groups": 4, "multiple": 4})
    units = Units(scene, options)  # type: ignore[arg-type]
    kept = method.decide(scene, units, options)  # type: ignore[attr-defined]
    assert len(seen) == 4
    for before, after in zip(seen, [*seen[1:], {key: set(stay) for key, stay in kept.items()}], strict=True):
        assert all(after[key] <= stay for key, stay in before.items())
    spent, budget = sum(units.cost(key) * len(stay) for key, stay in kept.items()), budget_of(units, 0.4)
    assert 0.9 * budget < spent <= budget


def test_sizes_are_those_of_what_a_feature_adds(scene: Scene) -> None:
    key = Key(1, "neurons")
    before = sizes_in_stream(scene, [key])[key]
    down = scene.model.model.layers[1].mlp.down_proj  # type: ignore[union-attr, index]
    down.weight[:, 3] *= 2  # type: ignore[union-attr, index]
    assert torch.argmax(sizes_in_stream(scene, [key])[key] / before) == 3
