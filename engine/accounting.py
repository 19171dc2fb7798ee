"""Bytes, bits per weight and FLOPs from shapes and schemes alone. Knows no weights; imports no torch.

A test holds every figure here against the tensors that are really packed and the files that are really written.
Rules: METHODS 0.5. `linear` figures are of the block linears; `model` figures are of everything, a tied matrix once.
"""

from dataclasses import dataclass
from math import ceil

from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import CacheRank, CacheSide, EmbeddingScheme, KVCache, Recipe, Scheme, WeightScheme, latent_width
from bitpress.kernels.layout import BinaryLayout, BitmapLayout, DenseLayout, FactorLayout, Layout, PairLayout, TableLayout, TwoFourLayout, UniformLayout


def layout_of(scheme: Scheme, itemsize: int = 2) -> Layout:
    """The stored layout of a matrix under a scheme; it alone decides the bytes.

    Zeros are left out where that is smaller: two of four (dense values, or uniform codes whose zero is a level), and any
    others (4:8 too) of dense weights above 1/16, which is what a bitmap costs. Codes of weights pruned in no pattern stay codes. A low-rank
    pair keeps its factors as `rank.factors` says, else as `weights` does; beside a rounded matrix they are dense without `rank.factors`.
    """
    sparsity = scheme.sparsity if scheme.sparsity and scheme.sparsity.ratio > 0 else None
    if scheme.rank is not None and scheme.rank.beside and scheme.weights is not None:
        factor = _factor_layout(scheme.rank.factors, itemsize)
        return PairLayout(scheme.rank.keep or 0.0, factor, factor, scheme.rank.rank or 0, base=coded_layout(scheme.weights))
    if scheme.rank is not None:
        factor = _factor_layout(scheme.rank.factors or scheme.weights, itemsize)
        return PairLayout(scheme.rank.keep or 0.0, factor, factor, scheme.rank.rank or 0)
    if sparsity and sparsity.pattern == "2:4" and _pairs_up(scheme.weights):
        return TwoFourLayout(_half_groups(scheme.weights, itemsize))
    if scheme.weights is not None:
        return coded_layout(scheme.weights)
    if sparsity and sparsity.pattern != "2:4" and 8 * itemsize * sparsity.ratio > 1:
        return BitmapLayout(sparsity.ratio, itemsize)
    return DenseLayout(itemsize)


def settled(scheme: Scheme, part: Part, itemsize: int = 2) -> Scheme:
    """The scheme as it is carried out on one matrix: whole where factors would not be stored smaller, else with `weights` those of the factors."""
    if scheme.rank is None or scheme.rank.beside:
        return scheme
    rank = scheme.rank.model_copy(update={"factors": None})
    factored = scheme.model_copy(update={"rank": rank, "weights": scheme.rank.factors or scheme.weights})
    whole = scheme.model_copy(update={"rank": None})
    smaller = _bytes_of(part, layout_of(scheme, itemsize)) < _bytes_of(part, layout_of(whole, itemsize))
    return factored if smaller or rank.latent else whole


def break_even(out_features: int, in_features: int) -> int:
    """The rank at which two factors of the matrix's own width cost what the matrix does, rounded down (METHODS 0.5)."""
    return PairLayout(1.0, DenseLayout(), DenseLayout()).rank(out_features, in_features)


def part_rank(part: Part, scheme: Scheme | None, itemsize: int = 2) -> int:
    """The rank at which a matrix is factored under a scheme; 0 where it stays whole."""
    layout = layout_of(settled(scheme, part, itemsize), itemsize) if scheme else None
    return layout.rank(part.out_features, part.in_features) if isinstance(layout, PairLayout) else 0


def kept_whole(recipe: Recipe, anatomy: Anatomy) -> list[str]:
    """The layers whose rank is past break-even, so that they stay whole."""
    schemes = recipe.resolve(anatomy).items()
    return [name for name, scheme in schemes if scheme.rank and settled(scheme, anatomy.by_name[name], anatomy.itemsize).rank is None]


def coded_layout(weights: WeightScheme) -> UniformLayout | TableLayout | BinaryLayout:
    """The stored layout of a matrix of codes."""
    match weights.format:
        case "nf4" | "fp4" | "codebook":
            return TableLayout(weights.format, weights.group_size, weights.double_quant)
        case "bcq":
            return BinaryLayout(weights.bits, weights.group_size)
    return UniformLayout(weights.bits, weights.group_size, weights.symmetric, "integer" if weights.symmetric else weights.zero)


def _factor_layout(weights: WeightScheme | None, itemsize: int) -> FactorLayout:
    return DenseLayout(itemsize) if weights is None else coded_layout(weights)


def _pairs_up(weights: WeightScheme | None) -> bool:
    """Whether two of four can be left out of these codes, and is smaller: a place costs two bits, and pruned codes must stand for 0."""
    if weights is None:
        return True
    zero_is_level = weights.format == "uniform" and (weights.symmetric or weights.zero == "integer")
    return zero_is_level and weights.bits > 2 and weights.group_size % 4 == 0


def _half_groups(weights: WeightScheme | None, itemsize: int) -> UniformLayout | DenseLayout:
    return DenseLayout(itemsize) if weights is None else UniformLayout(weights.bits, weights.group_size // 2, weights.symmetric)


def embedding_layout(scheme: EmbeddingScheme | None, itemsize: int = 2) -> Layout:
    """The stored layout of an embedding or head: dense, or one symmetric scale a row."""
    return DenseLayout(itemsize) if scheme is None else UniformLayout(scheme.bits, 0, True)


@dataclass(frozen=True)
class Size:
    """What a recipe makes of a model, on paper. Bytes are the stored, canonical ones; bias and norms stay dense."""

    dense_bytes: int
    bytes: int
    linear_bytes: int
    linear_params: int
    params: int
    layer_bytes: dict[str, int]

    @property
    def ratio(self) -> float:
        """How many times smaller the whole model is."""
        return self.dense_bytes / self.bytes

    @property
    def bits_per_weight_linears(self) -> float:
        """Stored bits of the block linears over their weights, scales and zeros counted."""
        return 8 * self.linear_bytes / self.linear_params

    @property
    def bits_per_weight_model(self) -> float:
        """Stored bits of the whole model over the weights it still has."""
        return 8 * self.bytes / self.params


def _bytes_of(part: Part, layout: Layout) -> int:
    return layout.nbytes(part.out_features, part.in_features)


def _stored(part: Part, scheme: Scheme, itemsize: int) -> int:
    done = settled(scheme, part, itemsize)
    bias = itemsize * part.out_features if done.rank and done.rank.bias and not part.bias else 0
    return bias + _bytes_of(part, layout_of(done, itemsize))


def size_of(recipe: Recipe, anatomy: Anatomy) -> Size:
    """Stored bytes of the model that this recipe makes, layer by layer."""
    item = anatomy.itemsize
    schemes, shapes = recipe.resolve(anatomy), recipe.reduced(anatomy).by_name
    layers = {name: _stored(shapes[name], scheme, item) for name, scheme in schemes.items()}
    held = {name: shared_params(shapes[name], recipe) for name in layers}
    layers |= {name: item * params for name, params in held.items() if params is not None}
    linears = sum(layers.values())
    ends = [(anatomy.embedding, recipe.embedding), *([(anatomy.head, recipe.head)] if anatomy.head else [])]
    layers |= {part.name: _bytes_of(part, embedding_layout(scheme, item)) for part, scheme in ends}
    kept_params = sum(shapes[name].numel if params is None else params for name, params in held.items())
    rest = _rest_params(recipe, anatomy)
    params = kept_params + sum(part.numel for part, _ in ends) + rest
    return Size(anatomy.bytes, sum(layers.values()) + rest * item, linears, kept_params, params, layers)


def shared_params(part: Part, recipe: Recipe) -> int | None:
    """Numbers that a linear of a block that shares holds: its own factors, and the common matrix where its block is the first; None elsewhere."""
    holder = recipe.structure.holder_of(part.block) if part.block is not None else None
    if holder is None:
        return None
    own = (recipe.structure.share_rank or 0) * (part.out_features + part.in_features)
    return own + (part.numel if holder == part.block else 0)


def _rest_params(recipe: Recipe, anatomy: Anatomy) -> int:
    """Norms, biases and positions: all that is neither a linear's weight nor embedding nor head; what is removed loses its share."""
    ends = anatomy.embedding.numel + (anatomy.head.numel if anatomy.head else 0)
    rest = anatomy.params - anatomy.linear_params - ends
    lost = sum(anatomy.by_name[part.name].out_features - part.out_features for part in recipe.reduced(anatomy).linears if part.bias)
    added = sum(anatomy.by_name[name].out_features for name in recipe.structure.added_biases or ())
    stream = recipe.structure.stream
    if stream:  # two norms a block get narrower, and matrices turn the hidden states
        added += stream.turns(anatomy.hidden, anatomy.blocks) - 2 * anatomy.blocks * (anatomy.hidden - stream.width)
    return rest - len(recipe.dropped_blocks(anatomy)) * anatomy.block_rest_params - lost + added


def flops_per_token(recipe: Recipe | None, anatomy: Anatomy, context: int = 0) -> int:
    """Multiply-adds times two for one token at a given context length, head included, attention scores and mixing included.

    Weight-only formats and zeros without a sparse kernel save none; dropped blocks, heads and neurons and low rank do.
    """
    reduced = recipe.reduced(anatomy) if recipe else anatomy
    linears = linear_multiplies(recipe, anatomy) if recipe else anatomy.linear_params
    heads = sum(reduced.units_of(block).heads for block in reduced.present)
    if recipe and (stream := recipe.structure.stream):
        linears += stream.turns(anatomy.hidden, anatomy.blocks) + (0 if stream.by_block else anatomy.hidden * stream.width)
    return 2 * linears + 2 * anatomy.vocab * anatomy.hidden + 4 * context * heads * anatomy.head_dim


def linear_multiplies(recipe: Recipe, anatomy: Anatomy) -> int:
    """Multiply-adds of all block linears for one token: NK of a whole matrix, r(N + K) of a factored one."""
    shapes = recipe.reduced(anatomy).by_name
    own = sum(_multiplies(shapes[name], settled(scheme, shapes[name], anatomy.itemsize)) for name, scheme in recipe.resolve(anatomy).items())
    blocks = {block for group in recipe.structure.share_blocks for block in group}
    beside = sum(part.out_features + part.in_features for part in shapes.values() if part.block in blocks)
    return own + (recipe.structure.share_rank or 0) * beside


def _multiplies(part: Part, scheme: Scheme) -> int:
    layout = layout_of(scheme)
    if isinstance(layout, PairLayout):
        factors = layout.rank(part.out_features, part.in_features) * (part.out_features + part.in_features)
        return factors + (part.numel if layout.base else 0)
    return part.numel


def removed_share(recipe: Recipe, anatomy: Anatomy) -> float:
    """Share of the block linears' parameters that low rank, dropped blocks, heads and neurons take away."""
    return 1 - linear_multiplies(recipe, anatomy) / anatomy.linear_params


def cache_bytes(recipe: Recipe | None, anatomy: Anatomy, tokens: int) -> int:
    """Bytes that the KV cache of one sequence of so many tokens holds, over all blocks that stay."""
    cache = (recipe.kv_cache if recipe else None) or KVCache()
    reduced = recipe.reduced(anatomy) if recipe else anatomy
    sides = (("k", cache.keys), ("v", cache.values))
    return sum(side_bytes(side, cache, _cached_width(cache.rank, reduced, block, role), tokens) for block in reduced.present for role, side in sides)


def _cached_width(latent: CacheRank | None, anatomy: Anatomy, block: int, role: str) -> int:
    part = next((part for part in anatomy.of_block(block) if part.role == role), None)
    if latent is None or part is None or role not in latent.roles:
        return anatomy.units_of(block).kv_heads * anatomy.head_dim
    return latent_width(latent, part, anatomy)


def side_bytes(side: CacheSide | None, cache: KVCache, width: int, tokens: int) -> int:
    """Bytes of `tokens` rows of `width` numbers: codes with a scale and a least value a group, 16-bit numbers in the residual window."""
    if cache.window:
        tokens = min(tokens, cache.window.sinks + cache.window.recent)
    if side is None:
        return 2 * width * tokens
    old = max(0, tokens - cache.residual_window)
    if side.axis == "channel":
        old -= old % side.group_size
        return old // side.group_size * width * (ceil(side.group_size * side.bits / 8) + 4) + 2 * width * (tokens - old)
    size = side.group_size or width
    return old * ceil(width / size) * (ceil(size * side.bits / 8) + 4) + 2 * width * (tokens - old)


def weight_bytes_per_token(recipe: Recipe | None, anatomy: Anatomy) -> int:
    """Bytes of weights that one decode step reads: all linears and the head; of a separate embedding only one row."""
    size = size_of(recipe or Recipe(model=anatomy.model), anatomy)
    if anatomy.head is None:
        return size.bytes
    row = size.layer_bytes[anatomy.embedding.name]
    return size.bytes - row + row // anatomy.vocab


def ideal_speedup(recipe: Recipe, anatomy: Anatomy) -> float:
    """Bound on the gain in decode speed at batch 1, where reading the weights is all that costs: bytes over bytes. Ideal, not measured."""
    return weight_bytes_per_token(None, anatomy) / weight_bytes_per_token(recipe, anatomy)
