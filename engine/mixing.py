"""What attention makes of values: the moments of their mixes, and what the output matrix takes of them. Knows one block's heads; no methods.

A value head v of C channels reaches the residual stream as W_h (sum_t a_t v_t) through every query head h that looks at it. An error E v
in it costs sum_h E ||W_h E z_h||^2, z_h being what head h mixes: tr(T E M E^T), were T = sum_h W_h^T W_h and M = sum_h E[z_h z_h^T] of one
head each, and near that where heads are alike. Mixing averages what differs from token to token, so M is far from the moment of the
values themselves. Tokens count by what an error at them does to the predictions (engine.token_weights): the first of a text has huge mixes
that nothing depends on. Shape letters: G heads of values, C channels of a head, H query heads, D hidden width.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitpress.engine.calibrate import walk
from bitpress.engine.errors import InputError
from bitpress.engine.methods.base import Statistics
from bitpress.engine.methods.lowrank.pipeline import energies
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.model.load import Loaded
from bitpress.engine.token_weights import levelled, token_squares


class Mixed(NamedTuple):
    """M and T of every value head, float64 [G, C, C] each."""

    mixed_GCC: Tensor
    taken_GCC: Tensor


def readers(places: Collection[str], anatomy: Anatomy) -> dict[str, Part]:
    """The output matrix that reads each of these value matrices. Raises InputError for one of another role."""
    found = {}
    for place in places:
        part = anatomy.by_name[place]
        reader = next((other for other in anatomy.linears if (other.block, other.role) == (part.block, "o")), None)
        if part.role != "v" or reader is None:
            what = f"{place} cannot be factored by what attention makes of it."
            raise InputError(what, "Only values are mixed by attention and read by a matrix.", "Point another stage, such as svd-llm, at the keys.")
        found[place] = reader
    return found


def with_mixed(stats: Mapping[str, Statistics], reader_of: Mapping[str, Part], model: nn.Module, anatomy: Anatomy) -> dict[str, Statistics]:
    """The statistics of a block with those of its values, for which the output matrix's inputs were heard."""
    found = dict(stats)
    for place, reader in reader_of.items():
        if "loss_gram" in stats.get(reader.name, {}):
            made = mixed_of(model, anatomy, reader, stats[reader.name]["loss_gram"])
            found[place] = {**stats.get(place, {}), "mixed": made.mixed_GCC, "taken": made.taken_GCC}
    return found


def mixed_of(model: nn.Module, anatomy: Anatomy, reader: Part, gram_KK: Tensor) -> Mixed:
    """Of one block, from the second moment of what its output matrix reads."""
    weight_DK = surgery.linear_weight(surgery.get(model, reader.name)).detach().double()
    units = anatomy.units_of(reader.block or 0)
    attention = surgery.get(model, reader.name.rpartition(".")[0])
    looked_at = getattr(attention, "key_head_of", None)  # where groups of query heads are of unlike size
    group_of = torch.arange(units.heads) // (units.heads // units.kv_heads) if looked_at is None else looked_at
    mixed, taken = [], []
    for group in range(units.kv_heads):
        runs = [slice(head * anatomy.head_dim, (head + 1) * anatomy.head_dim) for head in (group_of == group).nonzero()[:, 0].tolist()]
        mixed.append(torch.stack([gram_KK[run, run].double() for run in runs]).sum(0))
        taken.append(torch.stack([weight_DK[:, run].t() @ weight_DK[:, run] for run in runs]).sum(0))
    return Mixed(torch.stack(mixed), torch.stack(taken))


def value_losses(loaded: Loaded, ids_SL: Tensor, should_stop: Callable[[], bool] = lambda: False) -> list[list[float]]:
    """For every block, what the predictions lose, up to a factor that all blocks share, when each value head keeps 0, 1, .. C numbers a token.

    Raises Cancelled when told to stop.
    """
    anatomy, found = loaded.anatomy, []
    outputs = [part for part in anatomy.linears if part.role == "o"]
    squares = token_squares(loaded.model, anatomy, ids_SL, [part.name for part in outputs], should_stop=should_stop)

    def keep(block: int, stats: Mapping[str, Statistics]) -> None:
        part = outputs[block]
        moments, units = mixed_of(loaded.model, anatomy, part, stats[part.name]["loss_gram"]), anatomy.units_of(block)
        carried_GC = torch.stack([energies(mixed_CC, taken_CC)[2].square() for mixed_CC, taken_CC in zip(*moments, strict=True)])
        scale = float(squares[part.name].mean()) * units.kv_heads / units.heads  # M and T sum over the heads of a group
        found.append([*(scale * carried_GC.sum(0).flip(0).cumsum(0).flip(0)).tolist(), 0.0])

    weights = {name: levelled(squares_SL) for name, squares_SL in squares.items()}
    walk(loaded.model, anatomy, ids_SL, {part.name: {"loss_gram"} for part in outputs}, keep, sequential=False, should_stop=should_stop, weights=weights)
    return found
