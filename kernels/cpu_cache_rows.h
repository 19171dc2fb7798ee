// Rows of a compressed KV cache: codes written and read, rows as they are, for any processor. Codes, lows and scales are those of
// engine/kv_cache.py, to the bit. Knows one side of a cache; no queries.
#pragma once
#include "cpu_cache.h"
#include "cpu_rows.h"

namespace cache {

constexpr int SPAN = 32, HALF = SPAN / 2;  // tokens read together, and those of one register
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

inline int old_tokens(const CacheSide &s) { return s.by_channel ? s.filled * s.group : s.filled; }
inline int group_bytes(const CacheSide &s) { return (s.group * s.bits + 7) / 8; }
inline int padded(int width) { return rounded_up(width, TILE); }

// Writing ---------------------------------------------------------------------------------------------------------

// `count` numbers, `stride` apart, as one group.
inline void encode(const CacheSide &s, const uint16_t *x, int count, size_t stride, size_t at) {
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
inline void append(CacheSide &s, const uint16_t *row) {
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
inline void read_row(const CacheSide &s, const Unpacker &codes_at, int token, float *out) {
    const int old = old_tokens(s);
    if (token >= old) {
        const uint16_t *row = s.recent + size_t(token - old) * s.width;
        int c = 0;
        for (; c + TILE <= s.width; c += TILE) lanes(out + c) = reals(row + c);
#if HAS_VNNI
        const __m256i rest = _mm256_maskz_loadu_epi16(__mmask16((1u << (s.width - c)) - 1), row + c);
        if (c < s.width) lanes(out + c) = (Reals)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rest), 16);
#else
        for (; c < s.width; c++) out[c] = from_bf16(row[c]);
#endif
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

}  // namespace cache
