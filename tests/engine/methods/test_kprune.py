"""K-pruning and the other structured scores, each against its definition."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.measure.logits import scorer_of
from bitpress.engine.methods import registry
from bitpress.engine.methods.prune.kprune import Knowledge, KPruneOptions, shares
from bitpress.engine.methods.prune.kwon import rearranged
from bitpress.engine.methods.prune.mope import Trial
from bitpress.engine.methods.structured import StructuredOptions, Units, remove_bottom_up
from bitpress.engine.model.load import Loaded
from bitpress.engine.model.surgery import get, linear_weight, twin
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import Scene
from bitpress.engine.sublayers import Key, Stream, drawn_from, drawn_loss, feature_moments, knowledge_loss, mask_gradients, task_loss

Build = Callable[..., Loaded]
IDS = torch.randint(2, 300, (4, 24), generator=torch.Generator().manual_seed(1))
TOKENS = CalibrationSet("made up", 0, "sha", IDS)


@pytest.fixture
def scene(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr("bitpress.engine.scene.compute_dtype", lambda device: torch.float32)
    return Scene(in_memory("llama"), Recipe(model="llama"), IDS)


def score(scene: Scene, name: str, **options: Any) -> tuple[Units, dict[Key, torch.Tensor]]:
    method = registry.get(name)
    parsed = method.parse(options)
    units = Units(scene, parsed)  # type: ignore[arg-type]
    return units, method.score(scene, units, parsed)  # type: ignore[attr-defined]


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


def test_mask_gradients_are_those_of_a_finite_difference(scene: Scene) -> None:
    key = Key(1, "neurons")
    (found,) = mask_gradients(scene, [key, Key(1, "heads")], lambda _, ids_BL: task_loss(scene.model, ids_BL))
    stream = Stream(scene.model, scene)
    stream.move(stream.through(0))
    (skipped,) = mask_gradients(scene, [key], lambda _, ids_BL: task_loss(scene.model, ids_BL), stream)
    assert torch.allclose(found[key], skipped[key], atol=1e-6)
    module, step, losses = get(scene.model, "model.layers.1.mlp.down_proj"), 0.05, []
    neuron = int(found[key].abs().argmax())
    for sign in (1, -1):
        weight = linear_weight(module).clone()
        weight[:, neuron] *= 1 + sign * step
        kept, module.weight = module.weight, torch.nn.Parameter(weight, requires_grad=False)
        losses.append(float(loss_of(scene.model)))
        module.weight = kept
    assert float(found[key][neuron]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.02)


def test_drift_is_zero_until_something_has_gone(scene: Scene) -> None:
    options = KPruneOptions(predictive_from="drift")
    units = Units(scene, options)
    knowledge = Knowledge(scene, units, options)
    assert max(float(value.max()) for value in knowledge.predictive(units.keys, None).values()) < 1e-12
    units.cut({Key(0, "neurons"): list(range(64))})
    ahead = [key for key in units.keys if key.block > 0]
    assert min(float(value.max()) for value in knowledge.predictive(ahead, None).values()) > 1e-9


def test_representational_knowledge_is_as_defined(scene: Scene) -> None:
    options, key, heard, streams = KPruneOptions(), Key(1, "neurons"), [], []
    down, block = get(scene.model, "model.layers.1.mlp.down_proj"), get(scene.model, "model.layers.1")
    handles = [down.register_forward_pre_hook(lambda _, args: heard.append(args[0])), block.register_forward_hook(lambda *said: streams.append(said[2]))]
    scene.model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    stream_BLd = streams[0] if isinstance(streams[0], torch.Tensor) else streams[0][0]
    x_BLF = heard[0] / stream_BLd.square().mean(-1, keepdim=True).sqrt()  # each token as large as the next norm sees it
    expected = x_BLF[:, 1:].flatten(0, 1).square().mean(0) * linear_weight(down).square().mean(0)
    knowledge = Knowledge(scene, Units(scene, options), options)
    found = knowledge.representational([key])[key]
    stream = Stream(scene.model, scene)
    stream.move(stream.through(0))
    assert torch.allclose(knowledge.representational([key], stream)[key], found, rtol=1e-4), "blocks below are not run again"
    assert torch.allclose(found.float(), expected, rtol=1e-3)


def test_drawn_tokens_measure_the_curvature_of_the_divergence(scene: Scene) -> None:
    """Half the mean squared gradient of single positions' drawn losses is the second-order term of T^2 KL around the teacher."""
    temperature, positions = 2.0, slice(0, 1)
    teacher_PV = 3 * torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    scorer: Any = SimpleNamespace(logits=lambda hidden_PD: hidden_PD, vocab=12)
    toward_V, squares = torch.linspace(-1, 1, 12), []
    for seed in range(3000):
        shift = torch.zeros((), requires_grad=True)
        drawn_loss(drawn_from(scorer, teacher_PV, temperature, seed), temperature)(teacher_PV + shift * toward_V, positions).backward()
        squares.append(float(shift.grad) ** 2)  # type: ignore[arg-type]
    step = 0.05
    divergence = float(knowledge_loss(scorer, teacher_PV, temperature)(teacher_PV + step * toward_V, positions))
    assert sum(squares) / len(squares) / 2 == pytest.approx(divergence / step**2, rel=0.1)


def test_shares_add_up_to_one_and_nothing_stays_nothing() -> None:
    key, other = Key(0, "heads"), Key(0, "neurons")
    found = shares({key: torch.tensor([1.0, 2.0]), other: torch.tensor([5.0])})
    assert found[key].tolist() == [0.125, 0.25]
    assert found[other].tolist() == [0.625]
    assert shares({key: torch.zeros(2)})[key].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("measured", ["sublayer", "block", "once"])
def test_k_prune_keeps_the_budget_and_repairs_more_than_slicing(in_memory: Build, measured: str) -> None:
    loaded = in_memory("llama")

    def drift(**options: Any) -> float:
        stage = {"method": "k-prune", "options": {"remove": 0.3, "multiple": 2, "measured": measured, **options}}
        made = compress(loaded, Recipe.from_dict({"model": "llama", "stages": [stage]}), calibration=TOKENS)
        assert made.recipe.reduced(loaded.anatomy).linear_params <= 0.7 * loaded.anatomy.linear_params
        states = [model(input_ids=IDS, output_hidden_states=True).hidden_states[-1] for model in (loaded.model, made.model)]
        return float((states[0] - states[1]).square().mean())

    assert drift() < 0.8 * drift(repair="none")


def test_a_fit_after_one_head_brings_the_stream_nearer(scene: Scene) -> None:
    """The second of two key-value heads of block 1 goes; what the attention then adds is compared with what the teacher's did."""
    teacher, key, errors = Stream(twin(scene.model), scene), Key(1, "heads"), {}
    teacher.move(teacher.through(0))
    wanted = teacher.catch(1).added["heads"][0]
    for how in ("none", "least_squares", "catch_up"):
        trial = Scene(scene.loaded, scene.recipe, IDS)
        own = Units(trial, KPruneOptions())
        remove_bottom_up(trial, own, lambda at, *_, own=own: [0] if at == key else list(range(own.count(at))), how)
        student = Stream(trial.model, trial)
        student.move(student.through(0))
        errors[how] = float((student.catch(1).added["heads"][0] - wanted).square().mean())
    assert 0 < errors["least_squares"] < 0.9 * errors["none"]
    assert errors["catch_up"] == pytest.approx(errors["least_squares"], rel=0.1), "nothing was lost below, and tokens count otherwise"


def test_keeping_everything_changes_nothing(in_memory: Build) -> None:
    loaded = in_memory("llama")
    before = loaded.model(input_ids=IDS).logits
    whole = {"neurons": {"keep": 1.0}, "heads": {"keep": 1.0}}
    stages = [{"method": "k-prune", "options": {"repair": "none"}}]
    made = compress(loaded, Recipe.from_dict({"model": "llama", "structure": whole, "stages": stages}), calibration=TOKENS)
    assert (made.model(input_ids=IDS).logits - before).abs().max() < 1e-5


def test_taylor_scores_are_weights_times_gradients(scene: Scene) -> None:
    units, found = score(scene, "llm-pruner", per_weight=False)
    down = get(scene.model, "model.layers.1.mlp.down_proj")
    parts = [get(scene.model, f"model.layers.1.mlp.{name}_proj") for name in ("gate", "up")]
    for module in (down, *parts):
        module.weight.requires_grad_(True)
    with torch.enable_grad():
        loss_of(scene.model).backward()
    expected = (down.weight * down.weight.grad).abs().sum(0) + sum((module.weight * module.weight.grad).abs().sum(1) for module in parts)
    assert torch.allclose(found[Key(1, "neurons")], expected, rtol=1e-3, atol=1e-7)
    assert units.count(Key(1, "heads")) == 2
    assert not any(weight.requires_grad for name, weight in scene.model.named_parameters() if ".1.mlp" not in name)


def test_fluctuation_is_the_variance_and_standardised(scene: Scene) -> None:
    moments = feature_moments(scene, [Key(0, "neurons")])[Key(0, "neurons")]
    assert torch.allclose(moments.variance_F, moments.square_F - moments.mean_F.square())
    _, found = score(scene, "flap")
    for value in found.values():
        assert float(value.mean()) == pytest.approx(0, abs=1e-9)
        assert float(value.std(correction=0)) == pytest.approx(1)


def test_fisher_is_the_sum_of_squared_mask_gradients(scene: Scene) -> None:
    units, found = score(scene, "kwon")
    for key, gradient_UB in units.gradients.items():
        assert torch.allclose(found[key], gradient_UB.square().sum(1))
    (batch,) = mask_gradients(scene, [Key(0, "heads")], lambda _, ids_BL: task_loss(scene.model, ids_BL))
    per_group = batch[Key(0, "heads")].view(2, 32).sum(1)
    assert torch.allclose(found[Key(0, "heads")].float(), per_group.square(), rtol=1e-3)


def test_rearranging_prefers_units_whose_gradients_cancel() -> None:
    gradients = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.1, 0.0], [3.0, 3.0]], dtype=torch.float64)
    assert rearranged([2, 3], gradients) == [0, 3] or rearranged([2, 3], gradients) == [1, 3]
    assert rearranged([0, 1, 2, 3], gradients) == [0, 1, 2, 3]


def test_a_score_from_cached_prefixes_is_that_of_the_whole_model(scene: Scene) -> None:
    trial = Trial(scene, IDS)
    trial.stand_at(2)
    features = torch.arange(16)
    found = trial.error_without(Key(2, "neurons"), features)
    whole = loss_of(scene.model)
    down = get(scene.model, "model.layers.2.mlp.down_proj")
    weight = linear_weight(down).clone()
    weight[:, features] = 0
    down.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert found == pytest.approx(float(loss_of(scene.model) - whole), abs=1e-4)
    assert scorer_of(scene.model).vocab == 320


def test_errors_of_modules_are_not_taken_to_add_up(scene: Scene) -> None:
    """Every module is tried alone against the whole model: what two cost together is measured as such, and is another number."""
    trial = Trial(scene, IDS)
    trial.stand_at(1)
    key, parts = Key(1, "neurons"), torch.arange(128).tensor_split(2)
    alone = [trial.error_without(key, part) for part in parts]
    together = trial.error_without(key, torch.arange(128))
    assert abs(together - sum(alone)) > 1e-6
    assert alone == [trial.error_without(key, part) for part in parts]


@pytest.mark.parametrize("order", ["width first", "depth first"])
def test_mope_takes_width_and_depth(in_memory: Build, order: str) -> None:
    options = {"remove": 0.2, "drop": 0.34, "order": order, "sequences": 2, "neuron_groups": 4, "multiple": 1}
    made = compress(in_memory("llama"), Recipe.from_dict({"model": "llama", "stages": [{"method": "mope", "options": options}]}), calibration=TOKENS)
    assert made.recipe.structure.drop_blocks == [1]
    assert made.recipe.structure.remove_neurons
    assert StructuredOptions().repair == "none"
