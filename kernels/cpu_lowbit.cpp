// Low-bit matrix times a few activation rows, for weights of 2, 3, 4, 5, 6 or 8 bits with group scales.
//
// Knows one memory layout ("tiles") and integer dot products; knows nothing of torch. Built on first use by cpu_build.py.
//
// Layout. Sixteen output rows make a tile; the inputs of a tile come in chunks of 32, a chunk in 8 quads of 4 inputs.
// The codes of a quad are 64 bytes, byte 4*row + j for input j, which is what one 512-bit integer dot product takes.
// Bits of a chunk are stored in planes so that unpacking is shifts and masks only:
//   8-bit plane: 8 x 64 bytes, one a quad          4-bit plane: 4 x 64 bytes, quads 2i (low) and 2i + 1 (high)
//   2-bit plane: 2 x 64 bytes, quads 4i .. 4i + 3  1-bit plane: 1 x 64 bytes, bit q of a byte belongs to quad q
// 3 bits are a 2-bit plane and a 1-bit plane on top of it; 5 are 4 + 1; 6 are 4 + 2. A chunk has 64 * bits bytes. Two tiles lie side by
// side, a chunk of one and a chunk of the other, so that a thread reads one long stretch of memory from end to end.
//
// Arithmetic. Activations become integers of 15 bits, one scale a group: x = sx * (128 * hi + lo) with signed bytes hi and lo.
// Then sum (code - zero) * x is sum code*hi and sum code*lo by u8 x s8 dot products, exact in integers, minus zero times the sums
// of hi and lo. The error is that of the 15-bit activations, below the rounding of a bfloat16 input. Activations that are to be
// of 8 or 4 bits, one scale a row, are their own hi and have no lo.
//
// Two of four. Codes are those of the stored weights, two planes of 2 bits say which of its four each belongs to; a quad of
// codes meets eight inputs, of which a byte shuffle brings every row its own four.

#include <array>
#include <type_traits>

#include "cpu_lanes.h"
#include "cpu_lowbit.h"

using namespace lowbit;

namespace {

constexpr int QUADS = 8, AHEAD = 4096;  // bytes; wider codes come in time without being asked for

void split(const int32_t *__restrict q, int count, const Row &row, int at, int g, bool halves) {
    int8_t *__restrict const hi = row.hi + at, *__restrict const lo = row.lo + at;
    int64_t sum = 0;
    for (int k = 0; k < count; k++) sum += q[k];
    for (int k = 0; k < count; k++) hi[k] = int8_t(halves ? (q[k] + 64) >> 7 : q[k]);
    for (int k = 0; k < count; k++) lo[k] = int8_t(halves ? q[k] - 128 * hi[k] : 0);
    row.sum[g] = float(sum);
}

void quantise_row(const float *x, const Shape &s, const Row &row, std::vector<int32_t> &q) {
    q.resize(s.padded() + s.group);
    const float top = s.activation_bits ? float((1 << (s.activation_bits - 1)) - 1) : 16256.0f;
    const float whole = s.activation_bits ? quantise(x, s.inputs, s.padded(), top, q.data()) : 0.0f;
    for (int g = 0; g < s.groups(); g++) {
        const int at = g * s.group, count = std::min(s.group, s.inputs - at), padded = rounded_up(count, CHUNK);
        row.scale[g] = s.activation_bits ? whole : quantise(x + at, count, padded, top, &q[at]);
        split(&q[at], padded, row, at, g, s.activation_bits == 0);
    }
}

template <int BITS> inline Reals zeros_of(const Job &job, size_t at) {
    if (!job.zeros) return every(float(1 << (BITS - 1)));
    return job.float_zeros ? bf16_at(static_cast<const uint16_t *>(job.zeros) + at) : bytes_as_reals(static_cast<const uint8_t *>(job.zeros) + at);
}

// total += scale * sx * (128 * hi + lo - zero * sum)
template <bool HALVES> inline Reals scaled(Reals total, Sums hi, Sums lo, Reals zero, float sum, Reals scale, float sx) {
    const Reals dot = HALVES ? plus_product(real(hi), every(128.0f), real(lo)) : real(hi);
    return plus_product(plus_product(zero, every(-sum), dot), times(scale, every(sx)), total);
}

// The chunks of NT tiles that lie side by side.
template <int BITS, int NT, bool HELD> inline auto chunks(const uint8_t *codes) {
    using Planes = std::conditional_t<HELD, InRegisters<BITS>, InMemory>;
    if constexpr (NT == 1) return std::array<Planes, 1>{Planes{codes}};
    else return std::array<Planes, 2>{Planes{codes}, Planes{codes + BITS * QUAD_BYTES}};
}

// NT tiles times MB activation rows. SPLIT accumulators a sum keep dot products independent: each takes five cycles. Scales and zeros
// of the tiles to come are asked for early: their streams are too short for the processor to see them coming.
template <int BITS, int NT, int MB, int SPLIT, bool HALVES> void tiles_times_rows(const Job &job, const Shape &s, int tile, const Row *rows, float *out) {
    constexpr int LIFTED = SPLIT == 2 ? LIFT<BITS> : 0;
    Reals total[NT][MB];
    for (auto &per_tile : total) for (auto &sum : per_tile) sum = every(0.0f);
    const int groups = s.groups();
    for (int g = 0; g < groups; g++) {
        Sums hi[NT][MB][SPLIT], lo[NT][MB][SPLIT];
        for (int t = 0; t < NT; t++) for (int m = 0; m < MB; m++) for (int p = 0; p < SPLIT; p++) hi[t][m][p] = lo[t][m][p] = no_sums();
        const int end = std::min((g + 1) * s.group, s.padded());
        for (int k = g * s.group; k < end; k += CHUNK) {
            const uint8_t *codes = job.codes + s.code_at(tile, k);
            if (BITS == 2) for (int line = 0; line < NT * BITS; line++) __builtin_prefetch(codes + AHEAD + line * QUAD_BYTES);
            const auto planes = chunks<BITS, NT, MB == 1>(codes);
#pragma GCC unroll 8
            for (int q = 0; q < QUADS; q++) {
                Bytes w[NT];
                for (int t = 0; t < NT; t++) w[t] = quad<BITS, LIFTED != 0>(planes[t], q);
                for (int m = 0; m < MB; m++) {
                    const Bytes xh = broadcast4(rows[m].hi + k + 4 * q), xl = broadcast4(rows[m].lo + k + 4 * q);
                    for (int t = 0; t < NT; t++) {
                        hi[t][m][q % SPLIT] = dot<BITS>(hi[t][m][q % SPLIT], w[t], xh);
                        if (HALVES) lo[t][m][q % SPLIT] = dot<BITS>(lo[t][m][q % SPLIT], w[t], xl);
                    }
                }
            }
        }
        for (int t = 0; t < NT; t++) {
            const size_t at = (size_t(tile + t) * groups + g) * TILE;
            __builtin_prefetch(job.scales + at + NT * groups * TILE);
            if (job.zeros) __builtin_prefetch(static_cast<const uint8_t *>(job.zeros) + (at + NT * groups * TILE) * (job.float_zeros ? 2 : 1));
            const Reals zero = zeros_of<BITS>(job, at), scale = bf16_at(job.scales + at);
            for (int m = 0; m < MB; m++) {
                Sums h = hi[t][m][0], l = lo[t][m][0];
                for (int p = 1; p < SPLIT; p++) h = both(h, lowered(hi[t][m][p], LIFTED)), l = both(l, lowered(lo[t][m][p], LIFTED));
                total[t][m] = scaled<HALVES>(total[t][m], h, l, zero, rows[m].sum[g], scale, rows[m].scale[g]);
            }
        }
    }
    for (int t = 0; t < NT; t++) for (int m = 0; m < MB; m++) put(out + (m * NT + t) * TILE, total[t][m]);
}

// One tile of two-of-four codes times one row. s.inputs, s.group: of stored weights, half of the matrix's. x: for every eight inputs
// their eight hi and their eight lo bytes.
template <int BITS> void two_four_tile(const Job &job, const Shape &s, const uint8_t *places, int tile, const int8_t *x, const float *scales, float *out) {
    const Bytes fours = every_word(0x04040000), lower = every_word(0x08080808), ones = every_word(0x01010101);
    Reals total = every(0.0f);
    for (int g = 0; g < s.groups(); g++) {
        Sums hi = no_sums(), lo = no_sums(), sum_hi = no_sums(), sum_lo = no_sums();
        const int end = std::min((g + 1) * s.group, s.padded());
        for (int k = g * s.group; k < end; k += CHUNK) {
            const uint8_t *codes = job.codes + tile * s.tile_bytes() + size_t(k) * TILE * BITS / 8, *at = places + (size_t(tile) * s.padded() + k) * TILE / 4;
#pragma GCC unroll 8
            for (int q = 0; q < QUADS; q++) {
                const int8_t *table = x + size_t(k + 4 * q) * 4;
                const Bytes w = quad<BITS>(InMemory{codes}, q), index = either(quad<2>(InMemory{at}, q), fours);
                const Bytes xh = picked(table, index), xl = picked(table, either(index, lower));
                hi = dot<BITS>(hi, w, xh), lo = dot<BITS>(lo, w, xl);
                sum_hi = dot<1>(sum_hi, ones, xh), sum_lo = dot<1>(sum_lo, ones, xl);
            }
        }
        const size_t group = (size_t(tile) * s.groups() + g) * TILE;
        const Reals sum = plus_product(real(sum_hi), every(128.0f), real(sum_lo)), dots = plus_product(real(hi), every(128.0f), real(lo));
        const Reals centred = plus_product(times(zeros_of<BITS>(job, group), every(-1.0f)), sum, dots);
        total = plus_product(centred, times(bf16_at(job.scales + group), every(scales[g])), total);
    }
    put(out, total);
}

template <int BITS, int NT, int MB, int SPLIT, bool HALVES> void block(const Job &job, const Shape &s, int tile, int first, const Row *rows) {
    float out[NT * MB * TILE];
    tiles_times_rows<BITS, NT, MB, SPLIT, HALVES>(job, s, tile, rows + first, out);
    for (int m = 0; m < MB; m++) {
        int at = tile * TILE, count = std::min(NT * TILE, s.outputs - at);
        if (job.bias) for (int n = 0; n < count; n++) out[m * NT * TILE + n] += job.bias[at + n];
        store(job.y, job.is_bf16, size_t(first + m) * s.outputs + at, out + m * NT * TILE, count);
    }
}

template <int BITS, int NT, bool HALVES> void all_rows(const Job &job, const Shape &s, int tile, const Row *rows) {
    int m = 0;
    for (; m + 4 <= s.rows; m += 4) block<BITS, NT, 4, 1, HALVES>(job, s, tile, m, rows);
    for (; m + 2 <= s.rows; m += 2) block<BITS, NT, 2, 1, HALVES>(job, s, tile, m, rows);
    if (m < s.rows) block<BITS, NT, 1, 2, HALVES>(job, s, tile, m, rows);
}

template <int BITS> void all_tiles(const Job &job, const Shape &s, const Row *rows, int first, int last) {
    const bool halves = s.activation_bits == 0;
    for (int tile = first; tile < last; tile++) {
#if HAS_VNNI
        if (tile + 1 < last) {
            if (halves) all_rows<BITS, 2, true>(job, s, tile++, rows);
            else all_rows<BITS, 2, false>(job, s, tile++, rows);
            continue;
        }
#endif
        if (halves) all_rows<BITS, 1, true>(job, s, tile, rows);
        else all_rows<BITS, 1, false>(job, s, tile, rows);
    }
}

// Working memory of one call, kept by the calling thread so that a decode step allocates nothing.
struct Scratch {
    std::vector<int8_t> bytes, fours;
    std::vector<float> reals, wide;
    std::vector<Row> rows;

    Row *prepare(const Shape &s, const void *x, bool is_bf16, int threads) {
        const size_t padded = s.padded() + s.group, groups = s.groups(), count = s.rows;
        bytes.resize(2 * count * padded);
        reals.resize(2 * count * groups);
        rows.resize(count);
        for (size_t m = 0; m < count; m++) rows[m] = {&bytes[2 * m * padded], &bytes[(2 * m + 1) * padded], &reals[2 * m * groups], &reals[(2 * m + 1) * groups]};
        const float *from = widen_rows(x, is_bf16, s.rows, s.inputs, s.inputs, wide);
        const Row *all = rows.data();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 8)
        for (int m = 0; m < s.rows; m++) {
            thread_local std::vector<int32_t> q;
            quantise_row(from + size_t(m) * s.inputs, s, all[m], q);
        }
        return rows.data();
    }

    // The eight hi and eight lo bytes of every eight of a row's inputs, side by side; zeros up to `padded`.
    const int8_t *side_by_side(const Row &row, int inputs, int padded) {
        fours.assign(size_t(padded) * 2, 0);
        for (int k = 0; k < inputs; k += 8) {
            std::memcpy(&fours[2 * size_t(k)], row.hi + k, 8);
            std::memcpy(&fours[2 * size_t(k) + 8], row.lo + k, 8);
        }
        return fours.data();
    }
};

template <int BITS> void two_four_tiles(const Job &job, const Shape &s, const uint8_t *places, int m, const int8_t *x, const float *scales, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int tile = 0; tile < s.tiles(); tile++) {
        float out[TILE];
        two_four_tile<BITS>(job, s, places, tile, x, scales, out);
        store(job.y, job.is_bf16, size_t(m) * s.outputs + tile * TILE, out, std::min(TILE, s.outputs - tile * TILE));
    }
}

}  // namespace

const Row *lowbit::quantised(const Shape &s, const void *x, bool is_bf16, int threads) {
    thread_local Scratch scratch;
    return scratch.prepare(s, x, is_bf16, threads);
}

bool lowbit::multiply(const Job &job, const Shape &s, const Row *rows, int first, int end) {
    switch (s.bits) {
        case 2: all_tiles<2>(job, s, rows, first, end); return true;
        case 3: all_tiles<3>(job, s, rows, first, end); return true;
        case 4: all_tiles<4>(job, s, rows, first, end); return true;
        case 5: all_tiles<5>(job, s, rows, first, end); return true;
        case 6: all_tiles<6>(job, s, rows, first, end); return true;
        case 8: all_tiles<8>(job, s, rows, first, end); return true;
    }
    return false;
}

extern "C" {

// 1 when the AVX-512 path was compiled in, 0 for AVX2 or none.
int bitpress_vectorised() { return HAS_VNNI; }

// y (rows, outputs) = x (rows, inputs) times the transposed tiles, plus bias where given. x and y are bfloat16 or float32. zeros:
// bytes, bfloat16 where float_zeros, or null. activation_bits: 8 or 4 rounds every row of x, 0 leaves it. Returns 0, or 1 for a
// width that has no kernel.
int bitpress_linear(const void *x, void *y, int is_bf16, int rows, int inputs, int outputs, int bits, int group, int activation_bits,
                    const uint8_t *codes, const uint16_t *scales, const void *zeros, int float_zeros, const float *bias, int threads) {
    const Shape s{rows, inputs, outputs, bits, group, activation_bits};
    if (size_t(rows) * s.padded() * outputs < WORTH_THREADS) threads = 1;
    const Row *row = quantised(s, x, is_bf16, threads);
    const Job job{codes, scales, zeros, bool(float_zeros), bias, y, bool(is_bf16)};
    bool known = true;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        if (!multiply(job, s, row, share_of(s.tiles(), part, threads), share_of(s.tiles(), part + 1, threads))) known = false;
    return known ? 0 : 1;
}

// The same for two of four: inputs is the matrix's, a multiple of 4; group is of stored weights, a multiple of 32 or their padded row.
int bitpress_two_four_codes(const void *x, void *y, int is_bf16, int rows, int inputs, int outputs, int bits, int group, const uint8_t *codes,
                            const uint16_t *scales, const uint8_t *zeros, const uint8_t *places, int threads) {
    const Shape dense{rows, inputs, outputs, bits, 2 * group, 0}, stored{rows, inputs / 2, outputs, bits, group, 0};
    if (size_t(rows) * inputs * outputs < WORTH_THREADS) threads = 1;
    thread_local Scratch scratch;
    const Row *row = scratch.prepare(dense, x, is_bf16, threads);
    const Job job{codes, scales, zeros, false, nullptr, y, bool(is_bf16)};
    for (int m = 0; m < rows; m++) {
        const int8_t *each = scratch.side_by_side(row[m], dense.padded(), 2 * stored.padded());
        switch (bits) {
            case 3: two_four_tiles<3>(job, stored, places, m, each, row[m].scale, threads); break;
            case 4: two_four_tiles<4>(job, stored, places, m, each, row[m].scale, threads); break;
            case 5: two_four_tiles<5>(job, stored, places, m, each, row[m].scale, threads); break;
            case 6: two_four_tiles<6>(job, stored, places, m, each, row[m].scale, threads); break;
            case 8: two_four_tiles<8>(job, stored, places, m, each, row[m].scale, threads); break;
            default: return 1;
        }
    }
    return 0;
}
}
