// Vectors of 16 lanes, and the dot products that everything else is made of.
//
// The same sources are compiled once per instruction set (see build.py). Plain arithmetic uses the
// compiler's vector extensions, which any target lowers to what it has; only the dot products of
// bf16 and int8 are spelled out for AVX-512 and AVX2.
//
// Each lane of a result is computed by the same operations in the same order, however many rows are
// computed together. That a token's logits do not depend on its batch-mates rests on this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define FASTSERVE_AMX 1
#else
#define FASTSERVE_AMX 0
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
// Before a loop of a constant length: what it indexes stays in registers, since every index is known.
#define UNROLLED _Pragma("GCC unroll 8")

namespace fastserve {

constexpr bool AMX = FASTSERVE_AMX;
constexpr int LANES = 16;

typedef float f32x16 __attribute__((vector_size(64), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64), may_alias));
typedef uint32_t u32x16 __attribute__((vector_size(64), may_alias));
typedef uint16_t u16x16 __attribute__((vector_size(32), may_alias));
typedef int8_t i8x16 __attribute__((vector_size(16), may_alias));
typedef f32x16 f32x16_any __attribute__((aligned(4)));  // at any address

ALWAYS_INLINE f32x16 load(const float* p) { return *reinterpret_cast<const f32x16_any*>(p); }
ALWAYS_INLINE void store(float* p, f32x16 v) { *reinterpret_cast<f32x16_any*>(p) = v; }
// Past the caches; p is aligned to 64 bytes. What ends a task of the pool, an atomic instruction, makes
// it visible to others.
ALWAYS_INLINE void store_far(float* p, f32x16 v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#else
    store(p, v);
#endif
}
// (Written out, since 0 + x is an addition for floats: of -0 it makes 0.)
ALWAYS_INLINE f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
ALWAYS_INLINE i32x16 splat(int32_t x) { return i32x16{} + x; }

ALWAYS_INLINE f32x16 to_float(f32x16 v) { return v; }
ALWAYS_INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }

// b where either is not a number.
ALWAYS_INLINE f32x16 max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#endif
    return a > b ? a : b;
}
ALWAYS_INLINE f32x16 min(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#endif
    return a < b ? a : b;
}

// Sums and maxima over lanes, in a fixed order: each half with the other, down to one lane.
template <class Vector, class Join>
ALWAYS_INLINE auto over_lanes(Vector v, const Join& join) {
    v = join(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = join(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = join(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = join(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return v[0];
}

ALWAYS_INLINE float sum(f32x16 v) {
    return over_lanes(v, [](f32x16 a, f32x16 b) { return a + b; });
}
ALWAYS_INLINE int32_t sum(i32x16 v) {
    return over_lanes(v, [](i32x16 a, i32x16 b) { return a + b; });
}
ALWAYS_INLINE int32_t largest(i32x16 v) {
    return over_lanes(v, [](i32x16 a, i32x16 b) { return a > b ? a : b; });
}
ALWAYS_INLINE float largest(f32x16 v) {
    return over_lanes(v, [](f32x16 a, f32x16 b) { return max(a, b); });
}

// Nearest integers (ties to even) for |v| < 2^22: the constant pushes the fraction out.
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23
ALWAYS_INLINE f32x16 round(f32x16 v) { return (v + ROUND) - ROUND; }

// v * 2^n for whole numbers n from -126 to 127.
ALWAYS_INLINE f32x16 shifted(f32x16 v, f32x16 n) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_scalef_ps(0xffff, (__m512)v, (__m512)n);
#endif
    return v * (f32x16)((__builtin_convertvector(n, i32x16) + 127) << 23);
}

// Each v = e^v to 2 units in the last place; 0 below -87. Step by step for all of them: a processor
// does not look so far ahead that it would begin the second while it waits for the first.
template <int N>
ALWAYS_INLINE void exp(f32x16 (&v)[N]) {
    f32x16 n[N], r[N], p[N];
    UNROLLED for (int i = 0; i < N; i++) r[i] = min(splat(88.0f), max(splat(-87.0f), v[i]));
    UNROLLED for (int i = 0; i < N; i++) n[i] = round(r[i] * 1.44269504088896341f);
    UNROLLED for (int i = 0; i < N; i++) r[i] -= n[i] * 0.693359375f;  // ln 2 in two parts
    UNROLLED for (int i = 0; i < N; i++) r[i] += n[i] * 2.12194440e-4f;
    UNROLLED for (int i = 0; i < N; i++) p[i] = r[i] * 1.9875691500e-4f + 1.3981999507e-3f;
    for (const float factor : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        UNROLLED for (int i = 0; i < N; i++) p[i] = p[i] * r[i] + factor;
    }
    UNROLLED for (int i = 0; i < N; i++) p[i] *= r[i];
    UNROLLED for (int i = 0; i < N; i++) p[i] = p[i] * r[i] + r[i];
    UNROLLED for (int i = 0; i < N; i++) p[i] = shifted(p[i] + 1.0f, n[i]);
    UNROLLED for (int i = 0; i < N; i++) v[i] = v[i] < -87.0f ? f32x16{} : p[i];
}

ALWAYS_INLINE f32x16 exp(f32x16 v) {
    f32x16 one[1] = {v};
    exp(one);
    return one[0];
}

ALWAYS_INLINE f32x16 silu(f32x16 v) { return v / (1.0f + exp(-v)); }

// bf16 is the upper half of a float; rounding to the nearest even one.
ALWAYS_INLINE u16x16 to_bf16(f32x16 v) {
#if defined(__AVX512BF16__)  // (what is below 2^-126 becomes 0)
    return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#endif
    const u32x16 bits = (u32x16)v;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16x16);
}

ALWAYS_INLINE uint16_t to_bf16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

ALWAYS_INLINE float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

ALWAYS_INLINE f32x16 load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    // (Masked, since GCC 12 warns of what it leaves undefined without.)
    return (f32x16)((u32x16)_mm512_maskz_cvtepu16_epi32(0xffff, packed) << 16);
#endif
    u16x16 halves;
    memcpy(&halves, p, sizeof halves);
    return (f32x16)(__builtin_convertvector(halves, u32x16) << 16);
}

// A number format as products see it. Operands come in words of 32 bits, `STEP` numbers each: a
// vector holds one word for each of 16 outputs, against it stands one word of the input for all.
// dot: acc + the products of all numbers in a lane's word.

struct F32 {
    using Acc = f32x16;
    static constexpr int STEP = 1;
    static ALWAYS_INLINE Acc dot(Acc acc, i32x16 w, i32x16 a) { return acc + (f32x16)w * (f32x16)a; }
};

struct Bf16 {
    using Acc = f32x16;
    static constexpr int STEP = 2;
    static ALWAYS_INLINE Acc dot(Acc acc, i32x16 w, i32x16 a) {
#if defined(__AVX512BF16__)
        return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)a);
#else
        acc += (f32x16)(w << 16) * (f32x16)(a << 16);
        return acc + (f32x16)(w & -65536) * (f32x16)(a & -65536);
#endif
    }
};

// a: -127 .. 127; w: the same plus OFFSET, since the instruction wants one operand without sign.
// Tiles of AMX do not, so with them the sign stays, and is turned here for every use. The result is
// that of w + 128 either way.
struct Int8 {
    using Acc = i32x16;
    static constexpr int STEP = 4;
    static constexpr int OFFSET = AMX ? 0 : 128;
    static ALWAYS_INLINE Acc dot(Acc acc, i32x16 w, i32x16 a) {
        if constexpr (OFFSET == 0) w ^= static_cast<int32_t>(0x80808080);
#if defined(__AVX512VNNI__)
        return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a);
#elif defined(__AVX2__)
        // Pairs of 16-bit products cannot overflow 32 bits, unlike vpmaddubsw with its 16.
        union Halves { i32x16 whole; __m256i part[2]; } c{acc}, u{w}, s{a};
        for (int i = 0; i < 2; i++) {
            const __m256i even_w = _mm256_and_si256(u.part[i], _mm256_set1_epi16(0xff));
            const __m256i odd_w = _mm256_srli_epi16(u.part[i], 8);
            const __m256i even_a = _mm256_srai_epi16(_mm256_slli_epi16(s.part[i], 8), 8);
            const __m256i odd_a = _mm256_srai_epi16(s.part[i], 8);
            c.part[i] = _mm256_add_epi32(c.part[i], _mm256_madd_epi16(even_w, even_a));
            c.part[i] = _mm256_add_epi32(c.part[i], _mm256_madd_epi16(odd_w, odd_a));
        }
        return c.whole;
#else
        for (int byte = 0; byte < 4; byte++) {
            const i32x16 number = (i32x16)((u32x16)w << (24 - 8 * byte) >> 24);
            acc += number * ((a << (24 - 8 * byte)) >> 24);
        }
        return acc;
#endif
    }
};

// acc[i][j] += products over `words` words of row i of `a` (rows `lda` words apart) with the 16
// outputs at w[j], whose words are STRIDE vectors apart. (Fetching ahead by hand was slower than
// leaving it to the hardware.)
template <class T, int STRIDE, int MR, int NB>
ALWAYS_INLINE void accumulate(typename T::Acc (&acc)[MR][NB], const int32_t* a, size_t lda,
                              const int32_t* const (&w)[NB], int words) {
    for (int k = 0; k < words; k++) {
        i32x16 weights[NB];
        UNROLLED for (int j = 0; j < NB; j++) {
            weights[j] = *reinterpret_cast<const i32x16*>(w[j] + k * STRIDE * LANES);
        }
        UNROLLED for (int i = 0; i < MR; i++) {
            const i32x16 input = splat(a[i * lda + k]);
            UNROLLED for (int j = 0; j < NB; j++) acc[i][j] = T::dot(acc[i][j], weights[j], input);
        }
    }
}

}  // namespace fastserve
