// Binary-coded weights times a few activation rows, by look-up: four inputs have sixteen sums of plus and minus.
//
// After LUT-GEMM (Park et al. 2024, arXiv 2206.09557), with the tables in registers. Activations become whole numbers of 13
// bits, one scale a group, so that a sum of four is 128 * high + low in two signed bytes.
//
// Layout. Sixteen output rows make a tile, 32 inputs a chunk, and a chunk of one plane 64 bytes: the low half of byte 4 * row + c
// holds the signs of inputs 4c .. 4c + 3, its high half those of inputs 16 + 4c .. 16 + 4c + 3. With 64-byte permutes (VBMI) one
// instruction looks up all 64 sums of 16 inputs, one more adds the four of each row. Elsewhere the same tables are read one by one.

#include "cpu_rows.h"
#if HAS_VNNI && defined(__AVX512VBMI__)
#define HAS_VBMI 1
#else
#define HAS_VBMI 0
#endif

namespace {

constexpr int CHUNK = 32, BYTES = 64;
constexpr float TOP = 4064;  // four of them are 128 * 127

struct Binary {
    int rows, inputs, outputs, planes, group;
    const uint8_t *signs;    // (tiles, chunks, planes, 64)
    const float *alphas;     // (tiles, groups, planes, 16)
    const float *shifts;     // (tiles, groups, 16)
    int padded() const { return rounded_up(inputs, CHUNK); }
    int groups() const { return (inputs + group - 1) / group; }
};

// One row of activations: for every 16 inputs 64 high and 64 low bytes, for every group its scale and the sum of its numbers.
struct Tables {
    std::vector<int8_t> bytes;
    std::vector<float> scales, sums;

    void fill(const Binary &b, const float *x) {
        bytes.resize(size_t(b.padded()) * 8);
        scales.resize(b.groups());
        sums.resize(b.groups());
        std::vector<int32_t> q(rounded_up(std::min(b.group, b.padded()), CHUNK));
        for (int g = 0; g < b.groups(); g++) {
            const int at = g * b.group, count = std::min(b.group, b.inputs - at), padded = rounded_up(count, CHUNK);
            scales[g] = quantise(x + at, count, padded, TOP, q.data());
            double sum = 0;
            for (int k = 0; k < count; k++) sum += q[k];
            sums[g] = float(sum);
            for (int k = 0; k < padded; k += 4) four(&q[k], &bytes[size_t(at + k) / 16 * 128 + ((at + k) % 16) * 4]);
        }
    }

    static void four(const int32_t *q, int8_t *high) {
        int32_t sum[16] = {-(q[0] + q[1] + q[2] + q[3])};
        for (int i = 0; i < 4; i++) for (int e = 0; e < 1 << i; e++) sum[e + (1 << i)] = sum[e] + 2 * q[i];
        for (int e = 0; e < 16; e++) {
            const int top = (sum[e] + 64) >> 7;
            high[e] = int8_t(top);
            high[64 + e] = int8_t(sum[e] - 128 * top);
        }
    }
};

#if HAS_VBMI

template <int PLANES> void tile_times_row(const Binary &b, int tile, const Tables &x, float *out) {
    const __m512i which = _mm512_set1_epi32(0x30201000), low_half = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
    const uint8_t *signs = b.signs + size_t(tile) * b.padded() / CHUNK * PLANES * BYTES;
    __m512 total = _mm512_setzero_ps();
    for (int g = 0; g < b.groups(); g++) {
        __m512i high[PLANES], low[PLANES];
        for (int p = 0; p < PLANES; p++) high[p] = low[p] = _mm512_setzero_si512();
        const int end = std::min((g + 1) * b.group, b.padded());
        for (int k = g * b.group; k < end; k += CHUNK) {
            const int8_t *table = x.bytes.data() + size_t(k) * 8;
            const __m512i first_high = _mm512_loadu_si512(table), first_low = _mm512_loadu_si512(table + 64);
            const __m512i second_high = _mm512_loadu_si512(table + 128), second_low = _mm512_loadu_si512(table + 192);
            const uint8_t *at = signs + size_t(k) / CHUNK * PLANES * BYTES;
            for (int p = 0; p < PLANES; p++) {
                _mm_prefetch(reinterpret_cast<const char *>(at + p * BYTES + 2048), _MM_HINT_T0);
                const __m512i both = _mm512_loadu_si512(at + p * BYTES);
                // (both & 15) | which, in one instruction
                const __m512i first = _mm512_ternarylogic_epi32(both, low_half, which, 0xEA);
                const __m512i second = _mm512_ternarylogic_epi32(_mm512_srli_epi16(both, 4), low_half, which, 0xEA);
                high[p] = _mm512_dpbusd_epi32(high[p], ones, _mm512_permutexvar_epi8(first, first_high));
                low[p] = _mm512_dpbusd_epi32(low[p], ones, _mm512_permutexvar_epi8(first, first_low));
                high[p] = _mm512_dpbusd_epi32(high[p], ones, _mm512_permutexvar_epi8(second, second_high));
                low[p] = _mm512_dpbusd_epi32(low[p], ones, _mm512_permutexvar_epi8(second, second_low));
            }
        }
        const size_t group = size_t(tile) * b.groups() + g;
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(b.shifts + group * TILE), _mm512_set1_ps(x.sums[g]));
        for (int p = 0; p < PLANES; p++) {
            const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[p]), _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(low[p]));
            value = _mm512_fmadd_ps(sum, _mm512_loadu_ps(b.alphas + (group * PLANES + p) * TILE), value);
        }
        total = _mm512_fmadd_ps(value, _mm512_set1_ps(x.scales[g]), total);
    }
    _mm512_storeu_ps(out, total);
}

#else

template <int PLANES> void tile_times_row(const Binary &b, int tile, const Tables &x, float *out) {
    std::memset(out, 0, sizeof(float) * TILE);
    for (int g = 0; g < b.groups(); g++) {
        const size_t group = size_t(tile) * b.groups() + g;
        int32_t sum[PLANES][TILE] = {};
        const int end = std::min((g + 1) * b.group, b.padded());
        for (int k = g * b.group; k < end; k += CHUNK) {
            const int8_t *table = x.bytes.data() + size_t(k) * 8;
            for (int p = 0; p < PLANES; p++) {
                const uint8_t *at = b.signs + ((size_t(tile) * b.padded() / CHUNK + k / CHUNK) * PLANES + p) * BYTES;
                for (int n = 0; n < TILE; n++) for (int c = 0; c < 4; c++) {
                    const int first = 16 * c + (at[4 * n + c] & 15), second = 128 + 16 * c + (at[4 * n + c] >> 4);
                    sum[p][n] += 128 * (table[first] + table[second]) + table[64 + first] + table[64 + second];
                }
            }
        }
        for (int n = 0; n < TILE; n++) {
            float value = b.shifts[group * TILE + n] * x.sums[g];
            for (int p = 0; p < PLANES; p++) value += float(sum[p][n]) * b.alphas[(group * PLANES + p) * TILE + n];
            out[n] += value * x.scales[g];
        }
    }
}

#endif

template <int PLANES> void all_tiles(const Binary &b, const Tables *x, void *y, bool is_bf16, int threads) {
    const int tiles = (b.outputs + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int tile = 0; tile < tiles; tile++) {
        float out[TILE];
        for (int m = 0; m < b.rows; m++) {
            tile_times_row<PLANES>(b, tile, x[m], out);
            store(y, is_bf16, size_t(m) * b.outputs + tile * TILE, out, std::min(TILE, b.outputs - tile * TILE));
        }
    }
}

}  // namespace

extern "C" {

// y (rows, outputs) = x (rows, inputs) times the transposed matrix. x and y are bfloat16 or float32; group a multiple of 32 or the
// padded row. Returns 0, or 1 for a number of planes that has no kernel.
int bitpress_binary(const void *x, void *y, int is_bf16, int rows, int inputs, int outputs, int planes, int group, const uint8_t *signs,
                    const float *alphas, const float *shifts, int threads) {
    const Binary b{rows, inputs, outputs, planes, group, signs, alphas, shifts};
    if (size_t(rows) * inputs * outputs < WORTH_THREADS) threads = 1;
    thread_local std::vector<float> room;
    thread_local std::vector<Tables> tables;
    const float *wide = widen_rows(x, is_bf16, rows, inputs, b.padded(), room);
    if (int(tables.size()) < rows) tables.resize(rows);
    Tables *each = tables.data();
    for (int m = 0; m < rows; m++) each[m].fill(b, wide + size_t(m) * b.padded());
    switch (planes) {
        case 1: all_tiles<1>(b, each, y, is_bf16, threads); return 0;
        case 2: all_tiles<2>(b, each, y, is_bf16, threads); return 0;
        case 3: all_tiles<3>(b, each, y, is_bf16, threads); return 0;
        case 4: all_tiles<4>(b, each, y, is_bf16, threads); return 0;
    }
    return 1;
}
}
