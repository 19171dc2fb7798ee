"""A tiny Llama in an empty home, with a text of its own, and recipes for it: what real workers need to run in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine.recipe import Recipe


@pytest.fixture
def tiny_home(bitpress_home: Path, tiny_llama_dir: Path, tmp_path: Path, story: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of the tiny model in this test's home. Workers that are started here use one thread."""
    from bitpress.engine.model import library

    monkeypatch.setenv("BITPRESS_ROOTS", f"{tiny_llama_dir.parent}:{tmp_path}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sentences = story.split(". ")
    passages = [". ".join(sentences[(start + step) % len(sentences)] for step in range(6)) for start in range(len(sentences) * 6)]
    (tmp_path / "stories.txt").write_text("\n\n".join(f"{index}. {passage}." for index, passage in enumerate(passages)))
    return library.add_local(tiny_llama_dir).id


@pytest.fixture
def tiny_recipe(tiny_home: str, tmp_path: Path) -> Callable[..., Recipe]:
    """`tiny_recipe(bits=4)`: every linear at so many bits, measured on the text of `tiny_home`; keywords replace fields."""

    def make(bits: int = 4, **fields: Any) -> Recipe:
        values = {
            "model": tiny_home,
            "schemes": [{"match": "*", "weights": {"bits": bits, "group_size": 32}}],
            "stages": [{"method": "rtn"}],
            "measure": {"tier": "quick", "text": str(tmp_path / "stories.txt"), "latency": False},
        }
        return Recipe.from_dict({**values, **fields})

    return make
