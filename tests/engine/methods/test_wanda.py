"""Wanda: golden scores and mask of METHODS 0.6, equality with magnitude for equal norms, patterns, precision."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.making import Making
from bitpress.engine.methods import registry
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import PATTERNS, Recipe, Scheme, SparsityScheme

GOLDEN = torch.tensor([[0.9, -0.3, 0.1, -1.2, 0.45, 0, -0.05, 0.7]])
NORMS = torch.tensor([1, 4, 10, 0.5, 1, 20, 8, 1], dtype=torch.float64)


def pruned(weights: torch.Tensor, moment: torch.Tensor, sparsity: SparsityScheme, name: str = "wanda", **options: object) -> torch.Tensor:
    method = registry.linear(name)
    return method.apply(weights, Scheme(sparsity=sparsity), {"second_moment": moment}, method.parse(options)).weight_NK


def test_golden_scores_and_mask() -> None:
    method = registry.get("wanda")
    scores = method.score(GOLDEN, {"second_moment": NORMS.square()}, method.parse({}))  # type: ignore[attr-defined]
    assert scores[0].tolist() == pytest.approx([0.9, 1.2, 1, 0.6, 0.45, 0, 0.4, 0.7])
    made = pruned(GOLDEN, NORMS.square(), SparsityScheme(ratio=0.5))
    assert (made != 0).int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 1]]
    assert torch.equal(made[made != 0], GOLDEN[made != 0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 8), eights=st.integers(1, 6), norm=st.floats(0.1, 50), pattern=st.sampled_from(PATTERNS))
def test_equal_norms_give_magnitude_by_row(seed: int, rows: int, eights: int, norm: float, pattern: str) -> None:
    weights = torch.randn(rows, 8 * eights, generator=torch.Generator().manual_seed(seed))
    sparsity = SparsityScheme(ratio=0.5, pattern=pattern)  # type: ignore[arg-type]
    moment = torch.full((8 * eights,), norm, dtype=torch.float64)
    assert torch.equal(pruned(weights, moment, sparsity), pruned(weights, moment, sparsity, "magnitude", scope="row"))


def test_a_dead_input_goes_first() -> None:
    weights = torch.tensor([[100.0, 1.0, 2.0, 3.0]])
    made = pruned(weights, torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64), SparsityScheme(ratio=0.25))
    assert made.tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_the_walk_is_in_float32_whatever_is_fastest(in_memory: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def hidden_of(self: Making, block: int, hidden: list[torch.Tensor]) -> None:
        seen.extend(part.dtype for part in hidden)

    monkeypatch.setattr("bitpress.engine.calibrate.compute_dtype", lambda device="cpu": torch.bfloat16)
    monkeypatch.setattr(Making, "enter", hidden_of)
    loaded = in_memory("llama")
    text = CalibrationSet("made here", 0, "none", torch.arange(32).view(2, 16) % loaded.anatomy.vocab)
    for method in ("wanda", "sparsegpt"):
        plan = {"model": "llama", "schemes": [{"match": "*", "sparsity": {"ratio": 0.5}}], "stages": [{"method": method}]}
        compress(loaded, Recipe.from_dict(plan), calibration=text)
    assert seen == [torch.float32] * loaded.anatomy.blocks + [torch.bfloat16] * loaded.anatomy.blocks
