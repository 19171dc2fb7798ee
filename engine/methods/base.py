"""What every compression method is: a description of itself and one function. Knows matrices and schemes; no models, no files.

A new method is one file in the folder of its family with one subclass of `LinearMethod`, and one test file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from bitpress.engine.errors import InputError
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.quantize.pipeline import Codes
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Scheme, WeightScheme
from bitpress.kernels.formats import PackedTensor

if TYPE_CHECKING:
    from bitpress.engine.scene import Scene

Family = Literal["prepare", "quantize", "prune", "lowrank", "share", "kvcache", "distill"]
Statistics = Mapping[str, Tensor]  # of one layer's inputs, by name, such as "second_moment" [K]


class MethodOptions(BaseModel):
    """Base of a method's options. Fields carry title, description and bounds: the form on screen is drawn from them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Outcome(NamedTuple):
    """What a method made of one matrix: the weights it now stands for and, once quantised, what is stored.

    codes: uniform codes, packed by `engine.compress` in whatever layout the scheme has for them (2:4 too). packed: a matrix of any other
    format, ready to be stored; its layout must be `accounting.layout_of(scheme)`. NF4 and FP4 come from `kernels.tables.pack_table`,
    binary codes from `kernels.binary.pack_binary`. Pruned weights need neither: their zeros are found.
    notes: what a person should know of how it went, such as a remedy that was needed; told in the run's events.
    factors: the left [N, r] and right [r, K] factor, each what a method made of it, where the matrix is their product.
    """

    weight_NK: Tensor  # float32
    codes: Codes | None = None
    packed: PackedTensor | None = None
    notes: tuple[str, ...] = ()
    factors: tuple["Outcome", "Outcome"] | None = None
    bias_N: Tensor | None = None  # added to the layer's own


class Method(ABC):
    """The description that every method gives of itself, whatever it acts on."""

    name: ClassVar[str]
    title: ClassVar[str]
    family: ClassVar[Family]
    summary: ClassVar[str]  # two sentences: what it does, what it costs
    citation: ClassVar[str]
    cost: ClassVar[str] = ""  # a sentence: time, and what grows it
    use_when: ClassVar[str] = ""  # a sentence: when to choose it
    gradients: ClassVar[bool] = False  # whether it trains something
    precise: ClassVar[bool] = False  # whether its statistics come of a float32 walk also where bfloat16 is faster
    acts_on: ClassVar[str]
    ability: ClassVar[Ability]
    needs: ClassVar[frozenset[str]] = frozenset()  # statistics of the calibration walk
    Options: ClassVar[type[MethodOptions]] = MethodOptions

    def needs_for(self, options: Any) -> frozenset[str]:
        """The statistics it needs with these options."""
        return self.needs

    def within_block(self, options: Any) -> bool:
        """Whether layers should see what the finished layers before them in their own block put out, not only those of earlier blocks."""
        return False

    def satisfies(self, scheme: Scheme) -> bool:
        """True when this method gives a layer a part of what its scheme asks for."""
        return self.ability.satisfies(scheme)

    def weights_of(self, scheme: Scheme) -> WeightScheme:
        """What a scheme asks of the weights. Raises ValueError when that is nothing."""
        if scheme.weights is None:
            raise ValueError(f"{self.name} was given a scheme without weights")
        return scheme.weights

    def parse(self, options: Mapping[str, Any]) -> MethodOptions:
        """Checked options. Raises InputError that names the field."""
        try:
            return self.Options.model_validate(dict(options))
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise InputError(f"The options of {self.name} cannot be used.", f"{told}.", "`bitpress methods` lists them.") from None

    def describe(self) -> dict[str, Any]:
        """The method's entry of the catalogue."""
        return {
            "id": self.name,
            "title": self.title,
            "family": self.family,
            "summary": self.summary,
            "citation": self.citation,
            "cost": self.cost,
            "use_when": self.use_when,
            "needs": sorted(self.needs),
            "gradients": self.gradients,
            "acts_on": self.acts_on,
            "ability": self.ability.model_dump(mode="json"),
            "options": self.Options.model_json_schema(),
        }


class LinearMethod(Method):
    """A method that acts on one weight matrix at a time."""

    acts_on: ClassVar[str] = "linear"

    @abstractmethod
    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: Any) -> Outcome:
        """Bring one matrix to its scheme.

        weight_NK: float32 [N outputs, K inputs], finite; must not be changed in place. scheme: one that `satisfies`.
        stats: what `needs` names, of this layer's inputs. options: an instance of `Options`.
        """


class LearnedWeight(nn.Module, ABC):
    """One matrix while the block or the model around it is optimised. notes: what a person should know of its start, told in the run's events."""

    notes: tuple[str, ...] = ()

    @abstractmethod
    def forward(self) -> Tensor:
        """The matrix as it would be stored now, float32 [N, K], with gradients for the parameters."""

    @abstractmethod
    def rates(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups: `params` and their `lr`."""

    @abstractmethod
    def outcome(self) -> Outcome:
        """What is stored: the codes dequantise to what `forward` gives in `eval` mode."""


class BlockOptions(MethodOptions):
    """How a block is optimised (engine.blockwise). Every method that is has these, so that budgets can be made equal."""

    steps: int = Field(
        default=200, ge=0, le=20000, title="Steps a block",
        description="Optimiser steps for each block; 0 keeps the start. Time grows in proportion.",
    )  # fmt: skip
    sequences: int = Field(default=2, ge=1, le=64, title="Sequences a step", description="Calibration sequences that each step looks at.")
    held_out: int = Field(
        default=8, ge=1, le=256, title="Sequences held out",
        description="Calibration sequences that are not trained on. The state of least error on them is kept, the start included.",
    )  # fmt: skip
    mixing: float = Field(
        default=0.5, ge=0.0, le=1.0, title="Share of dense inputs",
        description="Each number that enters a block is taken from the dense model with this probability, else from the compressed blocks before it.",
    )  # fmt: skip
    by_inputs: bool = Field(
        default=True, title="Weigh the start by inputs",
        description="In the start, errors of weights whose inputs are large count more, by the inputs' mean square on the calibration text.",
    )  # fmt: skip
    compensate: bool = Field(
        default=True, title="Start as GPTQ rounds",
        description="The start makes up for each rounding error in the weights that are rounded later. Off: every weight starts at its own nearest level.",
    )  # fmt: skip
    loss: Literal["per_token", "plain"] = Field(
        default="per_token", title="Error that is lowered",
        description="per_token: each token's squared error over its size, as the next norm sees it. plain: as published; a huge first token can fill it.",
    )  # fmt: skip


class BlockMethod(Method):
    """A method that optimises the matrices of a block together, so that the block's output stays near the dense one's."""

    acts_on: ClassVar[str] = "block"
    gradients: ClassVar[bool] = True
    Options: ClassVar[type[MethodOptions]] = BlockOptions

    def needs_for(self, options: Any) -> frozenset[str]:
        """What weighs the errors of the start, and what makes up for them."""
        wanted = {"gram": options.compensate, "second_moment": options.by_inputs}
        return self.needs | {name for name, needed in wanted.items() if needed}

    @abstractmethod
    def start(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: Any) -> LearnedWeight:
        """One matrix before the first step. Arguments as those of `LinearMethod.apply`."""


class PreparationMethod(Method):
    """A method that changes a dense model so that later stages lose less, and leaves what the model computes as it is."""

    family: ClassVar[Family] = "prepare"
    acts_on: ClassVar[str] = "block"
    ability: ClassVar[Ability] = Ability(part="prepare")


class ScalingMethod(PreparationMethod):
    """A preparation that moves a factor for each input from the linears that read it to the module before them."""

    def kinds(self, options: Any) -> frozenset[str]:
        """Which links it scales: linears after a "norm", `o` after "v", `down` after "up" (engine.model.links)."""
        return frozenset({"norm"})

    @abstractmethod
    def scale(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Statistics, options: Any) -> Tensor:
        """What to multiply the columns by and divide the inputs by: float64 [K], positive.

        weights: float32 [N, K] of each linear that reads these inputs. schemes: what each becomes later. stats: of the inputs.
        """

    def limits(self, weight_NK: Tensor, scheme: Scheme, gram_KK: Tensor, role: str, options: Any) -> Tensor | None:
        """The largest |weight| that each group of each row may keep, [N, G]; None leaves the matrix alone. Only this step loses anything."""
        return None


class TurningMethod(PreparationMethod):
    """A preparation of the whole model that looks at no text."""

    acts_on: ClassVar[str] = "model"

    @abstractmethod
    def turn(self, model: nn.Module, anatomy: Anatomy, seed: int, options: Any) -> tuple[str, ...]:
        """Change a model in place, by new parameters and hooks; the same seed gives the same model. Returns notes for the run's events."""


@dataclass(frozen=True)
class Lesson:
    """One step of training a student beside its teacher: B sequences of T tokens, states of width d behind the last norm.

    chosen_B: which of the text's `sequences` they are. over_logits(f): the sum of f(student [P, V], teacher [P, V]) over slices of
    the B * T positions, float32 logits with gradients for the student.
    """

    chosen_B: Tensor
    sequences: int
    student_BTd: Tensor
    teacher_BTd: Tensor
    over_logits: Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]


class Objective(ABC):
    """What a student is asked for, with all that it remembers from step to step. reads_states: whether it looks at hidden states."""

    reads_states: bool = False

    @abstractmethod
    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        """Scalars by name; their sum is minimised."""

    def state(self) -> dict[str, Tensor]:
        """What it remembers, for a training that is resumed."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most remember nothing
        """Take back what `state` gave."""


class TrainingOptions(MethodOptions):
    """How a whole model is trained (engine.train). Every method that does has these, so that budgets can be made equal."""

    steps: int = Field(default=300, ge=0, le=100_000, title="Steps", description="Optimiser steps; 0 keeps the start. Time grows in proportion.")
    sequences: int = Field(default=4, ge=1, le=256, title="Sequences a step", description="Calibration sequences that each step looks at.")
    held_out: int = Field(
        default=8, ge=1, le=256, title="Sequences held out",
        description="Calibration sequences that are not trained on; the divergence from the dense model on them is told as it falls.",
    )  # fmt: skip


class ModelMethod(Method):
    """A method that trains the matrices of all blocks together, and the embedding and head with them where the recipe gives them a width."""

    acts_on: ClassVar[str] = "model"
    gradients: ClassVar[bool] = True
    Options: ClassVar[type[MethodOptions]] = TrainingOptions

    @abstractmethod
    def start(self, weight_NK: Tensor, scheme: Scheme, options: Any) -> LearnedWeight:
        """One matrix before the first step. Arguments as those of `LinearMethod.apply`."""

    @abstractmethod
    def objective(self, options: Any) -> Objective:
        """What is to be minimised, at the start of a training."""


class ShapeMethod(Method):
    """A method that decides what goes of a model, before any single matrix is looked at: blocks, heads, neurons, or each layer's share of zeros.

    What it decides is written into the run, so that resuming and loading never decide again.
    """

    acts_on: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def reads_text(self, options: Any) -> bool:
        """Whether it looks at text with these options."""
        return "text" in self.needs

    @abstractmethod
    def shape(self, scene: "Scene", options: Any) -> None:
        """Take out of the scene's model what is to go, through the scene. options: an instance of `Options`."""


def finite(weight_NK: Tensor, layer: str) -> Tensor:
    """The same weights. Raises InputError that names the layer when a value is NaN or infinite."""
    # A sum is not finite whenever a term is not, and is far cheaper than a mask; float64 cannot overflow here.
    if not bool(weight_NK.sum(dtype=torch.float64).isfinite()):
        bad = int((~weight_NK.isfinite()).sum())
        why = f"{bad:,} of its {weight_NK.numel():,} weights are not finite numbers."
        raise InputError(f"The layer {layer} cannot be compressed.", why, "Load an undamaged copy of the model, or leave this layer dense.")
    return weight_NK
