"""Block sharing: exact at full rank, one storage for several blocks in memory and on disk, the common matrix against its optimum, bad input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitpress.engine.accounting import flops_per_token, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.chosen import decided_recipe
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.decode import Decoder
from bitpress.engine.errors import InputError
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.measure.memory import weights_of
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded
from bitpress.engine.model.sharing import SharedLinear, common_matrix
from bitpress.engine.recipe import Recipe

Build = Callable[..., Loaded]
TOKENS = CalibrationSet("made up", 0, "sha", torch.arange(192).view(8, 24) * 7 % 320)


def recipe(groups: list[list[int]], rank: int | None = None, options: dict[str, Any] | None = None, **more: Any) -> Recipe:
    structure = {"share_blocks": groups, **({"share_rank": rank} if rank else {})}
    stages = [{"method": "block-sharing", "options": options or {}}, *more.pop("stages", [])]
    return Recipe.from_dict({"model": "llama", "structure": structure, "stages": stages, **more})


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS.ids_SL).logits.float()


def make_alike(model: Any, scale: float = 1.0) -> None:
    """Blocks 1 and 2 get the same matrices, those of the second this much larger."""
    for first, second in zip(model.model.layers[1].modules(), model.model.layers[2].modules(), strict=True):
        if isinstance(first, nn.Linear):
            second.weight.data.copy_(first.weight * scale)


@pytest.mark.parametrize("options", [{}, {"by_inputs": False}])
def test_more_rank_loses_less_and_full_rank_only_rounding(in_memory: Build, options: dict[str, Any]) -> None:
    loaded = in_memory("llama")
    dense = logits(loaded.model)
    gaps = [float((logits(compress(loaded, recipe([[1, 2]], rank, options), calibration=TOKENS).model) - dense).norm()) for rank in (None, 8, 32)]
    assert gaps == sorted(gaps, reverse=True) and torch.equal(logits(loaded.model), dense)
    make_alike(loaded.model)
    made = compress(loaded, recipe([[1, 2]], None, options), calibration=TOKENS).model
    assert float((logits(made) - logits(loaded.model)).norm() / dense.norm()) < 0.02, "like blocks lose nothing but rounding"


def test_a_storage_for_both_counted_once_saved_once_and_found_again(in_memory: Build, tmp_path: Path) -> None:
    loaded, notes, plan = in_memory("llama"), [], recipe([[0, 1]], 4)
    result = compress(loaded, plan, lambda kind, data: notes.append(data["text"]) if kind == "note" else None, LayerStore(tmp_path), calibration=TOKENS)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    one, two = (result.model.model.layers[block].mlp.up_proj for block in (0, 1))
    assert isinstance(one, SharedLinear) and one.weight is two.weight and one.left is not two.left
    size = size_of(plan, loaded.anatomy)
    assert result.bytes == size.bytes == weights_of(result.model, loaded.anatomy.block_prefix, loaded.anatomy.itemsize).stored_bytes
    parts = tuple(loaded.anatomy.of_block(0))
    factors = sum(2 * 4 * (part.out_features + part.in_features) for part in parts)
    assert size.dense_bytes - size.bytes == loaded.anatomy.itemsize * (sum(part.numel for part in parts) - factors)
    assert flops_per_token(plan, loaded.anatomy) - flops_per_token(None, loaded.anatomy) == 2 * factors
    again = load_compressed(tmp_path, loaded)
    assert torch.equal(logits(again), logits(result.model)) and again.model.layers[0].mlp.up_proj.weight is again.model.layers[1].mlp.up_proj.weight
    assert notes == ["Blocks 0 and 1 share their matrices, each with rank 4 of its own."]
    assert decided_recipe(tmp_path, plan).structure.share_blocks == [[0, 1]]


def test_steps_give_what_the_whole_forward_gives(in_memory: Build) -> None:
    model: Any = compress(in_memory("llama"), recipe([[0, 2]], 4), calibration=TOKENS).model
    decoder = Decoder(model, dtype=torch.float32)
    stepped = torch.stack([decoder.prefill(TOKENS.ids_SL[0, :4]), *(decoder.step(int(token)) for token in TOKENS.ids_SL[0, 4:])])
    assert torch.allclose(stepped, logits(model)[0, 3:], atol=1e-3)
    assert model.model.layers[0].self_attn.q_proj.weight is model.model.layers[2].self_attn.q_proj.weight, "joining for the loop does not part them"


def test_nearest_neighbours_are_found_and_written_down(in_memory: Build, tmp_path: Path) -> None:
    loaded = in_memory("llama")
    make_alike(loaded.model, 1.01)
    result = compress(loaded, recipe([], 2, {"pairs": 1}), store=LayerStore(tmp_path), calibration=TOKENS)
    assert result.recipe.structure.share_blocks == [[1, 2]]
    with pytest.raises(InputError, match="Only 1 pairs"):
        compress(loaded, recipe([], 2, {"pairs": 2}), calibration=TOKENS)


def test_the_other_blocks_may_be_quantised(in_memory: Build) -> None:
    lines = [{"match": "blocks:2", "weights": {"bits": 8, "group_size": 16}}]
    result = compress(in_memory("llama"), recipe([[0, 1]], 4, schemes=lines, stages=[{"method": "rtn"}]), calibration=TOKENS)
    assert {layer.layer.split(".")[2] for layer in result.layers} == {"2"}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_the_common_matrix_is_the_best_one(seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    weights = [torch.randn(6, 8, generator=made) for _ in range(3)]
    inputs = [torch.randn(40, 8, generator=made, dtype=torch.float64) * torch.linspace(2, 0.2, 8) for _ in range(3)]
    moments = [x.t() @ x / 40 for x in inputs]

    def lost(common: Tensor) -> float:
        gaps = [weight.double() - common.double() for weight in weights]
        return sum(float(((gap @ moment) * gap).sum()) for gap, moment in zip(gaps, moments, strict=True))

    best = common_matrix(weights, moments)
    assert lost(best) <= lost(torch.stack(weights).mean(0)) * (1 + 1e-3)
    assert all(lost(best) <= lost(best + 0.05 * torch.randn(6, 8, generator=made)) for _ in range(5))


@pytest.mark.parametrize(
    ("structure", "wrong", "right"),
    [
        ({"share_blocks": [[0]]}, "cannot share with none", "at least two"),
        ({"share_blocks": [[0, 9]]}, "no block 9", "0 to 3"),
        ({"share_blocks": [[0, 1], [1, 2]]}, "Block 1 is named twice", "one group"),
        ({"share_blocks": [[0, 1]], "drop_blocks": [1]}, "Block 1 is dropped", "drop_blocks or in share_blocks"),
        ({"share_blocks": [[0, 1]], "remove_neurons": {0: [1]}}, "unlike shapes", "Share blocks, or"),
        ({"share_blocks": [[0, 1]], "share_rank": 33}, "Rank 33 is past the 32", "at most 32"),
    ],
)
def test_groups_that_cannot_be_are_named(paper: Callable[..., Anatomy], structure: dict[str, Any], wrong: str, right: str) -> None:
    (problem,) = Recipe.from_dict({"model": "llama", "structure": structure}).validate_for(paper())
    assert wrong in problem.wrong and right in problem.right


def test_shared_matrices_stay_dense_and_rank_0_is_none(paper: Callable[..., Anatomy]) -> None:
    found = recipe([[0, 1]], schemes=[{"match": "role:up", "weights": {"bits": 4}}]).validate_for(paper())
    assert len(found) == 2 and "stay dense" in found[0].wrong
    with pytest.raises(InputError, match="0 is no rank"):
        Recipe.from_dict({"model": "llama", "structure": {"share_blocks": [[0, 1]], "share_rank": 0}})
