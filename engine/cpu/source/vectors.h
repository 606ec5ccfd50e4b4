/* Vectors of float32 on any processor, by GCC's vector extensions, and the conversions to and from
 * bfloat16. `half` says that a pointer is to bfloat16 instead of float32; it is always a constant
 * where these are inlined, so no branch is left. */
#ifndef AMBIDEX_VECTORS_H
#define AMBIDEX_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* A vector has LANES numbers. TOKENS tokens are computed at a time, with at most 4 vectors of outputs each, so that
 * all sums stay in registers. */
#if defined(__AVX512F__)
#define LANES 16
#define TOKENS 6
#elif defined(__AVX2__)
#define LANES 8
#define TOKENS 3
#else
#define LANES 4
#define TOKENS 4
#endif
#define MOST_VECTORS 4

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int64_t ix;

INLINE vec splat(float x) { return (vec){0} + x; }

/* sum + a * b in one rounding, where the processor has that. Spelled out, because a compiler that is
 * free to fuse does so in one tile and not in another, and a token's bits would depend on the other
 * tokens; build.py forbids it to fuse on its own. */
INLINE vec multiply_add(vec sum, vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

INLINE float total(vec x) {
    float out = 0;
    for (int i = 0; i < LANES; i++) out += x[i];
    return out;
}

INLINE float greatest(vec x) {
    float out = x[0];
    for (int i = 1; i < LANES; i++) out = x[i] > out ? x[i] : out;
    return out;
}

INLINE float widen(uint16_t x) {
    uint32_t word = (uint32_t)x << 16;
    float out;
    memcpy(&out, &word, 4);
    return out;
}

INLINE uint16_t narrow(float x) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t word;
    memcpy(&word, &x, 4);
    if (x != x) return (uint16_t)((word >> 16) | 0x40);
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE ix bytes(ix elements, int half) { return elements * (half ? 2 : 4); }

INLINE const void *at(const void *p, ix i, int half) { return (const char *)p + bytes(i, half); }

INLINE vec load(const void *p, ix i, int half) {
    if (!half) return *(const vec *)((const float *)p + i);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)p + i), bits) << 16);
}

INLINE void store(void *p, ix i, vec x, int half) {
    if (!half) {
        *(vec *)((float *)p + i) = x;
        return;
    }
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)((uint16_t *)p + i), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    for (int j = 0; j < LANES; j++) ((uint16_t *)p)[i + j] = narrow(x[j]);
#endif
}

INLINE float read_one(const void *p, ix i, int half) {
    return half ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

INLINE void write_one(void *p, ix i, float x, int half) {
    if (half) ((uint16_t *)p)[i] = narrow(x);
    else ((float *)p)[i] = x;
}

/* sum + second of each pair * second of `b`, then + first * first: as the processor's own instruction
 * rounds it, so that every path gives the same bits. */
INLINE vec add_pairs(vec sum, bits a, uint32_t b) {
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32((int)b));
#else
    sum = multiply_add(sum, (vec)(a & 0xffff0000u), splat(widen((uint16_t)(b >> 16))));
    return multiply_add(sum, (vec)(a << 16), splat(widen((uint16_t)b)));
#endif
}

#endif
