"""The recipe: YAML both ways, digest, migration, resolution, and every refusal with its field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import BITS, MAX_YAML_BYTES, Recipe, Scheme, SparsityScheme, WeightScheme

WIDTHS, GROUPS = st.sampled_from(BITS), st.one_of(st.just("row"), st.integers(8, 65536))
KEEP, RATIO = st.floats(0.01, 1.0), st.floats(0.0, 0.99)
PATTERNS = st.sampled_from(("*", "role:v, role:down", "blocks:first2 & role:mlp", "model.layers.3.*"))


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


WEIGHTS = st.one_of(st.just("dense"), optional(bits=WIDTHS, group_size=GROUPS, symmetric=st.booleans()))
FULL_WEIGHTS = st.fixed_dictionaries({"bits": WIDTHS}, optional={"group_size": GROUPS, "symmetric": st.booleans()})
SPARSITY = st.one_of(st.just("dense"), st.fixed_dictionaries({"ratio": RATIO}, optional={"pattern": st.sampled_from(("unstructured", "2:4", "4:8"))}))
RANK = st.one_of(
    st.just("dense"),
    st.fixed_dictionaries({"keep": KEEP}, optional={"factors": FULL_WEIGHTS}),
    st.fixed_dictionaries({"rank": st.integers(1, 4096)}, optional={"factors": FULL_WEIGHTS}),
)
LINES = st.fixed_dictionaries({"match": PATTERNS}, optional={"weights": WEIGHTS, "sparsity": SPARSITY, "rank": RANK})
SIDE = st.fixed_dictionaries({"bits": WIDTHS, "axis": st.sampled_from(("channel", "token"))}, optional={"group_size": GROUPS})
CACHE = optional(keys=SIDE, values=SIDE, residual_window=st.integers(0, 512), rank=st.fixed_dictionaries({"keep": KEEP}))
STRUCTURE = optional(
    drop_blocks=st.one_of(st.lists(st.integers(0, 40), max_size=4), st.sampled_from(("odd", "last4"))),
    remove_heads=st.dictionaries(st.integers(0, 30), st.lists(st.integers(0, 9), max_size=3), max_size=3),
    neurons=st.fixed_dictionaries({"keep": KEEP}, optional={"match": PATTERNS}),
    share_blocks=st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=2), max_size=2),
)
STAGES = st.fixed_dictionaries(
    {"method": st.sampled_from(("rtn", "magnitude", "gptq"))},
    optional={"options": st.dictionaries(st.text("abc_", min_size=1), st.one_of(st.booleans(), st.integers(), st.text()), max_size=3), "targets": PATTERNS},
)
RECIPES = st.fixed_dictionaries(
    {"model": st.text(min_size=1, max_size=20)},
    optional={
        "seed": st.integers(), "schemes": st.lists(LINES, max_size=4), "embedding": st.fixed_dictionaries({"bits": WIDTHS}),
        "head": st.fixed_dictionaries({"bits": WIDTHS}), "structure": STRUCTURE, "kv_cache": CACHE, "stages": st.lists(STAGES, max_size=3),
        "calibration": optional(text=st.sampled_from(("auto", "wiki")), sequences=st.integers(1, 4096), length=st.integers(8, 32768)),
        "measure": optional(tier=st.sampled_from(("quick", "standard", "full")), text=st.just("auto"), latency=st.booleans()),
    },
)  # fmt: skip


def recipe(**fields: Any) -> Recipe:
    return Recipe.from_dict({"model": "paper", **fields})


@settings(max_examples=150, deadline=None)
@given(RECIPES)
def test_yaml_round_trip(values: dict[str, Any]) -> None:
    made = Recipe.from_dict(values)
    back = Recipe.from_text(made.to_yaml())
    assert back == made
    assert back.digest() == made.digest()
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_the_design_example_is_read(tmp_path: Path) -> None:
    text = """
schema_version: 1
model: smollm2-135m
calibration: {text: wiki, part: calibration, sequences: 64, length: 512}
schemes:
  - {match: "*", weights: {bits: 4, group_size: 64, symmetric: false}}
  - {match: "role:v, role:down", weights: {bits: 6}}
  - {match: "role:gate, role:up", rank: {keep: 0.7, factors: {bits: 8}}}
embedding: {bits: 8}
structure: {drop_blocks: [20, 21], remove_heads: {5: [1]}, neurons: {match: "*", keep: 0.8}, share_blocks: [[14, 15]]}
kv_cache: {keys: {bits: 4, axis: channel, group_size: 32}, values: {bits: 4, axis: token}, residual_window: 64, rank: {keep: 0.6}}
stages: [{method: awq}, {method: gptq, options: {act_order: true}}]
measure: {tier: standard, text: wikitext2-raw/test}
"""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    made = Recipe.from_yaml(path)
    assert made.structure.remove_heads == {5: [1]}
    assert made.stages[1].options == {"act_order": True}


def test_digest_is_stable_and_tells_recipes_apart() -> None:
    lines = [{"match": "*", "weights": {"bits": 4, "group_size": 64}}]
    first = recipe(schemes=lines)
    assert first.digest() == recipe(schemes=lines).digest() == "9554e198b06f9c10"
    assert first.digest() == Recipe.from_dict(dict(reversed(list(first.to_dict().items())))).digest(), "the order of keys says nothing"
    others = [
        recipe(schemes=[{"match": "*", "weights": {"bits": 3, "group_size": 64}}]),
        recipe(schemes=lines, seed=1),
        recipe(schemes=lines, embedding={"bits": 8}),
    ]
    assert len({first.digest(), *(other.digest() for other in others)}) == 4


def test_later_lines_win_field_by_field(paper: Callable[..., Anatomy]) -> None:
    lines = [
        {"match": "*", "weights": {"bits": 4, "group_size": 32}, "sparsity": {"ratio": 0.5}},
        {"match": "role:v", "weights": {"bits": 6}},
        {"match": "role:v & blocks:0", "weights": {"symmetric": True}, "sparsity": "dense"},
        {"match": "role:o", "weights": "dense"},
        {"match": "role:o & blocks:1", "weights": {"group_size": 16}},
    ]
    schemes = recipe(schemes=lines).resolve(paper())
    half = SparsityScheme(ratio=0.5)
    assert schemes["model.layers.1.self_attn.q_proj"] == Scheme(weights=WeightScheme(bits=4, group_size=32), sparsity=half)
    assert schemes["model.layers.1.self_attn.v_proj"] == Scheme(weights=WeightScheme(bits=6, group_size=32), sparsity=half)
    assert schemes["model.layers.0.self_attn.v_proj"] == Scheme(weights=WeightScheme(bits=6, group_size=32, symmetric=True))
    assert schemes["model.layers.0.self_attn.o_proj"] == Scheme(sparsity=half)
    assert schemes["model.layers.1.self_attn.o_proj"].weights is None, "a group without a width asks for nothing"
    assert Scheme(sparsity=SparsityScheme(ratio=0)).is_dense


def test_dropped_blocks_have_no_scheme(paper: Callable[..., Anatomy]) -> None:
    made = recipe(structure={"drop_blocks": "odd"}, schemes=[{"match": "*", "weights": {"bits": 4}}])
    assert made.dropped_blocks(paper(5)) == [1, 3]
    assert {name.split(".")[2] for name in made.resolve(paper(5))} == {"0", "2", "4"}
    assert recipe(structure={"drop_blocks": [2, 0, 2]}).dropped_blocks(paper()) == [0, 2]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 4}, "bits: is not a field"),
        ({"schemes": [{"match": "*", "weight": {"bits": 4}}]}, r"schemes\[0\].weight: is not a field"),
        ({"schemes": [{"match": "*", "weights": {"bits": 1.5}}]}, r"schemes\[0\].weights.bits: 1.5 is not a width.*2, 3, 4, 5, 6, 8"),
        ({"schemes": [{"match": "*", "weights": {"bits": 7}}]}, r"schemes\[0\].weights.bits: 7 is not a width"),
        ({"schemes": [{"match": "*", "weights": {"bits": "4"}}]}, "'4' is not a width"),
        ({"schemes": [{"match": "*", "weights": {"bits": True}}]}, "True is not a width"),
        ({"schemes": [{"match": "*", "weights": {"bits": 4.0}}]}, "4.0 is not a width"),
        ({"schemes": [{"match": "*", "weights": {"bits": 4, "group_size": 4}}]}, "group_size: 4 is not a group size"),
        ({"schemes": [{"match": "*", "weights": {"bits": 4, "group_size": "all"}}]}, "'all' is not a group size"),
        ({"schemes": [{"match": "*", "weights": {"bits": 4, "symmetric": 1}}]}, "symmetric"),
        ({"schemes": [{"match": "*", "weights": 4}]}, r"schemes\[0\].weights: .*needs fields"),
        ({"schemes": [{"weights": {"bits": 4}}]}, r"schemes\[0\].match: is missing"),
        ({"schemes": {"match": "*"}}, "schemes"),
        ({"schemes": [{"match": "*", "sparsity": {"ratio": 1.0}}]}, "sparsity.ratio"),
        ({"schemes": [{"match": "*", "sparsity": {"ratio": -0.1}}]}, "sparsity.ratio"),
        ({"schemes": [{"match": "*", "sparsity": {"ratio": float("nan")}}]}, "sparsity.ratio"),
        ({"schemes": [{"match": "*", "sparsity": {"ratio": "0.5"}}]}, "ratio: must be a number, not '0.5'"),
        ({"schemes": [{"match": "*", "rank": {"keep": "0.5"}}]}, "keep: must be a number, not '0.5'"),
        ({"schemes": [{"match": "*", "rank": {"keep": True}}]}, "keep: must be a number, not True"),
        ({"schemes": [{"match": "*", "sparsity": {"ratio": 0.5, "pattern": "3:5"}}]}, "sparsity.pattern"),
        ({"schemes": [{"match": "*", "sparsity": {"ratio": 1.0}}]}, "ratio: 1.0 would leave nothing of a matrix"),
        ({"schemes": [{"match": "*", "rank": {"keep": 0}}]}, "rank.keep"),
        ({"seed": 1.0}, "seed: must be a whole number, not 1.0"),
        ({"embedding": {"bits": 4, "group_size": 64}}, "embedding.group_size: is not a field"),
        ({"measure": {"tier": "huge"}}, "measure.tier"),
        ({"calibration": {"part": "evaluation"}}, "calibration.part"),
        ({"calibration": {"sequences": 0}}, "calibration.sequences"),
        ({"schema_version": 2}, "schema version 2"),
        ({"schema_version": "1"}, "schema_version"),
        ({"model": 5}, "model"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        recipe(**fields)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b", "not a mapping"),
        ("", "not a mapping"),
        ("seed: 1", "model: is missing"),
        ("model: a\n" + " " * MAX_YAML_BYTES, "too large"),
    ],
)
def test_text_that_is_no_recipe(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Recipe.from_text(text)


def test_yaml_cannot_make_objects() -> None:
    with pytest.raises(InputError, match="not valid YAML"):
        Recipe.from_text("model: !!python/object/apply:os.getcwd []")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "binary.yaml")


def test_version_0_is_migrated(paper: Callable[..., Anatomy]) -> None:
    old = yaml.safe_dump({"schema_version": 0, "model": "paper", "layers": {"*": 4, "role:v": 8}})
    made = Recipe.from_text(old)
    assert made.schema_version == 1
    assert [stage.method for stage in made.stages] == ["rtn"]
    assert {scheme.weights.bits for name, scheme in made.resolve(paper()).items() if "v_proj" in name and scheme.weights} == {8}
    for version in (-1, True, None):
        with pytest.raises(InputError):
            recipe(schema_version=version)
    with pytest.raises(InputError, match="layers: is not a mapping"):
        recipe(schema_version=0, layers=[4])


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"schemes": [{"match": "role:w", "weights": {"bits": 4}}]}, "schemes[0].match", "no role"),
        ({"schemes": [{"match": "model.layer.*", "weights": {"bits": 4}}]}, "schemes[0].match", "matches none"),
        ({"stages": [{"method": "rtn", "targets": "blocks:9"}]}, "stages[0].targets", "matches none"),
        ({"schemes": [{"match": "role:q & blocks:0", "weights": {"bits": 4, "group_size": 128}}]}, "schemes (model.layers.0.self_attn.q_proj)", "64 inputs"),
        ({"schemes": [{"match": "role:q & blocks:0", "sparsity": {"ratio": 0.4, "pattern": "2:4"}}]}, "schemes (model.layers.0.self_attn.q_proj)", "0.4"),
        ({"structure": {"drop_blocks": [4]}}, "structure.drop_blocks", "no block 4"),
        ({"structure": {"drop_blocks": [-1]}}, "structure.drop_blocks", "no block -1"),
        ({"structure": {"drop_blocks": "first4"}}, "structure.drop_blocks", "Every block"),
        ({"structure": {"drop_blocks": "some"}}, "structure.drop_blocks", "names no blocks"),
        ({"head": {"bits": 8}}, "head", "tied"),
    ],
)
def test_what_does_not_fit_the_model_is_a_problem(paper: Callable[..., Anatomy], fields: dict[str, Any], field: str, said: str) -> None:
    (problem,) = recipe(**fields).validate_for(paper())
    assert problem.field == field
    assert said in problem.wrong
    assert problem.right
    assert field in str(problem)


def test_an_untied_head_may_have_its_own_width(paper: Callable[..., Anatomy]) -> None:
    assert recipe(head={"bits": 8}, embedding={"bits": 4}).validate_for(paper(tied=False)) == []


def test_formats_of_codes_and_their_widths(paper: Callable[..., Anatomy]) -> None:
    lines = [{"match": "*", "weights": {"bits": 3, "format": "bcq"}}, {"match": "role:v", "weights": {"format": "nf4", "bits": 4}, "activations": {"bits": 8}}]
    plan = Recipe.from_dict({"model": "m", "schemes": lines})
    assert plan.validate_for(paper()) == [] and Recipe.from_text(plan.to_yaml()) == plan
    schemes = list(plan.resolve(paper()).values())
    assert {(scheme.weights.format, scheme.weights.bits) for scheme in schemes if scheme.weights} == {("bcq", 3), ("nf4", 4)}
    alone = Recipe.from_dict({"model": "m", "schemes": [{"match": "*", "weights": {"format": "fp4"}}]})
    assert all(scheme.weights and scheme.weights.bits == 4 for scheme in alone.resolve(paper()).values())


@pytest.mark.parametrize(("form", "bits", "right"), [("nf4", 3, "one of 4"), ("bcq", 8, "one of 2, 3, 4"), ("fp4", 8, "one of 4")])
def test_a_width_that_a_format_has_not(paper: Callable[..., Anatomy], form: str, bits: int, right: str) -> None:
    for part in ({"weights": {"bits": bits, "format": form}}, {"rank": {"keep": 0.5, "factors": {"bits": bits, "format": form}}}):
        found = Recipe.from_dict({"model": "m", "schemes": [{"match": "*", **part}]}).validate_for(paper())
        assert found and f"format {form} has no {bits}-bit" in found[0].wrong and right in found[0].right


@pytest.mark.parametrize("weights", [{"format": "bcq"}, {"zero": "float"}])
def test_codes_without_a_level_0_are_refused_where_weights_are_pruned(paper: Callable[..., Anatomy], weights: dict[str, Any]) -> None:
    line = {"match": "*", "weights": {"bits": 4, **weights}, "sparsity": {"ratio": 0.5}}
    found = Recipe.from_dict({"model": "m", "schemes": [line]}).validate_for(paper())
    assert found and "no level 0" in found[0].wrong and "zero: integer" in found[0].right
    for allowed in ({**line, "sparsity": {"ratio": 0.0}}, {**line, "weights": {"bits": 4}}, {**line, "weights": {"format": "nf4"}}):
        assert Recipe.from_dict({"model": "m", "schemes": [allowed]}).validate_for(paper()) == []


def test_a_recipe_without_new_fields_keeps_its_digest() -> None:
    assert Recipe.from_dict({"model": "m", "schemes": [{"match": "*", "weights": {"bits": 4}}]}).digest() == "b2a9d684890fe533"


@pytest.mark.parametrize("part", [{"weights": {"format": "int4"}}, {"weights": {"bits": 4, "zero": "none"}}, {"activations": {"bits": 6}}])
def test_unknown_values_of_new_fields_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"schemes\[0\]"):
        Recipe.from_dict({"model": "m", "schemes": [{"match": "*", **part}]})
