"""The command line on real runs of the tiny model: documents with the stable keys, a stored run offered, a run continued."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine import cli
from bitpress.engine.model import library
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.status import change_status
from bitpress.engine.runs.store import Store

M_KEYS = {
    "perplexity", "perplexity_low", "perplexity_high", "bytes", "bits_per_weight_linears", "bits_per_weight_model", "prefill_tokens_per_s",
    "decode_tokens_per_s", "ttft_s", "tpot_p50_s", "tpot_p95_s", "kv_bytes_per_token", "peak_bytes", "flops_per_token", "kernels", "protocol",
}  # fmt: skip


@pytest.fixture
def bitpress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """Run a command with --json; gives its document and what it said on stderr."""

    def run(*words: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["bitpress", *words, "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert not ended.value.code, told.err
        return json.loads(told.out), told.err

    return run


def test_compress_measure_and_generate(bitpress: Callable[..., tuple[Any, str]], tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(measure={**tiny_recipe().measure.model_dump(), "latency": True})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    first, said = bitpress("compress", str(path))
    assert first.keys() == {"run", "digest", "metrics"}
    assert first["metrics"]["dense"].keys() >= M_KEYS
    assert first["metrics"]["compressed"].keys() >= M_KEYS | {"kl_mean", "kl_p99", "same_top1"}
    assert first["run"] in said

    again, said = bitpress("compress", str(path))
    assert again == first
    assert "--force" in said

    measured, _ = bitpress("measure", first["run"], "--text", recipe.measure.text, "--no-latency")
    assert measured.keys() == {"run", "digest", "metrics"}
    assert measured["metrics"]["compressed"]["bytes"] == first["metrics"]["compressed"]["bytes"]
    assert "ttft_s" not in measured["metrics"]["dense"]

    written, _ = bitpress("generate", first["run"], "--prompt", "Once upon", "--max-new", "4")
    assert len(written["tokens"]) == 4
    assert written["side"] == first["run"]
    several, _ = bitpress("generate", first["run"], "--prompt", "Once upon", "--prompt", "The bear", "--max-new", "4")
    assert [sample["prompt"] for sample in several["samples"]] == ["Once upon", "The bear"]
    assert {sample["side"] for sample in several["samples"]} == {first["run"]}


def test_an_interrupted_run_is_resumed_from_the_command_line(bitpress: Callable[..., tuple[Any, str]], tiny_recipe: Callable[..., Recipe]) -> None:
    run = Store().create("compress", {"samples": 0}, tiny_recipe())
    change_status(run.path, lambda _: {"state": "interrupted"})
    document, _ = bitpress("runs", "resume", run.id)
    assert document["run"] == run.id
    assert run.status().state == "finished"
    listed, _ = bitpress("runs", "--kind", "compress")
    assert [entry["state"] for entry in listed] == ["finished"]


def test_ranks_and_kv_ranks_print_what_a_recipe_takes(bitpress: Callable[..., tuple[Any, str]], tiny_recipe: Callable[..., Recipe]) -> None:
    plan = tiny_recipe()
    model, text = plan.model, plan.measure.text
    found, said = bitpress("ranks", model, "--removed", "0.1", "--evaluations", "2", "--text", text)
    assert "Run " in said
    assert len(found["trials"]) == 2
    assert all(trial["keep"] <= 0.9 + 1e-9 for trial in found["trials"])
    recipe = Recipe.from_dict(found["recipe"])
    assert recipe.calibration.text == text
    cache, _ = bitpress("kv-ranks", model, "--keep", "0.5", "--heads", "each")
    anatomy = Anatomy.load(library.anatomy_path(model))
    assert recipe.validate_for(anatomy) == []
    kept = Recipe.from_dict({"model": model, **cache, "stages": [{"method": "lorc"}]})
    assert kept.validate_for(anatomy) == []
    width = anatomy.kv_heads * anatomy.head_dim
    assert 0 < sum(kept.kv_cache.rank.ranks) <= 0.5 * width * anatomy.blocks  # type: ignore[union-attr, arg-type]
