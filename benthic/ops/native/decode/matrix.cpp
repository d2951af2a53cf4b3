#include "matrix.h"

namespace benthic {

namespace {

struct Fp32 {
    using Number = float;
    static constexpr bool tiled = false;
    static F16 get(const float* p) { return load(p); }
    static F16 get_n(const float* p, int64_t n) { return load_n(p, n); }
};
struct Bf16 {
    using Number = uint16_t;
    static constexpr bool tiled = false;
    static F16 get(const uint16_t* p) { return load_bf16(p); }
    static F16 get_n(const uint16_t* p, int64_t n) { return load_bf16_n(p, n); }
};
struct Fp8 {
    using Number = uint8_t;
    static constexpr bool tiled = true;
    static F16 get(const uint8_t* p) { return load_e4m3(p); }
    static F16 get_n(const uint8_t* p, int64_t n) { return load_e4m3_n(p, n); }
};

// R rows times B vectors over columns [from, to), added to `total`, asking for one cache line of `ahead` per one read.
template <class Format, int R, int B>
inline void chains(const typename Format::Number* w, int64_t columns, const float* const* x, int64_t from, int64_t to,
                   const char* ahead, F16 (&total)[R][B]) {
    int64_t k = from;
    for (; k + kLanes <= to; k += kLanes) {
        F16 in[B];
        for (int b = 0; b < B; ++b) in[b] = load(x[b] + k);
        for (int r = 0; r < R; ++r) {
            const F16 row = Format::get(w + r * columns + k);
            if (ahead != nullptr) prefetch(ahead + (k * R + r * kLanes) * sizeof(typename Format::Number));
            for (int b = 0; b < B; ++b) total[r][b] = fma(row, in[b], total[r][b]);
        }
    }
    if (k < to) {
        for (int r = 0; r < R; ++r) {
            const F16 row = Format::get_n(w + r * columns + k, to - k);
            for (int b = 0; b < B; ++b) total[r][b] = fma(row, load(x[b] + k), total[r][b]);
        }
    }
}

template <class Format, int R, int B>
inline void rows_times_vectors(const typename Format::Number* w, const float* scales, int64_t columns,
                               const float* const* x, const char* ahead, float* const* out, int64_t row) {
    F16 total[R][B];
    for (auto& line : total)
        for (F16& t : line) t = zero();
    if constexpr (Format::tiled) {
        for (int64_t from = 0; from < columns; from += kTile) {
            F16 part[R][B];
            for (auto& line : part)
                for (F16& t : line) t = zero();
            chains<Format, R, B>(w, columns, x, from, std::min(from + kTile, columns), ahead, part);
            const F16 scale = splat(scales[from / kTile] * 256.0f);
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) total[r][b] = fma(part[r][b], scale, total[r][b]);
        }
    } else {
        chains<Format, R, B>(w, columns, x, 0, columns, ahead, total);
    }
    // Lane by lane a sum takes longer than the products of a short row, so sums are taken together.
    F16 flat[B * R];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) flat[b * R + r] = total[r][b];
    float lanes[B * R];
    int i = 0;
    for (; i + 16 <= B * R; i += 16) store(lanes + i, sums(flat + i));
    for (; i + 8 <= B * R; i += 8) store_sums(lanes + i, flat + i);
    for (; i < B * R; ++i) lanes[i] = sum(flat[i]);
    for (int b = 0; b < B; ++b) std::memcpy(out[b] + row, lanes + b * R, R * sizeof(float));
}

// R rows times any number of vectors, as many at a time as there are registers for, while the rows are in the cache.
template <class Format, int R>
void rows_times_all(const typename Format::Number* w, const float* scales, int64_t columns, const Vectors& x,
                    const int32_t* which, int64_t count, const char* ahead, float* const* out, int64_t row) {
    constexpr int kMost = R < 8 ? 4 : kManyRegisters && !Format::tiled ? 3 : 1;
    int64_t j = 0;
    const auto take = [&](auto vectors) {
        constexpr int B = vectors;
        const float* in[B];
        for (int b = 0; b < B; ++b) in[b] = x[which[j + b]];
        rows_times_vectors<Format, R, B>(w, scales, columns, in, j ? nullptr : ahead, out + j, row);
        j += B;
    };
    while (j + kMost <= count) take(std::integral_constant<int, kMost>());
    if constexpr (kMost > 3)
        if (j + 3 <= count) take(std::integral_constant<int, 3>());
    if constexpr (kMost > 2)
        if (j + 2 <= count) take(std::integral_constant<int, 2>());
    if constexpr (kMost > 1)
        if (j < count) take(std::integral_constant<int, 1>());
}

template <class Format>
void multiply_rows(const Matrix& m, int64_t index, int64_t first, int64_t last, const Vectors& x, const int32_t* which,
                   int64_t count, float* const* out, const char* next) {
    using Number = typename Format::Number;
    const auto* w = reinterpret_cast<const Number*>(m.data) + index * m.rows * m.columns;
    const int64_t tiles = (m.columns + kTile - 1) / kTile;
    const float* scales = m.scales + (Format::tiled ? index * ((m.rows + kTile - 1) / kTile) * tiles : 0);
    const int64_t end = std::min(last * kBlock, m.rows);
    const auto step = [&](auto rows, int64_t r) {
        const Number* here = w + r * m.columns;
        const char* ahead = r + rows < end ? reinterpret_cast<const char*>(here + rows * m.columns) : next;
        rows_times_all<Format, rows>(here, scales + (Format::tiled ? r / kTile * tiles : 0), m.columns, x, which, count,
                                     ahead, out, r);
    };
    int64_t r = first * kBlock;
    if (count < 4)
        for (; r + 8 <= end; r += 8) step(std::integral_constant<int, 8>(), r);
    for (; r + 4 <= end; r += 4) step(std::integral_constant<int, 4>(), r);
    for (; r < end; ++r) step(std::integral_constant<int, 1>(), r);
}

// A panel of 16 rows times T vectors; a lane is a row.
template <bool FourBit, int T>
inline void panel_times_vectors(const char* panel, int64_t columns, const Vectors::Group* const* x, const char* ahead,
                                F16 (&total)[T]) {
    constexpr int64_t data = FourBit ? 256 : 512, half = 64 + 2 * data;
    for (F16& t : total) t = zero();
    for (int64_t g = 0; g < round_up(columns, kPanelColumns) / kGroup; ++g) {
        const char* both = panel + g / 2 * half;
        const F16 scale = load_bf16(reinterpret_cast<const uint16_t*>(both) + g % 2 * kBlock);
        const auto* numbers = reinterpret_cast<const uint8_t*>(both) + 64 + g % 2 * data;
        if (ahead != nullptr)
            for (int64_t line = g % 2 * (data + 64); line < (g % 2 ? half : data + 64); line += 64)
                prefetch(ahead + g / 2 * half + line);
        I16 sums[T];
        for (int t = 0; t < T; ++t) sums[t] = splat_int(x[t][g].sum * (FourBit ? -8 : -128));
        for (int j = 0; j < (FourBit ? 4 : 8); ++j) {
            const Bytes bytes = load_bytes(numbers + 64 * j);
            if constexpr (FourBit) {
                const Bytes low = low_nibbles(bytes), high = high_nibbles(bytes);
                for (int t = 0; t < T; ++t) {
                    const Vectors::Group& in = x[t][g];
                    sums[t] = dot4(sums[t], low, in.quads[j], in.even[j], in.odd[j]);
                    sums[t] = dot4(sums[t], high, in.quads[j + 4], in.even[j + 4], in.odd[j + 4]);
                }
            } else {
                for (int t = 0; t < T; ++t) {
                    const Vectors::Group& in = x[t][g];
                    sums[t] = dot4(sums[t], bytes, in.quads[j], in.even[j], in.odd[j]);
                }
            }
        }
        for (int t = 0; t < T; ++t) total[t] = fma(to_float(sums[t]), scale * splat(x[t][g].scale), total[t]);
    }
}

template <bool FourBit>
void multiply_panels(const Matrix& m, int64_t index, int64_t first, int64_t last, const Vectors& x,
                     const int32_t* which, int64_t count, float* const* out, const char* next) {
    for (int64_t block = first; block < last; ++block) {
        const char *panel = m.at(index, block), *ahead = block + 1 < last ? panel + m.panel_bytes() : next;
        const int64_t row = block * kBlock, rows = std::min(kBlock, m.rows - row);
        int64_t j = 0;
        const auto take = [&](auto vectors) {
            constexpr int T = vectors;
            const Vectors::Group* in[T];
            for (int t = 0; t < T; ++t) in[t] = x.quantised(which[j + t]);
            F16 total[T];
            panel_times_vectors<FourBit, T>(panel, m.columns, in, j ? nullptr : ahead, total);
            for (int t = 0; t < T; ++t) store_n(out[j + t] + row, total[t], rows);
            j += T;
        };
        while (j + 4 <= count) take(std::integral_constant<int, 4>());
        if (j + 3 <= count) take(std::integral_constant<int, 3>());
        if (j + 2 <= count) take(std::integral_constant<int, 2>());
        if (j < count) take(std::integral_constant<int, 1>());
    }
}

}  // namespace

void multiply(const Matrix& m, int64_t index, int64_t first, int64_t last, const Vectors& x, const int32_t* which,
              int64_t count, float* const* out, const char* next) {
    switch (m.kind) {
        case Kind::fp32: return multiply_rows<Fp32>(m, index, first, last, x, which, count, out, next);
        case Kind::bf16: return multiply_rows<Bf16>(m, index, first, last, x, which, count, out, next);
        case Kind::fp8: return multiply_rows<Fp8>(m, index, first, last, x, which, count, out, next);
        case Kind::int8: return multiply_panels<false>(m, index, first, last, x, which, count, out, next);
        case Kind::int4: return multiply_panels<true>(m, index, first, last, x, which, count, out, next);
    }
}

}  // namespace benthic
