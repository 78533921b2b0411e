// What lies between a model's matrix products, on bf16 rows end to end: SwiGLU, quick-GELU, norms, rotary embedding.
//
// Each row, or run of 16 elements, is one thread's, is read once, computed in fp32, and rounded once. Numbers below 2**-126 round to 0.

#include "vectors.h"

#include <cmath>
#include <cstring>

namespace {

using bf16 = uint16_t;

inline __m512 read(const bf16* x, __mmask16 some) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x)), 16);
}

inline void write(bf16* out, __mmask16 some, __m512 x) {
    _mm256_mask_storeu_epi16(out, some, (__m256i)_mm512_cvtneps_pbh(x));
}

inline __m512 rounded(__m512 x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16); }

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 small = exponential(_mm512_or_ps(x, _mm512_set1_ps(-0.0f)));  // of -|x|
    const __m512 top = _mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)x), one, small);
    return _mm512_div_ps(top, _mm512_add_ps(one, small));
}

}  // namespace

extern "C" {

// gate_up: [N, 2F]; out: [N, F].
void swiglu_forward(const bf16* gate_up, bf16* out, int64_t N, int64_t F, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < N; ++row) {
        const bf16 *gates = gate_up + row * 2 * F, *ups = gates + F;
        for (int64_t c = 0; c < F; c += 16) {
            const __mmask16 some = lanes(F - c);
            const __m512 gate = read(gates + c, some);
            write(out + row * F + c, some, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), read(ups + c, some)));
        }
    }
}

// x, out: any number of elements.
void quick_gelu(const bf16* x, bf16* out, int64_t elements, int64_t threads) {
    const __m512 steepness = _mm512_set1_ps(1.702f);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < elements; i += 16) {
        const __mmask16 some = lanes(elements - i);
        const __m512 value = read(x + i, some);
        write(out + i, some, _mm512_mul_ps(value, sigmoid(_mm512_mul_ps(value, steepness))));
    }
}

// grad: [N, F]; gate_up, grad_gate_up: [N, 2F].
void swiglu_backward(const bf16* grad, const bf16* gate_up, bf16* grad_gate_up, int64_t N, int64_t F, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < N; ++row) {
        const bf16 *gates = gate_up + row * 2 * F, *ups = gates + F;
        bf16 *grad_gates = grad_gate_up + row * 2 * F, *grad_ups = grad_gates + F;
        for (int64_t c = 0; c < F; c += 16) {
            const __mmask16 some = lanes(F - c);
            const __m512 gate = read(gates + c, some), up = read(ups + c, some), slope = read(grad + row * F + c, some);
            const __m512 sigma = sigmoid(gate), silu = _mm512_mul_ps(gate, sigma);
            // The slope of silu: sigma + silu · (1 - sigma).
            const __m512 steep = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), sigma), sigma);
            write(grad_gates + c, some, _mm512_mul_ps(_mm512_mul_ps(slope, up), steep));
            write(grad_ups + c, some, _mm512_mul_ps(slope, silu));
        }
    }
}

// residual, branch, total, y: [N, D]; weight: [D] fp32; rstd: [N] fp32. Without a branch total is not written.
void norm_forward(const bf16* residual, const bf16* branch, const float* weight, bf16* total, bf16* y, float* rstd,
                  int64_t N, int64_t D, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < N; ++row) {
        const int64_t at = row * D;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t c = 0; c < D; c += 16) {
            const __mmask16 some = lanes(D - c);
            __m512 x = read(residual + at + c, some);
            if (branch) {
                x = rounded(_mm512_add_ps(x, read(branch + at + c, some)));  // the norm is that of the rounded sum
                write(total + at + c, some, x);
            }
            squares = _mm512_fmadd_ps(x, x, squares);
        }
        const bf16* summed = branch ? total : residual;
        rstd[row] = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / D + eps);
        const __m512 scale = _mm512_set1_ps(rstd[row]);
        for (int64_t c = 0; c < D; c += 16) {
            const __mmask16 some = lanes(D - c);
            const __m512 unit = _mm512_mul_ps(read(summed + at + c, some), scale);
            write(y + at + c, some, _mm512_mul_ps(unit, _mm512_maskz_loadu_ps(some, weight + c)));
        }
    }
}

// total, grad_total (or null), grad_y, grad: [N, D]; rstd: [N] and weight: [D] fp32.
void norm_backward(const bf16* total, const float* rstd, const float* weight, const bf16* grad_total, const bf16* grad_y,
                   bf16* grad, int64_t N, int64_t D, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < N; ++row) {
        const int64_t at = row * D;
        __m512 products = _mm512_setzero_ps();
        for (int64_t c = 0; c < D; c += 16) {
            const __mmask16 some = lanes(D - c);
            const __m512 slope = _mm512_mul_ps(read(grad_y + at + c, some), _mm512_maskz_loadu_ps(some, weight + c));
            products = _mm512_fmadd_ps(slope, read(total + at + c, some), products);
        }
        const float inverse = rstd[row];
        const __m512 scale = _mm512_set1_ps(inverse);
        const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(products) / D * inverse * inverse * inverse);
        for (int64_t c = 0; c < D; c += 16) {
            const __mmask16 some = lanes(D - c);
            const __m512 slope = _mm512_mul_ps(read(grad_y + at + c, some), _mm512_maskz_loadu_ps(some, weight + c));
            __m512 x = _mm512_fnmadd_ps(along, read(total + at + c, some), _mm512_mul_ps(slope, scale));
            if (grad_total) x = _mm512_add_ps(x, read(grad_total + at + c, some));
            write(grad + at + c, some, x);
        }
    }
}

// residual, branch, total, y: [N, D]; weight, bias: [D]. Without a branch total is not written.
void layer_norm(const bf16* residual, const bf16* branch, const bf16* weight, const bf16* bias, bf16* total, bf16* y,
                int64_t N, int64_t D, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < N; ++row) {
        const int64_t at = row * D;
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t c = 0; c < D; c += 16) {
            const __mmask16 some = lanes(D - c);
            __m512 x = read(residual + at + c, some);
            if (branch) {
                x = rounded(_mm512_add_ps(x, read(branch + at + c, some)));  // the norm is that of the rounded sum
                write(total + at + c, some, x);
            }
            sum = _mm512_add_ps(sum, x);
        }
        const bf16* summed = branch ? total : residual;
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / D);
        for (int64_t c = 0; c < D; c += 16) {
            const __mmask16 some = lanes(D - c);
            const __m512 centred = _mm512_maskz_sub_ps(some, read(summed + at + c, some), mean);
            squares = _mm512_fmadd_ps(centred, centred, squares);
        }
        const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / D + eps));
        for (int64_t c = 0; c < D; c += 16) {
            const __mmask16 some = lanes(D - c);
            const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(read(summed + at + c, some), mean), scale);
            write(y + at + c, some, _mm512_fmadd_ps(unit, read(weight + c, some), read(bias + c, some)));
        }
    }
}

// source, out (which may be the same): [N, heads, 2, half]; cosine, sine: [N, half] fp32. The first `turned` heads are
// rotated, the others copied.
void rotate(const bf16* source, bf16* out, const float* cosine, const float* sine, int64_t N, int64_t heads,
            int64_t turned, int64_t half, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < N; ++row) {
        const int64_t at = row * heads * 2 * half;
        for (int64_t c = 0; c < half; c += 16) {
            const __mmask16 some = lanes(half - c);
            const __m512 cos = _mm512_maskz_loadu_ps(some, cosine + row * half + c);
            const __m512 sin = _mm512_maskz_loadu_ps(some, sine + row * half + c);
            for (int64_t head = 0; head < turned; ++head) {
                const int64_t first = at + head * 2 * half + c, second = first + half;
                const __m512 x = read(source + first, some), y = read(source + second, some);
                write(out + first, some, _mm512_fmsub_ps(x, cos, _mm512_mul_ps(y, sin)));
                write(out + second, some, _mm512_fmadd_ps(y, cos, _mm512_mul_ps(x, sin)));
            }
        }
        if (out != source)
            std::memcpy(out + at + turned * 2 * half, source + at + turned * 2 * half,
                        (heads - turned) * 2 * half * sizeof(bf16));
    }
}

}  // extern "C"
