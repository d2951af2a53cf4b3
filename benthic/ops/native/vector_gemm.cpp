// fp32 matrix products on AVX-512 or AVX2, for processors on which the BLAS inside PyTorch leaves much of them unused:
// MKL on those that are not Intel's.
//
// One factor is laid out as panels of lines side by side, which stay in the second cache: a vector has one number of
// each. Of the other, a strip of a few lines at a time is in the first cache, and asked for from memory while the strip
// before is multiplied. A strip times a panel is summed in registers (Goto and van de Geijn, Anatomy of
// High-Performance Matrix Multiplication, 2008).
//
// Each element of the result is one chain of fused multiply-adds over k in order, cut into blocks that k and the layout
// alone decide, whatever is computed beside it.

#include "common.h"

#include <array>
#include <utility>

#include "factor.h"
#include "simd.h"

// Only builds of PyTorch with MKL have it.
extern "C" __attribute__((weak)) void MKL_Get_Version_String(char*, int);

namespace {

using namespace benthic;

constexpr int kVectors = kManyRegisters ? 2 : 1;  // of a panel
constexpr int kStrip = kManyRegisters ? 12 : 6;    // lines whose sums with a panel's are in registers
constexpr int64_t kPanel = kVectors * kLanes;      // lines of a panel
constexpr int64_t kLine = 16;                      // numbers in a line of a cache
constexpr int64_t kBlockK = 512;                   // k of a panel
constexpr int64_t kWholeK = 1024;                  // k up to which it has all, if both factors lie along k
constexpr int64_t kApart = kWholeK + kLine;        // between lines of a strip: in different sets of the first cache
constexpr int64_t kResident = 512 << 10;           // bytes of panels that stay in the second cache

// What to ask for from memory while a strip and a panel are multiplied, for every cache line of k.
struct Ahead {
    const float* data;
    int64_t count, stride, advance;
    void ask(int64_t step) const {
        for (int64_t i = 0; i < count; ++i) __builtin_prefetch(data + step * advance + i * stride);
    }
};

// Some lines of the factor that passes by: those that lie along k are copied as they lie, others with the lines of a k
// beside each other.
struct Strip {
    Factor x;
    int64_t lines, depth;

    void copy(float* to) const {
        if (x.along_k()) {
            for (int64_t line = 0; line < lines; ++line)
                std::memcpy(to + line * kApart, x.data + line * x.line_stride, depth * sizeof(float));
            return;
        }
        for (int64_t k = 0; k < depth; ++k, to += kStrip)
            for (int64_t at = 0; at < lines; at += kLanes)
                store_n(to + at, load_n(x.data + k * x.k_stride + at, lines - at), lines - at);
    }

    // A share of it, one of so many.
    Ahead ahead(int64_t share, int64_t shares) const {
        if (x.along_k()) {
            const int64_t from = lines * share / shares, to = lines * (share + 1) / shares;
            return {x.data + from * x.line_stride, to - from, x.line_stride, kLine};
        }
        return {x.data + share * x.k_stride, (kLine + shares - 1 - share) / shares, shares * x.k_stride,
                kLine * x.k_stride};
    }
};

// Panels of all lines, two vectors of numbers of each k after another; a last panel may be of one vector.
struct Panels {
    Factor x;
    int64_t depth;

    int64_t count() const { return (x.lines + kPanel - 1) / kPanel; }
    int64_t apart() const { return kPanel * depth + kLine; }  // lest all begin in the same set of a cache
    int64_t lines(int64_t panel) const { return std::min(kPanel, x.lines - panel * kPanel); }

    void pack(float* to) const {
        if (x.along_k())
            for (int64_t panel = 0; panel < count(); ++panel) transpose_panel(panel, to + panel * apart());
        else
            for (int64_t k = 0; k < depth; ++k)
                for (int64_t panel = 0; panel < count(); ++panel) copy_row(k, panel, to + panel * apart());
    }

  private:
    void copy_row(int64_t k, int64_t panel, float* to) const {
        const int64_t width = lines(panel) > kLanes ? kPanel : kLanes;
        const float* from = x.data + k * x.k_stride + panel * kPanel;
        for (int64_t at = 0; at < width; at += kLanes) {
            __builtin_prefetch(from + at + 8 * x.k_stride);
            store(to + k * width + at, load_n(from + at, lines(panel) - at));
        }
    }
    void transpose_panel(int64_t panel, float* to) const {
        const int64_t width = lines(panel) > kLanes ? kPanel : kLanes;
        for (int64_t k = 0; k < depth; k += kLanes)
            for (int64_t at = 0; at < width; at += kLanes) {
                const float* from = x.data + (panel * kPanel + at) * x.line_stride + k;
                F16 r[kLanes];
                for (int64_t i = 0; i < kLanes; ++i)
                    r[i] = at + i < lines(panel) ? load_n(from + i * x.line_stride, depth - k) : zero();
                transpose(r);
                for (int64_t i = 0; i < std::min(kLanes, depth - k); ++i) store(to + (k + i) * width + at, r[i]);
            }
    }
};

// block (lines, panel) = a strip times a panel.
template <int lines, int vectors, bool along_k>
void multiply(const float* strip, const float* panel, int64_t depth, float* block, const Ahead& ahead) {
    constexpr int64_t line_stride = along_k ? kApart : 1, k_stride = along_k ? 1 : kStrip;
    F16 sum[lines][vectors];
#pragma GCC unroll 12
    for (int i = 0; i < lines; ++i)
        for (int v = 0; v < vectors; ++v) sum[i][v] = zero();
    for (int64_t step = 0; step * kLine < depth; ++step) {
        ahead.ask(step);
        const int64_t end = std::min((step + 1) * kLine, depth);
        for (int64_t k = step * kLine; k < end; ++k, panel += vectors * kLanes) {
            F16 right[vectors];
            for (int v = 0; v < vectors; ++v) right[v] = load(panel + v * kLanes);
#pragma GCC unroll 12
            for (int i = 0; i < lines; ++i) {
                const F16 left = splat(strip[i * line_stride + k * k_stride]);
                for (int v = 0; v < vectors; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < lines; ++i)
        for (int v = 0; v < vectors; ++v) store(block + i * kPanel + v * kLanes, sum[i][v]);
}

using Multiply = void (*)(const float*, const float*, int64_t, float*, const Ahead&);

template <int vectors, bool along_k, size_t... i>
constexpr std::array<Multiply, kStrip> by_lines(std::index_sequence<i...>) {
    return {multiply<i + 1, vectors, along_k>...};
}

template <int vectors>
Multiply multiply_for(int64_t lines, bool along_k) {
    constexpr auto counts = std::make_index_sequence<kStrip>();
    static constexpr std::array<Multiply, kStrip> all[2] = {by_lines<vectors, false>(counts),
                                                            by_lines<vectors, true>(counts)};
    return all[along_k][lines - 1];
}
Multiply multiply_for(int64_t lines, int64_t panel_lines, bool along_k) {
    return panel_lines > kLanes ? multiply_for<kVectors>(lines, along_k) : multiply_for<1>(lines, along_k);
}

// Where a product goes: c = alpha times it, or its transpose, added to what is there if `add`.
struct Target {
    float* c;
    int64_t ldc;
    float alpha;
    bool transposed, add;

    // Asks for the place of a block while its numbers are computed.
    void ask(int64_t line, int64_t lines, int64_t column, int64_t columns) const {
        if (transposed) std::swap(line, column), std::swap(lines, columns);
        for (int64_t i = 0; i < lines; ++i)
            for (int64_t at = 0; at < columns; at += kLine)
                __builtin_prefetch(c + (line + i) * ldc + column + at);
    }

    void settle(const float* block, int64_t line, int64_t lines, int64_t column, int64_t columns) const {
        for (int64_t at = 0; at < columns; at += kLanes)
            transposed ? settle_transposed(block + at, line, lines, column + at, columns - at)
                       : settle_rows(block + at, line, lines, column + at, columns - at);
    }

  private:
    void settle_rows(const float* block, int64_t line, int64_t lines, int64_t column, int64_t columns) const {
        for (int64_t i = 0; i < lines; ++i) put(load(block + i * kPanel), c + (line + i) * ldc + column, columns);
    }
    void settle_transposed(const float* block, int64_t line, int64_t lines, int64_t column, int64_t columns) const {
        F16 r[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) r[i] = i < lines ? load(block + i * kPanel) : zero();
        transpose(r);
        for (int64_t j = 0; j < std::min(kLanes, columns); ++j) put(r[j], c + (column + j) * ldc + line, lines);
    }
    void put(F16 x, float* to, int64_t count) const {
        x = x * splat(alpha);
        store_n(to, add ? load_n(to, count) + x : x, count);
    }
};

// One block of k: all lines of `passing` times all of `kept`.
class Product {
  public:
    Product(const Factor& passing, const Factor& kept, int64_t depth, const Target& target)
        : passing_(passing), kept_(kept), depth_(depth), target_(target) {}

    void run() const {
        const int64_t panels = (kept_.lines + kPanel - 1) / kPanel;
        const int64_t most = std::max<int64_t>(kResident / (kPanel * depth_ * sizeof(float)), 1);
        const int64_t passes = (panels + most - 1) / most;
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t from = panels * pass / passes * kPanel, to = panels * (pass + 1) / passes * kPanel;
            multiply_panels(from, std::min(to, kept_.lines));
        }
    }

  private:
    void multiply_panels(int64_t from, int64_t to) const {
        Panels panels{kept_.from(from, 0), depth_};
        panels.x.lines = to - from;
        float* packed = scratch<float>(8, panels.count() * panels.apart());
        panels.pack(packed);
        const int64_t strips = (passing_.lines + kStrip - 1) / kStrip;
        float* strip = scratch<float>(9, kStrip * kApart);
        const auto first_of = [&](int64_t i) { return passing_.lines * i / strips; };
        const auto strip_at = [&](int64_t i) {
            return Strip{passing_.from(first_of(i), 0), first_of(i + 1) - first_of(i), depth_};
        };
        for (int64_t i = 0; i < strips; ++i) {
            const Strip here = strip_at(i), next = strip_at(i + 1 < strips ? i + 1 : 0);
            here.copy(strip);
            for (int64_t panel = 0; panel < panels.count(); ++panel)
                multiply_one(strip, packed + panel * panels.apart(), first_of(i), here.lines, from + panel * kPanel,
                             panels.lines(panel), next.ahead(panel, panels.count()));
        }
    }

    void multiply_one(const float* strip, const float* panel, int64_t line, int64_t lines, int64_t column,
                      int64_t columns, const Ahead& ahead) const {
        alignas(64) float block[kStrip * kPanel];
        target_.ask(line, lines, column, columns);
        multiply_for(lines, columns, passing_.along_k())(strip, panel, depth_, block, ahead);
        target_.settle(block, line, lines, column, columns);
    }

    Factor passing_, kept_;
    int64_t depth_;
    Target target_;
};

// Whether the left factor is the one kept as panels: the one across k, since lines along it must be transposed; of two
// alike the smaller, since only the other one comes from memory while the processor multiplies.
bool keeps_left(const Factor& left, const Factor& right) {
    return left.along_k() == right.along_k() ? left.lines < right.lines : right.along_k();
}

}  // namespace

namespace benthic {

bool vector_gemm(char trans_a, char trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                 const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
    if ((beta != 0.0f && beta != 1.0f) || std::min({m, n, k}) < 1) return false;
    const Factor left = trans_a == 'N' ? Factor{a, m, lda, 1} : Factor{a, m, 1, lda};
    const Factor right = trans_b == 'N' ? Factor{b, n, 1, ldb} : Factor{b, n, ldb, 1};
    const bool exchanged = keeps_left(left, right);
    const int64_t block_k = left.along_k() && right.along_k() && k <= kWholeK ? kWholeK : kBlockK;
    for (int64_t at = 0; at < k; at += block_k) {
        const Target target{c, ldc, alpha, exchanged, beta != 0.0f || at > 0};
        const int64_t depth = std::min(block_k, k - at);
        exchanged ? Product(right.from(0, at), left.from(0, at), depth, target).run()
                  : Product(left.from(0, at), right.from(0, at), depth, target).run();
    }
    return true;
}

}  // namespace benthic

// Whether it is faster than the BLAS: than MKL on processors that are not Intel's.
extern "C" int64_t has_fast_vectors() {
#if BENTHIC_AVX512 || BENTHIC_AVX2
    __builtin_cpu_init();
    return MKL_Get_Version_String && !__builtin_cpu_is("intel");
#else
    return 0;
#endif
}
