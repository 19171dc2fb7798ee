"""What to do to a model: the one exchange object of the system. Knows schemes, stages and their schema; computes nothing on weights.

A recipe is YAML that a person may write by hand. It is strict: an unknown key, a wrong type or a width that no format
has is refused with the field's name. Torch-free, so that the screens can hold one.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, StrictBool, ValidationError, model_validator

from bitpress.engine.errors import InputError
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.structure import Keep, Strict, Structure, Whole, plain_number, structure_problems, whole_number
from bitpress.engine.targets import matches, pattern_problem

SCHEMA_VERSION = 1
CACHED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")  # decoded by our own loop
BITS = (2, 3, 4, 5, 6, 8)
PATTERNS = ("unstructured", "2:4", "4:8")  # of zeros
MAX_YAML_BYTES = 1 << 20
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same safe subset, eight times faster where libyaml is there


def _ratio(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, not {value!r}")
    if value == 1:
        raise ValueError(f"{value!r} would leave nothing of a matrix; use at most 0.99, or drop the block under `structure`")
    return value


def _width(value: Any) -> Any:
    if isinstance(value, bool) or value not in BITS or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a width that a format has; choose one of {', '.join(map(str, BITS))}")
    return value


def _group(value: Any) -> Any:
    if value == "row":
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not (value == 0 or 8 <= value <= 65536):
        raise ValueError(f"{value!r} is not a group size; give a number from 8, or 'row' for one group a row")
    return value


def _rank(value: Any) -> Any:
    if whole_number(value) < 1:
        raise ValueError(f"{value} is no rank: a factored matrix keeps at least 1; to take a block out use `structure`")
    return value


Bits = Annotated[int, BeforeValidator(_width)]
GroupSize = Annotated[int, BeforeValidator(_group)]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(_ratio)]
Format = Literal["uniform", "nf4", "fp4", "bcq"]
Zero = Literal["integer", "float"]
FORMAT_BITS: dict[str, tuple[int, ...]] = {"uniform": BITS, "nf4": (4,), "fp4": (4,), "bcq": (2, 3, 4)}
Rank = Annotated[int, BeforeValidator(_rank)]


class WeightScheme(Strict):
    """Codes of `bits` bits. `group_size` 0 (in YAML: row) shares one scale over a whole row.

    format: evenly spaced levels (uniform), sixteen fixed ones (nf4, fp4) or sums of plus and minus alphas (bcq). symmetric and
    zero speak of uniform codes: whether they have zeros, and whether a zero is one of the levels (integer) or any number
    (float). double_quant speaks of nf4 and fp4: their scales are stored as 8-bit codes.
    """

    bits: Bits
    group_size: GroupSize = 64
    symmetric: StrictBool = False
    format: Format = "uniform"
    zero: Zero = "integer"
    double_quant: StrictBool = False

    @property
    def has_zero(self) -> bool:
        """True when 0 is always a level, so that pruned weights stay 0."""
        return self.format != "bcq" and (self.format != "uniform" or self.symmetric or self.zero == "integer")


class SparsityScheme(Strict):
    """`ratio` of the weights are zero, anywhere or, with pattern N:M, so that N of every M consecutive inputs stay."""

    ratio: Ratio
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"

    @property
    def of_every(self) -> tuple[int, int] | None:
        """(N, M) of a pattern N:M."""
        if self.pattern == "unstructured":
            return None
        stay, of = self.pattern.split(":")
        return int(stay), int(of)


class RankScheme(Strict):
    """A matrix as a product of two of inner size r: a share `keep` of the break-even rank, or the very `rank`.

    factors: their own widths, else they are as `weights` says. Where a product would not be smaller than the matrix, the matrix stays whole.
    bias: what the factors lose of the mean output is stored beside them, one number an output.
    latent: above 0 the KV cache holds what is between the factors, so the matrix is factored at any rank, in this many runs of rows by itself.
    """

    keep: Keep | None = None
    rank: Rank | None = None
    factors: WeightScheme | None = None
    latent: Annotated[Whole, Field(ge=0)] = 0
    bias: StrictBool = False

    @model_validator(mode="after")
    def _one_size(self) -> "RankScheme":
        if (self.keep is None) == (self.rank is None):
            raise ValueError("give either keep, a share of the break-even rank, or rank, a whole number")
        return self


class ActivationScheme(Strict):
    """The layer's inputs are rounded as they come, one symmetric scale a token. Nothing of it is stored.

    outliers: inputs that are as large as this in any token of a batch are not rounded.
    """

    bits: Literal[8, 4]
    outliers: Annotated[float, Field(gt=0.0, le=1e4), BeforeValidator(plain_number)] | None = None


class Scheme(Strict):
    """What one weight matrix becomes, and its inputs. None or "dense" in a part leaves that part alone."""

    weights: WeightScheme | None = None
    sparsity: SparsityScheme | None = None
    rank: RankScheme | None = None
    activations: ActivationScheme | None = None

    @property
    def is_dense(self) -> bool:
        """True when nothing happens to the matrix."""
        return self.weights is None and (self.sparsity is None or self.sparsity.ratio == 0) and self.rank is None


class WeightPatch(Strict):
    """The weight fields that one line of `schemes` sets; what it leaves out stays as earlier lines set it."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: StrictBool | None = None
    format: Format | None = None
    zero: Zero | None = None
    double_quant: StrictBool | None = None


class SchemeLine(Strict):
    """One line of `schemes`: a target pattern and what it sets. Later lines win, field by field."""

    match: str
    weights: WeightPatch | Literal["dense"] | None = None
    sparsity: SparsityScheme | Literal["dense"] | None = None
    rank: RankScheme | Literal["dense"] | None = None
    activations: ActivationScheme | Literal["dense"] | None = None


class EmbeddingScheme(Strict):
    """Width of the token embedding (and of the head that is tied to it): one symmetric scale a row."""

    bits: Bits


class CacheSide(Strict):
    """Width of the cached keys or values; `axis` is what shares a scale."""

    bits: Bits
    axis: Literal["channel", "token"]
    group_size: GroupSize = 32


class CacheRank(Strict):
    """The cache holds the middle of factored key and value matrices: a share `keep` of their width, or `ranks`, one a block.

    heads: the rows of all heads are factored together (joint), or those of each head by themselves (each).
    """

    keep: Keep = 1.0
    ranks: tuple[Rank, ...] | None = None
    sides: Literal["both", "keys", "values"] = "both"
    heads: Literal["joint", "each"] = "joint"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the matrices that are factored."""
        return {"both": ("k", "v"), "keys": ("k",), "values": ("v",)}[self.sides]


class CacheWindow(Strict):
    """Tokens that stay in the cache: the first `sinks` and the last `recent`; those between are forgotten."""

    sinks: Annotated[Whole, Field(ge=0)] = 4
    recent: Annotated[Whole, Field(ge=1)]


class KVCache(Strict):
    """What the KV cache becomes; the last `residual_window` tokens stay dense."""

    keys: CacheSide | None = None
    values: CacheSide | None = None
    residual_window: Annotated[Whole, Field(ge=0)] = 0
    rank: CacheRank | None = None
    window: CacheWindow | None = None


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
        return anatomy.reduced(self.dropped_blocks(anatomy), self.structure.units(anatomy))

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
            weights.setdefault("bits", 4)  # nf4 and fp4 say it by their names
        return Scheme(weights=WeightScheme(**weights) if weights and "bits" in weights else None, **rest)

    def validate_for(self, anatomy: Anatomy) -> list[Problem]:
        """Everything in the recipe that does not fit this model; empty when it can run. Methods are checked by `engine.methods`."""
        return [*self._pattern_problems(anatomy), *self._group_problems(anatomy), *self._structure_problems(anatomy), *cache_problems(self.kv_cache, anatomy)]

    def _pattern_problems(self, anatomy: Anatomy) -> list[Problem]:
        lines = [(f"schemes[{i}].match", line.match) for i, line in enumerate(self.schemes)]
        lines += [(f"stages[{i}].targets", stage.targets) for i, stage in enumerate(self.stages)]
        found = []
        for field, pattern in lines:
            wrong = pattern_problem(pattern, anatomy)
            if wrong:
                found.append(Problem(field=field, wrong=wrong, right="Use names, globs, role:… or blocks:…; the model card lists the layers."))
        return found

    def _group_problems(self, anatomy: Anatomy) -> list[Problem]:
        found = []
        if any(problem.field.startswith("schemes") for problem in self._pattern_problems(anatomy)) or self._structure_problems(anatomy):
            return []
        if cache_problems(self.kv_cache, anatomy):
            return []
        shapes = self.reduced(anatomy).by_name
        for name, scheme in self.resolve(anatomy).items():
            for wrong, right in _shape_problems(scheme, shapes[name]):
                found.append(Problem(field=f"schemes ({name})", wrong=wrong, right=right))
        return found[:20]

    def _structure_problems(self, anatomy: Anatomy) -> list[Problem]:
        found = structure_problems(self.structure, anatomy)
        if self.head is not None and anatomy.tied:
            found.append(("head", "This model's head is tied to its embedding.", "Set `embedding` instead."))
        return [Problem(field=field, wrong=wrong, right=right) for field, wrong, right in found]


def _shape_problems(scheme: Scheme, part: Part) -> list[tuple[str, str]]:
    """What of a scheme does not fit a matrix: (what is wrong, what would be right)."""
    width = part.in_features
    found = _rank_problems(scheme, min(width, part.out_features))
    if scheme.weights and scheme.weights.group_size > width:
        found.append((f"group_size {scheme.weights.group_size} is larger than the {width} inputs of a row.", f"Use at most {width}, or 'row'."))
    for weights in (scheme.weights, scheme.rank.factors if scheme.rank else None):
        if weights and weights.bits not in FORMAT_BITS[weights.format]:
            widths = ", ".join(map(str, FORMAT_BITS[weights.format]))
            found.append((f"The format {weights.format} has no {weights.bits}-bit codes.", f"Set bits to one of {widths}, or format: uniform."))
    if scheme.activations and scheme.weights is None and scheme.rank is None:
        found.append(("Only the inputs of a packed matrix can be rounded, and this one stays dense.", "Set weights, such as bits: 8, too."))
    if scheme.sparsity and scheme.sparsity.ratio > 0 and scheme.weights and not scheme.weights.has_zero:
        kind = "bcq" if scheme.weights.format == "bcq" else "zero: float"
        found.append((f"Codes with {kind} have no level 0, so pruned weights would not stay 0.", "Use format: uniform with zero: integer, or no sparsity."))
    if scheme.sparsity and scheme.sparsity.of_every:
        pattern, (stay, of) = scheme.sparsity.pattern, scheme.sparsity.of_every
        if width % of:
            found.append((f"{pattern} needs rows of a multiple of {of} inputs; this one has {width}.", "Use pattern: unstructured."))
        if scheme.sparsity.ratio not in (0.0, 1 - stay / of):
            found.append((f"{pattern} is a ratio of {1 - stay / of:g}; the recipe says {scheme.sparsity.ratio}.", f"Set ratio: {1 - stay / of:g}."))
    return found


def _rank_problems(scheme: Scheme, most: int) -> list[tuple[str, str]]:
    """What of a scheme's rank does not fit a matrix that has rank `most` at best."""
    if scheme.rank is None:
        return []
    found = []
    if scheme.rank.rank and scheme.rank.rank > most:
        found.append((f"Rank {scheme.rank.rank} is past the {most} that this matrix can have.", f"Use at most {most}, or leave the rank away."))
    if scheme.sparsity and scheme.sparsity.ratio:
        found.append(("Asks for zeros and for low rank in one matrix: a product of factors has no zeros to leave out.", "Set one of `sparsity` and `rank`."))
    return found


def latent_width(latent: CacheRank, part: Part, anatomy: Anatomy) -> int:
    """Numbers a token that a latent cache holds of one side of a block; 0 where the share leaves less than one a head."""
    if latent.ranks is not None:
        return latent.ranks[part.block or 0]
    runs = anatomy.kv_heads if latent.heads == "each" else 1
    return runs * int(latent.keep * part.out_features / runs + 1e-9)


def cache_problems(cache: KVCache | None, anatomy: Anatomy) -> list[Problem]:
    """What of a cache scheme does not fit a model."""
    if cache is None:
        return []
    found = []
    if not (cache.keys or cache.values or cache.rank or cache.window):
        found.append(("kv_cache", "Nothing of the cache is changed.", "Set keys, values, rank or window, or remove the field."))
    if anatomy.architecture not in CACHED:
        found.append(("kv_cache", f"The cache of {anatomy.architecture} is not our own.", f"Use one of {', '.join(CACHED)}, or remove the field."))
    if cache.window and (cache.keys or cache.values or cache.rank):
        found.append(("kv_cache.window", "Forgotten tokens and a compressed cache cannot be had together.", "Set `window`, or the others."))
    for side, scheme in (("keys", cache.keys), ("values", cache.values)):
        found += [(f"kv_cache.{side}.group_size", *told) for told in _side_problems(scheme, anatomy)]
    found += [("kv_cache.rank", *told) for told in _latent_problems(cache.rank, anatomy)]
    return [Problem(field=field, wrong=wrong, right=right) for field, wrong, right in found]


def _side_problems(side: CacheSide | None, anatomy: Anatomy) -> list[tuple[str, str]]:
    if side is None:
        return []
    if side.axis == "channel" and side.group_size == 0:
        return [("A channel has no row of tokens that ends.", "Give a number of tokens, such as 32.")]
    width = anatomy.kv_heads * anatomy.head_dim
    if side.axis == "token" and side.group_size > width:
        return [(f"{side.group_size} is more than the {width} channels that a token has.", f"Give at most {width}, or 'row'.")]
    return []


def _latent_problems(latent: CacheRank | None, anatomy: Anatomy) -> list[tuple[str, str]]:
    """What of a latent cache does not fit: (what is wrong, what would be right)."""
    if latent is None:
        return []
    parts = [part for part in anatomy.linears if part.role in latent.roles]
    if len(parts) != len(latent.roles) * anatomy.blocks:
        return [("This model has no key and value matrices of their own: they are fused.", "Remove the rank; keys and values can still have fewer bits.")]
    if latent.ranks is not None and len(latent.ranks) != anatomy.blocks:
        return [(f"There are {len(latent.ranks)} ranks for {anatomy.blocks} blocks.", "Give one a block, or only keep.")]
    found, runs = [], anatomy.kv_heads if latent.heads == "each" else 1
    widths = {part.name: latent_width(latent, part, anatomy) for part in parts}
    if past := next((part for part in parts if widths[part.name] > min(part.out_features, part.in_features)), None):
        found.append((f"Rank {widths[past.name]} is past the {past.out_features} that {past.name} can have.", f"Use at most {past.out_features}."))
    if any(width % runs for width in widths.values()):
        found.append((f"The ranks do not split over {runs} heads.", f"Use multiples of {runs}, or heads: joint."))
    if not all(widths.values()):
        least = runs / min(part.out_features for part in parts)
        found.append((f"keep {latent.keep:g} leaves less than one number a head: no rank meets it.", f"Use at least {least:.3g}."))
    return found


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
