"""Finds methods: every module in every family folder is imported, and each concrete `Method` in it is one. There is no list."""

import importlib
import json
import pkgutil
from difflib import get_close_matches
from functools import cache
from inspect import isabstract
from pathlib import Path
from typing import Any

from bitpress.engine.errors import InputError
from bitpress.engine.methods.base import BlockMethod, LinearMethod, Method, ModelMethod
from bitpress.engine.methods.catalogue import CATALOGUE_VERSION, catalogue_path, read_catalogue, sources_digest

FAMILY_PACKAGE = "bitpress.engine.methods"


@cache
def all_methods() -> dict[str, Method]:
    """Every method by name, sorted by family and name."""
    modules = [importlib.import_module(name) for name in _module_names()]
    classes = {value for module in modules for value in vars(module).values() if _is_method(value, module.__name__)}
    return {kind.name: kind() for kind in sorted(classes, key=lambda kind: (kind.family, kind.name))}


def _module_names() -> list[str]:
    root = Path(__file__).parent
    families = [folder for folder in sorted(root.iterdir()) if (folder / "__init__.py").exists()]
    return [f"{FAMILY_PACKAGE}.{folder.name}.{found.name}" for folder in families for found in pkgutil.iter_modules([str(folder)])]


def _is_method(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and not isabstract(value) and value.__module__ == module


def get(name: str) -> Method:
    """The method of that name. Raises InputError with a near name."""
    found = all_methods()
    if name in found:
        return found[name]
    near = get_close_matches(name, found, 1)
    why = f"Did you mean '{near[0]}'?" if near else f"Methods are {', '.join(found)}."
    raise InputError(f"There is no method '{name}'.", why, "`bitpress methods` lists them.")


def linear(name: str) -> LinearMethod:
    """The method of that name, which must be one that acts on single matrices. Raises InputError otherwise."""
    method = get(name)
    if not isinstance(method, LinearMethod):
        raise InputError(f"The method {name} does not act on single matrices.", f"It acts on a {method.acts_on}.", "Choose another method.")
    return method


def on_weights(name: str) -> LinearMethod | BlockMethod | ModelMethod:
    """The method of that name, which must be one that makes weight matrices. Raises InputError otherwise."""
    method = get(name)
    return method if isinstance(method, BlockMethod | ModelMethod) else linear(name)


def catalogue() -> dict[str, Any]:
    """The description of every method, as `catalogue.json` holds it."""
    return {"v": CATALOGUE_VERSION, "digest": sources_digest(), "methods": [method.describe() for method in all_methods().values()]}


def write_catalogue() -> dict[str, Any]:
    """Write the catalogue under the home folder unless it is there already; returns it."""
    found = read_catalogue()
    if found is not None:
        return found
    described, path = catalogue(), catalogue_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(described, indent=1), encoding="utf8")
    partial.replace(path)
    return described
