"""Windows of token ids: what they hold, where BOS stands, and the count that everyone agrees on."""

import hashlib

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from bitpress.engine.data import tokens
from bitpress.engine.data.texts import TextSample, load_text
from bitpress.engine.data.tokens import calibration_ids, ids_digest, token_ids, token_windows, tokenizer_digest
from bitpress.engine.errors import InputError
from bitpress.engine.model.load import load_tokenizer


def sample(text, part="evaluation"):
    return TextSample(text=text, sha256=hashlib.sha256(text.encode()).hexdigest(), source="test", id="test", part=part, licence="none", join="as the file")


@pytest.fixture(autouse=True)
def home(bitpress_home):
    return bitpress_home


def test_windows_are_the_text_in_order_without_its_tail(tiny_tokenizer, story):
    ids = tiny_tokenizer(story * 3).input_ids
    windows = token_windows(tiny_tokenizer, sample(story * 3), 50)
    assert windows.shape == (len(ids) // 50, 50)
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == ids[: len(ids) // 50 * 50]
    assert torch.equal(token_windows(tiny_tokenizer, sample(story * 3), 50, count=2), windows[:2])


def test_with_needs_bos_every_window_begins_with_it(tiny_tokenizer, story):
    windows = token_windows(tiny_tokenizer, sample(story), 40, needs_bos=True)
    assert set(windows[:, 0].tolist()) == {tiny_tokenizer.bos_token_id}
    assert windows[:, 1:].flatten().tolist() == tiny_tokenizer(story).input_ids[: len(windows) * 39]


def test_a_tokenizers_own_bos_stands_once_at_the_start(tiny_llama_dir, story):
    tokenizer = load_tokenizer(tiny_llama_dir)
    plain = token_windows(tokenizer, sample(story), 40)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    windows = token_windows(tokenizer, sample(story), 40)
    assert windows[0, 0] == 0
    assert (windows == 0).sum() == 1
    assert torch.equal(windows.flatten()[1:40], plain.flatten()[:39])
    every = token_windows(tokenizer, sample(story), 40, needs_bos=True)
    assert (every == 0).sum() == len(every)


def test_tokens_are_kept_by_text_and_tokenizer(tiny_tokenizer, story, monkeypatch, home):
    first = token_ids(tiny_tokenizer, sample(story))
    kept = list((home / "text" / "tokens").iterdir())
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write", lambda path, ids: pytest.fail("it was tokenised again"))
        assert torch.equal(token_ids(tiny_tokenizer, sample(story)), first)
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    assert torch.equal(token_ids(tiny_tokenizer, sample(story)), first)
    token_ids(tiny_tokenizer, sample(story + "More."))
    assert len(list((home / "text" / "tokens").iterdir())) == 2


def test_a_text_shorter_than_a_window_is_refused(tiny_tokenizer):
    with pytest.raises(InputError, match="too short"):
        token_windows(tiny_tokenizer, sample("Once"), 50)


def test_calibration_draws_different_windows_by_seed(tiny_tokenizer, story):
    text = sample(" ".join(f"{number} {story}" for number in range(20)), "calibration")
    every = {tuple(window) for window in token_windows(tiny_tokenizer, text, 30).tolist()}
    drawn = calibration_ids(tiny_tokenizer, text, 12, 30)
    assert drawn.shape == (12, 30)
    assert len({tuple(window) for window in drawn.tolist()} & every) == 12
    assert torch.equal(drawn, calibration_ids(tiny_tokenizer, text, 12, 30))
    assert not torch.equal(drawn, calibration_ids(tiny_tokenizer, text, 12, 30, seed=1))
    assert len(calibration_ids(tiny_tokenizer, text, 10_000, 30)) == len(token_windows(tiny_tokenizer, text, 30))


def test_an_evaluation_part_is_never_calibrated_on(tiny_tokenizer, story):
    with pytest.raises(InputError, match="cannot be calibrated on"):
        calibration_ids(tiny_tokenizer, sample(story), 2, 30)


def test_digests_see_every_id_and_the_shape(tiny_tokenizer):
    ids = torch.arange(12).view(3, 4)
    assert ids_digest(ids) == ids_digest(ids.clone().to(torch.int32))
    assert len({ids_digest(ids), ids_digest(ids.view(4, 3)), ids_digest(ids + 1)}) == 3
    assert tokenizer_digest(tiny_tokenizer) == tokenizer_digest(tiny_tokenizer)


def test_smollm2_cuts_the_default_file_into_303415_tokens_and_the_papers_join_into_304986(smollm2_dir, monkeypatch, test_data):
    monkeypatch.setenv("BITPRESS_TEST_DATA", str(test_data))
    tokenizer = load_tokenizer(smollm2_dir)
    assert len(token_ids(tokenizer, load_text("wikitext2-raw/test"))) == 303_415
    assert len(token_ids(tokenizer, load_text("wikitext2-papers/test"))) == 304_986
