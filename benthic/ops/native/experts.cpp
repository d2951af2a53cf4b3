// Routed SwiGLU experts. A thread takes an expert, and a block of its rows at a time: what passes between the two
// matrix products of a block stays in that core's cache. One thread sums an expert's weight gradients in a fixed
// order, so results do not depend on timing.
//
// n tokens, s rows sorted by expert, e experts, d model width, f expert width, k experts per token.

#include <numeric>
#include <vector>

#include "swiglu.h"

using namespace benthic;

namespace {

constexpr int64_t kBlock = 256;

template <typename T>
void gather(const T* x, const int64_t* token, int64_t rows, int64_t d, T* out) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * d, x + token[r] * d, d * sizeof(T));
}

// Experts by their number of rows, most first: a thread that takes a large one last would let the others wait.
std::vector<int64_t> by_load(const int64_t* offset, int64_t e) {
    std::vector<int64_t> order(e);
    std::iota(order.begin(), order.end(), 0);
    const auto rows = [&](int64_t expert) { return offset[expert + 1] - offset[expert]; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows(a) > rows(b); });
    return order;
}

// out[token] = sum over its k rows.
template <typename T>
void combine(const T* y, const int64_t* slot, T* out, int64_t n, int64_t k, int64_t d) {
    float* sum = scratch<float>(0, d);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < n; ++token) {
        for (int64_t i = 0; i < d; ++i) sum[i] = 0.0f;
        for (int64_t j = 0; j < k; ++j) {
            const T* row = y + slot[token * k + j] * d;
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) sum[i] += static_cast<float>(row[i]);
        }
        T* o = out + token * d;
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) o[i] = sum[i];
    }
}

// gate_up_s (s, 2f) is kept for the backward pass; y (s, d) is working space; out (n, d). Products run on `units`.
template <typename T>
void experts_forward(const T* x, const int64_t* token, const int64_t* slot, const int64_t* offset, const float* gate,
                     const T* gate_up, const T* down, T* gate_up_s, T* y, T* out, int64_t n, int64_t e, int64_t d,
                     int64_t f, int64_t k, int64_t units) {
    const std::vector<int64_t> order = by_load(offset, e);
#pragma omp parallel
    {
        T *xb = scratch<T>(0, kBlock * d), *hidden = scratch<T>(1, kBlock * f);
#pragma omp for schedule(dynamic, 1)
        for (const int64_t expert : order) {
            const T *wgu = gate_up + expert * 2 * f * d, *wd = down + expert * d * f;
            for (int64_t at = offset[expert]; at < offset[expert + 1]; at += kBlock) {
                const int64_t rows = std::min(kBlock, offset[expert + 1] - at);
                T *gu_out = gate_up_s + at * 2 * f, *y_out = y + at * d;
                float* gu = product(gu_out, 2, kBlock * 2 * f);
                gather(x, token + at, rows, d, xb);
                gemm(units, 'N', 'T', rows, 2 * f, d, 1.0f, xb, d, wgu, d, 0.0f, gu, 2 * f);
                for (int64_t r = 0; r < rows; ++r) swiglu_row(gu + r * 2 * f, gate[at + r], hidden + r * f, f);
                settle(gu, gu_out, rows * 2 * f);
                float* yb = product(y_out, 3, kBlock * d);
                gemm(units, 'N', 'T', rows, d, f, 1.0f, hidden, f, wd, f, 0.0f, yb, d);
                settle(yb, y_out, rows * d);
            }
        }
        combine(y, slot, out, n, k, d);
    }
}

// dgate (s) in sorted order; dx_s (s, d) is working space. Experts without rows get zero gradients. Without dx, or
// without dgate_up and ddown, those are not computed. Products run on `units`.
template <typename T>
void experts_backward(const T* dout, const T* x, const int64_t* token, const int64_t* slot, const int64_t* offset,
                      const float* gate, const T* gate_up_s, const T* gate_up, const T* down, T* dx_s, T* dx,
                      float* dgate, T* dgate_up, T* ddown, int64_t n, int64_t e, int64_t d, int64_t f, int64_t k,
                      int64_t units) {
    const std::vector<int64_t> order = by_load(offset, e);
#pragma omp parallel
    {
        T *xb = scratch<T>(0, kBlock * d), *dy = scratch<T>(1, kBlock * d);
        T *hidden = scratch<T>(2, kBlock * f), *dgu = scratch<T>(3, kBlock * 2 * f);
        float* dhidden = scratch<float>(4, kBlock * f);
#pragma omp for schedule(dynamic, 1)
        for (const int64_t expert : order) {
            const T *wgu = gate_up + expert * 2 * f * d, *wd = down + expert * d * f;
            T *dwgu_out = nullptr, *dwd_out = nullptr;
            float *dwgu = nullptr, *dwd = nullptr;
            if (dgate_up) {
                dwgu_out = dgate_up + expert * 2 * f * d, dwd_out = ddown + expert * d * f;
                dwgu = product(dwgu_out, 5, 2 * f * d), dwd = product(dwd_out, 6, d * f);
            }
            if (dgate_up && offset[expert] == offset[expert + 1]) {
                std::fill(dwgu, dwgu + 2 * f * d, 0.0f);
                std::fill(dwd, dwd + d * f, 0.0f);
            }
            for (int64_t at = offset[expert]; at < offset[expert + 1]; at += kBlock) {
                const int64_t rows = std::min(kBlock, offset[expert + 1] - at);
                const float beta = at == offset[expert] ? 0.0f : 1.0f;
                gather(dout, token + at, rows, d, dy);
                gemm(units, 'N', 'N', rows, f, d, 1.0f, dy, d, wd, f, 0.0f, dhidden, f);
                for (int64_t r = 0; r < rows; ++r)
                    dgate[at + r] = swiglu_row_backward(gate_up_s + (at + r) * 2 * f, gate[at + r], dhidden + r * f,
                                                        hidden + r * f, dgu + r * 2 * f, f);
                if (dgate_up) {
                    gather(x, token + at, rows, d, xb);
                    gemm(units, 'T', 'N', d, f, rows, 1.0f, dy, d, hidden, f, beta, dwd, f);
                    gemm(units, 'T', 'N', 2 * f, d, rows, 1.0f, dgu, 2 * f, xb, d, beta, dwgu, d);
                }
                if (!dx) continue;
                float* dxb = product(dx_s + at * d, 7, kBlock * d);
                gemm(units, 'N', 'N', rows, d, 2 * f, 1.0f, dgu, 2 * f, wgu, d, 0.0f, dxb, d);
                settle(dxb, dx_s + at * d, rows * d);
            }
            if (dgate_up) {
                settle(dwgu, dwgu_out, 2 * f * d);
                settle(dwd, dwd_out, d * f);
            }
        }
        if (dx) combine(dx_s, slot, dx, n, k, d);
    }
}

// Products of `rows` rows, one after another, with x.
template <typename T>
void multiply_rows(const T* __restrict weight, const float* __restrict x, int64_t rows, int64_t d, float* out) {
    for (int64_t r = 0; r < rows; ++r) {
        const T* row = weight + r * d;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; ++i) sum += x[i] * static_cast<float>(row[i]);
        out[r] = sum;
    }
}

// A decode step: one token x (d), its k experts and their weights. All threads read each expert together, so that all
// of the memory's bandwidth goes to it. gate_up_k (k, 2f) and hidden (k, f) are working space.
template <typename T>
void experts_of_one_token(const T* x, const int64_t* expert, const float* gate, const T* gate_up, const T* down,
                          float* gate_up_k, float* hidden, T* out, int64_t d, int64_t f, int64_t k) {
    constexpr int64_t rows = 16;
#pragma omp parallel
    {
        float* wide = scratch<float>(0, d);
        for (int64_t i = 0; i < d; ++i) wide[i] = x[i];
#pragma omp for collapse(2) schedule(static)
        for (int64_t j = 0; j < k; ++j)
            for (int64_t r = 0; r < 2 * f; r += rows)
                multiply_rows(gate_up + (expert[j] * 2 * f + r) * d, wide, std::min(rows, 2 * f - r), d,
                              gate_up_k + j * 2 * f + r);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < k; ++j) swiglu_row(gate_up_k + j * 2 * f, gate[j], hidden + j * f, f);
        float* part = scratch<float>(1, rows);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < d; r += rows) {
            const int64_t count = std::min(rows, d - r);
            float sum[rows] = {};
            for (int64_t j = 0; j < k; ++j) {
                multiply_rows(down + (expert[j] * d + r) * f, hidden + j * f, count, f, part);
                for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
            }
            for (int64_t i = 0; i < count; ++i) out[r + i] = sum[i];
        }
    }
}

}  // namespace

#define ARGS(T) (const T* x, const int64_t* expert, const float* gate, const T* gate_up, const T* down,              \
                 float* gate_up_k, float* hidden, T* out, int64_t d, int64_t f, int64_t k)
BENTHIC_EXPORT(experts_of_one_token, ARGS, (x, expert, gate, gate_up, down, gate_up_k, hidden, out, d, f, k))
#undef ARGS
#define ARGS(T) (const T* x, const int64_t* token, const int64_t* slot, const int64_t* offset, const float* gate,   \
                 const T* gate_up, const T* down, T* gate_up_s, T* y, T* out, int64_t n, int64_t e, int64_t d,      \
                 int64_t f, int64_t k, int64_t units)
BENTHIC_EXPORT(experts_forward, ARGS,
               (x, token, slot, offset, gate, gate_up, down, gate_up_s, y, out, n, e, d, f, k, units))
#undef ARGS
#define ARGS(T) (const T* dout, const T* x, const int64_t* token, const int64_t* slot, const int64_t* offset,       \
                 const float* gate, const T* gate_up_s, const T* gate_up, const T* down, T* dx_s, T* dx,            \
                 float* dgate, T* dgate_up, T* ddown, int64_t n, int64_t e, int64_t d, int64_t f, int64_t k,        \
                 int64_t units)
BENTHIC_EXPORT(experts_backward, ARGS,
               (dout, x, token, slot, offset, gate, gate_up_s, gate_up, down, dx_s, dx, dgate, dgate_up, ddown, n, e,
                d, f, k, units))
#undef ARGS
