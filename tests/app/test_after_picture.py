"""Before and after of one layer: what is read, drawn and told."""

import json
from pathlib import Path

from bitpress.app.ui.after_picture import group_alt, group_figure, group_table, histogram_alt, histogram_figure, histogram_table, read_after

RECORD = {
    "v": 1, "layer": "a", "edges": [-1.0, 0.0, 1.0, 2.0], "before": [3, 4, 1], "after": [4, 0, 4], "row": 2, "first": 16, "levels": [-0.5, 0.5],
    "group_before": [-0.4, 0.7], "group_after": [-0.5, 0.5],
}  # fmt: skip


def test_a_record_is_read_and_anything_else_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, text in (("a", json.dumps(RECORD)), ("newer", json.dumps({**RECORD, "v": 2})), ("torn", '{"v": 1,')):
        (folder / f"{name}.json").write_text(text)
    assert read_after(tmp_path, "a") == RECORD
    assert [read_after(tmp_path, name) for name in ("newer", "torn", "absent")] == [None, None, None]


def test_charts_and_their_tables_say_the_same() -> None:
    bars, outline = histogram_figure(RECORD).data
    assert list(bars.y) == histogram_table(RECORD)["weights before"] and list(outline.y) == [4, None, 4]
    before, after = group_figure(RECORD).data
    assert list(before.y) == group_table(RECORD)["before"] and list(after.y) == group_table(RECORD)["after"]
    assert group_table(RECORD)["input"] == [16, 17]
    assert len(group_figure(RECORD).layout.shapes) == 2, "a line a level"


def test_they_are_told_in_words() -> None:
    assert histogram_alt(RECORD) == "Histogram of all weights: 3 of 3 bins are filled before, 2 after."
    assert group_alt(RECORD) == "2 weights of one group on 2 levels from \u22120.500 to 0.500."
