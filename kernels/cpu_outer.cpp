// Sums of outer products of bfloat16 rows, left^T right: what second moments and Fisher sums are made of.
//
// The rows are what is summed over, and a bfloat16 dot product takes two neighbours of the sum at once, so two rows are laid
// together first. A product of two bfloat16 is exact in float32; sums are float32 within a call and float64 between calls.
// Compiled to nothing where the processor has no bfloat16 dot products.
//
// Right lies in panels of 32 columns, left in strips of 12 columns.

#include "cpu_panel.h"

#if HAS_BF16

namespace {

constexpr int STRIP = 12;

int pieces(int width, int piece) { return (width + piece - 1) / piece; }

// x (rows, width) in pieces of WIDTH columns, one after the other.
template <int WIDTH> void lay(const uint16_t *x, int rows, int width, std::vector<uint32_t> &room, int threads) {
    const size_t size = size_t(rows + 1) / 2 * WIDTH;
    room.resize(size * pieces(width, WIDTH));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int piece = 0; piece < pieces(width, WIDTH); piece++) {
        const int first = piece * WIDTH, count = std::min(WIDTH, width - first);
        uint32_t *to = &room[size * piece];
        for (int m = 0; m < rows; m += 2, to += WIDTH) {
            const uint16_t *even = x + size_t(m) * width + first;
            lay_two(even, m + 1 < rows ? even + width : nullptr, count, WIDTH, to);
        }
    }
}

struct Sums {
    double *total;  // (left width, right width)
    int pairs, lefts, rights;
};

// A strip times a panel, over all rows, added to the totals.
void strip_times_panel(const Sums &s, int i, int j, const uint32_t *strip, const uint32_t *panel) {
    float out[STRIP * PANEL];
    rows_times_panel<STRIP>(panel, s.pairs, [&](int n, int m) { return strip[size_t(m) * STRIP + n]; }, out);
    for (int n = 0; n < std::min(STRIP, s.lefts - i * STRIP); n++) {
        double *to = s.total + size_t(i * STRIP + n) * s.rights + j * PANEL;
        for (int k = 0; k < std::min(PANEL, s.rights - j * PANEL); k++) to[k] += out[n * PANEL + k];
    }
}

}  // namespace

// total (lefts, rights) += left^T right, of left (rows, lefts) and right (rows, rights). With `upper` only what lies
// on or above the diagonal need be right.
extern "C" void bitpress_outer(const uint16_t *left, const uint16_t *right, int rows, int lefts, int rights, int upper, double *total, int threads) {
    thread_local std::vector<uint32_t> strips, panels;
    lay<STRIP>(left, rows, lefts, strips, threads);
    lay<PANEL>(right, rows, rights, panels, threads);
    const Sums sums{total, (rows + 1) / 2, lefts, rights};
    const uint32_t *const first_strip = strips.data(), *const first_panel = panels.data();  // of this thread's rooms, for all threads
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int back = 0; back < pieces(rights, PANEL); back++) {
        const int j = pieces(rights, PANEL) - 1 - back;  // the longest columns of a triangle first, so that threads end together
        const int below = upper ? std::min(lefts, (j + 1) * PANEL) : lefts;
        for (int i = 0; i * STRIP < below; i++)
            strip_times_panel(sums, i, j, first_strip + size_t(i) * sums.pairs * STRIP, first_panel + size_t(j) * sums.pairs * PANEL);
    }
}

#endif
