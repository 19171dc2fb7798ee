"""How alike tokens are: what the figures mean, both kinds of pairs, packed embeddings, the file and its reader."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.engine.compress import compress
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe
from bitpress.engine.similarity import described, similarity
from bitpress.engine.similarity_file import FILE, read_similarity
from bitpress.kernels.reference import dequantize

IDS = torch.randint(0, 320, (1, 64), generator=torch.Generator().manual_seed(0))


def test_cosines_are_counted_in_bins_from_minus_one_to_one() -> None:
    found = described(torch.tensor([1.0, 1.0000001, -1.0, 0.01]))
    assert found["mean"] == pytest.approx(0.2525, abs=1e-4)
    assert (found["share"][0], found["share"][20], found["share"][-1]) == (0.25, 0.25, 0.5)
    assert sum(found["share"]) == pytest.approx(1)


def test_a_model_is_as_alike_as_itself(in_memory: Callable[..., Loaded]) -> None:
    model = in_memory("llama").model
    found = similarity(model, model, IDS)
    assert set(found) == {"embedding", "last state"}
    for sides in found.values():
        assert sides["dense"] == sides["compressed"]


def test_tokens_that_became_one_show_as_one(in_memory: Callable[..., Loaded]) -> None:
    """The collapse that the picture is for: all rows of the embedding nearly the same."""
    dense, other = in_memory("llama").model, in_memory("llama").model
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(0.01).add_(1.0)
    found = similarity(dense, other, IDS)["embedding"]
    assert abs(found["dense"]["mean"]) < 0.1
    assert found["compressed"]["mean"] > 0.99


def test_packed_embeddings_are_read_as_they_are_stored(in_memory: Callable[..., Loaded]) -> None:
    loaded = in_memory("llama")
    packed = compress(loaded, Recipe.from_dict({"model": "llama", "embedding": {"bits": 2}})).model
    stand_in = in_memory("llama").model
    with torch.no_grad():
        stand_in.model.embed_tokens.weight.copy_(dequantize(packed.model.embed_tokens.packed))
    found = [similarity(loaded.model, model, IDS)["embedding"]["compressed"]["mean"] for model in (packed, stand_in)]
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_a_model_without_hidden_states_has_no_last_states(in_memory: Callable[..., Loaded]) -> None:
    model = in_memory("custom").model
    assert "last state" not in similarity(model, model, IDS)


def test_the_file_is_read_without_torch(tmp_path: Path, in_memory: Callable[..., Loaded]) -> None:
    model = in_memory("llama").model
    written = similarity(model, model, IDS)
    (tmp_path / FILE).write_text(json.dumps(written))
    found = read_similarity(tmp_path)
    assert found["embedding"]["dense"].mean == written["embedding"]["dense"]["mean"]
    assert found["embedding"]["dense"].centres[:2] == [-0.975, -0.925]
    code = "import sys, bitpress.engine.similarity_file\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.split() == ["False"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"embedding": {"dense": 1}}', '{"embedding": {"dense": {"mean": "x", "share": []}}}'])
def test_a_file_that_is_no_such_file_is_as_none(tmp_path: Path, text: Any) -> None:
    (tmp_path / FILE).write_text(text)
    assert read_similarity(tmp_path) == {}
    assert read_similarity(tmp_path / "nowhere") == {}
