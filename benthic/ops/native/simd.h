// Sixteen fp32 or int32 lanes, on AVX-512, on AVX2, or on whatever the compiler makes of plain vectors. Decoding is
// compiled without leave to reorder sums, so that a kernel of it gives the same bits wherever it is inlined.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define BENTHIC_AVX512 1
#ifdef __AVX512BF16__
#define BENTHIC_BF16_PAIRS 1
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define BENTHIC_AVX2 1
#endif

namespace benthic {

constexpr int64_t kLanes = 16;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float from_bf16(uint16_t bits) {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &u, sizeof value);
    return value;
}

inline uint16_t to_bf16(float value) {  // rounds to nearest even
    uint32_t u;
    std::memcpy(&u, &value, sizeof u);
    if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((u | 0x400000) >> 16);
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline void prefetch(const char* address) { __builtin_prefetch(address, 0, 2); }

#if BENTHIC_AVX512

inline const char* instruction_set() { return "AVX-512"; }

constexpr bool kManyRegisters = true;  // room for 24 sums at once

struct F16 { __m512 v; };
struct I16 { __m512i v; };

inline __mmask16 first_lanes(int64_t n) { return n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

inline F16 zero() { return {_mm512_setzero_ps()}; }
inline F16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }
inline void store_n(float* p, F16 x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F16 swap_halves(F16 a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)}; }
// 2^n of whole numbers from -126 to 127.
inline F16 power_of_two(F16 n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
// a where x >= y, else b.
inline F16 where_not_less(F16 x, F16 y, F16 a, F16 b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ), b.v, a.v)};
}
inline float sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(F16 a) { return _mm512_reduce_max_ps(a.v); }

inline F16 widen_bf16(__m256i half) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline F16 load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F16 load_bf16_n(const uint16_t* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

#if BENTHIC_BF16_PAIRS
// A pair of bf16 in each lane, of neighbours in a row of which n numbers are there; the others are 0.
inline F16 load_pairs(const uint16_t* p, int64_t n) {
    const __mmask32 there = n >= 2 * kLanes ? 0xffffffff : (1u << n) - 1;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, p))};
}
// A pair in each lane of a number of `even` and the one beside it in `odd`, of which so many are there.
inline F16 zip_pairs(const uint16_t* even, const uint16_t* odd, int64_t evens, int64_t odds) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(evens), even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(odds), odd));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}
// c plus both products of two lanes' pairs. Numbers and sums below 2^-126 count as zero.
inline F16 fma_pairs(F16 a, F16 b, F16 c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

// E4M3 numbers over 256, by way of fp16, whose exponent is larger by 8 and whose subnormals cost nothing.
inline F16 widen_e4m3(__m128i bytes) {
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    return {_mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff))))};
}
inline F16 load_e4m3(const uint8_t* p) { return widen_e4m3(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F16 load_e4m3_n(const uint8_t* p, int64_t n) { return widen_e4m3(_mm_maskz_loadu_epi8(first_lanes(n), p)); }

// The first and the second halves of `x` and of `y`, added.
inline __m512 fold_halves(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
}
// Of two vectors that hold two sums each, in halves: four, in quarters.
inline __m512 fold_quarters(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}
inline __m512 fold_pairs(__m512 x, __m512 y) {
    const __m512d a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}
inline __m512 fold_neighbours(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
}
// Lane i of the outcome is sum(a[i]) to the last bit: lanes are added in the same order.
inline F16 sums(const F16 a[16]) {
    __m512 q[4];
    for (int i = 0; i < 4; ++i)
        q[i] = fold_quarters(fold_halves(a[i].v, a[4 + i].v), fold_halves(a[8 + i].v, a[12 + i].v));
    return {fold_neighbours(fold_pairs(q[0], q[1]), fold_pairs(q[2], q[3]))};
}
// The same of eight, into `out`.
inline void store_sums(float* out, const F16 a[8]) {
    const __m512 even = fold_quarters(fold_halves(a[0].v, a[2].v), fold_halves(a[4].v, a[6].v));
    const __m512 odd = fold_quarters(fold_halves(a[1].v, a[3].v), fold_halves(a[5].v, a[7].v));
    const __m512 pairs = fold_pairs(even, odd), all = fold_neighbours(pairs, pairs);
    _mm512_mask_compressstoreu_ps(out, 0x3333, all);
}

inline I16 splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline void store_bytes(int8_t* p, F16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

// 64 bytes, 4 to a lane.
struct Bytes { __m512i v; };
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }

// acc += in each lane the four products of unsigned bytes w with the signed bytes of one x, which come both together
// and as 16-bit numbers (even, odd).
inline I16 dot4(I16 acc, Bytes w, int32_t x, [[maybe_unused]] int32_t even, [[maybe_unused]] int32_t odd) {
#ifdef __AVX512VNNI__
    return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(x))};
#else
    const __m512i a = _mm512_madd_epi16(_mm512_and_si512(w.v, _mm512_set1_epi16(255)), _mm512_set1_epi32(even));
    const __m512i b = _mm512_madd_epi16(_mm512_srli_epi16(w.v, 8), _mm512_set1_epi32(odd));
    return {_mm512_add_epi32(acc.v, _mm512_add_epi32(a, b))};
#endif
}

// 16 x 16 numbers of 32 bits, transposed. Static, so that each file has its own to inline.
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
static inline void transpose(F16 (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; ++i) t[i] = _mm512_castps_si512(r[i].v);
    transpose(t);
    for (int i = 0; i < 16; ++i) r[i].v = _mm512_castsi512_ps(t[i]);
}

#else  // two halves of eight, or plain vectors

constexpr bool kManyRegisters = false;

#if BENTHIC_AVX2

inline const char* instruction_set() { return "AVX2"; }

struct F16 { __m256 a, b; };
struct I16 { __m256i a, b; };

inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 operator-(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 operator*(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 operator/(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 abs(F16 x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline F16 round(F16 x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
inline F16 swap_halves(F16 x) { return {x.b, x.a}; }
inline __m256 power_of_two(__m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline F16 power_of_two(F16 n) { return {power_of_two(n.a), power_of_two(n.b)}; }
inline F16 where_not_less(F16 x, F16 y, F16 a, F16 b) {
    return {_mm256_blendv_ps(b.a, a.a, _mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ)),
            _mm256_blendv_ps(b.b, a.b, _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))};
}
inline float sum(F16 x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline __m256 widen_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline F16 load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }

// Eight rows of eight numbers, transposed.
inline void transpose(__m256 (&r)[8]) {
    __m256 t[8];
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
// 16 x 16 numbers, transposed.
inline void transpose(F16 (&r)[16]) {
    __m256 blocks[4][8];
    for (int i = 0; i < 8; ++i) {
        blocks[0][i] = r[i].a, blocks[1][i] = r[i].b;
        blocks[2][i] = r[8 + i].a, blocks[3][i] = r[8 + i].b;
    }
    for (auto& block : blocks) transpose(block);
    for (int i = 0; i < 8; ++i) {
        r[i] = {blocks[0][i], blocks[2][i]};
        r[8 + i] = {blocks[1][i], blocks[3][i]};
    }
}

inline I16 splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

struct Bytes { __m256i a, b; };
inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline Bytes low_nibbles(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high_nibbles(Bytes x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline __m256i dot4(__m256i acc, __m256i w, __m256i even, __m256i odd) {
    const __m256i a = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), even);
    const __m256i b = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), odd);
    return _mm256_add_epi32(acc, _mm256_add_epi32(a, b));
}
inline I16 dot4(I16 acc, Bytes w, int32_t, int32_t even, int32_t odd) {
    const __m256i e = _mm256_set1_epi32(even), o = _mm256_set1_epi32(odd);
    return {dot4(acc.a, w.a, e, o), dot4(acc.b, w.b, e, o)};
}

#else

inline const char* instruction_set() { return "plain vectors"; }

struct F16 { float v[16]; };
struct I16 { int32_t v[16]; };

template <class Op>
inline F16 each(Op op) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.v[i] = op(i);
    return out;
}
inline F16 splat(float x) { return each([&](int) { return x; }); }
inline F16 zero() { return splat(0.0f); }
inline F16 load(const float* p) { return each([&](int i) { return p[i]; }); }
inline void store(float* p, F16 x) { std::memcpy(p, x.v, sizeof x.v); }
inline F16 operator+(F16 x, F16 y) { return each([&](int i) { return x.v[i] + y.v[i]; }); }
inline F16 operator-(F16 x, F16 y) { return each([&](int i) { return x.v[i] - y.v[i]; }); }
inline F16 operator*(F16 x, F16 y) { return each([&](int i) { return x.v[i] * y.v[i]; }); }
inline F16 operator/(F16 x, F16 y) { return each([&](int i) { return x.v[i] / y.v[i]; }); }
inline F16 fma(F16 x, F16 y, F16 z) { return each([&](int i) { return x.v[i] * y.v[i] + z.v[i]; }); }
inline F16 max(F16 x, F16 y) { return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
inline F16 min(F16 x, F16 y) { return each([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; }); }
inline F16 abs(F16 x) { return each([&](int i) { return std::fabs(x.v[i]); }); }
inline F16 round(F16 x) { return each([&](int i) { return std::nearbyint(x.v[i]); }); }
inline F16 swap_halves(F16 x) { return each([&](int i) { return x.v[i ^ 8]; }); }
inline F16 power_of_two(F16 n) { return each([&](int i) { return std::ldexp(1.0f, static_cast<int>(n.v[i])); }); }
inline F16 where_not_less(F16 x, F16 y, F16 a, F16 b) {
    return each([&](int i) { return x.v[i] >= y.v[i] ? a.v[i] : b.v[i]; });
}
inline float sum(F16 x) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
    return x.v[0];
}
inline F16 load_bf16(const uint16_t* p) { return each([&](int i) { return from_bf16(p[i]); }); }

inline void transpose(F16 (&r)[16]) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < i; ++j) std::swap(r[i].v[j], r[j].v[i]);
}

inline I16 splat_int(int32_t x) {
    I16 out;
    for (int32_t& lane : out.v) lane = x;
    return out;
}
inline F16 to_float(I16 x) { return each([&](int i) { return static_cast<float>(x.v[i]); }); }

struct Bytes { uint8_t v[64]; };
inline Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
}
inline Bytes low_nibbles(Bytes x) {
    for (uint8_t& byte : x.v) byte &= 15;
    return x;
}
inline Bytes high_nibbles(Bytes x) {
    for (uint8_t& byte : x.v) byte >>= 4;
    return x;
}
inline I16 dot4(I16 acc, Bytes w, int32_t x, int32_t, int32_t) {
    int8_t bytes[4];
    std::memcpy(bytes, &x, sizeof bytes);
    for (int lane = 0; lane < 16; ++lane)
        for (int i = 0; i < 4; ++i) acc.v[lane] += w.v[4 * lane + i] * bytes[i];
    return acc;
}

#endif

// What both do by way of memory.

inline F16 load_n(const float* p, int64_t n) {
    if (n >= kLanes) return load(p);
    float lanes[16] = {};
    std::memcpy(lanes, p, std::min(n, kLanes) * sizeof(float));
    return load(lanes);
}
inline void store_n(float* p, F16 x, int64_t n) {
    if (n >= kLanes) return store(p, x);
    float lanes[16];
    store(lanes, x);
    std::memcpy(p, lanes, std::min(n, kLanes) * sizeof(float));
}
inline F16 load_bf16_n(const uint16_t* p, int64_t n) {
    uint16_t lanes[16] = {};
    std::memcpy(lanes, p, std::min(n, kLanes) * sizeof(uint16_t));
    return load_bf16(lanes);
}
// E4M3 numbers over 256, as fp32 numbers whose exponent is made larger by 112 afterwards.
inline F16 load_e4m3_n(const uint8_t* p, int64_t n) {
    float lanes[16] = {};
    for (int64_t i = 0; i < std::min(n, kLanes); ++i) {
        const int magnitude = p[i] & 127, exponent = magnitude >> 3, mantissa = magnitude & 7;
        const float value = exponent ? std::ldexp(8.0f + mantissa, exponent - 18) : std::ldexp(1.0f * mantissa, -17);
        lanes[i] = p[i] & 128 ? -value : value;
    }
    return load(lanes);
}
inline float largest(F16 x) {
    float lanes[16];
    store(lanes, x);
    return *std::max_element(lanes, lanes + 16);
}
inline F16 sums(const F16 a[16]) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = sum(a[i]);
    return load(lanes);
}
inline void store_sums(float* out, const F16 a[8]) {
    for (int i = 0; i < 8; ++i) out[i] = sum(a[i]);
}
inline void store_bytes(int8_t* p, F16 a) {
    float lanes[16];
    store(lanes, a);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(std::min(std::max(lanes[i], -127.0f), 127.0f));
}

#if BENTHIC_AVX2
inline __m256 widen_e4m3(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    // Normal numbers: the exponent moves in place. Subnormal ones: their mantissa is a whole number of 2^-17.
    const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi32(127));
    const __m256i bits = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(112 << 23));
    const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(1.0f / (1 << 17)));
    const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
    const __m256 value = _mm256_blendv_ps(_mm256_castsi256_ps(bits), small, _mm256_castsi256_ps(is_small));
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(wide, 31), 31);
    return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
}
inline F16 load_e4m3(const uint8_t* p) { return {widen_e4m3(p), widen_e4m3(p + 8)}; }
#else
inline F16 load_e4m3(const uint8_t* p) { return load_e4m3_n(p, kLanes); }
#endif

#endif

// exp(x) to about one unit in the last place: 2^round(x / ln 2) times a polynomial of the remainder (Cephes'
// coefficients). Below -87 it is 0; NaN stays NaN.
inline F16 exp(F16 x) {
    // The bound goes second: the instruction then gives x if that is NaN.
    const F16 bounded = min(splat(88.0f), max(splat(-87.0f), x));
    const F16 n = round(bounded * splat(1.44269504088896341f));
    const F16 r = (bounded - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
    F16 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    return where_not_less(splat(-87.0f), x, zero(), power_of_two(n) * p);
}

inline F16 sigmoid(F16 x) { return splat(1.0f) / (splat(1.0f) + exp(zero() - x)); }

}  // namespace benthic
