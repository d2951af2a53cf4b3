// Attention of one new token to its sequence's cached latents (MLA in absorbed form: DeepSeek-V2, arXiv 2405.04434,
// section 2.1.2). Every cached row is key to all heads and, in its first c numbers, value as well, so heads share each
// row while it is in the processor's cache. A sequence is cut into parts that depend on its length alone; each leaves a
// softmax not yet normalised, and these are joined in order. So the outcome depends neither on the batch nor on how
// many threads there are.
#pragma once

#include <vector>

#include "../e4m3.h"
#include "matrix.h"
#include "../simd.h"

namespace benthic {

constexpr int64_t kPage = 64;  // tokens
constexpr int64_t kHeads = 8;  // worked on together

// Cache lines that will be read next, asked for one by one in between the arithmetic, which so hides the waiting.
struct Ahead {
    const char *at, *end;
    void ask() {
        if (at < end) prefetch(at);
        at += 64;
    }
};

// Cached latents of one layer, in pages of 64 rows of l numbers, fp32, bf16, or fp8 as benthic/precision/latents.py has
// it: c numbers in E4M3, an fp32 scale for each 128 of them, the rest in bf16.
struct Pages {
    char* data;
    Kind kind;
    int64_t c, l;

    int64_t row_bytes() const {
        if (kind == Kind::fp8) return c + 4 * ((c + kTile - 1) / kTile) + 2 * (l - c);
        return l * (kind == Kind::fp32 ? 4 : 2);
    }
    char* row(const int32_t* table, int64_t position) const {
        return data + (table[position / kPage] * kPage + position % kPage) * row_bytes();
    }
    // Rows of one page in fp32: where they are, or in `room`.
    const float* wide_rows(const int32_t* table, int64_t position, int64_t count, float* room) const {
        const char* rows = row(table, position);
        if (kind == Kind::fp32) return reinterpret_cast<const float*>(rows);
        if (kind == Kind::fp8) return widen_fp8(reinterpret_cast<const uint8_t*>(rows), count, room);
        const auto* narrow = reinterpret_cast<const uint16_t*>(rows);
        int64_t i = 0;
        for (; i + kLanes <= count * l; i += kLanes) store(room + i, load_bf16(narrow + i));
        for (; i < count * l; ++i) room[i] = from_bf16(narrow[i]);
        return room;
    }
    // Keep one row.
    void write(const int32_t* table, int64_t position, const float* from) const {
        char* to = row(table, position);
        if (kind == Kind::fp32) {
            std::memcpy(to, from, l * sizeof(float));
        } else if (kind == Kind::bf16) {
            narrow(from, l, to);
        } else {
            char* scales = to + c;
            for (int64_t at = 0; at < c; at += kTile, scales += sizeof(float)) {
                const float scale = quantise_e4m3(from + at, std::min(kTile, c - at), reinterpret_cast<uint8_t*>(to) + at);
                std::memcpy(scales, &scale, sizeof scale);
            }
            narrow(from + c, l - c, scales);
        }
    }
    // The page that a position lies in, from there to its end or the sequence's.
    Ahead rest_of_page(const int32_t* table, int64_t position, int64_t length) const {
        if (position >= length) return {nullptr, nullptr};
        const char* begin = row(table, position);
        return {begin, begin + (std::min(length, position / kPage * kPage + kPage) - position) * row_bytes()};
    }

   private:
    static void narrow(const float* from, int64_t count, char* to) {
        for (int64_t i = 0; i < count; ++i) {
            const uint16_t bits = to_bf16(from[i]);
            std::memcpy(to + 2 * i, &bits, sizeof bits);
        }
    }
    const float* widen_fp8(const uint8_t* rows, int64_t count, float* room) const {
        float* to = room;
        for (int64_t r = 0; r < count; ++r, rows += row_bytes()) {
            const uint8_t* scales = rows + c;
            for (int64_t at = 0; at < c; at += kTile, scales += sizeof(float)) {
                float scale;
                std::memcpy(&scale, scales, sizeof scale);
                // As E4M3 has no infinity, what was quantised with such a scale is NaN.
                const F16 factor = splat(std::isfinite(scale) ? kE4m3Unit * scale : NAN);
                const int64_t end = std::min(at + kTile, c);
                int64_t i = at;
                for (; i + kLanes <= end; i += kLanes) store(to + i, load_e4m3(rows + i) * factor);
                if (i < end) store_n(to + i, load_e4m3_n(rows + i, end - i) * factor, end - i);
            }
            const auto* rope = reinterpret_cast<const uint16_t*>(scales);
            to += c;
            int64_t i = 0;
            for (; i + kLanes <= l - c; i += kLanes) store(to + i, load_bf16(rope + i));
            if (i < l - c) store_n(to + i, load_bf16_n(rope + i, l - c - i), l - c - i);
            to += l - c;
        }
        return room;
    }
};

struct AttentionShape {
    int64_t heads, c, l;

    int64_t groups() const { return (heads + kHeads - 1) / kHeads; }
    int64_t c_stride() const { return round_up(c, kLanes); }
    int64_t l_stride() const { return round_up(l, kLanes); }
    // Numbers that a part leaves: for each group of heads their sums, then for 16 lanes, two of each head, peak and
    // total.
    int64_t group_size() const { return kHeads * c_stride() + 2 * kLanes; }
    int64_t part_size() const { return groups() * group_size(); }

    // Rows of a part: an eighth of the sequence in whole blocks of 32, at most 512. Fewer parts would leave threads
    // without work, more of them cost time to join.
    static int64_t part_rows(int64_t length) {
        return std::min<int64_t>(8 * kPage, round_up((length + 7) / 8, kPage / 2));
    }
    static int64_t parts(int64_t length) { return (length + part_rows(length) - 1) / part_rows(length); }
};

// Scores of up to 64 rows: s[r * 8 + h] = q[h] . rows[r], q (8, l_stride) with zeros after its end.
inline void score_rows(const AttentionShape& shape, const float* q, const float* rows, int64_t count, float* s,
                       Ahead& ahead) {
    const int64_t stride = shape.l_stride(), whole = shape.l / kLanes * kLanes;
    for (int64_t r = 0; r < count; r += 2) {
        const float *first = rows + r * shape.l, *second = r + 1 < count ? first + shape.l : first;
        F16 acc[2 * kHeads];
        for (F16& a : acc) a = zero();
        const auto add = [&](int64_t k, F16 x, F16 y) {
            for (int64_t h = 0; h < kHeads; ++h) {
                const F16 in = load(q + h * stride + k);
                acc[h] = fma(in, x, acc[h]);
                acc[kHeads + h] = fma(in, y, acc[kHeads + h]);
            }
        };
        for (int64_t k = 0; k < whole; k += kLanes) {
            ahead.ask();
            add(k, load(first + k), load(second + k));
        }
        if (whole < shape.l)
            add(whole, load_n(first + whole, shape.l - whole), load_n(second + whole, shape.l - whole));
        store(s + r * kHeads, sums(acc));
    }
}

// sums (8, c_stride) = factor * sums + weights of the rows times the rows.
template <int Vectors>
inline void weigh_columns(const AttentionShape& shape, const float* p, const float* rows, int64_t count, int64_t c,
                          const float* factor, float* sums, Ahead& ahead) {
    F16 acc[kHeads][Vectors];
    const auto get = [&](const float* from, int64_t v) {
        const int64_t at = c + v * kLanes;
        return at + kLanes <= shape.c ? load(from + at) : load_n(from + at, std::max<int64_t>(shape.c - at, 0));
    };
    for (int64_t h = 0; h < kHeads; ++h)
        for (int64_t v = 0; v < Vectors; ++v)
            acc[h][v] = splat(factor[h]) * load(sums + h * shape.c_stride() + c + v * kLanes);
    for (int64_t r = 0; r < count; ++r) {
        F16 row[Vectors];
        for (int64_t v = 0; v < Vectors; ++v) row[v] = get(rows + r * shape.l, v);
        ahead.ask();
        ahead.ask();
        for (int64_t h = 0; h < kHeads; ++h) {
            const F16 weight = splat(p[r * kHeads + h]);
            for (int64_t v = 0; v < Vectors; ++v) acc[h][v] = fma(weight, row[v], acc[h][v]);
        }
    }
    for (int64_t h = 0; h < kHeads; ++h)
        for (int64_t v = 0; v < Vectors; ++v) store(sums + h * shape.c_stride() + c + v * kLanes, acc[h][v]);
}

// Go on with a group's softmax over the scores of `count` more rows, which become weights.
inline void soften(float* s, int64_t count, float* peak, float* total, float* factor) {
    if (count % 2)  // the last vector's upper half is of no row
        for (int64_t h = 0; h < kHeads; ++h) s[count * kHeads + h] = -INFINITY;
    F16 top = load(peak);
    const F16 before = top;
    for (int64_t i = 0; i < count; i += 2) top = max(top, load(s + i * kHeads));
    top = max(top, swap_halves(top));
    const F16 shrink = exp(before - top);
    F16 weight = load(total) * shrink;
    for (int64_t i = 0; i < count; i += 2) {
        const F16 p = exp(load(s + i * kHeads) - top);
        store(s + i * kHeads, p);
        weight = weight + p;
    }
    store(peak, top);
    store(total, weight);
    store(factor, shrink);
}

// Attention of all heads to rows [from, to) of a sequence of `length`, into `out` (part_size). q (groups * 8, l_stride)
// is scaled, zeros after its end; `wide` has room for 64 rows in fp32.
inline void attend_part(const AttentionShape& shape, const Pages& pages, const int32_t* table, int64_t from, int64_t to,
                        int64_t length, const float* q, float* wide, float* out) {
    for (int64_t g = 0; g < shape.groups(); ++g) {
        float *sums = out + g * shape.group_size(), *peak = sums + kHeads * shape.c_stride();
        std::fill(sums, peak, 0.0f);
        std::fill(peak, peak + kLanes, -INFINITY);
        std::fill(peak + kLanes, peak + 2 * kLanes, 0.0f);
    }
    float s[kPage * kHeads], factor[kLanes];
    for (int64_t at = from; at < to;) {
        const int64_t count = std::min(to, at / kPage * kPage + kPage) - at;
        const float* rows = pages.wide_rows(table, at, count, wide);
        at += count;
        Ahead ahead = pages.rest_of_page(table, at, length);
        for (int64_t g = 0; g < shape.groups(); ++g) {
            float *sums = out + g * shape.group_size(), *peak = sums + kHeads * shape.c_stride();
            score_rows(shape, q + g * kHeads * shape.l_stride(), rows, count, s, ahead);
            soften(s, count, peak, peak + kLanes, factor);
            int64_t c = 0;
            for (; c + 2 * kLanes <= shape.c_stride(); c += 2 * kLanes)
                weigh_columns<2>(shape, s, rows, count, c, factor, sums, ahead);
            if (c < shape.c_stride()) weigh_columns<1>(shape, s, rows, count, c, factor, sums, ahead);
        }
    }
}

// One head's outcome (c) from what its sequence's parts left.
inline void join_parts(const AttentionShape& shape, const float* parts, int64_t count, int64_t head, float* out) {
    const float* group = parts + head / kHeads * shape.group_size();
    const int64_t lane = head % kHeads, peaks = kHeads * shape.c_stride() + lane, totals = peaks + kLanes;
    std::vector<float> weight(count);
    float top = -INFINITY, total = 0.0f;
    for (int64_t p = 0; p < count; ++p) {
        const float peak = group[p * shape.part_size() + peaks];
        top = peak > top || peak != peak ? peak : top;
    }
    for (int64_t p = 0; p < count; ++p) {
        const float* part = group + p * shape.part_size();
        float lanes[kLanes];
        store(lanes, exp(splat(part[peaks] - top)));
        weight[p] = lanes[0];
        total += weight[p] * (part[totals] + part[totals + kHeads]);
    }
    for (int64_t c = 0; c < shape.c; c += kLanes) {
        F16 acc = zero();
        for (int64_t p = 0; p < count; ++p)
            acc = fma(splat(weight[p]), load(group + p * shape.part_size() + lane * shape.c_stride() + c), acc);
        store_n(out + c, acc * splat(1.0f / total), shape.c - c);
    }
}

}  // namespace benthic
