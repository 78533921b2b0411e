// What attention in bf16 is made of on CPUs with AVX512-BF16: tiles of matrix products, softmax, and layouts.
//
// A product C[M, N] += A[M, 2P]·B[2P, N] takes words of two bf16 that lie one after the other along the contracted
// dimension: A as words at `a + row * a_row + p * a_step`, B as rows of words, one row for each p.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

constexpr int ROWS = 6, VECTORS = 4;  // of a tile: 24 accumulators, 4 vectors of B, one broadcast
constexpr int COLUMNS = 16 * VECTORS;

struct Freed {
    void operator()(void* memory) const { std::free(memory); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], Freed>;

inline int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Columns that are computed for so many keys: whole vectors, and no fewer than whole tiles of as many rows take.
inline int64_t read_columns(int64_t keys) { return up(up(keys, ROWS), 16); }

template <typename T>
Buffer<T> buffer(int64_t count) {  // of zeros
    const int64_t bytes = up(count * sizeof(T), 64);
    Buffer<T> made(static_cast<T*>(std::aligned_alloc(64, bytes)));
    std::memset(made.get(), 0, bytes);
    return made;
}

// ROWS rows of C, `vectors` × 16 columns.
template <int vectors, bool add>
inline void tile(const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_step, int64_t steps,
                 float* c, int64_t c_row) {
    __m512 sum[ROWS][vectors];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < vectors; ++v)
            sum[r][v] = add ? _mm512_loadu_ps(c + r * c_row + 16 * v) : _mm512_setzero_ps();
    for (int64_t p = 0; p < steps; ++p) {
        __m512bh right[vectors];
        for (int v = 0; v < vectors; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + p * b_step + 16 * v);
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(a[r * a_row + p * a_step]);
            for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(c + r * c_row + 16 * v, sum[r][v]);
}

// C[rows, columns] (+)= A·B; rows a multiple of ROWS, columns of 16. B's columns lie in panels of COLUMNS, `b_panel`
// words apart.
template <bool add>
void product(const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_step, int64_t b_panel,
             int64_t steps, float* c, int64_t c_row, int64_t rows, int64_t columns) {
    for (int64_t column = 0; column < columns; column += COLUMNS) {
        const uint32_t* panel = b + column / COLUMNS * b_panel;
        const int64_t left = std::min<int64_t>(columns - column, COLUMNS) / 16;
        for (int64_t row = 0; row < rows; row += ROWS) {
            const uint32_t* a_tile = a + row * a_row;
            float* c_tile = c + row * c_row + column;
            if (left == 4) tile<4, add>(a_tile, a_row, a_step, panel, b_step, steps, c_tile, c_row);
            else if (left == 3) tile<3, add>(a_tile, a_row, a_step, panel, b_step, steps, c_tile, c_row);
            else if (left == 2) tile<2, add>(a_tile, a_row, a_step, panel, b_step, steps, c_tile, c_row);
            else tile<1, add>(a_tile, a_row, a_step, panel, b_step, steps, c_tile, c_row);
        }
    }
}

inline __m512i rounded(__m512 x) {  // the bf16 in the lower half of each word
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
}

// Softmax of factor · row[:seen] in place; columns from there to `columns` become 0.
void softmax(float* row, int64_t seen, int64_t columns, float factor) {
    const __m512 low = _mm512_set1_ps(-INFINITY);
    __m512 tops = low;
    for (int64_t j = 0; j < seen; j += 16)
        tops = _mm512_max_ps(tops, _mm512_mask_loadu_ps(low, lanes(seen - j), row + j));
    const __m512 scale = _mm512_set1_ps(factor), top = _mm512_set1_ps(_mm512_reduce_max_ps(tops));
    __m512 sums = _mm512_setzero_ps();
    for (int64_t j = 0; j < columns; j += 16) {
        const __m512 x = _mm512_maskz_loadu_ps(lanes(seen - j), row + j);
        const __m512 y = _mm512_maskz_mov_ps(lanes(seen - j), exponential(_mm512_mul_ps(_mm512_sub_ps(x, top), scale)));
        sums = _mm512_add_ps(sums, y);
        _mm512_storeu_ps(row + j, y);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sums));
    for (int64_t j = 0; j < columns; j += 16)
        _mm512_storeu_ps(row + j, _mm512_mul_ps(_mm512_loadu_ps(row + j), inverse));
}

// Words (row 2p, row 2p + 1) of each channel, [rows / 2, d]; what lacks is 0. Rows before `begin` are there already.
template <typename Source>
void pair_rows(Source source, int64_t begin, int64_t rows, int64_t d, uint32_t* out) {
    for (int64_t p = begin / 2; 2 * p < rows; ++p) {
        const uint16_t *even = source(2 * p), *odd = 2 * p + 1 < rows ? source(2 * p + 1) : nullptr;
        for (int64_t c = 0; c < d; c += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + c)));
            const __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(odd + c))) : __m512i{};
            _mm512_storeu_si512(out + p * d + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

// The transposed rows as words of two channels: panels of COLUMNS rows, [d / 2, COLUMNS] each; zeros as far as a block
// reads behind the last row. Rows before `begin` are there already.
template <typename Source>
void pair_channels(Source source, int64_t begin, int64_t rows, int64_t d, uint32_t* out) {
    for (int64_t r = begin; r < read_columns(rows); ++r) {
        const uint32_t* words = r < rows ? (const uint32_t*)source(r) : nullptr;
        uint32_t* panel = out + r / COLUMNS * (d / 2 * COLUMNS) + r % COLUMNS;
        for (int64_t p = 0; p < d / 2; ++p) panel[p * COLUMNS] = words ? words[p] : 0;
    }
}

// Words of fp32 rows rounded to bf16: `along`, [rows, columns / 2], of pairs of columns; `across`, [rows / 2, columns],
// of pairs of rows.
void round_rows(const float* x, int64_t x_row, int64_t rows, int64_t columns, uint16_t* along, int64_t along_row,
                uint32_t* across, int64_t across_row) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < columns; c += 16) {
            const __m512i even = rounded(_mm512_loadu_ps(x + r * x_row + c));
            const __m512i odd = rounded(_mm512_loadu_ps(x + (r + 1) * x_row + c));
            if (along) {
                _mm256_storeu_si256((__m256i*)(along + r * along_row + c), _mm512_cvtepi32_epi16(even));
                _mm256_storeu_si256((__m256i*)(along + (r + 1) * along_row + c), _mm512_cvtepi32_epi16(odd));
            }
            if (across)
                _mm512_storeu_si512(across + r / 2 * across_row + c, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// Rows times `factor`, rounded to bf16.
void write_rows(const float* x, int64_t rows, int64_t d, float factor, uint16_t* out, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < d; c += 16) {
            const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(x + r * d + c), _mm512_set1_ps(factor));
            _mm256_storeu_si256((__m256i*)(out + r * stride + c), (__m256i)_mm512_cvtneps_pbh(y));
        }
}

// p ∘ (slope - the mean of the slopes under p), in place of the slopes.
void softmax_slopes(const float* p, float* slope, int64_t columns) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t j = 0; j < columns; j += 16)
        sums = _mm512_fmadd_ps(_mm512_loadu_ps(p + j), _mm512_loadu_ps(slope + j), sums);
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sums));
    for (int64_t j = 0; j < columns; j += 16) {
        const __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(slope + j), mean);
        _mm512_storeu_ps(slope + j, _mm512_mul_ps(_mm512_loadu_ps(p + j), apart));
    }
}

}  // namespace
