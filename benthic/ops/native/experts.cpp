// Routed SwiGLU experts. A thread takes an expert, and a block of its rows at a time: what passes between the two
// matrix products of a block stays in that core's cache. One thread sums an expert's weight gradients in a fixed
// order, so results do not depend on timing.
//
// n tokens, s rows sorted by expert, e experts, d model width, f expert width, k experts per token.

#include "swiglu.h"

using namespace benthic;

namespace {

constexpr int64_t kBlock = 256;

void gather(const float* x, const int64_t* token, int64_t rows, int64_t d, float* out) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * d, x + token[r] * d, d * sizeof(float));
}

// out[token] = sum over its k rows.
void combine(const float* y, const int64_t* slot, float* out, int64_t n, int64_t k, int64_t d) {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < n; ++token) {
        float* o = out + token * d;
        std::memcpy(o, y + slot[token * k] * d, d * sizeof(float));
        for (int64_t j = 1; j < k; ++j) {
            const float* row = y + slot[token * k + j] * d;
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) o[i] += row[i];
        }
    }
}

}  // namespace

extern "C" {

// gate_up_s (s, 2f) is kept for the backward pass; y (s, d) is working space; out (n, d).
void experts_forward(const float* x, const int64_t* token, const int64_t* slot, const int64_t* offset,
                     const float* gate, const float* gate_up, const float* down, float* gate_up_s, float* y,
                     float* out, int64_t n, int64_t e, int64_t d, int64_t f, int64_t k) {
#pragma omp parallel
    {
        float *xb = scratch(0, kBlock * d), *hidden = scratch(1, kBlock * f);
#pragma omp for schedule(dynamic, 1)
        for (int64_t expert = 0; expert < e; ++expert) {
            const float *wgu = gate_up + expert * 2 * f * d, *wd = down + expert * d * f;
            for (int64_t at = offset[expert]; at < offset[expert + 1]; at += kBlock) {
                const int64_t rows = std::min(kBlock, offset[expert + 1] - at);
                float* gu = gate_up_s + at * 2 * f;
                gather(x, token + at, rows, d, xb);
                gemm_nt(rows, 2 * f, d, 1.0f, xb, d, wgu, d, 0.0f, gu, 2 * f);
                for (int64_t r = 0; r < rows; ++r) swiglu_row(gu + r * 2 * f, gate[at + r], hidden + r * f, f);
                gemm_nt(rows, d, f, 1.0f, hidden, f, wd, f, 0.0f, y + at * d, d);
            }
        }
        combine(y, slot, out, n, k, d);
    }
}

// dgate (s) in sorted order; dx_s (s, d) is working space. Experts without rows get zero gradients.
void experts_backward(const float* dout, const float* x, const int64_t* token, const int64_t* slot,
                      const int64_t* offset, const float* gate, const float* gate_up_s, const float* gate_up,
                      const float* down, float* dx_s, float* dx, float* dgate, float* dgate_up, float* ddown,
                      int64_t n, int64_t e, int64_t d, int64_t f, int64_t k) {
#pragma omp parallel
    {
        float *xb = scratch(0, kBlock * d), *dy = scratch(1, kBlock * d), *dhidden = scratch(2, kBlock * f);
        float *hidden = scratch(3, kBlock * f), *dgu = scratch(4, kBlock * 2 * f);
#pragma omp for schedule(dynamic, 1)
        for (int64_t expert = 0; expert < e; ++expert) {
            const float *wgu = gate_up + expert * 2 * f * d, *wd = down + expert * d * f;
            float *dwgu = dgate_up + expert * 2 * f * d, *dwd = ddown + expert * d * f;
            if (offset[expert] == offset[expert + 1]) {
                std::memset(dwgu, 0, 2 * f * d * sizeof(float));
                std::memset(dwd, 0, d * f * sizeof(float));
            }
            for (int64_t at = offset[expert]; at < offset[expert + 1]; at += kBlock) {
                const int64_t rows = std::min(kBlock, offset[expert + 1] - at);
                const float beta = at == offset[expert] ? 0.0f : 1.0f;
                gather(x, token + at, rows, d, xb);
                gather(dout, token + at, rows, d, dy);
                gemm_nn(rows, f, d, 1.0f, dy, d, wd, f, 0.0f, dhidden, f);
                for (int64_t r = 0; r < rows; ++r)
                    dgate[at + r] = swiglu_row_backward(gate_up_s + (at + r) * 2 * f, gate[at + r], dhidden + r * f,
                                                        hidden + r * f, dgu + r * 2 * f, f);
                gemm_tn(d, f, rows, 1.0f, dy, d, hidden, f, beta, dwd, f);
                gemm_tn(2 * f, d, rows, 1.0f, dgu, 2 * f, xb, d, beta, dwgu, d);
                gemm_nn(rows, d, 2 * f, 1.0f, dgu, 2 * f, wgu, d, 0.0f, dx_s + at * d, d);
            }
        }
        combine(dx_s, slot, dx, n, k, d);
    }
}

}  // extern "C"
