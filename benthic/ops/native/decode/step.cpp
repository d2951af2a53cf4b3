// A decode step, all layers in one call. Each phase is shared out among the threads, with a barrier after it; what is
// too small to share, norms and routing among it, every thread does for itself.
//
// b sequence, h head, k place of a chosen expert among those of its token.

#include <chrono>
#include <numeric>
#include <utility>

#include "attention.h"
#include "matrix.h"
#include "model.h"
#include "openmp.h"
#include "routing.h"
#include "team.h"

namespace benthic {

namespace {

// Zeros at first; grows, forgetting what it held.
class Buffer {
   public:
    float* of(int64_t count) {
        if (count > size_) {
            storage_.assign(count + 16, 0.0f);
            size_ = count;
        }
        return data();
    }
    float* data() { return reinterpret_cast<float*>(round_up(reinterpret_cast<int64_t>(storage_.data()), 64)); }

   private:
    std::vector<float> storage_;
    int64_t size_ = 0;
};

int64_t padded(int64_t width) { return round_up(width, kPanelColumns); }

// A matrix of the stack, the vectors it is multiplied with, and where each product goes.
struct Product {
    const Matrix* matrix;
    int64_t index;
    const Vectors* x;
    const int32_t* which;
    int64_t count;
    float* const* out;
};

struct Active {  // an expert that somebody chose, and where its tokens begin among those of all experts
    int32_t expert, begin, count;
};

// What all threads see.
struct Shared {
    Buffer q_a, kv_a, q, query, parts, latent, mixed, attention, logits, dense_hidden, shared_hidden, hidden, ffn, head;
};

// What a thread has for itself.
struct Local {
    Buffer x, joined, normed, q_normed, nope, gate, up, wide, partial;
    Vectors joined_input, input, q_input, nope_input, latent_input, mixed_input, hidden_input, shared_input;
    std::vector<int32_t> one_to_one, by_head;
    std::vector<float*> out;
    std::vector<Product> products;
    std::vector<float> scores;
    std::vector<Choice> choice;
    RoutingRoom routing;
    std::vector<Active> active;
    std::vector<int32_t> list_of, tokens, slots;  // of each expert its place in `active`, or -1; of the active ones
};

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
    F16 squares = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        const F16 v = load_n(x + i, n - i);
        squares = fma(v, v, squares);
    }
    const F16 scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += kLanes)
        store_n(out + i, load_n(weight + i, n - i) * (load_n(x + i, n - i) * scale), n - i);
}

// Pairs (0, 1), (2, 3), ... turned by the angles of a position.
void rotate(const float* x, const float* cos, const float* sin, int64_t width, float scale, float* out) {
    for (int64_t i = 0; i < width / 2; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = scale * (a * cos[i] - b * sin[i]);
        out[2 * i + 1] = scale * (b * cos[i] + a * sin[i]);
    }
}

// Numbers [i, i + 16), as far as there are any; others are `rest`.
F16 load_or(const float* x, int64_t i, int64_t n, float rest) {
    if (i + kLanes <= n) return load(x + i);
    float lanes[kLanes];
    std::fill_n(lanes, kLanes, rest);
    std::copy(x + i, x + n, lanes);
    return load(lanes);
}

// The index of the first of the largest numbers; 0 if none is larger than minus infinity.
int64_t first_largest(const float* x, int64_t n) {
    constexpr int64_t kStretch = 256;  // looked through number by number only if the largest lies there
    float top = -INFINITY;
    int64_t where = 0;
    for (int64_t from = 0; from < n; from += kStretch) {
        F16 most = splat(-INFINITY);
        for (int64_t i = from; i < std::min(from + kStretch, n); i += kLanes) most = max(load_or(x, i, n, -INFINITY), most);
        const float here = largest(most);
        if (here > top) {
            top = here;
            where = from;
        }
    }
    for (int64_t i = where; i < n; ++i)
        if (x[i] == top) return i;
    return 0;
}

// The logarithm of the sum of exp(x - top); not finite if a number is NaN or plus infinity.
float log_sum(const float* x, int64_t n, float top) {
    F16 total = zero();
    for (int64_t i = 0; i < n; i += kLanes) total = total + exp(load_or(x, i, n, -INFINITY) - splat(top));
    return std::log(sum(total));
}

class Step {
   public:
    Step(const Model& model, const Request& request, Shared& shared, std::vector<Local>& locals)
        : m_(model), r_(request), s_(shared), locals_(locals),
          shape_{model.heads, model.c, model.c + model.rope}, parts_begin_(request.batch + 1, 0) {
        for (int64_t b = 0; b < r_.batch; ++b)
            parts_begin_[b + 1] = parts_begin_[b] + AttentionShape::parts(r_.positions[b] + 1);
        reserve();
    }

    void operator()(Worker& worker) {
        Local& mine = locals_[worker.index];
        prepare(mine);
        begin(worker, mine);
        for (int64_t layer = r_.first; layer < r_.last; ++layer) {
            attend(worker, mine, m_.layers[layer], layer);
            feed_forward(worker, mine, m_.layers[layer], layer);
        }
        finish(worker, mine);
    }

   private:
    // Grow what all threads see, before they start.
    void reserve() {
        const int64_t batch = r_.batch;
        s_.q_a.of(batch * padded(m_.q_rank));
        s_.kv_a.of(batch * padded(shape_.l));
        s_.q.of(batch * padded(m_.heads * (m_.nope + m_.rope)));
        s_.query.of(batch * shape_.groups() * kHeads * shape_.l_stride());
        s_.parts.of(parts_begin_[batch] * shape_.part_size());
        s_.latent.of(batch * m_.heads * padded(m_.c));
        s_.mixed.of(batch * padded(m_.heads * m_.value));
        s_.attention.of(batch * padded(m_.width));
        s_.ffn.of(batch * padded(m_.width));
        if (r_.logits == nullptr && r_.best != nullptr) s_.head.of(head_count() * head().rows);
        for (int64_t layer = r_.first; layer < r_.last; ++layer) {
            const Layer& l = m_.layers[layer];
            (l.sparse() ? s_.shared_hidden : s_.dense_hidden).of(batch * padded(l.gate_up.rows));
            if (!l.sparse()) continue;
            s_.logits.of(batch * padded(l.router.rows));
            s_.hidden.of(batch * m_.top_k * padded(l.expert_gate_up.rows));
        }
    }

    void prepare(Local& mine) {
        mine.one_to_one.resize(std::max<int64_t>(r_.batch * m_.top_k, r_.batch));
        std::iota(mine.one_to_one.begin(), mine.one_to_one.end(), 0);
        mine.by_head.resize(r_.batch * m_.heads);
        for (int64_t h = 0; h < m_.heads; ++h)
            for (int64_t b = 0; b < r_.batch; ++b)
                mine.by_head[h * r_.batch + b] = static_cast<int32_t>(b * m_.heads + h);
        mine.x.of(r_.batch * padded(m_.width));
        const auto own = [&](Vectors& v, Buffer& buffer, int64_t count, int64_t width) {
            v.numbers = buffer.of(count * padded(width));
            v.stride = padded(width);
        };
        own(mine.input, mine.normed, r_.batch, m_.width);
        own(mine.q_input, mine.q_normed, r_.batch, m_.q_rank);
        own(mine.nope_input, mine.nope, r_.batch * m_.heads, m_.nope);
        own(mine.latent_input, s_.latent, r_.batch * m_.heads, m_.c);
        own(mine.mixed_input, s_.mixed, r_.batch, m_.heads * m_.value);
        mine.wide.of(kPage * shape_.l);
    }

    float* x(Local& mine, int64_t b) { return mine.x.data() + b * padded(m_.width); }

    void embed(int64_t b, float* to) const {
        if (m_.embed.kind == Kind::fp32) {
            std::copy_n(reinterpret_cast<const float*>(m_.embed.data) + r_.tokens[b] * m_.width, m_.width, to);
        } else {
            const auto* from = reinterpret_cast<const uint16_t*>(m_.embed.data) + r_.tokens[b] * m_.width;
            for (int64_t i = 0; i < m_.width; ++i) to[i] = from_bf16(from[i]);
        }
    }

    // What enters the first layer.
    void begin(Worker& worker, Local& mine) {
        for (int64_t b = 0; b < r_.batch; ++b) embed(b, x(mine, b));
        if (r_.previous == nullptr) return;
        const Layer& l = m_.layers[r_.first];
        const int64_t stride = padded(2 * m_.width);
        mine.joined_input.numbers = mine.joined.of(r_.batch * stride);
        mine.joined_input.stride = stride;
        for (int64_t b = 0; b < r_.batch; ++b) {
            float* to = mine.joined.data() + b * stride;
            rms_norm(x(mine, b), l.embed_norm, m_.eps, m_.width, to);
            rms_norm(r_.previous + b * m_.width, l.hidden_norm, m_.eps, m_.width, to + m_.width);
        }
        if (l.project.in_panels()) mine.joined_input.quantise(r_.batch);
        new_plan(mine);
        plan(mine, l.project, mine.joined_input, s_.attention, padded(m_.width));
        run_plan(worker, mine, nullptr);
        for (int64_t b = 0; b < r_.batch; ++b)
            std::copy_n(s_.attention.data() + b * padded(m_.width), m_.width, x(mine, b));
    }

    // Normalise the stream into this thread's input, rounded to int8 if a matrix asks for it.
    void norm_input(Local& mine, const float* weight, bool quantised) {
        for (int64_t b = 0; b < r_.batch; ++b)
            rms_norm(x(mine, b), weight, m_.eps, m_.width, mine.input.numbers + b * mine.input.stride);
        if (quantised) mine.input.quantise(r_.batch);
    }

    void add_to_stream(Local& mine, Buffer& what) {
        for (int64_t b = 0; b < r_.batch; ++b) {
            float* to = x(mine, b);
            const float* from = what.data() + b * padded(m_.width);
            for (int64_t i = 0; i < m_.width; ++i) to[i] += from[i];
        }
    }

    // Plan a product of all sequences' vectors with one matrix, going to rows `stride` apart.
    void plan(Local& mine, const Matrix& matrix, const Vectors& vectors, Buffer& to, int64_t stride) {
        for (int64_t b = 0; b < r_.batch; ++b) mine.out.push_back(to.data() + b * stride);
        mine.products.push_back({&matrix, 0, &vectors, mine.one_to_one.data(), r_.batch, nullptr});
    }

    void new_plan(Local& mine) {
        mine.out.clear();
        mine.products.clear();
    }

    // Where a thread begins to read in a phase of this one matrix.
    static const char* begin_of(const Worker& worker, const Matrix& matrix) {
        return matrix.rows ? matrix.at(0, worker.begin_of(matrix.blocks())) : nullptr;
    }

    static int64_t grain(int64_t bytes) { return std::max<int64_t>(1, kGrainBytes / bytes); }

    // Compute what was planned; its outputs are consecutive in mine.out.
    void run_plan(Worker& worker, Local& mine, const char* next) {
        int64_t units = 0, used = 0;
        for (Product& p : mine.products) {
            p.out = mine.out.data() + used;
            used += p.count;
            units += p.matrix->blocks();
        }
        const int64_t own_end = units * (worker.index + 1) / worker.threads;
        worker.share(units, grain(mine.products[0].matrix->block_bytes()), [&](int64_t first, int64_t last) {
            int64_t begin = 0;
            for (const Product& p : mine.products) {
                const int64_t blocks = p.matrix->blocks(), low = std::max(first, begin) - begin,
                              high = std::min(last, begin + blocks) - begin;
                if (low < high) {
                    const char* after = begin + high == own_end ? next : p.matrix->at(p.index, high);
                    multiply(*p.matrix, p.index, low, high, *p.x, p.which, p.count, p.out, after);
                }
                begin += blocks;
            }
        });
    }

    void attend(Worker& worker, Local& mine, const Layer& l, int64_t layer) {
        project(worker, mine, l);
        write_cache(worker, mine, l, layer);
        approach_cache(worker, layer);
        absorb(worker, mine, l);
        read_cache(worker, mine, layer);
        const int64_t batch = r_.batch;
        worker.share(batch * m_.heads, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t b = i / m_.heads, begin = parts_begin_[b], count = parts_begin_[b + 1] - begin;
                join_parts(shape_, s_.parts.data() + begin * shape_.part_size(), count, i % m_.heads,
                           mine.latent_input.numbers + i * mine.latent_input.stride);
            }
        });
        if (l.value.in_panels()) mine.latent_input.quantise(batch * m_.heads);
        new_plan(mine);
        for (int64_t h = 0; h < m_.heads; ++h) {
            for (int64_t b = 0; b < batch; ++b)
                mine.out.push_back(s_.mixed.data() + b * mine.mixed_input.stride + h * m_.value);
            mine.products.push_back({&l.value, h, &mine.latent_input, &mine.by_head[h * batch], batch, nullptr});
        }
        run_plan(worker, mine, begin_of(worker, l.o));
        if (l.o.in_panels()) mine.mixed_input.quantise(batch);
        new_plan(mine);
        plan(mine, l.o, mine.mixed_input, s_.attention, padded(m_.width));
        run_plan(worker, mine, begin_of(worker, l.gate_up));
        add_to_stream(mine, s_.attention);
    }

    // Queries, and what the cache will keep.
    void project(Worker& worker, Local& mine, const Layer& l) {
        const Matrix& q_first = l.q_a.rows ? l.q_a : l.q_b;
        norm_input(mine, l.attention_norm, l.kv_a.in_panels() || q_first.in_panels());
        new_plan(mine);
        plan(mine, q_first, mine.input, l.q_a.rows ? s_.q_a : s_.q, padded(q_first.rows));
        plan(mine, l.kv_a, mine.input, s_.kv_a, padded(shape_.l));
        run_plan(worker, mine, begin_of(worker, l.q_a.rows ? l.q_b : l.key));
    }

    void write_cache(Worker& worker, Local& mine, const Layer& l, int64_t layer) {
        for (int64_t b = worker.index; b < r_.batch; b += worker.threads) {
            const float* latent = s_.kv_a.data() + b * padded(shape_.l);
            const int64_t position = r_.positions[b], angle = position * (m_.rope / 2);
            float* row = mine.wide.data();
            rms_norm(latent, l.kv_norm, m_.latent_eps, m_.c, row);
            rotate(latent + m_.c, r_.cos + angle, r_.sin + angle, m_.rope, 1.0f, row + m_.c);
            pages(layer).write(table(b), position, row);
        }
        if (!l.q_a.rows) return;
        for (int64_t b = 0; b < r_.batch; ++b)
            rms_norm(s_.q_a.data() + b * padded(m_.q_rank), l.q_norm, m_.latent_eps, m_.q_rank,
                     mine.q_input.numbers + b * mine.q_input.stride);
        if (l.q_b.in_panels()) mine.q_input.quantise(r_.batch);
        new_plan(mine);
        plan(mine, l.q_b, mine.q_input, s_.q, padded(l.q_b.rows));
        run_plan(worker, mine, begin_of(worker, l.key));
    }

    // Scaled queries in the latent space, rotary part included.
    void absorb(Worker& worker, Local& mine, const Layer& l) {
        const int64_t batch = r_.batch, heads = shape_.groups() * kHeads, stride = shape_.l_stride();
        new_plan(mine);
        for (int64_t h = 0; h < m_.heads; ++h) {
            for (int64_t b = 0; b < batch; ++b) {
                const float* q = s_.q.data() + b * padded(l.q_b.rows) + h * (m_.nope + m_.rope);
                float* nope = mine.nope_input.numbers + (b * m_.heads + h) * mine.nope_input.stride;
                for (int64_t i = 0; i < m_.nope; ++i) nope[i] = q[i] * m_.softmax_scale;
                float* to = s_.query.data() + (b * heads + h) * stride;
                const int64_t angle = r_.positions[b] * (m_.rope / 2);
                if ((b * m_.heads + h) % worker.threads == worker.index)
                    rotate(q + m_.nope, r_.cos + angle, r_.sin + angle, m_.rope, m_.softmax_scale, to + m_.c);
                mine.out.push_back(to);
            }
            mine.products.push_back({&l.key, h, &mine.nope_input, &mine.by_head[h * batch], batch, nullptr});
        }
        if (l.key.in_panels()) mine.nope_input.quantise(batch * m_.heads);
        run_plan(worker, mine, nullptr);
    }

    // A part of a sequence's cache, counted over all sequences.
    struct Part {
        int64_t b, from, to, length;
    };
    Part part(int64_t unit) const {
        const auto after = std::upper_bound(parts_begin_.begin(), parts_begin_.end(), unit);
        const int64_t b = after - parts_begin_.begin() - 1, length = r_.positions[b] + 1;
        const int64_t rows = AttentionShape::part_rows(length), from = (unit - parts_begin_[b]) * rows;
        return {b, from, std::min(from + rows, length), length};
    }

    void read_cache(Worker& worker, Local& mine, int64_t layer) {
        const int64_t size = shape_.groups() * kHeads * shape_.l_stride();
        worker.share(parts_begin_[r_.batch], 1, [&](int64_t unit, int64_t) {
            const Part p = part(unit);
            attend_part(shape_, pages(layer), table(p.b), p.from, p.to, p.length, s_.query.data() + p.b * size,
                        mine.wide.data(), s_.parts.data() + unit * shape_.part_size());
        });
    }

    // Ask for what this thread will read of the cache first.
    void approach_cache(Worker& worker, int64_t layer) {
        const int64_t units = parts_begin_[r_.batch], first = worker.begin_of(units);
        if (first >= units) return;
        const Part p = part(first);
        Ahead ahead = pages(layer).rest_of_page(table(p.b), p.from, p.length - 1);
        while (ahead.at < ahead.end) ahead.ask();
    }

    void feed_forward(Worker& worker, Local& mine, const Layer& l, int64_t layer) {
        norm_input(mine, l.ffn_norm, l.gate_up.in_panels() || l.expert_gate_up.in_panels());
        own_hidden(mine, l);
        gather_hidden(worker, mine, l);
        if (l.sparse()) {
            choose(mine, l);
            if (r_.experts != nullptr && worker.index == 0) record(mine, layer);
            expert_hidden(worker, mine, l);
            if (l.expert_down.in_panels()) mine.hidden_input.quantise(r_.batch * m_.top_k);
        }
        if (l.down.in_panels()) mine.shared_input.quantise(r_.batch);
        const bool more = layer + 1 < r_.last;
        const Layer* after = more ? &m_.layers[layer + 1] : nullptr;
        project_down(worker, mine, l, begin_of(worker, more ? (after->q_a.rows ? after->q_a : after->q_b) : head()));
        add_to_stream(mine, s_.ffn);
    }

    void own_hidden(Local& mine, const Layer& l) {
        mine.shared_input.numbers = (l.sparse() ? s_.shared_hidden : s_.dense_hidden).data();
        mine.shared_input.stride = padded(l.gate_up.rows);
        mine.hidden_input.numbers = s_.hidden.data();
        mine.hidden_input.stride = padded(l.expert_gate_up.rows);
        mine.gate.of(r_.batch * padded(std::max(l.gate_up.rows, l.expert_gate_up.rows)));
        mine.up.of(r_.batch * padded(std::max(l.gate_up.rows, l.expert_gate_up.rows)));
    }

    // Blocks [first, last) of gate * silu times up of one SwiGLU, into rows of `to`; weights null are 1.
    void hidden_blocks(Local& mine, const Matrix& gate_up, int64_t index, int64_t first, int64_t last,
                       const int32_t* tokens, int64_t count, const char* next, const Vectors& to, const int32_t* slots,
                       const Choice* weights) {
        const int64_t width = padded(gate_up.rows);
        mine.out.clear();
        for (int64_t j = 0; j < 2 * count; ++j)
            mine.out.push_back(j < count ? mine.gate.data() + j * width : mine.up.data() + (j - count) * width);
        multiply(gate_up, 2 * index, first, last, mine.input, tokens, count, mine.out.data(),
                 gate_up.at(2 * index + 1, first));
        multiply(gate_up, 2 * index + 1, first, last, mine.input, tokens, count, mine.out.data() + count, next);
        for (int64_t j = 0; j < count; ++j) {
            const F16 weight = splat(weights ? weights[slots[j]].gate : 1.0f);
            for (int64_t i = first * kBlock; i < std::min(last * kBlock, gate_up.rows); i += kLanes) {
                const F16 gate = load(mine.out[j] + i), up = load(mine.out[count + j] + i);
                store_n(to.numbers + slots[j] * to.stride + i, weight * gate * sigmoid(gate) * up, gate_up.rows - i);
            }
        }
    }

    // The router's logits, and the hidden activations of the dense layer or the shared experts.
    void gather_hidden(Worker& worker, Local& mine, const Layer& l) {
        const int64_t dense = l.gate_up.blocks(), units = dense + l.router.blocks();
        const int64_t bytes = dense ? 2 * l.gate_up.block_bytes() : l.router.block_bytes();
        worker.share(units, grain(bytes), [&](int64_t first, int64_t last) {
            const int32_t* all = mine.one_to_one.data();
            if (first < dense) {
                const int64_t end = std::min(last, dense);
                hidden_blocks(mine, l.gate_up, 0, first, end, all, r_.batch, l.gate_up.at(0, end), mine.shared_input,
                              all, nullptr);
            }
            if (last > dense) {
                mine.out.clear();
                for (int64_t b = 0; b < r_.batch; ++b) mine.out.push_back(s_.logits.data() + b * padded(l.router.rows));
                multiply(l.router, 0, std::max(first, dense) - dense, last - dense, mine.input, all, r_.batch,
                         mine.out.data(), nullptr);
            }
        });
    }

    // Every thread routes for itself, and lists for each expert the tokens that chose it.
    void choose(Local& mine, const Layer& l) {
        const RoutingRule rule{l.router.rows, m_.groups, m_.top_groups, m_.top_k, m_.normalise, m_.gate_scale};
        mine.choice.resize(r_.batch * m_.top_k);
        mine.list_of.assign(l.router.rows, -1);
        mine.active.clear();
        mine.scores.resize(padded(l.router.rows));
        for (int64_t b = 0; b < r_.batch; ++b) {
            const float* logits = s_.logits.data() + b * padded(l.router.rows);
            std::copy_n(logits, padded(l.router.rows), mine.scores.begin());
            route(rule, mine.scores.data(), l.router_bias, mine.routing, &mine.choice[b * m_.top_k]);
        }
        for (const Choice& choice : mine.choice) {
            int32_t& list = mine.list_of[choice.expert];
            if (list < 0) {
                list = static_cast<int32_t>(mine.active.size());
                mine.active.push_back({choice.expert, 0, 0});
            }
            ++mine.active[list].count;
        }
        int32_t begin = 0;
        for (Active& active : mine.active) {
            active.begin = begin;
            begin += std::exchange(active.count, 0);
        }
        mine.tokens.resize(mine.choice.size());
        mine.slots.resize(mine.choice.size());
        for (size_t slot = 0; slot < mine.choice.size(); ++slot) {
            Active& active = mine.active[mine.list_of[mine.choice[slot].expert]];
            const int32_t at = active.begin + active.count++;
            mine.tokens[at] = static_cast<int32_t>(slot / m_.top_k);
            mine.slots[at] = static_cast<int32_t>(slot);
        }
    }

    void record(const Local& mine, int64_t layer) const {
        const auto sparse = [](const Layer& l) { return l.sparse(); };
        const int64_t before = std::count_if(m_.layers + r_.first, m_.layers + layer, sparse);
        const int64_t all = std::count_if(m_.layers + r_.first, m_.layers + r_.last, sparse);
        for (int64_t b = 0; b < r_.batch; ++b)
            for (int64_t k = 0; k < m_.top_k; ++k)
                r_.experts[(b * all + before) * m_.top_k + k] = mine.choice[b * m_.top_k + k].expert;
    }

    void expert_hidden(Worker& worker, Local& mine, const Layer& l) {
        const Matrix& matrix = l.expert_gate_up;
        const int64_t blocks = matrix.blocks(), units = blocks * static_cast<int64_t>(mine.active.size());
        const int64_t own_end = units * (worker.index + 1) / worker.threads;
        worker.share(units, grain(2 * matrix.block_bytes()), [&](int64_t first, int64_t last) {
            for (int64_t at = first; at < last;) {
                const int64_t a = at / blocks, low = at % blocks, high = std::min(blocks, low + last - at);
                const Active& active = mine.active[a];
                at += high - low;
                const char* next = matrix.at(2 * active.expert, high);
                if (high == blocks && at < units) next = matrix.at(2 * mine.active[a + 1].expert, 0);
                if (at == own_end)
                    next = l.expert_down.at(mine.active[0].expert, worker.begin_of(l.expert_down.blocks()));
                hidden_blocks(mine, matrix, active.expert, low, high, &mine.tokens[active.begin], active.count, next,
                              mine.hidden_input, &mine.slots[active.begin], mine.choice.data());
            }
        });
    }

    // The sum over a token's experts, in the order they were chosen, then the shared ones'.
    void project_down(Worker& worker, Local& mine, const Layer& l, const char* next) {
        const Matrix& any = l.sparse() ? l.expert_down : l.down;
        const int64_t stride = padded(m_.width), slots = l.sparse() ? r_.batch * m_.top_k : 0;
        float* partial = mine.partial.of((slots + r_.batch) * stride);
        const int64_t together = any.block_bytes() * (l.sparse() ? static_cast<int64_t>(mine.active.size()) + 1 : 1);
        const int64_t own_end = any.blocks() * (worker.index + 1) / worker.threads;
        worker.share(any.blocks(), grain(together), [&](int64_t first, int64_t last) {
            const auto out_of = [&](auto index, int64_t count) {
                mine.out.clear();
                for (int64_t j = 0; j < count; ++j) mine.out.push_back(partial + index(j) * stride);
                return mine.out.data();
            };
            const int64_t again = l.sparse() ? mine.active[0].expert : 0;
            const char* after = last == own_end ? next : any.at(again, last);
            if (l.sparse()) {
                for (size_t a = 0; a < mine.active.size(); ++a) {
                    const Active& active = mine.active[a];
                    const int32_t* slots_of = &mine.slots[active.begin];
                    const char* then = a + 1 < mine.active.size() ? any.at(mine.active[a + 1].expert, first)
                                       : l.down.rows              ? l.down.at(0, first)
                                                                  : after;
                    multiply(any, active.expert, first, last, mine.hidden_input, slots_of, active.count,
                             out_of([&](int64_t j) { return slots_of[j]; }, active.count), then);
                }
            }
            if (l.down.rows)
                multiply(l.down, 0, first, last, mine.shared_input, mine.one_to_one.data(), r_.batch,
                         out_of([&](int64_t b) { return slots + b; }, r_.batch), after);
            for (int64_t b = 0; b < r_.batch; ++b) {
                float* to = s_.ffn.data() + b * stride;
                for (int64_t i = first * kBlock; i < std::min(last * kBlock, m_.width); i += kLanes) {
                    F16 total = zero();
                    for (int64_t k = 0; k < slots / r_.batch; ++k)
                        total = total + load(partial + (b * m_.top_k + k) * stride + i);
                    store(to + i, l.down.rows ? total + load(partial + (slots + b) * stride + i) : total);
                }
            }
        });
    }

    const Matrix& head() const { return r_.previous && m_.draft_head.rows ? m_.draft_head : m_.head; }
    int64_t head_count() const { return r_.head_rows ? r_.head_count : r_.batch; }

    void finish(Worker& worker, Local& mine) {
        norm_input(mine, r_.norm, head().in_panels());
        if (worker.index == 0)
            for (int64_t b = 0; b < r_.batch; ++b)
                std::copy_n(mine.input[b], m_.width, r_.hidden + b * m_.width);
        if (r_.logits == nullptr && r_.best == nullptr) return;
        float* logits = r_.logits ? r_.logits : s_.head.data();
        const int64_t count = head_count(), vocabulary = head().rows;
        new_plan(mine);
        for (int64_t i = 0; i < count; ++i) mine.out.push_back(logits + i * vocabulary);
        const int32_t* rows = r_.head_rows ? r_.head_rows : mine.one_to_one.data();
        mine.products.push_back({&head(), 0, &mine.input, rows, count, nullptr});
        run_plan(worker, mine, nullptr);
        if (r_.best == nullptr) return;
        worker.share(count, 1, [&](int64_t i, int64_t) {
            const float* x = logits + i * vocabulary;
            r_.best[i] = first_largest(x, vocabulary);
            if (r_.log_sum == nullptr) return;
            r_.peak[i] = x[r_.best[i]];
            r_.log_sum[i] = log_sum(x, vocabulary, r_.peak[i]);
        });
    }

    Pages pages(int64_t layer) const { return {r_.pages[layer], r_.page_kind, shape_.c, shape_.l}; }
    const int32_t* table(int64_t b) const { return r_.table + b * r_.table_stride; }

    static constexpr int64_t kGrainBytes = 128 << 10;

    const Model& m_;
    const Request& r_;
    Shared& s_;
    std::vector<Local>& locals_;
    const AttentionShape shape_;
    std::vector<int64_t> parts_begin_;
};

bool in_range(const Model& model, const Request& r) {
    for (int64_t b = 0; b < r.batch; ++b) {
        if (r.tokens[b] < 0 || r.tokens[b] >= model.embed.rows) return false;
        if (r.positions[b] < 0 || r.positions[b] >= r.angles || r.positions[b] / kPage >= r.table_stride) return false;
        for (int64_t p = 0; p <= r.positions[b] / kPage; ++p) {
            const int32_t page = r.table[b * r.table_stride + p];
            if (page < 0 || page >= r.page_count) return false;
        }
    }
    return true;
}

struct Decoder {
    Model model;
    Team team;
    Shared shared;
    std::vector<Local> locals;

    void run(const Request& request) {
        Step step(model, request, shared, locals);
        team.run(step);
    }

    Decoder(const Model& model, int threads) : model(model), team(threads), locals(threads) {}
};

// An MTP module repeated on its own output: each pass guesses a token more for those sequences that want one.
class Drafts {
   public:
    Drafts(Decoder& decoder, const Request& step, const DraftRequest& ahead)
        : d_(decoder), a_(ahead), r_(step), width_(decoder.model.width), step_rows_(step.batch), tokens_(step.tokens),
          hidden_(ahead.rows * width_), best_(ahead.sequences) {
        r_.batch = a_.rows;
        r_.first = a_.layer;
        r_.last = a_.layer + 1;
        r_.tokens = a_.tokens;
        r_.previous = a_.previous;
        r_.positions = a_.positions;
        r_.norm = a_.norm;
        r_.hidden = hidden_.data();
        r_.head_rows = a_.last;
        r_.head_count = a_.sequences;
        r_.best = best_.data();
        r_.logits = r_.peak = r_.log_sum = nullptr;
        r_.experts = nullptr;
    }

    // Finds each row's pages; false if not all that will be read is there, to the last repetition.
    bool prepare() {
        int64_t row = 0;
        for (int64_t s = 0; s < a_.sequences; ++s) {
            if (a_.to[s] < 0 || a_.depth[s] < 1 || a_.to[s] + a_.depth[s] > step_rows_) return false;
            if (a_.last[s] < row || a_.last[s] >= a_.rows) return false;
            for (; row <= a_.last[s]; ++row) add_pages(own_table_, r_, a_.to[s]);
        }
        if (row != a_.rows) return false;
        r_.table = own_table_.data();
        std::vector<int64_t> furthest(a_.positions, a_.positions + a_.rows);
        for (int64_t s = 0; s < a_.sequences; ++s) furthest[a_.last[s]] += a_.depth[s] - 1;
        Request reach = r_;
        reach.positions = furthest.data();
        return in_range(d_.model, reach);
    }

    void make() {
        std::vector<int32_t> sequences(a_.sequences), rows(a_.last, a_.last + a_.sequences);
        std::iota(sequences.begin(), sequences.end(), 0);
        for (int32_t depth = 1; !sequences.empty(); ++depth) {
            d_.run(r_);
            std::vector<int64_t> tokens, positions;
            std::vector<float> previous;
            std::vector<int32_t> table, going_on;
            for (size_t i = 0; i < sequences.size(); ++i) {
                const int32_t s = sequences[i];
                tokens_[a_.to[s] + depth - 1] = best_[i];
                if (a_.depth[s] == depth) continue;
                const int64_t row = rows[i];
                going_on.push_back(s);
                tokens.push_back(best_[i]);
                positions.push_back(r_.positions[row] + 1);
                previous.insert(previous.end(), r_.hidden + row * width_, r_.hidden + (row + 1) * width_);
                add_pages(table, r_, row);
            }
            sequences = std::move(going_on);
            rows.resize(sequences.size());
            std::iota(rows.begin(), rows.end(), 0);
            own_tokens_ = std::move(tokens);
            own_positions_ = std::move(positions);
            own_previous_ = std::move(previous);
            own_table_ = std::move(table);
            r_.batch = static_cast<int64_t>(sequences.size());
            r_.tokens = own_tokens_.data();
            r_.positions = own_positions_.data();
            r_.previous = own_previous_.data();
            r_.table = own_table_.data();
            r_.head_rows = nullptr;
        }
    }

   private:
    static void add_pages(std::vector<int32_t>& table, const Request& of, int64_t row) {
        table.insert(table.end(), of.table + row * of.table_stride, of.table + (row + 1) * of.table_stride);
    }

    Decoder& d_;
    const DraftRequest& a_;
    Request r_;
    const int64_t width_, step_rows_;
    int64_t* const tokens_;
    std::vector<float> hidden_, own_previous_;
    std::vector<int64_t> best_, own_tokens_, own_positions_;
    std::vector<int32_t> own_table_;
};

}  // namespace

}  // namespace benthic

extern "C" {

const char* decode_instruction_set() { return benthic::instruction_set(); }

// Sizes of the structures that Python mirrors.
int64_t decode_size_of(int64_t which) {
    constexpr int64_t sizes[] = {sizeof(benthic::Matrix), sizeof(benthic::Layer), sizeof(benthic::Model),
                                 sizeof(benthic::Request), sizeof(benthic::DraftRequest)};
    return sizes[which];
}

void* decode_new(const benthic::Model* model, int64_t threads) {
    return new benthic::Decoder(*model, static_cast<int>(threads));
}

void decode_free(void* decoder) { delete static_cast<benthic::Decoder*>(decoder); }

// 0, or 1 if a token, a position or a page is out of range, and nothing was done. `ahead`, if there is any, is made
// first, and goes into the request's tokens.
int64_t decode_step(void* decoder, const benthic::Request* request, benthic::DraftRequest* ahead) {
    auto& d = *static_cast<benthic::Decoder*>(decoder);
    if (!benthic::in_range(d.model, *request)) return 1;
    benthic::rest_openmp_threads();
    if (ahead != nullptr) {
        const auto begun = std::chrono::steady_clock::now();
        benthic::Drafts drafts(d, *request, *ahead);
        if (!drafts.prepare()) return 1;
        drafts.make();
        ahead->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    }
    d.run(*request);
    return 0;
}

// Keep a row of l numbers as pages of this kind do, and read it back: for tests.
void decode_keep(benthic::Kind kind, int64_t c, int64_t l, const float* row, char* kept, float* back) {
    const benthic::Pages pages{kept, kind, c, l};
    const int32_t table = 0;
    pages.write(&table, 0, row);
    std::vector<float> room(benthic::kPage * l);
    std::copy_n(pages.wide_rows(&table, 0, 1, room.data()), l, back);
}

// out (count, rows) = x (count, columns) times a matrix of a stack, on one thread: for tests.
void decode_multiply(const benthic::Matrix* matrix, int64_t index, const float* x, int64_t count, float* out) {
    benthic::Vectors vectors;
    vectors.stride = benthic::round_up(matrix->columns, benthic::kPanelColumns);
    std::vector<float> numbers(count * vectors.stride, 0.0f);
    std::vector<int32_t> which(count);
    std::vector<float*> to(count);
    for (int64_t j = 0; j < count; ++j) {
        std::copy_n(x + j * matrix->columns, matrix->columns, numbers.begin() + j * vectors.stride);
        which[j] = static_cast<int32_t>(j);
        to[j] = out + j * matrix->rows;
    }
    vectors.numbers = numbers.data();
    if (matrix->in_panels()) vectors.quantise(count);
    benthic::multiply(*matrix, index, 0, matrix->blocks(), vectors, which.data(), count, to.data(), nullptr);
}

}  // extern "C"
