"""Training of a whole model: what is stored, what it gains, what is said, how it stops and resumes to the same bytes, what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitpress.engine import train
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import Compressed, compress, load_compressed
from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.methods import registry
from bitpress.engine.methods.distill.losses import divergence
from bitpress.engine.methods.distill.quantgpt import RoundedWeight
from bitpress.engine.methods.quantize.pipeline import dequantize_groups
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe, Scheme, SparsityScheme, WeightScheme
from bitpress.kernels.packed import PackedEmbedding, PackedLinear
from bitpress.kernels.reference import dequantize

Build = Callable[..., Loaded]
Said = list[tuple[str, dict[str, Any]]]
IDS = torch.randint(0, 320, (10, 16), generator=torch.Generator().manual_seed(0))
FEW = {"steps": 6, "sequences": 3, "held_out": 2}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards in float32 on every machine."""
    monkeypatch.setattr(train, "compute_dtype", lambda device="cpu": torch.float32)


def recipe(bits: int = 2, embedding: int | None = 2, options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    whole: dict[str, Any] = {
        "schemes": [{"match": "*", "weights": {"bits": bits, "group_size": "row", "symmetric": True}}],
        "stages": [{"method": "quantgpt", "options": {**FEW, **(options or {})}}],
    }
    ends = {"embedding": {"bits": embedding}} if embedding else {}
    return Recipe.from_dict({"model": "llama", **whole, **ends, **fields})


def made(loaded: Loaded, plan: Recipe, store: LayerStore | None = None, stop: Callable[[], bool] = lambda: False, ids: Tensor = IDS) -> tuple[Compressed, Said]:
    said: Said = []
    found = compress(loaded, plan, lambda kind, data: said.append((kind, data)), store, stop, CalibrationSet("made up", 0, "sha", ids))
    return found, said


def losses(said: Said) -> list[dict[str, Any]]:
    return [data for kind, data in said if kind == "train_loss"]


def least(said: Said) -> float:
    return min(data["held_out"] for data in losses(said) if "held_out" in data)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "layers").iterdir())}


@torch.no_grad()
def distance(dense: nn.Module, other: nn.Module, ids_BT: Tensor = IDS[-2:]) -> float:
    """Mean divergence a token, in nats."""
    return float(divergence(other(input_ids=ids_BT).logits.flatten(0, 1).float(), dense(input_ids=ids_BT).logits.flatten(0, 1).float())) / ids_BT.numel()


@pytest.mark.parametrize("quantiser", ["dynamic", "lsq", "pact"])
@pytest.mark.parametrize(("bits", "group", "sparse"), [(2, 0, False), (2, 10, False), (4, 16, True), (8, 0, False)])
def test_what_is_stored_is_what_was_trained(quantiser: str, bits: int, group: int, sparse: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    weight_NK = torch.randn(5, 21, generator=draw)
    weight_NK[weight_NK.abs() < 0.4] = 0
    scheme = Scheme(weights=WeightScheme(bits=bits, group_size=group, symmetric=True), sparsity=SparsityScheme(ratio=0.3) if sparse else None)
    method = registry.get("quantgpt")
    learned = method.start(weight_NK, scheme, method.parse({"quantiser": quantiser, "shared": group == 0}))
    assert isinstance(learned, RoundedWeight)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    outcome = learned.outcome()
    assert torch.equal(learned().detach(), outcome.weight_NK)
    assert torch.equal(dequantize_groups(outcome.codes, scheme.weights), outcome.weight_NK)
    if sparse:
        assert (outcome.weight_NK[weight_NK == 0] == 0).all(), "pruned weights stay zero"


def test_the_student_becomes_the_packed_model(in_memory: Build) -> None:
    """The least held-out divergence that training told is that of the codes it left."""
    loaded = in_memory("llama")
    compressed, said = made(loaded, recipe())
    assert isinstance(compressed.model.model.embed_tokens, PackedEmbedding)
    assert isinstance(compressed.model.lm_head, PackedLinear), "the tied head is made of the same codes"
    assert {layer.method for layer in compressed.layers} == {"quantgpt"}
    assert [data["step"] for data in losses(said)].count(0) == 1, "blocks and embedding are trained together"
    assert len(torch.unique(dequantize(compressed.model.model.embed_tokens.packed)[0])) <= 3
    assert distance(loaded.model, compressed.model) == pytest.approx(least(said), rel=0.02)


@pytest.mark.parametrize("options", [{}, {"contrast": 0.0}, {"shared": True}, {"quantiser": "lsq"}, {"quantiser": "pact"}])
def test_training_gains_on_its_start(in_memory: Build, options: dict[str, Any]) -> None:
    more = torch.randint(0, 320, (66, 32), generator=torch.Generator().manual_seed(1))
    _, said = made(in_memory("llama"), recipe(options={"steps": 25, "sequences": 8, "rate": 2e-3, **options}), ids=more)
    told = losses(said)
    assert told[-1]["held_out"] < 0.9 * told[0]["held_out"]
    assert ("contrast" in told[-1]) == (options.get("contrast") != 0.0)
    assert [data["step"] for data in told] == sorted(data["step"] for data in told)
    assert told[-1]["step"] == told[-1]["steps"] == 25


def test_a_rate_that_only_harms_keeps_the_start(in_memory: Build) -> None:
    loaded = in_memory("llama")
    start, _ = made(loaded, recipe(bits=8, embedding=8, options={"steps": 0}))
    harmed, said = made(loaded, recipe(bits=8, embedding=8, options={"steps": 4, "rate": 0.1}))
    assert losses(said)[-1]["held_out"] > 10 * losses(said)[0]["held_out"]
    assert distance(start.model, harmed.model) == 0


def test_no_steps_keep_the_start(in_memory: Build) -> None:
    loaded = in_memory("llama")
    compressed, said = made(loaded, recipe(bits=8, embedding=8, options={"steps": 0}))
    assert losses(said)[0]["held_out"] < 1e-3
    assert distance(loaded.model, compressed.model) < 1e-3


@pytest.mark.parametrize("killed_at", [1, 4, 6])
def test_a_killed_run_resumes_to_the_same_bytes(in_memory: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)  # after every step
    loaded, plan = in_memory("llama"), recipe()
    made(loaded, plan, LayerStore(tmp_path / "whole"))

    class Killed(Exception):
        pass

    def die(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["done"] == killed_at and data["total"] == FEW["steps"]:
            raise Killed

    store = LayerStore(tmp_path / "cut")
    with pytest.raises(Killed):
        compress(loaded, plan, die, store, calibration=CalibrationSet("made up", 0, "sha", IDS))
    _, said = made(loaded, plan, store)
    assert losses(said)[-1]["step"] == FEW["steps"]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not (tmp_path / "cut" / "training.safetensors").exists(), "what was trained is in the layers"


def test_a_cancelled_run_keeps_its_state_and_resumes(in_memory: Build, tmp_path: Path) -> None:
    loaded, plan, store, asked = in_memory("llama"), recipe(), LayerStore(tmp_path / "run"), [0]
    made(loaded, plan, LayerStore(tmp_path / "whole"))

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 3

    with pytest.raises(Cancelled):
        made(loaded, plan, store, stop)
    assert (tmp_path / "run" / "training.safetensors").exists()
    _, said = made(loaded, plan, store)
    assert any("goes on at step 3" in data["text"] for kind, data in said if kind == "note")
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_checkpoint_of_another_recipe_is_not_taken_up(in_memory: Build, tmp_path: Path) -> None:
    loaded, store = in_memory("llama"), LayerStore(tmp_path / "run")
    with pytest.raises(Cancelled):
        made(loaded, recipe(), store, lambda: True)
    _, said = made(loaded, recipe(options={"rate": 1e-4}), store)
    assert losses(said)[0]["step"] == 0


def test_a_finished_run_is_found_again_and_loads(in_memory: Build, tmp_path: Path) -> None:
    loaded, plan, store = in_memory("llama"), recipe(), LayerStore(tmp_path)
    compressed, _ = made(loaded, plan, store)
    again, said = made(loaded, plan, store)
    assert all(layer.reused for layer in again.layers)
    assert losses(said) == []
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    with torch.no_grad():
        left, right = (model(input_ids=IDS).logits for model in (compressed.model, load_compressed(tmp_path, loaded)))
    assert torch.equal(left, right)


def test_other_stages_and_widths_beside_it(in_memory: Build) -> None:
    """Attention is rounded to nearest, half of up and down are pruned first, the inputs of down are rounded to 8 bits, the embedding stays dense."""
    weights = {"bits": 4, "group_size": 16, "symmetric": True}
    plan = Recipe.from_dict(
        {
            "model": "llama",
            "schemes": [
                {"match": "*", "weights": weights},
                {"match": "role:up, role:down", "sparsity": {"ratio": 0.5}},
                {"match": "role:down", "activations": {"bits": 8}},
            ],
            "stages": [
                {"method": "magnitude", "targets": "role:up"},
                {"method": "wanda", "targets": "role:down"},
                {"method": "rtn", "targets": "role:attention"},
                {"method": "quantgpt", "options": FEW},
            ],
        }
    )
    loaded = in_memory("llama")
    compressed, said = made(loaded, plan)
    methods = {layer.layer.rpartition(".")[2]: layer.method for layer in compressed.layers}
    assert (methods["q_proj"], methods["up_proj"], methods["down_proj"]) == ("rtn", "magnitude + quantgpt", "wanda + quantgpt")
    for name in ("up_proj", "down_proj"):
        packed = getattr(compressed.model.model.layers[1].mlp, name)
        assert float((dequantize(packed.packed) == 0).float().mean()) >= 0.5
    assert compressed.model.model.layers[1].mlp.down_proj.activation_bits == 8
    assert distance(loaded.model, compressed.model) == pytest.approx(least(said), rel=0.05)


def test_every_family_trains(any_tiny: tuple[str, nn.Module], in_memory: Build) -> None:
    architecture, _ = any_tiny
    loaded = in_memory(architecture)
    contrast = 0.0 if architecture == "custom" else 0.1
    ends = {} if loaded.anatomy.tied else {"head": {"bits": 4}}
    compressed, said = made(loaded, recipe(bits=4, embedding=4, options={"steps": 2, "contrast": contrast}, **ends))
    assert {layer.method for layer in compressed.layers} == {"quantgpt"}
    assert distance(loaded.model, compressed.model) == pytest.approx(least(said), rel=0.1, abs=1e-3)


def test_too_little_text_is_refused(in_memory: Build) -> None:
    with pytest.raises(InputError, match="10 calibration sequences, and 10 of them are held out"):
        made(in_memory("llama"), recipe(options={"held_out": 10}))


def test_a_model_without_hidden_states_cannot_be_contrasted(in_memory: Build) -> None:
    with pytest.raises(InputError, match="contrast"):
        made(in_memory("custom"), recipe(options={"steps": 1}))


def test_large_logits_are_made_in_slices_with_the_same_gradients(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = in_memory("llama")
    whole = losses(made(loaded, recipe(options={"steps": 3}))[1])[-1]
    monkeypatch.setattr(train, "SLICE_NUMBERS", 1)
    sliced = losses(made(loaded, recipe(options={"steps": 3}))[1])[-1]
    assert sliced["held_out"] == pytest.approx(whole["held_out"], rel=1e-4)


def test_each_sequence_is_seen_once_an_epoch() -> None:
    order = train._Order(8, 3, seed=1)
    first = torch.cat([order.chosen(step) for step in range(2)])
    assert len(first.unique()) == 6
    assert torch.equal(train._Order(8, 3, seed=1).chosen(5), order.chosen(5)), "a step's text follows from its number"
    assert not torch.equal(first, torch.cat([order.chosen(step) for step in range(2, 4)]))


def test_symmetric_codes_are_asked_for(in_memory: Build) -> None:
    plan = recipe(schemes=[{"match": "*", "weights": {"bits": 4, "group_size": 16}}])
    with pytest.raises(InputError, match="symmetric: true"):
        made(in_memory("llama"), plan)
