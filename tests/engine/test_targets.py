"""The little language of targets: what each atom points at, and what is said of one that points at nothing."""

from collections.abc import Callable

import pytest

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.targets import chosen_blocks, matches, pattern_problem


def pointed_at(pattern: str, anatomy: Anatomy) -> set[tuple[int | None, str]]:
    return {(part.block, part.role) for part in anatomy.linears if matches(pattern, part, anatomy.blocks)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("role:v", {(block, "v") for block in range(4)}),
        ("role:q & blocks:first2", {(0, "q"), (1, "q")}),
        ("blocks:last1 & role:attention", {(3, role) for role in "qkvo"}),
        ("role:mlp & blocks:1-2 & role:up", {(1, "up"), (2, "up")}),
        ("blocks:odd & role:o, blocks:0 & role:k", {(1, "o"), (3, "o"), (0, "k")}),
        ("model.layers.2.mlp.*", {(2, "gate"), (2, "up"), (2, "down")}),
        ("model.layers.1.self_attn.q_proj", {(1, "q")}),
    ],
)
def test_patterns_point_at_layers(paper: Callable[..., Anatomy], pattern: str, expected: set[tuple[int, str]]) -> None:
    assert pointed_at(pattern, paper()) == expected
    assert pattern_problem(pattern, paper()) is None


def test_star_is_everything(paper: Callable[..., Anatomy]) -> None:
    assert len(pointed_at("*", paper())) == 28


def test_a_fused_matrix_answers_to_each_of_its_roles() -> None:
    fused = Part(name="h.0.attn.c_attn", role="qkv", block=0, out_features=192, in_features=64, fused=("q", "k", "v"))
    assert all(matches(f"role:{role}", fused, 1) for role in ("q", "k", "v", "qkv", "attention"))
    assert not any(matches(f"role:{role}", fused, 1) for role in ("o", "mlp", "up"))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("role:w", "no role 'w'"),
        ("role:gat", "did you mean 'gate'"),
        ("blocks:frist2", "names no blocks"),
        ("blocks:9", "matches none of the 28"),
        ("role:fc1", "matches none"),
        ("model.layer.0.*", "matches none"),
        ("role:q, model.nothing", "'model.nothing' matches none"),
        ("role:q &", "empty"),
        ("", "empty"),
    ],
)
def test_patterns_that_match_nothing_are_told(paper: Callable[..., Anatomy], pattern: str, said: str) -> None:
    assert said in (pattern_problem(pattern, paper()) or "")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("first2", {0, 1}),
        ("last2", {3, 4}),
        ("first9", {0, 1, 2, 3, 4}),
        ("2", {2}),
        ("1-3", {1, 2, 3}),
        ("odd", {1, 3}),
        ("even", {0, 2, 4}),
        ("first0", set()),
    ],
)
def test_block_selectors(selector: str, expected: set[int]) -> None:
    assert chosen_blocks(selector, 5) == expected


@pytest.mark.parametrize("selector", ["", "-1", "last", "2-", "half", "1.5"])
def test_block_selectors_that_say_nothing(selector: str) -> None:
    with pytest.raises(InputError, match="names no blocks"):
        chosen_blocks(selector, 5)
