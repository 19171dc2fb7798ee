"""Sweeps on paper: grids and their refusals, the search's first proposals and its prior, and that none of it needs torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine.accounting import size_of
from bitpress.engine.choices import Choices, choices_of
from bitpress.engine.errors import InputError
from bitpress.engine.methods.registry import write_catalogue
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.sweep_record import front
from bitpress.engine.sensitivity_file import FISHER, OPTIONS, Score, SensitivityReport
from bitpress.engine.sweep import Search, SweepPlan, grid_points, set_axis
from bitpress.engine.sweep_search import Proposer, Tried, check_methods

BASE: dict[str, Any] = {"model": "paper", "schemes": [{"match": "*", "weights": {"bits": 4, "group_size": 32}}], "stages": [{"method": "rtn"}]}
HARM = {"8-bit": 1e-5, "4-bit": 4e-3, "3-bit": 2e-2, "2-bit": 0.12}
PaperAnatomy = Callable[..., Anatomy]


@pytest.fixture(autouse=True)
def known_methods(bitpress_home: Path) -> None:
    write_catalogue()


@pytest.fixture
def choices(paper: PaperAnatomy) -> Choices:
    """Every layer hurts alike, but down twice as much."""
    anatomy = paper(blocks=4)
    scores = [Score(layer=part.name, option=option, kind=FISHER, score=harm * (1 + (part.role == "down"))) for part in anatomy.linears
              for option, harm in HARM.items()]  # fmt: skip
    report = SensitivityReport(digest="0" * 16, model="paper", fingerprint="f" * 64, kinds=(FISHER,), text="wiki", tokens_sha256="", protocol="made up",
                               options=OPTIONS[:4], scores=scores)  # fmt: skip
    return choices_of(anatomy, report, FISHER)


def plan(**asked: Any) -> SweepPlan:
    return SweepPlan.of({"base": BASE, **asked})


def test_a_grid_is_every_combination_once_with_the_stages_it_needs(paper: PaperAnatomy) -> None:
    points = grid_points(plan(grid={"bits": [3, 4, 16], "sparsity": [0, "2:4"], "method": ["rtn", "gptq"]}), paper())
    digests = [point.recipe.digest() for point in points]
    assert len(set(digests)) == len(digests) == 3 * 2 * 2 - 2, "dense weights have no rounding method to differ by"
    assert [point.number for point in points] == list(range(len(points)))
    by_name = {point.name: point.recipe for point in points}
    mixed = by_name["bits 3, sparsity 2:4, method gptq"]
    assert [stage.method for stage in mixed.stages] == ["magnitude", "gptq"]
    scheme = next(iter(mixed.resolve(paper()).values()))
    assert (scheme.weights.bits, scheme.weights.group_size, scheme.sparsity.pattern) == (3, 32, "2:4")
    assert by_name["bits 16, sparsity 0, method rtn"].stages == []
    assert not any(point.wrong for point in points)


def test_axes_are_names_or_paths_into_the_recipe() -> None:
    base = Recipe.from_dict(BASE)
    assert set_axis(base, "embedding", 4).embedding.bits == 4
    assert set_axis(set_axis(base, "embedding", 4), "embedding", 16).embedding is None
    assert set_axis(base, "rank", 0.5).schemes[0].rank.keep == 0.5
    assert set_axis(base, "schemes.0.weights.symmetric", True).schemes[0].weights.symmetric is True
    assert set_axis(base, "calibration.sequences", 16).calibration.sequences == 16
    assert set_axis(base, "stages.0.options.clip_search", True).stages[0].options == {"clip_search": True}
    bare = set_axis(Recipe(model="paper"), "bits", 3)
    assert bare.schemes[0].match == "*"
    assert bare.schemes[0].weights.bits == 3


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "a grid or a search"),
        ({"grid": {"bits": [4]}, "search": {}}, "a grid or a search"),
        ({"grid": {}}, "grid is empty"),
        ({"grid": {"bits": []}}, "grid is empty"),
        ({"grid": {"seed": list(range(501))}}, "501 recipes is too large.*500"),
        ({"search": {"low": 5, "high": 4}}, "no room"),
        ({"search": {"trials": 1}}, r"search\.trials"),
        ({"search": {"tries": 9}}, r"search\.tries"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan(**asked)


def test_values_that_no_recipe_has_are_refused_and_some_points_may_be_unfit(paper: PaperAnatomy) -> None:
    with pytest.raises(InputError, match="no axis 'bitz'"):
        grid_points(plan(grid={"bitz": [3]}), paper())
    with pytest.raises(InputError, match=r"no 'schemes\.7"):
        grid_points(plan(grid={"schemes.7.weights.bits": [3]}), paper())
    with pytest.raises(InputError, match="not a width"):
        grid_points(plan(grid={"bits": [7]}), paper())
    with pytest.raises(InputError, match="No recipe of this grid can run"):
        grid_points(plan(grid={"group_size": [4096]}), paper())
    points = grid_points(plan(grid={"group_size": [32, 4096]}), paper())
    assert [bool(point.wrong) for point in points] == [False, True]
    assert "4096" in points[1].wrong


def test_the_first_proposals_are_the_best_by_the_scores(choices: Choices) -> None:
    proposer = Proposer(choices, Search(trials=9, low=3.0, high=6.0), Recipe.from_dict(BASE))
    assert [seed["linear_bits"] for seed in proposer.seeds] == [3.0, 4.5, 6.0]
    points = [proposer.next([], [], number) for number in range(3)]
    for point in points:
        size = size_of(point.recipe, choices.anatomy)
        assert size.bits_per_weight_linears <= point.given["linear_bits"] + 1e-9
        assert not point.wrong
    assert points[0].predicted > points[1].predicted > points[2].predicted > 0


def test_a_weight_moves_bits_to_its_role_and_costs_what_the_scores_say(choices: Choices) -> None:
    proposer = Proposer(choices, Search(low=3.0, high=6.0), Recipe.from_dict(BASE))

    def bits_of(point: Any, role: str) -> float:
        schemes = point.recipe.resolve(choices.anatomy)
        found = [scheme.weights.bits if scheme.weights else 16 for name, scheme in schemes.items() if f".{role}_proj" in name]
        return sum(found) / len(found)

    plain = proposer.point({"linear_bits": 4.0, "method": "rtn"}, 0)
    moved = proposer.point({"linear_bits": 4.0, "method": "gptq", "v": 4.0, "gate": 0.25}, 0)
    assert bits_of(moved, "v") > bits_of(plain, "v")
    assert moved.predicted >= plain.predicted
    assert [stage.method for stage in moved.recipe.stages] == ["gptq"]


def test_the_search_goes_on_the_same_from_what_was_tried(choices: Choices) -> None:
    search = Search(trials=12, low=3.0, high=6.0, methods=("rtn", "gptq"))
    worse = {"rtn": 3.0, "gptq": 0.5}
    tried: list[Tried] = []
    proposer = Proposer(choices, search, Recipe.from_dict(BASE))
    for number in range(8):
        point = proposer.next(tried, [], number)
        size = size_of(point.recipe, choices.anatomy).bytes
        tried.append(Tried(point.given, size, worse[point.given["method"]] * point.predicted, point.predicted))
    assert proposer.scale(tried, "rtn") == pytest.approx(3.0)
    assert proposer.scale(tried, "gptq") == pytest.approx(0.5)
    again = Proposer(choices, search, Recipe.from_dict(BASE)).next(tried, [], 8)
    assert again == proposer.next(tried, [], 8)
    later = [proposer.next(tried, [], number).given["method"] for number in range(8, 14)]
    assert later.count("gptq") > later.count("rtn"), "it asks for what was measured to lose less"


def test_a_search_names_methods_that_do_not_round_and_budgets_that_cannot_be(choices: Choices) -> None:
    with pytest.raises(InputError, match=r"'wanda' does not round.*gptq"):
        check_methods(Search(methods=("wanda",)))
    with pytest.raises(InputError, match="cannot be met"):
        Proposer(choices, Search(low=1.5, high=6.0), Recipe.from_dict(BASE))


def test_the_front_is_what_no_other_beats() -> None:
    assert front({"a": (1, 5), "b": (2, 3), "c": (2, 4), "d": (3, 3), "e": (4, 1)}) == ["a", "b", "e"]
    assert front({}) == []


def test_nothing_of_it_imports_torch() -> None:
    code = "import sys\nfrom bitpress.engine import sweep_search\nfrom bitpress.engine.runs import sweep_job\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout.strip() == "False"
