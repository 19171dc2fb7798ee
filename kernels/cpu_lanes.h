// Sixty-four bytes and the sixteen sums of their fours: one register with AVX-512 VNNI, two with AVX2, plain arrays without.
#pragma once
#include "cpu_rows.h"

constexpr int QUAD_BYTES = 64;  // sixteen rows' codes of four inputs

#if HAS_VNNI

using Bytes = __m512i;
using Sums = __m512i;
using Reals = __m512;
inline Bytes bytes_at(const void *from) { return _mm512_loadu_si512(from); }
inline Bytes field(Bytes v, int shift, int mask) { return _mm512_and_si512(shift ? _mm512_srli_epi16(v, shift) : v, _mm512_set1_epi8(char(mask))); }
inline Bytes raised(Bytes v, int shift) { return _mm512_slli_epi16(v, shift); }  // no bit may leave its byte
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes every_word(int32_t word) { return _mm512_set1_epi32(word); }
// Bit q of every byte, moved to bit `to`: one mask operation and no shift across bytes.
inline Bytes one_bit(const uint8_t *plane, int q, int to) {
    return _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(bytes_at(plane), _mm512_set1_epi8(char(1 << q))), char(1 << to));
}
// table[index] for sixteen bytes that every row shares.
inline Bytes picked(const int8_t *table, Bytes index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table))), index);
}
inline Sums no_sums() { return _mm512_setzero_si512(); }
// Adds the four products of unsigned w and signed x in every 32 bits.
template <int BITS> inline Sums dot(Sums sum, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Sums both(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Reals real(Sums a) { return _mm512_cvtepi32_ps(a); }
inline Reals every(float value) { return _mm512_set1_ps(value); }
inline Reals times(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
inline Reals plus_product(Reals a, Reals b, Reals sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Reals bf16_at(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))), 16));
}
inline Reals bytes_as_reals(const uint8_t *from) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)))); }
inline void put(float *to, Reals a) { _mm512_storeu_ps(to, a); }

#elif defined(__AVX2__) && defined(__FMA__)

struct Bytes { __m256i a, b; };
using Sums = Bytes;
struct Reals { __m256 a, b; };
inline __m256i half_at(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
inline Bytes bytes_at(const void *from) { return {half_at(from), half_at(static_cast<const char *>(from) + 32)}; }
inline Bytes field(Bytes v, int shift, int mask) {
    const __m256i m = _mm256_set1_epi8(char(mask));
    return {_mm256_and_si256(_mm256_srli_epi16(v.a, shift), m), _mm256_and_si256(_mm256_srli_epi16(v.b, shift), m)};
}
inline Bytes raised(Bytes v, int shift) { return {_mm256_slli_epi16(v.a, shift), _mm256_slli_epi16(v.b, shift)}; }
inline Bytes either(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Bytes every_word(int32_t word) { return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)}; }
inline __m256i half_bit(__m256i v, int q, int to) {
    const __m256i bit = _mm256_set1_epi8(char(1 << q));
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(v, bit), bit), _mm256_set1_epi8(char(1 << to)));
}
inline Bytes one_bit(const uint8_t *plane, int q, int to) { return {half_bit(half_at(plane), q, to), half_bit(half_at(plane + 32), q, to)}; }
inline Bytes picked(const int8_t *table, Bytes index) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)));
    return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
}
inline Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline __m256i half_dot(__m256i sum, __m256i w, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
// Two products of 8-bit codes would not fit the 16 bits between: those are done a half-byte at a time.
template <int BITS> inline Sums dot(Sums sum, Bytes w, Bytes x) {
    if (BITS < 8) return {half_dot(sum.a, w.a, x.a), half_dot(sum.b, w.b, x.b)};
    const Bytes low = field(w, 0, 15), high = field(w, 4, 15);
    const Sums upper = {half_dot(_mm256_setzero_si256(), high.a, x.a), half_dot(_mm256_setzero_si256(), high.b, x.b)};
    const Sums lower = {half_dot(sum.a, low.a, x.a), half_dot(sum.b, low.b, x.b)};
    return {_mm256_add_epi32(lower.a, _mm256_slli_epi32(upper.a, 4)), _mm256_add_epi32(lower.b, _mm256_slli_epi32(upper.b, 4))};
}
inline Sums both(Sums x, Sums y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Reals real(Sums x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Reals every(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Reals times(Reals x, Reals y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Reals plus_product(Reals x, Reals y, Reals sum) { return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)}; }
inline __m256 half_bf16(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))), 16));
}
inline Reals bf16_at(const uint16_t *from) { return {half_bf16(from), half_bf16(from + 8)}; }
inline __m256 half_bytes(const uint8_t *from) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)))); }
inline Reals bytes_as_reals(const uint8_t *from) { return {half_bytes(from), half_bytes(from + 8)}; }
inline void put(float *to, Reals x) { _mm256_storeu_ps(to, x.a), _mm256_storeu_ps(to + 8, x.b); }

#else

struct Bytes { uint8_t at[QUAD_BYTES]; };
struct Sums { int32_t at[TILE]; };
struct Reals { float at[TILE]; };
template <class Lane, class Made> inline Lane lanes(Made made) {
    Lane out;
    for (int i = 0; i < int(sizeof(out.at) / sizeof(out.at[0])); i++) out.at[i] = made(i);
    return out;
}
inline Bytes bytes_at(const void *from) { return lanes<Bytes>([&](int i) { return static_cast<const uint8_t *>(from)[i]; }); }
inline Bytes field(Bytes v, int shift, int mask) { return lanes<Bytes>([&](int i) { return uint8_t((v.at[i] >> shift) & mask); }); }
inline Bytes raised(Bytes v, int shift) { return lanes<Bytes>([&](int i) { return uint8_t(v.at[i] << shift); }); }
inline Bytes either(Bytes a, Bytes b) { return lanes<Bytes>([&](int i) { return uint8_t(a.at[i] | b.at[i]); }); }
inline Bytes every_word(int32_t word) { return lanes<Bytes>([&](int i) { return uint8_t(uint32_t(word) >> (8 * (i % 4))); }); }
inline Bytes one_bit(const uint8_t *plane, int q, int to) { return lanes<Bytes>([&](int i) { return uint8_t(((plane[i] >> q) & 1) << to); }); }
inline Bytes picked(const int8_t *table, Bytes index) { return lanes<Bytes>([&](int i) { return uint8_t(table[index.at[i]]); }); }
inline Sums no_sums() { return {}; }
template <int BITS> inline Sums dot(Sums sum, Bytes w, Bytes x) {
    for (int i = 0; i < QUAD_BYTES; i++) sum.at[i / 4] += w.at[i] * int8_t(x.at[i]);
    return sum;
}
inline Sums both(Sums a, Sums b) { return lanes<Sums>([&](int i) { return a.at[i] + b.at[i]; }); }
inline Reals real(Sums a) { return lanes<Reals>([&](int i) { return float(a.at[i]); }); }
inline Reals every(float value) { return lanes<Reals>([&](int) { return value; }); }
inline Reals times(Reals a, Reals b) { return lanes<Reals>([&](int i) { return a.at[i] * b.at[i]; }); }
inline Reals plus_product(Reals a, Reals b, Reals sum) { return lanes<Reals>([&](int i) { return a.at[i] * b.at[i] + sum.at[i]; }); }
inline Reals bf16_at(const uint16_t *from) { return lanes<Reals>([&](int i) { return from_bf16(from[i]); }); }
inline Reals bytes_as_reals(const uint8_t *from) { return lanes<Reals>([&](int i) { return float(from[i]); }); }
inline void put(float *to, Reals a) { std::memcpy(to, a.at, sizeof(a.at)); }

#endif

// The codes of quad q of a chunk, from its planes (head of cpu_lowbit.cpp).
template <int BITS> inline Bytes quad(const uint8_t *chunk, int q) {
    if constexpr (BITS == 8) return bytes_at(chunk + q * QUAD_BYTES);
    else if constexpr (BITS == 4) return field(bytes_at(chunk + (q / 2) * QUAD_BYTES), 4 * (q % 2), 15);
    else if constexpr (BITS == 2) return field(bytes_at(chunk + (q / 4) * QUAD_BYTES), 2 * (q % 4), 3);
    else if constexpr (BITS == 3) return either(quad<2>(chunk, q), one_bit(chunk + 2 * QUAD_BYTES, q, 2));
    else if constexpr (BITS == 5) return either(quad<4>(chunk, q), one_bit(chunk + 4 * QUAD_BYTES, q, 4));
    else return either(quad<4>(chunk, q), raised(quad<2>(chunk + 4 * QUAD_BYTES, q), 4));
}

inline Bytes broadcast4(const int8_t *bytes) {
    int32_t word;
    std::memcpy(&word, bytes, 4);
    return every_word(word);
}
