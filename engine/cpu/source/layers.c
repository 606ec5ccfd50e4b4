/* All layers of the decoder in one call: for small models and few tokens, going back to Python between
 * the steps of a layer costs as much as the steps. The steps themselves are in the other files.
 * engine/cpu/layers.py describes the arguments.
 */
#include <stddef.h>
#include <stdint.h>

typedef int64_t ix;

/* One layer's weights, in the order of `_LayerWeights` in layers.py; NULL means absent. A norm with a
 * bias is a LayerNorm. */
typedef struct {
    const void *attention_norm, *qkv, *out, *ffn_norm, *up, *down;
    const float *router;
    const void *attention_norm_bias;
    const float *qkv_bias, *out_bias;
    const void *ffn_norm_bias, *gate;
    const float *up_bias, *down_bias;
} layer_weights;

/* Sizes, and how many vectors wide each matrix's panels are. */
typedef struct {
    ix layers, D, H, G, d, E, S, qkv_vectors, out_vectors, up_vectors, down_vectors, activation;
    ix window, norm_first;
    double epsilon, multiplier, threshold;
} model_shape;

/* One step's batch; NULL means absent. */
typedef struct {
    ix T, B, table_stride, cache_bytes; /* of one layer's keys, or values */
    const float *cos, *sin;             /* [T, d / 2]; absent: nothing is rotated */
    const int64_t *slot;                /* [T] */
    const int32_t *table, *first, *rows, *context;
    char *keys, *values;
    const int32_t *k; /* [T]; without k all tokens use all experts, whose pairs are given */
    const float *mass;
    int32_t *expert, *offsets, *token; /* [E], [E + 1], [T * E] */
    uint8_t *chosen;                   /* [layers, T, E] */
    void *x, *normed, *heads, *attended, *delta, *h;
    float *y;
} batch_memory;

int sort_pairs(const uint8_t *chosen, int32_t *expert, int32_t *offsets, int32_t *token, ix T, ix E);

#define LAYERS(TYPE, SIZE)                                                                            \
    void rms_norm_##TYPE(void *, const void *, const void *, void *, ix, ix, float, float, int);      \
    void layer_norm_##TYPE(void *, const void *, const void *, const void *, void *, ix, ix, float,   \
                           float, int);                                                               \
    void linear_##TYPE(const void *, const void *, const float *, void *, ix, ix, ix, int, int);      \
    void rotate_##TYPE(void *, const float *, const float *, ix, ix, ix, ix, int);                    \
    void store_kv_##TYPE(const void *, const void *, const int64_t *, void *, void *, ix, ix, ix, ix, \
                         ix, int);                                                                    \
    void attend_##TYPE(const void *, const void *, const void *, const int32_t *, const int32_t *,    \
                       const int32_t *, const int32_t *, void *, ix, ix, ix, ix, ix, ix, ix, float,   \
                       int);                                                                          \
    void choose_##TYPE(const void *, const float *, const int32_t *, const float *, uint8_t *, ix,    \
                       ix, ix, int);                                                                  \
    void expert_ffn_##TYPE(const void *, const void *, const void *, const void *, const float *,     \
                           const float *, const int32_t *, const int32_t *, const int32_t *, ix, ix,  \
                           ix, ix, int, int, int, float, void *, float *, void *, int);               \
                                                                                                      \
    static void norm_##TYPE(const model_shape *m, const batch_memory *b, const void *delta,           \
                            const void *weight, const void *bias, void *out, int threads) {           \
        const float scale = (float)m->multiplier, epsilon = (float)m->epsilon;                        \
        if (bias)                                                                                     \
            layer_norm_##TYPE(b->x, delta, weight, bias, out, b->T, m->D, scale, epsilon, threads);   \
        else rms_norm_##TYPE(b->x, delta, weight, out, b->T, m->D, scale, epsilon, threads);          \
    }                                                                                                 \
                                                                                                      \
    void layers_##TYPE(const layer_weights *weights, const model_shape *m, const batch_memory *b,     \
                       float scale, int threads) {                                                    \
        const ix D = m->D, d = m->d, E = m->E, T = b->T, stride = (m->H + 2 * m->G) * d;              \
        const char *k = (const char *)b->heads + m->H * d * SIZE, *v = k + m->G * d * SIZE;           \
        const ix first = m->norm_first;                                                               \
        void *in = first ? b->normed : b->x; /* of attention and FFN */                               \
        for (ix l = 0; l < m->layers; l++) {                                                          \
            const layer_weights *w = weights + l;                                                     \
            char *keys = b->keys + l * b->cache_bytes, *values = b->values + l * b->cache_bytes;      \
            if (first)                                                                                \
                norm_##TYPE(m, b, l ? b->delta : NULL, w->attention_norm, w->attention_norm_bias, in, \
                            threads);                                                                 \
            linear_##TYPE(in, w->qkv, w->qkv_bias, b->heads, T, stride, D, (int)m->qkv_vectors,       \
                          threads);                                                                   \
            if (b->cos) rotate_##TYPE(b->heads, b->cos, b->sin, T, m->H + m->G, d, stride, threads);  \
            store_kv_##TYPE(k, v, b->slot, keys, values, T, m->G, d, stride, stride, threads);        \
            attend_##TYPE(b->heads, keys, values, b->table, b->first, b->rows, b->context,            \
                          b->attended, b->B, m->H, m->G, d, stride, b->table_stride, m->window, scale,\
                          threads);                                                                   \
            linear_##TYPE(b->attended, w->out, w->out_bias, b->delta, T, D, m->H * d,                 \
                          (int)m->out_vectors, threads);                                              \
            if (first) norm_##TYPE(m, b, b->delta, w->ffn_norm, w->ffn_norm_bias, in, threads);       \
            else norm_##TYPE(m, b, b->delta, w->attention_norm, w->attention_norm_bias, in, threads); \
            ix used = E;                                                                              \
            if (b->k) {                                                                               \
                uint8_t *chosen = b->chosen + l * T * E;                                              \
                choose_##TYPE(in, w->router, b->k, b->mass, chosen, T, E, D, threads);                \
                used = sort_pairs(chosen, b->expert, b->offsets, b->token, T, E);                     \
            }                                                                                         \
            expert_ffn_##TYPE(in, w->up, w->down, w->gate, w->up_bias, w->down_bias, b->expert,       \
                              b->offsets, b->token, used, T, D, m->S, (int)m->up_vectors,             \
                              (int)m->down_vectors, (int)m->activation, (float)m->threshold, b->h,    \
                              b->y, b->delta, threads);                                               \
            if (!first) norm_##TYPE(m, b, b->delta, w->ffn_norm, w->ffn_norm_bias, in, threads);      \
        }                                                                                             \
    }

LAYERS(float, 4)
LAYERS(half, 2)
