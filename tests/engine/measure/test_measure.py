"""The whole of measuring: a tiny model and its twin from text to M, and SmolLM2 against a plain loop where it is installed."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpress.engine.accounting import flops_per_token, size_of
from bitpress.engine.compress import compress
from bitpress.engine.errors import Cancelled
from bitpress.engine.measure import perplexity as perplexity_module
from bitpress.engine.measure.measure import measure, windows_for
from bitpress.engine.measure.protocol import Protocol
from bitpress.engine.model import library
from bitpress.engine.model.load import load
from bitpress.engine.recipe import Measure, Recipe

FACTS = SimpleNamespace(default_text="stories", needs_bos=False)
QUALITY = {"perplexity", "perplexity_low", "perplexity_high", "nll_mean"}
COMPARISON = {"perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "kl_mean", "kl_p99", "same_top1"}
SIZES = {"bytes", "resident_bytes", "bits_per_weight_linears", "bits_per_weight_model"}
ALWAYS = {"kv_bytes_per_token", "peak_bytes", "flops_per_token", "kernels", "protocol"}
LATENCY = {"ttft_s", "tpot_p50_s", "tpot_p95_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
FOUR_BITS = {"schemes": [{"match": "*", "weights": {"bits": 4, "group_size": 32}}], "stages": [{"method": "rtn"}]}


@pytest.fixture
def story_file(tmp_path: Path, story: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pages of text in a file that a person brought; passages are dealt to the parts by their own hash."""
    path = tmp_path / "pages.txt"
    path.write_text("\n\n".join(f"Chapter {number}. {story}" for number in range(200)))
    monkeypatch.setenv("BITPRESS_ROOTS", str(tmp_path))
    return str(path)


def asked(text: str, **changes: Any) -> Measure:
    return Measure(**{"tier": "quick", "text": text, "latency": False, **changes})


def four_bits(model: str = "tiny-llama", **changes: Any) -> Recipe:
    return Recipe.from_dict({"model": model, **FOUR_BITS, **changes})


def plain_perplexity(model: Any, ids_NT: torch.Tensor) -> float:
    """Whole logits, cross entropy, one window at a time: nothing of Bitpress in it."""
    with torch.inference_mode():
        means = [float(torch.nn.functional.cross_entropy(model(ids_T[None]).logits[0, :-1].float(), ids_T[1:])) for ids_T in ids_NT]
    return math.exp(sum(means) / len(means))


def test_a_model_alone_gives_what_was_asked_for_and_nothing_else(tiny_llama_dir: Path, bitpress_home: Path, story_file: str) -> None:
    dense = load(tiny_llama_dir, dtype=torch.float32)
    found = measure(dense, FACTS, asked(story_file))
    assert set(found) == {"dense"}
    assert set(found["dense"]) == QUALITY | SIZES | ALWAYS
    ids_NT = windows_for(dense, FACTS, asked(story_file)).ids_NT
    assert found["dense"]["perplexity"] == pytest.approx(plain_perplexity(dense.model, ids_NT), rel=1e-5)
    json.dumps(found, allow_nan=False)


def test_a_pair_carries_the_comparison_and_the_sizes_of_what_is_packed(tiny_llama_dir: Path, bitpress_home: Path, story_file: str) -> None:
    dense, recipe = load(tiny_llama_dir), four_bits()
    dense.model.float()  # as a worker does where float32 is faster: the anatomy goes on telling the stored bytes
    made = compress(dense, recipe)
    told: list[tuple[str, dict[str, Any]]] = []
    found = measure(dense, FACTS, asked(story_file), made.model, recipe, lambda kind, data: told.append((kind, data)))
    assert set(found["compressed"]) == QUALITY | COMPARISON | SIZES | ALWAYS
    assert set(found["dense"]) == QUALITY | SIZES | ALWAYS
    size = size_of(recipe, dense.anatomy)
    assert found["dense"]["bytes"] == dense.anatomy.bytes
    assert found["compressed"]["bytes"] == size.bytes
    assert found["compressed"]["bits_per_weight_linears"] == pytest.approx(size.bits_per_weight_linears)
    assert sum(found["compressed"]["kernels"].values()) == len(dense.anatomy.linears)
    assert found["dense"]["kernels"] == {"dense": len(dense.anatomy.linears)}
    ids_NT = windows_for(dense, FACTS, asked(story_file)).ids_NT
    for side, model in (("dense", dense.model), ("compressed", made.model)):
        assert found[side]["perplexity"] == pytest.approx(plain_perplexity(model, ids_NT), rel=1e-5)
    check_events(told, found)


def check_events(told: list[tuple[str, dict[str, Any]]], found: dict[str, Any]) -> None:
    """One window event a window with a ratio that ends where M's does; progress that ends; metrics last."""
    windows = [data for kind, data in told if kind == "window"]
    assert [data["index"] for data in windows] == list(range(found["dense"]["protocol"]["windows"]))
    assert set(windows[0]) == {"index", "nll_dense", "nll"}
    assert set(windows[-1]) == {"index", "nll_dense", "nll", "ratio", "low", "high"}
    assert windows[-1]["ratio"] == pytest.approx(found["compressed"]["perplexity_ratio"])
    progress = [data for kind, data in told if kind == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == len(windows)
    assert told[-1] == ("metrics", found)


def test_the_protocol_says_what_was_really_done(tiny_llama_dir: Path, bitpress_home: Path, story_file: str) -> None:
    dense = load(tiny_llama_dir, dtype=torch.float32)
    protocol = measure(dense, FACTS, asked(story_file, tier="standard"))["dense"]["protocol"]
    assert (protocol["window"], protocol["asked_window"], protocol["windows"]) == (128, 2048, 16)
    assert "cut from 2,048" in protocol["one_line"]
    assert (protocol["dtype"], protocol["device"], protocol["bos"]) == ("float32", "cpu", "as the tokenizer puts it, once")
    record = Protocol(**{field: protocol[field] for field in Protocol.__dataclass_fields__})
    assert record.digest() == protocol["digest"]


def test_a_model_that_needs_bos_gets_it_in_every_window(tiny_llama_dir: Path, bitpress_home: Path, story_file: str) -> None:
    dense = load(tiny_llama_dir, dtype=torch.float32)
    windows = windows_for(dense, SimpleNamespace(default_text="stories", needs_bos=True), asked(story_file))
    assert set(windows.ids_NT[:, 0].tolist()) == {dense.tokenizer.bos_token_id}
    assert windows.protocol.bos == "at each window"


def test_dropped_blocks_shrink_cache_and_flops(tiny_llama_dir: Path, bitpress_home: Path, story_file: str) -> None:
    dense = load(tiny_llama_dir, dtype=torch.float32)
    recipe = four_bits(structure={"drop_blocks": [1]})
    found = measure(dense, FACTS, asked(story_file), compress(dense, recipe).model, recipe)
    assert found["compressed"]["kv_bytes_per_token"] * 3 == found["dense"]["kv_bytes_per_token"] * 2 == dense.anatomy.kv_bytes_per_token * 2
    context = found["dense"]["protocol"]["window"] // 2
    assert found["compressed"]["flops_per_token"] == flops_per_token(recipe, dense.anatomy, context) < found["dense"]["flops_per_token"]


def test_latency_is_timed_for_both_sides_when_asked(tiny_llama_dir: Path, bitpress_home: Path, story_file: str) -> None:
    dense, recipe = load(tiny_llama_dir), four_bits()
    found = measure(dense, FACTS, asked(story_file, latency=True), compress(dense, recipe).model, recipe)
    for side in ("dense", "compressed"):
        assert set(found[side]) >= LATENCY
        assert found[side]["ttft_s"] > 0
        assert found[side]["tpot_p50_s"] <= found[side]["tpot_p95_s"]
        conditions = found[side]["protocol"]["latency"]
        assert conditions["prompt"] + conditions["new"] <= dense.anatomy.context
        assert isinstance(conditions["noisy"], list)


def test_a_live_run_may_stop_early_and_says_how_many_windows_it_saw(
    tiny_llama_dir: Path, bitpress_home: Path, story_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity_module, "FORWARD_TOKENS", 128)  # one window a forward, as on models with a long context
    dense = load(tiny_llama_dir, dtype=torch.float32)
    recipe = four_bits(schemes=[{"match": "*", "weights": {"bits": 8, "group_size": 32}}])
    made = compress(dense, recipe).model
    tiers = {tier: measure(dense, FACTS, asked(story_file, tier=tier), made, recipe, early_stop=True) for tier in ("standard", "full")}
    found = {tier: sides["compressed"]["protocol"] for tier, sides in tiers.items()}
    assert 8 <= found["standard"]["windows"] < found["standard"]["windows_asked"] == 16
    assert found["full"]["windows"] == found["full"]["windows_asked"] > 16
    assert found["standard"]["digest"] != found["full"]["digest"]


def test_a_destroyed_model_is_reported_without_infinities(tiny_llama_dir: Path, bitpress_home: Path, story_file: str) -> None:
    dense, recipe = load(tiny_llama_dir, dtype=torch.float32), four_bits()
    made = compress(dense, recipe).model
    made.model.norm.weight = torch.nn.Parameter(made.model.norm.weight * 1e6, requires_grad=False)
    found = measure(dense, FACTS, asked(story_file), made, recipe)
    assert "perplexity" in found["compressed"]["not_finite"]
    assert found["compressed"]["nll_mean"] > 700
    assert "not_finite" not in found["dense"]
    json.dumps(found, allow_nan=False)


def test_cancel_is_heard(tiny_llama_dir: Path, bitpress_home: Path, story_file: str) -> None:
    with pytest.raises(Cancelled):
        measure(load(tiny_llama_dir, dtype=torch.float32), FACTS, asked(story_file), should_stop=lambda: True)


@pytest.mark.slow
def test_smollm2_on_wikitext_is_what_a_plain_loop_says(test_data: Path) -> None:
    """Dense and 4-bit, ours against plain transformers on the same windows, to 0.3%."""
    import transformers

    from bitpress.engine.model import surgery
    from bitpress.engine.model.load import compute_dtype
    from bitpress.engine.runs.resident import compute_in
    from bitpress.kernels import reference
    from bitpress.kernels.packed import PackedLinear

    entry = library.find("smollm2-135m")
    if not entry.ready:
        pytest.skip("smollm2-135m is not installed")
    recipe = four_bits("smollm2-135m", schemes=[{"match": "*", "weights": {"bits": 4, "group_size": 64}}])
    dense, quick = load("smollm2-135m"), Measure(tier="quick", text="wikitext2-raw/test", latency=False)
    packed = compress(dense, recipe).model
    compute_in(compute_dtype(), dense.model, packed)
    found = measure(dense, entry, quick, packed, recipe)
    ids_NT = windows_for(dense, entry, quick).ids_NT
    plain = transformers.AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.float32).eval()
    assert found["dense"]["perplexity"] == pytest.approx(plain_perplexity(plain, ids_NT), rel=3e-3)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            surgery.set_linear_weight(surgery.get(plain, name), reference.dequantize(module.packed))
    assert found["compressed"]["perplexity"] == pytest.approx(plain_perplexity(plain, ids_NT), rel=3e-3)
    assert found["compressed"]["perplexity_ratio_low"] > 1.1  # 4 bits at group 64 cost this model about 30%
