"""M has its stable keys, holds nothing that JSON cannot, and leaves out what was not asked for."""

import json
import math

import pytest
import torch

from bitpress.engine.measure import report
from bitpress.engine.measure.latency import Latency
from bitpress.engine.measure.memory import Weights
from bitpress.engine.measure.perplexity import Quality

QUALITY = Quality(asked=3, nll_dense=[3.0, 3.1, 2.9], nll=[3.2, 3.3, 3.12], kl_P=[torch.tensor([0.1, 0.2, 0.3])], same_P=[torch.tensor([True, True, False])])


def test_text_figures_hold_the_perplexity_inside_its_interval() -> None:
    figures = report.text_figures(QUALITY.nll)
    assert figures["perplexity"] == pytest.approx(math.exp(3.2066667))
    assert figures["perplexity_low"] < figures["perplexity"] < figures["perplexity_high"]
    assert figures["nll_mean"] == pytest.approx(math.log(figures["perplexity"]))


def test_the_paired_ratio_is_far_surer_than_either_perplexity() -> None:
    own, pair = report.text_figures(QUALITY.nll), report.comparison_figures(QUALITY)
    assert pair["perplexity_ratio"] == pytest.approx(math.exp(0.2066667))
    own_spread = own["perplexity_high"] / own["perplexity_low"]
    assert 1 < pair["perplexity_ratio_high"] / pair["perplexity_ratio_low"] < own_spread
    assert (pair["kl_mean"], pair["kl_p99"], pair["same_top1"]) == pytest.approx((0.2, 0.3, 2 / 3))


def test_one_window_has_no_interval_and_no_null() -> None:
    figures = report.finite_only(report.text_figures([3.0]))
    assert set(figures) == {"perplexity", "nll_mean"}


@pytest.mark.parametrize(("nll", "kept", "broken"), [
    ([800.0, 900.0], {"nll_mean"}, ["perplexity", "perplexity_high"]),
    ([math.nan, 3.0], set(), ["nll_mean", "perplexity", "perplexity_high", "perplexity_low"]),
])  # fmt: skip
def test_what_is_not_finite_is_named_and_not_clamped(nll: list[float], kept: set[str], broken: list[str]) -> None:
    figures = report.finite_only(report.text_figures(nll))
    json.dumps(figures, allow_nan=False)
    assert set(broken) <= set(figures["not_finite"])
    assert kept <= set(figures)
    assert not set(figures) & set(broken)


def test_latency_and_size_figures_use_the_stable_keys() -> None:
    latency = Latency(0.1, 0.01, 0.02, 1280.0, 99.0, {"batch": 1})
    assert set(report.latency_figures(latency)) == {"ttft_s", "tpot_p50_s", "tpot_p95_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
    sizes = report.size_figures(Weights(stored_bytes=150, resident_bytes=200, params=200, linear_bytes=45, linear_params=80))
    assert sizes == {"bytes": 150, "resident_bytes": 200, "bits_per_weight_linears": 4.5, "bits_per_weight_model": 6.0}
