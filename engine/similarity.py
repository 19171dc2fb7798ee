"""How alike a model's tokens are: cosines of pairs of tokens, dense and compressed (METHODS 12.1, 12.5). Few bits can make tokens look the same.

Two kinds of pairs: rows of the embedding, and last hidden states within one window of text. `engine.similarity_file` says how they are kept.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine.measure.logits import WholeScorer, scorer_of
from bitpress.engine.similarity_file import SIDES
from bitpress.kernels.packed import PackedEmbedding

PAIRS = 20_000
BINS = 40
TOKENS = 256  # of the window that are read
Similarity = dict[str, dict[str, dict[str, Any]]]  # kind -> side -> mean and histogram


@torch.inference_mode()
def similarity(dense: nn.Module, compressed: nn.Module, ids_NT: Tensor, seed: int = 0) -> Similarity:
    """Both kinds, for both sides, on the same pairs. ids_NT: windows, of which the first is read.

    A model that shows no hidden states has the first kind only.
    """
    draw = torch.Generator().manual_seed(seed)
    sides: dict[str, Any] = dict(zip(SIDES, (dense, compressed), strict=True))
    embedding = sides["dense"].get_input_embeddings() if hasattr(dense, "get_input_embeddings") else None
    found: Similarity = {}
    if embedding is not None:
        pairs_2P = _pairs(embedding.num_embeddings, draw)
        found["embedding"] = {side: described(_cosines(*(_rows(model, part) for part in pairs_2P))) for side, model in sides.items()}
    if not any(isinstance(scorer_of(model), WholeScorer) for model in sides.values()):
        ids_1T = ids_NT[:1, :TOKENS]
        pairs_2P = _pairs(ids_1T.shape[1], draw)
        states = {side: scorer_of(model).hidden(ids_1T)[0] for side, model in sides.items()}
        found["last state"] = {side: described(_cosines(*(state_Td[part] for part in pairs_2P))) for side, state_Td in states.items()}
    return found


def _pairs(count: int, draw: torch.Generator) -> Tensor:
    """Pairs of two different numbers below `count`, [2, P]."""
    first_P = torch.randint(count, (PAIRS,), generator=draw)
    return torch.stack([first_P, (first_P + torch.randint(1, count, (PAIRS,), generator=draw)) % count])


def _rows(model: Any, ids_P: Tensor) -> Tensor:
    module = model.get_input_embeddings()
    return module(ids_P) if isinstance(module, PackedEmbedding) else module.weight[ids_P]


def _cosines(one_Pd: Tensor, other_Pd: Tensor) -> Tensor:
    return torch.cosine_similarity(one_Pd.float(), other_Pd.float(), dim=-1)


def described(cosines_P: Tensor) -> dict[str, Any]:
    """Mean and histogram of cosines."""
    counts = torch.histc(cosines_P.clamp(-1, 1), BINS, -1, 1)
    return {"mean": round(float(cosines_P.mean()), 5), "share": [round(float(count) / len(cosines_P), 5) for count in counts]}
