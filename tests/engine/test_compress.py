"""The walk over a model: what it makes, what it leaves alone, how it stops, resumes and refuses."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bitpress.engine import calibrate, layer_store
from bitpress.engine import compress as compressing
from bitpress.engine.accounting import layout_of, size_of
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress, load_compressed
from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, Outcome, Statistics
from bitpress.engine.model import surgery
from bitpress.engine.model.load import Loaded, compute_dtype
from bitpress.engine.recipe import Recipe, Scheme
from bitpress.kernels.binary import pack_binary
from bitpress.kernels.layout import TableLayout
from bitpress.kernels.packed import PackedEmbedding, PackedLinear
from bitpress.kernels.reference import dequantize
from bitpress.kernels.tables import nearest, pack_table, round_scales, scales_of

Build = Callable[..., Loaded]
IDS = torch.arange(24).view(2, 12) * 7 % 320
FOUR_BITS = {"schemes": [{"match": "*", "weights": {"bits": 4, "group_size": 32}}], "embedding": {"bits": 8}, "stages": [{"method": "rtn"}]}


def recipe(**fields: Any) -> Recipe:
    return Recipe.from_dict({"model": "llama", **fields})


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "layers").iterdir())}


def stop_after(layers: int) -> Callable[[], bool]:
    asked = iter(range(10_000))
    return lambda: next(asked) >= layers


def test_every_family_is_compressed_and_its_dense_model_untouched(any_tiny: tuple[str, Any], in_memory: Build) -> None:
    loaded = in_memory(any_tiny[0])
    before = logits(loaded.model)
    made = compress(loaded, recipe(**FOUR_BITS))
    packed = [module for module in made.model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == len(loaded.anatomy.linears) + (1 if loaded.anatomy.tied else 0)
    assert torch.equal(logits(loaded.model), before)
    difference = (logits(made.model) - before).norm() / before.norm()
    assert 0 < difference < 0.6


def test_eight_bits_change_little_and_two_bits_a_lot(in_memory: Build) -> None:
    loaded = in_memory("llama")
    before = logits(loaded.model)
    distance = {}
    for bits in (8, 4, 2):
        made = compress(loaded, recipe(schemes=[{"match": "*", "weights": {"bits": bits, "group_size": 16}}], stages=[{"method": "rtn"}]))
        distance[bits] = float((logits(made.model) - before).norm() / before.norm())
    assert distance[8] < 0.05 < distance[4] < distance[2]


def test_logits_are_those_of_the_dequantised_weights(in_memory: Build) -> None:
    loaded = in_memory("gpt2")
    made = compress(loaded, recipe(**FOUR_BITS))
    other = in_memory("gpt2")
    for part in loaded.anatomy.linears:
        packed = surgery.get(made.model, part.name)
        assert isinstance(packed, PackedLinear)
        surgery.set_linear_weight(surgery.get(other.model, part.name), packed.dequantize(torch.float32))
    embedding = surgery.get(made.model, loaded.anatomy.embedding.name)
    assert isinstance(embedding, PackedEmbedding)
    surgery.get(other.model, loaded.anatomy.embedding.name).weight.data = embedding.dequantize(torch.float32)
    assert torch.allclose(logits(made.model), logits(other.model), atol=1e-3)


def test_tied_head_shares_the_storage_of_the_embedding(in_memory: Build) -> None:
    made = compress(in_memory("llama"), recipe(**FOUR_BITS)).model
    assert made.lm_head.codes.data_ptr() == made.model.embed_tokens.codes.data_ptr()
    untied = compress(in_memory("llama_untied"), recipe(**FOUR_BITS)).model
    assert isinstance(untied.lm_head, torch.nn.Linear), "an untied head has a scheme of its own"


def test_gemma_3_keeps_the_scale_of_its_embedding(in_memory: Build) -> None:
    loaded = in_memory("gemma3")
    made = compress(loaded, recipe(embedding={"bits": 8})).model
    dense, packed = loaded.model.get_input_embeddings()(IDS), made.get_input_embeddings()(IDS)
    assert torch.allclose(dense, packed, atol=0.02 * float(dense.abs().max()))


def test_dropped_blocks_move_the_rest_up(in_memory: Build) -> None:
    loaded = in_memory("llama")
    made = compress(loaded, recipe(structure={"drop_blocks": [1]}, **FOUR_BITS))
    assert len(made.model.model.layers) == 2
    assert len(loaded.model.model.layers) == 3
    assert {layer.layer.split(".")[2] for layer in made.layers if "layers" in layer.layer} == {"0", "2"}
    store = {layer.layer: layer for layer in made.layers}
    weight = loaded.model.model.layers[2].mlp.up_proj.weight
    moved = made.model.model.layers[1].mlp.up_proj.dequantize(torch.float32)
    assert float((weight - moved).norm() / weight.norm()) == pytest.approx(store["model.layers.2.mlp.up_proj"].error, rel=1e-4)


def test_pruned_layers_are_stored_as_bitmaps(in_memory: Build) -> None:
    loaded = in_memory("gpt2")
    made = compress(loaded, recipe(schemes=[{"match": "*", "sparsity": {"ratio": 0.5}}], stages=[{"method": "magnitude"}]))
    assert {layer.method for layer in made.layers} == {"magnitude"}
    weight = made.model.transformer.h[1].mlp.c_fc.dequantize()
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert made.bytes < 0.75 * loaded.anatomy.bytes
    assert int((loaded.model.transformer.h[1].mlp.c_fc.weight == 0).sum()) == 0


def test_a_few_zeros_are_stored_dense_and_say_so(in_memory: Build) -> None:
    loaded = in_memory("gpt2")
    few = 0.02  # a bitmap would cost a bit of every 32-bit weight
    made = compress(loaded, recipe(schemes=[{"match": "*", "sparsity": {"ratio": few}}], stages=[{"method": "magnitude"}]))
    assert {layer.kernel for layer in made.layers} == {"dense"} and all("stored dense" in layer.reason for layer in made.layers)
    assert made.bytes == loaded.anatomy.bytes


class Handing(LinearMethod):
    """Hands over a matrix of another format, ready to be stored."""

    name, title, family, summary, citation = "handing", "Handing", "quantize", "For a test. It costs nothing.", "None."
    ability = Ability(part="weights", bits=(4, 3), formats=("nf4", "bcq"))
    wrong: ClassVar[bool] = False

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: Any) -> Outcome:
        assert scheme.weights
        layout = layout_of(scheme)
        if self.wrong:
            layout = TableLayout("fp4", 0)
        if isinstance(layout, TableLayout):
            scales, supers = round_scales(weight_NK.abs().amax(1, keepdim=True), layout)
            packed = pack_table(nearest(weight_NK / scales_of(scales, supers), layout.table), scales, layout, supers)
        else:
            alphas = weight_NK.abs().mean(1).bfloat16()[:, None, None].expand(-1, 1, 3)
            packed = pack_binary((weight_NK > 0)[:, None].expand(-1, 3, -1), alphas, alphas[..., 0] * 0, layout)
        return Outcome(dequantize(packed), packed=packed)


@pytest.mark.parametrize("weights", [{"format": "nf4"}, {"format": "nf4", "double_quant": True}, {"format": "bcq", "bits": 3}])
def test_a_method_hands_over_any_format(in_memory: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Any]) -> None:
    monkeypatch.setattr(registry, "all_methods", lambda: {"handing": Handing()})
    loaded = in_memory("llama")
    plan = recipe(schemes=[{"match": "*", "weights": {"group_size": "row", **weights}}], stages=[{"method": "handing"}])
    made = compress(loaded, plan, store=LayerStore(tmp_path))
    assert made.bytes == size_of(plan, loaded.anatomy).bytes
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    assert torch.equal(logits(load_compressed(tmp_path, loaded)), logits(made.model))
    monkeypatch.setattr(Handing, "wrong", True)
    with pytest.raises(ValueError, match="handed over"):
        compress(loaded, plan)


def test_rounded_inputs_need_a_packed_matrix_and_change_what_comes_out(in_memory: Build) -> None:
    loaded, rows = in_memory("llama"), {"bits": 8, "group_size": "row", "symmetric": True}
    plain = compress(loaded, recipe(schemes=[{"match": "*", "weights": rows}], stages=[{"method": "rtn"}]))
    made = compress(loaded, recipe(schemes=[{"match": "*", "weights": rows, "activations": {"bits": 8}}], stages=[{"method": "rtn"}]))
    assert made.bytes == plain.bytes
    distance = float((logits(made.model) - logits(plain.model)).norm() / logits(plain.model).norm())
    assert 0 < distance < 0.05
    with pytest.raises(InputError, match="stays dense"):
        compress(loaded, recipe(schemes=[{"match": "*", "activations": {"bits": 8}}]))


def test_zeros_survive_quantisation(in_memory: Build) -> None:
    lines = [{"match": "*", "weights": {"bits": 3}, "sparsity": {"ratio": 0.5, "pattern": "2:4"}}]
    made = compress(in_memory("llama"), recipe(schemes=lines, stages=[{"method": "magnitude"}, {"method": "rtn"}]))
    assert {layer.method for layer in made.layers} == {"magnitude + rtn"}
    for module in made.model.modules():
        if isinstance(module, PackedLinear):
            zeros = (module.dequantize(torch.float32).view(-1, 4) == 0).sum(dim=1)
            assert (zeros >= 2).all()


def test_events_tell_every_layer_and_the_way_there(in_memory: Build) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    made = compress(in_memory("llama"), recipe(**FOUR_BITS), lambda kind, data: said.append((kind, data)))
    assert said[0] == ("stage_started", {"stage": "compressing", "total": 22})
    done = [data for kind, data in said if kind == "layer_done"]
    assert [data["layer"] for data in done] == [layer.layer for layer in made.layers]
    assert all({"layer", "method", "error", "bytes", "seconds", "kernel", "reason"} <= set(data) for data in done)
    assert all(0 < data["error"] < 0.2 for data in done)
    json.dumps(said)
    progress = [data for kind, data in said if kind == "progress"]
    assert [data["done"] for data in progress] == list(range(1, 23))
    assert progress[-1]["eta_s"] == 0


@pytest.mark.parametrize("stop", ["should_stop", "emit raises"])
def test_a_stopped_run_resumes_to_the_same_bytes(in_memory: Build, tmp_path: Path, stop: str) -> None:
    loaded, plan = in_memory("llama"), recipe(**FOUR_BITS)
    whole = compress(loaded, plan, store=LayerStore(tmp_path / "whole"))
    if stop == "should_stop":
        with pytest.raises(Cancelled):
            compress(loaded, plan, store=LayerStore(tmp_path / "parts"), should_stop=stop_after(5))
    else:
        seen: list[str] = []

        def emit(kind: str, data: dict[str, Any]) -> None:
            seen.append(kind)
            if seen.count("layer_done") == 5:
                raise RuntimeError("killed")

        with pytest.raises(RuntimeError):
            compress(loaded, plan, emit, LayerStore(tmp_path / "parts"))
    assert len(files(tmp_path / "parts")) == 5
    resumed = compress(loaded, plan, store=LayerStore(tmp_path / "parts"))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert [layer.reused for layer in resumed.layers] == [True] * 5 + [False] * 17
    assert torch.equal(logits(resumed.model), logits(whole.model))
    assert [layer.error for layer in resumed.layers] == [layer.error for layer in whole.layers]


def finished_run(loaded: Loaded, plan: Recipe, folder: Path) -> Tensor:
    made = compress(loaded, plan, store=LayerStore(folder))
    (folder / "recipe.yaml").write_text(plan.to_yaml())
    return logits(made.model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_finished_run_is_rebuilt_from_its_files(in_memory: Build, tmp_path: Path, architecture: str) -> None:
    lines = [{"match": "role:attention", "weights": {"bits": 5}}, {"match": "role:mlp", "sparsity": {"ratio": 0.3}}]
    plan = recipe(schemes=lines, embedding={"bits": 6}, structure={"drop_blocks": [0]}, stages=[{"method": "magnitude"}, {"method": "rtn"}])
    loaded = in_memory(architecture)
    expected = finished_run(loaded, plan, tmp_path)
    assert torch.equal(logits(load_compressed(tmp_path, loaded)), expected)


def test_layers_of_something_else_are_refused(in_memory: Build, tmp_path: Path) -> None:
    plan, fewer = recipe(**FOUR_BITS), recipe(**{**FOUR_BITS, "embedding": None})
    finished_run(in_memory("llama"), plan, tmp_path)
    with pytest.raises(BitpressError, match=r"The recipe is not the one.*Start a new run"):
        compress(in_memory("llama"), recipe(seed=1, **FOUR_BITS), store=LayerStore(tmp_path))
    with pytest.raises(BitpressError, match="The model is not the one"):
        compress(in_memory("llama", seed=1), plan, store=LayerStore(tmp_path))
    with pytest.raises(BitpressError, match="embed_tokens cannot be reused"):
        compress(in_memory("llama"), fewer, store=LayerStore(tmp_path))
    with pytest.raises(BitpressError, match="The model is not the one"):
        load_compressed(tmp_path, in_memory("llama", seed=1))


def test_missing_and_damaged_layers_are_told(in_memory: Build, tmp_path: Path) -> None:
    loaded = in_memory("llama")
    finished_run(loaded, recipe(**FOUR_BITS), tmp_path)
    path = tmp_path / "layers" / "model.layers.1.mlp.up_proj.safetensors"
    data = path.read_bytes()
    for broken in (data[:-1] + bytes([data[-1] ^ 1]), data[:-10], b""):
        path.write_bytes(broken)
        with pytest.raises(BitpressError, match=r"up_proj.safetensors is damaged.*Delete that file"):
            load_compressed(tmp_path, loaded)
    path.unlink()
    with pytest.raises(BitpressError, match=r"not finished.*up_proj is missing"):
        load_compressed(tmp_path, loaded)
    compress(loaded, recipe(**FOUR_BITS), store=LayerStore(tmp_path))
    assert path.read_bytes() == data


def test_a_full_disk_is_told_and_loses_nothing(in_memory: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, plan = in_memory("llama"), recipe(**FOUR_BITS)
    real, written = layer_store.write_durably, []

    def filling(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) > 3:
            path.write_bytes(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(layer_store, "write_durably", filling)
    with pytest.raises(BitpressError, match=r"The disk is full\. .*o_proj.safetensors needs [\d,]+ bytes; [\d,]+ are free\. Free some space"):
        compress(loaded, plan, store=LayerStore(tmp_path))
    assert len(files(tmp_path)) == 3, "no partial file stays"
    monkeypatch.setattr(layer_store, "write_durably", real)
    assert sum(layer.reused for layer in compress(loaded, plan, store=LayerStore(tmp_path)).layers) == 3


def test_a_folder_that_cannot_be_written_is_told(in_memory: Build, tmp_path: Path) -> None:
    (tmp_path / "layers").write_text("a file in the way")
    with pytest.raises(BitpressError, match="cannot be written"):
        compress(in_memory("llama"), recipe(**FOUR_BITS), store=LayerStore(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(in_memory: Build, value: float) -> None:
    loaded = in_memory("llama")
    loaded.model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj cannot be compressed. 1 of its"):
        compress(loaded, recipe(**FOUR_BITS))


def test_a_recipe_that_does_not_fit_is_refused_before_any_work(in_memory: Build, tmp_path: Path) -> None:
    for fields in ({"schemes": [{"match": "role:fc1", "weights": {"bits": 4}}]}, {"stages": [{"method": "rnt"}]}, {"kv_cache": {"residual_window": 4}}):
        with pytest.raises(InputError, match="does not fit the model"):
            compress(in_memory("llama"), recipe(**fields), store=LayerStore(tmp_path))
    assert not (tmp_path / "layers").exists()


class ScaleByMoment(LinearMethod):
    """Rounds nothing: records what the walk hands over and divides the weights by two."""

    name, title, family, summary, citation = "probe", "Probe", "prune", "A probe. For tests.", "none"
    ability: ClassVar[Ability] = Ability(part="sparsity", patterns=("unstructured",))
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def __init__(self) -> None:
        self.seen: list[Statistics] = []

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: Any) -> Outcome:
        self.seen.append(dict(stats))
        return Outcome(weight_NK / 2)


def test_a_method_gets_the_statistics_it_needs_from_the_compressed_prefix(in_memory: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ScaleByMoment()
    monkeypatch.setitem(registry.all_methods(), "probe", probe)
    monkeypatch.setattr(calibrate, "compute_dtype", lambda device: torch.float32)  # a machine with bfloat16 units walks in it, and its moments round
    loaded = in_memory("llama")
    fields = {"structure": {"drop_blocks": [0]}, "schemes": [{"match": "role:up, role:gate", "sparsity": {"ratio": 0.5}}], "stages": [{"method": "probe"}]}
    tokens = CalibrationSet("made up", 0, "sha", IDS)
    made = compress(loaded, recipe(**fields), store=LayerStore(tmp_path), calibration=tokens)
    assert [set(stats) for stats in probe.seen] == [{"second_moment"}] * 4
    moments = [stats["second_moment"] for stats in probe.seen]
    assert torch.equal(moments[0], moments[1]), "gate and up read the same inputs"
    assert [layer.layer.split(".")[2] for layer in made.layers] == ["1", "1", "2", "2"]

    heard: list[Tensor] = []
    made.model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    logits(made.model)
    expected = heard[0].double().square().mean(dim=(0, 1))
    rounding = 1e-4 if compute_dtype() == torch.float32 else 0.05  # the walk's forwards may run in bfloat16
    assert torch.allclose(moments[3], expected, rtol=rounding), "the last block hears the compressed one before it"

    shutil.copytree(tmp_path / "layers", tmp_path / "copy" / "layers")
    with pytest.raises(BitpressError, match="The calibration is not the one"):
        compress(loaded, recipe(**fields), store=LayerStore(tmp_path / "copy"), calibration=CalibrationSet("made up", 0, "other", IDS))


def test_no_text_is_drawn_when_no_method_needs_it(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressing, "calibration_set", lambda *_: pytest.fail("text was asked for"))
    compress(in_memory("llama"), recipe(**FOUR_BITS))


@pytest.mark.parametrize("later", [False, True])
def test_a_second_part_is_given_in_the_same_pass_unless_a_later_stage_gives_it(in_memory: Build, later: bool) -> None:
    lines = [{"match": "role:mlp", "weights": {"bits": 4}, "sparsity": {"ratio": 0.5, "pattern": "2:4"}}]
    stages = [{"method": "sparsegpt"}, *([{"method": "rtn"}] if later else [])]
    made = compress(in_memory("llama"), recipe(schemes=lines, stages=stages), calibration=CalibrationSet("made up", 0, "sha", IDS))
    assert {layer.method for layer in made.layers} == {"sparsegpt + rtn" if later else "sparsegpt"}
    packed = [module for module in made.model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 9
    assert all(((module.dequantize(torch.float32).view(-1, 4) == 0).sum(dim=1) >= 2).all() for module in packed)


def test_a_repair_asks_for_its_statistics(in_memory: Build) -> None:
    half = [{"match": "role:up", "sparsity": {"ratio": 0.5}}]
    tokens = CalibrationSet("made up", 0, "sha", IDS)
    plain, repaired = (
        compress(in_memory("llama"), recipe(schemes=half, stages=[{"method": "magnitude", "options": options}]), calibration=tokens)
        for options in ({}, {"repair": "least_squares"})
    )
    weights = [made.model.model.layers[0].mlp.up_proj.dequantize() for made in (plain, repaired)]
    assert torch.equal(weights[0] == 0, weights[1] == 0)
    assert not torch.equal(*weights)
