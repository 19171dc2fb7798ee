"""What the cards say and how they say they know it."""

from bitpress.app.ui.metric_cards import BADGES, Known, quality_card, size_card, speed_card
from bitpress.app.ui.numbers import TIMES

DENSE = {"perplexity": 20.7, "decode_tokens_per_s": 40.0}
NOW = {"perplexity": 27.1, "perplexity_ratio": 1.309, "perplexity_ratio_low": 1.28, "perplexity_ratio_high": 1.34, "kl_mean": 0.25, "same_top1": 0.78,
       "decode_tokens_per_s": 100.0, "ttft_s": 0.21, "kernels": {"int4 pack": 210}}  # fmt: skip


def test_quality_says_change_interval_and_divergence() -> None:
    card = quality_card(Known("measured", DENSE, NOW))
    assert (card.value, card.delta) == ("27.1", "+30.9\u2009% perplexity")
    assert card.lines == ("perplexity, from 20.7 dense", "95\u2009%: +28.0\u2009% to +34.0\u2009%", "KL 0.250 nat · same top-1 78.0\u2009%")


def test_a_change_inside_its_interval_is_no_change() -> None:
    card = quality_card(Known("measured", DENSE, {**NOW, "perplexity_ratio_low": 0.99, "perplexity_ratio_high": 1.02}))
    assert "not distinguishable from dense" in card.lines


def test_a_destroyed_model_has_a_card_too() -> None:
    card = quality_card(Known("measured", DENSE, {"not_finite": ["perplexity"], "nll_mean": 912.0}))
    assert card.value == "∞"
    assert "912" in card.lines[0]


def test_what_was_not_measured_is_not_made_up() -> None:
    assert quality_card(Known("measured", DENSE, {})).value is None
    assert speed_card(Known("measured", DENSE, {"perplexity": 3.0})).value is None


def test_speed_names_ratio_kernels_and_noise() -> None:
    card = speed_card(Known("measured", DENSE, NOW))
    assert (card.value, card.delta, card.badge) == ("100", f"2.50{TIMES} the speed of dense", "measured")
    assert "210 layers on int4 pack" in card.help
    noisy = speed_card(Known("measured", DENSE, {**NOW, "protocol": {"latency": {"noisy": ["other processes used 1.7 of 2 cores"], "threads": 2}}}))
    assert noisy.badge == "noisy"
    assert "other processes" in noisy.help


def test_size_counts_both_bits_per_weight() -> None:
    card = size_card(269_030_016, 85_800_000, 4.32, 5.10, "predicted (exact)")
    assert (card.value, card.delta) == ("85.8\u2009MB", f"3.14{TIMES} smaller")
    assert card.lines == ("from 269\u2009MB dense", "4.32 bits a linear weight, 5.10 overall")


def test_every_badge_is_a_word_and_a_shape() -> None:
    assert all(":material/" in badge and badge.rstrip("]").split()[-1].isalpha() for badge in BADGES.values())
