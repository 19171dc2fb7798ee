"""Perplexity and divergence: the sliced path is the model's own function, and says what a plain loop says."""

import math
from typing import Any

import pytest
import torch

from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.measure import logits as logits_module
from bitpress.engine.measure import perplexity as perplexity_module
from bitpress.engine.measure.logits import SplitScorer, WholeScorer, scorer_of, slices
from bitpress.engine.measure.perplexity import Quality, Window, measure_alone, measure_pair, perplexity

VOCAB = 320


def windows(count: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def plain_nll(model: Any, ids_NT: torch.Tensor) -> list[float]:
    """An independent loop: whole logits, float64, one window at a time."""
    means = []
    for ids_T in ids_NT:
        with torch.no_grad():
            logits_TV = model(ids_T[None]).logits[0].double()
        logp_TV = logits_TV - logits_TV.logsumexp(-1, keepdim=True)
        means.append(-sum(float(logp_TV[t, ids_T[t + 1]]) for t in range(len(ids_T) - 1)) / (len(ids_T) - 1))
    return means


def noisy_twin(tiny_models: Any, family: str, spread: float) -> Any:
    model = tiny_models(family)
    generator = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        weight.data += spread * torch.randn(weight.shape, generator=generator)
    return model


def test_sliced_logits_are_the_models_own(any_tiny: tuple[str, Any]) -> None:
    _, model = any_tiny
    ids_BT = windows(2, 24)
    scorer = scorer_of(model)
    with torch.inference_mode():
        hidden_BTD = scorer.hidden(ids_BT)
        sliced = torch.cat([scorer.logits(hidden_BTD[0, start : start + 7]) for start in range(0, 24, 7)])
        torch.testing.assert_close(sliced, model(ids_BT).logits[0].float(), rtol=1e-4, atol=1e-4)


def test_every_family_of_transformers_is_split_and_only_a_foreign_model_is_not(any_tiny: tuple[str, Any]) -> None:
    family, model = any_tiny
    assert isinstance(scorer_of(model), WholeScorer if family == "custom" else SplitScorer)


@pytest.mark.parametrize(("family", "change"), [("gemma2", {"final_logit_softcapping": 2.0}), ("gemma3", {"final_logit_softcapping": 2.0})])
def test_a_soft_cap_of_the_logits_is_honoured(tiny_models: Any, family: str, change: dict[str, float]) -> None:
    capped, free = tiny_models(family, **change), tiny_models(family, final_logit_softcapping=None)
    ids_NT = windows(1, 32)
    assert measure_alone(capped, ids_NT).nll_dense == pytest.approx(plain_nll(capped, ids_NT), rel=1e-5)
    assert measure_alone(capped, ids_NT).nll_dense != pytest.approx(measure_alone(free, ids_NT).nll_dense, rel=1e-3)


@pytest.mark.parametrize(("config", "values"), [
    ("GraniteConfig", {"logits_scaling": 4.0}),
    ("CohereConfig", {"logit_scale": 0.3}),
    ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
])  # fmt: skip
def test_families_that_scale_logits_or_add_outputs_are_split_too(config: str, values: dict[str, float]) -> None:
    import transformers

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.1}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes, **tokens, **values)).eval()
    ids_NT = windows(1, 20)
    assert isinstance(scorer_of(model), SplitScorer)
    assert measure_alone(model, ids_NT).nll_dense == pytest.approx(plain_nll(model, ids_NT), rel=1e-5)


def test_a_split_that_does_not_reproduce_the_model_is_not_used(tiny_models: Any) -> None:
    model = tiny_models("llama")
    plain = type(model).forward

    class Shifted(type(model)):
        """Does something to the tokens before its backbone, which a split would miss."""

        def forward(self, input_ids: Any = None, **rest: Any) -> Any:
            return plain(self, input_ids=None if input_ids is None else (input_ids + 1) % VOCAB, **rest)

    model.__class__ = Shifted
    assert isinstance(scorer_of(model), WholeScorer)
    ids_NT = windows(2, 16)
    assert measure_alone(model, ids_NT).nll_dense == pytest.approx(plain_nll(model, ids_NT), rel=1e-5)


def test_perplexity_is_that_of_a_plain_loop(any_tiny: tuple[str, Any]) -> None:
    _, model = any_tiny
    ids_NT = windows(3, 40)
    expected = plain_nll(model, ids_NT)
    quality = measure_alone(model, ids_NT)
    assert quality.nll_dense == pytest.approx(expected, rel=1e-5)
    assert perplexity(quality.nll_dense) == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)


def test_a_pair_gives_each_model_its_own_perplexity_and_the_divergence_of_a_plain_formula(tiny_models: Any) -> None:
    dense, other = tiny_models("llama"), noisy_twin(tiny_models, "llama", 0.02)
    ids_NT = windows(2, 50)
    quality = measure_pair(dense, other, ids_NT)
    assert quality.nll_dense == pytest.approx(plain_nll(dense, ids_NT), rel=1e-5)
    assert quality.nll == pytest.approx(plain_nll(other, ids_NT), rel=1e-5)
    with torch.no_grad():
        p, q = (model(ids_NT).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in (dense, other))
    kl_P = (p.exp() * (p - q)).sum(-1)
    mean, p99 = quality.kl()
    assert mean == pytest.approx(float(kl_P.mean()), rel=1e-4)
    assert p99 == pytest.approx(float(kl_P.sort().values[math.ceil(0.99 * len(kl_P)) - 1]), rel=1e-4)
    assert quality.same_top1() == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_a_model_does_not_diverge_from_itself(tiny_models: Any) -> None:
    quality = measure_pair(tiny_models("qwen2"), tiny_models("qwen2"), windows(3, 30))
    assert quality.kl() == (0.0, 0.0)
    assert quality.same_top1() == 1.0
    ratio = quality.ratio()
    assert ratio is not None
    assert (ratio.low, ratio.mean, ratio.high) == (1.0, 1.0, 1.0)


def test_windows_that_share_a_forward_say_what_they_say_alone(tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids_NT = tiny_models("llama"), windows(5, 32)
    together = measure_alone(model, ids_NT).nll_dense
    monkeypatch.setattr(perplexity_module, "FORWARD_TOKENS", 32)
    assert measure_alone(model, ids_NT).nll_dense == pytest.approx(together, rel=1e-5)


def test_no_head_sees_more_than_256_positions(tiny_models: Any) -> None:
    model = tiny_models("llama_untied", max_position_embeddings=1024)
    seen: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2]))
    measure_pair(model, model, windows(2, 1000))
    assert max(seen) == logits_module.MAX_POSITIONS == 256
    assert sum(size for size in seen if size != logits_module.PROBE_TOKENS) == 2 * 2 * 999


def test_a_large_vocabulary_makes_the_slices_shorter() -> None:
    assert [part.stop - part.start for part in slices(2047, 49152)] == [256] * 8
    longest = max(part.stop - part.start for part in slices(2047, 262144))
    assert longest * 262144 <= logits_module.SLICE_NUMBERS
    assert sum(min(part.stop, 2047) - part.start for part in slices(2047, 262144)) == 2047


def test_each_window_is_told_as_it_comes(tiny_models: Any) -> None:
    told: list[Window] = []
    quality = measure_pair(tiny_models("llama"), noisy_twin(tiny_models, "llama", 0.02), windows(4, 32), on_window=told.append)
    assert [window.index for window in told] == [0, 1, 2, 3]
    assert [window.nll for window in told] == quality.nll
    assert told[0].ratio is None  # one window says nothing of the spread
    assert told[-1].ratio == quality.ratio()


def test_a_live_run_stops_once_the_ratio_is_settled_and_a_full_one_does_not(tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_module, "FORWARD_TOKENS", 16)
    model, ids_NT = tiny_models("llama"), windows(20, 16)
    live, whole = (measure_pair(model, tiny_models("llama"), ids_NT, early_stop=early) for early in (True, False))
    assert (live.windows, live.asked) == (8, 20)
    assert whole.windows == 20


def test_stopping_between_windows_raises_cancelled(tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_module, "FORWARD_TOKENS", 16)
    told: list[Window] = []
    with pytest.raises(Cancelled):
        measure_alone(tiny_models("llama"), windows(5, 16), told.append, should_stop=lambda: len(told) == 2)
    assert len(told) == 2


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_windows_that_predict_nothing_are_refused(tiny_models: Any, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="nothing to measure"):
        measure_alone(tiny_models("llama"), torch.zeros(shape, dtype=torch.long))


def test_a_broken_model_gives_numbers_that_say_so(tiny_models: Any) -> None:
    broken = tiny_models("llama")
    broken.model.norm.weight.data.fill_(float("nan"))
    quality = measure_pair(tiny_models("llama"), broken, windows(9, 16))
    assert math.isnan(perplexity(quality.nll))
    assert math.isfinite(perplexity(quality.nll_dense))
    assert quality.windows == 9  # nothing is settled by numbers that are none


def test_a_perplexity_that_no_float_holds_is_infinite_not_an_error() -> None:
    assert perplexity([800.0, 900.0]) == math.inf
    assert Quality(asked=2, nll_dense=[1.0, 1.0], nll=[900.0, 901.0]).ratio().high == math.inf  # type: ignore[union-attr]
