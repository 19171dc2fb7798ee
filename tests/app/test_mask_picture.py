"""The picture of a layer's zeros: read from a run's file, drawn in four panels, quiet where there is none."""

import json
from pathlib import Path

from streamlit.testing.v1 import AppTest

from bitpress.app.ui.mask_picture import alt_text, grids, read_mask

RECORD = {
    "v": 1, "layer": "model.layers.0.mlp.up_proj", "shape": [4, 8], "zeros": 0.5, "before": [[1.0, 2.0]], "after": [[0.5, 1.0]], "share": [[0.5, 0.5]],
    "corner": ["0101", "1010"],
}  # fmt: skip


def test_a_record_is_read_and_told(tmp_path: Path) -> None:
    assert read_mask(tmp_path, "model.layers.0.mlp.up_proj") is None
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks" / "model.layers.0.mlp.up_proj.json"
    path.write_text("{")
    assert read_mask(tmp_path, "model.layers.0.mlp.up_proj") is None
    path.write_text(json.dumps(RECORD))
    record = read_mask(tmp_path, "model.layers.0.mlp.up_proj")
    assert record == RECORD
    assert grids(record)["corner"] == [[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]
    assert alt_text(record) == "50.0% of the 4 by 8 weights of model.layers.0.mlp.up_proj are zero."


def test_it_is_drawn_with_its_words() -> None:
    def page(record: dict) -> None:
        from bitpress.app.ui.mask_picture import mask_picture

        mask_picture(record)

    app = AppTest.from_function(page, kwargs={"record": RECORD}, default_timeout=60).run()
    assert not app.exception
    assert "50.0% of the 4 by 8 weights" in app.markdown[0].value
    assert len(app.get("plotly_chart")) == 4
