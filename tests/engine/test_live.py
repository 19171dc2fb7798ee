"""A live twin: it is what compressing makes, only what changed is made and run again, and it comes back to dense."""

import math
from collections.abc import Callable

import pytest
import torch

from bitpress.engine import live, sensitivity_truth
from bitpress.engine.compress import compress
from bitpress.engine.errors import InputError
from bitpress.engine.live import Live
from bitpress.engine.measure.perplexity import Quality, measure_pair
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe

Build = Callable[..., Loaded]
IDS = torch.arange(6 * 24).view(6, 24) * 11 % 320
pytestmark = pytest.mark.usefixtures("exact", "bitpress_home")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity_truth, "compute_dtype", lambda device: torch.float32)


def recipe(*lines: dict[str, object], **more: object) -> Recipe:
    stages = [{"method": "magnitude"}] if any("sparsity" in line for line in lines) else []
    stages += [{"method": "rtn"}] if any("weights" in line for line in lines) else []
    return Recipe.from_dict({"model": "llama", "schemes": list(lines), "stages": stages, **more})


FOUR = {"match": "*", "weights": {"bits": 4, "group_size": 32}}
THIRD = {"match": "blocks:1", "weights": {"bits": 2, "group_size": 32}}


def answer(session: Live) -> Quality:
    """The figures over all windows."""
    return list(session.windows())[-1][1]


@pytest.mark.parametrize("architecture", ["llama", "llama_untied", "gpt2", "gemma2"])
def test_it_measures_what_the_compressed_model_gives(in_memory: Build, architecture: str) -> None:
    loaded = in_memory(architecture)
    plan = recipe(FOUR, THIRD, embedding={"bits": 8})
    session = Live(loaded, IDS)
    session.turn(plan)
    found = answer(session)
    expected = measure_pair(loaded.model, compress(loaded, plan).model, IDS, early_stop=False)
    assert found.nll_dense == pytest.approx(expected.nll_dense, rel=1e-4)
    assert found.nll == pytest.approx(expected.nll, rel=1e-4)
    assert found.kl()[0] == pytest.approx(expected.kl()[0], rel=1e-2)
    assert found.same_top1() == pytest.approx(expected.same_top1(), abs=0.03)


def test_only_what_changed_is_made_and_only_what_follows_is_run(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Live(in_memory("llama"), IDS)
    assert len(session.turn(recipe(FOUR)).layers) == 21
    answer(session)
    ran: list[int] = []
    through = session.prefixes.through
    monkeypatch.setattr(session.prefixes, "through", lambda index, x: ran.append(index) or through(index, x))
    change = session.turn(recipe(FOUR, THIRD))
    assert (len(change.layers), change.lowest) == (7, 1)
    changed = answer(session)
    assert set(ran) == {1, 2}
    fresh = Live(in_memory("llama"), IDS)
    fresh.turn(recipe(FOUR, THIRD))
    assert answer(fresh).nll == pytest.approx(changed.nll, rel=1e-6)
    ran.clear()
    assert session.turn(recipe(FOUR, THIRD)).layers == []
    answer(session)
    assert ran == [], "nothing changed: only the head speaks again"


def test_a_superseded_order_leaves_nothing_stale(in_memory: Build) -> None:
    session = Live(in_memory("llama"), IDS)
    session.turn(recipe(FOUR))
    asked = iter([False, False, True])
    assert list(session.windows(lambda: next(asked))) == [], "stopped behind the second block"
    assert session.stale == [2]
    session.turn(recipe(FOUR, {"match": "blocks:2", "weights": {"bits": 2, "group_size": 32}}))
    found = answer(session)
    fresh = Live(in_memory("llama"), IDS)
    fresh.turn(recipe(FOUR, {"match": "blocks:2", "weights": {"bits": 2, "group_size": 32}}))
    assert found.nll == pytest.approx(answer(fresh).nll, rel=1e-6)


def test_it_comes_back_to_dense_and_leaves_the_dense_model_alone(in_memory: Build) -> None:
    loaded = in_memory("llama")
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    session = Live(loaded, IDS)
    session.turn(recipe(FOUR, {"match": "*", "sparsity": {"ratio": 0.5}}, embedding={"bits": 4}))
    assert abs(answer(session).log_ratios[0]) > 1e-3
    session.turn(recipe())
    ratio = answer(session).ratio()
    assert ratio is not None and math.isclose(ratio.mean, 1.0, rel_tol=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.model.state_dict().items())


def test_what_cannot_be_shown_is_refused_and_what_is_stood_in_for_is_told(in_memory: Build) -> None:
    session = Live(in_memory("llama"), IDS)
    with pytest.raises(InputError, match="Press Compress"):
        session.turn(recipe(FOUR, structure={"drop_blocks": [1]}))
    plan = recipe(FOUR).model_copy(update={"stages": Recipe.from_dict({"model": "llama", "stages": [{"method": "gptq"}]}).stages})
    (note,) = session.turn(plan).notes
    assert "stands in for GPTQ" in note


def test_a_batch_that_was_scored_is_not_scored_again_when_the_next_one_is_cut(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BATCH", 2)
    session = Live(in_memory("llama"), IDS)
    session.turn(recipe(FOUR))
    windows = session.windows()
    next(windows)
    windows.close()
    assert session.stale == [3, 0, 0]
    assert len(list(session.windows())) == 6
