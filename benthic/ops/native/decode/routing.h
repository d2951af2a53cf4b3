// Which experts a token visits, and with what weight: the choice of benthic/ops/routing.py.
#pragma once

#include <vector>

#include "../simd.h"

namespace benthic {

struct Choice {
    int32_t expert;
    float gate;
};

struct RoutingRule {
    int64_t experts, groups, top_groups, top_k, normalise;
    float scale;
};

// The `count` largest of n numbers whose `out_of_reach` is not set, in falling order; of equals the first.
inline void take_largest(const float* x, int64_t n, std::vector<char>& out_of_reach, int64_t count, int64_t* taken) {
    for (int64_t k = 0; k < count; ++k) {
        int64_t best = -1;
        for (int64_t i = 0; i < n; ++i)
            if (!out_of_reach[i] && (best < 0 || x[i] > x[best])) best = i;
        out_of_reach[best] = 1;
        taken[k] = best;
    }
}

// Memory that routing works in.
struct RoutingRoom {
    std::vector<float> biased, together;
    std::vector<char> out_of_reach, passed;
    std::vector<int64_t> taken;
};

// `logits` has room for a multiple of 16; afterwards it holds the scores.
inline void route(const RoutingRule& rule, float* logits, const float* bias, RoutingRoom& room, Choice* choice) {
    const int64_t experts = rule.experts, size = experts / rule.groups;
    auto& [biased, together, out_of_reach, passed, taken] = room;
    biased.resize(experts);
    out_of_reach.assign(experts, 0);
    taken.resize(std::max(rule.top_k, rule.groups));
    for (int64_t e = 0; e < experts; e += kLanes) store(logits + e, sigmoid(load(logits + e)));
    for (int64_t e = 0; e < experts; ++e) biased[e] = logits[e] + bias[e];
    if (rule.top_groups < rule.groups) {
        together.assign(rule.groups, 0.0f);
        passed.assign(rule.groups, 0);
        for (int64_t g = 0; g < rule.groups; ++g) {
            int64_t best[2];
            const int64_t two = std::min<int64_t>(2, size);
            take_largest(biased.data() + g * size, size, out_of_reach, two, best);
            std::fill_n(out_of_reach.begin(), size, 0);
            for (int64_t i = 0; i < two; ++i) together[g] += biased[g * size + best[i]];
        }
        take_largest(together.data(), rule.groups, passed, rule.top_groups, taken.data());
        for (int64_t e = 0; e < experts; ++e) out_of_reach[e] = !passed[e / size];
    }
    take_largest(biased.data(), experts, out_of_reach, rule.top_k, taken.data());
    float total = 0.0f;
    for (int64_t k = 0; k < rule.top_k; ++k) total += logits[taken[k]];
    for (int64_t k = 0; k < rule.top_k; ++k) {
        const float gate = rule.normalise ? logits[taken[k]] / (total + 1e-20f) : logits[taken[k]];
        choice[k] = {static_cast<int32_t>(taken[k]), gate * rule.scale};
    }
}

}  // namespace benthic
