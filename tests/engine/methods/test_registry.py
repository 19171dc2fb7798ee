"""Methods are found without a list, described for a process without torch, and kept as a file that knows when it is old."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitpress.engine.errors import InputError
from bitpress.engine.methods import catalogue, registry
from bitpress.engine.methods.ability import Ability
from bitpress.engine.recipe import Scheme, SparsityScheme, WeightScheme


def test_every_module_of_a_family_folder_with_a_method_is_found() -> None:
    folder = Path(registry.__file__).parent
    sources = folder.glob("*/*.py")
    files = {path.stem for path in sources if "    summary = " in path.read_text()}  # the others are steps that methods share
    assert {type(method).__module__.split(".")[-1] for method in registry.all_methods().values()} == files


def test_descriptions_are_complete() -> None:
    for method in registry.all_methods().values():
        entry = method.describe()
        assert entry["summary"].count(".") >= 2, "two sentences"
        assert entry["citation"]
        assert entry["family"] == type(method).__module__.split(".")[-2]
        for field in entry["options"].get("properties", {}).values():
            assert {"title", "description", "default"} <= set(field)
        assert method.parse({}) == method.Options()


def test_get_names_a_near_method() -> None:
    with pytest.raises(InputError, match="mean 'rtn'"):
        registry.get("rnt")
    with pytest.raises(InputError, match=r"Methods are .*magnitude.*rtn"):
        registry.get("zzzz")


@pytest.mark.parametrize("options", [{"clip": True}, {"clip_search": 1}, {"candidates": 0}, {"exponent": "two"}])
def test_wrong_options_are_refused_with_the_field(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        registry.get("rtn").parse(options)


def test_catalogue_is_written_once_and_read_without_torch(bitpress_home: Path) -> None:
    assert catalogue.read_catalogue() is None
    written = registry.write_catalogue()
    assert catalogue.read_catalogue() == written == registry.write_catalogue()
    code = "import sys\nfrom bitpress.engine.methods.catalogue import read_catalogue\nprint(len(read_catalogue()['methods']), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split() == [str(len(registry.all_methods())), "False"]


def test_a_catalogue_of_other_sources_is_out_of_date(bitpress_home: Path) -> None:
    registry.write_catalogue()
    path = catalogue.catalogue_path()
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "0" * 16}))
    assert catalogue.read_catalogue() is None
    path.write_text("{")
    assert catalogue.read_catalogue() is None
    assert registry.write_catalogue() == catalogue.read_catalogue()


def test_abilities() -> None:
    rounding, zeros = Ability(part="weights", bits=(4,)), Ability(part="sparsity", patterns=("2:4",))
    both = Scheme(weights=WeightScheme(bits=4), sparsity=SparsityScheme(ratio=0.5, pattern="2:4"))
    assert rounding.satisfies(both)
    assert zeros.satisfies(both)
    assert not rounding.satisfies(Scheme(weights=WeightScheme(bits=3)))
    assert not zeros.satisfies(Scheme(sparsity=SparsityScheme(ratio=0.5)))
    assert not zeros.satisfies(Scheme(sparsity=SparsityScheme(ratio=0.0, pattern="2:4")))
