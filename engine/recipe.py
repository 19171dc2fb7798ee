"""What to do to a model: the one exchange object of the system. Knows schemes, stages and their schema; computes nothing on weights.

A recipe is YAML that a person may write by hand. It is strict: an unknown key, a wrong type or a width that no format
has is refused with the field's name. Torch-free, so that the screens can hold one.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, StrictBool, ValidationError

from bitpress.engine.cache_scheme import CACHED, CacheRank, CacheSide, CacheWindow, KVCache, cache_problems, latent_width
from bitpress.engine.errors import InputError
from bitpress.engine.fields import BITS, Strict, Whole
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.scheme import (
    FORMAT_BITS,
    PATTERNS,
    ActivationScheme,
    EmbeddingScheme,
    RankScheme,
    Scheme,
    SchemeLine,
    SparsityScheme,
    WeightPatch,
    WeightScheme,
    scheme_problems,
)
from bitpress.engine.structure import Structure, structure_problems
from bitpress.engine.targets import matches, pattern_problem

__all__ = [
    "BITS", "CACHED", "FORMAT_BITS", "MAX_YAML_BYTES", "PATTERNS", "ActivationScheme", "CacheRank", "CacheSide", "CacheWindow", "Calibration",
    "EmbeddingScheme", "KVCache", "Measure", "Problem", "RankScheme", "Recipe", "Scheme", "SchemeLine", "SparsityScheme", "Stage", "Structure",
    "WeightPatch", "WeightScheme", "latent_width",
]  # fmt: skip - this file is the face of all that a recipe is made of
SCHEMA_VERSION = 1
MAX_YAML_BYTES = 1 << 20
MOST_TOLD = 20  # problems of single layers; a wrong line can be wrong for hundreds
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same safe subset, eight times faster where libyaml is there


class Calibration(Strict):
    """Text the methods may look at: `sequences` pieces of `length` tokens from the `part` of a corpus."""

    text: str = "auto"
    part: Literal["calibration"] = "calibration"
    sequences: Annotated[Whole, Field(ge=1, le=4096)] = 64
    length: Annotated[Whole, Field(ge=8, le=32768)] = 512


class Stage(Strict):
    """One method with its options; it acts on the targets whose scheme its family can satisfy."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    targets: str = "*"


class Measure(Strict):
    """What is measured afterwards: a tier of windows on a corpus, and whether latency is timed."""

    tier: Literal["quick", "standard", "full"] = "quick"
    text: str = "auto"
    latency: StrictBool = True


class Problem(BaseModel):
    """Something in a recipe that does not fit the model: the field, what is wrong, what would be right."""

    field: str
    wrong: str
    right: str

    def __str__(self) -> str:
        return f"{self.field}: {self.wrong} {self.right}"


class Recipe(Strict):
    """The whole plan. Same recipe, model and protocol: same digest."""

    schema_version: Whole = SCHEMA_VERSION
    model: str
    seed: Whole = 0
    calibration: Calibration = Calibration()
    schemes: list[SchemeLine] = Field(default_factory=list)
    embedding: EmbeddingScheme | None = None
    head: EmbeddingScheme | None = None  # only for models whose head is not tied
    structure: Structure = Structure()
    kv_cache: KVCache | None = None
    stages: list[Stage] = Field(default_factory=list)
    measure: Measure = Measure()

    @classmethod
    def from_dict(cls, values: Any) -> "Recipe":
        """Check plain values. Raises InputError that names the field; older schema versions are migrated first."""
        try:
            return cls.model_validate(migrate(values))
        except ValidationError as error:
            raise InputError("This recipe cannot be used.", _explain(error), "Correct the named fields and try again.") from None

    @classmethod
    def from_text(cls, text: str) -> "Recipe":
        """Parse YAML. Raises InputError for text that is no YAML mapping or is larger than 1 MB."""
        if len(text) > MAX_YAML_BYTES:
            why = f"It has {len(text):,} characters; the limit is {MAX_YAML_BYTES:,}."
            raise InputError("The recipe is too large.", why, "A recipe is a page of YAML.")
        try:
            values = yaml.load(text, _YAML_LOADER)
        except yaml.YAMLError as error:
            raise InputError("The recipe is not valid YAML.", " ".join(str(error).split()), "Check the indentation near that line.") from None
        return cls.from_dict(values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Read a recipe file. Raises InputError when it is absent or wrong."""
        try:
            text = Path(path).read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The recipe {path} cannot be read.", f"{error}.", "Give the path of a YAML file.") from None
        return cls.from_text(text)

    def to_yaml(self) -> str:
        """YAML that `from_text` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=100)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, unset parts left out."""
        return self.model_dump(exclude_none=True, mode="json")

    def digest(self) -> str:
        """Stable hash of all that decides the result; 16 hex digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def dropped_blocks(self, anatomy: Anatomy) -> list[int]:
        """The block numbers that `structure` removes, sorted. Raises InputError for a selector that is not understood."""
        return self.structure.dropped(anatomy.blocks)

    def reduced(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy that `structure` leaves, under the dense model's names and block numbers."""
        stream = self.structure.stream
        return anatomy.reduced(self.dropped_blocks(anatomy), self.structure.units(anatomy), stream.width if stream else None)

    def resolve(self, anatomy: Anatomy) -> dict[str, Scheme]:
        """The scheme of every block linear that stays, by layer name, in the order in which the layers run."""
        gone = set(self.dropped_blocks(anatomy))
        made: dict[tuple[int, ...], Scheme] = {}  # layers that the same lines point at share one scheme: screens resolve at every move of a slider
        found = {}
        for part in anatomy.linears:
            if part.block not in gone:
                lines = tuple(number for number, line in enumerate(self.schemes) if matches(line.match, part, anatomy.blocks))
                if lines not in made:
                    made[lines] = self._scheme_of(lines)
                found[part.name] = self._cached(part, made[lines], anatomy)
        return found

    def _cached(self, part: Part, scheme: Scheme, anatomy: Anatomy) -> Scheme:
        """The scheme with the rank that a latent cache asks of key and value matrices."""
        latent = self.kv_cache.rank if self.kv_cache else None
        if latent is None or part.role not in latent.roles:
            return scheme
        rank = RankScheme(rank=max(1, latent_width(latent, part, anatomy)), latent=anatomy.kv_heads if latent.heads == "each" else 1)
        return scheme.model_copy(update={"rank": rank.model_copy(update={"factors": scheme.rank.factors if scheme.rank else None})})

    def _scheme_of(self, lines: tuple[int, ...]) -> Scheme:
        weights: dict[str, Any] | None = None
        rest: dict[str, Any] = {"sparsity": None, "rank": None, "activations": None}
        for line in (self.schemes[number] for number in lines):
            if line.weights == "dense":
                weights = None
            elif line.weights is not None:
                weights = {**(weights or {}), **line.weights.model_dump(exclude_none=True)}
            for field in rest:
                value = getattr(line, field)
                rest[field] = None if value == "dense" else value if value is not None else rest[field]
        if weights and FORMAT_BITS[weights.get("format", "uniform")] == (4,):
            weights.setdefault("bits", 4)  # a table has one width
        return Scheme(weights=WeightScheme(**weights) if weights and "bits" in weights else None, **rest)

    def validate_for(self, anatomy: Anatomy) -> list[Problem]:
        """Everything in the recipe that does not fit this model; empty when it can run. Methods are checked by `engine.methods`."""
        patterns, rest = self._pattern_problems(anatomy), [*self._structure_problems(anatomy), *_told(cache_problems(self.kv_cache, anatomy))]
        resolvable = not rest and not any(problem.field.startswith("schemes") for problem in patterns)
        return [*patterns, *(self._scheme_problems(anatomy) if resolvable else []), *rest]

    def _pattern_problems(self, anatomy: Anatomy) -> list[Problem]:
        lines = [(f"schemes[{i}].match", line.match) for i, line in enumerate(self.schemes)]
        lines += [(f"stages[{i}].targets", stage.targets) for i, stage in enumerate(self.stages)]
        right = "Use names, globs, role:… or blocks:…; the model card lists the layers."
        return _told((field, wrong, right) for field, pattern in lines if (wrong := pattern_problem(pattern, anatomy)))

    def _scheme_problems(self, anatomy: Anatomy) -> list[Problem]:
        shapes = self.reduced(anatomy).by_name
        schemes = self.resolve(anatomy).items()
        found = [(f"schemes ({name})", *told) for name, scheme in schemes for told in scheme_problems(scheme, shapes[name])]
        shared = [name for name, scheme in schemes if not scheme.is_dense and self.structure.holder_of(shapes[name].block or 0) is not None]
        right = "Set weights, sparsity and rank of these blocks to dense, or do not share them."
        return _told([*found, *((f"schemes ({name})", "Its block shares its matrices, which stay dense.", right) for name in shared)])[:MOST_TOLD]

    def _structure_problems(self, anatomy: Anatomy) -> list[Problem]:
        found = structure_problems(self.structure, anatomy)
        if self.head is not None and anatomy.tied:
            found.append(("head", "This model's head is tied to its embedding.", "Set `embedding` instead."))
        return _told(found)


def _told(found: Iterable[tuple[str, str, str]]) -> list[Problem]:
    """Problems of (field, what is wrong, what would be right)."""
    return [Problem(field=field, wrong=wrong, right=right) for field, wrong, right in found]


def migrate(values: Any) -> Any:
    """Bring an older schema to this one. Raises InputError for a newer version or a value that is no mapping."""
    if not isinstance(values, dict):
        raise InputError("The recipe is not a mapping of fields.", f"It is {type(values).__name__}.", "Start with `model:` and `schemes:`.")
    version = values.get("schema_version", SCHEMA_VERSION)
    if isinstance(version, int) and not isinstance(version, bool):
        if version > SCHEMA_VERSION:
            raise InputError(f"This recipe has schema version {version}.", f"This Bitpress reads versions up to {SCHEMA_VERSION}.", "Update Bitpress.")
        if version < 0:
            raise InputError(f"There is no recipe schema version {version}.", "", f"Write schema_version: {SCHEMA_VERSION}.")
        for old in range(version, SCHEMA_VERSION):
            values = MIGRATIONS[old](values)
    return values


def _version_0(values: dict[str, Any]) -> dict[str, Any]:
    """Version 0 wrote `layers: {pattern: bits}` and had no stages."""
    rest, layers = {key: value for key, value in values.items() if key != "layers"}, values.get("layers") or {}
    if not isinstance(layers, dict):
        raise InputError("layers: is not a mapping.", f"It is {type(layers).__name__}.", "Write a pattern and its bits on each line.")
    lines = [{"match": pattern, "weights": {"bits": bits}} for pattern, bits in layers.items()]
    return {**rest, "schema_version": 1, "schemes": lines, "stages": [{"method": "rtn"}]}


MIGRATIONS = {0: _version_0}


PLAIN_WORDS = {
    "extra_forbidden": "is not a field of a recipe",
    "model_type": "needs fields of its own, such as bits: 4, or the word dense where the field allows it",
    "missing": "is missing",
}


def _explain(error: ValidationError) -> str:
    """One sentence a field: where, what was found, what is wrong."""
    told: dict[str, str] = {}
    for item in sorted(error.errors(), key=lambda item: item["type"] == "literal_error"):
        where = _place(item["loc"])
        # "dense" is one branch of a union: when the other branch already said what is wrong inside it, its refusal is noise.
        if item["type"] == "literal_error" and any(place.startswith(where + ".") for place in told):
            continue
        text = PLAIN_WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
        told.setdefault(where or "recipe", text)
    return "; ".join(f"{where}: {text}" for where, text in told.items()) + "."


def _place(loc: tuple[int | str, ...]) -> str:
    """`schemes[0].weights.bits`; the names of union branches are Python classes that say nothing to a person."""
    named = [step for step in loc if isinstance(step, int) or not (step[:1].isupper() or step.startswith(("literal", "function-")))]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in named).lstrip(".")
