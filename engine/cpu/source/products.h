/* The two products that everything is made of, each of a few tokens with weights that are read once.
 *
 * `packed_product`: weights packed in panels of N vectors of outputs, input by input (pairs of inputs
 * in bfloat16): y = x @ W.T. Linear layers, an FFN's matrices and attention scores use it.
 *
 * `row_product`: weights row by row as they are: y += h @ W. Attention's values use it.
 *
 * Both add a token's numbers one after another, in the order of the inputs, whatever else is in the
 * batch: an output depends on its own token alone, to the last bit.
 */
#ifndef AMBIDEX_PRODUCTS_H
#define AMBIDEX_PRODUCTS_H

#include "vectors.h"

#if defined(__AVX512BF16__)
#define UNPACKED_ORDER 1
#else
#define UNPACKED_ORDER 0
#endif

/* sums[m][n] += x[m] . panel columns n; K inputs, even if half. */
INLINE void packed_tile(const int M, const int N, const int half, const void *const *x,
                        const void *panel, ix K, vec sums[TOKENS][MOST_VECTORS]) {
    vec sum[TOKENS][MOST_VECTORS];
    const void *row[TOKENS];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
        row[m] = x[m];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sum[m][n] = sums[m][n];
    }
    if (half) {
        for (ix k = 0; k < K / 2; k++) {
            const uint32_t *w = (const uint32_t *)panel + k * N * LANES;
            bits column[MOST_VECTORS];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) column[n] = *(const bits *)(w + n * LANES);
#pragma GCC unroll 6
            for (int m = 0; m < M; m++) {
                uint32_t pair = ((const uint32_t *)row[m])[k];
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sum[m][n] = add_pairs(sum[m][n], column[n], pair);
            }
        }
    } else {
        for (ix k = 0; k < K; k++) {
            const float *w = (const float *)panel + k * N * LANES;
            vec column[MOST_VECTORS];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) column[n] = *(const vec *)(w + n * LANES);
#pragma GCC unroll 6
            for (int m = 0; m < M; m++) {
                vec value = splat(((const float *)row[m])[k]);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sum[m][n] = multiply_add(sum[m][n], column[n], value);
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[m][n] = sum[m][n];
}

#define TILE_OF(m, n) \
    case (m) * 8 + (n): packed_tile(m, n, half, x, panel, K, sums); break;
#define TILES_OF(m) TILE_OF(m, 1) TILE_OF(m, 2) TILE_OF(m, 4)

INLINE void packed_product(int M, int N, const int half, const void *const *x, const void *panel, ix K,
                           vec sums[TOKENS][MOST_VECTORS]) {
    switch (M * 8 + N) {
        TILES_OF(1) TILES_OF(2) TILES_OF(3)
#if TOKENS >= 4
        TILES_OF(4)
#endif
#if TOKENS >= 6
        TILES_OF(5) TILES_OF(6)
#endif
    }
}

/* What `packed_tile` computes, for MOST_VECTORS panels of one vector each. */
INLINE void panels_tile(const int M, const int half, const void *const *x, const void *const *panel,
                        ix K, vec sums[TOKENS][MOST_VECTORS]) {
    vec sum[TOKENS][MOST_VECTORS];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < MOST_VECTORS; n++) sum[m][n] = sums[m][n];
    for (ix k = 0; k < (half ? K / 2 : K); k++) {
        bits column[MOST_VECTORS];
#pragma GCC unroll 4
        for (int n = 0; n < MOST_VECTORS; n++)
            column[n] = *(const bits *)((const uint32_t *)panel[n] + k * LANES);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            uint32_t value = ((const uint32_t *)x[m])[k]; /* a pair in bfloat16, one in float32 */
#pragma GCC unroll 4
            for (int n = 0; n < MOST_VECTORS; n++) {
                if (half) sum[m][n] = add_pairs(sum[m][n], column[n], value);
                else sum[m][n] = multiply_add(sum[m][n], (vec)column[n],
                                              splat(((const float *)x[m])[k]));
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < MOST_VECTORS; n++) sums[m][n] = sum[m][n];
}

#define PANELS_OF(m) \
    case m: panels_tile(m, half, x, panel, K, sums); break;

INLINE void panels_product(int M, const int half, const void *const *x, const void *const *panel, ix K,
                           vec sums[TOKENS][MOST_VECTORS]) {
    switch (M) {
        PANELS_OF(1) PANELS_OF(2) PANELS_OF(3)
#if TOKENS >= 4
        PANELS_OF(4)
#endif
#if TOKENS >= 6
        PANELS_OF(5) PANELS_OF(6)
#endif
    }
}

/* Whether a pair in bfloat16, or one float32 number, is zero; -0.0 is. */
INLINE int is_zero(uint32_t word, const int half) {
    return !(word & (half ? 0x7fff7fffu : 0x7fffffffu));
}

/* What `packed_tile` computes, for one token with many zeros among its inputs: it does not read the
 * weights of those. */
INLINE void thin_product(const int N, const int half, const void *x, const void *panel, ix K, vec *sums) {
    vec sum[MOST_VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[n] = sums[n];
    for (ix k = 0; k < (half ? K / 2 : K); k++) {
        uint32_t value = ((const uint32_t *)x)[k]; /* a pair in bfloat16, one input in float32 */
        if (is_zero(value, half)) continue;
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const uint32_t *w = (const uint32_t *)panel + (k * N + n) * LANES;
            if (half) sum[n] = add_pairs(sum[n], *(const bits *)w, value);
            else sum[n] = multiply_add(sum[n], *(const vec *)w, splat(((const float *)x)[k]));
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[n] = sum[n];
}

INLINE void thin_product_of(int N, const int half, const void *x, const void *panel, ix K, vec *sums) {
    if (N == 4) thin_product(4, half, x, panel, K, sums);
    else if (N == 2) thin_product(2, half, x, panel, K, sums);
    else thin_product(1, half, x, panel, K, sums);
}

/* Two rows of weights, N vectors of columns, as operands of `add_pairs`: with AVX512, each 32 columns
 * in the order that unpacking leaves. */
INLINE void unpack_rows(const int N, const void *even, const void *odd, bits column[MOST_VECTORS]) {
#if UNPACKED_ORDER
#pragma GCC unroll 2
    for (int n = 0; n < N; n += 2) {
        __m512i a = _mm512_loadu_si512((const uint16_t *)even + n * LANES);
        __m512i b = _mm512_loadu_si512((const uint16_t *)odd + n * LANES);
        column[n] = (bits)_mm512_unpacklo_epi16(a, b);
        column[n + 1] = (bits)_mm512_unpackhi_epi16(a, b);
    }
#else
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        bits a = __builtin_convertvector(*(const halves *)((const uint16_t *)even + n * LANES), bits);
        bits b = __builtin_convertvector(*(const halves *)((const uint16_t *)odd + n * LANES), bits);
        column[n] = a | b << 16;
    }
#endif
}

/* Bring the sums at y into the order of unpacked rows, and back. */
INLINE void take_sums(const int N, const int half, const float *y, vec *sum) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[n] = *(const vec *)(y + n * LANES);
#if UNPACKED_ORDER
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
#pragma GCC unroll 2
    for (int n = 0; half && n < N; n += 2) {
        __m512 a = (__m512)sum[n], b = (__m512)sum[n + 1];
        sum[n] = (vec)_mm512_permutex2var_ps(a, low, b);
        sum[n + 1] = (vec)_mm512_permutex2var_ps(a, high, b);
    }
#endif
}

INLINE void give_sums(const int N, const int half, const vec *sum, float *y) {
#if UNPACKED_ORDER
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 2
    for (int n = 0; half && n < N; n += 2) {
        __m512 a = (__m512)sum[n], b = (__m512)sum[n + 1];
        *(vec *)(y + n * LANES) = (vec)_mm512_permutex2var_ps(a, low, b);
        *(vec *)(y + (n + 1) * LANES) = (vec)_mm512_permutex2var_ps(a, high, b);
    }
    if (half) return;
#endif
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) *(vec *)(y + n * LANES) = sum[n];
}

/* y[m] += h[m] @ rows, N vectors of columns; S rows, `stride` elements apart. */
INLINE void row_tile(const int M, const int N, const int half, const void *const *h, const void *rows,
                     ix stride, ix S, float *const *y) {
    vec sum[TOKENS][MOST_VECTORS];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) take_sums(N, half, y[m], sum[m]);
    for (ix s = 0; s < S; s += 2) {
        const void *even = at(rows, s * stride, half);
        const void *odd = s + 1 < S ? at(rows, (s + 1) * stride, half) : even;
        if (half) {
            bits column[MOST_VECTORS];
            unpack_rows(N, even, odd, column);
#pragma GCC unroll 6
            for (int m = 0; m < M; m++) {
                uint32_t pair = ((const uint32_t *)h[m])[s / 2]; /* padded with zero to an even S */
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sum[m][n] = add_pairs(sum[m][n], column[n], pair);
            }
        } else {
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                vec a = load(even, n * LANES, 0), b = load(odd, n * LANES, 0);
#pragma GCC unroll 6
                for (int m = 0; m < M; m++) {
                    sum[m][n] = multiply_add(sum[m][n], a, splat(((const float *)h[m])[s]));
                    sum[m][n] = multiply_add(sum[m][n], b, splat(((const float *)h[m])[s + 1]));
                }
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) give_sums(N, half, sum[m], y[m]);
}

#define ROWS_OF(m, n) \
    case (m) * 8 + (n): row_tile(m, n, half, h, rows, stride, S, y); break;
#define ROW_TILES_OF(m) ROWS_OF(m, 2) ROWS_OF(m, 4)

INLINE void row_product(int M, int N, const int half, const void *const *h, const void *rows, ix stride,
                        ix S, float *const *y) {
    switch (M * 8 + N) {
        ROW_TILES_OF(1) ROW_TILES_OF(2) ROW_TILES_OF(3)
#if TOKENS >= 4
        ROW_TILES_OF(4)
#endif
#if TOKENS >= 6
        ROW_TILES_OF(5) ROW_TILES_OF(6)
#endif
    }
}

#endif
