"""Going from one page to another. Knows the pages' files; nothing of what they show."""

from typing import NoReturn

import streamlit as st


def turn_to(page: str, **link: str) -> NoReturn:
    """Open a page, with these parts in its link and no others.

    Told no parts, Streamlit refuses to leave a page whose link holds what a control there is bound to.
    """
    st.switch_page(f"pages/{page}.py", query_params=link)
