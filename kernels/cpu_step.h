// What one decoding step does between its matrix products: RMSNorm, rotary turn + cache write + attention, gated SiLU, each for a part
// of its heads or columns, so that threads can share them. Rows are bfloat16, sums float32. Knows the static cache of engine/decode.py:
// (2 * kv heads, positions, channels), keys first.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu_attend.h"
#include "cpu_rows.h"

namespace step {

// x / rms(x) * weight for one row of `width`. ROUNDED: x / rms(x) is rounded before it meets the weight, as transformers does.
template <bool ROUNDED = false> inline void rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, int width, float epsilon) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < width; c++) sum += from_bf16(x[c]) * from_bf16(x[c]);
    const float inverse = 1.0f / std::sqrt(sum / float(width) + epsilon);
    for (int c = 0; c < width; c++) {
        const float normed = from_bf16(x[c]) * inverse;
        y[c] = to_bf16((ROUNDED ? from_bf16(to_bf16(normed)) : normed) * from_bf16(weight[c]));
    }
}

// silu(gate) * up for `count` columns. ROUNDED: silu(gate) is rounded before it meets the other.
template <bool ROUNDED> inline uint16_t gated_one(uint16_t gate, uint16_t up) {
    const float value = from_bf16(gate), gated = value / (1.0f + exponential(-value));
    return to_bf16((ROUNDED ? from_bf16(to_bf16(gated)) : gated) * from_bf16(up));
}

#if HAS_BF16

inline __m512 rounded_lanes(__m512 x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16)); }

template <bool ROUNDED = false> inline void gated_silu(const uint16_t *gate, const uint16_t *up, uint16_t *y, int count) {
    int c = 0;
    for (; c + TILE <= count; c += TILE) {
        const __m512 value = bf16_lanes(gate + c), one = _mm512_set1_ps(1.0f);
        const __m512 gated = _mm512_div_ps(value, _mm512_add_ps(one, exponential_lanes(_mm512_sub_ps(_mm512_setzero_ps(), value))));
        const __m512 both = _mm512_mul_ps(ROUNDED ? rounded_lanes(gated) : gated, bf16_lanes(up + c));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(y + c), (__m256i)_mm512_cvtneps_pbh(both));
    }
    for (; c < count; c++) y[c] = gated_one<ROUNDED>(gate[c], up[c]);
}

#else

template <bool ROUNDED = false> inline void gated_silu(const uint16_t *gate, const uint16_t *up, uint16_t *y, int count) {
    for (int c = 0; c < count; c++) y[c] = gated_one<ROUNDED>(gate[c], up[c]);
}

#endif

// The attention of one token.
struct Token {
    const uint16_t *qkv;  // (heads + 2 * kv_heads, channels)
    const float *cos, *sin;
    uint16_t *cache;  // (2 * kv_heads, capacity, channels)
    uint16_t *out;    // (heads, channels)
    int position, capacity, heads, kv_heads, channels;
    float scale;
};

// Query heads that share a key head, side by side over the cached positions and the token's own key and value, which need not be in the
// cache yet. A position's key is widened once for all of them. HEADS: how many, 1 to 4.
struct Group {
    const uint16_t *keys, *values, *key, *value;  // (position, channels) twice, (channels) twice
    int position, channels;
    float scale;
    const uint16_t *key_at(int p) const { return p < position ? keys + size_t(p) * channels : key; }
    const uint16_t *value_at(int p) const { return p < position ? values + size_t(p) * channels : value; }
};

#if HAS_VNNI

constexpr int WIDE = 16;  // channels at a time

inline __mmask16 those_of(int left) { return left >= WIDE ? 0xffff : __mmask16((1u << std::max(left, 0)) - 1); }
inline __m512 widened(const uint16_t *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// scores (HEADS, position + 1) of queries (HEADS, channels).
template <int HEADS> void score(const Group &g, const float *queries, float *scores) {
    for (int p = 0; p <= g.position; p++) {
        const uint16_t *key = g.key_at(p);
        __m512 sum[HEADS];
        for (auto &each : sum) each = _mm512_setzero_ps();
        for (int c = 0; c < g.channels; c += WIDE) {
            const __mmask16 mask = those_of(g.channels - c);
            const __m512 wide = widened(key + c, mask);
            for (int h = 0; h < HEADS; h++) sum[h] = _mm512_fmadd_ps(wide, _mm512_maskz_loadu_ps(mask, queries + h * g.channels + c), sum[h]);
        }
        for (int h = 0; h < HEADS; h++) scores[size_t(h) * (g.position + 1) + p] = g.scale * _mm512_reduce_add_ps(sum[h]);
    }
}

// mixed (HEADS, channels): values weighed by shares (HEADS, position + 1), four registers of channels at a time.
template <int HEADS> void mix(const Group &g, const float *shares, float *mixed) {
    for (int c = 0; c < g.channels; c += 4 * WIDE) {
        __mmask16 mask[4];
        for (int i = 0; i < 4; i++) mask[i] = those_of(g.channels - c - i * WIDE);
        __m512 sum[HEADS][4];
        for (auto &head : sum) for (auto &each : head) each = _mm512_setzero_ps();
        for (int p = 0; p <= g.position; p++) {
            const uint16_t *value = g.value_at(p) + c;
            for (int i = 0; i < 4; i++) {
                const __m512 wide = widened(value + i * WIDE, mask[i]);
                for (int h = 0; h < HEADS; h++) sum[h][i] = _mm512_fmadd_ps(wide, _mm512_set1_ps(shares[size_t(h) * (g.position + 1) + p]), sum[h][i]);
            }
        }
        for (int h = 0; h < HEADS; h++) for (int i = 0; i < 4; i++) _mm512_mask_storeu_ps(mixed + h * g.channels + c + i * WIDE, mask[i], sum[h][i]);
    }
}

#else

template <int HEADS> void score(const Group &g, const float *queries, float *scores) {
    for (int h = 0; h < HEADS; h++) for (int p = 0; p <= g.position; p++) {
        const uint16_t *key = g.key_at(p);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < g.channels; c++) sum += queries[h * g.channels + c] * from_bf16(key[c]);
        scores[size_t(h) * (g.position + 1) + p] = g.scale * sum;
    }
}

template <int HEADS> void mix(const Group &g, const float *shares, float *mixed) {
    std::fill(mixed, mixed + HEADS * g.channels, 0.0f);
    for (int h = 0; h < HEADS; h++) for (int p = 0; p <= g.position; p++) {
        const uint16_t *value = g.value_at(p);
        const float share = shares[size_t(h) * (g.position + 1) + p];
#pragma omp simd
        for (int c = 0; c < g.channels; c++) mixed[h * g.channels + c] += share * from_bf16(value[c]);
    }
}

#endif

template <int HEADS> void attend(const Group &g, const float *queries, float *scores, float *mixed, uint16_t *out) {
    score<HEADS>(g, queries, scores);
    for (int h = 0; h < HEADS; h++) softmax(scores + size_t(h) * (g.position + 1), g.position + 1);
    mix<HEADS>(g, scores, mixed);
    for (int c = 0; c < HEADS * g.channels; c++) out[c] = to_bf16(mixed[c]);
}

// Query heads first .. end - 1. The caller whose heads hold the first of a key head's writes its key and value to the cache.
inline void attend_heads(const Token &t, int first, int end) {
    constexpr int MOST = 4;
    thread_local std::vector<float> room;
    thread_local std::vector<uint16_t> own;
    room.resize(size_t(MOST) * (2 * t.channels + t.position + 1));
    own.resize(t.channels);
    float *queries = room.data(), *mixed = queries + MOST * t.channels, *scores = mixed + MOST * t.channels;
    const int shared = t.heads / t.kv_heads;
    const size_t plane = size_t(t.capacity) * t.channels, at = size_t(t.position) * t.channels;
    for (int head = first, count; head < end; head += count) {
        const int kv = head / shared;
        count = std::min({MOST, end - head, (kv + 1) * shared - head});
        uint16_t *keys = t.cache + kv * plane, *values = t.cache + (t.kv_heads + kv) * plane;
        const uint16_t *value = t.qkv + size_t(t.heads + t.kv_heads + kv) * t.channels;
        turn(t.qkv + size_t(t.heads + kv) * t.channels, t.cos, t.sin, t.channels, queries);
        for (int c = 0; c < t.channels; c++) own[c] = to_bf16(queries[c]);
        if (head % shared == 0) {
            std::copy(own.begin(), own.end(), keys + at);
            std::copy(value, value + t.channels, values + at);
        }
        for (int h = 0; h < count; h++) turn(t.qkv + size_t(head + h) * t.channels, t.cos, t.sin, t.channels, queries + h * t.channels);
        const Group group{keys, values, own.data(), value, t.position, t.channels, t.scale};
        uint16_t *out = t.out + size_t(head) * t.channels;
        switch (count) {
            case 1: attend<1>(group, queries, scores, mixed, out); break;
            case 2: attend<2>(group, queries, scores, mixed, out); break;
            case 3: attend<3>(group, queries, scores, mixed, out); break;
            default: attend<4>(group, queries, scores, mixed, out);
        }
    }
}

}  // namespace step
