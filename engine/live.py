"""One model at hand whose layers change one at a time: only what a recipe changes is made anew, and only what comes after it is run again.

Knows schemes, weights and windows; no orders and no files. Layers are made by methods that look at no text, and computed on as the
weights that their codes stand for: what is measured is what packed layers would give.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitpress.engine.errors import InputError
from bitpress.engine.measure.interval import Interval
from bitpress.engine.measure.perplexity import Quality
from bitpress.engine.methods import registry
from bitpress.engine.methods.ability import wanted_parts
from bitpress.engine.methods.base import LinearMethod, finite
from bitpress.engine.model import surgery
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import EmbeddingScheme, Recipe, Scheme, Structure
from bitpress.engine.sensitivity_options import rows_scheme
from bitpress.engine.sensitivity_truth import Prefixes

BATCH = 8  # windows that share a forward; an order that is superseded stops between two blocks
PLAIN = ("magnitude", "rtn")


@dataclass(frozen=True)
class Scored:
    """What one window said, and the ratio of perplexities over all windows so far."""

    index: int
    nll_dense: float
    nll: float
    ratio: Interval | None


@dataclass
class Change:
    """What an order changed: layers made anew, the first block that must run again, how long the making took, and what stood in for a method."""

    layers: list[str] = field(default_factory=list)
    lowest: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


class Live:
    """A twin of the dense model under a recipe that keeps changing, on the windows of one text.

    ids_NT: N windows of T tokens. The first use takes one forward of the dense model, whose states are kept for every block.
    """

    def __init__(self, loaded: Loaded, ids_NT: Tensor) -> None:
        self.loaded, self.ids_NT = loaded, ids_NT
        self.twin = surgery.twin(loaded.model)
        self.prefixes = Prefixes(self.twin, loaded.anatomy, ids_NT, BATCH)
        self.tied = _sharing(self.twin)
        self.made: dict[str, object] = {}  # layer -> what it was made by; absent layers are dense
        with self.prefixes.open():
            self.prefixes.take()
            self.prefixes.refer()
        self.stale = [loaded.anatomy.blocks] * len(self.prefixes.ids)  # per batch: the first block whose states are not those of now

    def turn(self, recipe: Recipe, should_stop: Callable[[], bool] = lambda: False) -> Change:
        """Bring the twin to a recipe. Raises InputError for what a live session cannot show."""
        check(recipe)
        began = time.perf_counter()
        schemes = recipe.resolve(self.loaded.anatomy)
        wanted, notes = self._wanted(recipe, schemes)
        changed = [name for name in self.loaded.anatomy.by_name if self.made.get(name) != wanted.get(name)]
        for name in changed:
            if should_stop():
                break
            self._make(name, wanted.get(name), recipe, schemes)
        lowest = min((self._first_block(name) for name in changed), default=self.loaded.anatomy.blocks)
        return Change(changed, lowest, time.perf_counter() - began, notes)

    def _wanted(self, recipe: Recipe, schemes: dict[str, Scheme]) -> tuple[dict[str, object], tuple[str, ...]]:
        """Layer -> (scheme, methods); and in whose stead a plain method stands."""
        anatomy = self.loaded.anatomy
        found: dict[str, object] = {}
        notes: dict[str, None] = {}
        chosen: dict[Scheme, tuple[tuple[str, ...], list[str]]] = {}  # most layers share a scheme
        for name, scheme in schemes.items():
            if scheme.is_dense:
                continue
            if scheme not in chosen:
                methods, told = plain_methods(scheme, recipe)
                chosen[scheme] = tuple(method.name for method in methods), told
            found[name] = (scheme, chosen[scheme][0])
            notes |= dict.fromkeys(chosen[scheme][1])
        for part, end in ((anatomy.embedding, recipe.embedding), (anatomy.head, recipe.head)):
            if part is not None and end is not None:
                found[part.name] = end
        return found, tuple(notes)

    def _make(self, name: str, wanted: object, recipe: Recipe, schemes: dict[str, Scheme]) -> None:
        dense, module = surgery.get(self.loaded.model, name), surgery.get(self.twin, name)
        stored = _weight(dense)
        if wanted is None:
            self._put(module, stored)
        else:
            weight_NK = finite((stored if isinstance(dense, nn.Embedding) else surgery.linear_weight(dense)).detach().float(), name)
            scheme = rows_scheme(wanted.bits) if isinstance(wanted, EmbeddingScheme) else schemes[name]
            for method in plain_methods(scheme, recipe)[0]:
                weight_NK = method.apply(weight_NK, scheme, {}, method.parse({})).weight_NK
            turned = weight_NK.t().contiguous() if isinstance(dense, Conv1D) else weight_NK
            self._put(module, nn.Parameter(turned.to(stored.dtype), requires_grad=False))
        self.made = {key: value for key, value in self.made.items() if key != name} | ({name: wanted} if wanted is not None else {})
        first = self._first_block(name)
        self.stale = [min(block, first) for block in self.stale]

    def _put(self, module: nn.Module, weight: nn.Parameter) -> None:
        """Also into whatever is tied to the module."""
        for one in self.tied.get(module, [module]):
            one.weight = weight

    def _first_block(self, name: str) -> int:
        part = self.loaded.anatomy.by_name[name]
        if part.block is not None:
            return part.block
        return -1 if part.name == self.loaded.anatomy.embedding.name else self.loaded.anatomy.blocks

    def windows(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[Scored, Quality]]:
        """Score every window under the weights of now, re-using the states below the lowest changed block. Ends early when told to stop."""
        quality = Quality(asked=len(self.ids_NT))
        for number in range(len(self.prefixes.ids)):
            with self.prefixes.open():
                if not self._catch_up(number, should_stop):
                    return
                scores = self.prefixes.score(number)
            for nll_dense_P, nll_P, kl_P, same_P in scores:
                quality.nll_dense.append(float(nll_dense_P.double().mean()))
                quality.nll.append(float(nll_P.double().mean()))
                quality.kl_P.append(kl_P)
                quality.same_P.append(same_P)
                yield Scored(quality.windows - 1, quality.nll_dense[-1], quality.nll[-1], quality.ratio()), quality

    def _catch_up(self, number: int, should_stop: Callable[[], bool]) -> bool:
        """Run a batch through the blocks whose states are not those of now. False when told to stop; what was run by then is kept."""
        if self.stale[number] < 0:
            self.prefixes.enter_again(number)
            self.stale[number] = 0
        for block in range(self.stale[number], self.loaded.anatomy.blocks):
            if should_stop():
                return False
            self.prefixes.advance(number, block)
            self.stale[number] = block + 1
        return True


def check(recipe: Recipe) -> None:
    """Raises InputError for a structure other than the dense one: it changes the model's shape, which a run does."""
    if recipe.structure != Structure():
        why = "It changes the model's shape, and a live session changes weights only."
        raise InputError("This recipe cannot be shown live.", why, "Press Compress to measure it.")


def plain_methods(scheme: Scheme, recipe: Recipe) -> tuple[list[LinearMethod], list[str]]:
    """A method that needs no text for every part of a scheme: the recipe's own where it is one, else the plain one, told in a sentence.

    Raises InputError for a part that no such method makes.
    """
    every = registry.all_methods()
    staged = [every[stage.method] for stage in recipe.stages if stage.method in every]
    found: list[LinearMethod] = []
    notes: list[str] = []
    for part in wanted_parts(scheme):
        able = [method for method in staged if method.ability.part == part and method.satisfies(scheme)]
        pool = (*able, *(every[name] for name in PLAIN if name in every), *every.values())
        usable = [method for method in pool if isinstance(method, LinearMethod) and _plain(method, part, scheme)]
        if not usable:
            raise InputError("This recipe cannot be shown live.", f"No method makes {part} of this kind without looking at text.", "Press Compress.")
        if able and usable[0] is not able[0]:
            notes.append(f"{usable[0].title} stands in for {able[0].title}, which looks at text: press Compress for that.")
        found.append(usable[0])
    return found, notes


def _plain(method: LinearMethod, part: str, scheme: Scheme) -> bool:
    return not method.needs and not method.gradients and method.ability.part == part and method.satisfies(scheme)


def _sharing(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The modules that share their weight with others, each with all of them."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            holders.setdefault(id(module.weight), []).append(module)
    return {module: together for together in holders.values() if len(together) > 1 for module in together}


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
