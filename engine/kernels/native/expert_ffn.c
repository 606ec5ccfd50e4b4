/* y = sum over a token's experts of act(x @ up_e.T) @ down_e. Contract: native/__init__.py.
 *
 * `up` is packed expert by expert, `down` stays row by row. Pairs (token, expert) come sorted by
 * expert: those of the u-th expert in use are offsets[u] .. offsets[u + 1].
 */
#include <stdlib.h>

#include "products.h"

enum { RELU = 1, RELU2 = 2 };

#define FEW 2           /* tokens of an expert that are multiplied one by one */
#define WORTH_A_COPY 6  /* tokens of an expert */
#define LISTED 64       /* rows of neurons that fired, listed ahead of their use */
#define ROWS 8          /* rows that are added while sums are in registers */
#define BLOCK_ROWS 16   /* rows that stay in the cache while all columns of all tokens use them */

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

/* Ask for columns of a row long before they are read: rows lie too far apart for the processor to
 * guess. */
INLINE void prefetch(const void *row, ix columns, const int half) {
    for (ix b = 0; b < bytes(columns, half); b += 64) __builtin_prefetch((const char *)row + b, 0, 2);
}

/* Columns c .. c + columns of the pairs of one expert, each token by itself: only the rows of neurons
 * that fired are read. In the order of `row_tile`: of a pair in bfloat16, the second row first. */
INLINE void down_of_few(const ffn_call *call, ix u, ix c, ix columns, const int half) {
    const ix D = call->D, S = call->S, row = S + S % 2;
    const void *down = at(call->down, call->expert[u] * S * D + c, half);
    for (ix p = call->offsets[u]; p < call->offsets[u + 1]; p++) {
        const void *h = at(call->h, p * row, half), *rows[LISTED];
        float *y = call->y + (ix)call->token[p] * D + c, weights[LISTED];
        for (ix i = 0; i < row;) {
            int count = 0;
            for (; i < row && count < LISTED; i++) {
                ix s = half ? i ^ 1 : i;
                weights[count] = read_one(h, s, half);
                rows[count] = at(down, s * D, half);
                count += weights[count] != 0;
            }
            for (int r = 0; r < count; r += ROWS) {
                int n = count - r < ROWS ? count - r : ROWS;
                for (int next = r + n; next < r + n + ROWS && next < count; next++)
                    prefetch(rows[next], columns, half);
                add_rows(n, weights + r, rows + r, y, columns, half);
            }
        }
    }
}

/* Columns that a tile of `N` vectors takes from here: MOST_VECTORS, or 2 at the end. */
INLINE int vectors_of(ix columns) { return columns >= MOST_VECTORS * LANES ? MOST_VECTORS : 2; }

/* The same for more tokens: all rows are read, a block at a time, for TOKENS tokens at once. */
INLINE void down_of_some(const ffn_call *call, ix u, ix c, ix columns, const int half) {
    const ix D = call->D, S = call->S, row = S + S % 2;
    const ix first = call->offsets[u], last = call->offsets[u + 1];
    for (ix s = 0; s < S; s += BLOCK_ROWS) {
        const ix count = S - s < BLOCK_ROWS ? S - s : BLOCK_ROWS;
        const void *down = at(call->down, (call->expert[u] * S + s) * D + c, half);
        ix ahead = s + BLOCK_ROWS;
        for (ix i = 0; i < columns;) {
            const int N = vectors_of(columns - i);
            for (int r = 0; r < 2 && ahead < S && ahead < s + 2 * BLOCK_ROWS; r++, ahead++)
                prefetch(at(down, (ahead - s) * D, half), columns, half);
            for (ix p = first; p < last; p += TOKENS) {
                int M = last - p < TOKENS ? (int)(last - p) : TOKENS;
                const void *h[TOKENS];
                float *y[TOKENS];
                for (int m = 0; m < M; m++) {
                    h[m] = at(call->h, (p + m) * row + s, half);
                    y[m] = call->y + (ix)call->token[p + m] * D + c + i;
                }
                row_product(M, N, half, h, at(down, i, half), D, count, y);
            }
            i += N * LANES;
        }
    }
}

/* The same for many tokens: worth a copy of these columns in the order in which tiles read them. */
INLINE void down_of_many(const ffn_call *call, ix u, ix c, ix columns, void *copy, const int half) {
    const ix D = call->D, S = call->S, row = S + S % 2;
    const ix first = call->offsets[u], last = call->offsets[u + 1];
    const void *down = at(call->down, call->expert[u] * S * D + c, half);
    const void *next =
        u + 1 < call->used ? at(call->down, call->expert[u + 1] * S * D + c, half) : NULL;
    ix ahead = 0;
    for (ix s = 0; s < S; s += 2) /* row by row, as memory likes it */
        for (ix i = 0; i < columns;) {
            const int N = vectors_of(columns - i);
            const void *rows = at(down, s * D + i, half);
            void *to = (void *)at(copy, i * row + s * N * LANES, half);
            pack_rows(N, half, rows, D, S - s < 2 ? 1 : 2, to);
            i += N * LANES;
        }
    for (ix i = 0; i < columns;) {
        const int N = vectors_of(columns - i);
        /* The next expert's rows come while this one's are multiplied. */
        for (ix end = S * (i + N * LANES) / columns; next && ahead < end; ahead++)
            prefetch(at(next, ahead * D, half), columns, half);
        for (ix p = first; p < last; p += TOKENS) {
            int M = last - p < TOKENS ? (int)(last - p) : TOKENS;
            const void *h[TOKENS];
            vec sums[TOKENS][MOST_VECTORS];
            for (int m = 0; m < M; m++) {
                h[m] = at(call->h, (p + m) * row, half);
                take_sums(N, half, call->y + (ix)call->token[p + m] * D + c + i, sums[m]);
            }
            packed_product(M, N, half, h, at(copy, i * row, half), half ? row : S, sums);
            for (int m = 0; m < M; m++)
                give_sums(N, half, sums[m], call->y + (ix)call->token[p + m] * D + c + i);
        }
        i += N * LANES;
    }
}

INLINE void down_columns(const ffn_call *call, ix c, ix columns, void *copy, const int half) {
    for (ix t = 0; t < call->T; t++) memset(call->y + t * call->D + c, 0, columns * sizeof(float));
    for (ix u = 0; u < call->used; u++) {
        ix pairs = call->offsets[u + 1] - call->offsets[u];
        if (pairs <= FEW) down_of_few(call, u, c, columns, half);
        else if (pairs < WORTH_A_COPY) down_of_some(call, u, c, columns, half);
        else down_of_many(call, u, c, columns, copy, half);
    }
    for (ix t = 0; t < call->T; t++)
        for (ix i = t * call->D + c; i < t * call->D + c + columns; i += LANES)
            store(call->out, i, *(const vec *)(call->y + i), half);
}

INLINE void expert_ffn(const ffn_call *call, const int half, int threads) {
    const ix width = call->vectors * LANES, panels = (call->S + width - 1) / width;
    const ix groups = call->D / (2 * LANES), columns = (groups + threads - 1) / threads * 2 * LANES;
    const int few = call->offsets[call->used] <= 2 * call->used;
    ix most = 0;
    for (ix u = 0; u < call->used; u++) {
        ix pairs = call->offsets[u + 1] - call->offsets[u];
        most = pairs > most ? pairs : most;
    }
#pragma omp parallel num_threads(threads)
    {
        if (few) {
#pragma omp for schedule(static)
            for (ix i = 0; i < call->used * panels; i++) up_panel(call, i / panels, i % panels, half);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (ix i = 0; i < call->used * panels; i++) up_panel(call, i / panels, i % panels, half);
        }
        void *copy = most < WORTH_A_COPY ? NULL : malloc(bytes((call->S + 1) * columns, half));
#pragma omp for schedule(static)
        for (ix c = 0; c < call->D; c += columns)
            down_columns(call, c, call->D - c < columns ? call->D - c : columns, copy, half);
        free(copy);
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
