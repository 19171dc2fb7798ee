"""What no method of quantisation may choke on: widths and groups that do not fit, weights that are no numbers, text of which nothing can be learned.

Each is a clear refusal that names the thing and the remedy, or a remedy of our own that the run's events tell. New methods are taken in by themselves.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.compress import compress
from bitpress.engine.data.texts import TextSample
from bitpress.engine.data.tokens import calibration_ids
from bitpress.engine.errors import InputError
from bitpress.engine.methods import registry
from bitpress.engine.methods.base import Method
from bitpress.engine.recipe import Recipe

IDS = torch.randint(2, 300, (6, 16), generator=torch.Generator().manual_seed(1))
METHODS = {name: method for name, method in registry.all_methods().items() if method.ability.part == "weights"}
SECOND_ORDER = ("gptq", "flexround", "omniquant", "uniquanf")
FEW = {"steps": 2, "held_out": 2, "sequences": 2}


def recipe(method: Method, **weights: Any) -> Recipe:
    """All block linears by one method, in a form that it has."""
    form, bits = method.ability.formats[0], 4 if 4 in method.ability.bits else method.ability.bits[0]
    options = {name: value for name, value in FEW.items() if name in method.Options.model_fields}
    line = {"match": "*", "weights": {"bits": bits, "group_size": 16, "format": form, "symmetric": not method.ability.zeros, **weights}}
    if method.name == "llm-int8":
        line = {"match": "*", "weights": {"bits": 8, "group_size": "row", "symmetric": True, **weights}, "activations": {"bits": 8, "outliers": 6.0}}
    return Recipe.from_dict({"model": "llama", "schemes": [line], "stages": [{"method": method.name, "options": options}]})


def run(loaded: Any, plan: Recipe, ids: torch.Tensor = IDS) -> tuple[Any, list[str]]:
    said: list[tuple[str, dict[str, Any]]] = []
    made = compress(loaded, plan, lambda kind, data: said.append((kind, data)), calibration=CalibrationSet("made up", 0, "sha", ids))
    return made, [data["text"] for kind, data in said if kind == "note"]


@pytest.mark.parametrize("name", METHODS)
def test_a_group_that_is_longer_than_a_row_is_refused(in_memory: Callable[..., Any], name: str) -> None:
    with pytest.raises(InputError, match=r"does not fit the model.*64 inputs"):
        run(in_memory("llama"), recipe(METHODS[name], group_size=4096))


@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name, method in METHODS.items() for bits in (2, 3, 8) if bits not in method.ability.bits])
def test_a_width_that_it_has_not_is_refused(in_memory: Callable[..., Any], name: str, bits: int) -> None:
    with pytest.raises(InputError, match="does not fit the model"):
        run(in_memory("llama"), recipe(METHODS[name], bits=bits))


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_no_numbers_are_refused_by_name(in_memory: Callable[..., Any], name: str) -> None:
    loaded = in_memory("llama")
    loaded.model.model.layers[0].self_attn.v_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(InputError, match=r"layers.0.self_attn.v_proj cannot be compressed. 1 of its .* weights are not finite.*undamaged copy"):
        run(loaded, recipe(METHODS[name]))


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_inputs_that_say_nothing_are_remedied_and_told(in_memory: Callable[..., Any], name: str) -> None:
    """An input that is 0 in all of the text: its row of the second moments is 0, so they have no inverse."""
    loaded = in_memory("llama")
    loaded.model.model.layers[0].input_layernorm.weight.data[5] = 0.0
    made, said = run(loaded, recipe(METHODS[name]))
    assert "model.layers.0.self_attn.q_proj: 1 of its 64 inputs were 0 in all of the calibration text." in said
    assert made.model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_a_text_of_one_token_over_and_over_still_works(in_memory: Callable[..., Any], name: str) -> None:
    made, _ = run(in_memory("llama"), recipe(METHODS[name]), torch.full((6, 16), 7))
    assert made.model(input_ids=IDS).logits.isfinite().all()


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    class Words:
        """A tokenizer of words."""

        bos_token_id = None

        def get_vocab(self) -> dict[str, int]:
            return {"made": 1, "up": 2}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1] * len(text.split())}

    sample = TextSample("made up " * 20, "sha-of-made-up-20", "nowhere", "mine", "calibration", "none", "as it is")
    with pytest.raises(InputError, match=r"too short. It has 40 tokens; one window needs 512. Choose a longer text or shorter windows"):
        calibration_ids(Words(), sample, 8, 512)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.gradients and method.acts_on == "block"])
def test_too_few_sequences_to_hold_some_out_are_refused(in_memory: Callable[..., Any], name: str) -> None:
    with pytest.raises(InputError, match="no text left to train on"):
        run(in_memory("llama"), recipe(METHODS[name]), IDS[:2])
