"""Generation: the same tokens as transformers, sampling by its definition, text that survives split characters, clear refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.engine.decode import Decoder
from bitpress.engine.errors import InputError
from bitpress.engine.generate import Detokenizer, Sampling, choose, divergence, divergence_along, encode, generate, teacher_forced

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model(tiny_models):
    made = tiny_models("llama")
    made.generation_config.eos_token_id = [1]
    return made


@pytest.fixture(scope="module")
def decoder(model, tiny_tokenizer):
    return Decoder(model, tiny_tokenizer, dtype=torch.float32)


def test_greedy_writes_what_transformers_writes(model, decoder, tiny_tokenizer) -> None:
    ids = torch.tensor([tiny_tokenizer(PROMPT)["input_ids"]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=1)[0, ids.shape[1] :].tolist()
    made = generate(decoder, tiny_tokenizer, PROMPT, Sampling(max_new=20))
    ours = [token.id for token in made.tokens]
    assert ours == [token for token in expected if token != 1] and made.prompt_tokens == ids.shape[1]
    assert made.text == tiny_tokenizer.decode(ours)


def test_each_token_tells_what_the_model_thought(model, decoder, tiny_tokenizer) -> None:
    made = generate(decoder, tiny_tokenizer, PROMPT, Sampling(max_new=8, temperature=1.5, seed=3))
    ids = torch.tensor(tiny_tokenizer(PROMPT)["input_ids"] + [token.id for token in made.tokens])
    with torch.no_grad():
        logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    for position, token in enumerate(made.tokens, start=made.prompt_tokens - 1):
        assert token.logprob == pytest.approx(float(logp[position, token.id]), abs=1e-3)
        assert token.rank == int((logp[position] > logp[position, token.id]).sum())
        assert [share for _, share in token.top] == pytest.approx(logp[position].topk(5).values.exp().tolist(), abs=1e-4)
        assert "kl" not in token.as_dict()


def test_the_seed_decides_and_only_the_seed(decoder, tiny_tokenizer) -> None:
    torch.manual_seed(1)
    first = generate(decoder, tiny_tokenizer, PROMPT, Sampling(max_new=12, temperature=1.0, seed=5))
    torch.manual_seed(2)
    assert generate(decoder, tiny_tokenizer, PROMPT, Sampling(max_new=12, temperature=1.0, seed=5)).tokens == first.tokens
    assert generate(decoder, tiny_tokenizer, PROMPT, Sampling(max_new=12, temperature=1.0, seed=6)).tokens != first.tokens


def test_the_nucleus_is_the_smallest_set_with_the_share() -> None:
    logp, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.Generator().manual_seed(0)
    drawn = [choose(logp, Sampling(temperature=1.0, top_p=0.7), generator) for _ in range(3000)]
    assert set(drawn) == {0, 1}
    assert drawn.count(0) / 3000 == pytest.approx(0.5 / 0.8, abs=0.04)
    assert {choose(logp, Sampling(temperature=1.0, top_p=0.01), generator) for _ in range(20)} == {0}
    assert choose(logp, Sampling(), generator) == 0


def test_end_tokens_and_stop_texts_end_it(model, decoder, tiny_tokenizer) -> None:
    free = generate(decoder, tiny_tokenizer, PROMPT, Sampling(max_new=12))
    assert free.ended == "length" and len(free.tokens) == 12
    model.generation_config.eos_token_id = [1, free.tokens[4].id]
    try:
        cut = generate(decoder, tiny_tokenizer, PROMPT, Sampling(max_new=12))
    finally:
        model.generation_config.eos_token_id = [1]
    first = next(index for index, token in enumerate(free.tokens) if token.id == free.tokens[4].id)
    assert cut.ended == "stop" and cut.tokens == free.tokens[:first]
    piece = next(token.text for token in free.tokens if token.text)
    assert generate(decoder, tiny_tokenizer, PROMPT, Sampling(max_new=12, stop=(piece,))).ended == "stop"


def test_tokens_stream_and_stop_on_request(decoder, tiny_tokenizer) -> None:
    told = []
    made = generate(decoder, tiny_tokenizer, PROMPT, Sampling(max_new=12), told.append, should_stop=lambda: len(told) == 3)
    assert made.ended == "cancelled" and list(made.tokens) == told and len(told) == 3


@pytest.mark.parametrize("sampling", [Sampling(max_new=0), Sampling(temperature=-1), Sampling(temperature=math.nan), Sampling(top_p=0), Sampling(top_p=1.1)])
def test_values_that_mean_nothing_are_refused(decoder, tiny_tokenizer, sampling) -> None:
    with pytest.raises(InputError):
        generate(decoder, tiny_tokenizer, PROMPT, sampling)


def test_a_prompt_that_does_not_fit_is_refused_with_numbers(decoder, tiny_tokenizer, story) -> None:
    with pytest.raises(InputError, match=r"prompt of \d+ tokens and 64 new ones do not fit.*room for 128"):
        generate(decoder, tiny_tokenizer, story, Sampling(max_new=64))


def test_an_empty_prompt_starts_from_bos(tiny_tokenizer) -> None:
    assert encode(tiny_tokenizer, "") == [0] and encode(tiny_tokenizer, [5, 6]) == [5, 6]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), st.sampled_from("aé中😀 👩‍👩‍👧")), min_size=1, max_size=9))
def test_pieces_are_whole_characters_and_add_up(tiny_tokenizer, text) -> None:
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Detokenizer(tiny_tokenizer, tiny_tokenizer("The")["input_ids"])
    written = [pieces.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in written)
    assert "".join(written) + pieces.flush() == tiny_tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_flushed(tiny_tokenizer) -> None:
    ids = tiny_tokenizer("a😀", add_special_tokens=False)["input_ids"][:-1]
    pieces = Detokenizer(tiny_tokenizer, [])
    assert "".join(pieces.push(token) for token in ids) == "a" and pieces.flush() == "\ufffd"


def test_divergence_by_hand_and_along_a_text(tiny_models, tiny_tokenizer, decoder, story) -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert float(divergence(p, q)) == pytest.approx(0.5 * math.log(2), abs=1e-6)
    other = Decoder(tiny_models("llama", seed=1), tiny_tokenizer, dtype=torch.float32)
    ids = tiny_tokenizer(story)["input_ids"][:60]
    found = divergence_along(decoder, other, ids)
    assert len(found) == 59 and min(found) > 0 and max(divergence_along(decoder, Decoder(decoder.model, dtype=torch.float32), ids)) < 1e-6
    lively = generate(other, tiny_tokenizer, PROMPT, Sampling(max_new=6), reference=decoder)
    whole = tiny_tokenizer(PROMPT)["input_ids"] + [token.id for token in lively.tokens]
    along = divergence_along(decoder, other, whole)[-len(lively.tokens) :]
    assert [token.kl for token in lively.tokens] == pytest.approx(along, rel=1e-3)


def test_teacher_forcing_scores_each_next_token(model, decoder, tiny_tokenizer, story) -> None:
    ids = torch.tensor(tiny_tokenizer(story)["input_ids"][:50])
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(teacher_forced(decoder, ids), expected, atol=5e-4, rtol=1e-4)
