// All blocks of a decoding step in one call: norms, matrices (packed or bfloat16), attention over the static cache, gated MLP.
//
// A step makes some 240 small calls; from Python each costs more than what it does. The arithmetic is that of the calls one by one:
// results between them are rounded to bfloat16, matrices are bitpress_linear's. Knows Llama-like blocks without biases.

#include "cpu_rows.h"

extern "C" {
int bitpress_linear(const void *x, void *y, int is_bf16, int rows, int inputs, int outputs, int bits, int group, int activation_bits,
                    const uint8_t *codes, const uint16_t *scales, const void *zeros, int float_zeros, const float *bias, int threads);
void bitpress_rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, int width, float epsilon);
void bitpress_attend_one(const uint16_t *qkv, const float *cos, const float *sin, uint16_t *cache, uint16_t *out, int position, int capacity,
                         int heads, int kv_heads, int channels, float scale, int threads);
struct CacheSide;  // of cpu_cache.cpp
void bitpress_attend_cache(const uint16_t *qkv, const float *cos, const float *sin, const float *turns, CacheSide *keys, CacheSide *values, uint16_t *out,
                           int heads, int kv_heads, int channels, float scale, int threads);
void bitpress_gated_silu(const uint16_t *gate_up, uint16_t *y, int width);

// One matrix as bitpress_linear takes it; 16 bits are bfloat16 weights (outputs, inputs).
struct Matrix {
    const void *weights;
    const uint16_t *scales;
    const void *zeros;
    int32_t bits, group, float_zeros, activation_bits, inputs, outputs;
};

// Matrices of a block in order: q, k and v joined or not, output, gate and up joined or not, down. counts: of each of the four.
// keys, values: its own compressed cache; null where it has a part of the static one.
struct Block {
    const uint16_t *attention_norm, *mlp_norm;
    float attention_epsilon, mlp_epsilon;
    int32_t counts[4];
    Matrix matrices[7];
    CacheSide *keys, *values;
};
}

namespace {

#if HAS_BF16

// Four rows of weights times x, 32 inputs at a time.
void four_rows(const uint16_t *const *weights, const uint16_t *x, int inputs, float *out) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int k = 0;
    for (; k + 32 <= inputs; k += 32) {
        const __m512bh inputs_32 = (__m512bh)_mm512_loadu_si512(x + k);
        for (int n = 0; n < 4; n++) {
            _mm_prefetch(reinterpret_cast<const char *>(weights[n] + k + 512), _MM_HINT_T0);
            sum[n] = _mm512_dpbf16_ps(sum[n], (__m512bh)_mm512_loadu_si512(weights[n] + k), inputs_32);
        }
    }
    if (k < inputs) {
        const __mmask32 rest = (1u << (inputs - k)) - 1;
        for (int n = 0; n < 4; n++) sum[n] = _mm512_dpbf16_ps(sum[n], (__m512bh)_mm512_maskz_loadu_epi16(rest, weights[n] + k), (__m512bh)_mm512_maskz_loadu_epi16(rest, x + k));
    }
    for (int n = 0; n < 4; n++) out[n] = _mm512_reduce_add_ps(sum[n]);
}

#else

void four_rows(const uint16_t *const *weights, const uint16_t *x, int inputs, float *out) {
    for (int n = 0; n < 4; n++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int k = 0; k < inputs; k++) sum += from_bf16(weights[n][k]) * from_bf16(x[k]);
        out[n] = sum;
    }
}

#endif

void times_dense(const Matrix &m, const uint16_t *x, uint16_t *y, int threads) {
    const uint16_t *weights = static_cast<const uint16_t *>(m.weights);
    if (size_t(m.inputs) * m.outputs < WORTH_THREADS) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int n = 0; n < m.outputs; n += 4) {
        const uint16_t *rows[4];
        for (int i = 0; i < 4; i++) rows[i] = weights + size_t(std::min(n + i, m.outputs - 1)) * m.inputs;
        float out[4];
        four_rows(rows, x, m.inputs, out);
        store(y, true, n, out, std::min(4, m.outputs - n));
    }
}

// Outputs of `count` matrices side by side. Returns the next matrix.
const Matrix *times(const Matrix *m, int count, const uint16_t *x, uint16_t *y, int threads) {
    for (; count--; y += m->outputs, m++) {
        if (m->bits == 16) times_dense(*m, x, y, threads);
        else bitpress_linear(x, y, 1, 1, m->inputs, m->outputs, m->bits, m->group, m->activation_bits, static_cast<const uint8_t *>(m->weights), m->scales, m->zeros, m->float_zeros, nullptr, threads);
    }
    return m;
}

void add(uint16_t *x, const uint16_t *y, int width) {
    for (int c = 0; c < width; c++) x[c] = to_bf16(from_bf16(x[c]) + from_bf16(y[c]));
}

}  // namespace

extern "C" {

// x (width), in and out: a token's embedding, then its state behind the last block. cache: (blocks, 2 * kv_heads, capacity, channels), or
// null with turns as bitpress_attend_cache has them.
void bitpress_token(const Block *blocks, int count, uint16_t *x, const float *cos, const float *sin, const float *turns, uint16_t *cache, int position,
                    int capacity, int heads, int kv_heads, int channels, float scale, int width, int ffn, int threads) {
    thread_local std::vector<uint16_t> room;
    const int qkv_width = (heads + 2 * kv_heads) * channels, mixed_width = heads * channels;
    room.resize(size_t(2) * width + qkv_width + mixed_width + size_t(3) * ffn);
    uint16_t *normed = room.data(), *added = normed + width, *qkv = added + width, *mixed = qkv + qkv_width, *gate_up = mixed + mixed_width, *gated = gate_up + 2 * ffn;
    for (int b = 0; b < count; b++) {
        const Block &block = blocks[b];
        bitpress_rms_norm(x, block.attention_norm, normed, width, block.attention_epsilon);
        const Matrix *next = times(block.matrices, block.counts[0], normed, qkv, threads);
        if (block.keys) bitpress_attend_cache(qkv, cos, sin, turns, block.keys, block.values, mixed, heads, kv_heads, channels, scale, threads);
        else bitpress_attend_one(qkv, cos, sin, cache + size_t(b) * 2 * kv_heads * capacity * channels, mixed, position, capacity, heads, kv_heads, channels, scale, threads);
        next = times(next, block.counts[1], mixed, added, threads);
        add(x, added, width);
        bitpress_rms_norm(x, block.mlp_norm, normed, width, block.mlp_epsilon);
        next = times(next, block.counts[2], normed, gate_up, threads);
        bitpress_gated_silu(gate_up, gated, ffn);
        times(next, block.counts[3], gated, added, threads);
        add(x, added, width);
    }
}
}
