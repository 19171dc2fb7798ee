"""What a page does, as a command line and as Python. Knows text only."""

import streamlit as st


def show_commands(command: str, python: str) -> None:
    """The folded expander with both; they can be copied."""
    with st.expander("Show the equivalent command and Python"):
        left, right = st.columns(2)
        with left:
            st.caption("Command line")
            st.code(command, language=None, wrap_lines=True)
        with right:
            st.caption("Python")
            st.code(python, language=None, wrap_lines=True)
