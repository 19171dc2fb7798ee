// Packed weights times many activation rows: 32 output rows at a time become a panel of bfloat16, which every row then meets.
//
// With hundreds of rows multiplying is what costs, and bfloat16 dot products are the fastest there are; a panel is small enough
// for the second-level cache and is used by all rows before the next one is made, so that no dense copy of a matrix exists. A panel's
// weights are those of the oracle, rounded to bfloat16. Compiled to nothing where the processor has no bfloat16 dot products.

#include "cpu_lanes.h"
#include "cpu_panel.h"

#if HAS_BF16

namespace {

constexpr int CHUNK = 32;

struct Product {
    const void *x;
    void *y;
    int rows, inputs, outputs, threads;
    int padded() const { return rounded_up(inputs, CHUNK); }
    int tiles() const { return (outputs + TILE - 1) / TILE; }
};

// 16 rows' weights of two neighbouring inputs as 16 words.
inline __m512i paired(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

template <int MB> int some_rows(const Product &p, const uint32_t *panel, int tile, int first, const uint32_t *const *x) {
    float out[MB * PANEL];
    rows_times_panel<MB>(panel, p.padded() / 2, [&](int m, int k) { return x[first + m][k]; }, out);
    const int at = tile * TILE, count = std::min(PANEL, p.outputs - at);
    for (int m = 0; m < MB; m++) store(p.y, true, size_t(first + m) * p.outputs + at, out + m * PANEL, count);
    return first + MB;
}

// decode(tile, column of the panel): writes one tile's words, PANEL apart from pair to pair.
template <class Decode> void multiply(const Product &p, const Decode &decode) {
    thread_local std::vector<uint16_t> room;
    std::vector<const uint32_t *> rows(p.rows);
    const bool whole = p.inputs == p.padded();  // rows that end with a chunk are met where they are
    if (!whole) room.assign(size_t(p.rows) * p.padded(), 0);
    for (int m = 0; m < p.rows; m++) {
        const uint16_t *row = static_cast<const uint16_t *>(p.x) + size_t(m) * p.inputs;
        if (!whole) row = static_cast<const uint16_t *>(std::memcpy(&room[size_t(m) * p.padded()], row, 2 * size_t(p.inputs)));
        rows[m] = reinterpret_cast<const uint32_t *>(row);
    }
    const uint32_t *const *x = rows.data();
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) if (p.threads > 1)
    for (int tile = 0; tile < p.tiles(); tile += 2) {
        thread_local std::vector<uint32_t> space;
        space.resize(size_t(p.padded()) / 2 * PANEL + 16);
        uint32_t *panel = reinterpret_cast<uint32_t *>((reinterpret_cast<uintptr_t>(space.data()) + 63) / 64 * 64);
        decode(tile, panel);
        if (tile + 1 < p.tiles()) decode(tile + 1, panel + TILE);
        int m = 0;
        while (m + 12 <= p.rows) m = some_rows<12>(p, panel, tile, m, x);
        while (m + 4 <= p.rows) m = some_rows<4>(p, panel, tile, m, x);
        while (m < p.rows) m = some_rows<1>(p, panel, tile, m, x);
    }
}

struct Uniform {
    int padded, group, groups;
    const uint8_t *codes;
    const uint16_t *scales;
    const void *zeros;
    bool float_zeros;

    template <int BITS> void decode(int tile, uint32_t *panel) const {
        const __m512i byte = _mm512_set1_epi32(255);
        const uint8_t *pair = codes + size_t(tile / 2) * 2 * padded * TILE * BITS / 8;  // laid out as at the head of cpu_lowbit.cpp
        for (int k = 0; k < padded; k += CHUNK) {
            const size_t at = (size_t(tile) * groups + std::min(k / group, groups - 1)) * TILE;
            const __m512 scale = bf16_at(scales + at), zero = zeros_at<BITS>(at);
            for (int q = 0; q < 8; q++) {
                const __m512i four = quad<BITS>(InMemory{pair + (2 * size_t(k) + tile % 2 * CHUNK) * TILE * BITS / 8}, q);
                const auto weight = [&](int j) {
                    const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(four, 8 * j), byte));
                    return _mm512_mul_ps(_mm512_sub_ps(code, zero), scale);
                };
                uint32_t *to = panel + size_t(k / 2 + 2 * q) * PANEL;
                _mm512_store_si512(to, paired(weight(0), weight(1)));
                _mm512_store_si512(to + PANEL, paired(weight(2), weight(3)));
            }
        }
    }

    template <int BITS> __m512 zeros_at(size_t at) const {
        if (!zeros) return _mm512_set1_ps(float(1 << (BITS - 1)));
        return float_zeros ? bf16_at(static_cast<const uint16_t *>(zeros) + at) : bytes_as_reals(static_cast<const uint8_t *>(zeros) + at);
    }
};

// The layouts of cpu_table.cpp and cpu_binary.cpp.
void decode_table(int tile, uint32_t *panel, int words, int group, int groups, const uint32_t *codes, const float *scales, const float *levels) {
    const __m512 table = _mm512_loadu_ps(levels);
    for (int w = 0; w < words; w++) {
        const __m512i eight = _mm512_loadu_si512(codes + (size_t(tile) * words + w) * TILE);
        const __m512 scale = _mm512_loadu_ps(scales + (size_t(tile) * groups + std::min(8 * w / group, groups - 1)) * TILE);
        for (int j = 0; j < 4; j++) {
            const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(eight, 4 * j), table), odd = _mm512_permutexvar_ps(_mm512_srli_epi32(eight, 16 + 4 * j), table);
            _mm512_store_si512(panel + size_t(4 * w + j) * PANEL, paired(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale)));
        }
    }
}

void decode_binary(int tile, uint32_t *panel, int padded, int planes, int group, int groups, const uint8_t *signs, const uint16_t *factors) {
    for (int k = 0; k < padded; k += CHUNK) {
        const uint16_t *at = factors + ((size_t(tile / 2) * groups + std::min(k / group, groups - 1)) * 2 + tile % 2) * (planes + 1) * TILE;
        const auto weight = [&](int input) {  // bit 8c + 4h + i of a row's word is the sign of input 16h + 4c + i
            const __m512i bit = _mm512_set1_epi32(int(1u << (8 * (input % 16 / 4) + 4 * (input / 16) + input % 4)));
            __m512 sum = bf16_lanes(at + planes * TILE);
            for (int p = 0; p < planes; p++) {
                const __m512i words = _mm512_loadu_si512(signs + ((size_t(tile / 2) * 2 * (padded / CHUNK) + 2 * (k / CHUNK) + tile % 2) * planes + p) * QUAD_BYTES);
                const __m512 alpha = bf16_lanes(at + p * TILE);
                sum = _mm512_mask_add_ps(_mm512_sub_ps(sum, alpha), _mm512_test_epi32_mask(words, bit), sum, alpha);
            }
            return sum;
        };
        for (int pair = 0; pair < CHUNK / 2; pair++) _mm512_store_si512(panel + size_t(k / 2 + pair) * PANEL, paired(weight(2 * pair), weight(2 * pair + 1)));
    }
}

}  // namespace

extern "C" {

int bitpress_has_panels() { return 1; }

// y (rows, outputs) = x (rows, inputs) times the transposed matrix; x and y bfloat16. The matrices are as in bitpress_linear,
// bitpress_table and bitpress_binary. Returns 0, or 1 for a width that has no kernel.
int bitpress_panel_linear(const void *x, void *y, int rows, int inputs, int outputs, int bits, int group, const uint8_t *codes, const uint16_t *scales,
                          const void *zeros, int float_zeros, int threads) {
    const Product p{x, y, rows, inputs, outputs, threads};
    const Uniform u{p.padded(), group, (inputs + group - 1) / group, codes, scales, zeros, bool(float_zeros)};
    switch (bits) {
        case 2: multiply(p, [&](int tile, uint32_t *panel) { u.decode<2>(tile, panel); }); return 0;
        case 3: multiply(p, [&](int tile, uint32_t *panel) { u.decode<3>(tile, panel); }); return 0;
        case 4: multiply(p, [&](int tile, uint32_t *panel) { u.decode<4>(tile, panel); }); return 0;
        case 5: multiply(p, [&](int tile, uint32_t *panel) { u.decode<5>(tile, panel); }); return 0;
        case 6: multiply(p, [&](int tile, uint32_t *panel) { u.decode<6>(tile, panel); }); return 0;
        case 8: multiply(p, [&](int tile, uint32_t *panel) { u.decode<8>(tile, panel); }); return 0;
    }
    return 1;
}

void bitpress_panel_table(const void *x, void *y, int rows, int inputs, int outputs, int group, const uint32_t *words, const float *scales,
                          const float *levels, int threads) {
    const Product p{x, y, rows, inputs, outputs, threads};
    const int count = rounded_up(inputs, 8) / 8, groups = (inputs + group - 1) / group;
    multiply(p, [&](int tile, uint32_t *panel) { decode_table(tile, panel, count, group, groups, words, scales, levels); });
}

void bitpress_panel_binary(const void *x, void *y, int rows, int inputs, int outputs, int planes, int group, const uint8_t *signs,
                           const uint16_t *factors, int threads) {
    const Product p{x, y, rows, inputs, outputs, threads};
    const int groups = (inputs + group - 1) / group;
    multiply(p, [&](int tile, uint32_t *panel) { decode_binary(tile, panel, p.padded(), planes, group, groups, signs, factors); });
}
}

#else

extern "C" int bitpress_has_panels() { return 0; }

#endif
