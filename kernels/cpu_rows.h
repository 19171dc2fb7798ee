// What the C++ kernels share: rows of activations as numbers or integers, results as they were asked for, when threads pay.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu_bf16.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif
#if HAS_VNNI && defined(__AVX512BF16__)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

constexpr int TILE = 16;                  // output rows worked on together, one a lane
constexpr size_t WORTH_THREADS = 250000;  // multiplications below which waking other threads costs more than it saves

// Where the part-th of `parts` shares of tiles begins: even, since tiles lie in pairs.
inline int share_of(int tiles, int part, int parts) { return std::min(tiles, int(int64_t((tiles + 1) / 2) * part / parts) * 2); }

inline int rounded_up(int count, int step) { return (count + step - 1) / step * step; }

// x (rows, inputs), bfloat16 or float32, as float32 rows of `padded`, zeros behind the inputs.
inline const float *widen_rows(const void *x, bool is_bf16, int rows, int inputs, int padded, std::vector<float> &room) {
    room.assign(size_t(rows) * padded, 0.0f);
    for (int m = 0; m < rows; m++) {
        float *out = &room[size_t(m) * padded];
        if (is_bf16) for (int k = 0; k < inputs; k++) out[k] = from_bf16(static_cast<const uint16_t *>(x)[size_t(m) * inputs + k]);
        else std::memcpy(out, static_cast<const float *>(x) + size_t(m) * inputs, sizeof(float) * inputs);
    }
    return room.data();
}

inline void store(void *y, bool is_bf16, size_t at, const float *values, int count) {
    for (int n = 0; n < count; n++) {
        if (is_bf16) static_cast<uint16_t *>(y)[at + n] = to_bf16(values[n]);
        else static_cast<float *>(y)[at + n] = values[n];
    }
}

inline void put_bits(int32_t *to, float value) { std::memcpy(to, &value, sizeof(value)); }
inline float as_real(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// One group of activations as whole numbers up to `top` (below 2^22), one scale: x = scale * q. A group that is not finite gets a
// scale that is NaN, so that its row does not come out finite; denormal groups read as zero. q has room for `padded`. Sizes are
// compared as bits and rounding adds 1.5 * 2^23, whose last bit is worth one: both are loops that compilers make wide.
inline float quantise(const float *x, int count, int padded, float top, int32_t *q) {
    constexpr float ROUNDER = 12582912.0f;
    int32_t most_bits = 0;
    for (int k = 0; k < count; k++) {
        int32_t bits;
        put_bits(&bits, x[k]);
        most_bits = std::max(most_bits, bits & 0x7fffffff);
    }
    const float most = as_real(most_bits);
    const bool finite = most_bits < 0x7f800000;
    float scale = most / top, inverse = most > 0 && finite ? 1.0f / scale : 0.0f;
    if (!std::isfinite(inverse)) inverse = 0, scale = 0;
    if (finite) {
        for (int k = 0; k < count; k++) put_bits(q + k, x[k] * inverse);
        asm volatile("" ::: "memory");  // keeps the product and the sum two roundings: one fused would be of another number
        for (int k = 0; k < count; k++) put_bits(q + k, as_real(q[k]) + ROUNDER);
        for (int k = 0; k < count; k++) q[k] -= 0x4b400000;
    }
    std::fill(q + (finite ? count : 0), q + padded, 0);
    return finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

#if HAS_VNNI
inline __m512 bf16_lanes(const uint16_t *from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
#endif
