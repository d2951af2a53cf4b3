// Products of E4M3 operands: benthic/precision/fp8.py bit for bit. A sum of 128 products is exact in float64 in whatever
// order it is formed, so the BLAS inside PyTorch forms it; what comes after is in order, and no tile is in memory twice.
//
// m, n outer, k contracted; g groups of rows, of which `offsets` says where they begin.

#include <vector>

#include "../common.h"
#include "../e4m3.h"

extern "C" void dgemm_(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k,
                       const double* alpha, const double* a, const int* lda, const double* b, const int* ldb,
                       const double* beta, double* c, const int* ldc);

using namespace benthic;

namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kRows = 192, kColumns = 256;  // of a tile of the result, which stays in a core's cache
constexpr int64_t kWorthSharing = 1 << 20;      // products, from which on threads share the work

// One factor: its numbers (outer, k), of which one stride is 1, and a scale for `height` rows and 128 columns of them.
struct Factor {
    const uint8_t* numbers;
    int64_t row, column;
    const float* scales;
    int64_t scale_row, scale_column, height;

    // Without the first rows, which are whole blocks, and without so many blocks of columns.
    Factor from(int64_t rows, int64_t columns, int64_t blocks) const {
        Factor rest = *this;
        rest.numbers += rows * row + columns * column;
        rest.scales += rows / height * scale_row + blocks * scale_column;
        return rest;
    }
};

// Rows of a factor in one block of its columns: numbers in float64 as they lie, and the scale of each row.
struct Widened {
    const double* numbers;
    bool by_rows;  // (rows, k), else (k, rows)
    int stride;
    const float* scale;
};

Widened widen(const Factor& x, int64_t first, int64_t rows, int64_t block, int64_t k, double* numbers, float* scale) {
    const bool by_rows = x.column == 1;
    const uint8_t* from = x.numbers + first * x.row + block * kBlock * x.column;
    const int64_t lines = by_rows ? rows : k, length = by_rows ? k : rows, stride = by_rows ? x.row : x.column;
    for (int64_t line = 0; line < lines; ++line) {
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) numbers[line * length + i] = from_e4m3(from[line * stride + i]);
    }
    for (int64_t r = 0; r < rows; ++r) scale[r] = x.scales[(first + r) / x.height * x.scale_row + block * x.scale_column];
    return {numbers, by_rows, static_cast<int>(length), scale};
}

// sums (rows, columns) = a b^T, exactly. Fortran's BLAS counts columns first, so it is asked for the transposed product.
void multiply(const Widened& a, const Widened& b, int rows, int columns, int k, double* sums) {
    const char trans_a = a.by_rows ? 'N' : 'T', trans_b = b.by_rows ? 'T' : 'N';
    const double one = 1.0, zero = 0.0;
    dgemm_(&trans_b, &trans_a, &columns, &rows, &k, &one, b.numbers, &b.stride, a.numbers, &a.stride, &zero, sums,
           &columns);
}

// A tile (rows, columns) of a b^T, in memory of this thread.
const float* tile(const Factor& a, const Factor& b, int64_t row, int64_t rows, int64_t column, int64_t columns,
                  int64_t k) {
    double *wide_a = scratch<double>(0, kRows * kBlock), *wide_b = scratch<double>(1, kColumns * kBlock);
    double* sums = scratch<double>(2, kRows * kColumns);
    float *scale_a = scratch<float>(0, kRows), *scale_b = scratch<float>(1, kColumns);
    float* total = scratch<float>(2, kRows * kColumns);
    std::fill(total, total + rows * columns, 0.0f);
    for (int64_t block = 0; block * kBlock < k; ++block) {
        const int64_t length = std::min(kBlock, k - block * kBlock);
        const Widened left = widen(a, row, rows, block, length, wide_a, scale_a);
        const Widened right = widen(b, column, columns, block, length, wide_b, scale_b);
        multiply(left, right, rows, columns, length, sums);
        for (int64_t r = 0; r < rows; ++r) {
            const double* sum = sums + r * columns;
            float* to = total + r * columns;
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) to[i] += static_cast<float>(sum[i]) * scale_a[r] * scale_b[i];
        }
    }
    return total;
}

// A tile of a group's result.
struct Task {
    int64_t group, row, rows, column;
};

void add_tasks(std::vector<Task>& tasks, int64_t group, int64_t m, int64_t n) {
    for (int64_t row = 0; row < m; row += kRows)
        for (int64_t column = 0; column < n; column += kColumns)
            tasks.push_back({group, row, std::min(kRows, m - row), column});
}

// out[e] += a_g^T b_g for each group g of matrix e, whose number is first + g modulo `matrices`.
template <typename T>
void add_products(T* out, const uint8_t* a, const float* a_scales, const uint8_t* b, const float* b_scales,
                  const int64_t* offsets, int64_t groups, int64_t first, int64_t matrices, int64_t m, int64_t n) {
    std::vector<int64_t> block(groups + 1, 0);
    for (int64_t g = 0; g < groups; ++g) block[g + 1] = block[g] + (offsets[g + 1] - offsets[g] + kBlock - 1) / kBlock;
    const Factor all_a{a, 1, m, a_scales, 1, m, 1}, all_b{b, 1, n, b_scales, 1, n, 1};
    std::vector<Task> tasks;
    for (int64_t g = 0; g < std::min(groups, matrices); ++g) add_tasks(tasks, g, m, n);
#pragma omp parallel for schedule(dynamic, 1) if (offsets[groups] * m * n > kWorthSharing)
    for (size_t t = 0; t < tasks.size(); ++t) {
        const auto [leader, row, rows, column] = tasks[t];
        const int64_t columns = std::min(kColumns, n - column);
        T* corner = out + (first + leader) % matrices * m * n + row * n + column;
        // Groups of one matrix are added by one thread in order.
        for (int64_t g = leader; g < groups; g += matrices) {
            const int64_t k = offsets[g + 1] - offsets[g];
            if (k == 0) continue;
            const float* sum = tile(all_a.from(0, offsets[g], block[g]), all_b.from(0, offsets[g], block[g]), row, rows,
                                    column, columns, k);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < columns; ++i) corner[r * n + i] += sum[r * columns + i];
        }
    }
}

}  // namespace

// Rows of a group (m, n) = a_g b_e^T with matrix e = first + g modulo `matrices`. Without offsets all rows are one group.
extern "C" void multiply_rows(float* out, const uint8_t* a, int64_t a_row, int64_t a_column, const float* a_scales,
                              int64_t a_scale_row, int64_t a_scale_column, int64_t a_height, const uint8_t* b,
                              int64_t b_matrix, int64_t b_row, int64_t b_column, const float* b_scales,
                              int64_t b_scale_matrix, int64_t b_scale_row, int64_t b_scale_column, int64_t b_height,
                              const int64_t* offsets, int64_t groups, int64_t first, int64_t matrices, int64_t m,
                              int64_t n, int64_t k) {
    const Factor left{a, a_row, a_column, a_scales, a_scale_row, a_scale_column, a_height};
    std::vector<Task> tasks;
    for (int64_t g = 0; g < groups; ++g) add_tasks(tasks, g, offsets ? offsets[g + 1] - offsets[g] : m, n);
#pragma omp parallel for schedule(dynamic, 1) if (m * n * k > kWorthSharing)
    for (size_t t = 0; t < tasks.size(); ++t) {
        const auto [group, start, rows, column] = tasks[t];
        const int64_t matrix = (first + group) % matrices, columns = std::min(kColumns, n - column);
        const int64_t row = start + (offsets ? offsets[group] : 0);
        const Factor right{b + matrix * b_matrix, b_row, b_column, b_scales + matrix * b_scale_matrix, b_scale_row,
                           b_scale_column, b_height};
        const float* sum = tile(left, right, row, rows, column, columns, k);
        for (int64_t r = 0; r < rows; ++r) std::memcpy(out + (row + r) * n + column, sum + r * columns, columns * 4);
    }
}

#define PARAMETERS(T) (T* out, const uint8_t* a, const float* a_scales, const uint8_t* b, const float* b_scales,      \
                       const int64_t* offsets, int64_t groups, int64_t first, int64_t matrices, int64_t m, int64_t n)
#define ARGUMENTS (out, a, a_scales, b, b_scales, offsets, groups, first, matrices, m, n)
extern "C" void add_products_f32 PARAMETERS(float) { add_products<float> ARGUMENTS; }
extern "C" void add_products_f64 PARAMETERS(double) { add_products<double> ARGUMENTS; }
