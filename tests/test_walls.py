"""The arrows of the house run one way, and the screens' process stays free of torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "safetensors"}
FORBIDDEN = {"app": set(), "engine": {"app"}, "kernels": {"app", "engine"}}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows_run_from_app_to_engine_to_kernels(folder: str) -> None:
    files = modules(folder)
    assert files, f"{folder} holds no module"
    for path in files:
        rooms = {name.split(".")[1] for name in imported(path) if name.startswith("bitpress.") and name.count(".")}
        assert not rooms & FORBIDDEN[folder], f"{path.relative_to(ROOT)} imports {rooms & FORBIDDEN[folder]}"


def test_engine_and_kernels_never_import_streamlit() -> None:
    for path in modules("engine") + modules("kernels"):
        assert "streamlit" not in {name.split(".")[0] for name in imported(path)}, path


def test_no_relative_or_top_level_import_of_our_folders() -> None:
    """`import kernels` would break transformers for users who have the package of that name."""
    for path in modules("app") + modules("engine") + modules("kernels"):
        assert not {name.split(".")[0] for name in imported(path)} & {"app", "engine", "kernels"}, path


def test_importing_every_screen_leaves_torch_out() -> None:
    names = [".".join(["bitpress", *path.relative_to(ROOT).with_suffix("").parts]) for path in modules("app") if path.parent.name != "pages"]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith(".main")]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(sorted(set(sys.modules) & {HEAVY!r}))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert shown.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("page", [path.name for path in modules("app/pages") if path.name != "__init__.py"])
def test_running_a_page_leaves_torch_out(page: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom streamlit.testing.v1 import AppTest\n"
        f"app = AppTest.from_file({str(ROOT / 'app' / 'pages' / page)!r}, default_timeout=60).run()\n"
        f"assert not app.exception, app.exception\nprint(sorted(set(sys.modules) & {HEAVY!r}))"
    )
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}  # which copy of Bitpress is tested
    environment = {**kept, "BITPRESS_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert shown.stdout.strip().splitlines()[-1] == "[]"
