// Factors of matrix products as lines of k numbers, and vectors to lay them out with.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace benthic {

constexpr int64_t kLineWords = 16;  // numbers in a line of a cache

// A factor seen as lines of k numbers: number (line, k) lies at line * line_stride + k * k_stride; one stride is 1.
struct Factor {
    const float* data;
    int64_t lines, line_stride, k_stride;
    bool along_k() const { return k_stride == 1; }
    Factor from(int64_t line, int64_t k) const {
        return {data + line * line_stride + k * k_stride, lines - line, line_stride, k_stride};
    }
};

#if defined(__AVX512F__)

constexpr int64_t kLanes = 16;
using Vector = __m512;

static inline __mmask16 first(int64_t count) { return count >= kLanes ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1; }
static inline Vector zero() { return _mm512_setzero_ps(); }
static inline Vector splat(float x) { return _mm512_set1_ps(x); }
static inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
static inline Vector load_first(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first(count), from); }
static inline void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
static inline void store_first(float* to, Vector x, int64_t count) { _mm512_mask_storeu_ps(to, first(count), x); }
static inline Vector fma(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
static inline Vector plus(Vector a, Vector b) { return _mm512_add_ps(a, b); }
static inline Vector scaled(Vector a, float by) { return _mm512_mul_ps(a, splat(by)); }

// 16 x 16 numbers, transposed.
static inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}
static inline void transpose(Vector (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; ++i) t[i] = _mm512_castps_si512(r[i]);
    transpose(t);
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(t[i]);
}

#else

constexpr int64_t kLanes = 8;
using Vector = __m256;

static inline __m256i first(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(std::min(count, kLanes))), lane);
}
static inline Vector zero() { return _mm256_setzero_ps(); }
static inline Vector splat(float x) { return _mm256_set1_ps(x); }
static inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
static inline Vector load_first(const float* from, int64_t count) { return _mm256_maskload_ps(from, first(count)); }
static inline void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
static inline void store_first(float* to, Vector x, int64_t count) { _mm256_maskstore_ps(to, first(count), x); }
static inline Vector fma(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
static inline Vector plus(Vector a, Vector b) { return _mm256_add_ps(a, b); }
static inline Vector scaled(Vector a, float by) { return _mm256_mul_ps(a, splat(by)); }

// 8 x 8 numbers, transposed.
static inline void transpose(Vector (&r)[8]) {
    Vector t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
        t[j + 4] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
    }
    for (int j = 0; j < 8; ++j) r[j] = t[j];
}

#endif

}  // namespace benthic
