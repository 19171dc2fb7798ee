// Low-bit matrix times a few activation rows, for weights of 2, 3, 4, 5, 6 or 8 bits with group scales.
//
// Knows one memory layout ("tiles") and integer dot products; knows nothing of torch. Built on first use by cpu_build.py.
//
// Layout. Sixteen output rows make a tile; the inputs of a tile come in chunks of 32, a chunk in 8 quads of 4 inputs.
// The codes of a quad are 64 bytes, byte 4*row + j for input j, which is what one 512-bit integer dot product takes.
// Bits of a chunk are stored in planes so that unpacking is shifts and masks only:
//   8-bit plane: 8 x 64 bytes, one a quad          4-bit plane: 4 x 64 bytes, quads 2i (low) and 2i + 1 (high)
//   2-bit plane: 2 x 64 bytes, quads 4i .. 4i + 3  1-bit plane: 1 x 64 bytes, bit q of a byte belongs to quad q
// 3 bits are a 2-bit plane and a 1-bit plane on top of it; 5 are 4 + 1; 6 are 4 + 2. A chunk has 64 * bits bytes.
//
// Arithmetic. Activations become integers of 15 bits, one scale a group: x = sx * (128 * hi + lo) with signed bytes hi and lo.
// Then sum (code - zero) * x is exact in integers: sum code*hi and sum code*lo by u8 x s8 dot products, minus zero times
// the sums of hi and lo. The error is that of the 15-bit activations, below the rounding of a bfloat16 input.

#include <cmath>
#include <cstdint>
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>
#include "cpu_bf16.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif

namespace {

constexpr int TILE = 16, CHUNK = 32, QUADS = 8, QUAD_BYTES = 64;
constexpr size_t WORTH_THREADS = 250000;  // multiplications below which waking other threads costs more than it saves

// One row of activations as 15-bit integers in two signed bytes, one scale a group.
struct Row {
    int8_t *hi, *lo;
    float *scale;
    int32_t *sum_hi, *sum_lo;
};

struct Shape {
    int rows, inputs, outputs, bits, group;  // group in inputs, a multiple of CHUNK or the padded row
    int padded() const { return (inputs + CHUNK - 1) / CHUNK * CHUNK; }
    int groups() const { return (inputs + group - 1) / group; }
    int tiles() const { return (outputs + TILE - 1) / TILE; }
    size_t tile_bytes() const { return size_t(padded()) * TILE * bits / 8; }
};

void quantise_group(const float *x, int count, int padded, const Row &row, int at, int g) {
    float top = 0;
    bool finite = true;
    for (int k = 0; k < count; k++) {
        top = std::max(top, std::fabs(x[k]));
        finite &= std::isfinite(x[k]);
    }
    float scale = top / 16256.0f, inverse = top > 0 && finite ? 1.0f / scale : 0.0f;
    if (!std::isfinite(inverse)) inverse = 0, scale = 0;  // denormal rows read as zero
    int32_t sum_hi = 0, sum_lo = 0;
    for (int k = 0; k < padded; k++) {
        int q = k < count && finite ? int(std::nearbyintf(x[k] * inverse)) : 0;
        int hi = (q + 64) >> 7, lo = q - hi * 128;
        row.hi[at + k] = int8_t(hi);
        row.lo[at + k] = int8_t(lo);
        sum_hi += hi;
        sum_lo += lo;
    }
    // A row that holds NaN or infinity must not come out finite.
    row.scale[g] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    row.sum_hi[g] = sum_hi;
    row.sum_lo[g] = sum_lo;
}

void quantise_row(const void *x, bool is_bf16, const Shape &s, const Row &row) {
    std::vector<float> wide;
    const float *values = static_cast<const float *>(x);
    if (is_bf16) {
        wide.resize(s.inputs);
        for (int k = 0; k < s.inputs; k++) wide[k] = from_bf16(static_cast<const uint16_t *>(x)[k]);
        values = wide.data();
    }
    for (int g = 0; g < s.groups(); g++) {
        int at = g * s.group, count = std::min(s.group, s.inputs - at);
        int padded = (count + CHUNK - 1) / CHUNK * CHUNK;
        quantise_group(values + at, count, padded, row, at, g);
    }
}

void store(void *y, bool is_bf16, size_t at, const float *values, int count) {
    for (int n = 0; n < count; n++) {
        if (is_bf16) static_cast<uint16_t *>(y)[at + n] = to_bf16(values[n]);
        else static_cast<float *>(y)[at + n] = values[n];
    }
}

#if HAS_VNNI

template <int BITS> inline __m512i quad(const uint8_t *chunk, int q);

template <> inline __m512i quad<8>(const uint8_t *chunk, int q) { return _mm512_loadu_si512(chunk + q * QUAD_BYTES); }
template <> inline __m512i quad<4>(const uint8_t *chunk, int q) {
    __m512i two = _mm512_loadu_si512(chunk + (q / 2) * QUAD_BYTES);
    return _mm512_and_si512(q % 2 ? _mm512_srli_epi16(two, 4) : two, _mm512_set1_epi8(15));
}
template <> inline __m512i quad<2>(const uint8_t *chunk, int q) {
    __m512i four = _mm512_loadu_si512(chunk + (q / 4) * QUAD_BYTES);
    return _mm512_and_si512(_mm512_srli_epi16(four, 2 * (q % 4)), _mm512_set1_epi8(3));
}
// Bit q of every byte, moved to bit `to`: one mask operation and no shift across bytes.
inline __m512i one_bit(const uint8_t *plane, int q, int to) {
    __m512i eight = _mm512_loadu_si512(plane);
    return _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(eight, _mm512_set1_epi8(char(1 << q))), char(1 << to));
}
template <> inline __m512i quad<3>(const uint8_t *chunk, int q) {
    return _mm512_or_si512(quad<2>(chunk, q), one_bit(chunk + 2 * QUAD_BYTES, q, 2));
}
template <> inline __m512i quad<5>(const uint8_t *chunk, int q) {
    return _mm512_or_si512(quad<4>(chunk, q), one_bit(chunk + 4 * QUAD_BYTES, q, 4));
}
template <> inline __m512i quad<6>(const uint8_t *chunk, int q) {
    return _mm512_or_si512(quad<4>(chunk, q), _mm512_slli_epi16(quad<2>(chunk + 4 * QUAD_BYTES, q), 4));
}

inline __m512i broadcast4(const int8_t *bytes) {
    int32_t word;
    std::memcpy(&word, bytes, 4);
    return _mm512_set1_epi32(word);
}

inline __m512i zeros_of(const uint8_t *zeros, size_t at, int bits) {
    if (!zeros) return _mm512_set1_epi32(1 << (bits - 1));
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(zeros + at)));
}

inline __m512 scales_of(const uint16_t *scales, size_t at) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(scales + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// NT tiles times MB activation rows. SPLIT accumulators a sum keep dot products independent: each takes five cycles.
template <int BITS, int NT, int MB, int SPLIT>
void tiles_times_rows(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const Shape &s, int tile, const Row *rows, float *out) {
    __m512 total[NT][MB];
    for (auto &per_tile : total) for (auto &sum : per_tile) sum = _mm512_setzero_ps();
    const int groups = s.groups();
    for (int g = 0; g < groups; g++) {
        __m512i hi[NT][MB][SPLIT], lo[NT][MB][SPLIT];
        for (int t = 0; t < NT; t++) for (int m = 0; m < MB; m++) for (int p = 0; p < SPLIT; p++) hi[t][m][p] = lo[t][m][p] = _mm512_setzero_si512();
        const int end = std::min((g + 1) * s.group, s.padded());
        for (int k = g * s.group; k < end; k += CHUNK) {
#pragma GCC unroll 8
            for (int q = 0; q < QUADS; q++) {
                __m512i w[NT];
                for (int t = 0; t < NT; t++) w[t] = quad<BITS>(codes + (tile + t) * s.tile_bytes() + size_t(k) * TILE * BITS / 8, q);
                for (int m = 0; m < MB; m++) {
                    __m512i xh = broadcast4(rows[m].hi + k + 4 * q), xl = broadcast4(rows[m].lo + k + 4 * q);
                    for (int t = 0; t < NT; t++) {
                        hi[t][m][q % SPLIT] = _mm512_dpbusd_epi32(hi[t][m][q % SPLIT], w[t], xh);
                        lo[t][m][q % SPLIT] = _mm512_dpbusd_epi32(lo[t][m][q % SPLIT], w[t], xl);
                    }
                }
            }
        }
        for (int t = 0; t < NT; t++) {
            const size_t at = (size_t(tile + t) * groups + g) * TILE;
            const __m512i zero = zeros_of(zeros, at, BITS);
            const __m512 scale = scales_of(scales, at);
            for (int m = 0; m < MB; m++) {
                __m512i h = hi[t][m][0], l = lo[t][m][0];
                for (int p = 1; p < SPLIT; p++) h = _mm512_add_epi32(h, hi[t][m][p]), l = _mm512_add_epi32(l, lo[t][m][p]);
                h = _mm512_sub_epi32(h, _mm512_mullo_epi32(zero, _mm512_set1_epi32(rows[m].sum_hi[g])));
                l = _mm512_sub_epi32(l, _mm512_mullo_epi32(zero, _mm512_set1_epi32(rows[m].sum_lo[g])));
                __m512 dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(h), _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(l));
                total[t][m] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(rows[m].scale[g])), total[t][m]);
            }
        }
    }
    for (int t = 0; t < NT; t++) for (int m = 0; m < MB; m++) _mm512_storeu_ps(out + (m * NT + t) * TILE, total[t][m]);
}

#else

inline int code_at(const uint8_t *chunk, int bits, int q, int byte) {
    auto plane = [&](const uint8_t *at, int width) {
        int a_load = 8 / width;
        return (at[(q / a_load) * QUAD_BYTES + byte] >> (width * (q % a_load))) & ((1 << width) - 1);
    };
    switch (bits) {
        case 3: return plane(chunk, 2) | plane(chunk + 2 * QUAD_BYTES, 1) << 2;
        case 5: return plane(chunk, 4) | plane(chunk + 4 * QUAD_BYTES, 1) << 4;
        case 6: return plane(chunk, 4) | plane(chunk + 4 * QUAD_BYTES, 2) << 4;
        default: return plane(chunk, bits);
    }
}

// The same sums without vector instructions of our own; the compiler vectorises the inner loops where it can.
template <int BITS, int NT, int MB, int SPLIT>
void tiles_times_rows(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const Shape &s, int tile, const Row *rows, float *out) {
    static_assert(NT == 1, "the plain path takes one tile at a time");
    std::memset(out, 0, sizeof(float) * MB * TILE);
    const int groups = s.groups();
    for (int g = 0; g < groups; g++) {
        int32_t hi[MB][TILE] = {}, lo[MB][TILE] = {};
        const int end = std::min((g + 1) * s.group, s.padded());
        for (int k = g * s.group; k < end; k += CHUNK) {
            const uint8_t *chunk = codes + tile * s.tile_bytes() + size_t(k) * TILE * BITS / 8;
            for (int q = 0; q < QUADS; q++) {
                uint8_t w[QUAD_BYTES];
                for (int b = 0; b < QUAD_BYTES; b++) w[b] = uint8_t(code_at(chunk, BITS, q, b));
                for (int m = 0; m < MB; m++) {
                    const int8_t *xh = rows[m].hi + k + 4 * q, *xl = rows[m].lo + k + 4 * q;
                    for (int n = 0; n < TILE; n++) for (int j = 0; j < 4; j++) hi[m][n] += w[4 * n + j] * xh[j], lo[m][n] += w[4 * n + j] * xl[j];
                }
            }
        }
        for (int m = 0; m < MB; m++) for (int n = 0; n < TILE; n++) {
            const size_t at = (size_t(tile) * groups + g) * TILE + n;
            const int32_t zero = zeros ? zeros[at] : 1 << (BITS - 1);
            const float dot = 128.0f * float(hi[m][n] - zero * rows[m].sum_hi[g]) + float(lo[m][n] - zero * rows[m].sum_lo[g]);
            out[m * TILE + n] += dot * from_bf16(scales[at]) * rows[m].scale[g];
        }
    }
}

#endif

struct Job {
    const uint8_t *codes, *zeros;
    const uint16_t *scales;
    const float *bias;
    void *y;
    bool is_bf16;
};

template <int BITS, int NT, int MB, int SPLIT> void block(const Job &job, const Shape &s, int tile, int first, const Row *rows) {
    float out[NT * MB * TILE];
    tiles_times_rows<BITS, NT, MB, SPLIT>(job.codes, job.scales, job.zeros, s, tile, rows + first, out);
    for (int m = 0; m < MB; m++) {
        int at = tile * TILE, count = std::min(NT * TILE, s.outputs - at);
        if (job.bias) for (int n = 0; n < count; n++) out[m * NT * TILE + n] += job.bias[at + n];
        store(job.y, job.is_bf16, size_t(first + m) * s.outputs + at, out + m * NT * TILE, count);
    }
}

template <int BITS, int NT> void all_rows(const Job &job, const Shape &s, int tile, const Row *rows) {
    int m = 0;
    for (; m + 4 <= s.rows; m += 4) block<BITS, NT, 4, 1>(job, s, tile, m, rows);
    for (; m + 2 <= s.rows; m += 2) block<BITS, NT, 2, 1>(job, s, tile, m, rows);
    if (m < s.rows) block<BITS, NT, 1, 2>(job, s, tile, m, rows);
}

template <int BITS> void all_tiles(const Job &job, const Shape &s, const Row *rows, int threads) {
    const int tiles = s.tiles(), step = HAS_VNNI ? 2 : 1, pairs = (tiles + step - 1) / step;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int pair = 0; pair < pairs; pair++) {
        int tile = pair * step;
#if HAS_VNNI
        if (tile + 1 < tiles) {
            all_rows<BITS, 2>(job, s, tile, rows);
            continue;
        }
#endif
        all_rows<BITS, 1>(job, s, tile, rows);
    }
}

// Working memory of one call, kept by the calling thread so that a decode step allocates nothing.
struct Scratch {
    std::vector<int8_t> bytes;
    std::vector<float> scales;
    std::vector<int32_t> sums;
    std::vector<Row> rows;

    Row *prepare(const Shape &s) {
        size_t padded = s.padded() + s.group, groups = s.groups(), count = s.rows;
        bytes.resize(2 * count * padded);
        scales.resize(count * groups);
        sums.resize(2 * count * groups);
        rows.resize(count);
        for (size_t m = 0; m < count; m++)
            rows[m] = {&bytes[2 * m * padded], &bytes[(2 * m + 1) * padded], &scales[m * groups], &sums[2 * m * groups], &sums[(2 * m + 1) * groups]};
        return rows.data();
    }
};

}  // namespace

extern "C" {

// 1 when the vector path was compiled in, 0 for the plain one.
int bitpress_vectorised() { return HAS_VNNI; }

// y (rows, outputs) = x (rows, inputs) times the transposed tiles, plus bias where given. x and y are bfloat16 or float32.
// Returns 0, or 1 for a width that has no kernel.
int bitpress_linear(const void *x, void *y, int is_bf16, int rows, int inputs, int outputs, int bits, int group,
                    const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const float *bias, int threads) {
    const Shape s{rows, inputs, outputs, bits, group};
    if (size_t(rows) * s.padded() * outputs < WORTH_THREADS) threads = 1;
    thread_local Scratch scratch;
    Row *row = scratch.prepare(s);
    const size_t stride = size_t(inputs) * (is_bf16 ? 2 : 4);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 8)
    for (int m = 0; m < rows; m++) quantise_row(static_cast<const char *>(x) + m * stride, is_bf16, s, row[m]);
    const Job job{codes, zeros, scales, bias, y, bool(is_bf16)};
    switch (bits) {
        case 2: all_tiles<2>(job, s, row, threads); return 0;
        case 3: all_tiles<3>(job, s, row, threads); return 0;
        case 4: all_tiles<4>(job, s, row, threads); return 0;
        case 5: all_tiles<5>(job, s, row, threads); return 0;
        case 6: all_tiles<6>(job, s, row, threads); return 0;
        case 8: all_tiles<8>(job, s, row, threads); return 0;
    }
    return 1;
}
}
