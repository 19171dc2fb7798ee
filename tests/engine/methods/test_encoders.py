"""Encoders that classify: their roles are known, heads and neurons go for good, and scores and repairs work as on causal models."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification, PreTrainedModel

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.model.inspect import anatomy_of
from bitpress.engine.model.load import Loaded
from bitpress.engine.model.slicing import keep_heads, keep_neurons
from bitpress.engine.model.surgery import get
from bitpress.engine.recipe import Recipe
from bitpress.engine.scene import Scene
from bitpress.engine.sublayers import Key, Stream, masking

IDS = torch.randint(2, 90, (8, 12), generator=torch.Generator().manual_seed(4))
SIZES = {"vocab_size": 96, "max_position_embeddings": 16, "num_labels": 3}


def bert() -> PreTrainedModel:
    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, **SIZES)
    return BertForSequenceClassification(config)


def distilbert() -> PreTrainedModel:
    return DistilBertForSequenceClassification(DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=64, **SIZES))


@pytest.fixture(params=[bert, distilbert])
def loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.setattr("bitpress.engine.scene.compute_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    model = request.param().eval().requires_grad_(False)
    for name, weight in model.named_parameters():  # as drawn, everything is so small that the blocks do next to nothing
        if weight.ndim == 2 and "embed" not in name:
            weight.mul_(8)
    return Loaded(model, None, anatomy_of(model, "encoder"), Path(), "encoder")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_roles_are_known(loaded: Loaded) -> None:
    assert loaded.anatomy.roles == ("q", "k", "v", "o", "fc1", "fc2")
    assert (loaded.anatomy.heads, loaded.anatomy.kv_heads, loaded.anatomy.head_dim, loaded.anatomy.ffn) == (4, 4, 8, 64)


def test_what_is_cut_out_is_what_was_masked(loaded: Loaded) -> None:
    scene = Scene(loaded, Recipe(model="encoder"), IDS)
    heads_F, neurons_F = torch.ones(32), torch.ones(64)
    heads_F[8:16], neurons_F[:20] = 0, 0
    with masking(scene.model, scene.anatomy, {Key(1, "heads"): heads_F, Key(2, "neurons"): neurons_F}):
        masked = logits(scene.model)
    keep_heads(scene.model, scene.anatomy, 1, [0, 2, 3])
    keep_neurons(scene.model, scene.anatomy, 2, list(range(20, 64)))
    assert torch.allclose(logits(scene.model), masked, atol=1e-5)
    assert not torch.allclose(masked, logits(loaded.model), atol=1e-3)


def test_the_stream_is_normed_between_the_sublayers(loaded: Loaded) -> None:
    scene = Scene(loaded, Recipe(model="encoder"), IDS)
    caught = Stream(scene.model, scene).catch(0)
    norms = [name for name, module in scene.model.named_modules() if name.startswith(scene.anatomy.block_prefix + ".0.") and "Norm" in type(module).__name__]
    after, last = (get(scene.model, name) for name in norms)
    with torch.no_grad():
        assert torch.allclose(after(caught.base["heads"][0] + caught.added["heads"][0]), caught.base["neurons"][0], atol=1e-5)
        assert torch.allclose(last(caught.base["neurons"][0] + caught.added["neurons"][0]), caught.output[0], atol=1e-5)


@pytest.mark.parametrize("method", ["k-prune", "kwon", "mope", "llm-pruner", "flap", "wanda-structured", "magnitude-structured"])
def test_every_score_prunes_an_encoder_and_a_fit_repairs_it(loaded: Loaded, method: str) -> None:
    before = logits(loaded.model)

    def drift(repair: str) -> float:
        options = {"remove": 0.4, "multiple": 2, "repair": repair, **({"sequences": 4, "neuron_groups": 4} if method == "mope" else {})}
        plan = Recipe.from_dict({"model": "encoder", "stages": [{"method": method, "options": options}]})
        made = compress(loaded, plan, calibration=CalibrationSet("made up", 0, "sha", IDS))
        assert made.recipe.reduced(loaded.anatomy).linear_params <= 0.6 * loaded.anatomy.linear_params
        return float((logits(made.model) - before).square().mean())

    assert drift("least_squares") < drift("none")
