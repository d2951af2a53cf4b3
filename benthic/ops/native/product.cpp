// One large product on all threads, each of which takes a part of the longer side.

#include "common.h"

using namespace benthic;

namespace {

// c (m, n), always fp32, = a b, or c += a b. A factor whose first dimension is the dense one lies `across`. The BLAS has
// threads of its own.
template <typename T>
void product(const T* a, int64_t across_a, int64_t lda, const T* b, int64_t across_b, int64_t ldb, float* c,
             int64_t ldc, int64_t m, int64_t n, int64_t k, int64_t add, int64_t units) {
    constexpr int64_t grain = 32;
    const char trans_a = across_a ? 'T' : 'N', trans_b = across_b ? 'T' : 'N';
    if (units == kBlas) return gemm(trans_a, trans_b, m, n, k, 1.0f, a, lda, b, ldb, add ? 1.0f : 0.0f, c, ldc);
    const bool by_rows = m >= n;
    const int64_t grains = ((by_rows ? m : n) + grain - 1) / grain;
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t from = grains * thread / threads * grain;
        const int64_t to = std::min(grains * (thread + 1) / threads * grain, by_rows ? m : n);
        if (from < to) {
            if (by_rows)
                gemm(units, trans_a, trans_b, to - from, n, k, 1.0f, a + from * (across_a ? 1 : lda), lda, b, ldb,
                     add ? 1.0f : 0.0f, c + from * ldc, ldc);
            else
                gemm(units, trans_a, trans_b, m, to - from, k, 1.0f, a, lda, b + from * (across_b ? ldb : 1), ldb,
                     add ? 1.0f : 0.0f, c + from, ldc);
        }
    }
}

}  // namespace

#define ARGS(T) (const T* a, int64_t across_a, int64_t lda, const T* b, int64_t across_b, int64_t ldb, float* c,       \
                 int64_t ldc, int64_t m, int64_t n, int64_t k, int64_t add, int64_t units)
BENTHIC_EXPORT(product, ARGS, (a, across_a, lda, b, across_b, ldb, c, ldc, m, n, k, add, units))
#undef ARGS
