// A factor of a matrix product, as the kernels that multiply see it (amx.cpp, vector_gemm.cpp).
#pragma once

#include <cstdint>

namespace benthic {

// Lines of k numbers: number (line, k) lies at line * line_stride + k * k_stride; one stride is 1.
template <typename T>
struct FactorOf {
    const T* data;
    int64_t lines, line_stride, k_stride;
    bool along_k() const { return k_stride == 1; }
    FactorOf from(int64_t line, int64_t k) const {
        return {data + line * line_stride + k * k_stride, lines - line, line_stride, k_stride};
    }
};
using Factor = FactorOf<float>;

}  // namespace benthic
