// Numbers rounded to E4M3 by the rule of benthic/precision/blocks.py, bit for bit.
#pragma once

#include "simd.h"

namespace benthic {

constexpr float kE4m3Most = 448.0f;
constexpr float kE4m3Unit = 256.0f;  // what load_e4m3 gives is that much smaller

inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}

// To nearest, ties to even; of magnitudes below 464 and NaN. Without branches, so that compilers vectorise loops of it.
inline uint8_t to_e4m3(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
    // The exponent's bias falls from 127 to 7, and of 23 bits of the mantissa 3 stay.
    const uint32_t normal = (magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
    // Below 2^-6 numbers are multiples of 2^-9, which is what remains of a mantissa beside 2^14.
    constexpr float kMagic = 16384.0f;
    const uint32_t small = bits_of(std::fabs(x) + kMagic) - bits_of(kMagic);
    const uint32_t finite = magnitude < (121u << 23) ? small : normal;
    return static_cast<uint8_t>((magnitude > 0x7f800000 ? 0x7f : finite) | (bits >> 24 & 0x80));
}

// Numbers over their scale, such that the largest becomes 448; the scale. One that is not finite makes the scale so.
inline float quantise_e4m3(const float* x, int64_t n, uint8_t* out) {
    uint32_t top = 0;  // magnitudes are ordered as their bits are, and NaN comes last
    for (int64_t i = 0; i < n; ++i) top = std::max(top, bits_of(x[i]) & 0x7fffffff);
    float most;
    std::memcpy(&most, &top, sizeof most);
    float scale = most / kE4m3Most;
    if (top == 0) scale = 1.0f;
    else if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
    for (int64_t i = 0; i < n; ++i) out[i] = to_e4m3(x[i] / scale);
    return scale;
}

}  // namespace benthic
