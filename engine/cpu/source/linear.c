/* y = x @ W.T + bias from packed weights; without a bias, NULL.
 * engine/cpu/linear.py describes the arguments. */
#include "products.h"

/* Multiplies tokens x[0 .. T) with one panel of N vectors and writes its first `real` columns to
 * y + m * y_stride; the others are padding. */
INLINE void panel_product(const int half, const void *const *x, ix T, const void *panel, int N, ix K,
                          ix real, const float *bias, void *y, ix y_stride) {
    for (ix t = 0; t < T; t += TOKENS) {
        vec sums[TOKENS][MOST_VECTORS] = {};
        int M = T - t < TOKENS ? (int)(T - t) : TOKENS;
        packed_product(M, N, half, x + t, panel, K, sums);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) {
                vec value = sums[m][n];
                if (bias) value += *(const vec *)(bias + n * LANES);
                ix to = (t + m) * y_stride + n * LANES;
                if ((n + 1) * LANES <= real) store(y, to, value, half);
                else
                    for (int i = 0; n * LANES + i < real; i++) write_one(y, to + i, value[i], half);
            }
    }
}

/* How many tokens' inputs stay in the processor's cache while all panels are read. */
#define CACHED_TOKENS 96

INLINE void linear(const int half, const void *x, const void *w, const float *bias, void *y, ix T, ix N,
                   ix K, int vectors, int threads) {
    const ix width = vectors * LANES, panels = (N + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ix p = 0; p < panels; p++) {
        const void *panel = at(w, p * width * K, half), *rows[CACHED_TOKENS];
        ix real = N - p * width < width ? N - p * width : width;
        for (ix t = 0; t < T; t += CACHED_TOKENS) {
            ix tokens = T - t < CACHED_TOKENS ? T - t : CACHED_TOKENS;
            for (ix i = 0; i < tokens; i++) rows[i] = at(x, (t + i) * K, half);
            void *to = (void *)at(y, t * N + p * width, half);
            panel_product(half, rows, tokens, panel, vectors, K, real, bias ? bias + p * width : NULL, to,
                          N);
        }
    }
}

void linear_float(const void *x, const void *w, const float *bias, void *y, ix T, ix N, ix K,
                  int vectors, int threads) {
    linear(0, x, w, bias, y, T, N, K, vectors, threads);
}

void linear_half(const void *x, const void *w, const float *bias, void *y, ix T, ix N, ix K,
                 int vectors, int threads) {
    linear(1, x, w, bias, y, T, N, K, vectors, threads);
}

/* float32 numbers of one vector: panels are measured in vectors. */
int lanes(void) { return LANES; }
