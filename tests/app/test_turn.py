"""Going from one page to another."""

import pytest
import streamlit as st

from bitpress.app.ui.turn import turn_to


@pytest.mark.parametrize("link", [{}, {"tags": "sweep"}])
def test_what_the_next_link_holds_is_always_told(monkeypatch: pytest.MonkeyPatch, link: dict[str, str]) -> None:
    """Without being told, Streamlit raises where a control of this page is bound to the link."""
    told = []
    monkeypatch.setattr(st, "switch_page", lambda page, query_params=None: told.append((page, query_params)))
    turn_to("explore", **link)
    assert told == [("pages/explore.py", link)]
