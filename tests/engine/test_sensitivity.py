"""Sensitivity: scores by their definition, kept once, resumed after a stop, read without torch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.home import sensitivity_dir
from bitpress.engine.methods.quantize.pipeline import dequantize_groups, quantize_groups
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import WeightScheme
from bitpress.engine.sensitivity import measure_on_text, measure_sensitivity
from bitpress.engine.sensitivity_file import ACTIVATION, DATA_FREE, OPTIONS, find, read

Build = Callable[..., Loaded]
IDS = torch.arange(36).view(3, 12) * 11 % 320
pytestmark = pytest.mark.usefixtures("bitpress_home")


def test_scores_are_what_their_definition_says(in_memory: Build) -> None:
    loaded = in_memory("llama")
    report = measure_sensitivity(loaded, IDS)
    assert len(report.scores) == 21 * 5 * 2
    heard: list[torch.Tensor] = []
    layer = loaded.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
        loaded.model(input_ids=IDS)
        handle.remove()
    scheme = WeightScheme(bits=3, group_size=64)
    difference = (layer.weight - dequantize_groups(quantize_groups(layer.weight, scheme), scheme)).double()
    moment = heard[0].double().square().mean(dim=(0, 1))
    name = "model.layers.1.mlp.down_proj"
    assert report.table(DATA_FREE)["3-bit"][name] == pytest.approx(float(difference.square().sum() / layer.weight.double().square().sum()), rel=1e-4)
    expected = float((difference.square() * moment).sum() / (layer.weight.double().square() * moment).sum())
    assert report.table(ACTIVATION)["3-bit"][name] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "phi", "custom"])
def test_fewer_bits_hurt_more_in_every_layer_of_every_family(in_memory: Build, architecture: str) -> None:
    loaded = in_memory(architecture)
    report = measure_sensitivity(loaded, IDS)
    for kind in (DATA_FREE, ACTIVATION):
        table = report.table(kind)
        for part in loaded.anatomy.linears:
            assert 0 < table["8-bit"][part.name] < table["4-bit"][part.name] < table["3-bit"][part.name] < table["2-bit"][part.name]
            assert 0 < table["50%"][part.name] < 0.5


def test_it_is_measured_once_and_kept_by_model_and_tokens(in_memory: Build) -> None:
    loaded, told = in_memory("llama"), []
    first = measure_sensitivity(loaded, IDS, emit=lambda kind, data: told.append((kind, data)))
    assert [data["done"] for kind, data in told if kind == "progress"] == list(range(1, 22))
    again: list[Any] = []
    assert measure_sensitivity(loaded, IDS, emit=lambda *said: again.append(said)) == first
    assert again == []
    assert measure_sensitivity(loaded, IDS, force=True).scores == first.scores
    digests = {first.digest, measure_sensitivity(loaded, IDS.flip(1)).digest, measure_sensitivity(in_memory("llama", seed=1), IDS).digest}
    digests |= {measure_sensitivity(loaded, IDS, options=OPTIONS[:1]).digest, measure_sensitivity(loaded, None, kinds=(DATA_FREE,)).digest}
    assert len(digests) == 5
    assert len(list(sensitivity_dir().glob("llama-*.json"))) == 5


def test_a_stopped_measurement_goes_on_where_it_was(in_memory: Build) -> None:
    loaded = in_memory("llama")
    asked = iter(range(1000))
    with pytest.raises(Cancelled):
        measure_sensitivity(loaded, IDS, kinds=(DATA_FREE,), should_stop=lambda: next(asked) >= 9)
    assert find(loaded.anatomy.fingerprint) is None, "half a measurement is not offered"
    seen: list[int] = []
    resumed = measure_sensitivity(loaded, IDS, kinds=(DATA_FREE,), emit=lambda kind, data: seen.append(data.get("done", 0)))
    assert seen[1] == 8, "the 7 layers of the first block were kept"
    assert resumed.scores == measure_sensitivity(loaded, IDS, kinds=(DATA_FREE,), force=True).scores
    assert list(sensitivity_dir().glob("*.unfinished")) == []


def test_the_file_is_found_without_torch(in_memory: Build, bitpress_home: Path) -> None:
    report = measure_sensitivity(in_memory("llama"), IDS)
    assert read(report.path) == find(report.fingerprint) == report
    assert find(report.fingerprint, ["another kind"]) is None
    assert find("0" * 64) is None
    code = "import sys\nfrom bitpress.engine.sensitivity_file import find\nprint(len(find(sys.argv[1]).scores), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code, report.fingerprint], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split() == ["210", "False"]
    report.path.write_text("{")
    assert find(report.fingerprint) is None


def test_the_document_has_the_stable_keys(in_memory: Build) -> None:
    shown = measure_sensitivity(in_memory("llama"), IDS).to_dict()
    assert {"digest", "kind", "seconds", "scores"} <= set(shown)
    assert shown["kind"] == ACTIVATION
    assert len(shown["scores"]) == len(shown["other_kinds"][DATA_FREE]) == 105
    assert set(shown["scores"][0]) == {"layer", "option", "score"}


def test_what_cannot_be_measured_is_refused(in_memory: Build) -> None:
    with pytest.raises(InputError, match="kind 'hessian'"):
        measure_sensitivity(in_memory("llama"), IDS, kinds=("hessian",))
    with pytest.raises(InputError, match="needs text"):
        measure_sensitivity(in_memory("llama"), None)
    broken = in_memory("llama")
    broken.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj"):
        measure_sensitivity(broken, None, kinds=(DATA_FREE,))


def test_a_text_of_ones_own_can_be_listened_to(tiny_llama_dir: Path, story: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.engine.model import library
    from bitpress.engine.model.load import load

    monkeypatch.setenv("BITPRESS_ROOTS", os.pathsep.join(map(str, (tiny_llama_dir, tmp_path))))
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"{number}. {story}" for number in range(60)))
    loaded = load(library.add_local(tiny_llama_dir).id)
    report = measure_on_text(loaded, str(text))
    assert "128 tokens of" in report.protocol, "512 tokens are cut to the model's context"
    assert report.tokens_sha256
