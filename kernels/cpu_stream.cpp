// How fast this machine reads and copies memory: the limits that a kernel's time is held against. Knows bytes only.

#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" {

// The exclusive or of `count` 64-bit words. Each thread reads four stretches at once: one alone leaves the memory waiting at page ends.
uint64_t bitpress_read(const uint64_t *from, size_t count, int threads) {
    constexpr size_t STRETCHES = 4, STEP = 16;
    const size_t run = count / threads / STRETCHES / STEP * STEP;
    uint64_t all = 0;
#pragma omp parallel for schedule(static) reduction(^ : all) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        const uint64_t *mine = from + run * STRETCHES * part;
        uint64_t mixed[8] = {};
        for (size_t at = 0; at < run; at += STEP)
            for (size_t stretch = 0; stretch < STRETCHES; stretch++)
                for (size_t i = 0; i < 8; i++) mixed[i] ^= mine[stretch * run + at + i] ^ mine[stretch * run + at + i + 8];
        for (uint64_t each : mixed) all ^= each;
    }
    return all;
}

void bitpress_copy(const char *from, char *to, size_t bytes, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) std::memcpy(to + bytes / threads * part, from + bytes / threads * part, bytes / threads);
}
}
