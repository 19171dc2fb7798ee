// Attention of many positions that look back at all before them, in bfloat16: prompts, windows of text, calibration.
//
// A block of queries of one head meets the keys 256 at a time: scores, shares and the mix of values stay in the second-level
// cache, keys behind a block's last query are never touched, and both products are bfloat16 dot products with float32 sums.
// A softmax over pieces keeps the highest score so far; a higher one shrinks what was mixed before (Milakov and Gimelshein 2018).
// Scores stay float32; shares are rounded to bfloat16 before they meet the values. Compiled to nothing without bfloat16 dot products.

#include "cpu_attend.h"
#include "cpu_panel.h"

#if HAS_BF16

namespace {

constexpr int QUERIES = 24, KEYS = 256, WORDS = 128;  // WORDS: pairs of channels a query may have

// Where the channels of (sequence, head, position) begin in one of the inputs.
struct Side {
    const uint16_t *from;
    int64_t sequence, head, position;
    const uint16_t *at(int b, int h, int t) const { return from + b * sequence + h * head + t * position; }
};

struct Attention {
    Side q, k, v;
    uint16_t *out;  // (sequences, length, heads, value channels)
    int sequences, heads, groups, length, channels, mixed, threads;
    float scale;
    int padded() const { return rounded_up(length, PANEL); }
    int wide() const { return rounded_up(mixed, PANEL); }
    size_t key_words() const { return size_t(padded()) * channels / 2; }
    size_t value_words() const { return size_t(padded()) / 2 * wide(); }
};

// A panel's 32 keys: pairs of channels, each of all keys.
void lay_keys(const Attention &a, int b, int g, int first, uint32_t *to) {
    for (int n = 0; n < PANEL; n++) {
        const bool there = first + n < a.length;
        const uint16_t *key = there ? a.k.at(b, g, first + n) : nullptr;
        for (int c = 0; c < a.channels / 2; c++) to[c * PANEL + n] = there ? key[2 * c] | uint32_t(key[2 * c + 1]) << 16 : 0u;
    }
}

// A panel of 32 channels: pairs of positions, each of all those channels.
void lay_values(const Attention &a, int b, int g, int channel, uint32_t *to) {
    const int count = std::min(PANEL, a.mixed - channel);
    for (int t = 0; t < a.padded(); t += 2, to += PANEL) {
        if (t >= a.length) std::fill(to, to + PANEL, 0u);
        else lay_two(a.v.at(b, g, t) + channel, t + 1 < a.length ? a.v.at(b, g, t + 1) + channel : nullptr, count, PANEL, to);
    }
}

void lay(const Attention &a, uint32_t *keys, uint32_t *values) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int each = 0; each < a.sequences * a.groups; each++) {
        const int b = each / a.groups, g = each % a.groups;
        for (int t = 0; t < a.padded(); t += PANEL) lay_keys(a, b, g, t, keys + each * a.key_words() + size_t(t) * a.channels / 2);
        for (int c = 0; c < a.wide(); c += PANEL) lay_values(a, b, g, c, values + each * a.value_words() + size_t(a.padded()) / 2 * c);
    }
}

// rows_times_panel for any number of rows; word(m, k) as there, results `apart` from row to row.
template <class Word> void all_rows(const uint32_t *panel, int pairs, int rows, int apart, const Word &word, float *out) {
    float some[12 * PANEL];
    for (int m = 0; m < rows;) {
        const int count = rows - m >= 12 ? 12 : rows - m >= 4 ? 4 : 1;
        const auto from = [&](int row, int k) { return word(m + row, k); };
        if (count == 12) rows_times_panel<12>(panel, pairs, from, some);
        else if (count == 4) rows_times_panel<4>(panel, pairs, from, some);
        else rows_times_panel<1>(panel, pairs, from, some);
        for (int end = m + count, row = 0; m < end; m++, row++) std::memcpy(out + size_t(m) * apart, some + row * PANEL, sizeof(float) * PANEL);
    }
}

// A block of queries on its way along the keys.
struct Block {
    int b, h, first, rows;
    float scores[QUERIES * KEYS], top[QUERIES], total[QUERIES];
    uint32_t shares[QUERIES * KEYS / 2], queries[QUERIES * WORDS];  // rows at fixed distances are met without address arithmetic
    std::vector<float> mixed, piece;  // (rows, wide), (rows, PANEL)
};

// The scores of a row, `seen` of `count` keys being before it, become shares; those ahead get none: e^-infinity is 0.
void share_out(const Attention &a, Block &block, int m, int seen, int count) {
    float *row = block.scores + m * KEYS, highest = -INFINITY;
    std::fill(row + std::max(seen, 0), row + count, -INFINITY);
#pragma omp simd reduction(max : highest)
    for (int n = 0; n < seen; n++) highest = std::max(highest, row[n]);
    const float top = std::max(block.top[m], highest * a.scale);
    const __m512 scale = _mm512_set1_ps(a.scale), above = _mm512_set1_ps(top);
    __m512 total = _mm512_setzero_ps();
    for (int n = 0; n < count; n += TILE) {
        const __m512 share = exponential_lanes(_mm512_fmsub_ps(_mm512_loadu_ps(row + n), scale, above));
        total = _mm512_add_ps(total, share);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(block.shares + (m * KEYS + n) / 2), (__m256i)_mm512_cvtneps_pbh(share));
    }
    const float kept = exponential(block.top[m] - top);
    block.top[m] = top, block.total[m] = block.total[m] * kept + _mm512_reduce_add_ps(total);
    for (int c = 0; c < a.wide(); c++) block.mixed[size_t(m) * a.wide() + c] *= kept;
}

void meet(const Attention &a, Block &block, int start, int count, const uint32_t *keys, const uint32_t *values) {
    const auto query = [&](int m, int c) { return block.queries[m * WORDS + c]; };
    for (int n = 0; n < count; n += PANEL)
        all_rows(keys + size_t(start + n) * a.channels / 2, a.channels / 2, block.rows, KEYS, query, block.scores + n);
    for (int m = 0; m < block.rows; m++) share_out(a, block, m, std::min(count, block.first + m + 1 - start), count);
    const auto share = [&](int m, int n) { return block.shares[m * KEYS / 2 + n]; };
    for (int c = 0; c < a.wide(); c += PANEL) {
        all_rows(values + (size_t(a.padded()) * c + size_t(start) * PANEL) / 2, count / 2, block.rows, PANEL, share, block.piece.data());
        for (int m = 0; m < block.rows; m++)
            for (int n = 0; n < PANEL; n++) block.mixed[size_t(m) * a.wide() + c + n] += block.piece[m * PANEL + n];
    }
}

void attend(const Attention &a, Block &block, const uint32_t *keys, const uint32_t *values) {
    std::fill_n(block.top, QUERIES, -INFINITY), std::fill_n(block.total, QUERIES, 0.0f);
    block.mixed.assign(size_t(QUERIES) * a.wide(), 0.0f), block.piece.resize(QUERIES * PANEL);
    for (int m = 0; m < block.rows; m++) std::memcpy(block.queries + m * WORDS, a.q.at(block.b, block.h, block.first + m), 2 * size_t(a.channels));
    const int end = block.first + block.rows;
    for (int start = 0; start < end; start += KEYS) meet(a, block, start, rounded_up(std::min(KEYS, end - start), PANEL), keys, values);
    for (int m = 0; m < block.rows; m++) {
        float *row = &block.mixed[size_t(m) * a.wide()];
        for (int c = 0; c < a.mixed; c++) row[c] /= block.total[m];
        store(a.out, true, ((size_t(block.b) * a.length + block.first + m) * a.heads + block.h) * a.mixed, row, a.mixed);
    }
}

}  // namespace

// Each side: elements from one sequence, head and position to the next; channels lie together, their number is even.
extern "C" void bitpress_attend_back(const uint16_t *q, const uint16_t *k, const uint16_t *v, const int64_t *apart, uint16_t *out, int sequences, int heads,
                                     int groups, int length, int channels, int mixed, float scale, int threads) {
    const Attention a{{q, apart[0], apart[1], apart[2]}, {k, apart[3], apart[4], apart[5]}, {v, apart[6], apart[7], apart[8]}, out, sequences, heads, groups,
                      length, channels, mixed, threads, scale};
    thread_local std::vector<uint32_t> room;
    room.resize(size_t(sequences) * groups * (a.key_words() + a.value_words()));
    uint32_t *const keys = room.data(), *const values = keys + size_t(sequences) * groups * a.key_words();
    lay(a, keys, values);
    const int blocks = (length + QUERIES - 1) / QUERIES;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int task = 0; task < sequences * heads * blocks; task++) {
        thread_local Block block;
        const int each = task % (sequences * heads), first = (blocks - 1 - task / (sequences * heads)) * QUERIES;  // those that look back furthest first
        block.b = each / heads, block.h = each % heads, block.first = first, block.rows = std::min(QUERIES, length - first);
        const size_t shared = size_t(block.b) * groups + block.h / (heads / groups);
        attend(a, block, keys + shared * a.key_words(), values + shared * a.value_words());
    }
}

#endif
