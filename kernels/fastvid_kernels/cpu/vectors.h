// Vectors of 16 numbers on CPUs with AVX512-BF16, and what all sources here compute with them.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

namespace {

inline __mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

inline __m512 exponential(__m512 x) {  // within 2 units in the last place for x <= 0; of NaN, NaN
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // whose exponential is 0 in fp32
    const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);  // Cephes' expf
    for (float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(term));
    y = _mm512_fmadd_ps(_mm512_mul_ps(y, rest), rest, _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, whole);
}

}  // namespace
