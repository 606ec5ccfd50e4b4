/* Which experts each token uses: the rule of kernels/routing.py. Contract: native/__init__.py. */
#include <stdlib.h>

#include "vectors.h"

/* Scores in float32 with a fixed order of additions, so that a choice never depends on the batch. */
INLINE void scores_of(const void *x, const float *router, ix E, ix D, float *scores, const int half) {
    for (ix e = 0; e < E; e++) {
        vec sum = splat(0);
        ix i = 0;
        for (; i + LANES <= D; i += LANES)
            sum = multiply_add(sum, load(x, i, half), *(const vec *)(router + e * D + i));
        float score = total(sum);
        for (; i < D; i++) score += read_one(x, i, half) * router[e * D + i];
        scores[e] = score == score ? score : -INFINITY;
    }
}

/* Chosen: rank 0, and every rank below k before whose share `mass` is not yet reached. */
INLINE void choose(float *scores, ix E, int k, float mass, uint8_t *chosen) {
    float top = -INFINITY, sum = 0, before = 0;
    for (ix e = 0; e < E; e++) top = scores[e] > top ? scores[e] : top;
    for (ix e = 0; mass <= 1 && e < E; e++) sum += expf(scores[e] - top);
    for (ix e = 0; e < E; e++) chosen[e] = 0;
    if (top == -INFINITY && k > 1) k = 1; /* no score is a number: shares mean nothing */
    int taken = 0;
    while (taken < k && taken < E && (taken == 0 || before < mass)) {
        ix best = -1;
        for (ix e = 0; e < E; e++)
            if (!chosen[e] && (best < 0 || scores[e] > scores[best])) best = e;
        chosen[best] = 1;
        taken++;
        if (mass <= 1) before += expf(scores[best] - top) / sum;
    }
}

INLINE void choose_all(const void *x, const float *router, const int32_t *k, const float *mass,
                       float *kept, uint8_t *chosen, ix T, ix E, ix D, const int half, int threads) {
#pragma omp parallel num_threads(T * E * D > 1 << 16 ? threads : 1)
    {
        float *own = kept ? NULL : malloc(E * sizeof(float));
#pragma omp for schedule(static)
        for (ix t = 0; t < T; t++) {
            float *scores = kept ? kept + t * E : own;
            scores_of(at(x, t * D, half), router, E, D, scores, half);
            choose(scores, E, k[t], mass[t], chosen + t * E);
        }
        free(own);
    }
}

void choose_float(const void *x, const float *router, const int32_t *k, const float *mass,
                  float *kept, uint8_t *chosen, ix T, ix E, ix D, int threads) {
    choose_all(x, router, k, mass, kept, chosen, T, E, D, 0, threads);
}

void choose_half(const void *x, const float *router, const int32_t *k, const float *mass,
                 float *kept, uint8_t *chosen, ix T, ix E, ix D, int threads) {
    choose_all(x, router, k, mass, kept, chosen, T, E, D, 1, threads);
}

/* Experts by score, ties to the lower index. */
INLINE void in_order(const float *scores, ix E, int32_t *order) {
    for (ix e = 0; e < E; e++) {
        int ahead = 0;
        for (ix i = 0; i < e; i++) ahead += scores[i] >= scores[e];
        for (ix i = e + 1; i < E; i++) ahead += scores[i] > scores[e];
        order[ahead] = (int32_t)e;
    }
}

/* Step 2 of kernels/sharing.py: what the token needs of its own although nobody reads it yet. */
INLINE void take(const float *scores, const int32_t *order, const uint8_t *read, ix E, int k,
                 uint8_t *chosen) {
    const float top = scores[order[0]];
    float riders = 0, missed = 0;
    for (int r = 0; r < E && r < k; r++)
        if (!read[order[r]]) missed += expf(scores[order[r]] - top);
    for (int r = k, found = 0; r < E && found < k / 2; r++)
        if (read[order[r]]) riders += expf(scores[order[r]] - top), found++;
    for (int r = 0; r < E && r < k; r++)
        if (!read[order[r]] && (missed > riders || riders == 0)) {
            chosen[order[r]] = 1;
            missed -= expf(scores[order[r]] - top);
        }
}

/* Step 3: the best that is read. */
INLINE void use(const int32_t *order, const uint8_t *read, ix E, int k, uint8_t *chosen) {
    memset(chosen, 0, E);
    for (ix r = 0, used = 0; r < E && used < k + k / 2; r++)
        if (read[order[r]]) chosen[order[r]] = 1, used++;
}

static void read_by(const uint8_t *chosen, uint8_t *read, ix T, ix E) {
    memset(read, 0, E);
    for (ix t = 0; t < T; t++)
        for (ix e = 0; e < E; e++) read[e] |= chosen[t * E + e];
}

void share(const float *scores, const int32_t *k, uint8_t *chosen, ix T, ix E, int threads) {
    int32_t *order = malloc(T * E * sizeof(int32_t));
    uint8_t *read = malloc(E);
    read_by(chosen, read, T, E);
#pragma omp parallel for num_threads(T * E * E > 1 << 18 ? threads : 1) schedule(static)
    for (ix t = 0; t < T; t++) {
        if (!k[t]) continue;
        in_order(scores + t * E, E, order + t * E);
        if (scores[t * E + order[t * E]] == -INFINITY) continue; /* shares mean nothing */
        take(scores + t * E, order + t * E, read, E, k[t], chosen + t * E);
    }
    read_by(chosen, read, T, E);
    for (ix t = 0; t < T; t++)
        if (k[t] && scores[t * E + order[t * E]] > -INFINITY)
            use(order + t * E, read, E, k[t], chosen + t * E);
    free(order);
    free(read);
}

/* The pairs of `chosen`, sorted by expert and then by token: expert[u] is the u-th expert in use, its
 * tokens are token[offsets[u] .. offsets[u + 1]). Returns how many experts are in use. */
int sort_pairs(const uint8_t *chosen, int32_t *expert, int32_t *offsets, int32_t *token, ix T, ix E) {
    int used = 0, pairs = 0;
    offsets[0] = 0;
    for (ix e = 0; e < E; e++) {
        int before = pairs;
        for (ix t = 0; t < T; t++)
            if (chosen[t * E + e]) token[pairs++] = (int32_t)t;
        if (pairs > before) {
            expert[used++] = (int32_t)e;
            offsets[used] = pairs;
        }
    }
    return used;
}
