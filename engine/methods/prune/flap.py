"""FLAP: what fluctuates least can be replaced by its mean, and a bias carries the mean (METHODS 16.8)."""

from typing import Any

from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.repair import Repairing
from bitpress.engine.methods.structured import Scores, StructuredMethod, StructuredOptions, Units
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.scene import Scene
from bitpress.engine.sublayers import feature_moments, last_matrix


class FlapOptions(StructuredOptions):
    """FLAP compensates with a bias."""

    repair: Repairing = Field(default="bias", title="Repair", description="FLAP gives the last matrix of each sublayer a bias for the mean of what went.")


class Flap(StructuredMethod):
    """Score var(x_j) * ||W_:j||^2, standardised within each sublayer; a head's is the mean of its channels'."""

    name = "flap"
    title = "FLAP"
    summary = "Removes the heads and neurons whose values fluctuate least and puts their mean into a bias. Needs two passes over some text."
    citation = "An et al. 2024, Fluctuation-based adaptive structured pruning for large language models, arXiv 2312.11983."
    cost = "One pass over the text and four for its bias."
    use_when = "For narrower blocks in little time."
    Options = FlapOptions

    def score(self, scene: Scene, units: Units, options: Any) -> Scores:
        """Standardised, so not per multiply-add: every sublayer has the mean 0 and the deviation 1."""
        found: Scores = {}
        for key, moments in feature_moments(scene, units.keys).items():
            weight_dF = linear_weight(get(scene.model, last_matrix(scene.anatomy, key).name)).double()
            found[key] = standardised(units.per_unit(key, moments.variance_F * weight_dF.square().sum(0), Tensor.mean))
        return found


def standardised(score_U: Tensor) -> Tensor:
    """Mean 0, deviation 1; zeros where all scores are equal."""
    spread = score_U.std(correction=0)
    return (score_U - score_U.mean()) / spread if spread > 0 else score_U * 0
