// E4M3 numbers by the rules of benthic/precision/blocks.py, bit for bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace benthic {

constexpr float kE4m3Most = 448.0f;
constexpr float kE4m3Unit = 256.0f;  // what load_e4m3 gives is that much smaller

inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
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

// What a number is worth, exactly. Without branches, as above.
inline float from_e4m3(uint8_t number) {
    const uint32_t magnitude = number & 0x7f, sign = static_cast<uint32_t>(number & 0x80) << 24;
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    // The subnormals' 3 bits, as the mantissa of a number between 2^-6 and 2^-5.
    const float small = float_of(normal + (1u << 23)) - 0.015625f;
    const uint32_t finite = magnitude < 8 ? bits_of(small) : normal;
    return float_of((magnitude == 0x7f ? 0x7fc00000 : finite) | sign);
}

// The scale that makes the largest number of a block 448, from the bits of that number's magnitude.
inline float e4m3_scale(uint32_t most_bits) {
    const float scale = float_of(most_bits) / kE4m3Most;
    if (most_bits == 0) return 1.0f;
    return scale < 1.17549435e-38f ? 1.17549435e-38f : scale;  // the smallest normal number; NaN stays
}

// Numbers over their scale, such that the largest becomes 448; the scale. One that is not finite makes the scale so.
inline float quantise_e4m3(const float* x, int64_t n, uint8_t* out) {
    uint32_t top = 0;  // magnitudes are ordered as their bits are, and NaN comes last
    for (int64_t i = 0; i < n; ++i) top = std::max(top, bits_of(x[i]) & 0x7fffffff);
    const float scale = e4m3_scale(top);
    for (int64_t i = 0; i < n; ++i) out[i] = to_e4m3(x[i] / scale);
    return scale;
}

}  // namespace benthic
