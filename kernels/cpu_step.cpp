// The parts of a decoding step as calls of their own (cpu_step.h). At batch 1 they cost little to compute and much to call, one small
// torch operation after the other.

#include "cpu_step.h"

extern "C" {

// y = x / rms(x) * weight for one row of `width`.
void bitpress_rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, int width, float epsilon) { step::rms_norm(x, weight, y, width, epsilon); }

// Turn q and k of one position, write k and v to the cache, and mix the values of all positions up to it.
// qkv: (heads + 2 * kv_heads, channels). cache: (2 * kv_heads, capacity, channels). out: (heads, channels).
void bitpress_attend_one(const uint16_t *qkv, const float *cos, const float *sin, uint16_t *cache, uint16_t *out, int position, int capacity,
                         int heads, int kv_heads, int channels, float scale, int threads) {
    const step::Token token{qkv, cos, sin, cache, out, position, capacity, heads, kv_heads, channels, scale};
    if (size_t(position + 1) * heads * channels < WORTH_THREADS / 2) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) step::attend_heads(token, heads * part / threads, heads * (part + 1) / threads);
}

// y = silu(gate) * up for one row (gate, up) of 2 * width.
void bitpress_gated_silu(const uint16_t *gate_up, uint16_t *y, int width) { step::gated_silu(gate_up, gate_up + width, y, width); }
}
