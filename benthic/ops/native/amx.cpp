// fp32 matrix products on AMX tiles, which multiply bf16 only: sixteen times the rate of fp32 multiply-adds.
//
// An fp32 has 24 significant bits, so it is exactly the sum of three bf16 of 8: high, middle and low, each what
// truncation leaves of the one before. Of the nine products of two such sums, six are computed and added in fp32:
// those left out are below 2^-21 of the whole each, 2^-24 on average, which is what rounding to fp32 costs anyway.
// Infinity comes out as NaN, and parts below 2^-126 count as zero.
//
// Each element of the result is one chain of sums over k in a fixed order, whatever is computed beside it.

#include "common.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

#include "factor.h"
#include "simd.h"

namespace {

constexpr int64_t kTile = 16;           // rows of a tile, and numbers of 32 bits in one
constexpr int64_t kStep = 2 * kTile;    // k that one tile product covers: number j of a tile's row is k = j and j + 16
constexpr int64_t kParts = 3;           // high, middle, low
constexpr int64_t kTileWords = kTile * kTile;
constexpr int64_t kRows = 4;            // of a tile, packed at a time
constexpr int64_t kSlots = 6;           // of a step, one behind each product of parts, for what the vector units do
constexpr int64_t kBlockK = 512;        // k of a packed panel
constexpr int64_t kWholeK = 1024;       // k up to which one panel has all of it, if both operands lie along k
constexpr int64_t kResident = 1 << 20;  // bytes of the packed operand that stays in the second cache
constexpr int64_t kSidesPerVolume = 32; // what packing and storing a number costs, in multiplications
constexpr int64_t kLinesPerVolume = 12; // the same where both operands lie along k

using namespace benthic;

using Word = uint32_t;

inline __m512i high_halves(__m512i even, __m512i odd) {
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, _mm512_set1_epi32(0xffff0000), 0xf8);
}

// What truncation to bf16 leaves of x.
inline __m512 remainder(__m512 x) {
    const __m512i kept = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff0000));
    return _mm512_sub_ps(x, _mm512_castsi512_ps(kept));
}

inline __mmask16 first(int64_t count) { return count >= kTile ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1; }

// Pairs of bf16 of the three parts of 16 numbers and of the 16 that are multiplied beside them.
inline void split(__m512 even, __m512 odd, Word* out, int64_t part_stride) {
    for (int64_t part = 0; part < kParts; ++part) {
        _mm512_store_si512(out + part * part_stride,
                           high_halves(_mm512_castps_si512(even), _mm512_castps_si512(odd)));
        even = remainder(even);
        odd = remainder(odd);
    }
}

// 16 lines of an operand as tiles: 32 k, a step, become three tiles, one for each part, and such triples follow each
// other along k; what lies beyond the operand's end is zero. Tiles of a left factor have a line a row, tiles of a right
// one a line a column. Where the numbers do not lie so, tiles are filled as they lie and transposed.
class Lines {
  public:
    Lines() = default;
    Lines(const Factor& x, int64_t depth, bool left, Word* out)
        : x_(x), depth_(depth), out_(out), along_k_(x.along_k()), transposed_(along_k_ != left),
          whole_(x.lines >= kTile ? depth / kStep : 0) {}

    // All of it.
    void pack() const {
        for (int64_t step = 0; step < whole_; ++step) {
            for (int64_t quarter = 0; quarter < kTile / kRows; ++quarter) pack_rows(step, quarter);
            if (transposed_) transpose_tiles(step);
        }
        pack_edge();
    }

    // A slot's share of a step: four rows of each tile, then a tile of the step before to be transposed.
    void work(int64_t step, int64_t slot) const {
        if (slot < kTile / kRows && step < whole_) pack_rows(step, slot);
        if (transposed_ && slot >= kSlots - kParts && step > 0 && step <= whole_)
            transpose_tile(tiles(step - 1) + (slot - (kSlots - kParts)) * kTileWords);
    }

    // What the slots of all steps have left.
    void finish() const {
        if (transposed_ && whole_ > 0 && whole_ * kStep >= depth_) transpose_tiles(whole_ - 1);
        pack_edge();
    }

  private:
    Word* tiles(int64_t step) const { return out_ + step * kParts * kTileWords; }

    // Of a step whose numbers are all there.
    void pack_rows(int64_t step, int64_t quarter) const {
        along_k_ ? pack_rows(step, quarter, x_.line_stride, kTile)
                 : pack_rows(step, quarter, x_.k_stride, kTile * x_.k_stride);
    }
    void pack_rows(int64_t step, int64_t quarter, int64_t row_stride, int64_t apart) const {
        const int64_t ahead = 2 * kTile * x_.line_stride;  // the same place in a later panel
        const float* from = x_.data + step * kStep * x_.k_stride + quarter * kRows * row_stride;
        Word* to = tiles(step) + quarter * kRows * kTile;
        for (int64_t r = 0; r < kRows; ++r, from += row_stride, to += kTile) {
            _mm_prefetch(from + ahead, _MM_HINT_T1);
            _mm_prefetch(from + ahead + apart, _MM_HINT_T1);
            split(_mm512_loadu_ps(from), _mm512_loadu_ps(from + apart), to, kTileWords);
        }
    }

    // Steps, or a last step, of which some numbers are not there.
    void pack_edge() const {
        for (int64_t step = whole_; step * kStep < depth_; ++step) {
            const float* from = x_.data + step * kStep * x_.k_stride;
            for (int64_t i = 0; i < kTile; ++i) {
                const int64_t k = step * kStep + (along_k_ ? 0 : i);
                const int64_t apart = along_k_ ? kTile : kTile * x_.k_stride;
                const __mmask16 even = along_k_ ? first(depth_ - k) : first(x_.lines);
                const __mmask16 odd = along_k_ ? first(depth_ - k - kTile) : even;
                const bool has_even = along_k_ ? i < x_.lines : k < depth_;
                const bool has_odd = along_k_ ? i < x_.lines : k + kTile < depth_;
                split(_mm512_maskz_loadu_ps(has_even ? even : 0, from),
                      _mm512_maskz_loadu_ps(has_odd ? odd : 0, from + apart), tiles(step) + i * kTile, kTileWords);
                from += along_k_ ? x_.line_stride : x_.k_stride;
            }
            if (transposed_) transpose_tiles(step);
        }
    }

    void transpose_tiles(int64_t step) const {
        for (int64_t part = 0; part < kParts; ++part) transpose_tile(tiles(step) + part * kTileWords);
    }
    static void transpose_tile(Word* tile) {
        __m512i r[kTile];
        for (int i = 0; i < kTile; ++i) r[i] = _mm512_load_si512(tile + kTile * i);
        transpose(r);
        for (int i = 0; i < kTile; ++i) _mm512_store_si512(tile + kTile * i, r[i]);
    }

    Factor x_{};
    int64_t depth_ = 0;
    Word* out_ = nullptr;
    bool along_k_ = false, transposed_ = false;
    int64_t whole_ = 0;  // steps whose numbers are all there
};

// Writes or adds alpha times a computed block of up to 32 x 32 to the rows and columns of c that exist, a quarter at a
// time.
class Settler {
  public:
    Settler() = default;
    Settler(const float* block, int64_t rows, int64_t columns, float alpha, bool add, bool transposed, float* c,
            int64_t ldc)
        : block_(block), rows_(rows), columns_(columns), alpha_(alpha), add_(add), transposed_(transposed), c_(c),
          ldc_(ldc) {}

    bool done() const { return row_ >= rows_; }

    void advance() {
        if (done()) return;
        const float* from = block_ + row_ * 2 * kTile + column_;
        const int64_t rows = std::min(kTile, rows_ - row_), columns = std::min(kTile, columns_ - column_);
        __m512i r[kTile];
        for (int i = 0; i < kTile; ++i) r[i] = _mm512_load_si512(from + i * 2 * kTile);
        if (transposed_) {
            transpose(r);
            settle(r, columns, rows, c_ + column_ * ldc_ + row_);
        } else {
            settle(r, rows, columns, c_ + row_ * ldc_ + column_);
        }
        column_ += kTile;
        if (column_ >= columns_) {
            column_ = 0;
            row_ += kTile;
        }
    }

  private:
    void settle(const __m512i (&lines)[16], int64_t rows, int64_t columns, float* to) const {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kTile; ++r, to += ldc_) {
            const __mmask16 mask = r < rows ? first(columns) : 0;
            __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(lines[r]), _mm512_set1_ps(alpha_));
            if (add_) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), value);
            _mm512_mask_storeu_ps(to, mask, value);
        }
    }

    const float* block_ = nullptr;
    int64_t rows_ = 0, columns_ = 0;
    float alpha_ = 1.0f;
    bool add_ = false, transposed_ = false;
    float* c_ = nullptr;
    int64_t ldc_ = 0, row_ = 0, column_ = 0;
};

// What the vector units do while the tiles multiply a block: store the block before, pack lines of the next panel.
struct Background {
    Settler settler;
    Lines lines[2];
    int64_t count = 0;

    void work(int64_t step, int64_t slot) {
        for (int64_t i = 0; i < count; ++i) lines[i].work(step, slot);
        if (slot >= kTile / kRows && !settler.done()) settler.advance();
    }
    // What is left when the block is multiplied: the memory of the block before is free again.
    void finish() {
        for (; count > 0; --count) lines[count - 1].finish();
        while (!settler.done()) settler.advance();
    }
};

constexpr int64_t line_words(int64_t steps) { return steps * kParts * kTileWords; }

// Products of one part of a, whose tiles are in 4 and 5, and one of b, in 6 and 7, added to tiles 0 to 3.
template <bool tall, bool wide>
inline void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    if (wide) _tile_dpbf16ps(1, 4, 7);
    if (tall) _tile_dpbf16ps(2, 5, 6);
    if (tall && wide) _tile_dpbf16ps(3, 5, 7);
}
template <bool tall>
inline void load_left(const Word* a, int64_t next) {
    _tile_loadd(4, a, 4 * kTile);
    if (tall) _tile_loadd(5, a + next, 4 * kTile);
}
template <bool wide>
inline void load_right(const Word* b, int64_t next) {
    _tile_loadd(6, b, 4 * kTile);
    if (wide) _tile_loadd(7, b + next, 4 * kTile);
}

// Up to 32 x 32 numbers of the product of two packed panels, to `out`. Six products of parts are added one after
// another. Exchanged factors, `mirrored`, meet in the same pairs in the same order, and so give the same bits.
template <bool tall, bool wide, bool mirrored>
void multiply_panels(const Word* a, const Word* b, int64_t steps, float* out, int64_t stride,
                     Background& background) {
    enum { high, middle, low };
    const int64_t next = line_words(steps);
    const auto load_first = [&](int64_t part) {
        mirrored ? load_right<wide>(b + part * kTileWords, next) : load_left<tall>(a + part * kTileWords, next);
    };
    const auto load_second = [&](int64_t part) {
        mirrored ? load_left<tall>(a + part * kTileWords, next) : load_right<wide>(b + part * kTileWords, next);
    };
    const auto step_on = [&](int64_t step, int64_t slot) {
        multiply<tall, wide>();
        background.work(step, slot);
    };
    _tile_zero(0);
    if (wide) _tile_zero(1);
    if (tall) _tile_zero(2);
    if (tall && wide) _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, a += kParts * kTileWords, b += kParts * kTileWords) {
        load_second(low);
        load_first(high);
        step_on(step, 0);
        load_second(middle);
        step_on(step, 1);
        load_first(middle);
        step_on(step, 2);
        load_second(high);
        step_on(step, 3);
        load_first(low);
        step_on(step, 4);
        load_first(high);
        step_on(step, 5);
    }
    background.finish();
    const int64_t bytes = stride * sizeof(float);
    _tile_stored(0, out, bytes);
    if (wide) _tile_stored(1, out + kTile, bytes);
    if (tall) _tile_stored(2, out + kTile * stride, bytes);
    if (tall && wide) _tile_stored(3, out + kTile * stride + kTile, bytes);
}

template <bool mirrored>
void multiply_panels(const Word* a, const Word* b, int64_t steps, int64_t rows, int64_t columns, float* out,
                     int64_t stride, Background& background) {
    if (rows > kTile)
        columns > kTile ? multiply_panels<true, true, mirrored>(a, b, steps, out, stride, background)
                        : multiply_panels<true, false, mirrored>(a, b, steps, out, stride, background);
    else
        columns > kTile ? multiply_panels<false, true, mirrored>(a, b, steps, out, stride, background)
                        : multiply_panels<false, false, mirrored>(a, b, steps, out, stride, background);
}

struct TileConfig {
    alignas(64) uint8_t bytes[64] = {1};
    TileConfig() {
        for (int tile = 0; tile < 8; ++tile) {
            bytes[16 + 2 * tile] = 4 * kTile;
            bytes[48 + tile] = kTile;
        }
    }
};

bool allowed() {
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool yes = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return yes;
}

Word* buffer(int slot, int64_t words) {
    return reinterpret_cast<Word*>(benthic::scratch<float>(slot, words));
}

// Packing and storing grow with the sides of a product, multiplying with its volume. Less is to be done where both
// operands lie along k.
bool pays(int64_t m, int64_t n, int64_t k, bool along_k) {
    const int64_t cost = along_k ? kLinesPerVolume : kSidesPerVolume;
    return std::min(n, k) >= kStep && m * n + m * k + n * k < m * n * k / cost;
}

// The next 32 lines of a, packed in the background of blocks.
class Panel {
  public:
    Panel(const Factor& a, int64_t row, int64_t at_k, int64_t depth, Word* out) {
        for (; count_ < 2 && row < a.lines; ++count_, row += kTile, out += line_words((depth + kStep - 1) / kStep))
            lines_[count_] = Lines(a.from(row, at_k), depth, true, out);
    }

    // 16 lines to be packed while the next block is multiplied; all that are left if that is the last.
    void give(Background& background, bool last) {
        while (given_ < count_) {
            background.lines[background.count++] = lines_[given_++];
            if (!last) return;
        }
    }

    void pack() const {
        for (int64_t i = 0; i < count_; ++i) lines_[i].pack();
    }

  private:
    Lines lines_[2];
    int64_t count_ = 0, given_ = 0;
};

// c = alpha a b, or its transpose if `transposed`, added to what is there if `add`. The packed b stays in the cache, a
// passes by.
template <bool transposed>
class Product {
  public:
    Product(const Factor& a, const Factor& b, int64_t k, float alpha, bool add, float* c, int64_t ldc)
        : a_(a), b_(b), k_(k), alpha_(alpha), add_(add), c_(c), ldc_(ldc) {}

    void run() {
        static const TileConfig config;
        _tile_loadconfig(config.bytes);
        const int64_t block_k = a_.along_k() && b_.along_k() && k_ <= kWholeK ? kWholeK : kBlockK;
        for (int64_t at_k = 0; at_k < k_; at_k += block_k) {
            const int64_t depth = std::min(block_k, k_ - at_k), most = columns_at_once(depth);
            for (int64_t column = 0; column < b_.lines; column += most)
                multiply_block(at_k, depth, column, std::min(most, b_.lines - column));
        }
        _tile_release();
    }

  private:
    // So many columns of b that their tiles stay in the cache and that passes over a are alike.
    int64_t columns_at_once(int64_t depth) const {
        const int64_t wide = 2 * kTile, bytes = 2 * line_words((depth + kStep - 1) / kStep) * sizeof(Word);
        const int64_t most = std::max<int64_t>(kResident / bytes, 1), blocks = (b_.lines + wide - 1) / wide;
        const int64_t passes = (blocks + most - 1) / most;
        return (blocks + passes - 1) / passes * wide;
    }

    // All of a times some columns of b, over a part of k.
    void multiply_block(int64_t at_k, int64_t depth, int64_t column, int64_t columns) {
        const int64_t steps = (depth + kStep - 1) / kStep, words = line_words(steps);
        Word *panels_a = buffer(8, 4 * words), *packed_b = buffer(9, (columns + kTile - 1) / kTile * words);
        for (int64_t line = 0; line < columns; line += kTile)
            Lines(b_.from(column + line, at_k), depth, false, packed_b + line / kTile * words).pack();
        Panel(a_, 0, at_k, depth, panels_a).pack();
        asm volatile("" ::: "memory");  // compilers do not know that loading a tile reads memory
        Background background;
        alignas(64) float block[4 * kTileWords];
        const bool adds = add_ || at_k > 0;
        for (int64_t row = 0; row < a_.lines; row += 2 * kTile) {
            const int64_t rows = std::min(2 * kTile, a_.lines - row), side = row / (2 * kTile) % 2;
            Word *here = panels_a + side * 2 * words, *there = panels_a + (1 - side) * 2 * words;
            Panel next(a_, row + 2 * kTile, at_k, depth, there);
            for (int64_t j = 0; j < columns; j += 2 * kTile) {
                const int64_t wide = std::min(2 * kTile, columns - j);
                const Word* panel_b = packed_b + j / kTile * words;
                float* to = transposed ? c_ + (column + j) * ldc_ + row : c_ + row * ldc_ + column + j;
                next.give(background, j + 2 * kTile >= columns);
                if (!transposed && !adds && alpha_ == 1.0f && rows % kTile == 0 && wide % kTile == 0) {
                    multiply_panels<transposed>(here, panel_b, steps, rows, wide, to, ldc_, background);
                    continue;
                }
                multiply_panels<transposed>(here, panel_b, steps, rows, wide, block, 2 * kTile, background);
                background.settler = Settler(block, rows, wide, alpha_, adds, transposed, to, ldc_);
            }
        }
        background.finish();
    }

    Factor a_, b_;
    int64_t k_;
    float alpha_;
    bool add_;
    float* c_;
    int64_t ldc_;
};

}  // namespace

namespace benthic {

bool tile_gemm(char trans_a, char trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
               const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
    if ((beta != 0.0f && beta != 1.0f) || !pays(m, n, k, trans_a == 'N' && trans_b == 'T') || !allowed()) return false;
    const Factor left = trans_a == 'N' ? Factor{a, m, lda, 1} : Factor{a, m, 1, lda};
    const Factor right = trans_b == 'N' ? Factor{b, n, 1, ldb} : Factor{b, n, ldb, 1};
    if (m < n)
        Product<true>(right, left, k, alpha, beta != 0.0f, c, ldc).run();
    else
        Product<false>(left, right, k, alpha, beta != 0.0f, c, ldc).run();
    return true;
}

}  // namespace benthic

extern "C" int64_t has_tiles() { return allowed(); }

#else

namespace benthic {

bool tile_gemm(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t, float,
               float*, int64_t) {
    return false;
}

}  // namespace benthic

extern "C" int64_t has_tiles() { return 0; }

#endif
