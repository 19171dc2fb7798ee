// Codes multiplied as codes: scores of keys coded by channel and mixes of values coded by token, neither made a row first.
//
// A query times a key is query * scale * code + query * low: the scale goes into the query, once for 32 tokens. A share times a value is
// share * scale * code + share * low. What codes are multiplied by is rounded to whole numbers of 16 bits, 256 * high + low with signed
// bytes for both, for the processor's sums of unsigned times signed bytes: an error of 2^-16 of the largest, far below bfloat16's.
// For processors with AVX-512 VBMI; others decode first (cpu_cache_rows.h).
#pragma once
#include "cpu_cache_rows.h"

#if HAS_VNNI && defined(__AVX512VBMI__)
#define HAS_CODES 1
#else
#define HAS_CODES 0
#endif

namespace cache {

inline bool keys_as_codes(const CacheSide &s, int channels) {
    return HAS_CODES && s.by_channel && !s.up && s.group == SPAN && channels % TILE == 0 && channels <= 256;
}

// width: numbers that a head mixes, its own or the row that all share.
inline bool values_as_codes(const CacheSide &s, int width) {
    return HAS_CODES && s.bits && !s.by_channel && s.group % SPAN == 0 && (width % SPAN == 0 || width == s.width);
}

#if HAS_CODES

// 32 codes of each of four runs, `stride` bytes apart: word n of codes[h] holds code 16 h + n of all four. Two codes of up to 6 bits, or of
// 8, lie within two bytes; formats have no 7.
struct FourRuns {
    __m512i order[2], shift, mask;
    __mmask16 held;
    int behind;  // bytes to the second 16 codes where they do not fit a lane together with the first
    explicit FourRuns(int bits) : mask(_mm512_set1_epi8(char((1 << bits) - 1))), held(__mmask16((1u << std::min(16, 4 * bits)) - 1)), behind(bits > 4 ? 2 * bits : 0) {
        alignas(64) uint8_t orders[2][64], shifts[64];
        for (int pair = 0; pair < 8; pair++)
            for (int run = 0; run < 4; run++)
                for (int one = 0; one < 2; one++) {
                    const int bit = 2 * bits * pair;
                    for (int half = 0; half < 2; half++) orders[half][8 * pair + 2 * run + one] = uint8_t(16 * run + ((behind ? 0 : half * 16 * bits) + bit) / 8 + one);
                    shifts[8 * pair + 4 * one + run] = uint8_t(16 * run + bit % 8 + one * bits);
                }
        for (int half = 0; half < 2; half++) order[half] = _mm512_load_si512(orders[half]);
        shift = _mm512_load_si512(shifts);
        if (behind) held = __mmask16((1u << behind) - 1);
    }
    void operator()(const uint8_t *from, size_t stride, __m512i (&codes)[2]) const {
        const __m512i first = lanes_of(from, stride), second = behind ? lanes_of(from + behind, stride) : first;
        codes[0] = taken(first, order[0]), codes[1] = taken(second, order[1]);
    }

  private:
    __m512i lanes_of(const uint8_t *from, size_t stride) const {
        if (stride == 16 && held == 0xffff) return _mm512_loadu_si512(from);
        const auto lane = [&](int run) { return _mm_maskz_loadu_epi8(held, from + run * stride); };
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(2)), lane(3), 1);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    __m512i taken(__m512i bytes, __m512i places) const { return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(places, bytes)), mask); }
};

// Numbers as two signed bytes each, and what 256 * high + low is to be multiplied by.
struct Digits {
    alignas(64) int8_t high[256], low[256];
    float scale;
    void take(const __m512 *x, int count) {
        constexpr float TOP = 127 * 256;
        __m512 most = _mm512_setzero_ps();
        for (int i = 0; i < count; i++) most = _mm512_max_ps(most, _mm512_abs_ps(x[i]));
        const float largest = _mm512_reduce_max_ps(most);
        const __m512 inverse = _mm512_set1_ps(largest > TOP * std::numeric_limits<float>::min() ? TOP / largest : 0.0f);
        scale = largest / TOP;
        for (int i = 0; i < count; i++) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse));
            const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            _mm_store_si128(reinterpret_cast<__m128i *>(high + TILE * i), _mm512_cvtepi32_epi8(above));
            _mm_store_si128(reinterpret_cast<__m128i *>(low + TILE * i), _mm512_cvtepi32_epi8(_mm512_sub_epi32(whole, _mm512_slli_epi32(above, 8))));
        }
    }
};

inline __m512i spread(const int8_t *four) {
    int32_t word;
    std::memcpy(&word, four, 4);
    return _mm512_set1_epi32(word);
}

// results (S, 2) times 16: what codes_at(step) gives, times four digits a step, summed over `steps`, plus `base`. The sums are registers.
template <int S, class Codes> inline __attribute__((always_inline)) void multiply(const Codes &codes_at, int steps, const Digits *digits, const float *base, __m512 (&results)[S][2]) {
    __m512i above[S][2], below[S][2];
#pragma GCC unroll 4  // every loop over the sums: one that stays a loop would keep them in memory
    for (int h = 0; h < S; h++) above[h][0] = above[h][1] = below[h][0] = below[h][1] = _mm512_setzero_si512();
    for (int step = 0; step < steps; step++) {
        __m512i codes[2];
        codes_at(step, codes);
#pragma GCC unroll 4
        for (int h = 0; h < S; h++) {
            const __m512i high = spread(digits[h].high + 4 * step), low = spread(digits[h].low + 4 * step);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                above[h][half] = _mm512_dpbusd_epi32(above[h][half], codes[half], high);
                below[h][half] = _mm512_dpbusd_epi32(below[h][half], codes[half], low);
            }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < S; h++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m512 whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(above[h][half]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(below[h][half]));
            results[h][half] = _mm512_fmadd_ps(whole, _mm512_set1_ps(digits[h].scale), _mm512_set1_ps(base[h]));
        }
}

// Scores of S heads, `seen` apart, of the 32 tokens of a group of keys, whose channels begin at `from`.
template <int S> void score_codes(const CacheSide &s, const FourRuns codes_at, int group, int from, int channels, const float *queries, int seen, float *scores) {
    const size_t at = size_t(group) * s.width + from;
    const int bytes = group_bytes(s);
    __m512 folded[S][TILE], sums[S], results[S][2];
    Digits digits[S];
    float base[S];
    for (auto &each : sums) each = _mm512_setzero_ps();
    for (int i = 0; i < channels / TILE; i++) {
        const __m512 low = bf16_lanes(s.lows + at + i * TILE), scale = bf16_lanes(s.scales + at + i * TILE);
        for (int h = 0; h < S; h++) {
            const __m512 query = _mm512_loadu_ps(queries + h * channels + i * TILE);
            folded[h][i] = _mm512_mul_ps(query, scale), sums[h] = _mm512_fmadd_ps(query, low, sums[h]);
        }
    }
    for (int h = 0; h < S; h++) digits[h].take(folded[h], channels / TILE), base[h] = _mm512_reduce_add_ps(sums[h]);
    const uint8_t *codes = s.codes + at * bytes;
    multiply<S>([codes, codes_at, bytes](int step, __m512i(&four)[2]) { codes_at(codes + 4 * step * bytes, bytes, four); }, channels / 4, digits, base, results);
    for (int h = 0; h < S; h++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(scores + size_t(h) * seen + half * HALF, results[h][half]);
}

// Adds 32 tokens' values, weighed by shares `seen` apart, to what S heads have mixed: `width` numbers of the rows from `from` on.
template <int S> void mix_codes(const CacheSide &s, const FourRuns codes_at, int first, int from, int width, const float *shares, int seen, int stride, float *mixed) {
    const int groups = (s.width + s.group - 1) / s.group, bytes = group_bytes(s);
    const size_t row = size_t(groups) * bytes;
    for (int c = 0; c < width;) {
        const int group = (from + c) / s.group, end = std::min(width, (group + 1) * s.group - from);
        const size_t at = size_t(first) * groups + group;
        alignas(64) float lows[SPAN], scales[SPAN];
        for (int t = 0; t < SPAN; t++) lows[t] = from_bf16(s.lows[at + t * groups]), scales[t] = from_bf16(s.scales[at + t * groups]);
        Digits digits[S];
        float base[S];
        for (int h = 0; h < S; h++) {
            const __m512 share[2] = {_mm512_loadu_ps(shares + size_t(h) * seen), _mm512_loadu_ps(shares + size_t(h) * seen + HALF)};
            const __m512 weights[2] = {_mm512_mul_ps(share[0], _mm512_load_ps(scales)), _mm512_mul_ps(share[1], _mm512_load_ps(scales + HALF))};
            digits[h].take(weights, 2);
            base[h] = _mm512_reduce_add_ps(_mm512_fmadd_ps(share[0], _mm512_load_ps(lows), _mm512_mul_ps(share[1], _mm512_load_ps(lows + HALF))));
        }
        for (; c < end; c += SPAN) {
            __m512 results[S][2];
            const uint8_t *codes = s.codes + at * bytes + (from + c) % s.group * s.bits / 8;
            multiply<S>([codes, codes_at, row](int step, __m512i(&four)[2]) { codes_at(codes + 4 * step * row, row, four); }, SPAN / 4, digits, base, results);
            for (int half = 0; half < 2 && c + half * HALF < width; half++)
                for (int h = 0; h < S; h++) {
                    float *to = mixed + size_t(h) * stride + c + half * HALF;
                    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), results[h][half]));
                }
        }
    }
}

#else

struct FourRuns {
    explicit FourRuns(int) {}
};
template <int S> void score_codes(const CacheSide &, const FourRuns &, int, int, int, const float *, int, float *) {}
template <int S> void mix_codes(const CacheSide &, const FourRuns &, int, int, int, const float *, int, int, float *) {}

#endif

}  // namespace cache
