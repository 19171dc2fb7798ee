// What lies between the products of a block as calls of their own (cpu_step.h). Of one row it costs little to compute and much to call, one
// small torch operation after the other; of many rows it is the passes over memory that cost, of which torch makes several.

#include "cpu_step.h"

namespace {

constexpr size_t WORTH_SHARING = 30000;  // numbers below which waking other threads costs more than it saves

// each(row) for all rows.
template <class Each> void rows_shared(int rows, int width, int threads, const Each &each) {
    if (size_t(rows) * width < WORTH_SHARING) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int m = 0; m < rows; m++) each(m);
}

// x * cos + sign * other * sin, all three operations rounded.
void turned_half(const uint16_t *x, const uint16_t *other, float sign, const uint16_t *cos, const uint16_t *sin, int count, uint16_t *y) {
#pragma omp simd
    for (int c = 0; c < count; c++) {
        const float one = from_bf16(to_bf16(from_bf16(x[c]) * from_bf16(cos[c]))), two = from_bf16(to_bf16(sign * from_bf16(other[c]) * from_bf16(sin[c])));
        y[c] = to_bf16(one + two);
    }
}

// One head's channels turned, rounded.
void turned_to(const uint16_t *x, const float *cos, const float *sin, int channels, float *turned, uint16_t *to) {
    turn(x, cos, sin, channels, turned);
    for (int c = 0; c < channels; c++) to[c] = to_bf16(turned[c]);
}

}  // namespace

extern "C" {

// y (rows, width) = x / rms(x) * weight.
void bitpress_rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, int rows, int width, float epsilon, int rounded, int threads) {
    const auto norm = rounded ? step::rms_norm<true> : step::rms_norm<false>;
    rows_shared(rows, width, threads, [&](int m) { norm(x + size_t(m) * width, weight, y + size_t(m) * width, width, epsilon); });
}

// Turn q and k of one position, write k and v to the cache, and mix the values of all positions up to it.
// qkv: (heads + 2 * kv_heads, channels). cache: (2 * kv_heads, capacity, channels). out: (heads, channels).
void bitpress_attend_one(const uint16_t *qkv, const float *cos, const float *sin, uint16_t *cache, uint16_t *out, int position, int capacity,
                         int heads, int kv_heads, int channels, float scale, int threads) {
    const step::Token token{qkv, cos, sin, cache, out, position, capacity, heads, kv_heads, channels, scale};
    if (size_t(position + 1) * heads * channels < WORTH_THREADS / 2) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) step::attend_heads(token, heads * part / threads, heads * (part + 1) / threads);
}

// y (rows, width) = silu(gate) * up, whose rows begin `apart` from each other.
void bitpress_gated_silu(const uint16_t *gate, const uint16_t *up, uint16_t *y, int rows, int width, int64_t apart, int rounded, int threads) {
    const auto gated = rounded ? step::gated_silu<true> : step::gated_silu<false>;
    rows_shared(rows, width, threads, [&](int m) { gated(gate + m * apart, up + m * apart, y + size_t(m) * width, width); });
}

// y = x turned, each product and sum rounded, as transformers turns the heads of many positions. x, y: (rows, heads, channels); cos, sin:
// bfloat16 (length, channels), those of row m being at m % length.
void bitpress_turn_rounded(const uint16_t *x, const uint16_t *cos, const uint16_t *sin, uint16_t *y, int rows, int length, int heads, int channels, int threads) {
    const int half = channels / 2;
    rows_shared(rows, heads * channels, threads, [&](int m) {
        const uint16_t *cosine = cos + size_t(m % length) * channels, *sine = sin + size_t(m % length) * channels;
        for (size_t h = size_t(m) * heads; h < size_t(m + 1) * heads; h++) {
            const uint16_t *low = x + h * channels, *high = low + half;
            turned_half(low, high, -1.0f, cosine, sine, half, y + h * channels);
            turned_half(high, low, 1.0f, cosine + half, sine + half, half, y + h * channels + half);
        }
    });
}

// Turn q of `rows` positions in place and write their turned keys, and their values, to a cache: heads `apart` from each other, keys
// first. qkv: (rows, heads + 2 * kv_heads, channels). cos, sin: (rows, channels).
void bitpress_turn_rows(uint16_t *qkv, const float *cos, const float *sin, uint16_t *cache, int rows, int64_t apart, int heads, int kv_heads,
                        int channels, int threads) {
    const int all = heads + 2 * kv_heads;
    rows_shared(rows, all * channels, threads, [&](int m) {
        thread_local std::vector<float> turned;
        turned.resize(channels);
        uint16_t *row = qkv + size_t(m) * all * channels;
        const float *cosine = cos + size_t(m) * channels, *sine = sin + size_t(m) * channels;
        for (int h = 0; h < all; h++, row += channels) {
            uint16_t *to = h < heads ? row : cache + (h - heads) * apart + size_t(m) * channels;
            if (h < heads + kv_heads) turned_to(row, cosine, sine, channels, turned.data(), to);
            else std::copy(row, row + channels, to);
        }
    });
}
}
