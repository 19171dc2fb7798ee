// Sixty-four bytes and the sixteen sums of their fours: one register with AVX-512 VNNI, two with AVX2, plain arrays without.
#pragma once
#include "cpu_rows.h"

constexpr int QUAD_BYTES = 64;  // sixteen rows' codes of four inputs

#if HAS_VNNI

using Bytes = __m512i;
using Sums = __m512i;
using Reals = __m512;
inline Bytes bytes_at(const void *from) { return _mm512_loadu_si512(from); }
inline Bytes in_turn(Bytes v) {  // keeps the compiler from reading at another time
    asm volatile("" : "+v"(v));
    return v;
}
inline Bytes moved(Bytes v, int up) { return up > 0 ? _mm512_slli_epi16(v, up) : up < 0 ? _mm512_srli_epi16(v, -up) : v; }
inline Bytes field(Bytes v, int up, int mask) { return _mm512_and_si512(moved(v, up), _mm512_set1_epi8(char(mask))); }
inline Bytes with_field(Bytes rest, Bytes v, int up, int mask) {  // rest | field, in one instruction beside the move
    return _mm512_ternarylogic_epi32(moved(v, up), _mm512_set1_epi8(char(mask)), rest, 0xEA);
}
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes every_word(int32_t word) { return _mm512_set1_epi32(word); }
// table[index] for sixteen bytes that every row shares.
inline Bytes picked(const int8_t *table, Bytes index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table))), index);
}
inline Sums no_sums() { return _mm512_setzero_si512(); }
// Adds the four products of unsigned w and signed x in every 32 bits.
template <int BITS> inline Sums dot(Sums sum, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Sums both(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Sums lowered(Sums a, int bits) { return _mm512_srai_epi32(a, bits); }
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
inline Bytes in_turn(Bytes v) { return v; }
inline __m256i half_moved(__m256i v, int up) { return up > 0 ? _mm256_slli_epi16(v, up) : _mm256_srli_epi16(v, -up); }
inline Bytes field(Bytes v, int up, int mask) {
    const __m256i m = _mm256_set1_epi8(char(mask));
    return {_mm256_and_si256(half_moved(v.a, up), m), _mm256_and_si256(half_moved(v.b, up), m)};
}
inline Bytes either(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Bytes every_word(int32_t word) { return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)}; }
inline Bytes with_field(Bytes rest, Bytes v, int up, int mask) { return either(rest, field(v, up, mask)); }
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
    const Bytes low = field(w, 0, 15), high = field(w, -4, 15);
    const Sums upper = {half_dot(_mm256_setzero_si256(), high.a, x.a), half_dot(_mm256_setzero_si256(), high.b, x.b)};
    const Sums lower = {half_dot(sum.a, low.a, x.a), half_dot(sum.b, low.b, x.b)};
    return {_mm256_add_epi32(lower.a, _mm256_slli_epi32(upper.a, 4)), _mm256_add_epi32(lower.b, _mm256_slli_epi32(upper.b, 4))};
}
inline Sums lowered(Sums x, int bits) { return {_mm256_srai_epi32(x.a, bits), _mm256_srai_epi32(x.b, bits)}; }
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
inline Bytes in_turn(Bytes v) { return v; }
inline Bytes field(Bytes v, int up, int mask) { return lanes<Bytes>([&](int i) { return uint8_t((up > 0 ? v.at[i] << up : v.at[i] >> -up) & mask); }); }
inline Bytes either(Bytes a, Bytes b) { return lanes<Bytes>([&](int i) { return uint8_t(a.at[i] | b.at[i]); }); }
inline Bytes every_word(int32_t word) { return lanes<Bytes>([&](int i) { return uint8_t(uint32_t(word) >> (8 * (i % 4))); }); }
inline Bytes with_field(Bytes rest, Bytes v, int up, int mask) { return either(rest, field(v, up, mask)); }
inline Bytes picked(const int8_t *table, Bytes index) { return lanes<Bytes>([&](int i) { return uint8_t(table[index.at[i]]); }); }
inline Sums no_sums() { return {}; }
template <int BITS> inline Sums dot(Sums sum, Bytes w, Bytes x) {
    for (int i = 0; i < QUAD_BYTES; i++) sum.at[i / 4] += w.at[i] * int8_t(x.at[i]);
    return sum;
}
inline Sums lowered(Sums a, int bits) { return lanes<Sums>([&](int i) { return a.at[i] >> bits; }); }
inline Sums both(Sums a, Sums b) { return lanes<Sums>([&](int i) { return a.at[i] + b.at[i]; }); }
inline Reals real(Sums a) { return lanes<Reals>([&](int i) { return float(a.at[i]); }); }
inline Reals every(float value) { return lanes<Reals>([&](int) { return value; }); }
inline Reals times(Reals a, Reals b) { return lanes<Reals>([&](int i) { return a.at[i] * b.at[i]; }); }
inline Reals plus_product(Reals a, Reals b, Reals sum) { return lanes<Reals>([&](int i) { return a.at[i] * b.at[i] + sum.at[i]; }); }
inline Reals bf16_at(const uint16_t *from) { return lanes<Reals>([&](int i) { return from_bf16(from[i]); }); }
inline Reals bytes_as_reals(const uint8_t *from) { return lanes<Reals>([&](int i) { return float(from[i]); }); }
inline void put(float *to, Reals a) { std::memcpy(to, a.at, sizeof(a.at)); }

#endif

// How many bits too high the codes of odd quads come where that saves moving them; sums over them are lowered once a group. (At 4 bits it
// saves as many moves and takes more time: measured, not understood.)
template <int BITS> constexpr int LIFT = HAS_VNNI && BITS < 4 ? 2 : 0;

// The planes of a chunk where they lie, and the same read in their order into registers: memory is fetched ahead in order or not at all.
struct InMemory {
    const uint8_t *chunk;
    Bytes operator()(int plane) const { return bytes_at(chunk + plane * QUAD_BYTES); }
};
template <int BITS> struct InRegisters {
    Bytes planes[BITS];
    explicit InRegisters(const uint8_t *chunk) {
        for (int i = 0; i < BITS; i++) planes[i] = in_turn(bytes_at(chunk + i * QUAD_BYTES));
    }
    Bytes operator()(int plane) const { return planes[plane]; }
};

// The codes of quad q of a chunk, from its planes (head of cpu_lowbit.cpp). LIFTED: those of odd quads LIFT bits too high.
template <int BITS, bool LIFTED = false, class Planes> inline Bytes quad(const Planes &plane, int q) {
    const int lift = LIFTED ? LIFT<BITS> * (q % 2) : 0;
    if constexpr (BITS == 8) return plane(q);
    else if constexpr (BITS == 4) return field(plane(q / 2), lift - 4 * (q % 2), 15 << lift);
    else if constexpr (BITS == 2) return field(plane(q / 4), lift - 2 * (q % 4), 3 << lift);
    else if constexpr (BITS == 3) return with_field(quad<2, LIFTED>(plane, q), plane(2), lift + 2 - q, 4 << lift);
    else if constexpr (BITS == 5) return with_field(quad<4>(plane, q), plane(4), 4 - q, 16);
    else return with_field(quad<4>(plane, q), plane(4 + q / 4), 4 - 2 * (q % 4), 48);
}

inline Bytes broadcast4(const int8_t *bytes) {
    int32_t word;
    std::memcpy(&word, bytes, 4);
    return every_word(word);
}
