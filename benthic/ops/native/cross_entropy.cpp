// Softmax cross-entropy over rows of logits, turned into their gradient where they lie.

#include "common.h"

using namespace benthic;

namespace {

// logits (n, v) become scale * (softmax - one-hot), or zeros where target is `ignore`; nats (n) gets the losses. A
// target that is no token gives NaN, which stops whatever is computed from it.
template <typename T>
void cross_entropy_rows(T* logits, const int64_t* target, double* nats, int64_t n, int64_t v, int64_t ignore,
                        float scale) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
        T* x = logits + row * v;
        if (target[row] == ignore) {
            nats[row] = 0.0;
            std::memset(x, 0, v * sizeof(T));
            continue;
        }
        if (target[row] < 0 || target[row] >= v) {
            nats[row] = NAN;
            std::fill(x, x + v, T(NAN));
            continue;
        }
        float* e = product(x, 0, v);
        const float top = maximum(x, v, -INFINITY);
        const float wanted = x[target[row]];
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < v; ++i) {
            e[i] = fast_exp(static_cast<float>(x[i]) - top);
            sum += e[i];
        }
        nats[row] = std::log(static_cast<double>(sum)) + top - wanted;
        const float factor = scale / sum;
        const float chosen = e[target[row]] * factor - scale;
#pragma omp simd
        for (int64_t i = 0; i < v; ++i) x[i] = e[i] * factor;
        x[target[row]] = chosen;
    }
}

}  // namespace

#define ARGS(T) (T* logits, const int64_t* target, double* nats, int64_t n, int64_t v, int64_t ignore, float scale)
BENTHIC_EXPORT(cross_entropy_rows, ARGS, (logits, target, nats, n, v, ignore, scale))
#undef ARGS
