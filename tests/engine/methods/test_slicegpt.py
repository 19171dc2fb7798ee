"""SliceGPT: nothing is lost at full width, the bytes are counted, a run loads again, and what it does not go with is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine.accounting import flops_per_token, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import Compressed, compress, load_compressed
from bitpress.engine.decode import Decoder
from bitpress.engine.errors import InputError
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.catalogue import check_stages
from bitpress.engine.methods.prune.slicegpt import _covariances
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.model.narrow import narrow
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import Scene
from bitpress.engine.structure import Stream

Build = Callable[..., Loaded]
IDS = torch.randint(2, 300, (4, 24), generator=torch.Generator().manual_seed(5))
TOKENS = CalibrationSet("made up", 0, "sha", IDS)


def plan(**options: Any) -> Recipe:
    return Recipe.from_dict({"model": "llama", "stages": [{"method": "slicegpt", "options": {"multiple": 4, **options}}]})


def sliced(loaded: Loaded, **options: Any) -> Compressed:
    return compress(loaded, plan(**options), calibration=TOKENS)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("directions", ["shared", "each block"])
def test_at_full_width_nothing_changes(in_memory: Build, directions: str) -> None:
    loaded = in_memory("llama")
    before = logits(loaded.model)
    made = sliced(loaded, remove=0.1, directions=directions, multiple=64)
    assert made.recipe.structure.stream == Stream(width=64, by_block=directions == "each block")
    assert (logits(made.model) - before).abs().max() < 1e-3
    assert torch.equal(logits(loaded.model), before)


@pytest.mark.parametrize(("directions", "turns"), [("shared", 64 * 48), ("each block", 2 * 64 * 48 + 2 * 48 * 48)])
def test_shapes_bytes_and_flops_equal_a_hand_count(in_memory: Build, directions: str, turns: int) -> None:
    loaded = in_memory("llama")
    made = sliced(loaded, remove=0.25, directions=directions)
    assert made.recipe.structure.stream == Stream(width=48, by_block=directions == "each block")
    size = size_of(made.recipe, loaded.anatomy)
    assert size.linear_params * 64 == loaded.anatomy.linear_params * 48
    assert size.params == size.linear_params + 320 * 64 + 64 + 3 * 2 * 48 + turns
    assert made.bytes == size.bytes
    assert {tuple(block.mlp.up_proj.weight.shape) for block in made.model.model.layers} == {(128, 48)}  # type: ignore[union-attr]
    extra = flops_per_token(made.recipe, loaded.anatomy) - 2 * size.linear_params - 2 * 320 * 64
    assert extra == 2 * (turns if directions == "each block" else 2 * turns)


@pytest.mark.parametrize("directions", ["shared", "each block"])
def test_a_run_is_loaded_and_decoded_again(in_memory: Build, tmp_path: Path, directions: str) -> None:
    loaded, recipe = in_memory("llama"), plan(remove=0.25, directions=directions)
    recipe = Recipe.from_dict(recipe.model_dump(mode="json") | {"schemes": [{"match": "role:up", "weights": {"bits": 8, "group_size": 16}}],
                                                                "stages": [*recipe.model_dump(mode="json")["stages"], {"method": "rtn"}]})  # fmt: skip
    made = compress(loaded, recipe, store=LayerStore(tmp_path), calibration=TOKENS)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = load_compressed(tmp_path, loaded)
    assert torch.equal(logits(again), logits(made.model))
    decoder = Decoder(again, None, 32, torch.float32)
    assert torch.allclose(decoder.prefill(IDS[0]), logits(made.model)[0, -1].float(), atol=2e-2)


def test_the_directions_kept_are_better_than_those_left_out(in_memory: Build) -> None:
    loaded = in_memory("llama")
    before, made = logits(loaded.model), logits(sliced(loaded, remove=0.25).model)
    scene = Scene(loaded, plan())
    narrow(scene.model, loaded.anatomy, 48, False)
    assert (made - before).norm() < 0.8 * (logits(scene.model) - before).norm()  # turned by zeros: no stream at all


def test_every_token_counts_the_same(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitpress.engine.scene.compute_dtype", lambda device: torch.float32)
    scene = Scene(in_memory("llama"), plan(), IDS)
    first, _, last = _covariances(scene)
    assert float(first.trace()) == pytest.approx(2 * IDS.numel(), rel=1e-5)
    assert float(last.trace()) == pytest.approx(3 * IDS.numel(), rel=1e-5)
    assert torch.allclose(first, first.t())


def test_other_models_and_other_removals_are_refused(in_memory: Build, paper: Callable[..., Anatomy]) -> None:
    with pytest.raises(InputError, match=r"cannot be sliced.*Choose"):
        compress(in_memory("opt"), Recipe.from_dict({"model": "opt", "stages": [{"method": "slicegpt"}]}), calibration=TOKENS)
    stages = [{"method": "slicegpt", "options": {"multiple": 4}}, {"method": "layerchop", "options": {"remove": 0.34}}]
    for order in (stages, stages[::-1]):
        with pytest.raises(InputError, match=r"slice.*Leave out `slicegpt`"):
            compress(in_memory("llama"), Recipe.from_dict({"model": "llama", "stages": order}), calibration=TOKENS)
    asked = Recipe.from_dict({"model": "paper", "structure": {"stream": {"width": 8}}})
    (problem,) = check_stages(asked, paper(), registry.catalogue())
    assert (problem.field, "slicegpt" in problem.right) == ("structure.stream", True)
    wrong = {"width": 10_000}, {"width": 8, "drop": [1]}
    found = [
        Recipe.from_dict({"model": "paper", "structure": {"stream": {"width": fields["width"]}, "drop_blocks": fields.get("drop", [])}}) for fields in wrong
    ]
    assert ["structure.stream" in recipe.validate_for(paper())[0].field for recipe in found] == [True, True]
