// RMSNorm, SwiGLU and rotary embedding: one pass over memory each way instead of one per arithmetic operation.

#include "swiglu.h"

using namespace benthic;

namespace {

// y = w * x * rstd with rstd = 1 / sqrt(mean(x^2) + eps); x has row stride `stride`, y is dense (n, d).
template <typename T>
void rms_norm_forward(const T* x, int64_t stride, const T* w, T* y, float* rstd, int64_t n, int64_t d, float eps) {
#pragma omp parallel for schedule(static) if (n > 1)
    for (int64_t row = 0; row < n; ++row) {
        const T* xr = x + row * stride;
        T* yr = y + row * d;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; ++i) {
            const float v = xr[i];
            sum += v * v;
        }
        const float r = 1.0f / std::sqrt(sum / d + eps);
        rstd[row] = r;
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) yr[i] = static_cast<float>(w[i]) * (static_cast<float>(xr[i]) * r);
    }
}

// dx dense (n, d); dw_parts (threads, d) zeroed by the caller, a row per thread, to be summed by the caller.
template <typename T>
void rms_norm_backward(const T* dy, const T* x, int64_t stride, const T* w, const float* rstd, T* dx, float* dw_parts,
                       int64_t n, int64_t d, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        float* dw = dw_parts + omp_get_thread_num() * d;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; ++row) {
            const T *xr = x + row * stride, *dyr = dy + row * d;
            T* dxr = dx + row * d;
            const float r = rstd[row];
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < d; ++i)
                dot += static_cast<float>(dyr[i]) * static_cast<float>(w[i]) * static_cast<float>(xr[i]);
            const float shift = dot * r * r * r / d;
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) {
                const float g = dyr[i], v = xr[i];
                dxr[i] = g * static_cast<float>(w[i]) * r - v * shift;
                dw[i] += g * v * r;
            }
        }
    }
}

template <typename T>
void swiglu_forward(const T* gate_up, T* out, int64_t n, int64_t f) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row) swiglu_row(gate_up + row * 2 * f, 1.0f, out + row * f, f);
}

template <typename T>
void swiglu_backward(const T* gate_up, const T* dout, T* dgate_up, int64_t n, int64_t f) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row)
        swiglu_row_backward(gate_up + row * 2 * f, 1.0f, dout + row * f, scratch<T>(0, f), dgate_up + row * 2 * f, f);
}

// Copy rows of `width` numbers, rotating the pairs of the last 2 p of them by their position's angle times `sign`.
// Row (b, t, h) of n = b * t * h rows lies at x + (row / h) * stride + (row % h) * width.
template <typename T>
void rope_tail(const T* x, int64_t stride, const float* cos, const float* sin, float sign, T* y, int64_t n,
               int64_t time, int64_t heads, int64_t width, int64_t p) {
    const int64_t kept = width - 2 * p;
#pragma omp parallel for schedule(static) if (n > 64)
    for (int64_t row = 0; row < n; ++row) {
        const T* xr = x + (row / heads) * stride + (row % heads) * width;
        T* yr = y + row * width;
        const int64_t t = (row / heads) % time;
        std::memcpy(yr, xr, kept * sizeof(T));
        const float *c = cos + t * p, *s = sin + t * p;
        const T* pairs = xr + kept;
        T* out = yr + kept;
#pragma omp simd
        for (int64_t i = 0; i < p; ++i) {
            const float a = pairs[2 * i], b = pairs[2 * i + 1], turn = sign * s[i];
            out[2 * i] = a * c[i] - b * turn;
            out[2 * i + 1] = b * c[i] + a * turn;
        }
    }
}

}  // namespace

// Whether this build of PyTorch has the matrix product that the bf16 kernels are made of.
extern "C" int64_t has_bf16() { return cblas_gemm_bf16bf16f32 != nullptr; }

#define ARGS(T) (const T* x, int64_t stride, const T* w, T* y, float* rstd, int64_t n, int64_t d, float eps)
BENTHIC_EXPORT(rms_norm_forward, ARGS, (x, stride, w, y, rstd, n, d, eps))
#undef ARGS
#define ARGS(T) (const T* dy, const T* x, int64_t stride, const T* w, const float* rstd, T* dx, float* dw_parts, \
                 int64_t n, int64_t d, int64_t threads)
BENTHIC_EXPORT(rms_norm_backward, ARGS, (dy, x, stride, w, rstd, dx, dw_parts, n, d, threads))
#undef ARGS
#define ARGS(T) (const T* gate_up, T* out, int64_t n, int64_t f)
BENTHIC_EXPORT(swiglu_forward, ARGS, (gate_up, out, n, f))
#undef ARGS
#define ARGS(T) (const T* gate_up, const T* dout, T* dgate_up, int64_t n, int64_t f)
BENTHIC_EXPORT(swiglu_backward, ARGS, (gate_up, dout, dgate_up, n, f))
#undef ARGS
#define ARGS(T) (const T* x, int64_t stride, const float* cos, const float* sin, float sign, T* y, int64_t n, \
                 int64_t time, int64_t heads, int64_t width, int64_t p)
BENTHIC_EXPORT(rope_tail, ARGS, (x, stride, cos, sin, sign, y, n, time, heads, width, p))
#undef ARGS
