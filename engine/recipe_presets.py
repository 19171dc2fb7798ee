"""The recipes that come with Bitpress: `presets/recipes/*.yaml`, which a person may edit. Knows files and recipes; no torch.

A preset's first comment lines are `# title: ...` and `# description: ...`; its model is `any`.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitpress.engine.errors import InputError
from bitpress.engine.home import presets_dir
from bitpress.engine.recipe import Recipe

ORDER = (
    "uniform-8bit", "uniform-4bit", "uniform-3bit", "uniform-2bit", "gptq-4bit", "gptq-3bit", "nf4", "smooth-8bit", "binary-3bit", "trained-2bit",
    "protect-ends", "attention-light", "sparse-50", "sparse-2-4", "half-the-layers",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A recipe with words for people; `id` is the file's name."""

    id: str
    title: str
    description: str
    recipe: Recipe


def list_presets() -> list[Preset]:
    """Every preset, the well-known ones first, then a person's own by name. Raises InputError for a file that cannot be used."""
    found = [read_preset(path) for path in (presets_dir() / "recipes").glob("*.yaml")]
    return sorted(found, key=lambda preset: (ORDER.index(preset.id) if preset.id in ORDER else len(ORDER), preset.id))


def read_preset(path: Path) -> Preset:
    """One preset file. Raises InputError when it cannot be used; a file without words is named after itself."""
    return _read(path, path.stat().st_mtime_ns)


@cache
def _read(path: Path, changed: int) -> Preset:
    """`changed` is the file's time, so that an edited file is read anew."""
    recipe = Recipe.from_yaml(path)
    words = dict(re.findall(r"^# (title|description): *(.+)$", path.read_text(encoding="utf8"), re.MULTILINE))
    return Preset(path.stem, words.get("title", path.stem), words.get("description", ""), recipe)


def find_preset(preset_id: str) -> Preset:
    """The preset of that id. Raises InputError with the ids there are."""
    for preset in list_presets():
        if preset.id == preset_id:
            return preset
    raise InputError(f"There is no preset '{preset_id}'.", "", f"Presets are {', '.join(preset.id for preset in list_presets())}.")


def for_model(preset: Preset, model_id: str) -> Recipe:
    """The preset's recipe with this model's id in place of `any`."""
    return preset.recipe.model_copy(update={"model": model_id})
