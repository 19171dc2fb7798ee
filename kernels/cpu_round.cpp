// Round to nearest on the evenly spaced grid of each group of weights, and what codes stand for.
//
// The same float32 operations in the same order as the plain ones in Python, each rounded on its own, so that codes are equal to the bit;
// a row is read once for its ranges and, while it is still in the first-level cache, once more for its codes.

#include <algorithm>
#include <cfloat>
#include <cstddef>

#include "cpu_bf16.h"

namespace {

constexpr float LARGEST_BF16 = 3.3895313892515355e38f;
constexpr int ROWS = 8;  // a thread takes at a time

struct Matrix {
    int rows, columns, size;  // size: columns of a group; the last one of a row may be shorter
    int groups() const { return (columns + size - 1) / size; }
};

struct Grid {
    float scale, zero;
};

Grid grid_of(const float *w, int count, int bits, bool symmetric) {
    float low = 0, high = 0;  // zero is in every range
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int k = 0; k < count; k++) low = std::min(low, w[k]), high = std::max(high, w[k]);
    const int top = (1 << bits) - 1, middle = 1 << (bits - 1);
    const float exact = symmetric ? std::max(high, -low) / float(middle - 1) : (high - low) / float(top);
    const float scale = from_bf16(to_bf16(std::min(exact, LARGEST_BF16)));
    const float safe = scale >= FLT_MIN ? scale : 1.0f;
    const float zero = symmetric ? float(middle) : std::min(std::max(__builtin_rintf(-low / safe), 0.0f), float(top));
    return {safe, zero};
}

void encode(const float *w, int count, Grid grid, float top, uint8_t *codes) {
#pragma omp simd
    for (int k = 0; k < count; k++) codes[k] = uint8_t(int(std::min(std::max(__builtin_rintf(w[k] / grid.scale) + grid.zero, 0.0f), top)));
}

// each(row, group, first column, columns) for every group.
template <class Each> void all_groups(const Matrix &m, int threads, const Each &each) {
#pragma omp parallel for schedule(dynamic, ROWS) num_threads(threads) if (threads > 1)
    for (int row = 0; row < m.rows; row++)
        for (int g = 0; g < m.groups(); g++) each(row, g, g * m.size, std::min(m.size, m.columns - g * m.size));
}

}  // namespace

extern "C" {

// weights (rows, columns) finite; codes as they; scales bfloat16 and zeros (rows, groups), zeros null for a symmetric grid.
void bitpress_round_groups(const float *weights, int rows, int columns, int size, int bits, uint8_t *codes, uint16_t *scales, uint8_t *zeros, int threads) {
    const Matrix m{rows, columns, size};
    all_groups(m, threads, [&](int row, int g, int first, int count) {
        const size_t at = size_t(row) * columns + first, place = size_t(row) * m.groups() + g;
        const Grid grid = grid_of(weights + at, count, bits, !zeros);
        encode(weights + at, count, grid, float((1 << bits) - 1), codes + at);
        scales[place] = to_bf16(grid.scale);
        if (zeros) zeros[place] = uint8_t(int(grid.zero));
    });
}

// out (rows, columns) = (code - zero) * scale; zeros float32 (rows, groups).
void bitpress_widen_codes(const uint8_t *codes, const uint16_t *scales, const float *zeros, int rows, int columns, int size, float *out, int threads) {
    const Matrix m{rows, columns, size};
    all_groups(m, threads, [&](int row, int g, int first, int count) {
        const size_t at = size_t(row) * columns + first, place = size_t(row) * m.groups() + g;
        const float scale = from_bf16(scales[place]), zero = zeros[place];
#pragma omp simd
        for (int k = 0; k < count; k++) out[at + k] = (float(codes[at + k]) - zero) * scale;
    });
}
}
