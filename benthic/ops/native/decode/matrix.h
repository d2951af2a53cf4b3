// Weights at rest in several precisions, and their products with a few vectors. A decode step reads each weight once,
// so all that matters is to read in order, early enough, and to spend few instructions on a number. Rows come in
// blocks of 16. The product of a row and a vector is one chain of operations in one order, whatever is computed beside
// it, so a sequence's result does not depend on its batch.
#pragma once

#include <vector>

#include "../simd.h"

namespace benthic {

constexpr int64_t kBlock = 16;       // rows
constexpr int64_t kGroup = 32;       // columns that share a scale in int8 and int4
constexpr int64_t kPanelColumns = 64;  // two groups, whose scales fill a cache line
constexpr int64_t kTile = 128;       // rows and columns that share a scale in fp8

enum class Kind : int64_t { fp32 = 0, bf16 = 1, fp8 = 2, int8 = 3, int4 = 4 };

// A stack of matrices of equal shape. fp32, bf16 and fp8 lie row after row, fp8 with an fp32 scale for every 128 x 128
// numbers of a matrix. int8 and int4 lie in panels of 16 rows, see panel_bytes. Mirrored in Python.
struct Matrix {
    const char* data;
    const float* scales;
    Kind kind;
    int64_t rows, columns;

    bool in_panels() const { return kind == Kind::int8 || kind == Kind::int4; }
    int64_t blocks() const { return (rows + kBlock - 1) / kBlock; }
    // A panel is, for every 64 columns: bf16 scales of the 16 rows in the first group of 32, then in the second; then
    // for either group eight times 64 bytes, byte 4 r + i being column 4 j + i of row r in the j-th 64. int4 puts the
    // j-th and the (j + 4)-th into the low and high halves of the same 64 bytes. Numbers are offset by 128, or by 8.
    int64_t panel_bytes() const {
        const int64_t numbers = 2 * kGroup * kBlock;
        return round_up(columns, kPanelColumns) / kPanelColumns * (64 + (kind == Kind::int8 ? numbers : numbers / 2));
    }
    int64_t row_bytes() const { return columns * (kind == Kind::fp32 ? 4 : kind == Kind::bf16 ? 2 : 1); }
    // Where a block of a matrix of the stack begins.
    const char* at(int64_t index, int64_t block) const {
        if (in_panels()) return data + (index * blocks() + block) * panel_bytes();
        return data + (index * rows + block * kBlock) * row_bytes();
    }
    int64_t block_bytes() const { return in_panels() ? panel_bytes() : kBlock * row_bytes(); }
};

// Vectors that matrices are multiplied with, zeros after their end; for int8 and int4 also rounded to int8 in groups.
struct Vectors {
    float* numbers = nullptr;
    int64_t stride = 0;  // padded width

    struct Group {
        int32_t quads[8];            // 32 numbers as signed bytes
        int32_t even[8], odd[8];     // the same as 16-bit numbers, in pairs
        float scale;
        int32_t sum;
    };
    std::vector<Group> groups;

    const float* operator[](int64_t i) const { return numbers + i * stride; }
    const Group* quantised(int64_t i) const { return groups.data() + i * (stride / kGroup); }

    void quantise(int64_t count) {
        const int64_t each = stride / kGroup;
        if (static_cast<int64_t>(groups.size()) < count * each) groups.resize(count * each);
        for (int64_t g = 0; g < count * each; ++g) quantise(numbers + g * kGroup, groups[g]);
    }

   private:
    static void quantise(const float* x, Group& group) {
        const F16 a = load(x), b = load(x + kLanes);
        // What is not finite makes the scale NaN, and with it every product.
        const float trace = sum(fma(a, zero(), b * zero()));
        const float top = largest(max(abs(a), abs(b))) + trace;
        group.scale = top / 127.0f;
        const F16 inverse = splat(top > 0.0f ? 127.0f / top : 0.0f);
        int8_t bytes[kGroup];
        store_bytes(bytes, round(a * inverse));
        store_bytes(bytes + kLanes, round(b * inverse));
        std::memcpy(group.quads, bytes, sizeof bytes);
        int16_t pairs[2][kGroup / 2];
        group.sum = 0;
        for (int64_t i = 0; i < kGroup; ++i) {
            pairs[i % 2][i / 2] = bytes[i];
            group.sum += bytes[i];
        }
        std::memcpy(group.even, pairs[0], sizeof group.even);
        std::memcpy(group.odd, pairs[1], sizeof group.odd);
    }
};

// out[j][r] = row r of matrix `index` times vector which[j], for the rows of blocks [first, last) and j < count. While
// the last rows are read, what lies at `next` is asked for, if there is anything.
void multiply(const Matrix& m, int64_t index, int64_t first, int64_t last, const Vectors& x, const int32_t* which,
              int64_t count, float* const* out, const char* next);

}  // namespace benthic
