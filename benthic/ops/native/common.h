// What the kernels share: fp32 and bf16 numbers, an exponential that compilers vectorise, and matrix products, on the
// BLAS inside PyTorch or by kernels of our own. Kernels are templates over T, the number type of tensors; arithmetic is
// always fp32.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// The BLAS inside libtorch; called from within a parallel region it uses the calling thread only.
extern "C" void sgemm_(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k,
                       const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                       const float* beta, float* c, const int* ldc);
// Only some builds of PyTorch have this one: weak, so that the library links without it.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int trans_a, int trans_b, int m, int n,
                                                             int k, float alpha, const void* a, int lda,
                                                             const void* b, int ldb, float beta, float* c, int ldc);

namespace benthic {

// The upper half of an fp32, rounded to nearest even.
struct bf16 {
    uint16_t bits;
    bf16() = default;
    bf16(float value) { *this = value; }
    bf16& operator=(float value) {
        uint32_t u;
        std::memcpy(&u, &value, sizeof u);
        // NaN, whose mantissa could round to infinity's, only gets its quiet bit; without a branch, for vectors.
        const uint32_t nan = (u & 0x7fffffff) > 0x7f800000 ? 0xffffffff : 0;
        const uint32_t rounded = u + 0x7fff + ((u >> 16) & 1);
        bits = ((rounded & ~nan) | ((u | 0x400000) & nan)) >> 16;
        return *this;
    }
    operator float() const {
        const uint32_t u = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &u, sizeof value);
        return value;
    }
};

// What a product is to run on; what does not pay on tiles is left to the BLAS. Python's ops/product.py has the same
// numbers.
enum Units : int64_t { kBlas, kVectors, kTiles };

// A product of fp32 on the processor's bf16 tiles (amx.cpp); false, and nothing done, where that would not pay.
bool tile_gemm(char trans_a, char trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
               const float* b, int64_t ldb, float beta, float* c, int64_t ldc);

// The same on its vector units, of fp32 or of bf16 (vector_gemm.cpp).
template <typename T>
bool vector_gemm(char trans_a, char trans_b, int64_t m, int64_t n, int64_t k, float alpha, const T* a, int64_t lda,
                 const T* b, int64_t ldb, float beta, float* c, int64_t ldc);

template <typename T>
constexpr bool is_float = std::is_same_v<T, float>;

// c (m, n) = alpha a b + beta c in fp32, row-major; trans 'T' takes a factor transposed.
inline void gemm(char trans_a, char trans_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
    // Fortran's BLAS counts columns first, so it is asked for the transposed product.
    sgemm_(&trans_b, &trans_a, &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
}
inline void gemm(char trans_a, char trans_b, int m, int n, int k, float alpha, const bf16* a, int lda, const bf16* b,
                 int ldb, float beta, float* c, int ldc) {
    constexpr int row_major = 101, as_is = 111, transposed = 112;
    cblas_gemm_bf16bf16f32(row_major, trans_a == 'T' ? transposed : as_is, trans_b == 'T' ? transposed : as_is, m, n,
                           k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// The same on one thread and on such units; tiles are for fp32, as for bf16 the BLAS uses them itself.
template <typename T>
void gemm(int64_t units, char trans_a, char trans_b, int m, int n, int k, float alpha, const T* a, int lda, const T* b,
          int ldb, float beta, float* c, int ldc) {
    if constexpr (is_float<T>)
        if (units == kTiles && tile_gemm(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)) return;
    if (units == kVectors && vector_gemm(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)) return;
    gemm(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
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

// The largest of n numbers and `least`; NaN counts for nothing. Compilers do not vectorise a plain loop for a maximum
// where NaN keeps its meaning, so lanes are written out.
template <int64_t lanes, typename T>
int64_t maximum_by_lane(const T* x, int64_t at, int64_t n, float* top) {
    for (; at + lanes <= n; at += lanes)
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
            const float v = x[at + i];
            top[i] = v > top[i] ? v : top[i];
        }
    return at;
}
template <typename T>
float maximum(const T* x, int64_t n, float least) {
    float top[64];
    for (float& lane : top) lane = least;
    int64_t at = maximum_by_lane<64>(x, 0, n, top);
    at = maximum_by_lane<16>(x, at, n, top);
    for (; at < n; ++at) top[0] = std::max(top[0], static_cast<float>(x[at]));
    maximum_by_lane<32>(top + 32, 0, 32, top);
    maximum_by_lane<16>(top + 16, 0, 16, top);
    for (int64_t i = 1; i < 16; ++i) top[0] = std::max(top[0], top[i]);
    return top[0];
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// Working memory of one thread, kept between calls and grown when needed; a slot for each buffer in use at once.
// Aligned as PyTorch's tensors are: BLAS repeats its results bit for bit only where alignment repeats.
template <typename T>
T* scratch(int slot, size_t count) {
    constexpr size_t alignment = 64;
    struct Buffer {
        T* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffers[10];
    Buffer& buffer = buffers[slot];
    if (buffer.size < count) {
        std::free(buffer.data);
        const size_t bytes = (count * sizeof(T) + alignment - 1) / alignment * alignment;
        buffer.data = static_cast<T*>(std::aligned_alloc(alignment, bytes));
        if (buffer.data == nullptr) std::abort();
        buffer.size = count;
    }
    return buffer.data;
}

// Where a matrix product destined for `to` goes: there if that is fp32, else into a scratch buffer.
template <typename T>
float* product(T* to, int slot, size_t count) {
    if constexpr (is_float<T>)
        return to;
    else
        return scratch<float>(slot, count);
}

// Round a finished product to where it belongs; nothing if it was computed there.
template <typename T>
void settle(const float* from, T* to, int64_t count) {
    if constexpr (!is_float<T>) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    }
}

// The names that Python calls: `name` for each number type.
#define BENTHIC_EXPORT(name, parameters, arguments)                                    \
    extern "C" void name##_f32 parameters(float) { name<float> arguments; }            \
    extern "C" void name##_bf16 parameters(benthic::bf16) { name<benthic::bf16> arguments; }

}  // namespace benthic
