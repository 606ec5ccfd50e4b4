/* y = sum over a token's experts of h_e @ down_e. engine/cpu/experts.py describes the
 * arguments.
 *
 * h_e = act(x @ up_e.T + up_bias), or act(x @ gate_e.T) * (x @ up_e.T + up_bias). A NULL
 * pointer means that the part is absent. down_bias is added once a token.
 *
 * Both matrices are packed expert by expert; to be packed, down_e is turned. Pairs (token, expert)
 * come sorted by expert: those of the u-th expert in use are offsets[u] .. offsets[u + 1].
 */
#include "products.h"

enum { RELU = 1, RELU2 = 2, FATRELU = 3, DRELU = 4 };

typedef struct {
    const void *x, *up, *down, *gate;
    const float *up_bias, *down_bias; /* padded to whole panels, of each expert */
    const int32_t *expert, *offsets, *token;
    ix used, T, D, S;
    int vectors, down_vectors, activation;
    float threshold;
    void *h;  /* [P, S rounded up to even] */
    float *y; /* [T, D], sums */
    void *out;
} ffn_call;

INLINE vec positive(vec x) { return (vec)((bits)x & ~(bits)(x < 0)); } /* NaN stays NaN */

INLINE vec activate(vec x, int activation, float threshold) {
    if (activation == FATRELU) return (vec)((bits)x & ~(bits)(x <= threshold));
    x = positive(x);
    if (activation == RELU2) x *= x;
    return x;
}

/* Computes one panel of the u-th expert's neurons, for all its tokens. */
INLINE void up_panel(const ffn_call *call, ix u, ix panel, const int half) {
    const ix D = call->D, S = call->S, width = call->vectors * LANES;
    const ix panels = (S + width - 1) / width, row = S + S % 2;
    const ix start = (call->expert[u] * panels + panel) * width;
    const void *w = at(call->up, start * D, half);
    const void *gate = call->gate ? at(call->gate, start * D, half) : NULL;
    const ix first = panel * width, real = S - first < width ? S - first : width;
    for (ix p = call->offsets[u]; p < call->offsets[u + 1]; p += TOKENS) {
        ix left = call->offsets[u + 1] - p;
        int M = left < TOKENS ? (int)left : TOKENS;
        const void *x[TOKENS];
        vec sums[TOKENS][MOST_VECTORS] = {}, gates[TOKENS][MOST_VECTORS];
        for (int m = 0; m < M; m++) x[m] = at(call->x, (ix)call->token[p + m] * D, half);
        packed_product(M, call->vectors, half, x, w, D, sums);
        if (gate) {
            memset(gates, 0, sizeof gates);
            packed_product(M, call->vectors, half, x, gate, D, gates);
        }
        for (int m = 0; m < M; m++)
            for (int n = 0; n < call->vectors; n++) {
                vec value = sums[m][n];
                ix to = (p + m) * row + first + n * LANES;
                if (call->up_bias) value += *(const vec *)(call->up_bias + start + n * LANES);
                if (gate) {
                    if (call->activation == DRELU) value = positive(value);
                    value *= activate(gates[m][n], call->activation, call->threshold);
                } else value = activate(value, call->activation, call->threshold);
                if ((n + 1) * LANES <= real) store(call->h, to, value, half);
                else
                    for (int i = 0; n * LANES + i < real; i++)
                        write_one(call->h, to + i, value[i], half);
            }
        if (real + first == S && S % 2)
            for (int m = 0; m < M; m++) write_one(call->h, (p + m) * row + S, 0, half);
    }
}

/* Whether skipping the weights of silent neurons pays: it does if most neurons did not fire. (In an
 * untrained model half of them fire, and then reading all weights in one stream is faster.) */
INLINE int mostly_silent(const void *h, ix row, const int half) {
    const uint32_t *word = h; /* a pair in bfloat16, one neuron in float32 */
    ix words = half ? row / 2 : row, fired = 0;
    for (ix i = 0; i < words; i++) fired += !is_zero(word[i], half);
    return 2 * fired < words;
}

/* Computes one panel of the outputs, for all tokens of all experts in use, one expert after another. */
INLINE void down_panel(const ffn_call *call, ix panel, const int half) {
    const ix D = call->D, row = call->S + call->S % 2, width = call->down_vectors * LANES;
    const ix c = panel * width, size = row * width, panels = D / width;
    const int N = call->down_vectors;
    for (ix t = 0; t < call->T; t++) {
        if (call->down_bias) memcpy(call->y + t * D + c, call->down_bias + c, width * sizeof(float));
        else memset(call->y + t * D + c, 0, width * sizeof(float));
    }
    for (ix u = 0; u < call->used; u++) {
        const void *w = at(call->down, (call->expert[u] * panels + panel) * size, half);
        for (ix p = call->offsets[u]; p < call->offsets[u + 1]; p += TOKENS) {
            ix left = call->offsets[u + 1] - p;
            int M = left < TOKENS ? (int)left : TOKENS;
            const void *h[TOKENS];
            vec sums[TOKENS][MOST_VECTORS];
            for (int m = 0; m < M; m++) {
                h[m] = at(call->h, (p + m) * row, half);
                for (int n = 0; n < N; n++)
                    sums[m][n] = *(vec *)(call->y + call->token[p + m] * D + c + n * LANES);
            }
            if (M == 1 && mostly_silent(h[0], row, half))
                thin_product_of(N, half, h[0], w, row, sums[0]);
            else packed_product(M, N, half, h, w, row, sums);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < N; n++)
                    *(vec *)(call->y + call->token[p + m] * D + c + n * LANES) = sums[m][n];
        }
    }
    for (ix t = 0; t < call->T; t++)
        for (int n = 0; n < N; n++) {
            ix i = t * D + c + n * LANES;
            store(call->out, i, *(const vec *)(call->y + i), half);
        }
}

INLINE void expert_ffn(const ffn_call *call, const int half, int threads) {
    const ix width = call->vectors * LANES, panels = (call->S + width - 1) / width;
    const ix outputs = call->D / (call->down_vectors * LANES);
    const int few = call->offsets[call->used] <= 2 * call->used;
#pragma omp parallel num_threads(threads)
    {
        if (few) {
#pragma omp for schedule(static)
            for (ix i = 0; i < call->used * panels; i++) up_panel(call, i / panels, i % panels, half);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (ix i = 0; i < call->used * panels; i++) up_panel(call, i / panels, i % panels, half);
        }
#pragma omp for schedule(static)
        for (ix i = 0; i < outputs; i++) down_panel(call, i, half);
    }
}

#define ARGUMENTS                                                                                   \
    const void *x, const void *up, const void *down, const void *gate, const float *up_bias,    \
        const float *down_bias, const int32_t *expert, const int32_t *offsets,                  \
        const int32_t *token, ix used, ix T, ix D, ix S, int vectors, int down_vectors,         \
        int activation, float threshold, void *h, float *y, void *out, int threads
#define CALL                                                                                    \
    {x, up, down, gate, up_bias, down_bias, expert, offsets, token, used, T, D, S, vectors,     \
     down_vectors, activation, threshold, h, y, out}

void expert_ffn_float(ARGUMENTS) {
    ffn_call call = CALL;
    expert_ffn(&call, 0, threads);
}

void expert_ffn_half(ARGUMENTS) {
    ffn_call call = CALL;
    expert_ffn(&call, 1, threads);
}
