"""How trouble and emptiness look: what, why, remedy; never a traceback. Knows errors and the tab's last refusal, no page."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import streamlit as st
from streamlit.runtime.pages_manager import PagesManager

from bitpress.app import state
from bitpress.engine.errors import BitpressError, InputError

logger = logging.getLogger("bitpress.app")


def error_markdown(what: str, why: str = "", remedy: str = "") -> str:
    """The three parts of a refusal as one short paragraph each."""
    return "\n\n".join(part for part in (f"**{plain(what)}**", plain(why), plain(remedy)) if part.strip("*"))


def plain(text: str) -> str:
    """Text for markdown in which nothing is taken for markup: names of files and layers keep their stars and underscores."""
    return "".join("\\" + sign if sign in "\\`*_{}[]<>#$|~:" else sign for sign in text)


def show_error(error: BitpressError) -> None:
    """A refusal or failure in its three parts."""
    st.error(error_markdown(error.what, error.why, error.remedy), icon=":material/error:")


def tell_notice() -> None:
    """What the last action in this tab was refused for; shown until the next one."""
    if (notice := state.session().notice) is not None:
        show_error(notice)


def refusing(key: str, action: Callable[[], None]) -> Callable[[], None]:
    """A callback that keeps a refusal of the action under `key`, for the form it was asked from to show in place; empty after a success."""

    def act() -> None:
        try:
            action()
            st.session_state[key] = ""
        except InputError as error:
            st.session_state[key] = error_markdown(error.what, error.why, error.remedy)

    return act


def empty(text: str, icon: str = ":material/info:") -> None:
    """One quiet sentence where there is nothing yet, saying what to do."""
    st.info(text, icon=icon)


def enter_frame() -> None:
    """Run the page again inside `main.py` when Streamlit started it alone.

    A folder called pages beside the entry file makes Streamlit take a deep link that comes before any other visit for one of
    its older kind of app, in which pages run without the entry file; `st.navigation` settles that, but only once it has run.
    """
    if PagesManager.uses_pages_directory:
        PagesManager.uses_pages_directory = False
        st.rerun()


@contextmanager
def guarded() -> Iterator[None]:
    """Wrap the body of a page: a BitpressError is shown in its parts, anything else in one sentence, with the details in the server's log.

    Streamlit steers reruns with exceptions of its own; they pass.
    """
    enter_frame()
    try:
        yield
    except BitpressError as error:
        show_error(error)
    except Exception as error:
        if type(error).__module__.startswith("streamlit"):
            raise
        logger.exception("A page could not be drawn")
        show_error(
            BitpressError("This part of the page could not be drawn.", f"{type(error).__name__}: {error}", "Reload the page; the server's log has the details.")
        )
