"""The command line: what goes to which stream, exit codes, refusals in words. Work that is a run is tested in tests/engine/runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bitpress.engine import cli
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.status import change_status
from bitpress.engine.runs.store import Store


class Done(NamedTuple):
    """How a command ended, and what it said on both streams."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def bitpress(bitpress_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process; `bitpress("models", "--json")`."""

    def run(*words: str) -> Done:
        monkeypatch.setenv("BITPRESS_HOME", str(bitpress_home))  # --home of an earlier call
        monkeypatch.setattr(sys, "argv", ["bitpress", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


def document(done: Done) -> Any:
    """The one JSON document on stdout."""
    return json.loads(done.stdout)


def test_models_have_the_stable_keys(bitpress: Command, bitpress_home: Path) -> None:
    done = bitpress("models", "--json")
    assert done.returncode == 0
    found = {entry["id"]: entry for entry in document(done)}
    assert {"tiny-stories", "smollm2-135m", "stories-15m"} <= found.keys()
    assert found["smollm2-135m"].keys() == {"id", "source", "params", "blocks", "bytes", "licence", "ready"}
    assert found["smollm2-135m"]["blocks"] == 30
    assert "smollm2-135m" in bitpress("models").stdout


def test_methods_have_the_stable_keys(bitpress: Command, bitpress_home: Path) -> None:
    found = document(bitpress("methods", "--json"))
    assert {"rtn", "magnitude"} <= {entry["id"] for entry in found}
    assert all(entry.keys() == {"id", "family", "summary", "citation", "needs", "options"} for entry in found)
    assert (bitpress_home / "catalogue.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compress", "absent.yaml"], "cannot be read"),
        (["measure", "no-such-model"], "no model"),
        (["measure", "20260101-000000-abcd"], "no run"),
        (["generate", "no-such-model", "--prompt", "x"], "no model"),
        (["sensitivity", "no-such-model"], "no model"),
        (["runs", "cancel", "20260101-000000-abcd"], "no run"),
        (["runs", "show", "..."], "no run"),
        (["models", "add", "/absent"], "/absent"),
        (["bench", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_told_in_words_on_both_streams(bitpress: Command, bitpress_home: Path, words: list[str], said: str) -> None:
    done = bitpress(*words, "--json")
    assert done.returncode == 2
    assert document(done).keys() == {"error"}
    assert document(done)["error"].keys() == {"what", "why", "remedy"}
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("model: tiny-stories\nspeed: fast", "speed"),
        ("model: tiny-stories\nschemes: [{match: '*', weights: {bits: 1.5}}]", "1.5"),
        ("model: tiny-stories\nseed: [1]", "seed"),
        ("model: tiny-stories\nschema_version: 99", "99"),
        ("model: any", "names no model"),
        ("- a list", "mapping"),
        ("model: [", "YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_run_is_made(bitpress: Command, bitpress_home: Path, tmp_path: Path, yaml: str, said: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml)
    done = bitpress("compress", str(recipe), "--json")
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert document(done)["error"]["what"]
    assert Store().list() == []


def test_usage_errors_exit_2(bitpress: Command, bitpress_home: Path) -> None:
    for words in (["compress"], ["nonsense"], ["generate", "tiny-stories"], ["measure", "tiny-stories", "--nonsense"]):
        done = bitpress(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Usage" in done.stderr


def test_home_is_an_option_of_every_command(tmp_path: Path, bitpress: Command, bitpress_home: Path) -> None:
    other = tmp_path / "other"
    run = Store(other).create("inspect", {"model": "m"})
    change_status(run.path, lambda _: {"state": "failed"})
    assert [entry["id"] for entry in document(bitpress("runs", "--json", "--home", str(other)))] == [run.id]
    assert document(bitpress("runs", "--json")) == []


def test_runs_are_listed_shown_and_cancelled(bitpress: Command, bitpress_home: Path) -> None:
    run = Store().create("inspect", {"model": "m"}, title="My run")
    change_status(run.path, lambda _: {"state": "interrupted"})
    (entry,) = document(bitpress("runs", "--json"))
    assert (entry["id"], entry["state"], entry["title"]) == (run.id, "interrupted", "My run")
    assert "error" not in entry
    assert document(bitpress("runs", "show", run.id, "--json"))["path"] == str(run.path)
    refused = bitpress("runs", "cancel", run.id)
    assert refused.returncode == 2
    assert "has ended" in refused.stderr


def test_a_finished_run_of_the_same_digest_answers(bitpress: Command, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed: the metrics are the stored ones."""
    from bitpress.engine.model import library
    from bitpress.engine.model.load import load
    from bitpress.engine.runs import jobs

    monkeypatch.setenv("BITPRESS_ROOTS", str(tiny_llama_dir.parent))
    model = library.add_local(tiny_llama_dir).id
    path = library.anatomy_path(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    load(model).anatomy.save(path)
    recipe = Recipe.from_dict({"model": model, "schemes": [{"match": "*", "weights": {"bits": 4}}], "stages": [{"method": "rtn"}]})
    run = Store().create("compress", {}, recipe, digest=jobs.compress_digest(recipe))
    change_status(run.path, lambda _: {"state": "finished"})
    side = {"perplexity": 2.5, "protocol": {"one_line": "the protocol"}}
    stored = {"run": run.id, "digest": run.status().digest, "metrics": {"dense": side, "compressed": side}}
    (run.path / "metrics.json").write_text(json.dumps(stored))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    done = bitpress("compress", str(tmp_path / "recipe.yaml"), "--json")
    assert document(done) == stored
    assert "--force" in done.stderr
    assert "the protocol" in bitpress("compress", str(tmp_path / "recipe.yaml")).stdout


def test_doctor_says_what_is_there(bitpress: Command, bitpress_home: Path) -> None:
    report = document(bitpress("doctor", "--json"))
    checks = {check["name"]: check for check in report["checks"]}
    assert {"python", "torch", "processor", "bf16", "memory", "disk", "chromium", "hub", "home"} <= checks.keys()
    assert report["ok"] is True
    assert report["machine"]["cores"] >= 1
    assert checks["home"]["ok"] is True


def test_doctor_fails_on_a_home_that_cannot_be_written(bitpress: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = bitpress("doctor", "--json", "--home", str(tmp_path / "file" / "home"))
    assert done.returncode == 1
    assert {check["name"] for check in document(done)["checks"] if not check["ok"] and check["needed"]} == {"home"}


def test_the_module_runs_as_a_command(bitpress_home: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "bitpress.engine.cli", "runs", "--json"], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == []
    refused = subprocess.run([sys.executable, "-m", "bitpress.engine.cli", "runs", "show", "none"], capture_output=True, text=True, timeout=120)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, bitpress.engine.cli\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_ctrl_c_cancels_the_run_and_exits_130(bitpress_home: Path) -> None:
    """The run waits behind another one, so that nothing is computed here."""
    busy = Store().create("inspect", {"model": "m"})
    change_status(busy.path, lambda _: {"state": "running", "pid": os.getpid(), "host": ""})
    command = [sys.executable, "-m", "bitpress.engine.cli", "models", "install", "tiny-stories"]
    script = (
        "import sys\nfrom bitpress.engine.runs import jobs\njobs.LIGHT_KINDS = ('desk',)\n"
        f"sys.argv = {['bitpress', *command[3:]]!r}\nfrom bitpress.engine.cli import main\nmain()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ends = time.monotonic() + 30
    while len(Store().list(kind="install")) < 1:
        assert time.monotonic() < ends
        time.sleep(0.05)
    time.sleep(2)  # the command line follows the run by then; a signal before that ends it without a word
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=30)
    assert child.returncode == 130, told
    (status,) = Store().list(kind="install")
    assert status.state == "cancelled"
    assert f"runs resume {status.id}" in told
