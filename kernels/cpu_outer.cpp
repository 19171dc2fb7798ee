// Sums of outer products of bfloat16 rows, left^T right: what second moments and Fisher sums are made of.
//
// The rows are what is summed over, and a bfloat16 dot product takes two neighbours of the sum at once, so two rows are laid
// together first. A product of two bfloat16 is exact in float32; sums are float32 within a call and float64 between calls.
// Compiled to nothing where the processor has no bfloat16 dot products.
//
// Panel. For every two rows one word a column of the panel, that holds both rows' values: 12 columns of left, 32 of right.

#include "cpu_rows.h"

#if HAS_BF16

namespace {

constexpr int LEFT = 12, RIGHT = 2 * TILE;

int panels_of(int width, int panel) { return (width + panel - 1) / panel; }

// The panel-th `WIDTH` columns of x (rows, width), zeros behind the last column and row.
template <int WIDTH> void lay(const uint16_t *x, int rows, int width, int panel, uint32_t *to) {
    const int first = panel * WIDTH, count = std::min(WIDTH, width - first);
    for (int m = 0; m < rows; m += 2, to += WIDTH) {
        const uint16_t *even = x + size_t(m) * width + first, *odd = even + width;
        for (int k = 0; k < count; k++) to[k] = even[k] | (m + 1 < rows ? uint32_t(odd[k]) << 16 : 0u);
        std::fill(to + count, to + WIDTH, 0u);
    }
}

template <int WIDTH> void lay_all(const uint16_t *x, int rows, int width, std::vector<uint32_t> &room, int threads) {
    const size_t size = size_t(rows + 1) / 2 * WIDTH;
    room.resize(size * panels_of(width, WIDTH));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int panel = 0; panel < panels_of(width, WIDTH); panel++) lay<WIDTH>(x, rows, width, panel, &room[size * panel]);
}

struct Sums {
    double *total;  // (left width, right width)
    int pairs, lefts, rights;
};

// One panel of each: their columns' products, summed over all rows and added to the totals.
void panel_times_panel(const Sums &s, int i, int j, const uint32_t *left, const uint32_t *right) {
    __m512 sum[LEFT][2];
    for (auto &each : sum) each[0] = each[1] = _mm512_setzero_ps();
    for (int m = 0; m < s.pairs; m++, left += LEFT, right += RIGHT) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(right), second = (__m512bh)_mm512_loadu_si512(right + TILE);
        for (int n = 0; n < LEFT; n++) {
            const __m512bh two = (__m512bh)_mm512_set1_epi32(int(left[n]));
            sum[n][0] = _mm512_dpbf16_ps(sum[n][0], first, two);
            sum[n][1] = _mm512_dpbf16_ps(sum[n][1], second, two);
        }
    }
    float each[RIGHT];
    for (int n = 0; n < std::min(LEFT, s.lefts - i * LEFT); n++) {
        _mm512_storeu_ps(each, sum[n][0]), _mm512_storeu_ps(each + TILE, sum[n][1]);
        double *to = s.total + size_t(i * LEFT + n) * s.rights + j * RIGHT;
        for (int k = 0; k < std::min(RIGHT, s.rights - j * RIGHT); k++) to[k] += each[k];
    }
}

}  // namespace

// total (lefts, rights) += left^T right, of left (rows, lefts) and right (rows, rights). With `upper` only panels that reach the diagonal
// or lie above it are added.
extern "C" void bitpress_outer(const uint16_t *left, const uint16_t *right, int rows, int lefts, int rights, int upper, double *total, int threads) {
    thread_local std::vector<uint32_t> left_room, right_room;
    lay_all<LEFT>(left, rows, lefts, left_room, threads);
    lay_all<RIGHT>(right, rows, rights, right_room, threads);
    const Sums sums{total, (rows + 1) / 2, lefts, rights};
    const uint32_t *lefts_laid = left_room.data(), *rights_laid = right_room.data();
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int back = 0; back < panels_of(rights, RIGHT); back++) {
        const int j = panels_of(rights, RIGHT) - 1 - back;  // the longest columns of a triangle first, so that threads end together
        const int below = upper ? std::min(lefts, (j + 1) * RIGHT) : lefts;
        for (int i = 0; i * LEFT < below; i++)
            panel_times_panel(sums, i, j, lefts_laid + size_t(i) * sums.pairs * LEFT, rights_laid + size_t(j) * sums.pairs * RIGHT);
    }
}

#endif
