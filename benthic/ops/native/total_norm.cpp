// The squared norm of gradients, at the speed of memory.

#include "common.h"

using namespace benthic;

namespace {

// parts (ceil(n / block)) get the sum of squares of each block of x (n): what is summed with what does not depend on
// the number of threads.
template <typename T>
void sums_of_squares(const T* x, double* parts, int64_t n, int64_t block) {
    const int64_t blocks = (n + block - 1) / block;
#pragma omp parallel for schedule(static) if (blocks > 1)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t end = std::min(n, (b + 1) * block);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = b * block; i < end; ++i) {
            const float v = x[i];
            sum += v * v;
        }
        parts[b] = sum;
    }
}

}  // namespace

#define ARGS(T) (const T* x, double* parts, int64_t n, int64_t block)
BENTHIC_EXPORT(sums_of_squares, ARGS, (x, parts, n, block))
#undef ARGS
