"""The picture of how alike tokens are, on a run's view: figure, words and table hold the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app.ui.similarity_view import similarity_figure, similarity_table
from bitpress.engine.recipe_presets import find_preset, for_model
from bitpress.engine.runs.store import Run
from bitpress.engine.similarity_file import FILE, read_similarity

FOUND = {
    "embedding": {"dense": {"mean": 0.2, "share": [0.0, 0.1, 0.8, 0.1]}, "compressed": {"mean": 0.106, "share": [0.0, 0.2, 0.8, 0.0]}},
    "last state": {"dense": {"mean": 0.08, "share": [0.0, 0.5, 0.5, 0.0]}, "compressed": {"mean": 0.38, "share": [0.0, 0.2, 0.5, 0.3]}},
}


def test_figure_and_table_hold_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(FOUND))
    sides = read_similarity(tmp_path)["last state"]
    lines = {line.name: list(line.y) for line in similarity_figure(sides).data}
    table = similarity_table(sides)
    assert lines == {side: list(table[side]) for side in ("dense", "compressed")}
    assert table["cosine"] == [-0.75, -0.25, 0.25, 0.75]
    assert len({line.line.dash for line in similarity_figure(sides).data}) == 2, "colour is not the only signal"


@pytest.mark.parametrize("written", [True, False])
def test_the_run_view_shows_it_or_says_when_it_comes(app_root: Path, make_run: Callable[..., Run], written: bool) -> None:
    run = make_run(for_model(find_preset("uniform-4bit"), "tiny-stories"))
    if written:
        (run.path / FILE).write_text(json.dumps(FOUND))
    app = AppTest.from_file(str(app_root / "pages" / "runs.py"), default_timeout=60)
    app.query_params["run"] = run.id
    app.run()
    assert not app.exception
    said = " ".join(element.value for kind in (app.markdown, app.caption) for element in kind)
    assert ("mean cosine 0.0800 dense, 0.380 compressed" in said) == written
    assert ("Written at the end of a run" in said) != written
