// What attention over a cache needs whatever form the cache has: the rotary turn, dot products, shares from scores.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu_rows.h"

// x * cos + roll(x, half) * sin, with the sine's first half negated by the caller.
inline void turn(const uint16_t *x, const float *cos, const float *sin, int channels, float *out) {
    const int half = channels / 2;
    for (int c = 0; c < half; c++) {
        const float low = from_bf16(x[c]), high = from_bf16(x[c + half]);
        out[c] = low * cos[c] + high * sin[c];
        out[c + half] = high * cos[c + half] + low * sin[c + half];
    }
}

// e^x within 1e-6 of it, without a branch; a polynomial that lanes can work on together, where std::exp goes one number after the other.
inline float exponential(float x) {
    const float above = x < -87.0f ? -87.0f : x, within = above > 88.0f ? 88.0f : above;
    const float whole = std::floor(within * 1.44269504f + 0.5f), rest = (within - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) sum = sum * rest + next;
    return (sum * rest * rest + rest + 1.0f) * __builtin_bit_cast(float, (int32_t(whole) + 127) << 23);
}

#if HAS_VNNI

// e^x within 1e-6 of it; 0 and infinity where it leaves float32, NaN of NaN. Of -infinity the sum is no number, but scaled by 2^-infinity it is 0.
inline __m512 exponential_lanes(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x));
    __m512 sum = _mm512_set1_ps(1.3981999507e-3f);
    for (float next : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f}) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(next));
    return _mm512_scalef_ps(sum, whole);
}

#endif

// Scores become shares that sum to one.
inline void softmax(float *scores, int count) {
    float top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
    for (int p = 0; p < count; p++) top = std::max(top, scores[p]);
#pragma omp simd reduction(+ : total)
    for (int p = 0; p < count; p++) total += scores[p] = exponential(scores[p] - top);
    const float inverse = 1.0f / total;
    for (int p = 0; p < count; p++) scores[p] *= inverse;
}
