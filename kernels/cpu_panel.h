// Bfloat16 rows times a panel: the inner loop of every product with many rows (cpu_panel.cpp, cpu_outer.cpp, cpu_attention.cpp).
//
// Panel. For every two numbers of the sum 32 words, one an output, that hold both: what one dot product per 16 outputs takes.
#pragma once
#include "cpu_rows.h"

#if HAS_BF16

constexpr int PANEL = 2 * TILE;

// out (MB, PANEL) = MB rows times one panel; word(m, k) is row m's k-th pair.
template <int MB, class Word> inline void rows_times_panel(const uint32_t *panel, int pairs, const Word &word, float *out) {
    __m512 sum[MB][2];
    for (auto &each : sum) each[0] = each[1] = _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(panel + size_t(k) * PANEL), second = (__m512bh)_mm512_loadu_si512(panel + size_t(k) * PANEL + TILE);
        for (int m = 0; m < MB; m++) {
            const __m512bh two = (__m512bh)_mm512_set1_epi32(int(word(m, k)));
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], first, two);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], second, two);
        }
    }
    for (int m = 0; m < MB; m++) _mm512_storeu_ps(out + m * PANEL, sum[m][0]), _mm512_storeu_ps(out + m * PANEL + TILE, sum[m][1]);
}

// Two rows laid together as words, `odd` null where there is no second; zeros from `columns` up to `padded`.
inline void lay_two(const uint16_t *even, const uint16_t *odd, int columns, int padded, uint32_t *to) {
    for (int k = 0; k < columns; k++) to[k] = even[k] | (odd ? uint32_t(odd[k]) << 16 : 0u);
    std::fill(to + columns, to + padded, 0u);
}

#endif
