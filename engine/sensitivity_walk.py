"""Errors of weights and of outputs, block by block in one walk: `data_free` and `activation`. Knows no gradients and no predictions."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitpress.engine.calibrate import walk
from bitpress.engine.sensitivity_file import ACTIVATION, DATA_FREE
from bitpress.engine.sensitivity_options import made_of, weighted_errors
from bitpress.engine.sensitivity_scoring import Scoring


def score_by_walk(scoring: Scoring, ids_SL: Tensor | None, kinds: Sequence[str]) -> None:
    """Score the layers that have no score of these kinds yet. ids_SL: int64 [S, L]; without them, or without need, nothing runs."""
    _Walk(scoring, kinds).run(ids_SL)


class _Walk:
    """What is left to score, and of which kinds."""

    def __init__(self, scoring: Scoring, kinds: Sequence[str]) -> None:
        self.scoring, self.kinds = scoring, kinds
        done = {layer for layer, _ in scoring.done(kinds[0])}
        self.left = [part for part in scoring.loaded.anatomy.linears if part.name not in done]

    def run(self, ids_SL: Tensor | None) -> None:
        loaded = self.scoring.loaded
        self.scoring.emit("stage_started", {"stage": "measuring sensitivity", "total": len(loaded.anatomy.linears)})
        if ids_SL is None or ACTIVATION not in self.kinds:
            for block in range(loaded.anatomy.blocks):
                self.block(block, {})
            return
        requests = {part.name: {"second_moment"} for part in self.left}
        # Nothing is changed on the way, so the plain forward's outputs can be handed on: one pass instead of two.
        walk(loaded.model, loaded.anatomy, ids_SL, requests, self.block, sequential=False, should_stop=self.scoring.should_stop)

    def block(self, block: int, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Score one block's layers and keep them."""
        scoring, total = self.scoring, len(self.scoring.loaded.anatomy.linears)
        for part in (part for part in self.left if part.block == block):
            scoring.check()
            self.layer(part.name, stats.get(part.name, {}))
            scoring.emit("progress", {"done": len({layer for layer, _ in scoring.done(self.kinds[0])}), "total": total})
        scoring.save()

    def layer(self, name: str, stats: Mapping[str, Tensor]) -> None:
        """All options of one layer. A layer that no input reached has no activation score."""
        weight_NK, moment_K = self.scoring.weight(name), stats.get("second_moment")
        weights_K = {DATA_FREE: torch.ones(weight_NK.shape[1])} | ({ACTIVATION: moment_K.float()} if moment_K is not None else {})
        for option in self.scoring.report.options:
            for kind, score in weighted_errors(weight_NK, made_of(weight_NK, option.scheme), weights_K).items():
                if kind in self.kinds:
                    self.scoring.keep(name, option.id, kind, score)
