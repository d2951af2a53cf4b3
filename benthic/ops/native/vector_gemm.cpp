// Matrix products of fp32 and of bf16 on AVX-512 or AVX2, for processors on which the BLAS inside PyTorch leaves much of
// them unused: MKL on those that are not Intel's.
//
// One factor is laid out as panels of lines side by side, which stay in the second cache: a vector has one number of
// each. Of the other, a strip of a few lines at a time is in the first cache, and asked for from memory while the strip
// before is multiplied. A strip times a panel is summed in registers (Goto and van de Geijn, Anatomy of
// High-Performance Matrix Multiplication, 2008).
//
// What is laid out are words of 32 bits: a number of fp32, or, where the processor adds the products of pairs of bf16,
// two of those, of one line and of neighbouring k. Elsewhere a bf16 becomes fp32 when it is laid out.
//
// Each element of the result is one chain of fused multiply-adds over k in order (of pairs, a pair after another), cut
// into blocks that k and the layout alone decide, whatever is computed beside it.

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
constexpr int64_t kLine = 16;                      // words in a line of a cache
constexpr int64_t kBlock = 512;                    // words of a line in a panel
constexpr int64_t kWhole = 1024;                   // words up to which it has all, if both factors lie along k
constexpr int64_t kApart = kWhole + kLine;         // between lines of a strip: in different sets of the first cache
constexpr int64_t kResident = 512 << 10;           // bytes of panels that stay in the second cache

// How numbers of fp32 become words.
struct Singles {
    static constexpr int64_t kPerWord = 1;

    // Words of one line, of so many numbers along k from here.
    static F16 along(const float* from, int64_t depth) { return load_n(from, depth); }
    // A word of each of so many lines side by side.
    static F16 across(const float* from, int64_t, int64_t, int64_t lines) { return load_n(from, lines); }
    static F16 add_product(F16 x, F16 y, F16 sum) { return fma(x, y, sum); }
};

// The same of bf16.
#if BENTHIC_BF16_PAIRS
struct Halves {
    static constexpr int64_t kPerWord = 2;

    static F16 along(const bf16* from, int64_t depth) { return load_pairs(bits(from), depth); }
    static F16 across(const bf16* from, int64_t k_stride, int64_t depth, int64_t lines) {
        return zip_pairs(bits(from), bits(from + (depth > 1 ? k_stride : 0)), lines, depth > 1 ? lines : 0);
    }
    static F16 add_product(F16 x, F16 y, F16 sum) { return fma_pairs(x, y, sum); }

  private:
    static const uint16_t* bits(const bf16* x) { return &x->bits; }
};
#else
struct Halves {
    static constexpr int64_t kPerWord = 1;

    static F16 along(const bf16* from, int64_t depth) { return load_bf16_n(&from->bits, depth); }
    static F16 across(const bf16* from, int64_t, int64_t, int64_t lines) { return load_bf16_n(&from->bits, lines); }
    static F16 add_product(F16 x, F16 y, F16 sum) { return fma(x, y, sum); }
};
#endif

template <typename T>
using NumbersOf = std::conditional_t<is_float<T>, Singles, Halves>;

template <typename T>
int64_t words(int64_t depth) {
    return (depth + NumbersOf<T>::kPerWord - 1) / NumbersOf<T>::kPerWord;
}

// What to ask for from memory while a strip and a panel are multiplied, for every cache line of words.
template <typename T>
struct Ahead {
    const T* data;
    int64_t count, stride, advance;
    void ask(int64_t step) const {
        for (int64_t i = 0; i < count; ++i) __builtin_prefetch(data + step * advance + i * stride);
    }
};

// Some lines of the factor that passes by: those that lie along k as they lie, others with the lines of a k beside each
// other.
template <typename T>
struct Strip {
    using Numbers = NumbersOf<T>;
    static constexpr int64_t kPerWord = Numbers::kPerWord;
    FactorOf<T> x;
    int64_t lines, depth;

    void copy(float* to) const { x.along_k() ? copy_along(to) : copy_across(to); }

    // A share of it, one of so many.
    Ahead<T> ahead(int64_t share, int64_t shares) const {
        constexpr int64_t numbers = kLine * kPerWord;
        if (x.along_k()) {
            const int64_t from = lines * share / shares, to = lines * (share + 1) / shares;
            return {x.data + from * x.line_stride, to - from, x.line_stride, numbers};
        }
        return {x.data + share * x.k_stride, (numbers + shares - 1 - share) / shares, shares * x.k_stride,
                numbers * x.k_stride};
    }

  private:
    void copy_along(float* to) const {
        for (int64_t line = 0; line < lines; ++line, to += kApart) {
            const T* from = x.data + line * x.line_stride;
            for (int64_t k = 0; k < depth; k += kLanes * kPerWord)
                store(to + k / kPerWord, Numbers::along(from + k, depth - k));
        }
    }
    void copy_across(float* to) const {
        for (int64_t k = 0; k < depth; k += kPerWord, to += kStrip)
            for (int64_t at = 0; at < lines; at += kLanes)
                store_n(to + at, Numbers::across(x.data + k * x.k_stride + at, x.k_stride, depth - k, lines - at),
                        lines - at);
    }
};

// Panels of all lines, two vectors of words one after another; a last panel may be of one vector.
template <typename T>
struct Panels {
    using Numbers = NumbersOf<T>;
    static constexpr int64_t kPerWord = Numbers::kPerWord;
    FactorOf<T> x;
    int64_t depth;

    int64_t count() const { return (x.lines + kPanel - 1) / kPanel; }
    int64_t apart() const { return kPanel * words<T>(depth) + kLine; }  // lest all begin in the same set of a cache
    int64_t lines(int64_t panel) const { return std::min(kPanel, x.lines - panel * kPanel); }

    void pack(float* to) const {
        if (x.along_k())
            for (int64_t panel = 0; panel < count(); ++panel) transpose_panel(panel, to + panel * apart());
        else
            for (int64_t word = 0; word < words<T>(depth); ++word)
                for (int64_t panel = 0; panel < count(); ++panel) copy_row(word, panel, to + panel * apart());
    }

  private:
    int64_t width(int64_t panel) const { return lines(panel) > kLanes ? kPanel : kLanes; }

    void copy_row(int64_t word, int64_t panel, float* to) const {
        const int64_t k = word * kPerWord;
        const T* from = x.data + k * x.k_stride + panel * kPanel;
        for (int64_t at = 0; at < width(panel); at += kLanes) {
            for (int64_t i = 0; i < kPerWord; ++i) __builtin_prefetch(from + at + (8 * kPerWord + i) * x.k_stride);
            store(to + word * width(panel) + at,
                  Numbers::across(from + at, x.k_stride, depth - k, lines(panel) - at));
        }
    }
    void transpose_panel(int64_t panel, float* to) const {
        for (int64_t word = 0; word < words<T>(depth); word += kLanes)
            for (int64_t at = 0; at < width(panel); at += kLanes) {
                const int64_t k = word * kPerWord;
                const T* from = x.data + (panel * kPanel + at) * x.line_stride + k;
                F16 r[kLanes];
                for (int64_t i = 0; i < kLanes; ++i)
                    r[i] = at + i < lines(panel) ? Numbers::along(from + i * x.line_stride, depth - k) : zero();
                transpose(r);
                for (int64_t i = 0; i < std::min(kLanes, words<T>(depth) - word); ++i)
                    store(to + (word + i) * width(panel) + at, r[i]);
            }
    }
};

// block (lines, panel) = a strip times a panel.
template <typename T, int lines, int vectors, bool along_k>
void multiply(const float* strip, const float* panel, int64_t depth, float* block, const Ahead<T>& ahead) {
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
                for (int v = 0; v < vectors; ++v) sum[i][v] = NumbersOf<T>::add_product(left, right[v], sum[i][v]);
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < lines; ++i)
        for (int v = 0; v < vectors; ++v) store(block + i * kPanel + v * kLanes, sum[i][v]);
}

template <typename T>
using Multiply = void (*)(const float*, const float*, int64_t, float*, const Ahead<T>&);

template <typename T, int vectors, bool along_k, size_t... i>
constexpr std::array<Multiply<T>, kStrip> by_lines(std::index_sequence<i...>) {
    return {multiply<T, i + 1, vectors, along_k>...};
}

template <typename T, int vectors>
Multiply<T> multiply_for(int64_t lines, bool along_k) {
    constexpr auto counts = std::make_index_sequence<kStrip>();
    static constexpr std::array<Multiply<T>, kStrip> all[2] = {by_lines<T, vectors, false>(counts),
                                                               by_lines<T, vectors, true>(counts)};
    return all[along_k][lines - 1];
}
template <typename T>
Multiply<T> multiply_for(int64_t lines, int64_t panel_lines, bool along_k) {
    return panel_lines > kLanes ? multiply_for<T, kVectors>(lines, along_k) : multiply_for<T, 1>(lines, along_k);
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
template <typename T>
class Product {
  public:
    Product(const FactorOf<T>& passing, const FactorOf<T>& kept, int64_t depth, const Target& target)
        : passing_(passing), kept_(kept), depth_(depth), target_(target) {}

    void run() const {
        const int64_t panels = (kept_.lines + kPanel - 1) / kPanel;
        const int64_t most = std::max<int64_t>(kResident / (kPanel * words<T>(depth_) * sizeof(float)), 1);
        const int64_t passes = (panels + most - 1) / most;
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t from = panels * pass / passes * kPanel, to = panels * (pass + 1) / passes * kPanel;
            multiply_panels(from, std::min(to, kept_.lines));
        }
    }

  private:
    void multiply_panels(int64_t from, int64_t to) const {
        Panels<T> panels{kept_.from(from, 0), depth_};
        panels.x.lines = to - from;
        float* packed = scratch<float>(8, panels.count() * panels.apart());
        panels.pack(packed);
        const int64_t strips = (passing_.lines + kStrip - 1) / kStrip;
        float* strip = scratch<float>(9, kStrip * kApart);
        const auto first_of = [&](int64_t i) { return passing_.lines * i / strips; };
        const auto strip_at = [&](int64_t i) {
            return Strip<T>{passing_.from(first_of(i), 0), first_of(i + 1) - first_of(i), depth_};
        };
        for (int64_t i = 0; i < strips; ++i) {
            const Strip<T> here = strip_at(i), next = strip_at(i + 1 < strips ? i + 1 : 0);
            here.copy(strip);
            for (int64_t panel = 0; panel < panels.count(); ++panel)
                multiply_one(strip, packed + panel * panels.apart(), first_of(i), here.lines, from + panel * kPanel,
                             panels.lines(panel), next.ahead(panel, panels.count()));
        }
    }

    void multiply_one(const float* strip, const float* panel, int64_t line, int64_t lines, int64_t column,
                      int64_t columns, const Ahead<T>& ahead) const {
        alignas(64) float block[kStrip * kPanel];
        target_.ask(line, lines, column, columns);
        multiply_for<T>(lines, columns, passing_.along_k())(strip, panel, words<T>(depth_), block, ahead);
        target_.settle(block, line, lines, column, columns);
    }

    FactorOf<T> passing_, kept_;
    int64_t depth_;
    Target target_;
};

// Whether the left factor is the one kept as panels: the one across k, since lines along it must be transposed; of two
// alike the smaller, since only the other one comes from memory while the processor multiplies.
template <typename T>
bool keeps_left(const FactorOf<T>& left, const FactorOf<T>& right) {
    return left.along_k() == right.along_k() ? left.lines < right.lines : right.along_k();
}

}  // namespace

namespace benthic {

template <typename T>
bool vector_gemm(char trans_a, char trans_b, int64_t m, int64_t n, int64_t k, float alpha, const T* a, int64_t lda,
                 const T* b, int64_t ldb, float beta, float* c, int64_t ldc) {
    if ((beta != 0.0f && beta != 1.0f) || std::min({m, n, k}) < 1) return false;
    const FactorOf<T> left = trans_a == 'N' ? FactorOf<T>{a, m, lda, 1} : FactorOf<T>{a, m, 1, lda};
    const FactorOf<T> right = trans_b == 'N' ? FactorOf<T>{b, n, 1, ldb} : FactorOf<T>{b, n, ldb, 1};
    const bool exchanged = keeps_left(left, right);
    const bool whole = left.along_k() && right.along_k() && words<T>(k) <= kWhole;
    const int64_t block_k = (whole ? kWhole : kBlock) * NumbersOf<T>::kPerWord;
    for (int64_t at = 0; at < k; at += block_k) {
        const Target target{c, ldc, alpha, exchanged, beta != 0.0f || at > 0};
        const int64_t depth = std::min(block_k, k - at);
        exchanged ? Product<T>(right.from(0, at), left.from(0, at), depth, target).run()
                  : Product<T>(left.from(0, at), right.from(0, at), depth, target).run();
    }
    return true;
}
template bool vector_gemm(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t,
                          float, float*, int64_t);
template bool vector_gemm(char, char, int64_t, int64_t, int64_t, float, const bf16*, int64_t, const bf16*, int64_t,
                          float, float*, int64_t);

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
