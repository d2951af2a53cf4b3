// E4M3 numbers with a scale for each block of them: benthic/precision/blocks.py in one pass over memory, bit for bit.
//
// Rows of n columns come in groups, each with blocks of its own, height x width from its first row on. Where group g
// begins, `offsets` says; without, each has `rows` rows. Scales lie in order, a row of them for a row of blocks.

#include <utility>
#include <vector>

#include "../common.h"
#include "../e4m3.h"

using namespace benthic;

namespace {

constexpr int64_t kColumns = 512;            // of a row of blocks at a time, so that they stay in a core's cache
constexpr int64_t kWorthSharing = 1 << 16;  // numbers, from which on threads share the work

// First and last row of every row of blocks.
std::vector<std::pair<int64_t, int64_t>> rows_of_blocks(const int64_t* offsets, int64_t groups, int64_t rows,
                                                        int64_t height) {
    std::vector<std::pair<int64_t, int64_t>> found;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t end = offsets ? offsets[g + 1] : (g + 1) * rows;
        for (int64_t at = offsets ? offsets[g] : g * rows; at < end; at += height)
            found.emplace_back(at, std::min(at + height, end));
    }
    return found;
}

float next_power_of_two(float scale) {
    constexpr uint32_t fraction = (1u << 23) - 1;
    return std::isnan(scale) ? scale : float_of((bits_of(scale) + fraction) & ~fraction);
}

// The blocks of `columns` columns; each column's scale is left in scale_of.
template <typename T>
void scales_of(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, bool powers_of_two,
               float* scales, float* scale_of) {
    uint32_t* top = scratch<uint32_t>(0, columns);  // magnitudes are ordered as their bits are, and NaN comes last
    std::fill(top, top + columns, 0u);
    for (int64_t r = 0; r < rows; ++r) {
        const T* row = x + r * stride;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i)
            top[i] = std::max(top[i], bits_of(static_cast<float>(row[i])) & 0x7fffffff);
    }
    for (int64_t at = 0; at < columns; at += width) {
        const int64_t end = std::min(at + width, columns);
        uint32_t most = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = at; i < end; ++i) most = std::max(most, top[i]);
        float scale = e4m3_scale(most);
        if (powers_of_two) scale = next_power_of_two(scale);
        *scales++ = scale;
        std::fill(scale_of + at, scale_of + end, scale);
    }
}

template <typename T>
void quantise(const T* x, int64_t stride, const int64_t* offsets, int64_t groups, int64_t rows, int64_t n,
              int64_t height, int64_t width, int64_t powers_of_two, uint8_t* out, float* scales) {
    const auto parts = rows_of_blocks(offsets, groups, rows, height);
    const int64_t step = std::max<int64_t>(1, kColumns / width) * width, blocks = (n + width - 1) / width;
    const int64_t total = parts.empty() ? 0 : parts.back().second * n;
#pragma omp parallel for schedule(static) if (total > kWorthSharing)
    for (size_t p = 0; p < parts.size(); ++p) {
        const auto [begin, end] = parts[p];
        for (int64_t at = 0; at < n; at += step) {
            const int64_t columns = std::min(step, n - at);
            float* scale_of = scratch<float>(0, columns);
            scales_of(x + begin * stride + at, stride, end - begin, columns, width, powers_of_two != 0,
                      scales + p * blocks + at / width, scale_of);
            for (int64_t r = begin; r < end; ++r) {
                const T* row = x + r * stride + at;
                uint8_t* to = out + r * n + at;
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) to[i] = to_e4m3(static_cast<float>(row[i]) / scale_of[i]);
            }
        }
    }
}

}  // namespace

#define PARAMETERS(T) (const T* x, int64_t stride, const int64_t* offsets, int64_t groups, int64_t rows, int64_t n,  \
                       int64_t height, int64_t width, int64_t powers_of_two, uint8_t* out, float* scales)
#define ARGUMENTS (x, stride, offsets, groups, rows, n, height, width, powers_of_two, out, scales)
BENTHIC_EXPORT(quantise, PARAMETERS, ARGUMENTS)
extern "C" void quantise_f64 PARAMETERS(double) { quantise<double> ARGUMENTS; }

// Each number times its scale, rounded to fp32 once; groups have `rows` rows.
extern "C" void dequantise(const uint8_t* x, int64_t stride, int64_t groups, int64_t rows, int64_t n, int64_t height,
                           int64_t width, const float* scales, float* out) {
    const auto parts = rows_of_blocks(nullptr, groups, rows, height);
    const int64_t blocks = (n + width - 1) / width;
#pragma omp parallel for schedule(static) if (groups * rows * n > kWorthSharing)
    for (size_t p = 0; p < parts.size(); ++p) {
        float* scale_of = scratch<float>(0, n);
        for (int64_t b = 0; b < blocks; ++b)
            std::fill(scale_of + b * width, scale_of + std::min((b + 1) * width, n), scales[p * blocks + b]);
        for (int64_t r = parts[p].first; r < parts[p].second; ++r) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) out[r * n + i] = from_e4m3(x[r * stride + i]) * scale_of[i];
        }
    }
}
