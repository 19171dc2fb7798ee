"""The same work as a command and as Python, for whoever wants to leave the screen. Knows recipes; runs nothing."""

import streamlit as st

from bitpress.engine.recipe import Recipe


def file_name(recipe: Recipe) -> str:
    """A name for the recipe's file that tells recipes apart."""
    return f"recipe-{recipe.digest()[:8]}.yaml"


def command(recipe: Recipe) -> str:
    """The shell command that does what Compress does."""
    return f"bitpress compress {file_name(recipe)} --json"


def python(recipe: Recipe) -> str:
    """The Python that puts the same run in the queue."""
    return (
        "from bitpress.engine.recipe import Recipe\nfrom bitpress.engine.runs import jobs\n\n"
        f'recipe = Recipe.from_yaml("{file_name(recipe)}")\nrun = jobs.submit("compress", {{"model": recipe.model}}, recipe)\nprint(run.id, run.status().state)'
    )


def equivalent(recipe: Recipe) -> None:
    """The folded expander with recipe, command and Python."""
    folded = st.expander("Show the equivalent command and Python", key="equivalent", on_change="rerun")
    if not folded.open:
        return
    with folded:
        left, right = st.columns(2)
        with left:
            st.caption(file_name(recipe))
            st.code(recipe.to_yaml(), language=None, height=260)
        with right:
            st.caption("Command line")
            st.code(command(recipe), language="bash")
            st.caption("Python")
            st.code(python(recipe), language="python")
