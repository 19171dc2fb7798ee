// How fast this machine reads and copies memory: the limits that a kernel's time is held against. Knows bytes only.

#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" {

// The exclusive or of `count` 64-bit words, each thread a stretch of its own, eight running sums each.
uint64_t bitpress_read(const uint64_t *from, size_t count, int threads) {
    uint64_t all = 0;
#pragma omp parallel for schedule(static) reduction(^ : all) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        const uint64_t *at = from + count / threads * part, *end = at + count / threads / 64 * 64;
        uint64_t mixed[64] = {};
        for (; at < end; at += 64) {
            __builtin_prefetch(at + 512);
            __builtin_prefetch(at + 520);
            for (int i = 0; i < 64; i++) mixed[i] ^= at[i];
        }
        for (uint64_t each : mixed) all ^= each;
    }
    return all;
}

void bitpress_copy(const char *from, char *to, size_t bytes, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) std::memcpy(to + bytes / threads * part, from + bytes / threads * part, bytes / threads);
}
}
