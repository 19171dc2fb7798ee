"""Texts that are written together are those that are written alone, sampled or not; each ends for its own reasons."""

import pytest
import torch

from bitpress.engine.decode import Decoder
from bitpress.engine.decode_batch import BatchDecoder
from bitpress.engine.errors import InputError
from bitpress.engine.generate import Sampling, generate
from bitpress.engine.generate_batch import generate_batch

PROMPTS = ("Once upon a time", "The bear", "Every morning the bear went out to look for berries", "Lily")
OWN = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture
def batch(tiny_models, tiny_tokenizer):
    return BatchDecoder(tiny_models("llama"), len(PROMPTS), tiny_tokenizer, dtype=torch.float32)


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_text_is_the_one_it_would_be_alone(tiny_models, tiny_tokenizer, family, temperature) -> None:
    model = tiny_models(family)
    samplings = [Sampling(max_new=new, temperature=temperature, seed=seed) for seed, new in enumerate((12, 20, 5, 16))]
    decoder = BatchDecoder(model, len(PROMPTS), tiny_tokenizer, dtype=torch.float32)
    found = generate_batch(decoder, tiny_tokenizer, PROMPTS, samplings)
    assert found.reason is None and found.tokens_per_s > 0
    one = Decoder(model, tiny_tokenizer, dtype=torch.float32)
    for prompt, sampling, text in zip(PROMPTS, samplings, found.texts, strict=True):
        expected = generate(one, tiny_tokenizer, prompt, sampling)
        assert [token.id for token in text.tokens] == [token.id for token in expected.tokens]
        assert (text.text, text.ended, text.prompt_tokens) == (expected.text, expected.ended, expected.prompt_tokens)
        assert [token.logprob for token in text.tokens] == pytest.approx([token.logprob for token in expected.tokens], abs=1e-3)


def test_every_family_writes_all_and_says_why_not_at_once(any_tiny, tiny_tokenizer) -> None:
    name, model = any_tiny
    told: list[int] = []
    found = generate_batch(model, tiny_tokenizer, PROMPTS[:2], Sampling(max_new=4), lambda row, token: told.append(row))
    assert (found.reason is None) == (name in (*OWN, "llama_untied"))
    assert [len(text.tokens) for text in found.texts] == [told.count(0), told.count(1)]
    if found.reason:
        expected = [generate(model, tiny_tokenizer, prompt, Sampling(max_new=4)).text for prompt in PROMPTS[:2]]
        assert [text.text for text in found.texts] == expected


def test_stop_texts_and_end_tokens_are_each_ones_own(batch, tiny_tokenizer) -> None:
    free = generate_batch(batch, tiny_tokenizer, PROMPTS, Sampling(max_new=10, temperature=1.0))
    pieces = [next(token.text for token in text.tokens[2:] if token.text.strip()) for text in free.texts]
    samplings = [Sampling(max_new=10, temperature=1.0, stop=(piece,) if row % 2 else ()) for row, piece in enumerate(pieces)]
    cut = generate_batch(batch, tiny_tokenizer, PROMPTS, samplings)
    for row, (text, whole) in enumerate(zip(cut.texts, free.texts, strict=True)):
        assert text.tokens == whole.tokens[: len(text.tokens)]
        assert text.ended == ("stop" if row % 2 else whole.ended)
    batch.model.generation_config.eos_token_id = [1, free.texts[0].tokens[3].id]
    ended = generate_batch(batch, tiny_tokenizer, PROMPTS[:1], Sampling(max_new=10, temperature=1.0)).texts[0]
    assert ended.ended == "stop" and len(ended.tokens) <= 3


def test_cancelling_stops_all_but_keeps_what_was_done(batch, tiny_tokenizer) -> None:
    told: list[int] = []
    samplings = [Sampling(max_new=2), *[Sampling(max_new=10)] * 3]
    made = generate_batch(batch, tiny_tokenizer, PROMPTS, samplings, lambda row, token: told.append(row), lambda: len(told) == 12)
    assert [text.ended for text in made.texts] == ["length", "cancelled", "cancelled", "cancelled"]
    assert sum(len(text.tokens) for text in made.texts) == 12 == len(told)


def test_cancelling_one_after_another(tiny_models, tiny_tokenizer) -> None:
    told: list[int] = []
    made = generate_batch(tiny_models("gpt2"), tiny_tokenizer, PROMPTS[:3], Sampling(max_new=3), lambda row, token: told.append(row), lambda: len(told) == 4)
    assert [(text.ended, len(text.tokens)) for text in made.texts] == [("length", 3), ("cancelled", 1), ("cancelled", 0)]


def test_each_prompt_that_does_not_fit_is_named(tiny_models, tiny_tokenizer, story) -> None:
    with pytest.raises(InputError, match=r"prompt 2 of \d+ tokens and 8 new ones; prompt 3 of .*room for 128"):
        generate_batch(tiny_models("llama"), tiny_tokenizer, ["The", story, story], Sampling(max_new=8))


def test_what_means_nothing_is_refused(batch, tiny_tokenizer) -> None:
    for prompts, sampling, said in ((), None, "no prompt"), (PROMPTS, [Sampling()], "1 samplings"), (PROMPTS * 2, Sampling(4), "room for 4"):
        with pytest.raises(InputError, match=said):
            generate_batch(batch, tiny_tokenizer, prompts, sampling)
    with pytest.raises(InputError, match="max_new"):
        generate_batch(batch, tiny_tokenizer, PROMPTS, Sampling(max_new=0))
