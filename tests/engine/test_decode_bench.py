"""The decode table: every side is there, timed on the same prompt, and transformers' own loop tells each token once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitpress.engine import decode_bench
from bitpress.engine.decode_bench import DENSE, TRANSFORMERS, TransformersGenerate, decode_table
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
