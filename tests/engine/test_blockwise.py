"""Block reconstruction: what is kept, what is said, how it stops, resumes to the same bytes and refuses; every family of models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitpress.engine import calibrate
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import Compressed, compress, load_compressed
from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe
from bitpress.kernels.packed import PackedLinear

Build = Callable[..., Loaded]
Said = list[tuple[str, dict[str, Any]]]
IDS = torch.randint(0, 320, (10, 16), generator=torch.Generator().manual_seed(0))
FEW = {"steps": 6, "sequences": 2, "held_out": 2}


def recipe(method: str = "flexround", bits: int = 2, options: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    weights = {"bits": bits, "group_size": 16, **({"format": "bcq"} if method in ("bcq", "uniquanf") else {})}
    whole = {"schemes": [{"match": "*", "weights": weights}], "stages": [{"method": method, "options": {**FEW, **(options or {})}}]}
    return Recipe.from_dict({"model": "llama", **whole, **fields})


def made(loaded: Loaded, plan: Recipe, store: LayerStore | None = None, stop: Callable[[], bool] = lambda: False, ids: Tensor = IDS) -> tuple[Compressed, Said]:
    said: Said = []
    found = compress(loaded, plan, lambda kind, data: said.append((kind, data)), store, stop, CalibrationSet("made up", 0, "sha", ids))
    return found, said


def losses(said: Said) -> list[dict[str, Any]]:
    return [data for kind, data in said if kind == "block_loss"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "layers").iterdir())}


def block_outputs(model: nn.Module, block: int, ids: Tensor) -> Tensor:
    heard: list[Tensor] = []
    handle = model.model.layers[block].register_forward_hook(lambda _, __, output: heard.append(output if isinstance(output, Tensor) else output[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return heard[0].float()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards in float32 on every machine."""
    monkeypatch.setattr(calibrate, "compute_dtype", lambda device="cpu": torch.float32)


@pytest.mark.parametrize("loss", ["per_token", "plain"])
@pytest.mark.parametrize("method", ["flexround", "omniquant", "uniquanf"])
def test_the_error_that_is_told_is_that_of_the_packed_model(in_memory: Build, exact: None, method: str, loss: str) -> None:
    loaded = in_memory("llama")
    compressed, said = made(loaded, recipe(method, options={"loss": loss}))
    for block in range(3):
        told = [data for data in losses(said) if data["block"] == block][-1]
        dense = block_outputs(loaded.model, block, IDS[-2:])
        errors = (block_outputs(compressed.model, block, IDS[-2:]) - dense).square().mean(-1)
        right = errors if loss == "plain" else errors / dense.square().mean(-1)
        assert float(right.mean()) == pytest.approx(told["best"], rel=0.02)
        assert told["best"] <= told["start"]
    assert all(isinstance(module, PackedLinear) for module in compressed.model.model.layers[0].mlp.children() if hasattr(module, "bias"))


def test_the_start_is_kept_when_every_step_makes_it_worse(in_memory: Build, exact: None) -> None:
    loaded = in_memory("llama")
    wild, said = made(loaded, recipe(options={"rate": 1.0, "steps": 3}))
    still, _ = made(loaded, recipe(options={"steps": 0}))
    assert all(data["best"] == data["start"] < data["held_out"] for data in losses(said) if data["step"])
    for one, other in zip(wild.model.parameters(), still.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(block_outputs(wild.model, 2, IDS), block_outputs(still.model, 2, IDS))


def test_training_helps(in_memory: Build, exact: None) -> None:
    ids = torch.randint(0, 320, (24, 32), generator=torch.Generator().manual_seed(1))
    _, said = made(in_memory("llama"), recipe(options={"steps": 40, "rate": 5e-3, "sequences": 4, "compensate": False}), ids=ids)
    first = [data for data in losses(said) if data["block"] == 0]
    assert first[-1]["best"] < 0.97 * first[0]["start"]
    assert [data["step"] for data in first] == sorted({data["step"] for data in first})
    best = [data["best"] for data in first]
    assert best == sorted(best, reverse=True)
    assert all("loss" in data for data in first[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_can_be_trained_and_its_dense_model_is_untouched(
    any_tiny: tuple[str, Any], in_memory: Build, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "compute_dtype", lambda device="cpu": dtype)
    loaded = in_memory(any_tiny[0])
    loaded.model.to(torch.bfloat16)
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    compressed, said = made(loaded, recipe(options={"steps": 2}))
    assert len({data["block"] for data in losses(said)}) == 3
    assert all(torch.isfinite(torch.tensor(data["held_out"])) for data in losses(said))
    for parameter, kept in zip(loaded.model.parameters(), before, strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, kept)
    assert len(compressed.layers) == len(loaded.anatomy.linears)
    assert not any(parameter.requires_grad for parameter in compressed.model.parameters()) or any_tiny[0] == "custom"


@pytest.mark.parametrize("stop", ["training", "storing"])
def test_a_stopped_run_resumes_to_the_same_bytes(in_memory: Build, tmp_path: Path, stop: str) -> None:
    loaded, plan = in_memory("llama"), recipe("uniquanf")
    made(loaded, plan, LayerStore(tmp_path / "whole"))
    store = LayerStore(tmp_path / "stopped")
    asked = iter(range(100_000))
    with pytest.raises(Cancelled):
        made(loaded, plan, store, lambda: len(store.names()) >= 7 and next(asked) >= 6)
    assert 7 <= len(store.names()) < 21
    if stop == "storing":  # as if it had been killed between two files of one block
        store.path(store.names()[-1]).unlink()
    compressed, said = made(loaded, plan, store)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    reused = [data["reused"] for kind, data in said if kind == "layer_done"]
    assert sum(reused) == (7 if stop == "training" else 0)
    rebuilt = load_compressed_of(tmp_path / "stopped", loaded, plan)
    assert torch.equal(block_outputs(rebuilt, 2, IDS), block_outputs(compressed.model, 2, IDS))


def load_compressed_of(folder: Path, loaded: Loaded, plan: Recipe) -> nn.Module:
    (folder / "recipe.yaml").write_text(plan.to_yaml())
    return load_compressed(folder, loaded)


def test_a_cancel_is_heard_within_a_block(in_memory: Build) -> None:
    said: Said = []

    def stop() -> bool:
        return any(kind == "block_loss" for kind, _ in said)

    with pytest.raises(Cancelled):
        compress(in_memory("llama"), recipe(), lambda kind, data: said.append((kind, data)), None, stop, CalibrationSet("made up", 0, "sha", IDS))
    assert not [kind for kind, _ in said if kind == "layer_done"]


def test_too_little_text_is_told(in_memory: Build) -> None:
    with pytest.raises(InputError, match=r"no text left to train on.*10 calibration sequences, and 10 of them are held out.*hold out fewer"):
        made(in_memory("llama"), recipe(options={"held_out": 10}))


def test_methods_can_be_mixed_within_a_block_and_pruned_weights_stay_zero(in_memory: Build) -> None:
    loaded = in_memory("llama")
    plan = Recipe.from_dict(
        {
            "model": "llama",
            "schemes": [
                {"match": "*", "weights": {"bits": 4, "group_size": 16}},
                {"match": "role:o", "weights": {"format": "bcq"}},
                {"match": "role:up, role:down", "sparsity": {"ratio": 0.5}},
                {"match": "blocks:1", "weights": "dense", "sparsity": "dense"},
            ],
            "stages": [
                {"method": "magnitude"},
                {"method": "rtn", "targets": "role:q, role:k, role:v"},
                {"method": "uniquanf", "options": FEW, "targets": "role:o"},
                {"method": "flexround", "options": FEW},
            ],
        }
    )
    compressed, said = made(loaded, plan)
    assert {layer.layer.split(".")[2] for layer in compressed.layers} == {"0", "2"}
    methods = {layer.layer.rpartition(".")[2]: layer.method for layer in compressed.layers}
    assert methods == {
        "q_proj": "rtn", "k_proj": "rtn", "v_proj": "rtn", "o_proj": "uniquanf",
        "gate_proj": "flexround", "up_proj": "magnitude + flexround", "down_proj": "magnitude + flexround",
    }  # fmt: skip
    assert {data["block"] for data in losses(said)} == {0, 2}
    packed = compressed.model.model.layers[2].mlp.up_proj
    identity = torch.eye(packed.packed.shape[1])
    assert float((packed(identity) == 0).float().mean()) >= 0.5


def test_dropped_blocks_are_left_out_of_both_streams(in_memory: Build, exact: None) -> None:
    loaded = in_memory("llama")
    _, said = made(loaded, recipe(bits=8, structure={"drop_blocks": [1]}, options={"steps": 0}))
    assert [data["block"] for data in losses(said)] == [0, 1]
    assert losses(said)[-1]["start"] < 1e-3


def test_progress_and_the_time_left_are_told_while_a_block_trains(in_memory: Build) -> None:
    _, said = made(in_memory("llama"), recipe())
    first = next(place for place, (kind, _) in enumerate(said) if kind == "layer_done")
    early = [data for kind, data in said[:first] if kind == "progress"]
    assert early and all(data["done"] == 0 and data["total"] == 21 and data["eta_s"] > 0 for data in early)
    assert {data["matrices"] for data in losses(said)} == {7}
    assert said[-1][1]["done"] == 21 and said[-1][1]["eta_s"] == 0
