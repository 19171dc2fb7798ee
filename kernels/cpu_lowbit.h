// A low-bit matrix and rows of activations as integers, for kernels that cut the work of a product themselves. Described at the head
// of cpu_lowbit.cpp.
#pragma once
#include "cpu_rows.h"

namespace lowbit {

constexpr int CHUNK = 32;

// One row of activations as integers in two signed bytes, one scale a group. sums: of the integers of a group.
struct Row {
    int8_t *hi, *lo;
    float *scale, *sum;
};

struct Shape {
    int rows, inputs, outputs, bits, group;  // group in inputs, a multiple of CHUNK or the padded row
    int activation_bits;                     // 8, 4, or 0 for the 15 bits that stand for x itself
    int padded() const { return rounded_up(inputs, CHUNK); }
    int groups() const { return (inputs + group - 1) / group; }
    int tiles() const { return (outputs + TILE - 1) / TILE; }
    size_t tile_bytes() const { return size_t(padded()) * TILE * bits / 8; }
    size_t code_at(int tile, int k) const { return tile / 2 * 2 * tile_bytes() + (2 * size_t(k) + tile % 2 * CHUNK) * TILE * bits / 8; }
};

struct Job {
    const uint8_t *codes;
    const uint16_t *scales;
    const void *zeros;  // bytes, bfloat16, or none
    bool float_zeros;
    const float *bias;
    void *y;
    bool is_bf16;
};

// The rows of x as integers, in memory of the calling thread until it calls again.
const Row *quantised(const Shape &s, const void *x, bool is_bf16, int threads);

// Outputs of tiles first .. end - 1; first is even. False for a width that has no kernel.
bool multiply(const Job &job, const Shape &s, const Row *rows, int first, int end);

}  // namespace lowbit
