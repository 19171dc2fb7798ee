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
};
struct Whole {
    float number;
    float value() const { return number; }
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

template <class Number> double log_sum(const Number *row, int count, float top) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int v = 0; v < count; v++) total += exponential(row[v].value() - top);
    return double(top) + std::log(double(total));
}

template <class Number> void compare(const Number *row, const Number *other, int count, int64_t target, int p, const Results &to) {
    const Top top = top_of(row, count), other_top = top_of(other, count);
    float total = 0, other_total = 0, gap = 0;
#pragma omp simd reduction(+ : total, other_total, gap)
    for (int v = 0; v < count; v++) {
        const float one = row[v].value(), two = other[v].value(), share = exponential(one - top.value);
        total += share, other_total += exponential(two - other_top.value), gap += share * (one - two);
    }
    const double sum = double(top.value) + std::log(double(total)), other_sum = double(other_top.value) + std::log(double(other_total));
    const double divergence = double(gap) / total + other_sum - sum;
    to.nll[p] = float(sum - row[target].value()), to.other_nll[p] = float(other_sum - other[target].value());
    to.divergence[p] = divergence < 0 ? 0.0f : float(divergence);  // below zero only by rounding; what is no number stays none
    to.same[p] = top.at == other_top.at;
}

template <class Number> void all_rows(const void *logits, const void *others, int rows, int count, const int64_t *targets, const Results &to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int p = 0; p < rows; p++) {
        const Number *row = static_cast<const Number *>(logits) + size_t(p) * count;
        if (others) compare(row, static_cast<const Number *>(others) + size_t(p) * count, count, targets[p], p, to);
        else to.nll[p] = float(log_sum(row, count, top_of(row, count).value) - row[targets[p]].value());
    }
}

}  // namespace

// logits, others (rows, count), `others` null for the loss of one alone; out: (4, rows), of which only the first is written then.
extern "C" void bitpress_compare(const void *logits, const void *others, int is_bf16, int rows, int count, const int64_t *targets, float *out, int threads) {
    const Results to{out, out + rows, out + 2 * size_t(rows), out + 3 * size_t(rows)};
    (is_bf16 ? all_rows<Half> : all_rows<Whole>)(logits, others, rows, count, targets, to, threads);
}
