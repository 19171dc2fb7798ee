"""Sensitivity: scores by their definition, kept once, resumed after a stop, read without torch."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine import sensitivity_context, sensitivity_fisher, sensitivity_truth
from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.home import sensitivity_dir
from bitpress.engine.methods.quantize.pipeline import dequantize_groups, quantize_groups
from bitpress.engine.model import surgery
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import WeightScheme
from bitpress.engine.sensitivity import measure_on_text, measure_sensitivity
from bitpress.engine.sensitivity_file import ACTIVATION, DATA_FREE, DROP, FISHER, KL, KL_WITHOUT, LOSS, OPTIONS, QUICK_KINDS, find, read
from bitpress.engine.sensitivity_options import made_of

Build = Callable[..., Loaded]
IDS = torch.arange(36).view(3, 12) * 11 % 320
pytestmark = pytest.mark.usefixtures("bitpress_home")


@pytest.mark.parametrize("kinds", [(DATA_FREE, ACTIVATION), QUICK_KINDS], ids=["by a walk", "by a backward"])
def test_scores_are_what_their_definition_says(in_memory: Build, kinds: tuple[str, ...]) -> None:
    scores_of = {DATA_FREE: 21 * 6, ACTIVATION: 21 * 6, FISHER: 21 * 6 + 3 + 2 + 3 * 4, LOSS: 21 * 6 + 3 + 2 + 3 * 4}
    loaded = in_memory("llama")
    report = measure_sensitivity(loaded, IDS, kinds=kinds)
    assert len(report.scores) == sum(scores_of[kind] for kind in kinds)
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
    assert report.table(ACTIVATION)["3-bit"][name] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "phi", "custom"])
def test_fewer_bits_hurt_more_in_every_layer_of_every_family(in_memory: Build, architecture: str) -> None:
    loaded = in_memory(architecture)
    report = measure_sensitivity(loaded, IDS)
    for kind in (DATA_FREE, ACTIVATION):
        table = report.table(kind)
        for part in loaded.anatomy.linears:
            assert 0 < table["8-bit"][part.name] < table["4-bit"][part.name] < table["3-bit"][part.name] < table["2-bit"][part.name]
            assert 0 < table["50%"][part.name] < table["2:4"][part.name]
    table = report.table(FISHER)  # random probes: only what is far apart keeps its order in every layer
    assert all(0 < table["8-bit"][part.name] < table["2-bit"][part.name] for part in loaded.anatomy.linears)


def test_it_is_measured_once_and_kept_by_model_and_tokens(in_memory: Build) -> None:
    loaded, told = in_memory("llama"), []
    first = measure_sensitivity(loaded, IDS, emit=lambda kind, data: told.append((kind, data)))
    assert [data["done"] for kind, data in told if kind == "progress"] == list(range(1, 22))
    assert set(first.seconds_of) == set(QUICK_KINDS)
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
    assert said.split() == [str(len(report.scores)), "False"]
    report.path.write_text("{")
    assert find(report.fingerprint) is None


def test_the_document_has_the_stable_keys(in_memory: Build) -> None:
    shown = measure_sensitivity(in_memory("llama"), IDS).to_dict()
    assert {"digest", "kind", "seconds", "scores"} <= set(shown)
    assert shown["kind"] == FISHER
    assert len(shown["other_kinds"][ACTIVATION]) == len(shown["other_kinds"][DATA_FREE]) == 126
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


# Divergence: to second order, and itself ---------------------------------------------------------------------------


def logits_of(loaded: Loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=IDS).logits.double().log_softmax(-1)


def divergence(dense: torch.Tensor, other: torch.Tensor) -> float:
    return float((dense.exp() * (dense - other)).sum(-1).mean())


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards in float32, so that a comparison is not of bfloat16's noise."""
    for module in (sensitivity_truth, sensitivity_fisher):
        monkeypatch.setattr(module, "compute_dtype", lambda device: torch.float32)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["llama", "llama_untied", "gpt2", "gemma2", "custom"])
def test_cached_prefixes_give_what_plain_forwards_give(in_memory: Build, architecture: str) -> None:
    loaded = in_memory(architecture)
    dense, option = logits_of(loaded), OPTIONS[3]
    prefixes = sensitivity_truth.Prefixes(loaded.model, loaded.anatomy, IDS, batch=2)
    with prefixes.open():
        prefixes.take()
        prefixes.refer()
        assert prefixes.kl_plain() == pytest.approx(0.0, abs=1e-7)
        for part in loaded.anatomy.linears:
            module = surgery.get(loaded.model, part.name)
            made = made_of(surgery.linear_weight(module).detach(), option.scheme)
            with sensitivity_truth.changed(module, made):
                found = prefixes.kl_from(part.block or 0)
                assert found == pytest.approx(prefixes.kl_plain(), rel=1e-5, abs=1e-9)
                assert found == pytest.approx(divergence(dense, logits_of(loaded)), rel=1e-3)
    assert torch.equal(dense, logits_of(loaded)), "the model is left as it was"


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["llama", "llama_untied", "gpt2", "gemma2", "custom"])
def test_one_backward_foretells_the_divergence(in_memory: Build, architecture: str) -> None:
    report = measure_sensitivity(in_memory(architecture), torch.arange(256).view(4, 64) * 11 % 319, kinds=(FISHER, KL))
    assert {(score.layer, score.option) for score in report.scores if score.kind == FISHER} == {
        (score.layer, score.option) for score in report.scores if score.kind == KL
    }
    pairs = [(told, report.table(KL)[option][layer]) for option in ("4-bit", "3-bit") for layer, told in report.table(FISHER)[option].items()]
    told, true = (torch.tensor(column).clamp_min(1e-12).log() for column in zip(*pairs, strict=True))
    assert float((told - true).median().abs()) < math.log(1.6)
    assert float(torch.corrcoef(torch.stack([told, true]))[0, 1]) > 0.85


@pytest.mark.usefixtures("exact")
def test_a_layer_that_scores_cannot_tell_is_measured_among_changed_ones(in_memory: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, name, ids = in_memory("llama"), "model.layers.1.mlp.down_proj", torch.arange(256).view(4, 64) * 11 % 319
    plain = measure_sensitivity(loaded, ids)
    told = plain.table(FISHER)
    assert plain.table(LOSS) == told, "scores that stand on enough are kept as they are"
    assert plain.spent_by == LOSS
    monkeypatch.setattr(sensitivity_context, "doubtful", lambda stand, sequences, count: [name])
    spent = measure_sensitivity(loaded, ids, force=True)
    assert spent.table(FISHER) == told
    around = sensitivity_context.options_at(loaded, spent)
    module = surgery.get(loaded.model, name)
    stored = {part.name: surgery.linear_weight(surgery.get(loaded.model, part.name)).detach() for part in loaded.anatomy.linears}
    weights = {surgery.get(loaded.model, layer): made_of(stored[layer], option.scheme) for layer, option in around.items()}
    losses = []
    with torch.no_grad(), sensitivity_truth.all_changed(weights):
        for scheme in (*(option.scheme for option in OPTIONS), None):
            weight = made_of(stored[name], scheme) if scheme else stored[name]
            with sensitivity_truth.changed(module, weight):
                losses.append(torch.nn.functional.cross_entropy(loaded.model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item())
    for option, loss in zip(OPTIONS, losses, strict=False):
        assert spent.table(LOSS)[option.id][name] == pytest.approx(loss - min(losses), abs=2e-5)
    other = "model.layers.0.mlp.up_proj"
    assert spent.table(LOSS)["3-bit"][other] == told["3-bit"][other]


def test_scores_that_stand_on_a_few_windows_are_doubted() -> None:
    even_SL = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    first_SL = torch.zeros(8, 256).index_fill(1, torch.tensor([0]), 1.0) * torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1])[:, None]
    stands_on = lambda products_SL: sensitivity_fisher.stands_on(sensitivity_fisher.in_windows(products_SL[..., None]).sum((1, 2)))  # noqa: E731
    assert stands_on(even_SL) > 30
    assert 1 <= stands_on(first_SL) < 2
    assert stands_on(torch.zeros(8, 256)) == 1
    stand = {"even": [40.0, 3.0, 50.0], "few": [3.0, 30.0, 2.0], "fewest": [1.5, 1.5, 1.5]}
    windows = sensitivity_fisher.windows((8, 256))
    assert windows == 128
    assert sensitivity_context.doubtful(stand, 8, windows) == ["fewest", "few"]
    assert sensitivity_context.doubtful(stand, 8, 8) == [], "where a sequence is one window, all scores stand on few"
    assert len(sensitivity_context.doubtful({str(number): [1.0] for number in range(9)}, 8, windows)) == sensitivity_context.MOST


@pytest.mark.usefixtures("exact")
def test_whole_blocks_and_layers_left_dense(in_memory: Build) -> None:
    loaded = in_memory("llama")
    dense = logits_of(loaded)
    report = measure_sensitivity(loaded, IDS, options=OPTIONS[2:3], kinds=(KL, KL_WITHOUT))
    assert set(report.table(KL)[DROP]) == {f"model.layers.{block}" for block in range(3)}
    scheme, layers = OPTIONS[2].scheme, {part.name: surgery.get(loaded.model, part.name) for part in loaded.anatomy.linears}
    made = {module: made_of(module.weight.detach(), scheme) for module in layers.values()}
    with sensitivity_truth.all_changed(made):
        whole = divergence(dense, logits_of(loaded))
    name, module = "model.layers.1.mlp.down_proj", layers["model.layers.1.mlp.down_proj"]
    with sensitivity_truth.all_changed({other: weight for other, weight in made.items() if other is not module}):
        rest = divergence(dense, logits_of(loaded))
    assert report.table(KL_WITHOUT)["3-bit"][name] == pytest.approx(whole - rest, rel=1e-2, abs=1e-6)


def test_a_later_kind_joins_the_file_and_a_stopped_one_goes_on(in_memory: Build) -> None:
    loaded = in_memory("llama")
    first = measure_sensitivity(loaded, IDS)
    asked = iter(range(1000))
    with pytest.raises(Cancelled):
        measure_sensitivity(loaded, IDS, kinds=(KL,), should_stop=lambda: next(asked) >= 60)
    assert find(loaded.anatomy.fingerprint, (KL,)) is None
    seen: list[int] = []
    both = measure_sensitivity(loaded, IDS, kinds=(KL, FISHER), emit=lambda kind, data: seen.append(data.get("done", 0)))
    assert seen[1] == 43, "the first block's 42 scores were kept"
    assert set(both.kinds) == {*QUICK_KINDS, KL}
    assert both.path == first.path
    again = measure_sensitivity(loaded, IDS, kinds=(KL,), force=True)
    assert {(s.layer, s.option, s.kind): s.score for s in again.scores} == pytest.approx({(s.layer, s.option, s.kind): s.score for s in both.scores})
    assert sorted((s.layer, s.option) for s in both.scores if s.kind == KL) == sorted((s.layer, s.option) for s in again.scores if s.kind == KL)
