/* Embedding tables on a CPU: lookup, sums of gradients by row, and the row-wise updates of ctrlib/rowwise.py.
 *
 * Plain C behind ctypes. Rows are dealt to threads by a hash of their number, so no two threads touch the same row, no lock is
 * needed, and every row adds up its gradients in the order of the batch: results do not depend on the number of threads.
 * Row 0 is padding and is never updated.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define SIMD _Pragma("omp simd")
#define AHEAD 12 /* rows to prefetch ahead */

enum { SGD, ADAGRAD, ROWWISE_ADAGRAD, LAZY_ADAM, ROWWISE_ADAM, ADAM };

/* Field by field the same as TableStruct in __init__.py. */
typedef struct {
    void *weight;  /* [rows, dim] float, or bfloat16 if bf16 */
    float *first;  /* Adagrad: sums of squares [rows, dim] or [rows]; Adam: first moments [rows, dim] */
    float *second; /* Adam: second moments [rows, dim] or [rows] */
    int32_t *last; /* [rows] last step that touched the row; NULL: not needed */
    int32_t *slot; /* [rows] scratch, any content */
    const float *quadrature; /* [steps, 4] nodes and weights of the steps that a row sat out, by its last step */
    int64_t rows, dim;
    int64_t step; /* the step being taken, from 1; for catch_up: the number of steps taken */
    int32_t rule, bf16;
    int32_t l2_elapsed; /* l2 counts once per step since the row's last one */
    uint32_t seed;      /* of stochastic rounding */
    double lr, beta1, beta2, eps;
    double scale; /* of the gradients: clipping */
    double l2;
} Table;

typedef struct {
    float one[256], many[256]; /* beta^i, beta^(256 i) */
    double log_beta;
} Powers;

/* What one call needs of the hyper-parameters, worked out in double precision. */
typedef struct {
    Powers first, second;
    float lr, eps, scale, beta1, beta2, rest1, rest2; /* rest = 1 - beta */
    float step_size, root2;                           /* lr / (1 - beta1^step), sqrt(1 - beta2^step) */
} Rates;

static void fill(Powers *p, double beta) {
    double x = 1, y = 1, step = pow(beta, 256);
    for (int i = 0; i < 256; ++i, x *= beta, y *= step) p->one[i] = (float)x, p->many[i] = (float)y;
    p->log_beta = log(beta);
}

static Rates rates(const Table *t) {
    Rates r = {.lr = (float)t->lr, .eps = (float)t->eps, .scale = (float)t->scale, .beta1 = (float)t->beta1,
               .beta2 = (float)t->beta2, .rest1 = (float)(1 - t->beta1), .rest2 = (float)(1 - t->beta2)};
    r.step_size = (float)(t->lr / (1 - pow(t->beta1, (double)t->step)));
    r.root2 = (float)sqrt(1 - pow(t->beta2, (double)t->step));
    fill(&r.first, t->beta1), fill(&r.second, t->beta2);
    return r;
}

INLINE float power(const Powers *p, int64_t k) {
    return k < 65536 ? p->one[k & 255] * p->many[k >> 8] : (float)exp((double)k * p->log_beta);
}

INLINE int64_t id_at(const void *ids, int wide, int64_t i) {
    return wide ? ((const int64_t *)ids)[i] : ((const int32_t *)ids)[i];
}

INLINE uint32_t owner(int64_t row, uint32_t threads) {
    return (uint32_t)(((uint64_t)((uint32_t)row * 2654435761u) * threads) >> 32);
}

/* ------------------------------------------------------------------------------------------------ weights of either type */

INLINE float load(const void *w, int64_t i, int bf16) {
    if (!bf16) return ((const float *)w)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)w)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t noise(uint64_t i, uint32_t seed) { /* 16 random bits; the finaliser of MurmurHash3 */
    uint32_t x = (uint32_t)i ^ (uint32_t)(i >> 32) * 2654435761u ^ seed;
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return (x ^ (x >> 16)) & 0xffffu;
}

/* To bfloat16 by stochastic rounding: up with the chance that makes the mean right, so that small updates are not lost. */
INLINE void store(void *w, int64_t i, float x, int bf16, uint32_t seed) {
    if (!bf16) {
        ((float *)w)[i] = x;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits += noise((uint64_t)i, seed);
    ((uint16_t *)w)[i] = (uint16_t)(bits >> 16);
}

/* ------------------------------------------------------------------------------------------------ lookup */

/* out[i] = weight[ids[i]]. Returns the position of an id outside the table, or -1. */
int64_t ctrlib_gather(const void *ids, int wide, const float *weight, float *out, int64_t n, int64_t rows, int64_t dim,
                      int threads) {
    int64_t bad = -1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
        if (i + 32 < n) {
            int64_t next = id_at(ids, wide, i + 32);
            __builtin_prefetch(weight + ((uint64_t)next < (uint64_t)rows ? next : 0) * dim);
        }
        int64_t id = id_at(ids, wide, i);
        if ((uint64_t)id >= (uint64_t)rows) {
#pragma omp atomic write
            bad = i;
        } else if (dim == 16)
            memcpy(out + i * 16, weight + id * 16, 64);
        else
            memcpy(out + i * dim, weight + id * dim, (size_t)dim * 4);
    }
    return bad;
}

/* ------------------------------------------------------------------------------------------------ Adam's steps without gradient */

/* Bring one row from its last step to step `now`: see rowwise.py for the formula. */
INLINE void sit_out(const Table *t, const Rates *r, int64_t row, int64_t now, const int64_t dim,
                    const int bf16) {
    const int64_t then = t->last[row];
    if (then == now) return;
    t->last[row] = (int32_t)now;
    if (then == 0) return; /* moments are still zero */
    const float *q = t->quadrature + then * 4, e1 = q[0], a1 = q[1] * q[0], e2 = q[2], a2 = q[3] * q[2];
    const float d1 = power(&r->first, now - then), d2 = power(&r->second, now - then), eps1 = r->eps * e1, eps2 = r->eps * e2;
    float *restrict m = t->first + row * dim, *restrict v = t->second + row * dim;
    SIMD for (int64_t d = 0; d < dim; ++d) {
        const float u = sqrtf(v[d]), x = load(t->weight, row * dim + d, bf16);
        const float moved = m[d] * (a1 / (u + eps1) + a2 / (u + eps2));
        store(t->weight, row * dim + d, x - moved, bf16, t->seed);
        m[d] *= d1;
        v[d] *= d2;
    }
}

CLONES static void catch_up_range(const Table *t, const Rates *r, const void *ids, int wide,
                                  const int32_t *at, int64_t n) {
#define RUN(DIM, BF16)                                                                                                  \
    for (int64_t i = 0; i < n; ++i) {                                                                                   \
        if (i + 2 * AHEAD < n) __builtin_prefetch(t->last + id_at(ids, wide, at[i + 2 * AHEAD]), 1);                    \
        if (i + AHEAD < n) {                                                                                            \
            const int64_t next = id_at(ids, wide, at[i + AHEAD]);                                                       \
            if (t->last[next] != t->step) {                                                                             \
                __builtin_prefetch((const char *)t->weight + next * (DIM) * (BF16 ? 2 : 4), 1);                         \
                __builtin_prefetch(t->first + next * (DIM), 1);                                                         \
                __builtin_prefetch(t->second + next * (DIM), 1);                                                        \
            }                                                                                                           \
        }                                                                                                               \
        sit_out(t, r, id_at(ids, wide, at[i]), t->step, DIM, BF16);                                                     \
    }
    if (t->bf16) {
        RUN(t->dim, 1)
    } else if (t->dim == 16) {
        RUN(16, 0)
    } else {
        RUN(t->dim, 0)
    }
#undef RUN
}

/* Positions of the ids that thread `me` owns; padding is left out, and what is outside the table (the lookup refuses it). */
INLINE int64_t mine(const Table *t, const void *ids, int wide, int64_t n, uint32_t me, uint32_t threads, int32_t *at) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t id = id_at(ids, wide, i);
        at[count] = (int32_t)i;
        count += ((uint64_t)(id - 1) < (uint64_t)(t->rows - 1)) & (owner(id, threads) == me);
    }
    return count;
}

/* Bring the rows of `ids` to step t->step. scratch: [threads, n]. */
void ctrlib_catch_up(const Table *t, const void *ids, int wide, int64_t n, int32_t *scratch, int threads) {
    const Rates r = rates(t);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int me = 0; me < threads; ++me) {
        int32_t *at = scratch + me * n;
        const int64_t count = mine(t, ids, wide, n, (uint32_t)me, (uint32_t)threads, at);
        catch_up_range(t, &r, ids, wide, at, count);
    }
}

/* Bring every row of the table to step t->step. */
void ctrlib_catch_up_all(const Table *t, int threads) {
    const Rates r = rates(t);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 1; row < t->rows; ++row) sit_out(t, &r, row, t->step, t->dim, t->bf16);
}

/* ------------------------------------------------------------------------------------------------ sums by row */

/* Sums of the gradients at positions `at` by row, with the L2 term; returns the number of distinct rows. A row's slot is valid
 * only if the row is found there, so the scratch need not be cleared. */
CLONES static int64_t sum_range(const Table *t, const int64_t *ids, const float *grad, const int32_t *at, int64_t n,
                                int64_t *rows, float *sums, double *square) {
    const int64_t dim = t->dim;
    int32_t distinct = 0;
#define RUN(DIM)                                                                                                        \
    for (int64_t i = 0; i < n; ++i) {                                                                                   \
        if (i + 24 < n) {                                                                                               \
            __builtin_prefetch(t->slot + ids[at[i + 24]], 1);                                                           \
            __builtin_prefetch(grad + at[i + 24] * (DIM));                                                              \
            const int32_t soon = t->slot[ids[at[i + 8]]];                                                               \
            const int64_t place = (uint32_t)soon < (uint32_t)distinct ? soon : distinct;                                \
            __builtin_prefetch(sums + place * (DIM), 1);                                                                \
            __builtin_prefetch(rows + place, 1);                                                                        \
        }                                                                                                               \
        const int64_t row = ids[at[i]];                                                                                 \
        const float *restrict g = grad + at[i] * (DIM);                                                                 \
        const int32_t s = t->slot[row];                                                                                 \
        if ((uint32_t)s < (uint32_t)distinct && rows[s] == row) {                                                       \
            float *restrict a = sums + s * (DIM);                                                                       \
            SIMD for (int64_t d = 0; d < (DIM); ++d) a[d] += g[d];                                                      \
        } else {                                                                                                        \
            t->slot[row] = distinct;                                                                                    \
            rows[distinct] = row;                                                                                       \
            memcpy(sums + distinct * (DIM), g, (size_t)(DIM) * 4);                                                      \
            ++distinct;                                                                                                 \
        }                                                                                                               \
    }
    if (dim == 16) {
        RUN((int64_t)16)
    } else {
        RUN(dim)
    }
#undef RUN
    double squares = 0;
    for (int64_t i = 0; i < distinct; ++i) {
        float *a = sums + i * dim;
        if (t->l2 != 0) {
            if (i + AHEAD < distinct) {
                __builtin_prefetch((const char *)t->weight + rows[i + AHEAD] * dim * (t->bf16 ? 2 : 4), 1);
                if (t->l2_elapsed) __builtin_prefetch(t->last + rows[i + AHEAD], 1);
            }
            const int64_t at_row = rows[i] * dim;
            const float l2 = (float)t->l2 * (t->l2_elapsed ? (float)(t->step - t->last[rows[i]]) : 1.0f);
            SIMD for (int64_t d = 0; d < dim; ++d) a[d] += l2 * load(t->weight, at_row + d, t->bf16);
        }
        float row_square = 0;
        for (int64_t d = 0; d < dim; ++d) row_square += a[d] * a[d];
        squares += row_square;
    }
    *square = squares;
    return distinct;
}

/* Sums the gradients [n, dim] of equal ids. Thread k leaves count[k] rows at rows[start[k]..], their sums at sums[start[k]..],
 * and the sum of the squares of those in square[k]. scratch: [threads, n]; rows: [n]; sums: [n, dim]. */
void ctrlib_coalesce(const Table *t, const int64_t *ids, const float *grad, int64_t n, int32_t *scratch, int64_t *rows,
                     float *sums, int64_t *start, int64_t *count, double *square, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (int me = 0; me < threads; ++me) count[me] = mine(t, ids, 1, n, (uint32_t)me, (uint32_t)threads, scratch + me * n);
#pragma omp single
        for (int64_t me = 0, end = 0; me < threads; ++me) start[me] = end, end += count[me];
#pragma omp for schedule(static, 1)
        for (int me = 0; me < threads; ++me)
            count[me] = sum_range(t, ids, grad, scratch + me * n, count[me], rows + start[me], sums + start[me] * t->dim,
                                  square + me);
    }
}

/* ------------------------------------------------------------------------------------------------ updates */

INLINE void update_row(const Table *t, const Rates *r, int64_t row, const float *restrict sum, const int rule, const int64_t dim,
                       const int bf16) {
    const int64_t at = row * dim;
#define GRAD (sum[d] * r->scale)
#define SUBTRACT(amount) store(t->weight, at + d, load(t->weight, at + d, bf16) - (amount), bf16, t->seed)
    if (rule == SGD) {
        SIMD for (int64_t d = 0; d < dim; ++d) SUBTRACT(r->lr * GRAD);
    } else if (rule == ADAGRAD) {
        float *restrict s = t->first + at;
        SIMD for (int64_t d = 0; d < dim; ++d) {
            s[d] += GRAD * GRAD;
            SUBTRACT(r->lr * GRAD / (sqrtf(s[d]) + r->eps));
        }
    } else if (rule == ROWWISE_ADAGRAD) {
        float square = 0;
        for (int64_t d = 0; d < dim; ++d) square += GRAD * GRAD;
        t->first[row] += square / (float)dim;
        const float rate = r->lr / (sqrtf(t->first[row]) + r->eps);
        SIMD for (int64_t d = 0; d < dim; ++d) SUBTRACT(rate * GRAD);
    } else if (rule == ROWWISE_ADAM) {
        float square = 0, *restrict m = t->first + at, *restrict v = t->second + row;
        for (int64_t d = 0; d < dim; ++d) square += GRAD * GRAD;
        *v = r->beta2 * *v + r->rest2 * (square / (float)dim);
        const float rate = r->step_size / (sqrtf(*v) / r->root2 + r->eps);
        SIMD for (int64_t d = 0; d < dim; ++d) {
            m[d] = r->beta1 * m[d] + r->rest1 * GRAD;
            SUBTRACT(rate * m[d]);
        }
    } else {
        if (rule == ADAM) sit_out(t, r, row, t->step - 1, dim, bf16);
        float *restrict m = t->first + at, *restrict v = t->second + at;
        SIMD for (int64_t d = 0; d < dim; ++d) {
            m[d] = r->beta1 * m[d] + r->rest1 * GRAD;
            v[d] = r->beta2 * v[d] + r->rest2 * (GRAD * GRAD);
            SUBTRACT(r->step_size * m[d] / (sqrtf(v[d]) / r->root2 + r->eps));
        }
    }
    if (t->last) t->last[row] = (int32_t)t->step;
#undef SUBTRACT
#undef GRAD
}

CLONES static void update_range(const Table *t, const Rates *r, const int64_t *rows, const float *sums, int64_t n) {
    const int64_t element = t->bf16 ? 2 : 4;
    const int64_t width1 = t->rule == ROWWISE_ADAGRAD ? 1 : t->dim, width2 = t->rule == ROWWISE_ADAM ? 1 : t->dim;
#define RUN(RULE, DIM, BF16)                                                                                            \
    for (int64_t i = 0; i < n; ++i) {                                                                                   \
        if (i + AHEAD < n) {                                                                                            \
            const int64_t next = rows[i + AHEAD];                                                                       \
            __builtin_prefetch((const char *)t->weight + next * t->dim * element, 1);                                   \
            if (t->first) __builtin_prefetch(t->first + next * width1, 1);                                              \
            if (t->second) __builtin_prefetch(t->second + next * width2, 1);                                            \
            if (t->last) __builtin_prefetch(t->last + next, 1);                                                         \
        }                                                                                                               \
        update_row(t, r, rows[i], sums + i * (DIM), RULE, DIM, BF16);                                                   \
    }                                                                                                                   \
    break;
#define CASE(RULE)                                                                                                      \
    case RULE:                                                                                                          \
        if (t->bf16) {                                                                                                  \
            RUN(RULE, t->dim, 1)                                                                                        \
        }                                                                                                               \
        if (t->dim == 16) {                                                                                             \
            RUN(RULE, 16, 0)                                                                                            \
        }                                                                                                               \
        RUN(RULE, t->dim, 0)
    switch (t->rule) {
        CASE(SGD)
        CASE(ADAGRAD)
        CASE(ROWWISE_ADAGRAD)
        CASE(LAZY_ADAM)
        CASE(ROWWISE_ADAM)
        CASE(ADAM)
    }
#undef CASE
#undef RUN
}

/* Update the rows that ctrlib_coalesce left. */
void ctrlib_update(const Table *t, const int64_t *rows, const float *sums, const int64_t *start, const int64_t *count,
                   int threads) {
    const Rates r = rates(t);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int me = 0; me < threads; ++me)
        update_range(t, &r, rows + start[me], sums + start[me] * t->dim, count[me]);
}

int ctrlib_version(void) { return 1; } /* _VERSION of __init__.py */
