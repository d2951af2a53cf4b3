// Causal attention of MLA's naive form, from what the projections produce: queries, the expanded latents (keys without
// position beside values) and one rotary key for all heads, which is copied beside a head's keys where that pays. Scores
// exist one block at a time; the backward pass computes them again from the saved log-sum-exp (FlashAttention-2, arXiv
// 2307.08691).
//
// Layouts: q (b, t, h, nope + rope), kv (b, t, h, nope + value), k_rope (b, t, rope), out (b, t, h, value),
// lse (b, h, t). Where queries begin at position `start`, there are start + t keys and values. `first` (b, t) is the first
// position each position sees, or null if that is 0.

#include "common.h"

using namespace benthic;

namespace {

constexpr int64_t kQueries = 64, kKeys = 512, kLanes = 16;
constexpr int64_t kWide = 128;            // numbers of a key from which copying it costs more than a second product
constexpr int64_t kWideForTiles = 128;    // heads narrower than that gain nothing from tiles
constexpr int64_t kQueriesOnTiles = 128;  // what lays keys and values out as tiles is done once for so many

struct Shape {
    int64_t time, heads, nope, rope, value;
    float scale;
    int64_t start = 0;  // keys before the first query; the backward pass has none
    int64_t units = kBlas;  // for products
    int64_t keys() const { return start + time; }
    int64_t queries() const { return units == kTiles ? kQueriesOnTiles : kQueries; }  // a block of them
    int64_t q_stride() const { return heads * (nope + rope); }
    int64_t kv_stride() const { return heads * (nope + value); }
    int64_t out_stride() const { return heads * value; }
};

int64_t units_for(int64_t nope, int64_t units) { return units == kTiles && nope < kWideForTiles ? kBlas : units; }

// Where one head of one sequence lies in each tensor.
struct Head {
    int64_t q, kv, k_rope, out, lse;
    Head(const Shape& s, int64_t index) {
        const int64_t b = index / s.heads, h = index % s.heads;
        q = b * s.time * s.q_stride() + h * (s.nope + s.rope);
        kv = b * s.keys() * s.kv_stride() + h * (s.nope + s.value);
        k_rope = b * s.keys() * s.rope;
        out = b * s.time * s.out_stride() + h * s.value;
        lse = index * s.time;
    }
};

// The part of a block of keys starting at `key` that query `t` sees: [low, high), counted from the block's start.
struct Range {
    int64_t low, high;
    Range(const int64_t* first, int64_t t, int64_t key, int64_t keys) {
        low = first ? std::min(std::max<int64_t>(first[t] - key, 0), keys) : 0;
        high = std::max(std::min(t + 1 - key, keys), low);
    }
    bool empty() const { return low == high; }
    // Grown to whole vectors, as far as the block goes; x gets `value` where the range has grown. Loops over it then
    // have no remainder to compute number by number.
    Range widened(float* x, int64_t keys, float value) const {
        Range wide = *this;
        wide.low = low / kLanes * kLanes;
        wide.high = std::min((high + kLanes - 1) / kLanes * kLanes, keys);
        std::fill(x + wide.low, x + low, value);
        std::fill(x + high, x + wide.high, value);
        return wide;
    }
};

// Rows of numbers, so far apart.
template <typename T>
struct Keys {
    const T* at;
    int64_t stride;
};

// Keys of one head, with their rotary part beside the rest as queries have it: then one product does for both.
template <typename T>
Keys<T> whole_keys(const Shape& s, const T* k, const T* k_rope, int64_t keys, T* room) {
    if (s.rope == 0) return {k, s.kv_stride()};
    const int64_t wide = s.nope + s.rope;
    for (int64_t i = 0; i < keys; ++i) {
        std::memcpy(room + i * wide, k + i * s.kv_stride(), s.nope * sizeof(T));
        std::memcpy(room + i * wide + s.nope, k_rope + i * s.rope, s.rope * sizeof(T));
    }
    return {room, wide};
}

// Scaled scores (rows, keys) of a block of queries with a block of keys.
template <typename T>
void scores(const Shape& s, const T* q, const T* k, const T* k_rope, int64_t rows, int64_t keys, float* out) {
    const int64_t wide = s.nope + s.rope;
    if (wide < kWide || s.rope == 0) {
        const Keys<T> all = whole_keys(s, k, k_rope, keys, scratch<T>(6, kKeys * wide));
        gemm(s.units, 'N', 'T', rows, keys, wide, s.scale, q, s.q_stride(), all.at, all.stride, 0.0f, out, keys);
        return;
    }
    gemm(s.units, 'N', 'T', rows, keys, s.nope, s.scale, q, s.q_stride(), k, s.kv_stride(), 0.0f, out, keys);
    gemm(s.units, 'N', 'T', rows, keys, s.rope, s.scale, q + s.nope, s.q_stride(), k_rope, s.rope, 1.0f, out, keys);
}

// Set to zero what lies outside of the range.
template <typename T>
void clear_outside(T* x, int64_t keys, Range range) {
    std::fill(x, x + range.low, T(0.0f));
    std::fill(x + range.high, x + keys, T(0.0f));
}

// One block of keys into the running softmax of one row: p becomes exp(x - top) inside the range and 0 outside.
// Returns the factor by which what was summed before is to be multiplied.
template <typename T>
float online_softmax(float* x, T* p, int64_t keys, Range range, float& top, float& sum) {
    if (range.empty()) {
        clear_outside(p, keys, range);
        return 1.0f;
    }
    range = range.widened(x, keys, -INFINITY);
    const float peak = maximum(x + range.low, range.high - range.low, top);
    const float rescale = fast_exp(top - peak);
    float added = 0.0f;
#pragma omp simd reduction(+ : added)
    for (int64_t i = range.low; i < range.high; ++i) {
        const float e = fast_exp(x[i] - peak);
        p[i] = e;
        added += e;
    }
    clear_outside(p, keys, range);
    top = peak;
    sum = sum * rescale + added;
    return rescale;
}

template <typename T>
void forward_block(const Shape& s, const T* q, const T* kv, const T* k_rope, const int64_t* first, T* out, float* lse,
                   int64_t query, int64_t rows) {
    float *x = scratch<float>(0, s.queries() * kKeys), *o = scratch<float>(1, s.queries() * s.value);
    T* p = scratch<T>(2, s.queries() * kKeys);
    float top[kQueriesOnTiles], sum[kQueriesOnTiles];
    std::fill(top, top + rows, -INFINITY);
    std::fill(sum, sum + rows, 0.0f);
    const int64_t position = s.start + query;
    for (int64_t key = 0; key < position + rows; key += kKeys) {
        const int64_t keys = std::min(kKeys, position + rows - key);
        const T* k = kv + key * s.kv_stride();
        scores(s, q + query * s.q_stride(), k, k_rope + key * s.rope, rows, keys, x);
        for (int64_t r = 0; r < rows; ++r) {
            const Range range(first, position + r, key, keys);
            const float rescale = online_softmax(x + r * keys, p + r * keys, keys, range, top[r], sum[r]);
            if (key > 0)
                for (int64_t i = 0; i < s.value; ++i) o[r * s.value + i] *= rescale;
        }
        gemm(s.units, 'N', 'N', rows, s.value, keys, 1.0f, p, keys, k + s.nope, s.kv_stride(), key > 0 ? 1.0f : 0.0f, o,
             s.value);
    }
    for (int64_t r = 0; r < rows; ++r) {
        T* to = out + (query + r) * s.out_stride();
        const float inverse = 1.0f / sum[r];
        for (int64_t i = 0; i < s.value; ++i) to[i] = o[r * s.value + i] * inverse;
        lse[query + r] = top[r] + std::log(sum[r]);
    }
}

// From scores x and the gradient of the probabilities dx of one row: the probabilities p and the gradient of the
// unscaled scores ds.
template <typename T>
void softmax_backward(float* x, float* dx, T* p, T* ds, int64_t keys, Range range, float lse, float delta,
                      float scale) {
    range.widened(dx, keys, 0.0f);
    range = range.widened(x, keys, -INFINITY);
#pragma omp simd
    for (int64_t i = range.low; i < range.high; ++i) {
        const float e = fast_exp(x[i] - lse);
        p[i] = e;
        ds[i] = e * (dx[i] - delta) * scale;
    }
    clear_outside(p, keys, range);
    clear_outside(ds, keys, range);
}

template <typename T>
float dot(const T* a, const T* b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += static_cast<float>(a[i]) * static_cast<float>(b[i]);
    return sum;
}

// Copy so many numbers of each row of sums.
template <typename T>
void store_rows(const float* from, int64_t from_stride, T* to, int64_t stride, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) to[r * stride + i] = from[r * from_stride + i];
}

// All of one head of one sequence.
template <typename T>
void backward_head(const Shape& s, const T* dout, const T* q, const T* kv, const T* k_rope, const int64_t* first,
                   const T* out, const float* lse, T* dq, T* dkv, float* dk_rope) {
    const int64_t wide = s.nope + s.rope, block = s.queries();
    float *x = scratch<float>(0, block * kKeys), *dx = scratch<float>(1, block * kKeys);
    T *p = scratch<T>(2, block * kKeys), *ds = scratch<T>(3, block * kKeys);
    float *dq_sum = scratch<float>(4, block * wide), *dk_sum = scratch<float>(5, s.time * (wide + s.value));
    float* dv_sum = dk_sum + s.time * wide;
    std::fill(dk_sum, dv_sum + s.time * s.value, 0.0f);
    const Keys<T> all = whole_keys(s, kv, k_rope, s.time, scratch<T>(6, s.time * wide));
    for (int64_t query = 0; query < s.time; query += block) {
        const int64_t rows = std::min(block, s.time - query);
        const T *qb = q + query * s.q_stride(), *db = dout + query * s.out_stride();
        float delta[kQueriesOnTiles];
        for (int64_t r = 0; r < rows; ++r)
            delta[r] = dot(db + r * s.out_stride(), out + (query + r) * s.out_stride(), s.value);
        for (int64_t key = 0; key < query + rows; key += kKeys) {
            const int64_t keys = std::min(kKeys, query + rows - key);
            const Keys<T> k{all.at + key * all.stride, all.stride};
            const T* v = kv + key * s.kv_stride() + s.nope;
            gemm(s.units, 'N', 'T', rows, keys, wide, s.scale, qb, s.q_stride(), k.at, k.stride, 0.0f, x, keys);
            gemm(s.units, 'N', 'T', rows, keys, s.value, 1.0f, db, s.out_stride(), v, s.kv_stride(), 0.0f, dx, keys);
            for (int64_t r = 0; r < rows; ++r)
                softmax_backward(x + r * keys, dx + r * keys, p + r * keys, ds + r * keys, keys,
                                 Range(first, query + r, key, keys), lse[query + r], delta[r], s.scale);
            gemm(s.units, 'T', 'N', keys, s.value, rows, 1.0f, p, keys, db, s.out_stride(), 1.0f, dv_sum + key * s.value,
                 s.value);
            gemm(s.units, 'T', 'N', keys, wide, rows, 1.0f, ds, keys, qb, s.q_stride(), 1.0f, dk_sum + key * wide, wide);
            gemm(s.units, 'N', 'N', rows, wide, keys, 1.0f, ds, keys, k.at, k.stride, key > 0 ? 1.0f : 0.0f, dq_sum, wide);
        }
        store_rows(dq_sum, wide, dq + query * s.q_stride(), s.q_stride(), rows, wide);
    }
    store_rows(dk_sum, wide, dkv, s.kv_stride(), s.time, s.nope);
    store_rows(dk_sum + s.nope, wide, dk_rope, s.rope, s.time, s.rope);
    store_rows(dv_sum, s.value, dkv + s.nope, s.kv_stride(), s.time, s.value);
}

template <typename T>
void attention_forward(const T* q, const T* kv, const T* k_rope, const int64_t* first, T* out, float* lse,
                       int64_t batch, int64_t time, int64_t heads, int64_t nope, int64_t rope, int64_t value,
                       float scale, int64_t start, int64_t units) {
    const Shape s{time, heads, nope, rope, value, scale, start, units_for(nope, units)};
    const int64_t queries = s.queries();
    const int64_t blocks = (time + queries - 1) / queries;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int64_t index = 0; index < batch * heads; ++index)
        for (int64_t block = 0; block < blocks; ++block) {
            const Head at(s, index);
            const int64_t query = block * queries;
            forward_block(s, q + at.q, kv + at.kv, k_rope + at.k_rope,
                          first ? first + index / heads * time : nullptr, out + at.out, lse + at.lse, query,
                          std::min(queries, time - query));
        }
}

// dk_rope_h (b, h, t, rope) gets each head's share of the gradient of the rotary key.
template <typename T>
void attention_backward(const T* dout, const T* q, const T* kv, const T* k_rope, const int64_t* first, const T* out,
                        const float* lse, T* dq, T* dkv, float* dk_rope_h, int64_t batch, int64_t time, int64_t heads,
                        int64_t nope, int64_t rope, int64_t value, float scale, int64_t units) {
    const Shape s{time, heads, nope, rope, value, scale, 0, units_for(nope, units)};
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t index = 0; index < batch * heads; ++index) {
        const Head at(s, index);
        backward_head(s, dout + at.out, q + at.q, kv + at.kv, k_rope + at.k_rope,
                      first ? first + index / heads * time : nullptr, out + at.out, lse + at.lse, dq + at.q,
                      dkv + at.kv, dk_rope_h + at.lse * rope);
    }
}

}  // namespace

#define ARGS(T) (const T* q, const T* kv, const T* k_rope, const int64_t* first, T* out, float* lse, int64_t batch, \
                 int64_t time, int64_t heads, int64_t nope, int64_t rope, int64_t value, float scale, int64_t start, \
                 int64_t units)
BENTHIC_EXPORT(attention_forward, ARGS,
               (q, kv, k_rope, first, out, lse, batch, time, heads, nope, rope, value, scale, start, units))
#undef ARGS
#define ARGS(T) (const T* dout, const T* q, const T* kv, const T* k_rope, const int64_t* first, const T* out,       \
                 const float* lse, T* dq, T* dkv, float* dk_rope_h, int64_t batch, int64_t time, int64_t heads,     \
                 int64_t nope, int64_t rope, int64_t value, float scale,             \
                 int64_t units)
BENTHIC_EXPORT(attention_backward, ARGS,
               (dout, q, kv, k_rope, first, out, lse, dq, dkv, dk_rope_h, batch, time, heads, nope, rope, value,
                scale, units))
#undef ARGS
