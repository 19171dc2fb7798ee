// Attention of one token over a compressed KV cache, for kernels whose threads stay (cpu_cache.cpp).
#pragma once
#include <vector>

#include "cpu_attend.h"
#include "cpu_meeting.h"

extern "C" {

// One side of a block's cache. Old tokens are codes: by channel (groups, width, bytes), a group being `group` tokens of a channel, or by
// token (tokens, groups, bytes); the others are rows. up: the factor behind a latent (outputs, an even width, zeros at its end).
struct CacheSide {
    uint16_t *recent;
    uint8_t *codes;
    uint16_t *lows, *scales;
    const uint16_t *up;
    int32_t width, count, filled, bits, group, by_channel, window, each;
};
}

// A token's row over one block's cache. qkv: its queries (heads, channels), its row of keys and its row of values, latent where that side
// has a factor; both are appended. cos, sin: of its position. turns: for every 32 positions cosines, then sines, (channels / 2, 32).
// out: (heads, channels).
struct CacheToken {
    const uint16_t *qkv;
    const float *cos, *sin, *turns;
    CacheSide *keys, *values;
    uint16_t *out;
    int heads, kv_heads, channels;
    float scale;
};

// What its threads share while they attend.
struct CacheRoom {
    std::vector<float> scores, mixed;  // (heads, seen), (threads, heads, padded width)
    int seen = 0;
};

// Called by all threads of a share alike; meets four times. `out` is whole after a further meeting.
void attend_cache(const CacheToken &token, CacheRoom &room, const Share &share);
