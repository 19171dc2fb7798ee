"""The Triton kernels: a packed matrix times rows of activations, and a packed matrix written out. Know words, scales and tiles; no torch module.

Layout (`gpu.Words`): a row is cut in chunks of 256 inputs, a chunk in eight *slots* of 32 neighbours. Word l of a chunk holds input
l of every slot, field j for slot j, so that one mask turns a tile of words into a tile of 32 neighbouring inputs, and a slot never
spans two groups. Weights are the left operand of the tensor cores and activations the right one: a tile of 16 rows costs what one
row costs. Codes less their zero stay whole numbers up to the product, which is exact; a run of slots that shares a group is scaled once,
in float32. Large batches, and tables, scale before the product instead and round as a dense matrix would have been.

A field becomes a float without an integer conversion: masked in place under the exponent of 2**23 (`big`), it is a float32 of 2**23 plus
the code times a power of two, which one fused multiply-add takes to code - zero.

Under Triton's interpreter (TRITON_INTERPRET=1) the same code runs on a CPU; two helpers work around what it does to bfloat16.
"""

import triton
import triton.language as tl

UNIFORM, TABLE, BINARY = (tl.constexpr(number) for number in range(3))
CHUNK, SLOT = tl.constexpr(256), tl.constexpr(32)


@triton.jit
def _rounded(values, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 rounded to TYPE. The interpreter cuts bfloat16 off instead of rounding it, so there it is done on the bits and stays float32."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    return values.to(TYPE)


@triton.jit
def _product(left, right, total, INTERPRETED: tl.constexpr):
    """total + left @ right in float32. The interpreter would multiply the bits of bfloat16 as integers."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total)


@triton.jit
def _spread(words, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Eight fields of HIGH bits moved as far apart as those of LOW bits."""
    if HIGH == 1 and LOW == 2:
        words = (words | (words << 4)) & 0x0F0F
        words = (words | (words << 2)) & 0x3333
        return (words | (words << 1)) & 0x5555
    if HIGH == 1 and LOW == 4:
        words = (words | (words << 12)) & 0x000F000F
        words = (words | (words << 6)) & 0x03030303
        return (words | (words << 3)) & 0x11111111
    if HIGH == 2:
        words = (words | (words << 8)) & 0x00FF00FF
        words = (words | (words << 4)) & 0x0F0F0F0F
        return (words | (words << 2)) & 0x33333333
    return words


@triton.jit
def _fields(low, high, big, slot: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """2**23 plus the codes of a slot, times 2**(LOW * slot % 16): float32. `high` is spread; `big` is a number at run time, since
    the compiler fuses `and` and `or` into one instruction only when one of them takes a register."""
    place: tl.constexpr = (LOW * slot) % 16
    if LOW * slot >= 16:  # only the lower 23 bits fit under the exponent
        low, high = low >> 16, high >> 16
    bits = (low & (((1 << LOW) - 1) << place)) | big
    if HIGH:
        bits |= (high << LOW) & (((1 << HIGH) - 1) << (place + LOW))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _codes(low, high, big, zeros_N, slot: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WHOLE: tl.constexpr):
    """Codes of one slot less their zeros, float32 [BLOCK_N, 32]. WHOLE: zeros are whole numbers, which the offset takes in exactly."""
    unit: tl.constexpr = 1.0 / (1 << ((LOW * slot) % 16))
    offset: tl.constexpr = 8388608.0 / (1 << ((LOW * slot) % 16))
    fields = _fields(low, high, big, slot, LOW, HIGH)
    if WHOLE:
        return fields * unit - (zeros_N[:, None] + offset)
    return (fields * unit - offset) - zeros_N[:, None]


@triton.jit
def _signs(words, big, slot: tl.constexpr):
    """+1 or -1 of one slot of a plane, float32."""
    unit: tl.constexpr = 2.0 / (1 << slot)
    offset: tl.constexpr = 16777216.0 / (1 << slot) + 1.0
    if slot == 0:  # 2**24 + 1 is no float32
        return (_fields(words, words, big, 0, 1, 0) * 2.0 - 16777216.0) - 1.0
    return _fields(words, words, big, slot, 1, 0) * unit - offset


@triton.jit
def _zeros(zeros, at_N, MIDDLE: tl.constexpr, ZEROS: tl.constexpr):
    """One group's zeros, float32 [BLOCK_N]; the middle of the grid where none are stored."""
    if ZEROS:
        return tl.load(zeros + at_N).to(tl.float32)
    return tl.full(at_N.shape, MIDDLE, tl.float32)


@triton.jit
def _words(plane, block, rows_N, N):
    """Words of BLOCK_N rows of one chunk, int32 [BLOCK_N, 32]: neighbouring rows lie side by side in memory."""
    offsets = (block * N + rows_N).to(tl.int64)[:, None] * SLOT + tl.arange(0, SLOT)[None, :]
    return tl.load(plane + offsets).to(tl.int32)


@triton.jit
def _inputs(x, start, rows_M, K, EVEN: tl.constexpr):
    """Inputs start..start + 31 of the rows, [32, BLOCK_M]; zero beyond the matrix. EVEN: K is a whole number of chunks."""
    inputs = start + tl.arange(0, SLOT)
    at = x + rows_M[None, :].to(tl.int64) * K + inputs[:, None]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(inputs < K)[:, None] & (rows_M >= 0)[None, :], other=0.0)


@triton.jit
def _weights(lows, highs, planes, big, table, scales, zeros, shifts, slot: tl.constexpr, group, chunk, rows_N, N,
             KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PLANES: tl.constexpr,
             MIDDLE: tl.constexpr, ZEROS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Dequantised weights of one slot, float32 [BLOCK_N, 32]."""
    at_N = group * N + rows_N
    if KIND == BINARY:
        values = tl.load(shifts + at_N).to(tl.float32)[:, None] + tl.zeros((rows_N.shape[0], SLOT), tl.float32)
        for plane in tl.static_range(PLANES):
            alphas_N = tl.load(scales + (group * PLANES + plane) * N + rows_N).to(tl.float32)
            values += _signs(_words(planes, chunk * PLANES + plane, rows_N, N), big, slot) * alphas_N[:, None]
        return values
    scales_N1 = tl.load(scales + at_N).to(tl.float32)[:, None]
    if KIND == TABLE:
        return tl.load(table + ((lows >> (4 * slot)) & 15)) * scales_N1
    return _codes(lows, highs, big, _zeros(zeros, at_N, MIDDLE, ZEROS), slot, LOW, HIGH, WHOLE) * scales_N1


@triton.jit
def linear(x, y, partials, arrivals, low, high, big, table, scales, zeros, shifts, M, N, K, chunks, groups, group_slots, share,
           KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PLANES: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr,
           WHOLE: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr, SCALED: tl.constexpr, SPLITS: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """y [M, N] = x [M, K] W^T. One program: BLOCK_N outputs, BLOCK_M rows, `share` chunks of the inputs.

    RUN: slots that share a group and are summed before they are scaled. SCALED: scale weights before the product instead.
    SPLITS: programs that share an output tile. Rows beyond the edge repeat the last one, so that only the store needs a mask.
    """
    TYPE: tl.constexpr = x.dtype.element_ty
    tile_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_N, rows_M = tl.minimum(tile_N, N - 1), tl.minimum(tile_M, M - 1)
    split = tl.program_id(2)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for chunk in tl.range(split * share, min(chunks, (split + 1) * share), num_stages=STAGES):
        start = chunk * CHUNK
        if KIND == BINARY:
            lows, highs = rows_N, rows_N  # its planes are loaded one by one
        else:
            lows = _words(low, chunk, rows_N, N)
            highs = _spread(_words(high, chunk, rows_N, N), LOW, HIGH) if HIGH else lows
        for first in tl.static_range(0, 8, RUN):
            group = tl.minimum((chunk * 8 + first) // group_slots, groups - 1)
            at_N = group * N + rows_N
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if SCALED:
                for slot in tl.static_range(first, first + RUN):
                    weights = _weights(lows, highs, low, big, table, scales, zeros, shifts, slot, group, chunk, rows_N, N,
                                       KIND, LOW, HIGH, PLANES, MIDDLE, ZEROS, WHOLE)  # fmt: skip
                    total = _product(_rounded(weights, TYPE, INTERPRETED), _inputs(x, start + slot * SLOT, rows_M, K, EVEN), total, INTERPRETED)
            elif KIND == BINARY:
                ones = _rounded(tl.full((BLOCK_N, SLOT), 1.0, tl.float32), TYPE, INTERPRETED)
                for slot in tl.static_range(first, first + RUN):  # sums of the inputs, by the tensor cores as well
                    part = _product(ones, _inputs(x, start + slot * SLOT, rows_M, K, EVEN), part, INTERPRETED)
                total += part * tl.load(shifts + at_N).to(tl.float32)[:, None]
                for plane in tl.static_range(PLANES):
                    words = _words(low, chunk * PLANES + plane, rows_N, N)
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                    for slot in tl.static_range(first, first + RUN):
                        signs = _rounded(_signs(words, big, slot), TYPE, INTERPRETED)
                        part = _product(signs, _inputs(x, start + slot * SLOT, rows_M, K, EVEN), part, INTERPRETED)
                    total += part * tl.load(scales + (group * PLANES + plane) * N + rows_N).to(tl.float32)[:, None]
            else:
                zeros_N = _zeros(zeros, at_N, MIDDLE, ZEROS)
                for slot in tl.static_range(first, first + RUN):
                    codes = _rounded(_codes(lows, highs, big, zeros_N, slot, LOW, HIGH, WHOLE), TYPE, INTERPRETED)
                    part = _product(codes, _inputs(x, start + slot * SLOT, rows_M, K, EVEN), part, INTERPRETED)
                total += part * tl.load(scales + at_N).to(tl.float32)[:, None]
    _finish(total, y, partials, arrivals, tile_N, tile_M, M, N, split, SPLITS, INTERPRETED)


@triton.jit
def _finish(total, y, partials, arrivals, tile_N, tile_M, M, N, split, SPLITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Write a tile; where SPLITS programs share it, the last to arrive adds their parts up, always in the same order."""
    there = (tile_N[:, None] < N) & (tile_M[None, :] < M)
    at = tile_M[None, :].to(tl.int64) * N + tile_N[:, None]
    if SPLITS == 1:
        tl.store(y + at, _rounded(total, y.dtype.element_ty, INTERPRETED), mask=there)
    else:
        tl.store(partials + (split * M + tile_M)[None, :].to(tl.int64) * N + tile_N[:, None], total, mask=there)
        tl.debug_barrier()  # every thread's part is written before one of them counts this program in
        arrival = arrivals + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(arrival, 1, sem="acq_rel") == SPLITS - 1:
            whole = tl.zeros(total.shape, tl.float32)
            for part in range(SPLITS):
                part_at = (part * M + tile_M)[None, :].to(tl.int64) * N + tile_N[:, None]
                whole += tl.load(partials + part_at, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(y + at, _rounded(whole, y.dtype.element_ty, INTERPRETED), mask=there)
            tl.store(arrival, 0)


@triton.jit
def dequantize(out, low, high, big, table, scales, zeros, shifts, N, K, groups, group_slots,
               KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PLANES: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr,
               WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """out [N, K] = the weights. One program: BLOCK_N rows of one chunk."""
    tile_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_N = tl.minimum(tile_N, N - 1)
    chunk = tl.program_id(1)
    if KIND == BINARY:
        lows, highs = rows_N, rows_N
    else:
        lows = _words(low, chunk, rows_N, N)
        highs = _spread(_words(high, chunk, rows_N, N), LOW, HIGH) if HIGH else lows
    for slot in tl.static_range(8):
        group = tl.minimum((chunk * 8 + slot) // group_slots, groups - 1)
        values = _weights(lows, highs, low, big, table, scales, zeros, shifts, slot, group, chunk, rows_N, N,
                          KIND, LOW, HIGH, PLANES, MIDDLE, ZEROS, WHOLE)  # fmt: skip
        inputs = chunk * CHUNK + slot * SLOT + tl.arange(0, SLOT)
        at = tile_N[:, None].to(tl.int64) * K + inputs[None, :]
        tl.store(out + at, _rounded(values, out.dtype.element_ty, INTERPRETED), mask=(tile_N < N)[:, None] & (inputs < K)[None, :])
