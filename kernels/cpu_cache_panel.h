// Keys made anew from panels. Panel: 32 tokens of some rows, two neighbouring numbers of a row in every word, (pairs, 32): what one
// bfloat16 dot product per 16 tokens takes. Rows of a factor times the panel of a latent are keys; queries times that of keys are scores.
#pragma once
#include "cpu_cache_rows.h"

namespace cache {

#if HAS_BF16
inline Words paired(Reals even, Reals odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}
#else
inline Words paired(Reals even, Reals odd) {
    Words made;
    for (int i = 0; i < TILE; i++) made[i] = to_bf16(even[i]) | uint32_t(to_bf16(odd[i])) << 16;
    return made;
}
#endif

#if HAS_VNNI
// Sixteen rows of at most 32 numbers, `stride` apart, as words with neighbouring rows in neighbouring places.
inline void transpose(const uint16_t *rows, size_t stride, int width, uint32_t *panel, int pairs) {
    __m512i r[TILE], t[TILE];
    const __mmask32 there = width >= 32 ? ~0u : (1u << width) - 1;
    for (int i = 0; i < TILE; i++) r[i] = _mm512_maskz_loadu_epi16(there, rows + i * stride);
    for (int i = 0; i < TILE; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < TILE; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88), r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int p = 0; p < pairs; p++) _mm512_storeu_si512(panel + p * SPAN, r[p]);
}
#endif

// Tokens from `first`, at most 32, of a latent as a panel.
inline void read_panel(const CacheSide &s, const Unpacker &codes_at, int first, int count, uint32_t *panel, float *row) {
    const int pairs = (s.width + 1) / 2;
    if (s.by_channel && first < old_tokens(s)) {
        for (int p = 0; p < pairs; p++) {
            Reals values[2][2] = {};
            for (int i = 0; i < 2 && 2 * p + i < s.width; i++) read_channel(s, codes_at, first / SPAN, 2 * p + i, values[i][0], values[i][1]);
            for (int i = 0; i < 2; i++) *reinterpret_cast<Words *>(panel + p * SPAN + i * HALF) = paired(values[0][i], values[1][i]);
        }
        return;
    }
    const int old = old_tokens(s);
#if HAS_VNNI
    if (first >= old && count == SPAN) {
        for (int half = 0; half < SPAN; half += HALF)
            for (int p = 0; p < pairs; p += TILE)
                transpose(s.recent + size_t(first - old + half) * s.width + 2 * p, s.width, s.width - 2 * p, panel + p * SPAN + half, std::min(TILE, pairs - p));
        return;
    }
#endif
    for (int t = 0; t < SPAN; t++) {
        const uint16_t *held = s.recent + size_t(std::max(0, first + t - old)) * s.width;
        if (t < count && first + t < old) read_row(s, codes_at, first + t, row);
        for (int p = 0; p < pairs; p++) {
            uint32_t both = 0;
            if (t < count && first + t >= old) std::memcpy(&both, held + 2 * p, 2 * p + 1 < s.width ? 4 : 2);
            else if (t < count) both = to_bf16(row[2 * p]) | (2 * p + 1 < s.width ? uint32_t(to_bf16(row[2 * p + 1])) << 16 : 0);
            panel[p * SPAN + t] = both;
        }
    }
}

// Keys of one head, (channels, 32): rows of the factor times pairs [from, to) of a panel.
template <int MB> void some_keys(const uint16_t *up, size_t stride, const uint32_t *panel, int from, int to, float *keys) {
    Reals sum[MB][2] = {};
    for (int p = from; p < to; p++) {
        const Words first = *reinterpret_cast<const Words *>(panel + p * SPAN), second = *reinterpret_cast<const Words *>(panel + p * SPAN + HALF);
        for (int m = 0; m < MB; m++) {
            uint32_t two;
            std::memcpy(&two, up + m * stride + 2 * p, 4);
#if HAS_BF16
            const __m512bh both = (__m512bh)_mm512_set1_epi32(int(two));
            sum[m][0] = (Reals)_mm512_dpbf16_ps((__m512)sum[m][0], (__m512bh)first, both);
            sum[m][1] = (Reals)_mm512_dpbf16_ps((__m512)sum[m][1], (__m512bh)second, both);
#else
            const float even = from_bf16(uint16_t(two)), odd = from_bf16(uint16_t(two >> 16));
            sum[m][0] += even * (Reals)(first << 16) + odd * (Reals)(first & 0xffff0000u);
            sum[m][1] += even * (Reals)(second << 16) + odd * (Reals)(second & 0xffff0000u);
#endif
        }
    }
    for (int m = 0; m < MB; m++) lanes(keys + m * SPAN) = sum[m][0], lanes(keys + m * SPAN + HALF) = sum[m][1];
}

inline void expand(const uint16_t *up, size_t stride, const uint32_t *panel, int from, int to, int channels, float *keys) {
    int c = 0;
    for (; c + 8 <= channels; c += 8) some_keys<8>(up + c * stride, stride, panel, from, to, keys + c * SPAN);
    for (; c < channels; c++) some_keys<1>(up + c * stride, stride, panel, from, to, keys + c * SPAN);
}

// Turns keys (channels, 32) in place. turns: cosines, then sines, (channels / 2, 32) of the same tokens.
inline void turn_keys(float *keys, const float *turns, int half) {
    for (int i = 0; i < half * SPAN; i++) {
        const float low = keys[i], high = keys[half * SPAN + i], cos = turns[i], sin = turns[half * SPAN + i];
        keys[i] = low * cos - high * sin;
        keys[half * SPAN + i] = high * cos + low * sin;
    }
}

}  // namespace cache
