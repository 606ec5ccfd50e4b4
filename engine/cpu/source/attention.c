/* Attention of a flat batch over the paged cache. engine/cpu/cache.py calls it and describes the
 * arguments.
 *
 * A block holds BLOCK tokens of every key-value head: keys packed as `packed_product` wants its
 * weights, values row by row. So scores and values are the two products of products.h, and a query's
 * result depends on its own context alone, whether it came in a prompt's chunk or by itself.
 */
#include <stdlib.h>

#include "products.h"

#define BLOCK 16
#define VECTORS (BLOCK / LANES)

typedef struct {
    const void *q;                                 /* [T, H, d], rows q_stride apart */
    const void *keys, *values;                     /* one layer's cache */
    const int32_t *table, *first, *rows, *context; /* per sequence, as in engine/cpu/cache.py */
    void *out;                                     /* [T, H, d] */
    ix B, H, G, d, q_stride, table_stride, window; /* window: tokens that a token sees; 0: all */
    float scale;
} attend_call;

/* exp(x) for x <= 0, within 2 units in the last place; 0 where x is below -87 or -inf. */
INLINE vec exponential(vec x) {
    bits keep = (bits)(x > -87.0f);
    x = (vec)((bits)x & keep);
    /* Adding this constant leaves the nearest integer in the sum's low bits. */
    vec n = multiply_add(splat(12582912.0f), x, splat(1.44269504f));
    bits power = (bits)n << 23;
    n -= 12582912.0f;
    x = multiply_add(multiply_add(x, n, splat(-0.693359375f)), n, splat(2.12194440e-4f));
    vec y = splat(1.9875691500e-4f);
    y = multiply_add(splat(1.3981999507e-3f), y, x);
    y = multiply_add(splat(8.3334519073e-3f), y, x);
    y = multiply_add(splat(4.1665795894e-2f), y, x);
    y = multiply_add(splat(1.6666665459e-1f), y, x);
    y = multiply_add(splat(5.0000001201e-1f), y, x);
    y = multiply_add(x, y * x, x) + 1.0f;
    return (vec)(((bits)y + power) & keep);
}

/* Prefetches one head's part of a block: blocks lie anywhere in memory, so the processor cannot
 * foresee the next one. */
INLINE void ask_for(const void *cache, const attend_call *call, ix block, ix g, const int half) {
    const char *part = at(cache, (block * call->G + g) * BLOCK * call->d, half);
    for (ix i = 0; i < bytes(BLOCK * call->d, half); i += 64) __builtin_prefetch(part + i, 0, 2);
}

/* Scores of M queries for blocks `b` .. `blocks` of keys: scores[m * stride + j]. */
INLINE void score(const attend_call *call, const int32_t *table, ix g, const void *const *q, int M,
                  ix b, ix blocks, float *scores, ix stride, const int half) {
#if VECTORS == 1
    /* Several blocks are computed side by side: a single one is a chain of sums that wait for each other. */
    for (; b + MOST_VECTORS <= blocks; b += MOST_VECTORS) {
        vec sums[TOKENS][MOST_VECTORS] = {};
        for (int n = 0; M < TOKENS && n < MOST_VECTORS; n++) { /* more rows take longer to compute */
            ix next = b + MOST_VECTORS + n;
            if (next < blocks) ask_for(call->keys, call, table[next], g, half);
            ask_for(call->values, call, table[b + n], g, half);
        }
        const void *keys[MOST_VECTORS];
        for (int n = 0; n < MOST_VECTORS; n++)
            keys[n] = at(call->keys, ((ix)table[b + n] * call->G + g) * BLOCK * call->d, half);
        panels_product(M, half, q, keys, call->d, sums);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < MOST_VECTORS; n++)
                *(vec *)(scores + m * stride + (b + n) * BLOCK) = sums[m][n] * call->scale;
    }
#endif
    for (; b < blocks; b++) {
        vec sums[TOKENS][MOST_VECTORS] = {};
        ix block = ((ix)table[b] * call->G + g) * BLOCK * call->d;
        packed_product(M, VECTORS, half, q, at(call->keys, block, half), call->d, sums);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < VECTORS; n++)
                *(vec *)(scores + m * stride + b * BLOCK + n * LANES) = sums[m][n] * call->scale;
    }
}

/* Softmax over scores `first` .. `context` of those from `start` to `length`, in place; the others
 * become 0. `start` begins a block. Returns the sum. */
INLINE float weigh(float *scores, ix start, ix first, ix context, ix length) {
    for (ix j = start; j < first; j++) scores[j] = -INFINITY;
    for (ix j = context; j < length; j++) scores[j] = -INFINITY;
    vec top = splat(-INFINITY), sum = splat(0);
    for (ix j = start; j < length; j += LANES) {
        vec x = *(vec *)(scores + j);
        bits more = (bits)(x > top);
        top = (vec)(((bits)x & more) | ((bits)top & ~more));
    }
    float most = greatest(top);
    for (ix j = start; j < length; j += LANES) {
        vec weight = exponential(*(vec *)(scores + j) - most);
        *(vec *)(scores + j) = weight;
        sum += weight;
    }
    return total(sum);
}

/* y[m] += weights[m] @ values, of one block's first `count` tokens. */
INLINE void add_values(int M, const void *const *weights, const void *values, ix count, ix d,
                       float *const *y, const int half) {
    for (ix c = 0; c < d;) {
        int N = d - c >= MOST_VECTORS * LANES ? MOST_VECTORS : 2;
        float *to[TOKENS];
        for (int m = 0; m < M; m++) to[m] = y[m] + c;
        row_product(M, N, half, weights, at(values, c, half), d, count, to);
        c += N * LANES;
    }
}

/* Attention of M queries that share the key-value head g, given as (token, head); writes to `out`.
 * `scratch` holds the scores, their rounded copies and the sums of values, for TOKENS rows each. */
INLINE void attend_rows(const attend_call *call, ix sequence, ix g, int M, const ix *token,
                        const ix *head, float *scratch, ix stride, const int half) {
    const ix d = call->d, H = call->H;
    const int32_t *table = call->table + sequence * call->table_stride;
    const ix first = call->first[sequence], rows = call->rows[sequence];
    const void *q[TOKENS], *weights[TOKENS];
    float sums[TOKENS], *y[TOKENS], *scores = scratch;
    uint16_t *rounded = (uint16_t *)(scratch + TOKENS * stride);
    float *values = scratch + 2 * TOKENS * stride;
    ix longest = 0, least = INT64_MAX, context[TOKENS];
    for (int m = 0; m < M; m++) {
        q[m] = at(call->q, token[m] * call->q_stride + head[m] * d, half);
        context[m] = call->context[sequence] - (first + rows - 1 - token[m]);
        longest = context[m] > longest ? context[m] : longest;
        least = context[m] < least ? context[m] : least;
        y[m] = values + m * d;
        memset(y[m], 0, d * sizeof(float));
    }
    const ix blocks = (longest + BLOCK - 1) / BLOCK, length = blocks * BLOCK, window = call->window;
    const ix skipped = window && least > window ? (least - window) / BLOCK : 0;
    score(call, table, g, q, M, skipped, blocks, scores, stride, half);
    /* Scores become weights; in bfloat16 they are rounded, as the product takes both sides alike. */
    for (int m = 0; m < M; m++) {
        const ix seen = window && context[m] > window ? context[m] - window : 0;
        sums[m] = weigh(scores + m * stride, skipped * BLOCK, seen, context[m], length);
        weights[m] = half ? (void *)(rounded + m * stride) : (void *)(scores + m * stride);
        for (ix j = skipped * BLOCK; half && j < length; j += LANES)
            store(rounded, m * stride + j, *(vec *)(scores + m * stride + j), 1);
    }
    for (ix b = skipped; b < blocks; b++) {
        const ix start = b * BLOCK, block = ((ix)table[b] * call->G + g) * BLOCK * d;
        const void *now[TOKENS], *rows_of_values = at(call->values, block, half);
        for (int m = 0; m < M; m++) now[m] = at(weights[m], start, half);
        /* A block that all M tokens see to the same extent is one product. */
        if (start + BLOCK <= least || least == longest) {
            ix left = longest - start;
            add_values(M, now, rows_of_values, left < BLOCK ? left : BLOCK, d, y, half);
            continue;
        }
        for (int m = 0; m < M; m++) { /* one by one: a later token's values must not
                                         * count, not even times zero (they may be NaN) */
            ix left = context[m] - start;
            if (left > 0)
                add_values(1, now + m, rows_of_values, left < BLOCK ? left : BLOCK, d, y + m, half);
        }
    }
    for (int m = 0; m < M; m++)
        for (ix c = 0; c < d; c += LANES)
            store(call->out, (token[m] * H + head[m]) * d + c, *(vec *)(y[m] + c) / sums[m], half);
}

INLINE void attend(const attend_call *call, const int half, int threads) {
    ix longest = 0;
    for (ix b = 0; b < call->B; b++)
        longest = call->context[b] > longest ? call->context[b] : longest;
    const ix stride = (longest + BLOCK) / BLOCK * BLOCK + BLOCK, shared = call->H / call->G;
#pragma omp parallel num_threads(threads)
    {
        float *scratch = malloc((2 * TOKENS * stride + TOKENS * call->d) * sizeof(float));
#pragma omp for schedule(dynamic, 4) collapse(2)
        for (ix b = 0; b < call->B; b++)
            for (ix g = 0; g < call->G; g++) {
                const ix all = call->rows[b] * shared;
                for (ix i = 0; i < all; i += TOKENS) {
                    int M = all - i < TOKENS ? (int)(all - i) : TOKENS;
                    ix token[TOKENS], head[TOKENS];
                    for (int m = 0; m < M; m++) {
                        token[m] = call->first[b] + (i + m) / shared;
                        head[m] = g * shared + (i + m) % shared;
                    }
                    attend_rows(call, b, g, M, token, head, scratch, stride, half);
                }
            }
        free(scratch);
    }
}

#define ARGUMENTS                                                                                    \
    const void *q, const void *keys, const void *values, const int32_t *table, const int32_t *first, \
        const int32_t *rows, const int32_t *context, void *out, ix B, ix H, ix G, ix d, ix q_stride, \
        ix table_stride, ix window, float scale, int threads
#define CALL                                                                                     \
    {q, keys, values, table, first, rows, context, out, B, H, G, d, q_stride, table_stride, window, \
     scale}

void attend_float(ARGUMENTS) {
    attend_call call = CALL;
    attend(&call, 0, threads);
}

void attend_half(ARGUMENTS) {
    attend_call call = CALL;
    attend(&call, 1, threads);
}

/* Writes keys and values of T tokens to their slots, [slot / BLOCK, G, ...] each. */
INLINE void store_kv(const void *k, const void *v, const int64_t *slot, void *keys, void *values, ix T,
                     ix G, ix d, ix k_stride, ix v_stride, const int half, int threads) {
#pragma omp parallel for schedule(static) num_threads(T * G * d > 1 << 15 ? threads : 1)
    for (ix t = 0; t < T; t++)
        for (ix g = 0; g < G; g++) {
            ix block = (slot[t] / BLOCK * G + g) * BLOCK * d, j = slot[t] % BLOCK;
            const void *key = at(k, t * k_stride + g * d, half);
            if (half) {
                uint32_t *packed = (uint32_t *)keys + block / 2 + j;
                for (ix c = 0; c < d / 2; c++) packed[c * BLOCK] = ((const uint32_t *)key)[c];
            } else {
                float *packed = (float *)keys + block + j;
                for (ix c = 0; c < d; c++) packed[c * BLOCK] = ((const float *)key)[c];
            }
            memcpy((void *)at(values, block + j * d, half), at(v, t * v_stride + g * d, half),
                   bytes(d, half));
        }
}

void store_kv_float(const void *k, const void *v, const int64_t *slot, void *keys, void *values, ix T,
                    ix G, ix d, ix k_stride, ix v_stride, int threads) {
    store_kv(k, v, slot, keys, values, T, G, d, k_stride, v_stride, 0, threads);
}

void store_kv_half(const void *k, const void *v, const int64_t *slot, void *keys, void *values, ix T,
                   ix G, ix d, ix k_stride, ix v_stride, int threads) {
    store_kv(k, v, slot, keys, values, T, G, d, k_stride, v_stride, 1, threads);
}
