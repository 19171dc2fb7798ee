"""Rivals answer in a process of their own; one that is absent or silent is skipped with the reason, never given a figure."""

import json
import sys
from pathlib import Path

import pytest

from bitpress.engine import cli_machine, rivals
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


def test_every_rival_of_a_kernel_is_asked_for_the_same_matrix_or_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    answer = "import sys, json; print(json.dumps({'version': '1', 'ran': 'a product', 'kinds': {'int4': {'p10_s': float(sys.argv[2]) + float(sys.argv[3])}}}))"
    monkeypatch.setattr(rivals, "SCRIPTS", tmp_path)
    (tmp_path / "torchao_gemv.py").write_text(answer)
    monkeypatch.setattr(cli_machine, "_bench_report", lambda *_: {"machine": {}, "rows": [{"layout": "4 bits"}]})
    cli_machine.bench("kernels", rival_python=[f"torchao={sys.executable}"], as_json=True)
    found = {row["rival"]: row for row in json.loads(capsys.readouterr().out)["rivals"]}
    assert found["torchao"]["kinds"]["int4"]["p10_s"] == 8192 and found["torchao"]["ran"] == "a product"
    assert set(found) == {"torchao", "hqq", "bitsandbytes"} and "--rival-python hqq" in found["hqq"]["skipped"]
    cli_machine.bench("kernels", rival_python=[f"torchao={sys.executable}"])
    assert "rival torchao" in capsys.readouterr().out


def test_a_batch_is_for_decoding_alone() -> None:
    with pytest.raises(InputError, match="A batch of 4"):
        cli_machine.bench("prefill", batch=4)
    with pytest.raises(InputError, match="A batch of 4"):
        cli_machine.bench("decode", rival_python=[f"llama.cpp={sys.executable}"], batch=4)
