/* Which experts each token uses, by the rule of engine/model/routing.py. engine/cpu/experts.py
 * describes the arguments. */
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

/* Chooses rank 0, and every rank below k as long as the ranks before it hold less than `mass`. */
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
                       uint8_t *chosen, ix T, ix E, ix D, const int half, int threads) {
#pragma omp parallel num_threads(T * E * D > 1 << 16 ? threads : 1)
    {
        float *scores = malloc(E * sizeof(float));
#pragma omp for schedule(static)
        for (ix t = 0; t < T; t++) {
            scores_of(at(x, t * D, half), router, E, D, scores, half);
            choose(scores, E, k[t], mass[t], chosen + t * E);
        }
        free(scores);
    }
}

void choose_float(const void *x, const float *router, const int32_t *k, const float *mass,
                  uint8_t *chosen, ix T, ix E, ix D, int threads) {
    choose_all(x, router, k, mass, chosen, T, E, D, 0, threads);
}

void choose_half(const void *x, const float *router, const int32_t *k, const float *mass,
                 uint8_t *chosen, ix T, ix E, ix D, int threads) {
    choose_all(x, router, k, mass, chosen, T, E, D, 1, threads);
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
