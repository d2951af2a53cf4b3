// One row of weighted SwiGLU and its gradient; shared by the dense layer and the routed experts.
#pragma once

#include "common.h"

namespace benthic {

// out = weight * silu(gate) * up, where a row of gate_up holds the gate's f numbers, then the up's.
template <typename G, typename T>
void swiglu_row(const G* __restrict gate_up, float weight, T* __restrict out, int64_t f) {
#pragma omp simd
    for (int64_t i = 0; i < f; ++i) {
        const float gate = gate_up[i], up = gate_up[f + i];
        out[i] = weight * gate * sigmoid(gate) * up;
    }
}

// Gradients of swiglu_row; also writes its output again and returns the weight's gradient.
template <typename G, typename D, typename T>
float swiglu_row_backward(const G* __restrict gate_up, float weight, const D* __restrict dout, T* __restrict out,
                          T* __restrict dgate_up, int64_t f) {
    float dweight = 0.0f;
#pragma omp simd reduction(+ : dweight)
    for (int64_t i = 0; i < f; ++i) {
        const float gate = gate_up[i], up = gate_up[f + i], dhidden = dout[i];
        const float s = sigmoid(gate), silu = gate * s, activated = silu * up, d = dhidden * weight;
        out[i] = weight * activated;
        dweight += dhidden * activated;
        dgate_up[i] = d * up * (s + silu * (1.0f - s));
        dgate_up[f + i] = d * silu;
    }
    return dweight;
}

}  // namespace benthic
