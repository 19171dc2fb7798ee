"""Rivals answer in a process of their own; one that is absent or silent is skipped with the reason, never given a figure."""

import sys
from pathlib import Path

import pytest

from bitpress.engine import rivals
from bitpress.engine.decode_bench import with_rival
from bitpress.engine.errors import InputError

SAME = {"batch": 1, "prompt": 8, "new": 4, "threads": 2}
REPORT = {"machine": {}, "rows": [{"side": "dense", "conditions": {**SAME, "loop": "own, static cache", "step_dtype": "bfloat16", "noisy": []}}]}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(text: str) -> dict[str, str]:
        monkeypatch.setattr(rivals, "SCRIPTS", tmp_path)
        (tmp_path / "llamacpp.py").write_text(text)
        return {"llama.cpp": sys.executable}

    return write


def test_an_answer_is_a_row_under_conditions_of_its_own_where_they_are_not_the_same(script) -> None:
    pythons = script("import sys, json; print('loading'); print(json.dumps({'rounds': 5, 'decode_tokens_per_s': float(sys.argv[4])}))")
    row = with_rival(REPORT, pythons, "/some/model-q4.gguf")["rows"][-1]
    own = {"loop": "llama.cpp, after the others", "rounds": 5, "file": "model-q4.gguf"}
    assert row["side"] == "llama.cpp" and row["decode_tokens_per_s"] == 4 and row["conditions"] == {**SAME, **own}, "it said no type and no noise"


def test_no_python_and_no_answer_are_reasons(script) -> None:
    assert "--rival-python llama.cpp" in with_rival(REPORT, {}, None)["skipped"]["llama.cpp"]
    assert "--rival-python llama.cpp" in with_rival(REPORT, {}, "m.gguf")["skipped"]["llama.cpp"]
    assert "is broken" in with_rival(REPORT, script("raise SystemExit('it is broken')"), "m.gguf")["skipped"]["llama.cpp"]
    assert "did not answer" in rivals.ask("llama.cpp", script("print('no json')"))["skipped"]
    assert "did not answer" in rivals.ask("llama.cpp", {"llama.cpp": "/nowhere/python"})["skipped"]


@pytest.mark.parametrize("option", ["llama.cpp", "llama.cpp=", "ollama=/usr/bin/python"])
def test_an_option_that_names_no_rival(option: str) -> None:
    with pytest.raises(InputError, match="names no rival"):
        rivals.parse([option])
    assert rivals.parse(["llama.cpp=/a/b=c"]) == {"llama.cpp": "/a/b=c"}
