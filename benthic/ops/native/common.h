// What the kernels share: an exponential that compilers vectorise, and matrix products on PyTorch's own BLAS.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// The BLAS inside libtorch, by its Fortran name; called from within a parallel region it uses the calling thread only.
extern "C" void sgemm_(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k,
                       const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                       const float* beta, float* c, const int* ldc);

namespace benthic {

// c (m, n) = alpha a b + beta c, row-major; 'T' takes a factor transposed. BLAS counts columns first, so it is asked
// for the transposed product.
inline void gemm(char trans_a, char trans_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
    sgemm_(&trans_b, &trans_a, &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
}
inline void gemm_nn(int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb, float beta,
                    float* c, int ldc) {
    gemm('N', 'N', m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
inline void gemm_nt(int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb, float beta,
                    float* c, int ldc) {
    gemm('N', 'T', m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
inline void gemm_tn(int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb, float beta,
                    float* c, int ldc) {
    gemm('T', 'N', m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// exp(x) to about one unit in the last place of fp32: 2^round(x / ln 2) times a polynomial of the remainder
// (Cephes' coefficients). Branch-free, so that loops over it vectorise. NaN stays NaN; below -87 the result is 0.
inline float fast_exp(float x) {
    const float bounded = std::min(std::max(x, -87.3f), 88.3f);
    const float n = std::nearbyint(bounded * 1.44269504088896341f);
    const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    const float value = x < -87.3f ? 0.0f : p * power;
    return x == x ? value : x;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// Scratch memory of one thread, kept between calls and grown when needed.
inline float* scratch(int slot, size_t count) {
    static thread_local std::vector<float> buffers[6];
    if (buffers[slot].size() < count) buffers[slot].resize(count);
    return buffers[slot].data();
}

}  // namespace benthic
