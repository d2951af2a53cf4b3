// Softmax cross-entropy over rows of logits, turned into their gradient where they lie.

#include "common.h"

using namespace benthic;

extern "C" {

// logits (n, v) become scale * (softmax - one-hot), or zeros where target is `ignore`; nats (n) gets the losses.
void cross_entropy_rows(float* logits, const int64_t* target, double* nats, int64_t n, int64_t v, int64_t ignore,
                        float scale) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
        float* x = logits + row * v;
        if (target[row] == ignore) {
            nats[row] = 0.0;
            std::memset(x, 0, v * sizeof(float));
            continue;
        }
        float top = x[0];
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < v; ++i) top = std::max(top, x[i]);
        const float wanted = x[target[row]];
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < v; ++i) {
            x[i] = fast_exp(x[i] - top);
            sum += x[i];
        }
        nats[row] = std::log(static_cast<double>(sum)) + top - wanted;
        const float factor = scale / sum;
#pragma omp simd
        for (int64_t i = 0; i < v; ++i) x[i] *= factor;
        x[target[row]] -= scale;
    }
}

}  // extern "C"
