/* The update rule of hcvision.connections.reference for a CPU, token by token: what a token needs stays in the cache.

Two functions, as in triton.py: ``forward`` is the depth-connection of a sub-layer, the width-connection of the
next one, or both; ``backward`` goes back through the same. Streams and arithmetic are float32. A pointer that is
NULL says that there is no such step, or no such gradient.

Compiled for a number of streams S and of views V, for vectors of LANES numbers, and for streams that they divide or
not (TAIL): native.py says how.

Shapes: T tokens, E stream width, M = V + S columns of alpha, K = M + 1 coefficients of a stream, P programs. */

#include <math.h>
#include <stddef.h>
#include <string.h>

#define M (V + S)
#define K (M + 1)
#define COEFFICIENTS (S * K)

#ifdef __AVX512F__
#define BLOCK (S > 4 ? 2 : S > 2 ? 6 : 6) /* dot products with so many rows at once fit in registers */
#else
#define BLOCK (S > 4 ? 1 : S > 2 ? 2 : 4)
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#if S * K > 60 /* code of many rows would take long to compile */
#define UNROLL_ROWS _Pragma("GCC unroll 1")
#else
#define UNROLL_ROWS UNROLL
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int mask __attribute__((vector_size(4 * LANES)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (mask){__VA_ARGS__})
#endif

typedef struct {
    long tokens, width, programs, threads;
    int norm, center, tanh;
} Sizes;

/* A vector whose place in a row has ``left`` numbers to the end: what is beyond the end is 0, and is not stored. */
INLINE vec load(const float *from, long left) {
    vec x = {0};
    memcpy(&x, from, TAIL && left < LANES ? left * sizeof(float) : sizeof x);
    return x;
}

INLINE void store(float *to, vec x, long left) {
    memcpy(to, &x, TAIL && left < LANES ? left * sizeof(float) : sizeof x);
}

/* The sums of neighbours in a and in b, side by side. */
INLINE vec pairs(vec a, vec b) {
#if LANES == 16
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return PICK(a, b, 0, 2, 4, 6) + PICK(a, b, 1, 3, 5, 7);
#endif
}

/* The sum of each of n vectors, n at most LANES. */
INLINE vec sums(const vec *of, int n) {
    vec x[LANES];
    UNROLL for (int i = 0; i < LANES; i++) x[i] = i < n ? of[i] : (vec){0};
    UNROLL for (int left = LANES; left > 1; left /= 2) {
        UNROLL for (int i = 0; i < left / 2; i++) x[i] = pairs(x[2 * i], x[2 * i + 1]);
    }
    return x[0];
}

INLINE void all_sums(const vec *of, int n, float *to) {
    UNROLL for (int i = 0; i < n; i += LANES) {
        vec x = sums(of + i, n - i < LANES ? n - i : LANES);
        memcpy(to + i, &x, (n - i < LANES ? n - i : LANES) * sizeof(float));
    }
}

/* exp(2 |x|) - 1, where exp(40) stands for all that is larger: tanh is 1 there. */
INLINE float expm1_twice(float x) {
    float y = 2 * fabsf(x);
    y = y > 40 ? 40 : y;
    float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest integer */
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;   /* y = n ln 2 + r */
    float p = 1.0f / 720 + r * (1.0f / 5040);
    p = 1.0f / 24 + r * (1.0f / 120 + r * p);
    p = r + r * r * (0.5f + r * (1.0f / 6 + r * p));
    union {
        int i;
        float f;
    } power = {((int)n + 127) << 23};
    return power.f * p + (power.f - 1);
}

INLINE float tanh_of(float x, float expm1) { return copysignf(expm1 / (expm1 + 2), x); }

/* 1 - tanh(x)^2, which would cancel where tanh is near 1. */
INLINE float tanh_slope(float expm1) { return 4 * (expm1 + 1) / ((expm1 + 2) * (expm1 + 2)); }

/* out[k * S + i] = x_i . row_k lane by lane, for S vectors x and n rows, all E long; the sums fit in registers. */
INLINE void few_dots(const float *x, const float *rows, int n, long E, vec *out) {
    vec part[BLOCK][S];
    UNROLL for (int k = 0; k < n; k++) {
        UNROLL for (int i = 0; i < S; i++) part[k][i] = (vec){0};
    }
    for (long e = 0; e < E; e += LANES) {
        vec h[S];
        UNROLL for (int i = 0; i < S; i++) h[i] = load(x + i * E + e, E - e);
        UNROLL for (int k = 0; k < n; k++) {
            vec row = load(rows + k * E + e, E - e);
            UNROLL for (int i = 0; i < S; i++) part[k][i] += h[i] * row;
        }
    }
    UNROLL for (int k = 0; k < n; k++) {
        UNROLL for (int i = 0; i < S; i++) out[k * S + i] = part[k][i];
    }
}

/* The same for any number of rows. */
INLINE void dots(const float *x, const float *rows, int n, long E, vec *out) {
    int k = 0;
    for (; k + BLOCK <= n; k += BLOCK) few_dots(x, rows + k * E, BLOCK, E, out + k * S);
    few_dots(x, rows + k * E, n % BLOCK, E, out + k * S);
}

/* to[i * stride + k] = the sum of from[k * S + i], for n k. */
INLINE void collect(const vec *from, int n, float *to, int stride) {
    float found[n * S];
    all_sums(from, n * S, found);
    UNROLL for (int i = 0; i < S; i++) {
        UNROLL for (int k = 0; k < n; k++) to[i * stride + k] = found[k * S + i];
    }
}

/* What norm(x) . rows is made of: the projections as the norm leaves them, 1 / deviation and mean of each stream. */
INLINE void project(const float *x, const float *rows, long E, const Sizes *sizes, float *projected, float *rstd,
                    float *mean) {
    vec found[K * S];
    dots(x, rows, K, E, found);
    collect(found, K, projected, K);
    UNROLL for (int i = 0; i < S; i++) rstd[i] = 1, mean[i] = 0;
    if (!sizes->norm) return;
    vec squares[S], totals[S];
    UNROLL for (int i = 0; i < S; i++) squares[i] = totals[i] = (vec){0};
    for (long e = 0; e < E; e += LANES) {
        UNROLL for (int i = 0; i < S; i++) {
            vec h = load(x + i * E + e, E - e);
            squares[i] += h * h;
            totals[i] += h;
        }
    }
    float square[S], total[S];
    all_sums(squares, S, square);
    all_sums(totals, S, total);
    UNROLL for (int i = 0; i < S; i++) {
        float variance = square[i] / E;
        if (sizes->center) {
            mean[i] = total[i] / E;
            variance = fmaxf(variance - mean[i] * mean[i], 0);
        }
        rstd[i] = 1 / sqrtf(variance + 1e-6f);
        UNROLL for (int k = 0; k < K; k++) projected[i * K + k] *= rstd[i];
    }
}

/* to_j = sum_i weights[i * stride + j] x_i (+ beta_j output_j), for j < n. */
INLINE void mix(const float *x, const float *weights, int stride, int n, const float *output, const float *beta,
                long E, float *to) {
    for (long e = 0; e < E; e += LANES) {
        vec h[S];
        UNROLL for (int i = 0; i < S; i++) h[i] = load(x + i * E + e, E - e);
        UNROLL for (int j = 0; j < n; j++) {
            vec new = output ? beta[j] * load(output + (j % V) * E + e, E - e) : weights[j] * h[0];
            UNROLL for (int i = output ? 0 : 1; i < S; i++) new += weights[i * stride + j] * h[i];
            store(to + j * E + e, new, E - e);
        }
    }
}

/* DEPTH (output): following = beta * output + alpha_r^T streams. WIDTH (fixed): views and coefficients of these. */
void forward(const float *streams, const float *output, const float *alpha, const float *beta, const float *fixed,
             const float *rows, const float *scale, float *following, float *views, float *new_alpha,
             float *new_beta, const Sizes *sizes) {
    const long T = sizes->tokens, E = sizes->width;
#pragma omp parallel for num_threads(sizes->threads) schedule(static)
    for (long t = 0; t < T; t++) {
        const float *x = streams + t * S * E;
        if (output) {
            float *to = following + t * S * E;
            mix(x, alpha + t * S * M + V, M, S, output + t * V * E, beta + t * S, E, to);
            x = to;
        }
        if (!fixed) continue;
        float numbers[COEFFICIENTS], dynamic[COEFFICIENTS];
        memcpy(numbers, fixed, sizeof numbers);
        if (rows) {
            float rstd[S], mean[S];
            project(x, rows, E, sizes, dynamic, rstd, mean);
            for (int i = 0; sizes->tanh && i < COEFFICIENTS; i++)
                dynamic[i] = tanh_of(dynamic[i], expm1_twice(dynamic[i]));
            UNROLL for (int i = 0; i < S; i++) {
                for (int k = 0; k < K; k++) numbers[i * K + k] += scale[k] * dynamic[i * K + k];
            }
        }
        UNROLL for (int i = 0; i < S; i++) {
            memcpy(new_alpha + (t * S + i) * M, numbers + i * K, M * sizeof(float));
            new_beta[t * S + i] = numbers[i * K + M];
        }
        mix(x, numbers, K, V, NULL, NULL, E, views + t * V * E);
    }
}

/* WIDTH (fixed): to the streams, from views, carried streams and coefficients. DEPTH (output): on to output and beta
before it. Without WIDTH, grad_carried is the gradient of the streams behind the depth-connection.

A program goes through neighbouring tokens and adds up what the parameters get, in sums of its own: of the static
coefficients (P, S, K), the rows (P, K, E) and the scales (P, K). */
void backward(const float *streams, const float *grad_views, const float *grad_carried, const float *grad_alpha,
              const float *grad_beta, const float *fixed, const float *rows, const float *scale,
              const float *output, const float *beta, float *grad_streams, float *grad_fixed, float *grad_rows,
              float *grad_scale, float *grad_output, float *grad_old_beta, const Sizes *sizes) {
    const long T = sizes->tokens, E = sizes->width, P = sizes->programs;
#pragma omp parallel for num_threads(sizes->threads) schedule(static)
    for (long p = 0; p < P; p++) {
        float *of_fixed = grad_fixed + p * COEFFICIENTS;
        float *of_rows = grad_rows + p * K * E, *of_scale = grad_scale + p * K;
        if (fixed) memset(of_fixed, 0, COEFFICIENTS * sizeof(float));
        if (rows) memset(of_rows, 0, K * E * sizeof(float)), memset(of_scale, 0, K * sizeof(float));
        for (long t = T * p / P; t < T * (p + 1) / P; t++) {
            const float *carried = grad_carried + t * S * E, *seen = grad_views + t * V * E, *x = streams + t * S * E;
            float through[S * M], numbers[COEFFICIENTS], back[COEFFICIENTS], rstd[S], mean[S] = {0}, along[S] = {0};
            if (fixed) {
                vec found[M * S];
                dots(x, seen, V, E, found);
                dots(x, carried, S, E, found + V * S);
                collect(found, M, through, M);
                for (int i = 0; grad_alpha && i < S * M; i++) through[i] += grad_alpha[t * S * M + i];
                UNROLL for (int i = 0; i < S; i++) {
                    memcpy(back + i * K, through + i * M, M * sizeof(float));
                    back[i * K + M] = grad_beta[t * S + i];
                }
                memcpy(numbers, fixed, sizeof numbers);
                for (int i = 0; i < COEFFICIENTS; i++) of_fixed[i] += back[i];
            }
            if (rows) {
                float projected[COEFFICIENTS], dynamic[COEFFICIENTS], slope[COEFFICIENTS];
                project(x, rows, E, sizes, projected, rstd, mean);
                for (int i = 0; i < COEFFICIENTS; i++) {
                    float expm1 = expm1_twice(projected[i]);
                    dynamic[i] = sizes->tanh ? tanh_of(projected[i], expm1) : projected[i];
                    slope[i] = sizes->tanh ? tanh_slope(expm1) : 1;
                }
                UNROLL for (int i = 0; i < S; i++) {
                    for (int k = 0; k < K; k++) {
                        const int at = i * K + k;
                        numbers[at] += scale[k] * dynamic[at];
                        of_scale[k] += back[at] * dynamic[at];
                        back[at] *= scale[k] * slope[at];
                    }
                    along[i] = 0;
                    if (sizes->norm) {
                        for (int k = 0; k < K; k++) along[i] += back[i * K + k] * projected[i * K + k];
                        along[i] *= -rstd[i] * rstd[i] / E;
                    }
                    for (int k = 0; k < K; k++) back[i * K + k] *= rstd[i];
                }
            }
            vec beta_sums[S];
            UNROLL for (int i = 0; i < S; i++) beta_sums[i] = (vec){0};
            for (long e = 0; e < E; e += LANES) {
                vec grad[S];
                if (fixed) {
                    vec h[S];
                    UNROLL for (int v = 0; v < V; v++) __builtin_prefetch(seen + (V + v) * E + e); /* the next token */
                    UNROLL for (int i = 0; i < S; i++) {
                        __builtin_prefetch(x + (S + i) * E + e);
                        __builtin_prefetch(carried + (S + i) * E + e);
                        h[i] = load(x + i * E + e, E - e);
                        grad[i] = rows ? along[i] * (h[i] - mean[i]) : (vec){0};
                    }
                    UNROLL_ROWS for (int k = 0; k < M; k++) {
                        vec g = load(k < V ? seen + k * E + e : carried + (k - V) * E + e, E - e);
                        UNROLL for (int i = 0; i < S; i++) grad[i] += numbers[i * K + k] * g;
                    }
                    if (rows) {
                        UNROLL_ROWS for (int k = 0; k < K; k++) {
                            vec row = load(rows + k * E + e, E - e), of_row = load(of_rows + k * E + e, E - e);
                            UNROLL for (int i = 0; i < S; i++) {
                                grad[i] += back[i * K + k] * row;
                                of_row += back[i * K + k] * h[i];
                            }
                            store(of_rows + k * E + e, of_row, E - e);
                        }
                    }
                    UNROLL for (int i = 0; i < S; i++) store(grad_streams + t * S * E + i * E + e, grad[i], E - e);
                } else {
                    UNROLL for (int i = 0; i < S; i++) grad[i] = load(carried + i * E + e, E - e);
                }
                if (output) {
                    vec to_output[V];
                    UNROLL for (int i = 0; i < S; i++) {
                        vec part = beta[t * S + i] * grad[i]; /* every stream took the one output of HC */
                        to_output[i % V] = i < V ? part : to_output[i % V] + part;
                        beta_sums[i] += load(output + (t * V + i % V) * E + e, E - e) * grad[i];
                    }
                    UNROLL for (int v = 0; v < V; v++) store(grad_output + (t * V + v) * E + e, to_output[v], E - e);
                }
            }
            if (output) all_sums(beta_sums, S, grad_old_beta + t * S);
        }
    }
}
