// Causal attention of MLA's naive form, straight from what the projections produce: queries, the expanded latents
// (keys without position beside values) and one rotary key for all heads. Scores exist one block at a time; the
// backward pass computes them again from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691).
//
// Layouts: q (b, t, h, nope + rope), kv (b, t, h, nope + value), k_rope (b, t, rope), out (b, t, h, value),
// lse (b, h, t). `first` (b, t) is the first position each position sees, or null if that is 0.

#include "common.h"

using namespace benthic;

namespace {

constexpr int64_t kQueries = 64, kKeys = 512;

struct Shape {
    int64_t batch, time, heads, nope, rope, value;
    int64_t q_stride() const { return heads * (nope + rope); }
    int64_t kv_stride() const { return heads * (nope + value); }
    int64_t out_stride() const { return heads * value; }
};

// The part of a block of keys starting at `key` that query `t` sees: [low, high), counted from the block's start.
struct Range {
    int64_t low, high;
};
Range visible(const int64_t* first, int64_t t, int64_t key, int64_t keys) {
    const int64_t low = first ? std::max<int64_t>(first[t] - key, 0) : 0;
    const int64_t high = std::min(t + 1 - key, keys);
    return {std::min(low, keys), std::max(high, std::min(low, keys))};
}

// Scaled scores of a block of queries with a block of keys (rows of length `keys`).
void scores(const Shape& s, const float* q, const float* k, const float* k_rope, int64_t rows, int64_t keys,
            float scale, float* out) {
    gemm_nt(rows, keys, s.nope, scale, q, s.q_stride(), k, s.kv_stride(), 0.0f, out, keys);
    gemm_nt(rows, keys, s.rope, scale, q + s.nope, s.q_stride(), k_rope, s.rope, 1.0f, out, keys);
}

// One block of keys into the running softmax of one row: x becomes exp(x - top) inside the range and 0 outside.
void online_softmax(float* x, int64_t keys, Range range, float& top, float& sum, float& rescale) {
    float peak = top;
#pragma omp simd reduction(max : peak)
    for (int64_t i = range.low; i < range.high; ++i) peak = std::max(peak, x[i]);
    rescale = peak == -INFINITY ? 1.0f : fast_exp(top - peak);
    float added = 0.0f;
#pragma omp simd reduction(+ : added)
    for (int64_t i = range.low; i < range.high; ++i) {
        x[i] = fast_exp(x[i] - peak);
        added += x[i];
    }
    std::fill(x, x + range.low, 0.0f);
    std::fill(x + range.high, x + keys, 0.0f);
    top = peak;
    sum = sum * rescale + added;
}

void forward_block(const Shape& s, const float* q, const float* kv, const float* k_rope, const int64_t* first,
                   float* out, float* lse, int64_t query, int64_t rows, float scale) {
    float* x = scratch(0, kQueries * kKeys);
    float top[kQueries], sum[kQueries];
    std::fill(top, top + rows, -INFINITY);
    std::fill(sum, sum + rows, 0.0f);
    for (int64_t key = 0; key < query + rows; key += kKeys) {
        const int64_t keys = std::min(kKeys, query + rows - key);
        const float* k = kv + key * s.kv_stride();
        scores(s, q + query * s.q_stride(), k, k_rope + key * s.rope, rows, keys, scale, x);
        for (int64_t r = 0; r < rows; ++r) {
            float rescale;
            online_softmax(x + r * keys, keys, visible(first, query + r, key, keys), top[r], sum[r], rescale);
            float* o = out + (query + r) * s.out_stride();
            if (key > 0)
                for (int64_t i = 0; i < s.value; ++i) o[i] *= rescale;
        }
        gemm_nn(rows, s.value, keys, 1.0f, x, keys, k + s.nope, s.kv_stride(), key > 0 ? 1.0f : 0.0f,
                out + query * s.out_stride(), s.out_stride());
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* o = out + (query + r) * s.out_stride();
        const float inverse = 1.0f / sum[r];
        for (int64_t i = 0; i < s.value; ++i) o[i] *= inverse;
        lse[query + r] = top[r] + std::log(sum[r]);
    }
}

// Gradient of the scores of one row, in place of `dp`; `p` holds the scores and becomes the probabilities.
void softmax_backward(float* p, float* dp, int64_t keys, Range range, float lse, float delta, float scale) {
    std::fill(p, p + range.low, 0.0f);
    std::fill(dp, dp + range.low, 0.0f);
    std::fill(p + range.high, p + keys, 0.0f);
    std::fill(dp + range.high, dp + keys, 0.0f);
#pragma omp simd
    for (int64_t i = range.low; i < range.high; ++i) {
        p[i] = fast_exp(p[i] - lse);
        dp[i] = p[i] * (dp[i] - delta) * scale;
    }
}

float dot(const float* a, const float* b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// All of one head of one sequence; gradients of keys and values must be zero before.
void backward_head(const Shape& s, const float* dout, const float* q, const float* kv, const float* k_rope,
                   const int64_t* first, const float* out, const float* lse, float* dq, float* dkv, float* dk_rope,
                   float scale) {
    float *p = scratch(0, kQueries * kKeys), *dp = scratch(1, kQueries * kKeys);
    for (int64_t query = 0; query < s.time; query += kQueries) {
        const int64_t rows = std::min(kQueries, s.time - query);
        const float *qb = q + query * s.q_stride(), *db = dout + query * s.out_stride();
        float *dqb = dq + query * s.q_stride(), delta[kQueries];
        for (int64_t r = 0; r < rows; ++r)
            delta[r] = dot(db + r * s.out_stride(), out + (query + r) * s.out_stride(), s.value);
        for (int64_t key = 0; key < query + rows; key += kKeys) {
            const int64_t keys = std::min(kKeys, query + rows - key);
            const float *k = kv + key * s.kv_stride(), *kr = k_rope + key * s.rope;
            float *dk = dkv + key * s.kv_stride(), beta = key > 0 ? 1.0f : 0.0f;
            scores(s, qb, k, kr, rows, keys, scale, p);
            gemm_nt(rows, keys, s.value, 1.0f, db, s.out_stride(), k + s.nope, s.kv_stride(), 0.0f, dp, keys);
            for (int64_t r = 0; r < rows; ++r)
                softmax_backward(p + r * keys, dp + r * keys, keys, visible(first, query + r, key, keys),
                                 lse[query + r], delta[r], scale);
            gemm_tn(keys, s.value, rows, 1.0f, p, keys, db, s.out_stride(), 1.0f, dk + s.nope, s.kv_stride());
            gemm_tn(keys, s.nope, rows, 1.0f, dp, keys, qb, s.q_stride(), 1.0f, dk, s.kv_stride());
            gemm_tn(keys, s.rope, rows, 1.0f, dp, keys, qb + s.nope, s.q_stride(), 1.0f, dk_rope + key * s.rope,
                    s.rope);
            gemm_nn(rows, s.nope, keys, 1.0f, dp, keys, k, s.kv_stride(), beta, dqb, s.q_stride());
            gemm_nn(rows, s.rope, keys, 1.0f, dp, keys, kr, s.rope, beta, dqb + s.nope, s.q_stride());
        }
    }
}

}  // namespace

extern "C" {

void attention_forward(const float* q, const float* kv, const float* k_rope, const int64_t* first, float* out,
                       float* lse, int64_t batch, int64_t time, int64_t heads, int64_t nope, int64_t rope,
                       int64_t value, float scale) {
    const Shape s{batch, time, heads, nope, rope, value};
    const int64_t blocks = (time + kQueries - 1) / kQueries;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int64_t head = 0; head < batch * heads; ++head)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t b = head / heads, h = head % heads, query = block * kQueries;
            forward_block(s, q + b * time * s.q_stride() + h * (nope + rope),
                          kv + b * time * s.kv_stride() + h * (nope + value), k_rope + b * time * rope,
                          first ? first + b * time : nullptr, out + b * time * s.out_stride() + h * value,
                          lse + head * time, query, std::min(kQueries, time - query), scale);
        }
}

// dkv (like kv) and dk_rope_h (b, h, t, rope), a share per head, must be zero before.
void attention_backward(const float* dout, const float* q, const float* kv, const float* k_rope,
                        const int64_t* first, const float* out, const float* lse, float* dq, float* dkv,
                        float* dk_rope_h, int64_t batch, int64_t time, int64_t heads, int64_t nope, int64_t rope,
                        int64_t value, float scale) {
    const Shape s{batch, time, heads, nope, rope, value};
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t head = 0; head < batch * heads; ++head) {
        const int64_t b = head / heads, h = head % heads;
        const int64_t q_at = b * time * s.q_stride() + h * (nope + rope);
        const int64_t kv_at = b * time * s.kv_stride() + h * (nope + value);
        const int64_t out_at = b * time * s.out_stride() + h * value;
        backward_head(s, dout + out_at, q + q_at, kv + kv_at, k_rope + b * time * rope,
                      first ? first + b * time : nullptr, out + out_at, lse + head * time, dq + q_at, dkv + kv_at,
                      dk_rope_h + head * time * rope, scale);
    }
}

}  // extern "C"
