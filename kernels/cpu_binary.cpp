// Binary-coded weights times a few activation rows, by look-up: four inputs have sixteen sums of plus and minus.
//
// After LUT-GEMM (Park et al. 2024, arXiv 2206.09557), with the tables in registers. Activations become whole numbers of 13
// bits, one scale a group, so that a sum of four is 128 * high + low in two signed bytes.
//
// Layout. Sixteen output rows make a tile, 32 inputs a chunk, and a chunk of one plane 64 bytes: the low half of byte 4 * row + c
// holds the signs of inputs 4c .. 4c + 3, its high half those of inputs 16 + 4c .. 16 + 4c + 3. Two tiles lie side by side, chunk by
// chunk, so that a thread reads one long stretch. With 64-byte permutes (VBMI) one instruction looks up all 64 sums of 16 inputs, one
// more adds the four of each row. Elsewhere the same tables are read one by one.

#include "cpu_rows.h"
#if HAS_VNNI && defined(__AVX512VBMI__)
#define HAS_VBMI 1
#else
#define HAS_VBMI 0
#endif

namespace {

constexpr int CHUNK = 32, BYTES = 64, AHEAD = 4096;
constexpr float TOP = 4064;  // four of them are 128 * 127

struct Binary {
    int rows, inputs, outputs, planes, group;
    const uint8_t *signs;     // (pairs of tiles, chunks, 2, planes, 64)
    const uint16_t *factors;  // bfloat16 (pairs of tiles, groups, 2, planes + 1, 16): the alphas, then the shift
    int padded() const { return rounded_up(inputs, CHUNK); }
    int groups() const { return (inputs + group - 1) / group; }
    const uint16_t *factors_at(int tile, int g) const { return factors + ((size_t(tile / 2) * groups() + g) * 2 + tile % 2) * (planes + 1) * TILE; }
    const uint8_t *signs_at(int tile, int k) const { return signs + (size_t(tile / 2) * 2 * (padded() / CHUNK) + 2 * (k / CHUNK) + tile % 2) * planes * BYTES; }
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

    // The sums of four numbers by the bits of e: bit i set adds the i-th, clear takes it away.
    static void four(const int32_t *__restrict q, int8_t *__restrict high) {
        int32_t sum[16];
        for (int e = 0; e < 16; e++) sum[e] = (e & 1 ? q[0] : -q[0]) + (e & 2 ? q[1] : -q[1]) + (e & 4 ? q[2] : -q[2]) + (e & 8 ? q[3] : -q[3]);
        for (int e = 0; e < 16; e++) high[e] = int8_t((sum[e] + 64) >> 7);
        for (int e = 0; e < 16; e++) high[64 + e] = int8_t(sum[e] - 128 * high[e]);
    }
};

#if HAS_VBMI

template <int PLANES, int NT> void tiles_times_row(const Binary &b, int tile, const Tables &x, float *out) {
    const __m512i which = _mm512_set1_epi32(0x30201000), low_half = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
    const int groups = b.groups();
    __m512 total[NT];
    for (auto &each : total) each = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++) {
        __m512i high[NT][PLANES], low[NT][PLANES];
        for (int t = 0; t < NT; t++) for (int p = 0; p < PLANES; p++) high[t][p] = low[t][p] = _mm512_setzero_si512();
        const int end = std::min((g + 1) * b.group, b.padded());
        for (int k = g * b.group; k < end; k += CHUNK) {
            const int8_t *table = x.bytes.data() + size_t(k) * 8;
            const __m512i first_high = _mm512_loadu_si512(table), first_low = _mm512_loadu_si512(table + 64);
            const __m512i second_high = _mm512_loadu_si512(table + 128), second_low = _mm512_loadu_si512(table + 192);
            for (int t = 0; t < NT; t++) for (int p = 0; p < PLANES; p++) {
                const uint8_t *at = b.signs_at(tile + t, k) + p * BYTES;
                _mm_prefetch(reinterpret_cast<const char *>(at + AHEAD), _MM_HINT_T0);
                const __m512i both = _mm512_loadu_si512(at);
                // (both & 15) | which, in one instruction
                const __m512i first = _mm512_ternarylogic_epi32(both, low_half, which, 0xEA);
                const __m512i second = _mm512_ternarylogic_epi32(_mm512_srli_epi16(both, 4), low_half, which, 0xEA);
                high[t][p] = _mm512_dpbusd_epi32(high[t][p], ones, _mm512_permutexvar_epi8(first, first_high));
                low[t][p] = _mm512_dpbusd_epi32(low[t][p], ones, _mm512_permutexvar_epi8(first, first_low));
                high[t][p] = _mm512_dpbusd_epi32(high[t][p], ones, _mm512_permutexvar_epi8(second, second_high));
                low[t][p] = _mm512_dpbusd_epi32(low[t][p], ones, _mm512_permutexvar_epi8(second, second_low));
            }
        }
        for (int t = 0; t < NT; t++) {
            const uint16_t *factors = b.factors_at(tile + t, g);
            for (int p = 0; p <= PLANES; p += 2) __builtin_prefetch(factors + p * TILE + AHEAD / 4);
            __m512 value = _mm512_mul_ps(bf16_lanes(factors + PLANES * TILE), _mm512_set1_ps(x.sums[g]));
            for (int p = 0; p < PLANES; p++) {
                const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[t][p]), _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(low[t][p]));
                value = _mm512_fmadd_ps(sum, bf16_lanes(factors + p * TILE), value);
            }
            total[t] = _mm512_fmadd_ps(value, _mm512_set1_ps(x.scales[g]), total[t]);
        }
    }
    for (int t = 0; t < NT; t++) _mm512_storeu_ps(out + t * TILE, total[t]);
}

#else

template <int PLANES> void tile_times_row(const Binary &b, int tile, const Tables &x, float *out) {
    std::memset(out, 0, sizeof(float) * TILE);
    for (int g = 0; g < b.groups(); g++) {
        const uint16_t *factors = b.factors_at(tile, g);
        int32_t sum[PLANES][TILE] = {};
        const int end = std::min((g + 1) * b.group, b.padded());
        for (int k = g * b.group; k < end; k += CHUNK) {
            const int8_t *table = x.bytes.data() + size_t(k) * 8;
            for (int p = 0; p < PLANES; p++) {
                const uint8_t *at = b.signs_at(tile, k) + p * BYTES;
                for (int n = 0; n < TILE; n++) for (int c = 0; c < 4; c++) {
                    const int first = 16 * c + (at[4 * n + c] & 15), second = 128 + 16 * c + (at[4 * n + c] >> 4);
                    sum[p][n] += 128 * (table[first] + table[second]) + table[64 + first] + table[64 + second];
                }
            }
        }
        for (int n = 0; n < TILE; n++) {
            float value = from_bf16(factors[PLANES * TILE + n]) * x.sums[g];
            for (int p = 0; p < PLANES; p++) value += float(sum[p][n]) * from_bf16(factors[p * TILE + n]);
            out[n] += value * x.scales[g];
        }
    }
}

template <int PLANES, int NT> void tiles_times_row(const Binary &b, int tile, const Tables &x, float *out) {
    for (int t = 0; t < NT; t++) tile_times_row<PLANES>(b, tile + t, x, out + t * TILE);
}

#endif

template <int PLANES, int NT> void some_tiles(const Binary &b, int tile, const Tables *x, void *y, bool is_bf16) {
    float out[NT * TILE];
    for (int m = 0; m < b.rows; m++) {
        tiles_times_row<PLANES, NT>(b, tile, x[m], out);
        store(y, is_bf16, size_t(m) * b.outputs + tile * TILE, out, std::min(NT * TILE, b.outputs - tile * TILE));
    }
}

// STEP tiles share a look at the tables, which are larger than the nearest cache; as many as have sums in registers.
template <int PLANES> void all_tiles(const Binary &b, const Tables *x, void *y, bool is_bf16, int threads) {
    constexpr int STEP = PLANES <= 2 ? 4 : 2;
    const int tiles = (b.outputs + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int first = 0; first < tiles; first += STEP) {
        if (first + STEP <= tiles) some_tiles<PLANES, STEP>(b, first, x, y, is_bf16);
        else for (int tile = first; tile < tiles; tile++) some_tiles<PLANES, 1>(b, tile, x, y, is_bf16);
    }
}

}  // namespace

extern "C" {

// y (rows, outputs) = x (rows, inputs) times the transposed matrix. x and y are bfloat16 or float32; group a multiple of 32 or the
// padded row. Returns 0, or 1 for a number of planes that has no kernel.
int bitpress_binary(const void *x, void *y, int is_bf16, int rows, int inputs, int outputs, int planes, int group, const uint8_t *signs,
                    const uint16_t *factors, int threads) {
    const Binary b{rows, inputs, outputs, planes, group, signs, factors};
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
