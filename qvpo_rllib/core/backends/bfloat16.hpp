// The products of native.cpp on bfloat16 numbers, added up in float32: half the memory to read and,
// where the processor has AVX512-BF16, two multiplications for one. Elsewhere the numbers are
// widened in registers, which is slower than float32: there it is only for tests.
//
// Included by native.cpp. A layer's `weight` holds bfloat16 here: the panels of `Layer`, but of
// pairs of inputs, [ceil(in / 2), vectors * LANES, 2].

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef uint32_t Pairs __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint32_t StoredPairs
    __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(2), may_alias));

int64_t even(int64_t count) { return (count + 1) / 2 * 2; }

// To the nearest, a tie to the even one; a NaN stays one.
uint16_t narrowed(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void store_narrowed(uint16_t *to, Vector v) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    std::memcpy(to, &half, sizeof half);
#else
    Pairs bits = reinterpret_cast<Pairs>(v);
    const Pairs is_nan = reinterpret_cast<Pairs>(v != v);
    bits = is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    for (int lane = 0; lane < LANES; ++lane) to[lane] = uint16_t(bits[lane] >> 16);
#endif
}

// sum + x[0] * w[:, 0] + x[1] * w[:, 1]
Vector add_products(Vector sum, uint32_t x, Pairs w) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Vector>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(x))),
        reinterpret_cast<__m512bh>(w)));
#else
    const Pairs xs = x - Pairs{};
    sum += reinterpret_cast<Vector>(xs << 16) * reinterpret_cast<Vector>(w << 16);
    return sum + reinterpret_cast<Vector>(xs & 0xffff0000u) *
                     reinterpret_cast<Vector>(w & 0xffff0000u);
#endif
}

// Mish with an error below a quarter of bfloat16's last place.
Vector mish_to_be_narrowed(Vector x) {
#if defined(__AVX512F__)
    // The second operand is what comes out where one is a NaN.
    __m512 v = _mm512_max_ps(_mm512_set1_ps(-87.0f), reinterpret_cast<__m512>(x));
    const __m512 scaled =
        _mm512_mul_ps(_mm512_min_ps(_mm512_set1_ps(20.0f), v), _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(scaled, n);
    // 2 to the f for |f| <= 1/2, to 1e-4.
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(5.5171672e-2f), f, _mm512_set1_ps(2.4261162e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9326098e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9992520e-1f));
    const __m512 e = _mm512_scalef_ps(p, n);
    const __m512 m = _mm512_mul_ps(e, _mm512_add_ps(e, _mm512_set1_ps(2.0f)));
    const __m512 r = _mm512_rcp14_ps(_mm512_add_ps(m, _mm512_set1_ps(2.0f)));
    return reinterpret_cast<Vector>(_mm512_mul_ps(v, _mm512_mul_ps(m, r)));
#else
    return mish(x);
#endif
}

// The same as for float32, for pairs of inputs.
template <int R, int C>
__attribute__((always_inline)) inline void accumulate(Vector (&sums)[R][C], const uint16_t *x,
                                                      int64_t x_stride, const uint16_t *panel,
                                                      int64_t in) {
    for (int64_t i = 0; i < in; i += 2) {
        Pairs weights[C];
        for (int c = 0; c < C; ++c)
            weights[c] = *reinterpret_cast<const StoredPairs *>(panel + (i * C + 2 * c) * LANES);
        for (int r = 0; r < R; ++r) {
            uint32_t pair;
            std::memcpy(&pair, x + r * x_stride + i, sizeof pair);
            for (int c = 0; c < C; ++c) sums[r][c] = add_products(sums[r][c], pair, weights[c]);
        }
    }
}

// The number of inputs in a layer's panels.
int64_t inputs_of(const Layer &layer, uint16_t) { return even(layer.in); }

template <bool ACTIVATE>
void put(uint16_t *to, Vector sum) {
    static_assert(ACTIVATE, "sums without Mish stay float32");
    store_narrowed(to, mish_to_be_narrowed(sum));
}

}  // namespace
