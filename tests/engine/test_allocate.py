"""Budgets on paper models: exact bytes, ties, locks, two budgets, refusals that name the nearest feasible, reasons, and no torch."""

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitpress.engine.accounting import flops_per_token, size_of
from bitpress.engine.allocate import allocate, frontier, reasons
from bitpress.engine.cache_choice import bytes_per_token
from bitpress.engine.choices import Choices, choices_of
from bitpress.engine.errors import InputError
from bitpress.engine.knapsack import Infeasible, solve
from bitpress.engine.latency_table import LatencyTable, keep, kept_table, table_path
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe, Stage
from bitpress.engine.sensitivity_file import DATA_FREE, FISHER, OPTIONS, Score, SensitivityReport
from bitpress.kernels.layout import BitmapLayout, DenseLayout, Layout, TableLayout, UniformLayout, layout_to_dict

WIDTHS = (2, 3, 4, 8)
HARM = {"8-bit": 1e-5, "4-bit": 4e-3, "3-bit": 2e-2, "2-bit": 0.12, "50%": 0.06, "2:4": 0.1}


def report_of(anatomy: Anatomy, seed: int = 0, kind: str = FISHER) -> SensitivityReport:
    rng = np.random.default_rng(seed)
    weight = {part.name: float(rng.lognormal(0, 1)) for part in anatomy.linears}
    harms = {(name, option): harm * w * float(rng.lognormal(0, 0.2)) for name, w in weight.items() for option, harm in HARM.items()}
    scores = [Score(layer=name, option=option, kind=kind, score=harm) for (name, option), harm in harms.items()]
    scores += [Score(layer=anatomy.embedding.name, option=option, kind=kind, score=harm) for option, harm in (("8-bit", 1e-4), ("4-bit", 0.3))]
    scores += [Score(layer=f"model.layers.{block}", option="drop", kind=kind, score=3.0 - block / 2) for block in range(anatomy.blocks)]
    cached = itertools.product(range(anatomy.blocks), (8, 4, 3, 2))
    scores += [Score(layer=f"kv_cache.{block}", option=f"{bits}-bit", kind=kind, score=0.2 / 4**bits) for block, bits in cached]
    return SensitivityReport(
        digest="0" * 16, model=anatomy.model, fingerprint=anatomy.fingerprint, kinds=(kind,), text="wiki", tokens_sha256="", protocol="made up",
        options=OPTIONS, scores=scores,
    )  # fmt: skip


@pytest.fixture
def anatomy(paper: Callable[..., Anatomy]) -> Anatomy:
    return paper(blocks=4)


@pytest.fixture
def choices(anatomy: Anatomy) -> Choices:
    return choices_of(anatomy, report_of(anatomy), FISHER)


@pytest.mark.parametrize("budget", [{"linear_bits": 3.5}, {"model_bits": 5.0}, {"bytes": 100_000}, {"linear_bits": 16.0}])
def test_a_budget_is_kept_and_what_is_predicted_is_what_the_recipe_stores(choices: Choices, budget: dict[str, float]) -> None:
    found = allocate(choices, budget)
    size = size_of(found.recipe, choices.anatomy)
    assert found.recipe.validate_for(choices.anatomy) == []
    assert (found.predicted["bytes"], found.predicted["bits_per_weight_linears"]) == (size.bytes, size.bits_per_weight_linears)
    kept = {"linear_bits": size.bits_per_weight_linears, "model_bits": 8 * size.bytes / choices.anatomy.params, "bytes": size.bytes}
    (kind,) = budget
    assert kept[kind] <= budget[kind] * (1 + 1e-9)
    by_id = {option.id: option.scheme for option in choices.options}
    assert found.recipe.resolve(choices.anatomy) == {name: by_id[option] for name, option in found.options.items()}
    harms = [choices.harm_IJ[item, found.choice[item]] for item in range(len(choices.items))]
    assert found.predicted["kl"] == pytest.approx(sum(harms))
    assert found.predicted["perplexity_ratio"] == pytest.approx(math.exp(sum(harms)))


def test_it_is_better_than_uniform_and_equals_trying_everything(paper: Callable[..., Anatomy]) -> None:
    anatomy = paper(blocks=1)
    table = choices_of(anatomy, report_of(anatomy), FISHER, ties=("qkv", "gate_up"))
    assert [len(layers) for layers in table.items] == [3, 1, 2, 1]
    limit = 3.5 * anatomy.linear_params / 8
    rows = np.arange(4)
    tried = [
        table.harm_IJ[rows, pick].sum()
        for pick in map(list, itertools.product(range(len(table.options)), repeat=4))
        if table.linear_bytes_IJ[rows, pick].sum() <= limit
    ]
    found = allocate(table, {"linear_bits": 3.5})
    assert found.predicted["kl"] == pytest.approx(min(tried))
    assert len({found.options[f"model.layers.0.self_attn.{role}_proj"] for role in "qkv"}) == 1
    uniform = frontier(table).uniform["3-bit"]
    assert allocate(table, {"linear_bits": uniform.linear_bits}).predicted["kl"] <= uniform.harm


def test_two_budgets_and_a_budget_of_quality(choices: Choices) -> None:
    alone = allocate(choices, {"perplexity_ratio": 1.1})
    assert alone.predicted["perplexity_ratio"] <= 1.1
    again = allocate(choices, {"bytes": alone.predicted["bytes"]})
    assert again.predicted["kl"] <= alone.predicted["kl"] + 1e-12
    assert allocate(choices, {"bytes": alone.predicted["bytes"] - 1}).predicted["perplexity_ratio"] > 1.1, "nothing smaller is as good"
    timed = LatencyTable({layout: {(64, 64): (layout.nbytes(64, 64) * 1e-9, layout.nbytes(64, 64))} for layout in (DenseLayout(), *map(UniformLayout, WIDTHS))})
    free = allocate(choices, {"linear_bits": 4.0}, latency=timed)
    both = allocate(choices, {"linear_bits": 4.0, "latency_s": free.predicted["latency_s"] * 0.9}, latency=timed)
    assert both.predicted["latency_s"] <= free.predicted["latency_s"] * 0.9
    assert both.predicted["kl"] >= free.predicted["kl"]


def bench_row(layout: Layout, seconds: float, shape: tuple[int, int] = (64, 64), batch: int = 1) -> dict[str, object]:
    return {"layout": layout_to_dict(layout), "shape": list(shape), "batch": batch, "p50_s": seconds, "bytes": layout.nbytes(*shape)}


def test_a_kept_bench_is_read_layout_by_layout(bitpress_home: Path, choices: Choices) -> None:
    """NF4 is as wide as 4 uniform bits, and many rows are no decoding: neither may stand for the other."""
    four, half = UniformLayout(4), BitmapLayout(0.5)
    rows = [bench_row(DenseLayout(), 8e-6), bench_row(four, 2e-6), bench_row(TableLayout("nf4"), 5e-6), bench_row(half, 6e-6), bench_row(four, 9e-6, batch=16)]
    assert kept_table() is None
    keep({"rows": rows})
    table = kept_table()
    assert table is not None
    assert table.product_seconds(four, 64, 64) == pytest.approx(2e-6)
    assert table.product_seconds(half, 128, 64) == pytest.approx(12e-6)
    assert table.product_seconds(UniformLayout(3), 64, 64) == pytest.approx(2e-6 * UniformLayout(3).nbytes(64, 64) / four.nbytes(64, 64))
    assert table.product_seconds(UniformLayout(8), 64, 64) == pytest.approx(8e-6 * UniformLayout(8).nbytes(64, 64) / (2 * 64 * 64)), "nothing wider but dense"
    layer, options = choices.anatomy.by_name[choices.items[0][0]], [option.id for option in choices.options]
    found = table.seconds(choices)[0, options.index("50%")]
    assert found == pytest.approx(table.product_seconds(half, layer.out_features, layer.in_features)), "zeros cost what their kernel was timed at"
    keep({"rows": rows[1:]})
    assert kept_table() is None, "without dense there is nothing to compare with"
    table_path().write_text('{"rows": [{"bits": 4}]}')
    assert kept_table() is None


def test_locks_hold_and_the_base_keeps_its_stages(anatomy: Anatomy) -> None:
    table = choices_of(anatomy, report_of(anatomy), FISHER, locks={"role:v": "8-bit", "blocks:last1 & role:down": "dense"})
    base = Recipe(model="any", seed=3, stages=[Stage(method="gptq")])
    found = allocate(table, {"linear_bits": 4.0}, base)
    assert {found.options[f"model.layers.{block}.self_attn.v_proj"] for block in range(4)} == {"8-bit"}
    assert found.recipe.resolve(anatomy)["model.layers.3.mlp.down_proj"].is_dense
    assert (found.recipe.stages, found.recipe.seed, found.recipe.model) == (base.stages, 3, "paper")
    assert found.predicted["bits_per_weight_linears"] <= 4.0


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_can_be_left_to_the_budget(paper: Callable[..., Anatomy], tied: bool) -> None:
    anatomy = paper(blocks=4, tied=tied)
    table = choices_of(anatomy, report_of(anatomy), FISHER, embedding_bits=None)
    small, large = allocate(table, {"bytes": 90_000.0}), allocate(table, {"bytes": float(anatomy.bytes)})
    assert small.recipe.embedding is not None
    assert small.recipe.embedding.bits in (8, 4)
    assert large.recipe.embedding is None
    for found in (small, large):
        stored = table.bytes_IJ[np.arange(len(table.items)), found.choice].sum() + table.rest_bytes
        assert found.predicted["bytes"] == size_of(found.recipe, anatomy).bytes == stored


def test_what_cannot_be_is_refused_with_the_nearest_that_can(anatomy: Anatomy, choices: Choices) -> None:
    with pytest.raises(InputError, match=r"the least is (\d+\.\d+) bits") as refused:
        allocate(choices, {"linear_bits": 1.0})
    nearest = float(refused.value.why.split("least is ")[1].split()[0])
    assert allocate(choices, {"linear_bits": nearest}).predicted["bits_per_weight_linears"] <= nearest
    with pytest.raises(InputError, match=r"above dense.*Dense takes 16 bits"):
        allocate(choices, {"linear_bits": 17.0})
    with pytest.raises(InputError, match=f"Dense takes {anatomy.bytes:,} bytes"):
        allocate(choices, {"bytes": 1e9})
    with pytest.raises(InputError, match="cannot both be met") as both:
        allocate(choices, {"linear_bits": 2.4, "perplexity_ratio": 1.01})
    least = float(both.value.why.split("the first is ")[1].split()[0])
    assert allocate(choices, {"linear_bits": least, "perplexity_ratio": 1.01}).predicted["bits_per_weight_linears"] <= least
    with pytest.raises(InputError, match="bench kernels"):
        allocate(choices, {"latency_s": 0.01})
    with pytest.raises(InputError, match="no budget 'joules'"):
        allocate(choices, {"joules": 1.0})
    with pytest.raises(InputError, match="not a number"):
        allocate(choices, {"bytes": math.nan})
    with pytest.raises(InputError, match="needs scores in nats"):
        allocate(choices_of(anatomy, report_of(anatomy, kind=DATA_FREE), DATA_FREE), {"perplexity_ratio": 1.1})


def test_operations_are_saved_by_dropping_the_blocks_that_hurt_least(choices: Choices, anatomy: Anatomy) -> None:
    dense = flops_per_token(None, anatomy)
    one = 2 * sum(part.numel for part in anatomy.of_block(0))
    found = allocate(choices, {"flops": dense - 1.5 * one})
    assert found.recipe.dropped_blocks(anatomy) == [2, 3]
    assert flops_per_token(found.recipe, anatomy) == found.predicted["flops"] == dense - 2 * one
    assert found.predicted["kl"] == pytest.approx(choices.drop_harm[2] + choices.drop_harm[3])
    assert {found.options[part.name] for part in anatomy.of_block(3)} == {"drop"}
    assert found.recipe.validate_for(anatomy) == []
    both = allocate(choices, {"flops": dense - one, "linear_bits": 4.0})
    assert both.predicted["bits_per_weight_linears"] <= 4.0
    assert both.recipe.dropped_blocks(anatomy) == [3]
    assert allocate(choices, {"flops": float(dense)}).recipe.dropped_blocks(anatomy) == []


def test_blocks_go_only_where_that_is_better_and_bytes_stay_exact(choices: Choices, anatomy: Anatomy) -> None:
    roomy = {"bytes": 0.5 * anatomy.bytes}
    assert allocate(choices, roomy, drops=True).predicted == allocate(choices, roomy).predicted
    smallest = frontier(choices).points[0].bytes
    with pytest.raises(InputError, match="cannot be met"):
        allocate(choices, {"bytes": smallest - 2000.0})
    tight = allocate(choices, {"bytes": smallest - 2000.0}, drops=True)
    assert tight.recipe.dropped_blocks(anatomy)
    assert tight.predicted["bytes"] == size_of(tight.recipe, anatomy).bytes <= smallest - 2000


def test_dropping_equals_trying_every_set_of_blocks(choices: Choices, anatomy: Anatomy) -> None:
    limit = 0.16 * anatomy.bytes
    best = math.inf
    for gone in itertools.chain.from_iterable(itertools.combinations((1, 2, 3), count) for count in range(4)):
        stay = [item for item, layers in enumerate(choices.items) if anatomy.by_name[layers[0]].block not in gone]
        room = limit - choices.rest_bytes + len(gone) * anatomy.block_rest_params * anatomy.itemsize
        try:
            kept = solve(choices.harm_IJ[stay], choices.bytes_IJ[None, stay], np.array([room])).harm
        except Infeasible:
            continue
        best = min(best, kept + sum(choices.drop_harm[block] for block in gone))
    assert allocate(choices, {"bytes": limit}, drops=True).predicted["kl"] == pytest.approx(best)


def test_the_widest_cache_that_fits_is_taken(choices: Choices, anatomy: Anatomy) -> None:
    dense = bytes_per_token(None, anatomy)
    found = allocate(choices, {"kv_bytes": 0.6 * dense, "linear_bits": 4.0})
    assert found.recipe.kv_cache is not None
    assert found.recipe.kv_cache.keys.bits == found.recipe.kv_cache.values.bits == 4
    assert found.predicted["kv_bytes"] == bytes_per_token(found.recipe.kv_cache, anatomy) <= 0.6 * dense
    plain = allocate(choices, {"linear_bits": 4.0})
    assert found.predicted["kl"] == pytest.approx(plain.predicted["kl"] + 4 * 0.2 / 4**4)
    assert allocate(choices, {"kv_bytes": dense}).recipe.kv_cache is None
    strict = allocate(choices, {"kv_bytes": 0.6 * dense, "perplexity_ratio": 1.1})
    assert strict.predicted["perplexity_ratio"] <= 1.1


@pytest.mark.parametrize("kind", ["flops", "kv_bytes", "model_bits", "bytes"])
def test_every_kind_of_budget_names_its_nearest(choices: Choices, kind: str) -> None:
    with pytest.raises(InputError, match="cannot be met") as refused:
        allocate(choices, {kind: 1.0})
    least = float(re.search(r"Ask for ([\d.,]+)", refused.value.remedy)[1].replace(",", ""))
    found = allocate(choices, {kind: least})
    assert found.predicted["kl"] > 0
    with pytest.raises(InputError, match="above dense"):
        allocate(choices, {kind: 1e12})


def test_a_cache_without_scores_or_that_is_not_our_own_is_refused(paper: Callable[..., Anatomy]) -> None:
    anatomy = paper(blocks=2)
    report = report_of(anatomy)
    old = report.model_copy(update={"scores": [score for score in report.scores if not score.layer.startswith("kv_cache")]})
    half = 0.6 * bytes_per_token(None, anatomy)
    with pytest.raises(InputError, match=r"No sensitivity of the KV cache.*--force"):
        allocate(choices_of(anatomy, old, FISHER), {"kv_bytes": half})
    other = anatomy.model_copy(update={"architecture": "GPT2LMHeadModel"})
    with pytest.raises(InputError, match="cache of this model cannot be made smaller"):
        allocate(choices_of(other, report, FISHER), {"kv_bytes": half})


def test_budgets_of_operations_and_quality_can_be_too_much_together(choices: Choices, anatomy: Anatomy) -> None:
    dense = flops_per_token(None, anatomy)
    with pytest.raises(InputError, match="cannot both be met") as both:
        allocate(choices, {"flops": 0.5 * dense, "perplexity_ratio": 1.05})
    least = float(re.search(r"Ask for ([\d.,]+)", both.value.remedy)[1].replace(",", ""))
    assert allocate(choices, {"flops": least, "perplexity_ratio": 1.05}).predicted["perplexity_ratio"] <= 1.05


def test_locks_that_conflict_are_named(anatomy: Anatomy) -> None:
    report = report_of(anatomy)
    with pytest.raises(InputError, match=r"locked twice.*asks for 8-bit.*2-bit"):
        choices_of(anatomy, report, FISHER, locks={"role:v": "8-bit", "blocks:0": "2-bit"})
    with pytest.raises(InputError, match=r"are tied.*8-bit and 4-bit.*untie"):
        choices_of(anatomy, report, FISHER, ties=("qkv",), locks={"role:q": "8-bit", "role:k": "4-bit"})
    with pytest.raises(InputError, match="no option"):
        choices_of(anatomy, report, FISHER, locks={"*": "9-bit"})
    with pytest.raises(InputError, match=r"matches none|There is no role"):
        choices_of(anatomy, report, FISHER, locks={"role:qkv": "8-bit"})
    with pytest.raises(InputError, match="no tie 'all'"):
        choices_of(anatomy, report, FISHER, ties=("all",))
    with pytest.raises(InputError, match="No sensitivity of kind 'kl'"):
        choices_of(anatomy, report, "kl")
    locked = choices_of(anatomy, report, FISHER, locks={"*": "8-bit"})
    with pytest.raises(InputError, match=r"the least is 8\.\d+ bits"):
        allocate(locked, {"linear_bits": 4.0})


def test_the_frontier_holds_the_allocations_and_the_reasons_add_up(choices: Choices) -> None:
    curve = frontier(choices)
    assert len(curve.points) > 40
    point = curve.points[len(curve.points) // 2]
    there = curve.at(point.step)
    assert (there.predicted["bytes"], there.predicted["kl"]) == (point.bytes, pytest.approx(point.harm))
    assert there.predicted["bits_per_weight_linears"] == pytest.approx(point.linear_bits)
    assert allocate(choices, {"bytes": point.bytes}).predicted["kl"] == pytest.approx(point.harm)
    assert set(curve.uniform) == set(HARM)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"):
        why = reasons(choices, there, layer)
        assert [reason.bytes for reason in why] == sorted((reason.bytes for reason in why), reverse=True)
        (chosen,) = [reason for reason in why if reason.chosen]
        assert chosen.option == there.options[layer]
        assert chosen.priced <= min(reason.priced for reason in why) * (1 + 1e-9)


def test_allocation_needs_no_torch() -> None:
    code = "import sys\nimport bitpress.engine.allocate_model\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "False"
