"""Cache forms on screen: exact bytes at any length, measured times and perplexity where there are any, and the button that asks for them."""

import json
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app.ui.cache_view import WITHOUT_GQA, bytes_of, rows_at, times_figure, times_table
from bitpress.engine.accounting import cache_bytes
from bitpress.engine.cache_forms import BOTH, CODED, DENSE, LATENT, SPLIT, forms
from bitpress.engine.kv_ranks import keep_losses
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.runs import jobs
from bitpress.engine.runs.status import change_status
from bitpress.engine.runs.store import Store


def form(ratio: float, *times: float) -> dict[str, Any]:
    return {"ratio": ratio, "steps": {str(length): {"ms": ms, "p10_ms": ms, "bytes": 1} for length, ms in zip((128, 256), times, strict=True)}}


FOUND = {"forms": {DENSE: form(1.0, 2.0, 3.0), LATENT: form(1.5, 2.5, 3.5), CODED: form(1.01, 1.9, 2.0), BOTH: form(1.6, 2.4, 3.0),
                   SPLIT: form(1.03, 1.8, 2.1)}, "noise": [],
         "windows": [8, 256]}  # fmt: skip


def test_every_form_fits_the_model_and_has_its_bytes(anatomy: Anatomy) -> None:
    plans = forms(anatomy)
    assert all(plan.validate_for(anatomy) == [] for plan in plans.values())
    sizes = bytes_of(anatomy, 256)
    assert sizes[DENSE] == cache_bytes(None, anatomy, 256) and sizes[BOTH] < sizes[CODED] < sizes[LATENT] < sizes[DENSE]
    assert (WITHOUT_GQA in sizes) == (anatomy.heads > anatomy.kv_heads)


def test_values_beside_coded_keys_are_there_once_it_is_known_what_ranks_lose(anatomy: Anatomy, tmp_path: Path) -> None:
    assert SPLIT not in forms(anatomy, tmp_path)
    block = [(1 - rank / anatomy.head_dim) ** 2 for rank in range(anatomy.head_dim + 1)]
    keep_losses(tmp_path, [block] * anatomy.blocks)
    plan = forms(anatomy, tmp_path)[SPLIT]
    assert plan.validate_for(anatomy) == [] and plan.stages[0].method == "mixed-values"
    assert 0.5 < cache_bytes(plan, anatomy, 256) / cache_bytes(None, anatomy, 256) < 0.65
    keep_losses(tmp_path, [block[:-1]] * anatomy.blocks)
    assert SPLIT not in forms(anatomy, tmp_path), "of another model"


def test_rows_figure_and_table_hold_the_same_numbers(anatomy: Anatomy) -> None:
    sizes = bytes_of(anatomy, 250)
    rows = rows_at(sizes, FOUND, 250)
    at = list(rows["cache"]).index(CODED)
    assert rows["ms a token"][at] == 2.0 and rows["measured at"][at] == "256 tokens" and rows["perplexity"][at].startswith("+1")
    bare = rows_at(sizes, None, 250)
    assert set(bare["perplexity"]) == {"not measured"} and set(bare["ms a token"]) == {None}
    lines = {line.name: list(line.y) for line in times_figure(FOUND).data}
    table = times_table(FOUND)
    assert lines == {name: list(table[name]) for name in lines} and table["tokens"] == [128, 256]
    assert len({(line.line.dash, line.marker.symbol) for line in times_figure(FOUND).data}) == 5


def test_the_page_asks_for_them_and_shows_them(app_home: Path, app_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "pump", lambda home=None: None)
    app = AppTest.from_file(app_root / "pages" / "explore.py", default_timeout=60).run()
    app.session_state["cache"] = True  # unfolded
    app.run()
    app.button(key="cache-measure").click().run()
    assert not app.exception
    (status,) = Store().list(kind="caches")
    run = Store().get(status.id)
    (run.path / "result.json").write_text(json.dumps(FOUND))
    change_status(run.path, lambda _: {"state": "finished"})
    app.run()
    assert not app.exception and "Time of a decode step behind 128 to 256 tokens" in " ".join(item.value for item in app.caption)
