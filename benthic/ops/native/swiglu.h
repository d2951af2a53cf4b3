// One row of weighted SwiGLU and its gradient; shared by the dense layer and the routed experts.
#pragma once

#include "common.h"

namespace benthic {

// out = weight * silu(gate) * up, where a row of gate_up holds the gate's f numbers, then the up's.
inline void swiglu_row(const float* __restrict gate_up, float weight, float* __restrict out, int64_t f) {
    const float *gate = gate_up, *up = gate_up + f;
#pragma omp simd
    for (int64_t i = 0; i < f; ++i) out[i] = weight * gate[i] * sigmoid(gate[i]) * up[i];
}

// Gradients of swiglu_row; also writes its output again and returns the weight's gradient.
inline float swiglu_row_backward(const float* __restrict gate_up, float weight, const float* __restrict dout,
                                 float* __restrict out, float* __restrict dgate_up, int64_t f) {
    const float *gate = gate_up, *up = gate_up + f;
    float dweight = 0.0f;
#pragma omp simd reduction(+ : dweight)
    for (int64_t i = 0; i < f; ++i) {
        const float s = sigmoid(gate[i]), silu = gate[i] * s, activated = silu * up[i], d = dout[i] * weight;
        out[i] = weight * activated;
        dweight += dout[i] * activated;
        dgate_up[i] = d * up[i] * (s + silu * (1.0f - s));
        dgate_up[f + i] = d * silu;
    }
    return dweight;
}

}  // namespace benthic
