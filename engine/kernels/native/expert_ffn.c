/* y = sum over a token's experts of act(x @ up_e.T) @ down_e. Contract: native/ops.py.
 *
 * `up` is packed expert by expert, `down` stays row by row. Pairs (token, expert) come sorted by
 * expert: those of the u-th expert in use are offsets[u] .. offsets[u + 1].
 */
#include <stdlib.h>

#include "products.h"

enum { RELU = 1, RELU2 = 2 };

#define FEW 2           /* tokens of an expert that are multiplied one by one */
#define ROWS 8          /* rows that are added while sums are in registers */
#define WORTH_A_COPY 18 /* tokens of an expert */

typedef struct {
    const void *x, *up, *down;
    const int32_t *expert, *offsets, *token;
    ix used, T, D, S;
    int vectors, activation;
    void *h;  /* [P, S rounded up to even] */
    float *y; /* [T, D], sums */
    void *out;
} ffn_call;

/* One panel of the u-th expert's neurons, for all its tokens. */
INLINE void up_panel(const ffn_call *call, ix u, ix panel, const int half) {
    const ix D = call->D, S = call->S, width = call->vectors * LANES;
    const ix panels = (S + width - 1) / width, row = S + S % 2;
    const void *w = at(call->up, (call->expert[u] * panels + panel) * width * D, half);
    const ix first = panel * width, real = S - first < width ? S - first : width;
    for (ix p = call->offsets[u]; p < call->offsets[u + 1]; p += TOKENS) {
        ix left = call->offsets[u + 1] - p;
        int M = left < TOKENS ? (int)left : TOKENS;
        const void *x[TOKENS];
        vec sums[TOKENS][MOST_VECTORS] = {};
        for (int m = 0; m < M; m++) x[m] = at(call->x, (ix)call->token[p + m] * D, half);
        packed_product(M, call->vectors, half, x, w, D, sums);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < call->vectors; n++) {
                vec value = sums[m][n];
                ix to = (p + m) * row + first + n * LANES;
                value = (vec)((bits)value & ~(bits)(value < 0)); /* NaN stays NaN */
                if (call->activation == RELU2) value *= value;
                if ((n + 1) * LANES <= real) store(call->h, to, value, half);
                else
                    for (int i = 0; n * LANES + i < real; i++)
                        write_one(call->h, to + i, value[i], half);
            }
        if (real + first == S && S % 2)
            for (int m = 0; m < M; m++) write_one(call->h, (p + m) * row + S, 0, half);
    }
}

/* Columns c .. c + columns of the pairs of one expert, each token by itself: only the rows of neurons
 * that fired are read. In the order of `row_tile`: of a pair in bfloat16, the second row first. */
INLINE void down_of_few(const ffn_call *call, ix u, ix c, ix columns, const int half) {
    const ix D = call->D, S = call->S, row = S + S % 2;
    const void *down = at(call->down, call->expert[u] * S * D + c, half);
    for (ix p = call->offsets[u]; p < call->offsets[u + 1]; p++) {
        const void *h = at(call->h, p * row, half);
        float *y = call->y + (ix)call->token[p] * D + c;
        const void *rows[ROWS];
        float weights[ROWS];
        int count = 0;
        for (ix i = 0; i < row; i++) {
            ix s = half ? i ^ 1 : i;
            float weight = read_one(h, s, half);
            if (weight != 0) {
                rows[count] = at(down, s * D, half);
                weights[count++] = weight;
            }
            if (count == ROWS || (count && i + 1 == row)) {
                add_rows(count, weights, rows, y, columns, half);
                count = 0;
            }
        }
    }
}

/* The same for more tokens of one expert: every row is read, for TOKENS tokens at a time. Many tokens
 * are worth a copy of these columns that the cache holds better than rows far apart. */
INLINE void down_of_many(const ffn_call *call, ix u, ix c, const int N, void *panel, const int half) {
    const ix D = call->D, S = call->S, row = S + S % 2;
    const ix first = call->offsets[u], last = call->offsets[u + 1];
    const void *down = at(call->down, call->expert[u] * S * D + c, half);
    const int copy = panel && last - first >= WORTH_A_COPY;
    if (copy) pack_rows(N, half, down, D, S, panel);
    for (ix p = first; p < last; p += TOKENS) {
        int M = last - p < TOKENS ? (int)(last - p) : TOKENS;
        const void *h[TOKENS];
        float *y[TOKENS];
        for (int m = 0; m < M; m++) {
            h[m] = at(call->h, (p + m) * row, half);
            y[m] = call->y + (ix)call->token[p + m] * D + c;
        }
        if (!copy) {
            row_product(M, N, half, h, down, D, S, y);
            continue;
        }
        vec sums[TOKENS][MOST_VECTORS];
        for (int m = 0; m < M; m++) take_sums(N, half, y[m], sums[m]);
        packed_product(M, N, half, h, panel, row, sums);
        for (int m = 0; m < M; m++) give_sums(N, half, sums[m], y[m]);
    }
}

INLINE void down_columns(const ffn_call *call, ix c, ix columns, void *panel, const int half) {
    for (ix t = 0; t < call->T; t++) memset(call->y + t * call->D + c, 0, columns * sizeof(float));
    for (ix u = 0; u < call->used; u++) {
        ix pairs = call->offsets[u + 1] - call->offsets[u];
        if (pairs <= FEW) {
            down_of_few(call, u, c, columns, half);
            continue;
        }
        ix left = columns;
        for (; left >= MOST_VECTORS * LANES; left -= MOST_VECTORS * LANES)
            down_of_many(call, u, c + columns - left, MOST_VECTORS, panel, half);
        if (left) down_of_many(call, u, c + columns - left, 2, panel, half);
    }
    for (ix t = 0; t < call->T; t++)
        for (ix i = t * call->D + c; i < t * call->D + c + columns; i += LANES)
            store(call->out, i, *(const vec *)(call->y + i), half);
}

INLINE void expert_ffn(const ffn_call *call, const int half, int threads) {
    const ix width = call->vectors * LANES, panels = (call->S + width - 1) / width;
    const ix groups = call->D / (2 * LANES);
    const int few = call->offsets[call->used] <= 2 * call->used;
    /* Few tokens: long stretches of rows. Many: columns whose rows stay in the cache. */
    ix columns = few ? (groups + threads - 1) / threads : MOST_VECTORS / 2;
    const ix chunks = (groups + columns - 1) / columns;
    columns *= 2 * LANES;
#pragma omp parallel num_threads(threads)
    {
        void *panel = few ? NULL : malloc(bytes((call->S + 1) * MOST_VECTORS * LANES, half));
        if (few) {
#pragma omp for schedule(static)
            for (ix i = 0; i < call->used * panels; i++) up_panel(call, i / panels, i % panels, half);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (ix i = 0; i < call->used * panels; i++) up_panel(call, i / panels, i % panels, half);
        }
#pragma omp for schedule(dynamic, 1)
        for (ix i = 0; i < chunks; i++) {
            ix c = i * columns, left = call->D - c;
            down_columns(call, c, left < columns ? left : columns, panel, half);
        }
        free(panel);
    }
}

#define ARGUMENTS                                                                                   \
    const void *x, const void *up, const void *down, const int32_t *expert, const int32_t *offsets, \
        const int32_t *token, ix used, ix T, ix D, ix S, int vectors, int activation, void *h,      \
        float *y, void *out, int threads
#define CALL \
    {x, up, down, expert, offsets, token, used, T, D, S, vectors, activation, h, y, out}

void expert_ffn_float(ARGUMENTS) {
    ffn_call call = CALL;
    expert_ffn(&call, 0, threads);
}

void expert_ffn_half(ARGUMENTS) {
    ffn_call call = CALL;
    expert_ffn(&call, 1, threads);
}
