"""All quick kinds from one forward and one backward: what the gradients that are heard say of every option. Knows options; the probes are not its own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitpress.engine import sensitivity_fisher as fisher
from bitpress.engine.model import surgery
from bitpress.engine.sensitivity_cache import CACHE_AXES, in_cache
from bitpress.engine.sensitivity_file import ACTIVATION, CACHE_BITS, DATA_FREE, DROP, EMBEDDING_BITS, FISHER, cache_layer
from bitpress.engine.sensitivity_options import made_of, rows_scheme, weighted_errors
from bitpress.engine.sensitivity_scoring import Scoring


def score_by_backward(scoring: Scoring, ids_SL: Tensor, kinds: Sequence[str]) -> None:
    """Every layer, block, cache and end. ids_SL: int64 [S, L]. Cheap enough to begin anew after a stop."""
    scoring.report.scores = [score for score in scoring.report.scores if score.kind not in kinds]
    scoring.stand.clear()
    model, anatomy = scoring.loaded.model, scoring.loaded.anatomy
    ids_SL = ids_SL.to(next(model.parameters()).device)
    heard = _Backward(scoring, ids_SL, kinds)
    embedding = surgery.get(model, anatomy.embedding.name)
    scoring.emit("stage_started", {"stage": "measuring sensitivity", "total": len(anatomy.linears)})
    fisher.listen(model, ids_SL, _listened_to(heard, embedding), heard.hear, embedding, should_stop=scoring.should_stop)
    heard.finish()


def _listened_to(heard: "_Backward", embedding: nn.Module) -> dict[str, nn.Module]:
    """Linears, whole blocks, the embedding and the head, by name."""
    model, anatomy = heard.scoring.loaded.model, heard.scoring.loaded.anatomy
    modules = {part.name: surgery.get(model, part.name) for part in anatomy.linears}
    modules |= {f"{anatomy.block_prefix}.{index}": block for index, block in enumerate(surgery.get(model, anatomy.block_prefix).children())}
    modules[anatomy.embedding.name] = embedding
    if anatomy.head is not None:
        modules[anatomy.head.name] = surgery.get(model, anatomy.head.name)
    elif head := fisher.tied_head(model, embedding):
        modules[heard.tie(head[0])] = head[1]
    return modules


class _Backward:
    """Turns inputs and gradients of every module into scores, as they are heard."""

    def __init__(self, scoring: Scoring, ids: Tensor, kinds: Sequence[str]) -> None:
        self.scoring, self.ids, self.kinds = scoring, ids, kinds
        anatomy = scoring.loaded.anatomy
        self.linears = {part.name for part in anatomy.linears}
        self.ends = {part.name: part.name for part in (anatomy.embedding, anatomy.head) if part}
        self.errors = {name: self._end_errors(name) for name in self.ends}
        self.products: dict[tuple[str, str], list[Tensor]] = {}
        self.sides: dict[tuple[int, int], list[Tensor]] = {}
        self.heard = 0

    def tie(self, head: str) -> str:
        """The name under which the tied head is heard; what it adds belongs to the embedding."""
        self.ends[head] = self.scoring.loaded.anatomy.embedding.name
        return head

    def _end_errors(self, name: str) -> dict[str, Tensor]:
        weight_VD, dtype = self.scoring.weight(name), fisher.compute_dtype(self.ids.device.type)
        return {f"{bits}-bit": (made_of(weight_VD, rows_scheme(bits)) - weight_VD).to(dtype) for bits in EMBEDDING_BITS}

    def hear(self, name: str, x: Tensor, y: Tensor, gradient: Tensor) -> None:
        """One module's turn; layers come from the last to the first."""
        if name in self.linears:
            self.linear(name, x, gradient)
            self.cached(name, y, gradient)
        elif name in self.ends:
            self.end(name, x, gradient)
        else:
            self.positions(name, DROP, ((x - y) * gradient).flatten(0, -2).sum(-1, dtype=torch.float32))

    def linear(self, name: str, x_SLK: Tensor, gradient_SLN: Tensor) -> None:
        scoring, x_MK = self.scoring, x_SLK.flatten(0, -2)
        weight_NK = scoring.weight(name)
        weights_K = {DATA_FREE: torch.ones(weight_NK.shape[1]), ACTIVATION: x_MK.float().square().mean(0)}
        errors_ONK = torch.empty((len(scoring.report.options), *weight_NK.shape), dtype=x_MK.dtype, device=x_MK.device)
        for error_NK, option in zip(errors_ONK, scoring.report.options, strict=True):
            made_NK = made_of(weight_NK, option.scheme)
            for kind, score in weighted_errors(weight_NK, made_NK, weights_K).items():
                if kind in self.kinds:
                    scoring.keep(name, option.id, kind, score)
            torch.sub(made_NK, weight_NK, out=made_NK)
            error_NK.copy_(made_NK)
        sums_OW = fisher.window_products(self.in_windows(x_SLK), errors_ONK, self.in_windows(gradient_SLN))
        for option, sums_W in zip(scoring.report.options, sums_OW, strict=True):
            scoring.stand.setdefault(name, []).append(fisher.stands_on(sums_W))
            self.keep(name, option.id, sums_W)
        self.heard += 1
        scoring.emit("progress", {"done": self.heard, "total": len(self.linears)})

    def in_windows(self, rows: Tensor) -> Tensor:
        """Rows of whatever shape a module has for them, [windows, positions, N]."""
        return fisher.in_windows(rows.reshape(*self.ids.shape, rows.shape[-1]))

    def cached(self, name: str, y_SLN: Tensor, gradient_SLN: Tensor) -> None:
        """Keys or values of a block as a cache of few bits holds them; both sides are needed for a score."""
        part = self.scoring.loaded.anatomy.by_name[name]
        if part.role in CACHE_AXES and part.block is not None:
            for bits in CACHE_BITS:
                error_SLN = in_cache(y_SLN, bits, CACHE_AXES[part.role]) - y_SLN.float()
                self.sides.setdefault((part.block, bits), []).append((error_SLN * gradient_SLN).sum(-1, dtype=torch.float32))

    def end(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Rows that are looked up, or logits of a slice of positions: kept until all of both are heard."""
        for option, error_VD in self.errors[self.ends[name]].items():
            if x.is_floating_point():
                product = ((gradient @ error_VD.to(gradient.dtype)) * x).sum(-1, dtype=torch.float32)
            else:
                product = (torch.nn.functional.embedding(x, error_VD) * gradient).sum(-1, dtype=torch.float32)
            self.products.setdefault((name, option), []).append(product.flatten())

    def positions(self, name: str, option: str, products: Tensor) -> None:
        """Keep what is known of single positions, in the order of the tokens."""
        self.keep(name, option, fisher.in_windows(products.view_as(self.ids)[..., None]).float().sum((1, 2)))

    def keep(self, name: str, option: str, sums_W: Tensor) -> None:
        self.scoring.keep(name, option, FISHER, fisher.second_order(sums_W) / self.ids.numel())

    def finish(self) -> None:
        """The embedding and what is tied to it, position by position."""
        totals: dict[tuple[str, str], Tensor] = {}
        for (name, option), pieces in self.products.items():
            key = (self.ends[name], option)
            totals[key] = totals.get(key, torch.zeros(())) + torch.cat(pieces)
        for (name, option), products_M in totals.items():
            self.positions(name, option, products_M)
        for (block, bits), sides in self.sides.items():
            if len(sides) == len(CACHE_AXES):
                self.positions(cache_layer(block), f"{bits}-bit", sides[0] + sides[1])
