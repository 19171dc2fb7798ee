"""Real workers on a tiny model: what they leave behind, and what a kill, a full disk or a wrong recipe does to it."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs, worker
from bitpress.engine.runs.backends.base import Handle, Resources
from bitpress.engine.runs.backends.local import LocalBackend
from bitpress.engine.runs.events import Event
from bitpress.engine.runs.follow import ProgressLine, follow
from bitpress.engine.runs.status import change_status, process_started
from bitpress.engine.runs.store import Run, Store

MakeRecipe = Callable[..., Recipe]
# The worker as it is, but every layer takes its time, so that a test can meet it in the middle of a run.
SLOWLY = """
import sys, time
from pathlib import Path
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.runs import worker
save = LayerStore.save
def slow_save(self, stored, made_from):
    save(self, stored, made_from)
    time.sleep(0.3)
LayerStore.save = slow_save
sys.exit(worker.main(Path(sys.argv[1])))
"""


class SlowBackend(LocalBackend):
    """Starts workers that take their time over each layer."""

    def submit(self, command: list[str], log: Path, resources: Resources) -> Handle:
        return super().submit([sys.executable, "-c", SLOWLY, command[-1]], log, resources)


def until(true: Callable[[], Any], seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never became so"
        jobs.pump()
        time.sleep(0.05)


def kinds(run: Run) -> list[str]:
    return [event.kind for event in run.events()]


def layers_done(run: Run) -> list[Event]:
    return [event for event in run.events() if event.kind == "layer_done"]


def layer_files(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run.path / "layers").iterdir())}


def finish(run: Run) -> Run:
    """Wait for the end; raises what the run failed with."""
    follow(run, line=ProgressLine(io.StringIO()))
    return run


class Here:
    """Does runs in this process, where torch is loaded already."""

    def do(self, kind: str, args: dict[str, Any], recipe: Recipe | None = None) -> Run:
        """Do a new run; raises what it failed with."""
        return self.again(Store().create(kind, args, recipe))

    def again(self, run: Run) -> Run:
        """Do a run whatever state it is in, as `jobs.resume` would."""
        change_status(run.path, lambda _: {"state": "queued", "error": None})
        worker.main(run.path)
        return finish(run)


@pytest.fixture
def here() -> Iterator[Here]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Here()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def kill(run: Run) -> None:
    """SIGKILL, which no worker can answer, and wait until a pump has noticed."""
    pid = run.status().pid
    assert pid is not None
    os.killpg(pid, signal.SIGKILL)
    until(lambda: run.status().state == "interrupted")
    assert process_started(pid) is None


def test_a_compress_run_leaves_all_it_promises(here: Here, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(measure={**tiny_recipe().measure.model_dump(), "latency": True})
    run = here.do("compress", {"samples": 1}, recipe)
    status, metrics, environment = run.status(), run.metrics(), run.env()
    assert metrics is not None
    assert environment is not None
    assert (status.state, status.error, status.digest) == ("finished", None, jobs.compress_digest(recipe))
    assert metrics["run"] == run.id
    assert metrics["digest"] == status.digest
    dense, compressed = metrics["metrics"]["dense"], metrics["metrics"]["compressed"]
    assert compressed["bytes"] < dense["bytes"]
    assert compressed["bits_per_weight_linears"] == pytest.approx(4 + (16 + 4) / 32)
    assert {"perplexity", "decode_tokens_per_s", "ttft_s", "peak_bytes", "protocol"} <= dense.keys() & compressed.keys()
    assert {"kl_mean", "same_top1", "kernels"} <= compressed.keys()
    assert {"versions", "cpu", "threads", "dtype"} <= environment.keys()
    found = kinds(run)
    assert found[:2] == ["queued", "started"]
    assert found[-1] == "finished"
    assert found.count("layer_done") == len(layer_files(run)) == 21
    assert {"stage_started", "progress", "window", "metrics", "sample"} <= set(found)
    assert [event.n for event in run.events()] == list(range(1, len(found) + 1))
    assert not (run.path / ".reserve").exists()


def test_samples_are_told_token_by_token_and_kept(here: Here, tiny_recipe: MakeRecipe) -> None:
    run = here.do("compress", {"samples": 2}, tiny_recipe(8))
    samples = run.samples()
    assert [(sample["side"], sample["prompt"]) for sample in samples[:2]] == [("dense", samples[0]["prompt"]), ("compressed", samples[0]["prompt"])]
    assert len(samples) == 4
    for sample in samples:
        assert sample["tokens_per_s"] > 0
        mine = (sample["side"], sample["prompt"])
        told = [event.data for event in run.events() if event.kind == "sample" and (event.data["side"], event.data["prompt"]) == mine]
        assert [data["token"] for data in told] == [token["id"] for token in sample["tokens"]]
        assert all(token.keys() >= {"id", "text", "logprob", "rank", "top"} for token in sample["tokens"])
    assert all(token["kl"] >= 0 for sample in samples if sample["side"] == "compressed" for token in sample["tokens"])


def test_a_killed_run_is_resumed_to_the_same_bytes(here: Here, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = here.do("compress", {"samples": 0}, tiny_recipe(3))
    with monkeypatch.context() as slowly:
        slowly.setattr(jobs, "BACKEND", SlowBackend())
        run = jobs.submit("compress", {"samples": 0}, tiny_recipe(3))
        until(lambda: len(layers_done(run)) >= 3)
        kill(run)
    assert kinds(run)[-1] == "interrupted"
    done, kept = layers_done(run), layer_files(run)
    assert 3 <= len(done) < 21
    jobs.resume(run.id)
    finish(run)
    again = layers_done(run)[len(done) :]
    assert [event.data["layer"] for event in again[: len(done)]] == [event.data["layer"] for event in done]
    assert all(event.data["reused"] for event in again[: len(done)])
    assert not any(event.data["reused"] for event in again[len(kept) :])
    assert [event.n for event in run.events()] == list(range(1, len(run.events()) + 1))
    assert layer_files(run) == layer_files(whole)
    first, second = whole.metrics(), run.metrics()
    assert first is not None
    assert second is not None
    for side in ("dense", "compressed"):
        assert second["metrics"][side]["perplexity"] == first["metrics"][side]["perplexity"]


def test_a_cancelled_run_stops_soon_and_goes_on_later(tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as slowly:
        slowly.setattr(jobs, "BACKEND", SlowBackend())
        run = jobs.submit("compress", {"samples": 0}, tiny_recipe())
        until(lambda: len(layers_done(run)) >= 2 and "resources" in kinds(run))
        status = run.status()
        assert (status.phase, status.total) == ("compressing", 21)
        assert status.heartbeat is not None
        assert time.time() - status.heartbeat < 10
        began = time.monotonic()
        jobs.cancel(run.id)
        until(lambda: run.status().state == "cancelled")
        assert time.monotonic() - began < 8
    assert kinds(run)[-1] == "cancelled"
    usage = next(event.data for event in run.events() if event.kind == "resources")
    assert usage["rss"] > 1 << 20
    assert "gpu" not in usage
    jobs.resume(run.id)
    assert finish(run).status().state == "finished"


def test_a_worker_outlives_whoever_started_it_and_starts_the_next(tiny_recipe: MakeRecipe) -> None:
    script = (
        "import sys\nfrom bitpress.engine.recipe import Recipe\nfrom bitpress.engine.runs import jobs\n"
        "recipe = Recipe.from_text(sys.stdin.read())\nfor _ in range(2): print(jobs.submit('compress', {'samples': 0}, recipe).id)"
    )
    shown = subprocess.run([sys.executable, "-c", script], input=tiny_recipe().to_yaml(), capture_output=True, text=True, check=True).stdout
    runs = [Store().get(run_id) for run_id in shown.split()]
    ends = time.monotonic() + 120
    while [run.status().state for run in runs] != ["finished", "finished"]:  # nobody pumps here: the first worker does
        assert time.monotonic() < ends, [run.status() for run in runs]
        time.sleep(0.1)


def test_a_run_refuses_to_go_on_with_another_recipe(here: Here, tiny_recipe: MakeRecipe) -> None:
    run = here.do("compress", {"samples": 0}, tiny_recipe(4))
    kept = layer_files(run)
    (run.path / "recipe.yaml").write_text(tiny_recipe(2).to_yaml())
    with pytest.raises(BitpressError, match="cannot be reused"):
        here.again(run)
    assert layer_files(run) == kept


def test_a_full_disk_is_said_and_loses_nothing(here: Here, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has room for eight layers; once there is more the run is resumed, and those eight are not made again."""
    from bitpress.engine import layer_store

    room, write = iter(range(8)), layer_store.write_durably

    def limited(path: Path, data: bytes) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    run = Store().create("compress", {"samples": 0}, tiny_recipe())
    with monkeypatch.context() as full:
        full.setattr(layer_store, "write_durably", limited)
        with pytest.raises(BitpressError, match="The disk is full"):
            here.again(run)
    status = run.status()
    assert status.state == "failed"
    assert status.error is not None
    assert "resume" in status.error["remedy"]
    assert "Traceback" in run.log_tail(200)
    kept = layer_files(run)
    assert len(kept) == 8
    here.again(run)
    assert kept.items() <= layer_files(run).items()
    assert [event.data["reused"] for event in layers_done(run)[8:]] == [True] * 8 + [False] * 13


def test_a_recipe_that_does_not_fit_fails_before_anything_is_made(here: Here, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(schemes=[{"match": "role:vv", "weights": {"bits": 4}}, {"match": "blocks:99", "weights": {"bits": 4}}])
    run = Store().create("compress", {}, recipe)
    with pytest.raises(InputError) as refused:
        here.again(run)
    assert "role 'vv'" in refused.value.why
    assert "blocks:99" in refused.value.why
    assert not (run.path / "layers").exists()


@pytest.mark.parametrize(
    ("kind", "args", "said"),
    [("juggle", {}, "no run of kind"), ("inspect", {"model": "no-such-model"}, "no model"), ("measure", {"model": "no-such-model"}, "no model")],
)
def test_bad_input_fails_with_exit_code_2_and_no_traceback_outside_the_log(here: Here, bitpress_home: Path, kind: str, args: dict[str, Any], said: str) -> None:
    run = Store().create(kind, args)
    with pytest.raises(InputError, match=said):
        here.again(run)
    assert run.events()[-1].data["exit_code"] == 2
    assert "Traceback" not in json.dumps([event.data for event in run.events()]) + json.dumps(run.status().error)


def test_a_damaged_model_file_is_told_in_words(here: Here, tiny_recipe: MakeRecipe, tiny_llama_dir: Path, tmp_path: Path) -> None:
    import shutil

    from bitpress.engine.model import library

    copy = tmp_path / "broken-llama"
    shutil.copytree(tiny_llama_dir, copy)
    model = library.add_local(copy).id
    weights = next(copy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        here.do("compress", {}, tiny_recipe(model=model))


def test_inspect_leaves_what_the_screens_read(here: Here, tiny_home: str) -> None:
    from bitpress.engine.model import library
    from bitpress.engine.model.anatomy import Anatomy

    here.do("inspect", {"model": tiny_home})
    anatomy = Anatomy.load(library.anatomy_path(tiny_home))
    assert len(anatomy.linears) == 21
    assert len(list(library.stats_dir(tiny_home).glob("*.json"))) >= 21


def test_measure_sets_a_run_beside_its_dense_model(here: Here, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(4)
    made = here.do("compress", {"samples": 0}, recipe)
    again = here.do("measure", {"model": recipe.model, "run": made.id, "measure": recipe.measure.model_dump()})
    alone = here.do("measure", {"model": recipe.model, "measure": recipe.measure.model_dump()})
    first, second, third = made.metrics(), again.metrics(), alone.metrics()
    assert first is not None
    assert second is not None
    assert third is not None
    for side in ("dense", "compressed"):
        assert second["metrics"][side]["perplexity"] == pytest.approx(first["metrics"][side]["perplexity"], rel=1e-6)
        assert second["metrics"][side]["bytes"] == first["metrics"][side]["bytes"]
    assert third["metrics"].keys() == {"dense"}


def test_generate_continues_a_prompt(here: Here, tiny_home: str) -> None:
    run = here.do("generate", {"model": tiny_home, "prompt": "Once upon a time", "sampling": {"max_new": 5}})
    result = run.result()
    assert result is not None
    assert len(result["tokens"]) == 5
    assert result["text"] == "".join(token["text"] for token in result["tokens"])
    with pytest.raises(InputError, match="fit"):
        here.do("generate", {"model": tiny_home, "prompt": "Once " * 200, "sampling": {"max_new": 5}})
    with pytest.raises(InputError, match="temperature"):
        here.do("generate", {"model": tiny_home, "prompt": "Once", "sampling": {"temperature": -1}})


def test_several_prompts_are_written_at_once(here: Here, tiny_home: str) -> None:
    sampling, prompts = {"max_new": 5, "temperature": 1.0, "seed": 3}, ["Once upon a time", "The bear"]
    result = here.do("generate", {"model": tiny_home, "prompts": prompts, "sampling": sampling}).result()
    assert result is not None
    assert [sample["prompt"] for sample in result["samples"]] == prompts
    assert all(len(sample["tokens"]) == 5 or sample["ended"] == "stop" for sample in result["samples"])
    assert result["tokens_per_s"] > 0
    assert "reason" not in result
    with pytest.raises(InputError, match="prompt 2"):
        here.do("generate", {"model": tiny_home, "prompts": ["Once", "Once " * 200], "sampling": sampling})


def test_sensitivity_leaves_its_scores(here: Here, tiny_home: str, tiny_recipe: MakeRecipe) -> None:
    run = here.do("sensitivity", {"model": tiny_home, "text": tiny_recipe().measure.text})
    result = run.result()
    assert result is not None
    assert {"digest", "kind", "seconds", "scores"} <= result.keys()
    assert {score["layer"] for score in result["scores"]} >= {"model.layers.0.self_attn.q_proj"}
    assert run.status().digest == result["digest"]
