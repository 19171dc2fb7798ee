"""The decode table: every side is there, timed on the same prompt, and transformers' own loop tells each token once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine import decode_bench
from bitpress.engine.decode_batch import BatchDecoder
from bitpress.engine.decode_bench import DENSE, TRANSFORMERS, BatchTeller, TransformersGenerate, decode_table
from bitpress.engine.measure.latency import Plan


def test_transformers_tells_every_new_token_and_no_end_token_stops_it(tiny_models: Callable[..., Any]) -> None:
    model = tiny_models("llama")
    prompt_T = torch.arange(2, 12)
    first = int(model(prompt_T[None]).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first  # without a lower bound the text would end at once
    told: list[int] = []
    TransformersGenerate(model).tell(prompt_T, 7, lambda: told.append(1))
    assert len(told) == 7


def test_every_side_is_timed_on_the_same_prompt(bitpress_home: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(decode_bench, "Plan", lambda **_: Plan(prompt=8, new=4, warm_up=0, rounds=1))
    rows = {row["side"]: row for row in decode_table("tiny-stories", quick=True, widths=(4,))["rows"]}
    assert set(rows) == {DENSE, TRANSFORMERS, "4-bit"}
    assert {(row["conditions"]["prompt"], row["conditions"]["new"]) for row in rows.values()} == {(8, 4)}
    assert rows["4-bit"]["bytes"] < rows[DENSE]["bytes"] == rows[TRANSFORMERS]["bytes"]
    assert rows[DENSE]["times_dense"] == 1.0
    assert rows[TRANSFORMERS]["conditions"]["loop"] == "transformers.generate"
    assert all(row["decode_tokens_per_s"] > 0 and None not in row.values() for row in rows.values()), "no column without figures"


def test_a_batch_counts_the_tokens_of_every_row(bitpress_home: Path) -> None:
    plan = Plan(prompt=8, new=4, warm_up=0, rounds=1)
    rows = {row["side"]: row for row in decode_table("tiny-stories", quick=True, widths=(4,), plan=plan, batch=3)["rows"]}
    assert set(rows) == {DENSE, TRANSFORMERS, "4-bit"}
    assert all(row["conditions"]["batch"] == 3 and row["conditions"]["new"] == 4 for row in rows.values())
    assert rows[DENSE]["conditions"]["loop"] == rows["4-bit"]["conditions"]["loop"] == "own, static cache, a batch"
    for row in rows.values():  # one round of three steps: the rate is theirs, three tokens a step
        assert 3 / row["tpot_p95_s"] <= row["decode_tokens_per_s"] * 1.001
        assert row["prefill_tokens_per_s"] == pytest.approx(3 * 8 / row["ttft_s"])


def test_batch_and_transformers_write_the_same_tokens_in_every_row(tiny_models: Callable[..., Any]) -> None:
    model, told = tiny_models("llama"), []
    batch = BatchDecoder(model, 3, dtype=torch.float32)
    BatchTeller(batch).tell(torch.arange(2, 12), 5, lambda: told.append(1))
    assert len(told) == 5 and batch.lengths == [14, 14, 14]
    TransformersGenerate(model, 3).tell(torch.arange(2, 12), 5, lambda: told.append(1))
    assert len(told) == 10
