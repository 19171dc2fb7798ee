// All blocks of a decoding step in one call: norms, matrices (packed or bfloat16), attention over the static cache, gated MLP.
//
// A step makes some 240 small calls; from Python each costs more than what it does. The arithmetic is that of the calls one by one:
// results between them are rounded to bfloat16, matrices are bitpress_linear's. Knows Llama-like blocks without biases.
//
// Threads stay for the whole token and meet five times a block. What is cheap (a norm, rounding a row to integers) each does for
// itself rather than wait for another; gate and up are cut at the same columns, so that their product needs no meeting.

#include <omp.h>

#include "cpu_cache.h"
#include "cpu_lowbit.h"
#include "cpu_step.h"

extern "C" {

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

// What stands before and behind the blocks: the embedding (bits 0: the caller has looked the token up), the last norm, the head.
struct Ends {
    Matrix embedding, head;
    const uint16_t *norm;
    float epsilon;
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

// Outputs of tiles first .. end - 1 of one matrix.
void times(const Matrix &m, const uint16_t *x, uint16_t *y, int first, int end) {
    if (m.bits != 16) {
        const lowbit::Shape shape{1, m.inputs, m.outputs, m.bits, m.group, m.activation_bits};
        const lowbit::Job job{static_cast<const uint8_t *>(m.weights), m.scales, m.zeros, bool(m.float_zeros), nullptr, y, true};
        lowbit::multiply(job, shape, lowbit::quantised(shape, x, true, 1), first, end);
        return;
    }
    const uint16_t *weights = static_cast<const uint16_t *>(m.weights);
    for (int n = first * TILE, stop = std::min(end * TILE, m.outputs); n < stop; n += 4) {
        const uint16_t *rows[4];
        for (int i = 0; i < 4; i++) rows[i] = weights + size_t(std::min(n + i, m.outputs - 1)) * m.inputs;
        float out[4];
        four_rows(rows, x, m.inputs, out);
        store(y, true, n, out, std::min(4, m.outputs - n));
    }
}

// Row `row` of a matrix of bfloat16 or of 8-bit codes, as bfloat16.
void look_up(const Matrix &m, int row, uint16_t *out) {
    if (m.bits == 16) {
        std::memcpy(out, static_cast<const uint16_t *>(m.weights) + size_t(row) * m.inputs, sizeof(uint16_t) * m.inputs);
        return;
    }
    const lowbit::Shape s{1, m.inputs, m.outputs, m.bits, m.group, 0};
    const int tile = row / TILE, lane = row % TILE, groups = s.groups();
    for (int k = 0; k < m.inputs; k++) {
        const size_t at = (size_t(tile) * groups + k / m.group) * TILE + lane;
        const uint8_t code = static_cast<const uint8_t *>(m.weights)[s.code_at(tile, k / lowbit::CHUNK * lowbit::CHUNK) + k % lowbit::CHUNK / 4 * 64 + 4 * lane + k % 4];
        const float zero = !m.zeros ? 128.0f : m.float_zeros ? from_bf16(static_cast<const uint16_t *>(m.zeros)[at]) : float(static_cast<const uint8_t *>(m.zeros)[at]);
        out[k] = to_bf16((float(code) - zero) * from_bf16(m.scales[at]));
    }
}

int tiles_of(int outputs) { return (outputs + TILE - 1) / TILE; }

// One thread's part in a token.
struct Worker : Share {
    explicit Worker(const Share &share) : Share(share) {}

    // Its outputs of `count` matrices side by side. Returns the next matrix.
    const Matrix *times_all(const Matrix *m, int count, const uint16_t *x, uint16_t *y) const {
        for (; count--; y += m->outputs, m++) times(*m, x, y, share_of(tiles_of(m->outputs), part, parts), share_of(tiles_of(m->outputs), part + 1, parts));
        return m;
    }

    // silu(x gate) * (x up), ending with a meeting. Joined where the halves begin inside a pair of tiles: everything first, then a meeting.
    const Matrix *gated(const Matrix *m, int count, const uint16_t *x, uint16_t *gate_up, uint16_t *y, int ffn) const {
        const int tiles = tiles_of(ffn), first = share_of(tiles, part, parts), end = share_of(tiles, part + 1, parts);
        if (count == 1 && ffn % (2 * TILE) == 0) {
            times(*m, x, gate_up, first, end);
            times(*m, x, gate_up, tiles + first, tiles + end);
        } else {
            times_all(m, count, x, gate_up);
            if (count == 1) meeting.wait();
        }
        const int from = std::min(ffn, first * TILE), to = std::min(ffn, end * TILE);
        step::gated_silu(gate_up + from, gate_up + ffn + from, y + from, to - from);
        meeting.wait();
        return m + count;
    }
};

void add(uint16_t *x, const uint16_t *y, int width) {
    for (int c = 0; c < width; c++) x[c] = to_bf16(from_bf16(x[c]) + from_bf16(y[c]));
}

}  // namespace

extern "C" {

// x (width), in and out: a token's embedding, then its state behind the last block. cache: (blocks, 2 * kv_heads, capacity, channels), or
// null with turns as CacheToken has them.
// ends: null, or what turns `id` into x where it holds the embedding, and x into `logits`, which are bfloat16 sums widened.
void bitpress_token(const Block *blocks, int count, const Ends *ends, int id, uint16_t *x, float *logits, const float *cos, const float *sin,
                    const float *turns, uint16_t *cache, int position, int capacity, int heads, int kv_heads, int channels, float scale, int width, int ffn, int threads) {
    thread_local std::vector<uint16_t> room;
    const int qkv_width = (heads + 2 * kv_heads) * channels, mixed_width = heads * channels, vocabulary = ends ? ends->head.outputs : 0;
    room.resize(size_t(width) + qkv_width + mixed_width + size_t(3) * ffn + vocabulary);
    uint16_t *added = room.data(), *qkv = added + width, *mixed = qkv + qkv_width, *gate_up = mixed + mixed_width, *gated = gate_up + 2 * ffn, *sums = gated + ffn;
    thread_local CacheRoom kept;
    CacheRoom &cache_room = kept;
    threads = std::max(1, std::min(threads, width / (2 * TILE)));  // of the narrowest product each has a pair of tiles; more would only wait
    Meeting meeting;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();  // fewer than asked for where the system has no more
#pragma omp single
        meeting.expect(parts);
        const Worker worker(Share{part, parts, meeting});
        std::vector<uint16_t> state(x, x + width), normed(width);  // every thread has the token's state to itself
        if (ends && ends->embedding.bits) look_up(ends->embedding, id, state.data());
        for (int b = 0; b < count; b++) {
            const Block &block = blocks[b];
            step::rms_norm(state.data(), block.attention_norm, normed.data(), width, block.attention_epsilon);
            const Matrix *next = worker.times_all(block.matrices, block.counts[0], normed.data(), qkv);
            meeting.wait();
            if (block.keys) {
                attend_cache({qkv, cos, sin, turns, block.keys, block.values, mixed, heads, kv_heads, channels, scale}, cache_room, worker);
            } else {
                const step::Token token{qkv, cos, sin, cache + size_t(b) * 2 * kv_heads * capacity * channels, mixed, position, capacity, heads, kv_heads, channels, scale};
                step::attend_heads(token, worker.from(heads), worker.to(heads));
            }
            meeting.wait();
            next = worker.times_all(next, block.counts[1], mixed, added);
            meeting.wait();
            add(state.data(), added, width);
            step::rms_norm(state.data(), block.mlp_norm, normed.data(), width, block.mlp_epsilon);
            next = worker.gated(next, block.counts[2], normed.data(), gate_up, gated, ffn);
            worker.times_all(next, block.counts[3], gated, added);
            meeting.wait();
            add(state.data(), added, width);
        }
        if (ends) {
            step::rms_norm(state.data(), ends->norm, normed.data(), width, ends->epsilon);
            worker.times_all(&ends->head, 1, normed.data(), sums);
            const int from = std::min(vocabulary, share_of(tiles_of(vocabulary), part, parts) * TILE);
            const int to = std::min(vocabulary, share_of(tiles_of(vocabulary), part + 1, parts) * TILE);
            for (int n = from; n < to; n++) logits[n] = from_bf16(sums[n]);
        } else if (part == 0) std::copy(state.begin(), state.end(), x);
    }
}
}
