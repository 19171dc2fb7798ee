// Attention of one token over a compressed KV cache, read in the form in which it is held: rows, KIVI codes, a latent, or codes of one.
//
// Nothing of the cache is made dense but 32 tokens at a time, in the first-level cache. Keys of a latent are made anew, factor times
// latent, before their rotation; values are mixed as latents and go through their factor once. Rows are bfloat16, sums float32.

#include <omp.h>

#include "cpu_cache_codes.h"
#include "cpu_cache_panel.h"

namespace {

using namespace cache;
constexpr int ROWS = 8;

inline float total(Reals x) {
#if HAS_VNNI
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < TILE; i++) sum += x[i];
    return sum;
#endif
}

inline float dot(const float *a, const float *b, int count) {
    Reals sum{};
    int c = 0;
    for (; c + TILE <= count; c += TILE) sum += lanes(const_cast<float *>(a + c)) * lanes(const_cast<float *>(b + c));
    float rest = total(sum);
    for (; c < count; c++) rest += a[c] * b[c];
    return rest;
}

#if HAS_BF16
// Products of one row with S queries, each left as 16 sums, (S, 16, 16) apart.
template <int S> void multiply_row(const uint16_t *row, const uint16_t *queries, int channels, float *partial) {
    __m512 sum[S];
    for (auto &each : sum) each = _mm512_setzero_ps();
    for (int c = 0; c < channels; c += SPAN) {
        const __mmask32 there = channels - c >= SPAN ? ~0u : (1u << (channels - c)) - 1;
        const __m512bh key = (__m512bh)_mm512_maskz_loadu_epi16(there, row + c);
        for (int h = 0; h < S; h++) sum[h] = _mm512_dpbf16_ps(sum[h], key, (__m512bh)_mm512_maskz_loadu_epi16(there, queries + h * channels + c));
    }
    for (int h = 0; h < S; h++) _mm512_storeu_ps(partial + h * HALF * TILE, sum[h]);
}

// The sums of sixteen rows of sixteen.
inline __m512 sums_of(const float *rows) {
    __m512 four[4];
    for (int i = 0; i < 4; i++) {
        __m512 two[2];
        for (int j = 0; j < 2; j++) {
            const __m512 first = _mm512_loadu_ps(rows + (4 * i + 2 * j) * TILE), second = _mm512_loadu_ps(rows + (4 * i + 2 * j + 1) * TILE);
            two[j] = _mm512_add_ps(_mm512_unpacklo_ps(first, second), _mm512_unpackhi_ps(first, second));
        }
        const __m512d low = _mm512_castps_pd(two[0]), high = _mm512_castps_pd(two[1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    const auto folded = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
    return folded(folded(four[0], four[1]), folded(four[2], four[3]));
}
#endif

// Scores of S heads, `seen` apart, of the 32 tokens of a tile (channels, 32).
template <int S> void score_heads(const float *queries, const float *tile, int channels, int seen, int count, float *scores) {
    Reals sum[S][2] = {};
    for (int c = 0; c < channels; c++) {
        const Reals first = lanes(const_cast<float *>(tile + c * SPAN)), second = lanes(const_cast<float *>(tile + c * SPAN + HALF));
        for (int h = 0; h < S; h++) sum[h][0] += queries[h * channels + c] * first, sum[h][1] += queries[h * channels + c] * second;
    }
    for (int h = 0; h < S; h++) {
        if (count == SPAN) lanes(scores + size_t(h) * seen) = sum[h][0], lanes(scores + size_t(h) * seen + HALF) = sum[h][1];
        else std::memcpy(scores + size_t(h) * seen, sum[h], sizeof(float) * count);
    }
}

#if HAS_BF16
// Adds 32 rows, weighed by bfloat16 shares (S, 32), to what S heads have mixed: two tokens to a product, sums in registers.
template <int S> void mix_whole(const uint16_t *rows, size_t row, const uint16_t *shares, int width, int stride, float *mixed) {
    const __m512i natural = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    for (int e = 0; e < width; e += TILE) {
        const __mmask32 there = width - e >= TILE ? 0xffffu : (1u << (width - e)) - 1;
        __m512 sum[S];
#pragma GCC unroll 12
        for (int h = 0; h < S; h++) sum[h] = _mm512_loadu_ps(mixed + size_t(h) * stride + e);
        for (int t = 0; t < SPAN; t += 2) {
            const __m512i first = _mm512_maskz_loadu_epi16(there, rows + t * row + e), second = _mm512_maskz_loadu_epi16(there, rows + (t + 1) * row + e);
            const __m512bh both = (__m512bh)_mm512_permutex2var_epi16(first, natural, second);
#pragma GCC unroll 12
            for (int h = 0; h < S; h++) {
                int32_t two;
                std::memcpy(&two, shares + h * SPAN + t, 4);
                sum[h] = _mm512_dpbf16_ps(sum[h], both, (__m512bh)_mm512_set1_epi32(two));
            }
        }
#pragma GCC unroll 12
        for (int h = 0; h < S; h++) _mm512_storeu_ps(mixed + size_t(h) * stride + e, sum[h]);
    }
}
#endif

// Adds 8 rows, weighed by the shares (S, 8), to what S heads have mixed, each `stride` wide.
template <int S> void mix_heads(const float *rows, const float *shares, int width, int stride, float *mixed) {
    for (int e = 0; e < width; e += TILE) {
        Reals sum[S];
        for (int h = 0; h < S; h++) sum[h] = lanes(mixed + size_t(h) * stride + e);
        for (int t = 0; t < ROWS; t++) {
            const Reals row = lanes(const_cast<float *>(rows + t * stride + e));
            for (int h = 0; h < S; h++) sum[h] += shares[h * ROWS + t] * row;
        }
        for (int h = 0; h < S; h++) lanes(mixed + size_t(h) * stride + e) = sum[h];
    }
}

// Calls made(first head, how many) for heads in runs of at most MOST, the count as a constant.
template <int MOST = 4, class Made> void in_runs(int heads, const Made &made, int from = 0) {
    for (; heads - from >= MOST; from += MOST) made(from, std::integral_constant<int, MOST>{});
    if constexpr (MOST > 1) if (from < heads) in_runs<MOST - 1>(heads, made, from);
}

struct Attention {
    const CacheSide &keys, &values;
    const float *queries, *turns;  // (heads, channels)
    const uint16_t *rounded;       // queries as bfloat16
    float *scores;                 // (heads, seen)
    int seen, heads, kv_heads, channels;
    Unpacker key_codes{keys.bits ? keys.bits : 8}, value_codes{values.bits ? values.bits : 8};
    FourRuns key_runs{keys.bits ? keys.bits : 8}, value_runs{values.bits ? values.bits : 8};

    int shared() const { return heads / kv_heads; }
    float *scores_of(int head, int token) const { return scores + size_t(head) * seen + token; }

    // Scores of the 32 tokens from `first`.
    void score(int first, float *tile, uint32_t *panel) const {
        const int count = std::min(SPAN, seen - first), old = old_tokens(keys);
        if (keys.up) score_latent(first, count, tile, panel);
        else if (first < old && keys.by_channel) score_channels(first, tile);
        else if (first < old || count < SPAN) score_rows(first, count, tile);
        else score_whole(first, tile);
    }

    void score_latent(int first, int count, float *tile, uint32_t *panel) const {
        const int pairs = (keys.width + 1) / 2, own = keys.width / kv_heads;
        read_panel(keys, key_codes, first, count, panel, tile);
        for (int kv = 0; kv < kv_heads; kv++) {
            const int from = keys.each ? kv * own / 2 : 0, to = keys.each ? ((kv + 1) * own + 1) / 2 : pairs;
            expand(keys.up + size_t(kv) * channels * 2 * pairs, 2 * size_t(pairs), panel, from, to, channels, tile);
            turn_keys(tile, turns + size_t(first) * channels, channels / 2);
            score_tile(kv, first, count, tile);
        }
    }

    void score_channels(int first, float *tile) const {
        for (int kv = 0; kv < kv_heads; kv++) {
            if (keys_as_codes(keys, channels)) {
                in_runs(shared(), [&](int h, auto run) {
                    const int head = kv * shared() + h;
                    score_codes<run>(keys, key_runs, first / SPAN, kv * channels, channels, queries + head * channels, seen, scores_of(head, first));
                });
                continue;
            }
            for (int c = 0; c < channels; c++) read_channel(keys, key_codes, first / SPAN, kv * channels + c, lanes(tile + c * SPAN), lanes(tile + c * SPAN + HALF));
            score_tile(kv, first, SPAN, tile);
        }
    }

    // Over keys (channels, 32) of one head.
    void score_tile(int kv, int first, int count, const float *tile) const {
        in_runs(shared(), [&](int h, auto run) {
            const int head = kv * shared() + h;
            score_heads<run>(queries + head * channels, tile, channels, seen, count, scores_of(head, first));
        });
    }

#if HAS_BF16
    // Over 32 rows as they are, in the order in which they lie: sixteen tokens' sums end in one register a head. partial: (heads, 16, 16).
    void score_whole(int first, float *partial) const {
        for (int half = first; half < first + SPAN; half += HALF) {
            for (int t = 0; t < HALF; t++)
                for (int kv = 0; kv < kv_heads; kv++)
                    in_runs(shared(), [&](int h, auto run) {
                        const int head = kv * shared() + h;
                        const uint16_t *key = keys.recent + size_t(half + t - old_tokens(keys)) * keys.width + kv * channels;
                        multiply_row<run>(key, rounded + head * channels, channels, partial + (head * HALF + t) * TILE);
                    });
            for (int head = 0; head < heads; head++) _mm512_storeu_ps(scores_of(head, half), sums_of(partial + head * HALF * TILE));
        }
    }
#else
    void score_whole(int first, float *row) const { score_rows(first, SPAN, row); }
#endif

    void score_rows(int first, int count, float *row) const {
        for (int t = 0; t < count; t++) {
            read_row(keys, key_codes, first + t, row);
            for (int head = 0; head < heads; head++) *scores_of(head, first + t) = dot(queries + head * channels, row + head / shared() * channels, channels);
        }
    }

    int mixed_width() const { return !values.up ? channels : values.each ? values.width / kv_heads : values.width; }

    // Calls made(first head, how many, where its numbers begin in a row) for heads that mix the same numbers.
    template <int MOST = 4, class Made> void mixing(const Made &made) const {
        const bool common = values.up && !values.each;  // all heads mix whole rows
        for (int kv = 0; kv < (common ? 1 : kv_heads); kv++)
            in_runs<MOST>(common ? heads : shared(), [&](int h, auto run) { made(kv * shared() + h, run, kv * mixed_width()); });
    }

    // Adds the shares of 32 tokens' rows to `mixed`, (heads, padded width).
    void mix(int first, float *rows, float *mixed) const {
        const int old = old_tokens(values), end = std::min(seen, first + SPAN);
        if (first >= old && end == first + SPAN) return mix_whole_rows(first, rows, mixed);
        if (end > old || !values_as_codes(values, mixed_width())) {
            for (int row = first; row < end; row += ROWS) mix_rows(row, rows, mixed);
            return;
        }
        const int stride = padded(values.width);
        mixing([&](int head, auto run, int from) {
            mix_codes<run>(values, value_runs, first, from, mixed_width(), scores_of(head, first), seen, stride, mixed + size_t(head) * stride);
        });
    }

#if HAS_BF16
    // 32 rows as they are, of as many heads as have room for their sums in registers.
    void mix_whole_rows(int first, float *, float *mixed) const {
        const int stride = padded(values.width);
        const uint16_t *held = values.recent + size_t(first - old_tokens(values)) * values.width;
        mixing<9>([&](int head, auto run, int from) {
            alignas(64) uint16_t shares[run * SPAN];
            for (int i = 0; i < run; i++) {
                const float *at = scores_of(head + i, first);
                _mm512_store_si512(shares + i * SPAN, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(at + HALF), _mm512_loadu_ps(at)));
            }
            mix_whole<run>(held + from, values.width, shares, mixed_width(), stride, mixed + size_t(head) * stride);
        });
    }
#else
    void mix_whole_rows(int first, float *rows, float *mixed) const {
        for (int row = first; row < first + SPAN; row += ROWS) mix_rows(row, rows, mixed);
    }
#endif

    void mix_rows(int first, float *rows, float *mixed) const {
        const int count = std::min(ROWS, seen - first), stride = padded(values.width);
        for (int t = 0; t < count; t++) read_row(values, value_codes, first + t, rows + t * stride);
        mixing([&](int head, auto run, int from) {
            float shares[run * ROWS] = {};
            for (int i = 0; i < run; i++) std::memcpy(shares + i * ROWS, scores_of(head + i, first), sizeof(float) * count);
            mix_heads<run>(rows + from, shares, mixed_width(), stride, mixed + size_t(head) * stride);
        });
    }

    // What was mixed for heads from .. to - 1, through the factor where there is one.
    void finish(const float *mixed, int from, int to, uint16_t *out) const {
        const int width = mixed_width(), stride = padded(values.width);
        const size_t up_width = 2 * size_t((values.width + 1) / 2);
        for (int head = from; head < to; head++) {
            const float *own = mixed + size_t(head) * stride;
            const int kv = head / shared(), base = values.each ? kv * width : 0;
            for (int c = 0; c < channels; c++) {
                float sum = values.up ? 0 : own[c];
                if (values.up) {
                    const uint16_t *up = values.up + size_t(kv * channels + c) * up_width + base;
#pragma omp simd reduction(+ : sum)
                    for (int e = 0; e < width; e++) sum += own[e] * from_bf16(up[e]);
                }
                out[head * channels + c] = to_bf16(sum);
            }
        }
    }
};

// A token's own rows, keys turned to its position.
void append_token(const CacheToken &t) {
    const uint16_t *key = t.qkv + size_t(t.heads) * t.channels, *value = key + t.keys->width;
    std::vector<uint16_t> turned(t.keys->up ? 0 : t.keys->width);
    std::vector<float> one(t.channels);
    for (int kv = 0; kv < t.kv_heads && !t.keys->up; kv++) {
        turn(key + kv * t.channels, t.cos, t.sin, t.channels, one.data());
        for (int c = 0; c < t.channels; c++) turned[kv * t.channels + c] = to_bf16(one[c]);
    }
    append(*t.keys, t.keys->up ? key : turned.data());
    append(*t.values, value);
}

}  // namespace

void attend_cache(const CacheToken &t, CacheRoom &room, const Share &share) {
    thread_local std::vector<float> queries, tile;
    thread_local std::vector<uint16_t> rounded;
    thread_local std::vector<uint32_t> panel;
    const int heads = t.heads, channels = t.channels, stride = padded(t.values->width);
    if (share.part == 0) {
        append_token(t);
        room.seen = old_tokens(*t.keys) + t.keys->count;
        room.scores.resize(size_t(heads) * room.seen);
        room.mixed.assign(size_t(share.parts) * heads * stride, 0.0f);
    }
    queries.resize(size_t(heads) * channels), rounded.resize(queries.size());
    for (int head = 0; head < heads; head++) turn(t.qkv + head * channels, t.cos, t.sin, channels, &queries[head * channels]);
    for (size_t i = 0; i < queries.size(); i++) rounded[i] = to_bf16(queries[i] *= t.scale);
    tile.assign(size_t(std::max({SPAN * channels, heads * HALF * TILE, padded(t.keys->width), ROWS * stride + TILE})), 0.0f);
    panel.resize(t.keys->up ? size_t((t.keys->width + 1) / 2) * SPAN : 0);
    share.meeting.wait();
    const int seen = room.seen, spans = (seen + SPAN - 1) / SPAN;
    const Attention attention{*t.keys, *t.values, queries.data(), t.turns, rounded.data(), room.scores.data(), seen, heads, t.kv_heads, channels};
    for (int span = share.from(spans); span < share.to(spans); span++) attention.score(span * SPAN, tile.data(), panel.data());
    share.meeting.wait();
    for (int head = share.from(heads); head < share.to(heads); head++) softmax(room.scores.data() + size_t(head) * seen, seen);
    share.meeting.wait();
    std::fill(tile.begin(), tile.end(), 0.0f);
    float *own = room.mixed.data() + size_t(share.part) * heads * stride;
    for (int span = share.from(spans); span < share.to(spans); span++) attention.mix(span * SPAN, tile.data(), own);
    share.meeting.wait();
    for (int part = 1; part < share.parts; part++)
        for (int i = share.from(heads) * stride; i < share.to(heads) * stride; i++) room.mixed[i] += room.mixed[size_t(part) * heads * stride + i];
    attention.finish(room.mixed.data(), share.from(heads), share.to(heads), t.out);
}

extern "C" {

// As CacheToken.
void bitpress_attend_cache(const uint16_t *qkv, const float *cos, const float *sin, const float *turns, CacheSide *keys, CacheSide *values, uint16_t *out,
                           int heads, int kv_heads, int channels, float scale, int threads) {
    const CacheToken token{qkv, cos, sin, turns, keys, values, out, heads, kv_heads, channels, scale};
    thread_local CacheRoom kept;
    CacheRoom &room = kept;
    Meeting meeting;
    const int seen = old_tokens(*keys) + keys->count + 1;
    if (size_t(seen) * heads * channels < 400000) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp single
        meeting.expect(omp_get_num_threads());
        attend_cache(token, room, Share{omp_get_thread_num(), omp_get_num_threads(), meeting});
    }
}
}
