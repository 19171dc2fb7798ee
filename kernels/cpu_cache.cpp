// Attention of one token over a compressed KV cache, read in the form in which it is held: rows, KIVI codes, a latent, or codes of one.
//
// Nothing of the cache is made dense but 32 tokens at a time, in the first-level cache. Keys of a latent are made anew, factor times
// latent, before their rotation; values are mixed as latents and go through their factor once. Codes, lows and scales are those of
// engine/kv_cache.py, to the bit. Rows are bfloat16, sums float32.
//
// Panel. 32 tokens of a latent, two of its numbers in every word: (pairs, 32), what one bfloat16 dot product per 16 tokens takes.

#include "cpu_cache.h"

#include <omp.h>

#include "cpu_rows.h"

namespace {

constexpr int SPAN = 32, HALF = SPAN / 2, ROWS = 8;
typedef float Reals __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

inline Reals &lanes(float *at) { return *reinterpret_cast<Reals *>(at); }
inline Reals reals(const uint16_t *at) { return (Reals)(__builtin_convertvector(*reinterpret_cast<const Halves *>(at), Words) << 16); }

// Sixteen codes of any width: the two bytes that hold each, shifted.
struct Unpacker {
    Bytes order{};
    Words shift{};
    uint32_t mask;
    int bytes;
    explicit Unpacker(int bits) : mask((1u << bits) - 1), bytes(2 * bits) {
        for (int i = 0; i < TILE; i++) {
            for (int b = 0; b < 4; b++) order[4 * i + b] = uint8_t(b < 2 ? i * bits / 8 + b : 0x80);  // what is above 16 bits is masked
            shift[i] = uint32_t(i * bits % 8);
        }
    }
    Reals operator()(const uint8_t *from, int have) const {
#if HAS_VNNI
        const __m128i held = _mm_maskz_loadu_epi8(__mmask16((1u << std::min(have, bytes)) - 1), from);
        const Words words = (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(held), (__m512i)order);
#else
        Bytes held{};
        std::memcpy(&held, from, std::min(have, bytes));
        const Words words = (Words)__builtin_shuffle(held, order);
#endif
        return __builtin_convertvector((words >> shift) & mask, Reals);
    }
};

int old_tokens(const CacheSide &s) { return s.by_channel ? s.filled * s.group : s.filled; }
int group_bytes(const CacheSide &s) { return (s.group * s.bits + 7) / 8; }
int padded(int width) { return rounded_up(width, TILE); }

// Writing ---------------------------------------------------------------------------------------------------------

// `count` numbers, `stride` apart, as one group.
void encode(const CacheSide &s, const uint16_t *x, int count, size_t stride, size_t at) {
    float least = INFINITY, most = -INFINITY;
    for (int i = 0; i < count; i++) {
        const float value = from_bf16(x[i * stride]);
        least = std::min(least, value), most = std::max(most, value);
    }
    const int top = (1 << s.bits) - 1;
    float scale = from_bf16(to_bf16((most - least) / float(top)));
    if (!(scale > 0)) scale = 1.0f;
    s.lows[at] = to_bf16(least), s.scales[at] = to_bf16(scale);
    uint8_t *codes = s.codes + at * group_bytes(s);
    std::memset(codes, 0, group_bytes(s));
    for (int i = 0; i < s.group; i++) {  // a short last group is filled up with its last number
        const float level = (from_bf16(x[std::min(i, count - 1) * stride]) - least) / scale;
        const uint32_t code = uint32_t(std::min(float(top), std::max(0.0f, std::nearbyintf(level)))) << (i * s.bits % 8);
        codes[i * s.bits / 8] |= uint8_t(code);
        if (code > 255) codes[i * s.bits / 8 + 1] |= uint8_t(code >> 8);
    }
}

// A row behind the others; what leaves the window becomes codes.
void append(CacheSide &s, const uint16_t *row) {
    std::memcpy(s.recent + size_t(s.count++) * s.width, row, 2 * size_t(s.width));
    const int leaving = s.by_channel ? s.group : 1;
    if (!s.bits || s.count - s.window < leaving) return;
    if (s.by_channel) {
        for (int c = 0; c < s.width; c++) encode(s, s.recent + c, s.group, s.width, size_t(s.filled) * s.width + c);
    } else {
        const int groups = (s.width + s.group - 1) / s.group;
        for (int g = 0; g < groups; g++) encode(s, s.recent + g * s.group, std::min(s.group, s.width - g * s.group), 1, size_t(s.filled) * groups + g);
    }
    s.filled++, s.count -= leaving;
    std::memmove(s.recent, s.recent + size_t(leaving) * s.width, 2 * size_t(s.count) * s.width);
}

// Reading ---------------------------------------------------------------------------------------------------------

// One token's row, not of the codes by channel; `out` has room for whole lanes.
void read_row(const CacheSide &s, const Unpacker &codes_at, int token, float *out) {
    const int old = old_tokens(s);
    if (token >= old) {
        const uint16_t *row = s.recent + size_t(token - old) * s.width;
        int c = 0;
        for (; c + TILE <= s.width; c += TILE) lanes(out + c) = reals(row + c);
        for (; c < s.width; c++) out[c] = from_bf16(row[c]);
        return;
    }
    const int groups = (s.width + s.group - 1) / s.group, bytes = group_bytes(s);
    for (int g = 0; g < groups; g++) {
        const size_t at = size_t(token) * groups + g;
        const float low = from_bf16(s.lows[at]), scale = from_bf16(s.scales[at]);
        for (int c = 0, byte = 0; c < s.group && g * s.group + c < s.width; c += TILE, byte += codes_at.bytes) {
            const Reals values = codes_at(s.codes + at * bytes + byte, bytes - byte) * scale + low;
            const int there = std::min(s.group - c, s.width - g * s.group - c);
            if (there >= TILE) lanes(out + g * s.group + c) = values;
            else std::memcpy(out + g * s.group + c, &values, sizeof(float) * there);
        }
    }
}

// One channel of the 32 tokens of a group.
inline void read_channel(const CacheSide &s, const Unpacker &codes_at, int group, int channel, Reals &first, Reals &second) {
    const size_t at = size_t(group) * s.width + channel;
    const float low = from_bf16(s.lows[at]), scale = from_bf16(s.scales[at]);
    const uint8_t *codes = s.codes + at * group_bytes(s);
    first = codes_at(codes, codes_at.bytes) * scale + low;
    second = codes_at(codes + codes_at.bytes, codes_at.bytes) * scale + low;
}

#if HAS_BF16
inline Words paired(Reals even, Reals odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}
#else
inline Words paired(Reals even, Reals odd) {
    Words made;
    for (int i = 0; i < TILE; i++) made[i] = to_bf16(even[i]) | uint32_t(to_bf16(odd[i])) << 16;
    return made;
}
#endif

#if HAS_VNNI
// Sixteen rows of at most 32 numbers, `stride` apart, as words with neighbouring rows in neighbouring places.
inline void transpose(const uint16_t *rows, size_t stride, int width, uint32_t *panel, int pairs) {
    __m512i r[TILE], t[TILE];
    const __mmask32 there = width >= 32 ? ~0u : (1u << width) - 1;
    for (int i = 0; i < TILE; i++) r[i] = _mm512_maskz_loadu_epi16(there, rows + i * stride);
    for (int i = 0; i < TILE; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < TILE; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88), r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int p = 0; p < pairs; p++) _mm512_storeu_si512(panel + p * SPAN, r[p]);
}
#endif

// Tokens from `first`, at most 32, of a latent as a panel.
void read_panel(const CacheSide &s, const Unpacker &codes_at, int first, int count, uint32_t *panel, float *row) {
    const int pairs = (s.width + 1) / 2;
    if (s.by_channel && first < old_tokens(s)) {
        for (int p = 0; p < pairs; p++) {
            Reals values[2][2] = {};
            for (int i = 0; i < 2 && 2 * p + i < s.width; i++) read_channel(s, codes_at, first / SPAN, 2 * p + i, values[i][0], values[i][1]);
            for (int i = 0; i < 2; i++) *reinterpret_cast<Words *>(panel + p * SPAN + i * HALF) = paired(values[0][i], values[1][i]);
        }
        return;
    }
    const int old = old_tokens(s);
#if HAS_VNNI
    if (first >= old && count == SPAN) {
        for (int half = 0; half < SPAN; half += HALF)
            for (int p = 0; p < pairs; p += TILE)
                transpose(s.recent + size_t(first - old + half) * s.width + 2 * p, s.width, s.width - 2 * p, panel + p * SPAN + half, std::min(TILE, pairs - p));
        return;
    }
#endif
    for (int t = 0; t < SPAN; t++) {
        const uint16_t *held = s.recent + size_t(std::max(0, first + t - old)) * s.width;
        if (t < count && first + t < old) read_row(s, codes_at, first + t, row);
        for (int p = 0; p < pairs; p++) {
            uint32_t both = 0;
            if (t < count && first + t >= old) std::memcpy(&both, held + 2 * p, 2 * p + 1 < s.width ? 4 : 2);
            else if (t < count) both = to_bf16(row[2 * p]) | (2 * p + 1 < s.width ? uint32_t(to_bf16(row[2 * p + 1])) << 16 : 0);
            panel[p * SPAN + t] = both;
        }
    }
}

// Keys of one head, (channels, 32): rows of the factor times pairs [from, to) of a panel.
template <int MB> void some_keys(const uint16_t *up, size_t stride, const uint32_t *panel, int from, int to, float *keys) {
    Reals sum[MB][2] = {};
    for (int p = from; p < to; p++) {
        const Words first = *reinterpret_cast<const Words *>(panel + p * SPAN), second = *reinterpret_cast<const Words *>(panel + p * SPAN + HALF);
        for (int m = 0; m < MB; m++) {
            uint32_t two;
            std::memcpy(&two, up + m * stride + 2 * p, 4);
#if HAS_BF16
            const __m512bh both = (__m512bh)_mm512_set1_epi32(int(two));
            sum[m][0] = (Reals)_mm512_dpbf16_ps((__m512)sum[m][0], (__m512bh)first, both);
            sum[m][1] = (Reals)_mm512_dpbf16_ps((__m512)sum[m][1], (__m512bh)second, both);
#else
            const float even = from_bf16(uint16_t(two)), odd = from_bf16(uint16_t(two >> 16));
            sum[m][0] += even * (Reals)(first << 16) + odd * (Reals)(first & 0xffff0000u);
            sum[m][1] += even * (Reals)(second << 16) + odd * (Reals)(second & 0xffff0000u);
#endif
        }
    }
    for (int m = 0; m < MB; m++) lanes(keys + m * SPAN) = sum[m][0], lanes(keys + m * SPAN + HALF) = sum[m][1];
}

void expand(const uint16_t *up, size_t stride, const uint32_t *panel, int from, int to, int channels, float *keys) {
    int c = 0;
    for (; c + 8 <= channels; c += 8) some_keys<8>(up + c * stride, stride, panel, from, to, keys + c * SPAN);
    for (; c < channels; c++) some_keys<1>(up + c * stride, stride, panel, from, to, keys + c * SPAN);
}

// Turns keys (channels, 32) in place. turns: cosines, then sines, (channels / 2, 32) of the same tokens.
void turn_keys(float *keys, const float *turns, int half) {
    for (int i = 0; i < half * SPAN; i++) {
        const float low = keys[i], high = keys[half * SPAN + i], cos = turns[i], sin = turns[half * SPAN + i];
        keys[i] = low * cos - high * sin;
        keys[half * SPAN + i] = high * cos + low * sin;
    }
}

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

// Calls made(first head, how many) for heads in runs of at most 4, the count as a constant.
template <class Made> void in_runs(int heads, const Made &made) {
    int h = 0;
    for (; heads - h >= 4; h += 4) made(h, std::integral_constant<int, 4>{});
    if (heads - h == 3) made(h, std::integral_constant<int, 3>{});
    if (heads - h == 2) made(h, std::integral_constant<int, 2>{});
    if (heads - h == 1) made(h, std::integral_constant<int, 1>{});
}

struct Attention {
    const CacheSide &keys, &values;
    const float *queries, *turns;
    float *scores;  // (heads, seen)
    int seen, heads, kv_heads, channels;

    // Scores of the 32 tokens from `first`.
    void score(int first, const Unpacker &codes_at, float *tile, uint32_t *panel) const {
        const int count = std::min(SPAN, seen - first), shared = heads / kv_heads;
        const bool by_channel = keys.by_channel && first < old_tokens(keys);
        if (!keys.up && !by_channel) return score_rows(first, count, codes_at, tile);
        if (keys.up) read_panel(keys, codes_at, first, count, panel, tile);
        const int pairs = (keys.width + 1) / 2, own = keys.width / kv_heads;
        for (int kv = 0; kv < kv_heads; kv++) {
            if (keys.up) {
                const int from = keys.each ? kv * own / 2 : 0, to = keys.each ? ((kv + 1) * own + 1) / 2 : pairs;
                expand(keys.up + size_t(kv) * channels * 2 * pairs, 2 * size_t(pairs), panel, from, to, channels, tile);
                turn_keys(tile, turns + size_t(first) * channels, channels / 2);
            } else {
                for (int c = 0; c < channels; c++) read_channel(keys, codes_at, first / SPAN, kv * channels + c, lanes(tile + c * SPAN), lanes(tile + c * SPAN + HALF));
            }
            in_runs(shared, [&](int h, auto run) {
                const int head = kv * shared + h;
                score_heads<run>(queries + head * channels, tile, channels, seen, count, scores + size_t(head) * seen + first);
            });
        }
    }

    void score_rows(int first, int count, const Unpacker &codes_at, float *row) const {
        const int shared = heads / kv_heads;
        for (int t = 0; t < count; t++) {
            read_row(keys, codes_at, first + t, row);
            for (int head = 0; head < heads; head++) scores[size_t(head) * seen + first + t] = dot(queries + head * channels, row + head / shared * channels, channels);
        }
    }

    int mixed_width() const { return !values.up ? channels : values.each ? values.width / kv_heads : values.width; }

    // Adds the shares of 8 tokens' rows to `mixed`, (heads, padded width).
    void mix(int first, const Unpacker &codes_at, float *rows, float *mixed) const {
        const int count = std::min(ROWS, seen - first), width = mixed_width(), stride = padded(values.width), shared = heads / kv_heads;
        for (int t = 0; t < count; t++) read_row(values, codes_at, first + t, rows + t * stride);
        const bool common = values.up && !values.each;  // all heads mix the same rows
        for (int kv = 0; kv < (common ? 1 : kv_heads); kv++) {
            in_runs(common ? heads : shared, [&](int h, auto run) {
                const int head = kv * shared + h;
                float shares[run * ROWS] = {};
                for (int i = 0; i < run; i++) std::memcpy(shares + i * ROWS, scores + size_t(head + i) * seen + first, sizeof(float) * count);
                mix_heads<run>(rows + kv * width, shares, width, stride, mixed + size_t(head) * stride);
            });
        }
    }

    // What was mixed for heads from .. to - 1, through the factor where there is one.
    void finish(const float *mixed, int from, int to, uint16_t *out) const {
        const int width = mixed_width(), stride = padded(values.width), shared = heads / kv_heads;
        const size_t up_width = 2 * size_t((values.width + 1) / 2);
        for (int head = from; head < to; head++) {
            const float *own = mixed + size_t(head) * stride;
            const int kv = head / shared, base = values.each ? kv * width : 0;
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

}  // namespace

void attend_cache(const CacheToken &t, CacheRoom &room, const Share &share) {
    thread_local std::vector<float> queries, tile;
    thread_local std::vector<uint32_t> panel;
    const int heads = t.heads, channels = t.channels, stride = padded(t.values->width);
    if (share.part == 0) {
        const uint16_t *key = t.qkv + size_t(heads) * channels, *value = key + t.keys->width;
        std::vector<uint16_t> turned(t.keys->up ? 0 : t.keys->width);
        std::vector<float> one(channels);
        for (int kv = 0; kv < t.kv_heads && !t.keys->up; kv++) {
            turn(key + kv * channels, t.cos, t.sin, channels, one.data());
            for (int c = 0; c < channels; c++) turned[kv * channels + c] = to_bf16(one[c]);
        }
        append(*t.keys, t.keys->up ? key : turned.data());
        append(*t.values, value);
        room.seen = old_tokens(*t.keys) + t.keys->count;
        room.scores.resize(size_t(heads) * room.seen);
        room.mixed.assign(size_t(share.parts) * heads * stride, 0.0f);
    }
    queries.resize(size_t(heads) * channels);
    for (int head = 0; head < heads; head++) turn(t.qkv + head * channels, t.cos, t.sin, channels, &queries[head * channels]);
    for (float &each : queries) each *= t.scale;
    tile.assign(size_t(std::max({SPAN * channels, padded(t.keys->width), ROWS * stride + TILE})), 0.0f);
    panel.resize(t.keys->up ? size_t((t.keys->width + 1) / 2) * SPAN : 0);
    share.meeting.wait();
    const int seen = room.seen, spans = (seen + SPAN - 1) / SPAN, rows = (seen + ROWS - 1) / ROWS;
    const Attention attention{*t.keys, *t.values, queries.data(), t.turns, room.scores.data(), seen, heads, t.kv_heads, channels};
    const Unpacker key_codes(t.keys->bits ? t.keys->bits : 8), value_codes(t.values->bits ? t.values->bits : 8);
    for (int span = share.from(spans); span < share.to(spans); span++) attention.score(span * SPAN, key_codes, tile.data(), panel.data());
    share.meeting.wait();
    for (int head = share.from(heads); head < share.to(heads); head++) softmax(room.scores.data() + size_t(head) * seen, seen);
    share.meeting.wait();
    std::fill(tile.begin(), tile.end(), 0.0f);
    float *own = room.mixed.data() + size_t(share.part) * heads * stride;
    for (int row = share.from(rows); row < share.to(rows); row++) attention.mix(row * ROWS, value_codes, tile.data(), own);
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
