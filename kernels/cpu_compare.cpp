// What two models predict, row by row of logits: the loss of each, their divergence, whether they agree on the likeliest token.
//
// A row is read twice, once for its top and once for its sums; no probability is ever written. Logits are bfloat16 or float32, sums
// are float32 in lanes, and what is left of a row is put together in float64.

#include <cstddef>
#include <cstring>

#include "cpu_attend.h"
#include "cpu_rows.h"

namespace {

constexpr int PIECE = 512;  // logits whose top is looked for together

struct Half {
    uint16_t bits;
    float value() const { return from_bf16(bits); }
#if HAS_VNNI
    static __m512 lanes(const Half *at) { return bf16_lanes(&at->bits); }
#endif
};
struct Whole {
    float number;
    float value() const { return number; }
#if HAS_VNNI
    static __m512 lanes(const Whole *at) { return _mm512_loadu_ps(&at->number); }
#endif
};

struct Top {
    float value;
    int at;  // the first one, where several are alike
};

template <class Number> Top top_of(const Number *row, int count) {
    Top top{-INFINITY, 0};
    int piece = 0;
    for (int start = 0; start < count; start += PIECE) {
        const int end = std::min(count, start + PIECE);
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int v = start; v < end; v++) most = std::max(most, row[v].value());
        if (most > top.value) top.value = most, piece = start;
    }
    for (top.at = piece; top.at + 1 < count && row[top.at].value() != top.value; top.at++) {}
    return top;
}

struct Results {
    float *nll, *other_nll, *divergence, *same;
};

// Sums over tokens: of e^(one - its top), of e^(other - its top), of the first times the gap between both.
struct Sums {
    float total, other, gap;
};

#if HAS_VNNI

// f(lanes of one, lanes of other, mask of those that are there) for all tokens, 16 at a time.
template <class Number, class Each> void by_lanes(const Number *row, const Number *other, int count, const Each &each) {
    for (int v = 0; v + TILE <= count; v += TILE) each(Number::lanes(row + v), Number::lanes(other + v), __mmask16(0xffff));
    Number rest[TILE] = {}, other_rest[TILE] = {};
    const int left = count % TILE;
    std::copy(row + count - left, row + count, rest), std::copy(other + count - left, other + count, other_rest);
    each(Number::lanes(rest), Number::lanes(other_rest), __mmask16((1u << left) - 1));
}

template <class Number> float sum_of(const Number *row, int count, float top) {
    const __m512 above = _mm512_set1_ps(top);
    __m512 total = _mm512_setzero_ps();
    by_lanes(row, row, count, [&](__m512 one, __m512, __mmask16 there) {
        total = _mm512_mask_add_ps(total, there, total, exponential_lanes(_mm512_sub_ps(one, above)));
    });
    return _mm512_reduce_add_ps(total);
}

template <class Number> Sums sums_of(const Number *row, const Number *other, int count, float top, float other_top) {
    const __m512 above = _mm512_set1_ps(top), other_above = _mm512_set1_ps(other_top);
    __m512 total = _mm512_setzero_ps(), other_total = total, gap = total;
    by_lanes(row, other, count, [&](__m512 one, __m512 two, __mmask16 there) {
        const __m512 share = exponential_lanes(_mm512_sub_ps(one, above));
        total = _mm512_mask_add_ps(total, there, total, share);
        other_total = _mm512_mask_add_ps(other_total, there, other_total, exponential_lanes(_mm512_sub_ps(two, other_above)));
        gap = _mm512_mask3_fmadd_ps(share, _mm512_sub_ps(one, two), gap, there);
    });
    return {_mm512_reduce_add_ps(total), _mm512_reduce_add_ps(other_total), _mm512_reduce_add_ps(gap)};
}

#else

template <class Number> float sum_of(const Number *row, int count, float top) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int v = 0; v < count; v++) total += exponential(row[v].value() - top);
    return total;
}

template <class Number> Sums sums_of(const Number *row, const Number *other, int count, float top, float other_top) {
    float total = 0, other_total = 0, gap = 0;
#pragma omp simd reduction(+ : total, other_total, gap)
    for (int v = 0; v < count; v++) {
        const float one = row[v].value(), two = other[v].value(), share = exponential(one - top);
        total += share, other_total += exponential(two - other_top), gap += share * (one - two);
    }
    return {total, other_total, gap};
}

#endif

double log_sum(float total, float top) { return double(top) + std::log(double(total)); }

template <class Number> void compare(const Number *row, const Number *other, int count, int64_t target, int p, const Results &to) {
    const Top top = top_of(row, count), other_top = top_of(other, count);
    const Sums sums = sums_of(row, other, count, top.value, other_top.value);
    const double sum = log_sum(sums.total, top.value), other_sum = log_sum(sums.other, other_top.value);
    const double divergence = double(sums.gap) / sums.total + other_sum - sum;
    to.nll[p] = float(sum - row[target].value()), to.other_nll[p] = float(other_sum - other[target].value());
    to.divergence[p] = divergence < 0 ? 0.0f : float(divergence);  // below zero only by rounding; what is no number stays none
    to.same[p] = top.at == other_top.at;
}

template <class Number> float loss(const Number *row, int count, int64_t target) {
    const float top = top_of(row, count).value;
    return float(log_sum(sum_of(row, count, top), top) - row[target].value());
}

template <class Number> void all_rows(const void *logits, const void *others, int rows, int count, const int64_t *targets, const Results &to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int p = 0; p < rows; p++) {
        const Number *row = static_cast<const Number *>(logits) + size_t(p) * count;
        if (others) compare(row, static_cast<const Number *>(others) + size_t(p) * count, count, targets[p], p, to);
        else to.nll[p] = loss(row, count, targets[p]);
    }
}

}  // namespace

// logits, others (rows, count), `others` null for the loss of one alone; out: (4, rows), of which only the first is written then.
extern "C" void bitpress_compare(const void *logits, const void *others, int is_bf16, int rows, int count, const int64_t *targets, float *out, int threads) {
    const Results to{out, out + rows, out + 2 * size_t(rows), out + 3 * size_t(rows)};
    (is_bf16 ? all_rows<Half> : all_rows<Whole>)(logits, others, rows, count, targets, to, threads);
}
