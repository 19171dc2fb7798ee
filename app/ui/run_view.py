"""A run as the screens show it, folded from its events one after the other. Knows the event kinds of DESIGN 7; reads no file.

`fold` never goes back: a page keeps the view and the number of the last event, and asks the run for later ones only.
A resumed run tells what it does again from index 0, and only that: a window or token replaces the one of its index and all after it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import exp, fsum
from typing import Any

from bitpress.engine.runs.events import Event

KEPT_RESOURCES = 240


@dataclass
class Window:
    """One scored window: mean negative log-likelihoods, and the running perplexity ratio with its 95 % interval so far."""

    index: int
    nll_dense: float | None
    nll: float
    ratio: float | None
    low: float | None
    high: float | None


@dataclass
class Training:
    """What a training has said: one block's, or the whole model's (`block` None). `points`: its data by step; all have `held_out`."""

    block: int | None
    steps: int
    points: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """Step and error on the sequences that are not trained on, where it was measured."""
        return [(step, float(data["held_out"])) for step, data in self.points.items() if isinstance(data.get("held_out"), int | float)]

    @property
    def last(self) -> int:
        """The last step that was heard of."""
        return max(self.points, default=0)


@dataclass
class RunView:
    """Everything a live panel draws. `layers` by name: the data of `layer_done`; `samples` by (prompt, side): token records.

    trainings: by block, -1 for one of the whole model. trials: what a search tried, in order.
    """

    cursor: int = 0
    phase: str = ""
    done: int = 0
    total: int = 0
    eta_s: float | None = None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    windows: list[Window] = field(default_factory=list)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    resources: list[dict[str, float]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    trainings: dict[int, Training] = field(default_factory=dict)
    training: int | None = None  # the one under way
    trials: list[dict[str, Any]] = field(default_factory=list)

    def errors(self) -> dict[str, float]:
        """Relative error by layer, of the layers that have one."""
        return {name: float(data["error"]) for name, data in self.layers.items() if isinstance(data.get("error"), int | float)}

    def perplexities(self) -> tuple[list[float], list[float]]:
        """Running perplexity of dense and compressed after each window: the exponential of the mean of window means."""
        return running_perplexity([w.nll_dense for w in self.windows if w.nll_dense is not None]), running_perplexity([w.nll for w in self.windows])


def running_perplexity(means: list[float]) -> list[float]:
    """exp(mean of the first k window means) for every k."""
    return [_exp(fsum(means[: count + 1]) / (count + 1)) for count in range(len(means))]


def _exp(value: float) -> float:
    return exp(value) if value < 700 else float("inf")


def fold(view: RunView, events: Iterable[Event]) -> RunView:
    """Take events into the view, in place. What landed in this call is in `fresh`. Kinds of a newer Bitpress are passed over."""
    view.fresh = set()
    for event in events:
        if event.n <= view.cursor:
            continue
        view.cursor = event.n
        handler = _HANDLERS.get(event.kind)
        if handler:
            handler(view, event.data)
    return view


def _stage(view: RunView, data: Mapping[str, Any]) -> None:
    view.phase = str(data.get("stage") or data.get("phase") or data.get("name") or "")
    view.training, view.trials = None, []
    view.done, view.total, view.eta_s = 0, int(data.get("total") or 0), None


def _progress(view: RunView, data: Mapping[str, Any]) -> None:
    view.done, view.total = int(data.get("done", view.done)), int(data.get("total") or view.total)
    view.eta_s = data.get("eta_s")


def _layer(view: RunView, data: Mapping[str, Any]) -> None:
    name = str(data.get("layer"))
    view.layers[name] = dict(data)
    view.fresh.add(name)
    view.training = None


def _window(view: RunView, data: Mapping[str, Any]) -> None:
    if "nll" in data:
        index = int(data.get("index", len(view.windows)))
        bounds = (data.get(key) for key in ("ratio", "low", "high"))
        view.windows = [*(window for window in view.windows if window.index < index), Window(index, data.get("nll_dense"), float(data["nll"]), *bounds)]


def _metrics(view: RunView, data: Mapping[str, Any]) -> None:
    for side, values in (data.get("metrics") or data).items():
        if isinstance(values, Mapping):
            view.metrics.setdefault(side, {}).update(values)


def _sample(view: RunView, data: Mapping[str, Any]) -> None:
    key = (str(data.get("prompt", "")), str(data.get("side", "compressed")))
    earlier = view.samples.get(key, [])
    view.samples[key] = [*earlier[: int(data.get("index", len(earlier)))], dict(data)]


def _resources(view: RunView, data: Mapping[str, Any]) -> None:
    view.resources = [*view.resources[-KEPT_RESOURCES:], dict(data)]


def _note(view: RunView, data: Mapping[str, Any]) -> None:
    view.notes.append((str(data.get("level", "info")), str(data.get("text", ""))))


def _training(view: RunView, data: Mapping[str, Any]) -> None:
    block, step = data.get("block"), int(data.get("step") or 0)
    key = -1 if block is None else int(block)
    if step == 0 or key not in view.trainings:
        view.trainings[key] = Training(block, int(data.get("steps") or 0))
    points = view.trainings[key].points  # a training that is resumed goes on from its last checkpoint
    view.trainings[key].points = {**{at: told for at, told in points.items() if at < step}, step: dict(data)}
    view.training = key


def _trial(view: RunView, data: Mapping[str, Any]) -> None:
    view.trials.append(dict(data))


_HANDLERS = {
    "stage_started": _stage, "progress": _progress, "layer_done": _layer, "window": _window, "metrics": _metrics, "sample": _sample,
    "resources": _resources, "note": _note, "block_loss": _training, "train_loss": _training, "trial": _trial,
}  # fmt: skip
