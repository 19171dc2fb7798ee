// Sixteen-level codes (NF4, FP4) times a few activation rows: every code is looked up in a register.
//
// Layout. Sixteen output rows make a tile; eight inputs of a row are one 32-bit word, lane n of a 512-bit register for row n.
// The code of input 2j of a word is at bits 4j, that of input 2j + 1 at bits 16 + 4j, so that one shift brings two neighbours to
// the bottom of both halves and a 16-bit permute gives a pair of levels that one integer dot product multiplies. There levels are
// whole numbers of 12 bits and activations of 13, one scale a group. With float32 inputs, and without such instructions, all is float32.

#include "cpu_rows.h"

namespace {

constexpr int WORD = 8;  // inputs a 32-bit word

struct Table {
    int rows, inputs, outputs, group;
    const uint32_t *words;  // (tiles, padded / 8, 16)
    const float *scales;    // (tiles, groups, 16)
    const float *levels;    // 16
    int padded() const { return rounded_up(inputs, WORD); }
    int groups() const { return (inputs + group - 1) / group; }
    const uint32_t *tile_words(int tile) const { return words + size_t(tile) * (padded() / WORD) * TILE; }
    const float *tile_scales(int tile) const { return scales + size_t(tile) * groups() * TILE; }
};

#if HAS_VNNI

constexpr float TOP_LEVEL = 2047, TOP_INPUT = 4064;
constexpr int WHOLE = 256;  // inputs whose products a 32-bit sum certainly holds

// Activations as whole numbers, one scale a group.
struct Whole {
    std::vector<int16_t> q;
    std::vector<float> scales;

    void fill(const Table &t, const float *x) {
        q.assign(t.padded(), 0);
        scales.resize(t.groups());
        std::vector<int32_t> wide(t.padded());
        for (int g = 0; g < t.groups(); g++) {
            const int at = g * t.group, count = std::min(t.group, t.inputs - at);
            scales[g] = quantise(x + at, count, count, TOP_INPUT, wide.data()) / TOP_LEVEL;
            for (int k = 0; k < count; k++) q[at + k] = int16_t(wide[k]);
        }
    }
};

// 32 levels: a code may carry a bit of its neighbour above its own four.
__m512i pair_table(const float *levels) {
    alignas(64) int16_t both[32];
    for (int c = 0; c < 32; c++) both[c] = int16_t(std::nearbyintf(levels[c % 16] * TOP_LEVEL));
    return _mm512_load_si512(both);
}

inline __m512i broadcast_pair(const int16_t *two) {
    int32_t word;
    std::memcpy(&word, two, 4);
    return _mm512_set1_epi32(word);
}

template <int NT, int MB> void in_pairs(const Table &t, int tile, const Whole *x, float *out) {
    const __m512i table = pair_table(t.levels);
    __m512 total[NT][MB];
    for (auto &each : total) for (auto &sum : each) sum = _mm512_setzero_ps();
    for (int g = 0; g < t.groups(); g++) {
        const int stop = std::min((g + 1) * t.group, t.padded());
        for (int from = g * t.group; from < stop; from += WHOLE) {
            __m512i sum[NT][MB][2];
            for (auto &a : sum) for (auto &b : a) b[0] = b[1] = _mm512_setzero_si512();
            const int end = (std::min(from + WHOLE, stop) + WORD - 1) / WORD;
            for (int w = from / WORD; w < end; w++) {
                __m512i words[NT];
                for (int n = 0; n < NT; n++) {
                    words[n] = _mm512_loadu_si512(t.tile_words(tile + n) + size_t(w) * TILE);
                    _mm_prefetch(reinterpret_cast<const char *>(t.tile_words(tile + n) + size_t(w + 24) * TILE), _MM_HINT_T0);
                }
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    for (int n = 0; n < NT; n++) {
                        const __m512i level = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[n], 4 * j), table);
                        for (int m = 0; m < MB; m++) sum[n][m][j % 2] = _mm512_dpwssd_epi32(sum[n][m][j % 2], level, broadcast_pair(&x[m].q[w * WORD + 2 * j]));
                    }
                }
            }
            for (int n = 0; n < NT; n++) {
                const __m512 scale = _mm512_loadu_ps(t.tile_scales(tile + n) + size_t(g) * TILE);
                for (int m = 0; m < MB; m++) {
                    const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[n][m][0], sum[n][m][1]));
                    total[n][m] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(x[m].scales[g])), total[n][m]);
                }
            }
        }
    }
    for (int n = 0; n < NT; n++) for (int m = 0; m < MB; m++) _mm512_storeu_ps(out + (m * NT + n) * TILE, total[n][m]);
}

#endif

#if defined(__AVX512F__)
inline void add_looked_up(float *sum, const uint32_t *words, int shift, const float *levels, float x) {
    const __m512i index = _mm512_srli_epi32(_mm512_loadu_si512(words), shift);
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_permutexvar_ps(index, _mm512_loadu_ps(levels)), _mm512_set1_ps(x), _mm512_loadu_ps(sum)));
}
#elif defined(__AVX2__) && defined(__FMA__)
inline void add_looked_up(float *sum, const uint32_t *words, int shift, const float *levels, float x) {
    for (int half = 0; half < TILE; half += 8) {
        const __m256i index = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(words + half)), shift);
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), index), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), index);
        const __m256 level = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
        _mm256_storeu_ps(sum + half, _mm256_fmadd_ps(level, _mm256_set1_ps(x), _mm256_loadu_ps(sum + half)));
    }
}
#else
inline void add_looked_up(float *sum, const uint32_t *words, int shift, const float *levels, float x) {
    for (int n = 0; n < TILE; n++) sum[n] += levels[(words[n] >> shift) & 15] * x;
}
#endif

// float32 inputs, and processors without integer dot products: one tile and one row at a time.
void in_floats(const Table &t, int tile, const float *x, float *out) {
    alignas(64) float total[TILE] = {};
    for (int g = 0; g < t.groups(); g++) {
        alignas(64) float sum[TILE] = {};
        const int end = (std::min((g + 1) * t.group, t.padded()) + WORD - 1) / WORD;
        for (int w = g * t.group / WORD; w < end; w++) {
            const uint32_t *words = t.tile_words(tile) + size_t(w) * TILE;
            for (int j = 0; j < WORD; j++) add_looked_up(sum, words, (j % 2) * 16 + (j / 2) * 4, t.levels, x[w * WORD + j]);
        }
        const float *scale = t.tile_scales(tile) + size_t(g) * TILE;
        for (int n = 0; n < TILE; n++) total[n] += sum[n] * scale[n];
    }
    std::memcpy(out, total, sizeof(total));
}

void keep(const Table &t, void *y, bool is_bf16, int tile, int tiles, int first, int count, const float *out) {
    const int width = std::min(tiles * TILE, t.outputs - tile * TILE);
    for (int m = 0; m < count; m++) store(y, is_bf16, size_t(first + m) * t.outputs + tile * TILE, out + m * tiles * TILE, width);
}

#if HAS_VNNI
template <int NT> void all_rows(const Table &t, void *y, int tile, const Whole *x) {
    float out[4 * NT * TILE];
    int m = 0;
    for (; m + 4 <= t.rows; m += 4) in_pairs<NT, 4>(t, tile, x + m, out), keep(t, y, true, tile, NT, m, 4, out);
    for (; m + 2 <= t.rows; m += 2) in_pairs<NT, 2>(t, tile, x + m, out), keep(t, y, true, tile, NT, m, 2, out);
    for (; m < t.rows; m++) in_pairs<NT, 1>(t, tile, x + m, out), keep(t, y, true, tile, NT, m, 1, out);
}

void with_pairs(const Table &t, const float *x, void *y, int threads) {
    thread_local std::vector<Whole> room;
    if (int(room.size()) < t.rows) room.resize(t.rows);
    Whole *rows = room.data();
    for (int m = 0; m < t.rows; m++) rows[m].fill(t, x + size_t(m) * t.padded());
    const int tiles = (t.outputs + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int pair = 0; pair < (tiles + 1) / 2; pair++) {
        if (2 * pair + 1 < tiles) all_rows<2>(t, y, 2 * pair, rows);
        else all_rows<1>(t, y, 2 * pair, rows);
    }
}
#endif

}  // namespace

extern "C" {

// y (rows, outputs) = x (rows, inputs) times the transposed matrix. x and y are bfloat16 or float32; group a multiple of 8 or the padded row.
void bitpress_table(const void *x, void *y, int is_bf16, int rows, int inputs, int outputs, int group, const uint32_t *words, const float *scales,
                    const float *levels, int threads) {
    const Table t{rows, inputs, outputs, group, words, scales, levels};
    if (size_t(rows) * inputs * outputs < WORTH_THREADS) threads = 1;
    thread_local std::vector<float> room;
    const float *wide = widen_rows(x, is_bf16, rows, inputs, t.padded(), room);
#if HAS_VNNI
    if (is_bf16) return with_pairs(t, wide, y, threads);
#endif
    const int tiles = (outputs + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int tile = 0; tile < tiles; tile++) {
        for (int m = 0; m < rows; m++) {
            float out[TILE];
            in_floats(t, tile, wide + size_t(m) * t.padded(), out);
            keep(t, y, is_bf16, tile, 1, m, 1, out);
        }
    }
}
}
