"""LayerChop, ShortGPT and greedy depth: which blocks go, that the ends stay, and what each refuses."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitpress.engine.accounting import size_of
from bitpress.engine.errors import InputError
from bitpress.engine.methods import registry
from bitpress.engine.methods.prune.greedy_depth import loss_without
from bitpress.engine.methods.prune.shortgpt import block_influence
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import Scene
from bitpress.engine.structure import blocks_to_remove, chopped

Build = Callable[..., Loaded]
IDS = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(1))
PLACES = ("max-gap", "input", "output", "middle", "both")


def shaped(loaded: Loaded, name: str, **options: Any) -> Scene:
    method = registry.get(name)
    scene = Scene(loaded, Recipe(model="llama"), IDS)
    method.shape(scene, method.parse(options))  # type: ignore[attr-defined]
    return scene


def test_max_gap_of_thirty_leaves_fifteen_evenly_spaced() -> None:
    kept = sorted(set(range(30)) - set(chopped(30, 15, "max-gap")))
    assert len(kept) == 15
    assert (kept[0], kept[-1]) == (0, 29)
    gaps = [later - earlier for earlier, later in itertools.pairwise(kept)]
    assert set(gaps) <= {2, 3}
    assert gaps.count(3) == 1


def test_places() -> None:
    assert chopped(8, 3, "input") == [1, 2, 3]
    assert chopped(8, 3, "output") == [4, 5, 6]
    assert chopped(8, 2, "middle") == [3, 4]
    assert chopped(8, 3, "both") == [1, 2, 6]
    assert chopped(8, 4, "both") == [1, 2, 5, 6]


@given(blocks=st.integers(3, 90), share=st.floats(0.01, 0.99), place=st.sampled_from(PLACES))
def test_the_ends_stay_and_the_count_is_exact(blocks: int, share: float, place: str) -> None:
    count = round(share * blocks)
    if not 0 < count <= blocks - 2:
        with pytest.raises(InputError, match="the first and the last always stay"):
            blocks_to_remove(blocks, share)
        return
    gone = chopped(blocks, blocks_to_remove(blocks, share), place)  # type: ignore[arg-type]
    assert len(set(gone)) == count
    assert 0 < min(gone) <= max(gone) < blocks - 1


def test_parameter_count_is_exact_and_no_text_is_needed(in_memory: Build) -> None:
    loaded = in_memory("llama", num_hidden_layers=6)
    scene = shaped(loaded, "layerchop", remove=0.5)
    assert len(scene.structure.drop_blocks) == 3
    anatomy = loaded.anatomy
    plan = Recipe(model="llama", structure=scene.structure)
    assert size_of(plan, anatomy).params == anatomy.params - 3 * (anatomy.linear_params // 6 + anatomy.block_rest_params)
    assert not registry.get("layerchop").reads_text({})  # type: ignore[attr-defined]


def test_influence_is_that_of_the_hidden_states(in_memory: Build) -> None:
    loaded = in_memory("llama", num_hidden_layers=5)
    for part in loaded.anatomy.of_block(2):  # a block that adds nearly nothing
        if part.role in ("o", "down"):
            loaded.model.get_submodule(part.name).weight.mul_(1e-3)
    scene = Scene(loaded, Recipe(model="llama"), IDS)
    found = block_influence(scene)
    states = loaded.model(input_ids=IDS, output_hidden_states=True).hidden_states
    expected = [float(1 - torch.cosine_similarity(x, y, dim=-1).mean()) for x, y in itertools.pairwise(states[:5])]
    assert found[:4] == pytest.approx(expected, abs=0.01)
    assert min(range(5), key=found.__getitem__) == 2
    assert shaped(loaded, "shortgpt", remove=0.2).structure.drop_blocks == [2]
    assert 2 in shaped(loaded, "shortgpt", remove=0.4).structure.drop_blocks  # type: ignore[operator]


def test_greedy_takes_the_block_of_least_loss_each_time(in_memory: Build) -> None:
    loaded = in_memory("llama", num_hidden_layers=5)
    scene = Scene(loaded, Recipe(model="llama"), IDS)
    losses = {block: loss_without(scene, block, 3) for block in (1, 2, 3)}
    gone = shaped(loaded, "greedy-depth", remove=0.4, sequences=3).structure.drop_blocks
    assert min(losses, key=losses.__getitem__) in gone  # type: ignore[operator]
    assert set(gone) <= {1, 2, 3}
    assert len(gone) == 2


@pytest.mark.parametrize("name", ["shortgpt", "greedy-depth"])
def test_targets_are_kept_to(in_memory: Build, name: str) -> None:
    scene = Scene(in_memory("llama", num_hidden_layers=5), Recipe(model="llama"), IDS)
    scene.targets = "blocks:3-4"
    method = registry.get(name)
    method.shape(scene, method.parse({"remove": 0.2}))  # type: ignore[attr-defined]
    assert scene.structure.drop_blocks == [3]
    with pytest.raises(InputError, match="pointed at 0 blocks"):
        method.shape(scene, method.parse({"remove": 0.25}))  # type: ignore[attr-defined]
