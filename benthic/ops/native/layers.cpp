// RMSNorm, SwiGLU and rotary embedding: one pass over memory each way instead of one per arithmetic operation.

#include "swiglu.h"

using namespace benthic;

extern "C" {

// y = w * x * rstd with rstd = 1 / sqrt(mean(x^2) + eps); x has row stride `stride`, y is dense (n, d).
void rms_norm_forward(const float* x, int64_t stride, const float* w, float* y, float* rstd, int64_t n, int64_t d,
                      float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
        const float* xr = x + row * stride;
        float* yr = y + row * d;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; ++i) sum += xr[i] * xr[i];
        const float r = 1.0f / std::sqrt(sum / d + eps);
        rstd[row] = r;
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) yr[i] = w[i] * (xr[i] * r);
    }
}

// dx dense (n, d); dw_parts (threads, d) zeroed by the caller, a row per thread, to be summed by the caller.
void rms_norm_backward(const float* dy, const float* x, int64_t stride, const float* w, const float* rstd, float* dx,
                       float* dw_parts, int64_t n, int64_t d, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        float* dw = dw_parts + omp_get_thread_num() * d;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; ++row) {
            const float *xr = x + row * stride, *dyr = dy + row * d;
            float* dxr = dx + row * d;
            const float r = rstd[row];
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < d; ++i) dot += dyr[i] * w[i] * xr[i];
            const float shift = dot * r * r * r / d;
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) {
                dxr[i] = dyr[i] * w[i] * r - xr[i] * shift;
                dw[i] += dyr[i] * xr[i] * r;
            }
        }
    }
}

void swiglu_forward(const float* gate_up, float* out, int64_t n, int64_t f) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row) swiglu_row(gate_up + row * 2 * f, 1.0f, out + row * f, f);
}

void swiglu_backward(const float* gate_up, const float* dout, float* dgate_up, int64_t n, int64_t f) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row)
        swiglu_row_backward(gate_up + row * 2 * f, 1.0f, dout + row * f, scratch(0, f), dgate_up + row * 2 * f, f);
}

// Copy rows of `width` numbers, rotating the pairs of the last 2 p of them by their position's angle times `sign`.
// Row (b, t, h) of n = b * t * h rows lies at x + (row / h) * stride + (row % h) * width.
void rope_tail(const float* x, int64_t stride, const float* cos, const float* sin, float sign, float* y, int64_t n,
               int64_t time, int64_t heads, int64_t width, int64_t p) {
    const int64_t kept = width - 2 * p;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
        const float* xr = x + (row / heads) * stride + (row % heads) * width;
        float* yr = y + row * width;
        const int64_t t = (row / heads) % time;
        std::memcpy(yr, xr, kept * sizeof(float));
        const float *c = cos + t * p, *s = sin + t * p, *pairs = xr + kept;
        float* out = yr + kept;
#pragma omp simd
        for (int64_t i = 0; i < p; ++i) {
            const float a = pairs[2 * i], b = pairs[2 * i + 1], turn = sign * s[i];
            out[2 * i] = a * c[i] - b * turn;
            out[2 * i + 1] = b * c[i] + a * turn;
        }
    }
}

}  // extern "C"
