"""ROM: every matrix is projected on the principal directions of its own outputs (METHODS 11)."""

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.base import MethodOptions, Statistics
from bitpress.engine.methods.lowrank.pipeline import FactorMethod, Factors, output_moment, project


class ROMOptions(MethodOptions):
    """What a layer's outputs are collected on."""

    sequential: bool = Field(
        default=True,
        title="Layer after layer",
        description="Collect each layer's outputs behind the layers of its own block that are finished. Off: behind the finished blocks only.",
    )


class ROM(FactorMethod):
    """Uncentred, on what the compressed layers before put out. The same product as SVD-LLM's on the same statistics."""

    name = "rom"
    title = "LLM-ROM"
    summary = (
        "Projects each matrix on the directions in which its outputs vary most, block after block, so that each sees what earlier ones lost. Seconds a block."
    )
    citation = "Chavan et al. 2023, Rethinking compression: reduced order modelling of latent features in large language models, arXiv 2312.07046."
    cost = "Seconds a block; each block is walked four times so that its layers see what the earlier ones lost."
    use_when = "Choose it for deep cuts in the last blocks, where errors of early layers have time to be seen."
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    Options = ROMOptions

    def within_block(self, options: ROMOptions) -> bool:
        """With `sequential` each layer sees what the factored ones before it in its block put out."""
        return options.sequential

    def factor(self, weight_NK: Tensor, rank: int, stats: Statistics, options: Any) -> Factors:
        """V V^T W with V the principal directions of E[y y^T]."""
        return project(weight_NK, output_moment(weight_NK, stats["gram"]), rank)
