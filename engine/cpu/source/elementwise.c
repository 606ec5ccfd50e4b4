/* The small steps between the products. engine/cpu/elementwise.py describes the arguments. */
#include "vectors.h"

/* One row of x += multiplier * delta, unless that is NULL. */
INLINE void add_row(void *row, const void *delta, ix D, float multiplier, const int half) {
    for (ix i = 0; delta && i < D; i += LANES)
        store(row, i, load(row, i, half) + multiplier * load(delta, i, half), half);
}

/* x += multiplier * delta (unless NULL), then out = x / sqrt(mean(x^2) + eps) * weight, row by row. */
INLINE void rms_norm(void *x, const void *delta, const void *weight, void *out, ix T, ix D,
                     float multiplier, float eps, const int half, int threads) {
#pragma omp parallel for schedule(static) num_threads(T * D > 1 << 15 ? threads : 1)
    for (ix t = 0; t < T; t++) {
        void *row = (void *)at(x, t * D, half);
        vec squares = splat(0);
        add_row(row, delta ? at(delta, t * D, half) : NULL, D, multiplier, half);
        for (ix i = 0; i < D; i += LANES) {
            vec value = load(row, i, half);
            squares = multiply_add(squares, value, value);
        }
        vec scale = splat(1.0f / sqrtf(total(squares) / D + eps));
        for (ix i = 0; i < D; i += LANES)
            store(out, t * D + i, load(row, i, half) * scale * load(weight, i, half), half);
    }
}

/* The same with LayerNorm, (x - mean) / sqrt(variance + eps) * weight + bias; `out` may be x. */
INLINE void layer_norm(void *x, const void *delta, const void *weight, const void *bias, void *out,
                       ix T, ix D, float multiplier, float eps, const int half, int threads) {
#pragma omp parallel for schedule(static) num_threads(T * D > 1 << 15 ? threads : 1)
    for (ix t = 0; t < T; t++) {
        void *row = (void *)at(x, t * D, half);
        vec sum = splat(0), squares = splat(0);
        add_row(row, delta ? at(delta, t * D, half) : NULL, D, multiplier, half);
        for (ix i = 0; i < D; i += LANES) sum += load(row, i, half);
        vec mean = splat(total(sum) / D);
        for (ix i = 0; i < D; i += LANES) {
            vec value = load(row, i, half) - mean;
            squares = multiply_add(squares, value, value);
        }
        vec scale = splat(1.0f / sqrtf(total(squares) / D + eps));
        for (ix i = 0; i < D; i += LANES) {
            vec value = (load(row, i, half) - mean) * scale * load(weight, i, half);
            store(out, t * D + i, value + load(bias, i, half), half);
        }
    }
}

#define NORMS(TYPE, HALF)                                                                             \
    void rms_norm_##TYPE(void *x, const void *delta, const void *weight, void *out, ix T, ix D,       \
                         float multiplier, float eps, int threads) {                                  \
        rms_norm(x, delta, weight, out, T, D, multiplier, eps, HALF, threads);                        \
    }                                                                                                 \
    void layer_norm_##TYPE(void *x, const void *delta, const void *weight, const void *bias,          \
                           void *out, ix T, ix D, float multiplier, float eps, int threads) {         \
        layer_norm(x, delta, weight, bias, out, T, D, multiplier, eps, HALF, threads);                \
    }

NORMS(float, 0)
NORMS(half, 1)

/* x += multiplier * delta, as the norms add it. */
INLINE void add_scaled(void *x, const void *delta, ix T, ix D, float multiplier, const int half,
                       int threads) {
#pragma omp parallel for schedule(static) num_threads(T * D > 1 << 15 ? threads : 1)
    for (ix t = 0; t < T; t++)
        add_row((void *)at(x, t * D, half), at(delta, t * D, half), D, multiplier, half);
}

void add_scaled_float(void *x, const void *delta, ix T, ix D, float multiplier, int threads) {
    add_scaled(x, delta, T, D, multiplier, 0, threads);
}

void add_scaled_half(void *x, const void *delta, ix T, ix D, float multiplier, int threads) {
    add_scaled(x, delta, T, D, multiplier, 1, threads);
}

/* Rotates the halves of `heads` heads of d elements, in place; rows `stride` elements apart. d is a
 * multiple of 32. */
INLINE void rotate(void *x, const float *cos, const float *sin, ix T, ix heads, ix d, ix stride,
                   const int half, int threads) {
#pragma omp parallel for schedule(static) num_threads(T * heads * d > 1 << 15 ? threads : 1)
    for (ix t = 0; t < T; t++)
        for (ix h = 0; h < heads; h++) {
            void *first = (void *)at(x, t * stride + h * d, half);
            void *second = (void *)at(first, d / 2, half);
            for (ix i = 0; i < d / 2; i += LANES) {
                vec a = load(first, i, half), b = load(second, i, half);
                vec c = *(const vec *)(cos + t * (d / 2) + i), s = *(const vec *)(sin + t * (d / 2) + i);
                store(first, i, a * c - b * s, half);
                store(second, i, b * c + a * s, half);
            }
        }
}

void rotate_float(void *x, const float *cos, const float *sin, ix T, ix heads, ix d, ix stride,
                  int threads) {
    rotate(x, cos, sin, T, heads, d, stride, 0, threads);
}

void rotate_half(void *x, const float *cos, const float *sin, ix T, ix heads, ix d, ix stride,
                 int threads) {
    rotate(x, cos, sin, T, heads, d, stride, 1, threads);
}
