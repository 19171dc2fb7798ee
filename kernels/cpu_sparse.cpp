// Weights with zeros that are not stored, times a few activation rows: bfloat16 values behind a bitmap, and two of every four.
//
// Bitmap. A row is one bit an input, 32 to a word, and its values in order. A register of values is spread to the places of the
// ones and multiplied by inputs as they lie; elsewhere the bits are walked one by one.
// Two of four. Sixteen output rows make a tile, one a lane. The two values of a four are one 32-bit word, the first in its low half;
// 32 inputs' places are another: 2 bits a value, in order. Each lane picks its own inputs out of the four by a permute.

#include "cpu_rows.h"
#if HAS_BF16 && defined(__AVX512VBMI2__)
#define HAS_EXPAND 1
#else
#define HAS_EXPAND 0
#endif

namespace {

constexpr int WORD = 32;  // inputs of a word of bits, or of places

#if HAS_EXPAND

// One row of weights times MB rows of bfloat16 pairs, `words` words of 32 inputs.
template <int MB> void row_times_rows(const uint32_t *bits, const uint16_t *values, int words, const uint16_t *const *x, float *out) {
    __m512 sum[MB][2];
    for (auto &each : sum) each[0] = each[1] = _mm512_setzero_ps();
    for (int w = 0; w < words; w++) {
        const __m512bh spread = (__m512bh)_mm512_maskz_expand_epi16(bits[w], _mm512_loadu_si512(values));
        values += __builtin_popcount(bits[w]);
        for (int m = 0; m < MB; m++) sum[m][w % 2] = _mm512_dpbf16_ps(sum[m][w % 2], spread, (__m512bh)_mm512_loadu_si512(x[m] + size_t(w) * WORD));
    }
    for (int m = 0; m < MB; m++) out[m] = _mm512_reduce_add_ps(_mm512_add_ps(sum[m][0], sum[m][1]));
}

#endif

float row_times_floats(const uint32_t *bits, const uint16_t *values, int words, const float *x) {
    float total = 0;
    for (int w = 0; w < words; w++) {
        float sum = 0;
        for (uint32_t left = bits[w]; left; left &= left - 1) sum += from_bf16(*values++) * x[w * WORD + __builtin_ctz(left)];
        total += sum;
    }
    return total;
}

struct Bitmap {
    int rows, inputs, outputs;
    const uint32_t *bits;     // (outputs, words)
    const uint16_t *values;   // row after row, a register's worth of room behind the last
    const int64_t *starts;    // of a row's values
    int words() const { return (inputs + WORD - 1) / WORD; }
};

void keep_one(void *y, bool is_bf16, size_t at, float value) { store(y, is_bf16, at, &value, 1); }

#if HAS_EXPAND
template <int MB> int some_rows(const Bitmap &b, void *y, int n, int first, const uint16_t *const *x) {
    float out[MB];
    row_times_rows<MB>(b.bits + size_t(n) * b.words(), b.values + b.starts[n], b.words(), x + first, out);
    for (int m = 0; m < MB; m++) keep_one(y, true, size_t(first + m) * b.outputs + n, out[m]);
    return first + MB;
}

void with_pairs(const Bitmap &b, const uint16_t *x, void *y, int threads) {
    thread_local std::vector<uint16_t> room;
    const int padded = b.words() * WORD;
    room.assign(size_t(b.rows) * padded, 0);
    std::vector<const uint16_t *> rows(b.rows);
    for (int m = 0; m < b.rows; m++) {
        std::memcpy(&room[size_t(m) * padded], x + size_t(m) * b.inputs, 2 * size_t(b.inputs));
        rows[m] = &room[size_t(m) * padded];
    }
    const uint16_t *const *all = rows.data();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int n = 0; n < b.outputs; n++) {
        int m = 0;
        while (m + 8 <= b.rows) m = some_rows<8>(b, y, n, m, all);
        while (m + 2 <= b.rows) m = some_rows<2>(b, y, n, m, all);
        while (m < b.rows) m = some_rows<1>(b, y, n, m, all);
    }
}
#endif

struct TwoFour {
    int rows, inputs, outputs;
    const uint32_t *values;  // (tiles, padded / 4, 16)
    const uint32_t *places;  // (tiles, padded / 32, 16)
    int padded() const { return rounded_up(inputs, WORD); }
};

#if defined(__AVX512F__)

// One tile times MB rows.
template <int MB> void tile_times_rows(const TwoFour &t, int tile, const float *const *x, float *out) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    __m512 sum[MB][2];
    for (auto &each : sum) each[0] = each[1] = _mm512_setzero_ps();
    const uint32_t *values = t.values + size_t(tile) * t.padded() / 4 * TILE, *places = t.places + size_t(tile) * t.padded() / WORD * TILE;
    for (int k = 0; k < t.padded(); k += WORD, places += TILE) {
        __m512i place = _mm512_loadu_si512(places);
#pragma GCC unroll 8
        for (int f = 0; f < 8; f++, values += TILE) {
            const __m512i both = _mm512_loadu_si512(values), next = _mm512_srli_epi32(place, 2);
            _mm_prefetch(reinterpret_cast<const char *>(values + 32 * TILE), _MM_HINT_T0);
            const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), second = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
            for (int m = 0; m < MB; m++) {
                const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(x[m] + k + 4 * f));
                sum[m][0] = _mm512_fmadd_ps(first, _mm512_permutevar_ps(four, place), sum[m][0]);
                sum[m][1] = _mm512_fmadd_ps(second, _mm512_permutevar_ps(four, next), sum[m][1]);
            }
            place = _mm512_srli_epi32(place, 4);
        }
    }
    for (int m = 0; m < MB; m++) _mm512_storeu_ps(out + m * TILE, _mm512_add_ps(sum[m][0], sum[m][1]));
}

#elif defined(__AVX2__) && defined(__FMA__)

template <int MB> void tile_times_rows(const TwoFour &t, int tile, const float *const *x, float *out) {
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    for (int half = 0; half < TILE; half += 8) {
        __m256 sum[MB];
        for (auto &each : sum) each = _mm256_setzero_ps();
        const uint32_t *values = t.values + size_t(tile) * t.padded() / 4 * TILE + half, *places = t.places + size_t(tile) * t.padded() / WORD * TILE + half;
        for (int k = 0; k < t.padded(); k += WORD, places += TILE) {
            __m256i place = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(places));
            for (int f = 0; f < 8; f++, values += TILE) {
                const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(values)), next = _mm256_srli_epi32(place, 2);
                const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), second = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
                for (int m = 0; m < MB; m++) {
                    const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(x[m] + k + 4 * f));
                    sum[m] = _mm256_fmadd_ps(first, _mm256_permutevar_ps(four, place), sum[m]);
                    sum[m] = _mm256_fmadd_ps(second, _mm256_permutevar_ps(four, next), sum[m]);
                }
                place = _mm256_srli_epi32(place, 4);
            }
        }
        for (int m = 0; m < MB; m++) _mm256_storeu_ps(out + m * TILE + half, sum[m]);
    }
}

#else

template <int MB> void tile_times_rows(const TwoFour &t, int tile, const float *const *x, float *out) {
    std::memset(out, 0, sizeof(float) * MB * TILE);
    const uint32_t *values = t.values + size_t(tile) * t.padded() / 4 * TILE, *places = t.places + size_t(tile) * t.padded() / WORD * TILE;
    for (int k = 0; k < t.padded(); k += 4, values += TILE) {
        for (int n = 0; n < TILE; n++) {
            const uint32_t place = places[size_t(k / WORD) * TILE + n] >> (k % WORD);
            for (int m = 0; m < MB; m++) {
                out[m * TILE + n] += from_bf16(uint16_t(values[n])) * x[m][k + (place & 3)];
                out[m * TILE + n] += from_bf16(uint16_t(values[n] >> 16)) * x[m][k + ((place >> 2) & 3)];
            }
        }
    }
}

#endif

template <int MB> int some_tile_rows(const TwoFour &t, void *y, bool is_bf16, int tile, int first, const float *const *x) {
    float out[MB * TILE];
    tile_times_rows<MB>(t, tile, x + first, out);
    for (int m = 0; m < MB; m++) store(y, is_bf16, size_t(first + m) * t.outputs + tile * TILE, out + m * TILE, std::min(TILE, t.outputs - tile * TILE));
    return first + MB;
}

}  // namespace

extern "C" {

// y (rows, outputs) = x (rows, inputs) times the transposed matrix. x and y are bfloat16 or float32.
void bitpress_bitmap(const void *x, void *y, int is_bf16, int rows, int inputs, int outputs, const uint32_t *bits, const uint16_t *values,
                     const int64_t *starts, int threads) {
    const Bitmap b{rows, inputs, outputs, bits, values, starts};
    if (size_t(rows) * inputs * outputs < WORTH_THREADS) threads = 1;
#if HAS_EXPAND
    if (is_bf16) return with_pairs(b, static_cast<const uint16_t *>(x), y, threads);
#endif
    thread_local std::vector<float> room;
    const int padded = b.words() * WORD;
    const float *wide = widen_rows(x, is_bf16, rows, inputs, padded, room);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int n = 0; n < outputs; n++)
        for (int m = 0; m < rows; m++)
            keep_one(y, is_bf16, size_t(m) * outputs + n, row_times_floats(bits + size_t(n) * b.words(), values + starts[n], b.words(), wide + size_t(m) * padded));
}

// The same for two of four; inputs a multiple of 4.
void bitpress_two_four(const void *x, void *y, int is_bf16, int rows, int inputs, int outputs, const uint32_t *values, const uint32_t *places, int threads) {
    const TwoFour t{rows, inputs, outputs, values, places};
    if (size_t(rows) * inputs * outputs < WORTH_THREADS) threads = 1;
    thread_local std::vector<float> room;
    const float *wide = widen_rows(x, is_bf16, rows, inputs, t.padded(), room);
    std::vector<const float *> each(rows);
    for (int m = 0; m < rows; m++) each[m] = wide + size_t(m) * t.padded();
    const float *const *all = each.data();
    const int tiles = (outputs + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int tile = 0; tile < tiles; tile++) {
        int m = 0;
        while (m + 8 <= rows) m = some_tile_rows<8>(t, y, is_bf16, tile, m, all);
        while (m + 2 <= rows) m = some_tile_rows<2>(t, y, is_bf16, tile, m, all);
        while (m < rows) m = some_tile_rows<1>(t, y, is_bf16, tile, m, all);
    }
}
}
