"""The library: what is listed, what may be added, what is refused, and that looking costs no torch."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.model import library, local

pytestmark = pytest.mark.usefixtures("bitpress_home")


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder that paths may lie in."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    monkeypatch.setenv("BITPRESS_ROOTS", str(folder))
    return folder


def make_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({"a": np.zeros((4, 8), np.float16), "b": np.zeros(3, np.float32)}, folder / "model.safetensors")
    settings = {"model_type": "llama", "num_hidden_layers": 5, "max_position_embeddings": 64} | config
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_bundled_models_come_first_and_tell_their_story() -> None:
    models = {entry.id: entry for entry in library.list_models()}
    assert list(models)[:3] == ["tiny-stories", "smollm2-135m", "stories-15m"]
    assert [entry.id for entry in models.values() if entry.recommended] == ["smollm2-135m"]
    assert "once 4-bit" in models["smollm2-135m"].notes
    for entry in models.values():
        assert entry.params and entry.blocks and entry.bytes and entry.context and len(entry.prompts) == 3
        assert entry.source.kind == "assets" or (len(entry.source.sha256) == 64 and entry.download_bytes)
    assert {key: entry.default_text for key, entry in models.items()} == {"tiny-stories": "stories", "smollm2-135m": "wiki", "stories-15m": "stories"}


def test_only_the_built_in_model_is_ready_at_first() -> None:
    assert [entry.id for entry in library.list_models() if entry.ready] == ["tiny-stories"]
    assert (library.model_path("tiny-stories") / "config.json").is_file()
    with pytest.raises(InputError, match="not installed") as refusal:
        library.model_path("smollm2-135m")
    assert "smollm2-135m" in refusal.value.remedy


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError) as refusal:
        library.find("smollm-135")
    assert "smollm2-135m" in refusal.value.remedy and refusal.value.exit_code == 2


def test_looking_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from bitpress.engine.model import library, install, packages, local; library.list_models(); "
        "print([m for m in ('torch', 'transformers', 'safetensors.torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_what_a_worker_wrote_about_the_built_in_model_is_found_under_home(bitpress_home: Path) -> None:
    written = bitpress_home / "models" / "tiny-stories" / "anatomy.json"
    stats = bitpress_home / "models" / "tiny-stories" / "stats"
    stats.mkdir(parents=True)
    written.write_text("{}")
    assert library.anatomy_path("tiny-stories") == written
    assert library.stats_dir("tiny-stories") == stats
    assert library.find("tiny-stories").ready, "a folder of statistics is not a second model"


def test_what_is_shipped_beside_the_asset_is_found_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bitpress_home: Path) -> None:
    monkeypatch.setattr(library, "assets_dir", lambda: tmp_path)
    make_folder(tmp_path / "tiny")
    assert library.anatomy_path("tiny-stories") == bitpress_home / "models" / "tiny-stories" / "anatomy.json"
    (tmp_path / "tiny" / "anatomy.json").write_text("{}")
    assert library.anatomy_path("tiny-stories") == tmp_path / "tiny" / "anatomy.json"


def test_a_local_folder_is_ready_at_once_and_added_once(roots: Path) -> None:
    folder = make_folder(roots / "My Model")
    entry = library.add_local(folder, name="My Model!")
    assert (entry.id, entry.title, entry.ready, entry.path) == ("my-model", "My Model!", True, str(folder))
    assert (entry.params, entry.bytes, entry.blocks, entry.context) == (35, 76, 5, 64)
    assert library.add_local(folder / "model.safetensors").id == "my-model"
    assert library.model_path("my-model") == folder
    other = library.add_local(make_folder(roots / "other" / "my-model"))
    assert other.id == "my-model-2"
    assert [e.id for e in library.list_models()][3:] == ["my-model", "my-model-2"]
    shutil.rmtree(folder)
    assert not library.find("my-model").ready


def test_a_presets_name_cannot_be_taken(roots: Path) -> None:
    assert library.add_local(make_folder(roots / "x"), name="SmolLM2-135M").id == "smollm2-135m-2"


def test_paths_outside_the_roots_are_refused(roots: Path, tmp_path: Path) -> None:
    outside = make_folder(tmp_path / "outside")
    for path in (outside, roots / ".." / "outside", outside / "model.safetensors"):
        with pytest.raises(InputError, match="may not be read") as refusal:
            library.add_local(path)
        assert "BITPRESS_ROOTS" in refusal.value.remedy


def test_symlinks_do_not_lead_out(roots: Path, tmp_path: Path) -> None:
    outside = make_folder(tmp_path / "outside")
    (roots / "link").symlink_to(outside)
    with pytest.raises(InputError, match="may not be read"):
        library.add_local(roots / "link")
    inside = make_folder(roots / "inside")
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(InputError, match="may not be read"):
        library.add_local(inside)


def test_symlinks_within_the_roots_are_followed(roots: Path) -> None:
    """A Hub cache keeps its snapshots as links to blobs."""
    store = make_folder(roots / "blobs")
    snapshot = roots / "snapshot"
    snapshot.mkdir()
    for file in store.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert library.add_local(snapshot / "model.safetensors").path == str(snapshot)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".PT"])
def test_pickles_are_refused_and_the_way_out_is_told(roots: Path, suffix: str) -> None:
    folder = make_folder(roots / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / f"pytorch_model{suffix}").write_bytes(b"\x80\x04cos\nsystem\n")
    for path in (folder, folder / f"pytorch_model{suffix}"):
        with pytest.raises(InputError, match="pickle") as refusal:
            library.add_local(path)
        assert "safe_serialization" in refusal.value.remedy
    assert len(library.list_models()) == 3


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_refused(roots: Path, file: str) -> None:
    folder = make_folder(roots / "remote")
    (folder / file).write_text(json.dumps({"auto_map": {"AutoModel": "modeling_x.X"}}))
    with pytest.raises(InputError, match="auto_map"):
        library.add_local(folder)


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "json", "empty"])
def test_damaged_weights_are_refused(roots: Path, damage: str) -> None:
    folder = make_folder(roots / "damaged")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    changed = {"cut": data[:-5], "longer": data + b"x", "header": struct.pack("<Q", 1 << 60) + data[8:], "json": data[:8] + b"!" + data[9:], "empty": b""}
    weights.write_bytes(changed[damage])
    with pytest.raises(InputError, match="is damaged"):
        library.add_local(folder)


LACKS = {"config.json": r"no config\.json", "tokenizer.json": "no tokenizer", "model.safetensors": r"no \.safetensors"}


@pytest.mark.parametrize(("missing", "said"), LACKS.items())
def test_what_a_folder_lacks_is_named(roots: Path, missing: str, said: str) -> None:
    folder = make_folder(roots / "lacking")
    (folder / missing).unlink()
    with pytest.raises(InputError, match=said):
        library.add_local(folder)


def test_a_broken_config_is_refused(roots: Path) -> None:
    folder = make_folder(roots / "broken")
    for text in ("{", "[1]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json cannot be"):
            library.add_local(folder)


def test_other_files_and_absent_ones_are_refused(roots: Path) -> None:
    (roots / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"\.txt files are not read"):
        library.add_local(roots / "notes.txt")
    with pytest.raises(InputError, match="is not there"):
        library.add_local(roots / "nothing")


def test_a_gguf_file_is_listed_but_not_ready(roots: Path) -> None:
    writer = gguf.GGUFWriter(roots / "small.gguf", "llama")
    writer.add_block_count(7)
    writer.add_context_length(128)
    writer.add_tensor("token_embd.weight", np.zeros((10, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = library.add_local(roots / "small.gguf")
    assert (entry.id, entry.source.kind, entry.ready, entry.blocks, entry.context, entry.params) == ("small", "gguf", False, 7, 128, 320)
    (roots / "cut.gguf").write_bytes((roots / "small.gguf").read_bytes()[:-100])
    with pytest.raises(InputError, match="not a complete GGUF"):
        library.add_local(roots / "cut.gguf")


def test_a_broken_source_file_hides_nothing(bitpress_home: Path) -> None:
    for name in ("mine", ".hidden"):
        (bitpress_home / "models" / name).mkdir(parents=True)
        (bitpress_home / "models" / name / "source.json").write_text("{")
    entries = library.list_models()
    assert [entry.id for entry in entries][3:] == ["mine"]
    assert not entries[3].ready and "cannot be read" in entries[3].notes


def test_a_broken_presets_file_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "presets_dir", lambda: tmp_path)
    for text in ("models: [{id: x, surprise: 1}]", "models: [", "other: 1"):
        (tmp_path / "models.yaml").write_text(text)
        with pytest.raises(BitpressError, match="bundled models cannot be read"):
            library.list_models()


def test_hub_names_are_taken_as_they_are_written() -> None:
    entry = library.find("Some-Org/Model_1.5B")
    assert (entry.id, entry.source.kind, entry.source.package, entry.ready) == ("some-org--model_1.5b", "hub", "Some-Org/Model_1.5B", False)
    for name in ("no-slash", "a/b/c", "../x", "a/", "/b", "a b/c", "a/..b", "a/b\n"):
        with pytest.raises(InputError, match="is no Hub model"):
            library.hub_candidate(name)


def test_the_default_roots_are_home_and_uploads(monkeypatch: pytest.MonkeyPatch, bitpress_home: Path) -> None:
    monkeypatch.delenv("BITPRESS_ROOTS", raising=False)
    assert local.allowed_roots() == [Path.home().resolve(), (bitpress_home / "uploads").resolve()]
    monkeypatch.setenv("BITPRESS_ROOTS", os.pathsep.join(["/a", "", "/b"]))
    assert local.allowed_roots() == [Path("/a"), Path("/b"), (bitpress_home / "uploads").resolve()]
