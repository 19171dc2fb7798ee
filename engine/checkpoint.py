"""A training's state on disk, so that a killed run goes on where it was. Knows files and tensors; nothing of what they mean."""

import json
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from bitpress.engine.layer_store import LAYER_VERSION, MadeFrom, digest_of_tensors, read_tensors, write_tensors


class Checkpoint:
    """The file `training.safetensors` of one run; `what` names the training, since a run may hold several, one after another."""

    def __init__(self, run_folder: Path, made_from: MadeFrom, what: str) -> None:
        self.path, self.made_from, self.what = Path(run_folder) / "training.safetensors", made_from, what

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write it whole or not at all. Raises BitpressError when the disk is full."""
        record = {"v": LAYER_VERSION, "what": self.what, "step": step, "made_from": asdict(self.made_from), "sha256": digest_of_tensors(tensors)}
        write_tensors(self.path, tensors, json.dumps(record, sort_keys=True))

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """(steps done, tensors); None where there is none, or one of another training. Raises BitpressError when the file is damaged."""
        if not self.path.exists():
            return None
        record, tensors = read_tensors(self.path)
        if record["what"] != self.what or self.made_from.first_change(record["made_from"]):
            return None
        return record["step"], tensors

    def remove(self) -> None:
        """The training is finished and its layers are kept."""
        self.path.unlink(missing_ok=True)
