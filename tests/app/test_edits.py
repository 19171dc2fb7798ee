"""Edits of a recipe: what they mean, how short they stay, and what they refuse."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from bitpress.app import edits
from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe, SchemeLine, Stage

Q0 = "model.layers.0.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"
UP3 = "model.layers.3.mlp.up_proj"


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(model="tiny-stories", schemes=[SchemeLine(match="*", weights={"bits": 4, "group_size": 64})], stages=[Stage(method="rtn")])


@pytest.mark.parametrize(
    ("pattern", "shortest"),
    [("*", "*"), ("role:v", "role:v"), ("role:attention", "role:attention"), ("blocks:1-3", "blocks:1-3"), ("role:q & blocks:0-1", "role:q & blocks:0-1"),
     ("role:q, role:v", "role:q, role:v"), ("blocks:0, blocks:5", "blocks:0, blocks:5"), (f"{Q0}, {UP3}", f"{Q0}, {UP3}")],
)  # fmt: skip
def test_a_selection_gets_the_shortest_pattern_that_names_it(pattern: str, shortest: str, anatomy: Anatomy) -> None:
    found = edits.pattern_of(edits.covered(pattern, anatomy), anatomy)
    assert edits.covered(found, anatomy) == edits.covered(pattern, anatomy)
    assert found == shortest


def test_an_edit_of_the_same_pattern_replaces_the_line(recipe: Recipe, anatomy: Anatomy) -> None:
    once = edits.set_weights(recipe, "role:v", anatomy, bits=6)
    twice = edits.set_weights(once, "role:v", anatomy, bits=8)
    assert [line.match for line in twice.schemes] == ["*", "role:v"]
    assert twice.resolve(anatomy)[V0].weights.bits == 8


def test_an_edit_of_everything_takes_out_what_it_overrides(recipe: Recipe, anatomy: Anatomy) -> None:
    mixed = edits.set_weights(edits.set_weights(recipe, "role:v", anatomy, bits=6), "blocks:first2", anatomy, bits=8)
    flat = edits.set_weights(mixed, "*", anatomy, bits=3)
    assert len(flat.schemes) == 1
    assert {scheme.weights.bits for scheme in flat.resolve(anatomy).values()} == {3}


def test_setting_one_field_of_everything_keeps_the_exceptions_in_the_others(recipe: Recipe, anatomy: Anatomy) -> None:
    mixed = edits.set_weights(edits.set_weights(recipe, "role:v", anatomy, bits=6), "*", anatomy, symmetric=True)
    schemes = mixed.resolve(anatomy)
    assert schemes[V0].weights.bits == 6
    assert schemes[V0].weights.symmetric
    assert schemes[Q0].weights.bits == 4


def test_sixteen_bits_leave_a_layer_dense_and_bring_it_back(recipe: Recipe, anatomy: Anatomy) -> None:
    dense = edits.set_weights(recipe, "role:q", anatomy, bits=16)
    assert dense.resolve(anatomy)[Q0].is_dense
    assert edits.set_weights(dense, "role:q", anatomy, bits=5).resolve(anatomy)[Q0].weights.bits == 5


def test_stages_follow_the_schemes(recipe: Recipe, anatomy: Anatomy) -> None:
    sparse = edits.set_sparsity(recipe, "role:mlp", anatomy, 0.5, "2:4")
    assert [stage.method for stage in sparse.stages] == ["magnitude", "rtn"]
    only_zeros = edits.set_weights(sparse, "*", anatomy, bits=16)
    assert [stage.method for stage in only_zeros.stages] == ["magnitude"]
    assert edits.set_sparsity(only_zeros, "*", anatomy, 0, "2:4").stages == []


def test_a_rank_brings_its_stage_before_the_rounding_and_takes_it_away(recipe: Recipe, anatomy: Anatomy) -> None:
    thin = edits.set_rank(recipe, "role:mlp", anatomy, 0.5)
    assert [stage.method for stage in thin.stages] == ["svd-llm", "rtn"]
    assert thin.resolve(anatomy)[UP3].rank.keep == 0.5
    assert "rank 50% of break-even" in edits.describe(thin.resolve(anatomy)[UP3])
    both = edits.set_sparsity(thin, "role:q", anatomy, 0.5, "2:4")
    assert [stage.method for stage in both.stages] == ["magnitude", "svd-llm", "rtn"]
    whole = edits.set_rank(thin, "*", anatomy, 1.0)
    assert [stage.method for stage in whole.stages] == ["rtn"] and whole.resolve(anatomy)[UP3].rank is None


def test_the_cache_gets_bits_and_a_latent_with_its_stage(recipe: Recipe, anatomy: Anatomy) -> None:
    coded = edits.set_cache(recipe, anatomy, 4, 1.0)
    assert coded.kv_cache.keys.axis == "channel" and coded.kv_cache.values.axis == "token" and coded.kv_cache.rank is None
    assert coded.stages == recipe.stages
    both = edits.set_cache(coded, anatomy, 4, 0.6)
    assert both.kv_cache.rank.keep == 0.6 and [stage.method for stage in both.stages] == ["svd-llm", "rtn"]
    assert ("cache", "dense", "keys 4 bit, values 4 bit, latent 60%") in edits.difference(recipe, both, anatomy)
    assert edits.set_cache(both, anatomy, 16, 1.0) == recipe


def test_two_of_four_is_always_a_half(recipe: Recipe, anatomy: Anatomy) -> None:
    assert edits.set_sparsity(recipe, "*", anatomy, 0.3, "2:4").resolve(anatomy)[Q0].sparsity.ratio == 0.5


def test_protection_can_be_moved_and_taken_back(recipe: Recipe, anatomy: Anatomy) -> None:
    two = edits.protect(recipe, anatomy, "first", 2)
    one = edits.protect(edits.protect(two, anatomy, "last", 1), anatomy, "first", 1)
    assert (edits.protected(one, "first"), edits.protected(one, "last")) == (1, 1)
    assert one.resolve(anatomy)["model.layers.1.mlp.up_proj"].weights.bits == 4
    assert edits.protect(edits.protect(one, anatomy, "first", 0), anatomy, "last", 0).schemes == recipe.schemes


def test_blocks_are_removed_and_put_back_but_never_all(recipe: Recipe, anatomy: Anatomy) -> None:
    gone = edits.drop_blocks(recipe, anatomy, [1, 2], True)
    assert gone.dropped_blocks(anatomy) == [1, 2]
    assert edits.drop_blocks(gone, anatomy, [1, 2], False).dropped_blocks(anatomy) == []
    with pytest.raises(InputError, match="Every block"):
        edits.drop_blocks(recipe, anatomy, range(6), True)


def test_lines_of_the_table_are_checked(recipe: Recipe, anatomy: Anatomy) -> None:
    with pytest.raises(InputError, match="no role 'w'"):
        edits.with_lines(recipe, [{"match": "role:w", "weights": {"bits": 4}}], anatomy)
    with pytest.raises(InputError, match="not a width"):
        edits.with_lines(recipe, [{"match": "*", "weights": {"bits": 7}}], anatomy)


def test_the_difference_names_layers_by_pattern(recipe: Recipe, anatomy: Anatomy) -> None:
    changed = edits.set_embedding(edits.set_weights(recipe, "role:v", anatomy, bits=8), anatomy, 8)
    assert edits.difference(recipe, changed, anatomy) == [
        ("role:v", "4 bit, group 64, asymmetric", "8 bit, group 64, asymmetric"), ("embedding", "dense", "8 bit"),
    ]  # fmt: skip
    assert edits.difference(recipe, recipe, anatomy) == []


patterns = some.sampled_from(["*", "role:v", "role:mlp", "role:attention", "blocks:0-2", "blocks:last2", "role:q & blocks:1", V0])
changes = some.one_of(
    some.fixed_dictionaries({"bits": some.sampled_from([2, 3, 4, 5, 6, 8, 16])}),
    some.fixed_dictionaries({"group_size": some.sampled_from([32, 64, 0])}),
    some.fixed_dictionaries({"symmetric": some.booleans()}),
    some.fixed_dictionaries({"ratio": some.sampled_from([0.0, 0.3, 0.5]), "kind": some.sampled_from(["unstructured", "2:4"])}),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.lists(some.tuples(patterns, changes), max_size=7))
def test_a_short_list_means_what_all_edits_in_a_row_mean(anatomy: Anatomy, actions: list) -> None:
    short, full = Recipe(model="tiny-stories"), []
    for pattern, change in actions:
        if "ratio" in change:
            short = edits.set_sparsity(short, pattern, anatomy, **change)
            ratio = 0.5 if change["kind"] == "2:4" else change["ratio"]
            full.append({"match": pattern, "sparsity": {"ratio": ratio, "pattern": change["kind"]} if change["ratio"] else "dense"})
        else:
            short = edits.set_weights(short, pattern, anatomy, **change)
            full.append({"match": pattern, "weights": "dense" if change.get("bits") == 16 else change})
    assert short.resolve(anatomy) == Recipe.from_dict({"model": "tiny-stories", "schemes": full}).resolve(anatomy)
    assert len(short.schemes) <= len(full)


CATALOGUE = {"rtn": "quantize", "gptq": "quantize", "nf4": "quantize", "awq": "prepare", "rotation": "prepare", "wanda": "prune"}


def test_an_edit_keeps_the_chosen_method(recipe: Recipe, anatomy: Anatomy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edits, "kinds", lambda: CATALOGUE)
    chosen = recipe.model_copy(update={"stages": [Stage(method="awq"), Stage(method="gptq")]})
    assert [stage.method for stage in edits.set_weights(chosen, "role:v", anatomy, bits=6).stages] == ["awq", "gptq"]


def test_preparations_stand_before_what_rounds_and_keep_their_options(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edits, "kinds", lambda: CATALOGUE)
    start = recipe.model_copy(update={"stages": [Stage(method="wanda"), Stage(method="awq", options={"clip": False}), Stage(method="gptq")]})
    both = edits.set_preparations(start, ["rotation", "awq"])
    assert [stage.method for stage in both.stages] == ["wanda", "rotation", "awq", "gptq"]
    assert both.stages[2].options == {"clip": False}
    assert [stage.method for stage in edits.set_preparations(both, []).stages] == ["wanda", "gptq"]


def test_a_method_of_another_format_brings_the_format_and_the_widths_that_it_has(recipe: Recipe, anatomy: Anatomy) -> None:
    mixed = edits.set_weights(edits.set_weights(recipe, "role:v", anatomy, bits=8), "role:q", anatomy, bits=16)
    table = edits.fit_weights(mixed, {"part": "weights", "bits": [4], "formats": ["nf4"]}).resolve(anatomy)
    assert {(scheme.weights.format, scheme.weights.bits) for scheme in table.values() if scheme.weights} == {("nf4", 4)}
    assert table[Q0].is_dense
    back = edits.fit_weights(edits.fit_weights(mixed, {"bits": [4], "formats": ["nf4"]}), {"bits": [2, 3, 4, 8], "formats": ["uniform"]})
    assert {scheme.weights.format for scheme in back.resolve(anatomy).values() if scheme.weights} == {"uniform"}
