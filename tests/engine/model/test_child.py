"""Counting what a child has brought so far, while it goes on working."""

import os
import shutil
from pathlib import Path

import pytest

from bitpress.engine.model.child import size_of


def test_all_files_count(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"abc")
    (tmp_path / "deep" / "er" / "two").write_bytes(b"defgh")
    assert size_of(tmp_path) == 8


def test_a_folder_that_vanishes_while_it_is_counted_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").write_bytes(b"abc")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "file").write_bytes(b"defgh")
    scandir = os.scandir

    def late(where: str) -> object:
        if str(where).endswith("gone"):
            shutil.rmtree(where)
        return scandir(where)

    monkeypatch.setattr(os, "scandir", late)
    assert size_of(tmp_path) == 3
