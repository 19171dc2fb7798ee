// What one decoding step does between its matrix products, fused: RMSNorm, rotary turn + cache write + attention, gated SiLU.
//
// At batch 1 these cost little to compute and much to call, one small torch operation after the other. Rows are bfloat16,
// sums float32. Knows the static cache of engine/decode.py: (2 * kv heads, positions, channels), keys first.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_attend.h"

namespace {

float dot(const float *a, const uint16_t *b, int count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < count; c++) sum += a[c] * from_bf16(b[c]);
    return sum;
}

// One query head over `seen` cached positions; `scores` has room for them.
void attend(const float *query, const uint16_t *keys, const uint16_t *values, int seen, int channels, float scale, float *scores, uint16_t *out) {
    for (int p = 0; p < seen; p++) scores[p] = scale * dot(query, keys + size_t(p) * channels, channels);
    softmax(scores, seen);
    std::vector<float> mixed(channels, 0.0f);
    for (int p = 0; p < seen; p++) {
        const uint16_t *value = values + size_t(p) * channels;
        const float share = scores[p];
#pragma omp simd
        for (int c = 0; c < channels; c++) mixed[c] += share * from_bf16(value[c]);
    }
    for (int c = 0; c < channels; c++) out[c] = to_bf16(mixed[c]);
}

}  // namespace

extern "C" {

// y = x / rms(x) * weight for one row of `width`.
void bitpress_rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, int width, float epsilon) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < width; c++) sum += from_bf16(x[c]) * from_bf16(x[c]);
    const float inverse = 1.0f / std::sqrt(sum / float(width) + epsilon);
    for (int c = 0; c < width; c++) y[c] = to_bf16(from_bf16(x[c]) * inverse * from_bf16(weight[c]));
}

// Turn q and k of one position, write k and v to the cache, and mix the values of all positions up to it.
// qkv: (heads + 2 * kv_heads, channels). cache: (2 * kv_heads, capacity, channels). out: (heads, channels).
void bitpress_attend_one(const uint16_t *qkv, const float *cos, const float *sin, uint16_t *cache, uint16_t *out, int position, int capacity,
                         int heads, int kv_heads, int channels, float scale, int threads) {
    const size_t plane = size_t(capacity) * channels, at = size_t(position) * channels;
    const int shared = heads / kv_heads, seen = position + 1;
    const bool worth_it = threads > 1 && size_t(seen) * heads * channels > 400000;
#pragma omp parallel for schedule(static) num_threads(threads) if (worth_it)
    for (int kv = 0; kv < kv_heads; kv++) {
        uint16_t *keys = cache + kv * plane, *values = cache + (kv_heads + kv) * plane;
        std::vector<float> turned(channels), scores(seen);
        turn(qkv + size_t(heads + kv) * channels, cos, sin, channels, turned.data());
        for (int c = 0; c < channels; c++) {
            keys[at + c] = to_bf16(turned[c]);
            values[at + c] = qkv[size_t(heads + kv_heads + kv) * channels + c];
        }
        for (int head = kv * shared; head < (kv + 1) * shared; head++) {
            turn(qkv + size_t(head) * channels, cos, sin, channels, turned.data());
            attend(turned.data(), keys, values, seen, channels, scale, scores.data(), out + size_t(head) * channels);
        }
    }
}

// y = silu(gate) * up for one row (gate, up) of 2 * width.
void bitpress_gated_silu(const uint16_t *gate_up, uint16_t *y, int width) {
    for (int c = 0; c < width; c++) {
        const float gate = from_bf16(gate_up[c]);
        y[c] = to_bf16(gate / (1.0f + std::exp(-gate)) * from_bf16(gate_up[width + c]));
    }
}
}
