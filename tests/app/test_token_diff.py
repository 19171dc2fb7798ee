"""Alignment of generations, what the panes get and say, the table twin; and in a browser that a model's output stays text."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from bitpress.app.ui import token_diff
from bitpress.app.ui.alignment import FIRST, OTHER, SAME, align
from bitpress.app.ui.token_diff import Side, alignments, kl_place, table, verdict

IDS = st.lists(st.integers(0, 6), max_size=40)
NASTY = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


def tokens(*texts: str, kl: float | None = None) -> list[dict]:
    return [{"id": hash(text), "text": text, "logprob": -0.5, "rank": 0, "top": [[text, 0.6], [" x", 0.1]], "kl": kl} for text in texts]


def test_equal_sequences_have_no_divergence() -> None:
    found = align([1, 2, 3], [1, 2, 3])
    assert found.first is None
    assert found.left == found.right == (SAME,) * 3


def test_first_divergence_is_marked_once_on_each_side_and_common_runs_after_it_agree() -> None:
    found = align([1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 7])
    assert found.first == 2
    assert found.left == (SAME, SAME, FIRST, SAME, SAME, OTHER)
    assert found.right == (SAME, SAME, FIRST, SAME, SAME, OTHER)
    assert found.agreeing == 4


def test_before_the_divergence_position_decides_even_where_a_shift_would_match_more() -> None:
    found = align([1, 1, 2, 3], [1, 2, 3, 4])
    assert found.first == 1
    assert found.right[1] == FIRST


def test_a_side_that_is_only_longer_differs_once_both_have_ended() -> None:
    assert align([1, 2], [1, 2, 3], ended=False).first is None
    ended = align([1, 2], [1, 2, 3])
    assert ended.first == 2
    assert (ended.left, ended.right) == ((SAME, SAME), (SAME, SAME, FIRST))


@given(IDS, IDS)
def test_alignment_marks_every_token_and_is_right_about_the_first_difference(left: list[int], right: list[int]) -> None:
    found = align(left, right)
    assert (len(found.left), len(found.right)) == (len(left), len(right))
    if found.first is None:
        assert left == right
    else:
        assert left[: found.first] == right[: found.first]
        assert left[found.first : found.first + 1] != right[found.first : found.first + 1]
    equal_left = [token for token, mark in zip(left, found.left, strict=True) if mark == SAME]
    equal_right = [token for token, mark in zip(right, found.right, strict=True) if mark == SAME]
    assert abs(len(equal_left) - len(equal_right)) <= 1  # the mark of the first divergence may stand on one of a pair


@pytest.mark.parametrize(("kl", "place"), [(None, 0.0), (0.0, 0.0), (1e-3, 0.0), (0.1, 0.5), (10.0, 1.0), (1e9, 1.0)])
def test_tint_is_logarithmic_and_stays_in_its_range(kl: float | None, place: float) -> None:
    assert kl_place(kl) == pytest.approx(place, abs=0.01)


def test_tokens_without_ids_are_compared_by_text() -> None:
    sides = [Side("Dense", [{"text": "a"}, {"text": "b"}]), Side("4 bit", [{"text": "a"}, {"text": "c"}])]
    assert alignments(sides)[0].first == 1


def test_table_has_both_sides_the_marks_and_visible_white_space() -> None:
    sides = [Side("Dense", tokens("Once", " upon\n")), Side("4 bit", tokens("Once", " a", "\tb", kl=0.2))]
    found = table(sides, alignments(sides))
    assert found["position"] == [1, 2, 3]
    assert found["Dense"] == ["Once", "␣upon↵", ""]
    assert found["4 bit"] == ["Once", "␣a", "⇥b"]
    assert found["4 bit: compared"] == ["same", "first divergence", "different"]
    assert found["4 bit: KL, nat"] == [0.2, 0.2, 0.2]
    assert found["4 bit: rank"] == [1, 1, 1]
    assert "Dense: KL, nat" not in found


def test_table_of_two_columns_with_one_title_keeps_both() -> None:
    sides = [Side("4 bit", tokens("a")), Side("4 bit", tokens("b"))]
    assert {"4 bit (1)", "4 bit (2)"} <= table(sides, alignments(sides)).keys()


def test_verdict_says_where_the_sides_part() -> None:
    sides = [Side("Dense", tokens("a", "b", "c")), Side("4 bit", tokens("a", "x", "c"))]
    assert verdict(sides, alignments(sides)) == "4 bit: parts at token 2, 2 of 3 tokens agree"
    writing = [Side("Dense", tokens("a", "b"), writing=True), Side("4 bit", tokens("a"), writing=True)]
    assert verdict(writing, alignments(writing)) == "4 bit: same so far"


def test_draws_in_the_app_with_a_table_twin() -> None:
    def page() -> None:
        from bitpress.app.ui.token_diff import token_diff

        token_diff([{"id": 1, "text": "a"}], [{"id": 2, "text": "<b>"}], "d", titles=("Dense", "4 bit"))

    app = AppTest.from_function(page, default_timeout=30).run()
    assert not app.exception
    assert list(app.dataframe[0].value["4 bit"]) == ["<b>"]


# --- in a browser -------------------------------------------------------------------------------------------------

PAGE = f"""
import streamlit as st
from bitpress.app.ui.token_diff import token_diff
left = [dict(id=i, text=t, logprob=-0.5, rank=0, top=[[t, 0.6]], kl=None) for i, t in enumerate(["Once", " upon", " a  time\\n", {NASTY!r}])]
right = [dict(token, id=token["id"] + (10 if token["id"] > 1 else 0), kl=0.5) for token in left]
token_diff(left, right, "d", titles=({NASTY!r}, "4 bit"))
"""


@pytest.fixture
def page_url(tmp_path: Path) -> Iterator[str]:
    """A server with one page that shows two generations, one of them nasty."""
    (tmp_path / "page.py").write_text(PAGE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--server.headless=true", f"--server.port={port}", "--server.fileWatcherType=none", "--browser.gatherUsageStats=false"]
    server = subprocess.Popen([sys.executable, "-m", "streamlit", "run", "page.py", *flags], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(timeout=20)


@pytest.mark.browser
def test_a_models_output_is_written_as_text_and_the_pointer_shows_the_token(page_url: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        for _ in range(60):
            try:
                page.goto(page_url)
                break
            except Exception:
                page.wait_for_timeout(500)
        panes = page.locator(".token-diff .pane .text")
        panes.nth(1).wait_for(timeout=60_000)
        assert NASTY in panes.nth(0).inner_text()
        assert page.evaluate("window.broken") is None
        assert page.locator(".token-diff script, .token-diff img").count() == 0
        assert page.locator(".token-diff .flag").count() == 2
        page.locator(".token-diff .pane").nth(1).locator(".token").nth(1).hover()
        shown = page.locator(".token-diff .card").nth(1).inner_text()
        assert "␣upon" in shown and "60.7" in shown and "rank 1" in shown and "KL 0.5" in shown
        panes.nth(0).focus()
        page.keyboard.press("End")
        assert "token 4" in page.locator(".token-diff .card").nth(0).inner_text()
        browser.close()


def test_component_never_writes_markup() -> None:
    """The script must not use any way of writing text that parses it as markup."""
    script = Path(token_diff.__file__).with_name("token_diff.js").read_text(encoding="utf8")
    assert not [way for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write") if way in script]
