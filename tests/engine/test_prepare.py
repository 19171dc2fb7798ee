"""Stages that prepare, in a run: the model computes what it did, rounding loses less, what was found is kept and refused when it is another's."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.catalogue import problems
from bitpress.engine.prepare import _check_same, _logits, prepare
from bitpress.engine.recipe import Recipe

IDS = torch.randint(2, 300, (6, 32), generator=torch.Generator().manual_seed(1))
TOKENS = CalibrationSet("made up", 0, "sha", IDS)
Build = Callable[..., Any]


def recipe(*stages: str | dict[str, Any], bits: int = 3, group: int | str = 16, **scheme: Any) -> Recipe:
    line = {"match": "*", "weights": {"bits": bits, "group_size": group, "symmetric": group == "row"}, **scheme}
    return Recipe.from_dict({"model": "llama", "schemes": [line], "stages": [{"method": stage} if isinstance(stage, str) else stage for stage in stages]})


def outlying(loaded: Any) -> Any:
    """The model with a few gains much larger than the others, as trained models have them."""
    for block in loaded.model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight[::9] *= 20.0
    return loaded


def gap(loaded: Any, model: Any) -> float:
    dense, other = (m(input_ids=IDS).logits.float().log_softmax(-1) for m in (loaded.model, model))
    return float((dense.exp() * (dense - other)).sum(-1).mean())


@pytest.mark.parametrize("stage", ["awq", "smoothquant", "rotation"])
def test_preparing_leaves_the_logits_and_the_dense_model_alone(stage: str, in_memory: Build) -> None:
    loaded = outlying(in_memory("llama"))
    before = _logits(loaded.model, loaded.anatomy, torch.float32)
    plan = recipe({"method": stage, "options": {"clip": False} if stage == "awq" else {}}, "rtn")
    ready = prepare(loaded, plan, IDS, None, None, lambda kind, data: None, lambda: False)  # type: ignore[arg-type]
    torch.testing.assert_close(_logits(ready.model, loaded.anatomy, torch.float32), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(_logits(loaded.model, loaded.anatomy, torch.float32), before)
    assert not torch.equal(ready.model.model.layers[0].mlp.up_proj.weight, loaded.model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(("stages", "scheme"), [
    (("awq", "rtn"), {"bits": 3}),
    (("awq", "gptq"), {"bits": 3}),
    (("smoothquant", "rtn"), {"bits": 8, "group": "row", "activations": {"bits": 8}}),
    (("rotation", "rtn"), {"bits": 4, "group": "row", "activations": {"bits": 4}}),
    (("rotation", "gptq"), {"bits": 4, "group": "row", "activations": {"bits": 4}}),
])  # fmt: skip
def test_rounding_loses_less_after_it(stages: tuple[str, ...], scheme: dict[str, Any], in_memory: Build) -> None:
    loaded = outlying(in_memory("llama"))
    plain, prepared = (compress(loaded, recipe(*chosen, **scheme), calibration=TOKENS) for chosen in (stages[1:], stages))
    assert gap(loaded, prepared.model) < gap(loaded, plain.model)
    assert prepared.bytes == plain.bytes


@pytest.mark.parametrize("stages", [("awq", "rtn"), ("rotation", "gptq"), ("smoothquant", "rotation", "rtn")])
def test_a_finished_run_is_loaded_and_resumed_as_it_was(stages: tuple[str, ...], in_memory: Build, tmp_path: Path) -> None:
    loaded, plan = outlying(in_memory("llama")), recipe(*stages, group=24)
    made = compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    expected = made.model(input_ids=IDS).logits
    assert torch.equal(load_compressed(tmp_path, loaded)(input_ids=IDS).logits, expected)
    layers = sorted((tmp_path / "layers").iterdir())
    for path in layers[5:]:
        path.unlink()
    again = compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS)
    assert sum(layer.reused for layer in again.layers) == 5
    assert torch.equal(again.model(input_ids=IDS).logits, expected)


def test_what_was_found_is_refused_when_damaged_missing_or_another_s(in_memory: Build, tmp_path: Path) -> None:
    loaded, plan = in_memory("llama"), recipe("awq", "rtn")
    compress(loaded, plan, store=LayerStore(tmp_path), calibration=TOKENS)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    path = tmp_path / "prepared-0.safetensors"
    with pytest.raises(BitpressError, match=r"prepared-0.safetensors cannot be reused. The calibration"):
        compress(loaded, plan, store=LayerStore(tmp_path), calibration=CalibrationSet("made up", 0, "other", IDS))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes(3))
    with pytest.raises(BitpressError, match="Its bytes"):
        load_compressed(tmp_path, loaded)
    path.write_bytes(whole[:100])
    with pytest.raises(BitpressError, match="damaged"):
        load_compressed(tmp_path, loaded)
    path.unlink()
    with pytest.raises(BitpressError, match="is missing"):
        load_compressed(tmp_path, loaded)


def test_targets_decide_which_links_are_scaled(in_memory: Build, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plan = recipe({"method": "awq", "targets": "blocks:0 & role:mlp"}, "rtn")
    compress(in_memory("llama"), plan, store=LayerStore(tmp_path), calibration=TOKENS)
    found = {name for name in load_file(tmp_path / "prepared-0.safetensors") if name.startswith("scale:")}
    assert found == {"scale:model.layers.0.mlp.gate_proj", "scale:model.layers.0.mlp.down_proj"}


def test_a_method_that_changes_what_the_model_computes_is_refused(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, _: Any, link: Any, __: Any) -> None:
        source = model.get_submodule(link.source)
        source.weight = torch.nn.Parameter(1.5 * source.weight, requires_grad=False)

    monkeypatch.setattr("bitpress.engine.prepare.fold", wrong)
    with pytest.raises(InputError, match=r"SmoothQuant does not fit this model. Its logits would change"):
        compress(in_memory("llama"), recipe("smoothquant", "rtn"), calibration=TOKENS)


def test_weights_that_are_no_numbers_are_refused_by_name(in_memory: Build) -> None:
    loaded = in_memory("llama")
    loaded.model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj cannot be compressed"):
        compress(loaded, recipe("awq", "rtn"), calibration=TOKENS)


@pytest.mark.parametrize(("stages", "wrong"), [(("rtn", "awq"), "Comes after"), (("awq",), "no stage does that")])
def test_a_preparation_out_of_place_is_a_problem(stages: tuple[str, ...], wrong: str, in_memory: Build) -> None:
    told = [problem.wrong for problem in problems(recipe(*stages), in_memory("llama").anatomy, registry.catalogue())]
    assert any(wrong in line for line in told)


def test_a_preparation_for_nothing_is_a_problem(in_memory: Build) -> None:
    plan = Recipe.from_dict({"model": "llama", "stages": [{"method": "awq"}]})
    (problem,) = problems(plan, in_memory("llama").anatomy, registry.catalogue())
    assert "nothing to prepare for" in problem.wrong


def test_progress_is_told_and_a_stop_is_heard(in_memory: Build) -> None:
    from bitpress.engine.errors import Cancelled

    said: list[str] = []
    compress(in_memory("llama"), recipe("awq", "rtn"), emit=lambda kind, data: said.append(f"{kind} {data.get('stage', '')}"), calibration=TOKENS)
    assert "stage_started preparing: AWQ" in said
    with pytest.raises(Cancelled):
        compress(in_memory("llama"), recipe("awq", "rtn"), should_stop=lambda: True, calibration=TOKENS)


def test_the_compressed_embedding_of_a_turned_model_is_turned(in_memory: Build) -> None:
    plan = Recipe.from_dict({**recipe("rotation", "rtn", bits=8).to_dict(), "embedding": {"bits": 8}})
    loaded = in_memory("llama")
    made = compress(loaded, plan, calibration=TOKENS)

    def top(model: Any) -> Tensor:
        return model(input_ids=IDS).logits.argmax(-1)

    assert (top(made.model) == top(loaded.model)).float().mean() > 0.9


@pytest.mark.parametrize(("exact", "passes"), [(0.02, True), (0.3, False)])
def test_where_bfloat16_alone_moves_the_logits_float32_decides(exact: float, passes: bool, in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = in_memory("llama")
    monkeypatch.setattr("bitpress.engine.prepare._change", lambda before, after, anatomy, dtype: exact if dtype == torch.float32 else 0.13)
    model, method = loaded.model.to(torch.bfloat16), registry.get("awq")
    with contextlib.nullcontext() if passes else pytest.raises(InputError, match=r"AWQ does not fit this model. Its logits would change by 30%"):
        _check_same(method, model, model, loaded.anatomy)
