"""A text of one's own: kept under a name that its content decides, refused without a trace, measured on once it is chosen."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app.ui.text_picker import keep_text
from bitpress.engine.data.user_text import stamped
from bitpress.engine.errors import InputError

PASSAGES = "\n\n".join(f"Passage {number} tells of a bear that went to the river and found {number} berries there." for number in range(3000))


def test_an_upload_is_kept_by_its_content(app_home: Path) -> None:
    first, again = keep_text("../../My notes?.TXT", PASSAGES.encode()), keep_text("../../My notes?.TXT", PASSAGES.encode())
    other = keep_text("../../My notes?.TXT", (PASSAGES + " More.").encode())
    assert first == again != other
    assert first.parent == app_home / "uploads"
    assert first.name.startswith("My-notes-")
    assert first.suffix == ".txt"
    assert first.read_text() == PASSAGES


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"", "too short"),
        ("a.jsonl", b'{"words": 1}\n', "no `text`"),
        ("a.parquet", b"not parquet", "parquet"),
        ("a.pdf", PASSAGES.encode(), "pdf"),
    ],
)
def test_an_upload_that_cannot_be_measured_on_is_refused_and_not_kept(app_home: Path, name: str, data: bytes, told: str) -> None:
    with pytest.raises(InputError, match=told):
        keep_text(name, data)
    assert list((app_home / "uploads").iterdir()) == []


def test_uploads_are_readable_whatever_roots_are_set(app_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_ROOTS", "/srv/models")
    assert keep_text("notes.txt", PASSAGES.encode()).exists()


def test_an_edited_file_is_another_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(PASSAGES)
    before = stamped(str(file))
    file.write_text(PASSAGES + " More.")
    assert stamped(str(file)) != before
    assert stamped("wiki") == "wiki"
    assert stamped(str(tmp_path / "gone.txt")) == str(tmp_path / "gone.txt")


def test_a_file_is_chosen_by_its_path_and_a_wrong_one_is_told(app_home: Path, app_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_ROOTS", str(tmp_path))
    file = tmp_path / "mine.txt"
    file.write_text(PASSAGES)
    app = AppTest.from_file(app_root / "pages" / "explore.py", default_timeout=60)
    app.session_state["own-text-box"] = True  # the popover is open
    app.run()
    app.text_input(key="own-text-path").set_value("/etc/hosts.txt").run()
    app.button(key="own-text").click().run()
    assert "may not be read" in app.error[0].value
    app.text_input(key="own-text-path").set_value(str(file)).run()
    app.button(key="own-text").click().run()
    assert not app.error
    assert app.session_state["bitpress-session"].recipe.measure.text == str(file)
    assert "mine.txt" in app.selectbox(key="text").options
