/* The update rule of hcvision.connections.reference for a CPU, by tiles of tokens that stay in the cache.

Two functions, as in triton.py: ``forward`` is the depth-connection of a sub-layer, the width-connection of the
next one, or both; ``backward`` goes back through the same. Streams and arithmetic are float32. A pointer that is
NULL says that there is no such step, or no such gradient. The parameters of a connection come as they are, and their
gradients leave so; between lies ``packed``, what a token needs of them.

Sums over a stream are taken lane by lane for every token, and the lanes of a tile's tokens are added up together. What
follows for a tile is arithmetic on vectors with a token in every lane.

Compiled for a number of streams S and of views V, for vectors of LANES numbers, and for streams that they divide or
not (TAIL): native.py says how.

Shapes: T tokens, E stream width, M = V + S columns of alpha, K = M + 1 coefficients of a stream, P programs. */

#include "native_vectors.h"

#define M (V + S)
#define K (M + 1)
#define COEFFICIENTS (S * K)
#define MOMENTS (2 * S)                                         /* sums of squares and of numbers, of each stream */
#define LENGTH(E) ((K * (E) + COEFFICIENTS + K + 15) / 16 * 16) /* of a program's sums */
#define TOGETHER 4                                              /* tokens whose columns take turns */
#define IN_CACHE 8192                                           /* numbers in the streams of a tile */
#define FEW 256                                                 /* numbers, which are gone before a CPU fetches ahead */

#ifdef __AVX512F__
#define BLOCK (S > 4 ? 2 : S > 3 ? 5 : S > 2 ? 7 : 9) /* dot products with so many rows at once fit in registers */
#define MOMENTS_FIT (S <= 4)                          /* and the moments of the streams beside the last of them */
#else
#define BLOCK (S > 4 ? 1 : S > 2 ? 2 : 4)
#define MOMENTS_FIT (S <= 2)
#endif

#if S * K > 60 /* code of many rows would take long to compile */
#define UNROLL_ROWS _Pragma("GCC unroll 1")
#else
#define UNROLL_ROWS UNROLL
#endif

typedef struct {
    const float *static_alpha, *static_beta, *alpha_fn, *beta_fn, *alpha_scale, *beta_scale, *norm_weight;
} Parameters;

typedef struct {
    float *static_alpha, *static_beta, *alpha_fn, *beta_fn, *alpha_scale, *beta_scale, *norm_weight;
} Gradients;

typedef struct {
    long tokens, width, programs, threads;
    int norm, center, tanh;
} Sizes;

/* out[k * S + i] = x_i . row_k lane by lane, for S vectors x and n rows, all E long, and behind them the moments of x
where they are wanted. The sums fit in registers. */
INLINE void few_dots(const float *x, const float *const *rows, int n, int moments, long E, vec *out) {
    vec part[BLOCK][S], squares[S], totals[S];
    UNROLL for (int k = 0; k < n; k++) {
        UNROLL for (int i = 0; i < S; i++) part[k][i] = (vec){0};
    }
    UNROLL for (int i = 0; i < S; i++) squares[i] = totals[i] = (vec){0};
    for (long e = 0; e < E; e += LANES) {
        vec h[S];
        UNROLL for (int i = 0; i < S; i++) h[i] = load(x + i * E + e, E - e);
        UNROLL for (int k = 0; k < n; k++) {
            vec row = load(rows[k] + e, E - e);
            UNROLL for (int i = 0; i < S; i++) part[k][i] += h[i] * row;
        }
        UNROLL for (int i = 0; moments && i < S; i++) {
            squares[i] += h[i] * h[i];
            totals[i] += h[i];
        }
    }
    UNROLL for (int k = 0; k < n; k++) {
        UNROLL for (int i = 0; i < S; i++) out[k * S + i] = part[k][i];
    }
    UNROLL for (int i = 0; moments && i < S; i++) {
        out[n * S + i] = squares[i];
        out[(n + 1) * S + i] = totals[i];
    }
}

/* The same for any number of rows. */
INLINE void dots(const float *x, const float *const *rows, int n, int moments, long E, vec *out) {
    const int with_moments = MOMENTS_FIT ? (n - 1) % BLOCK + 1 : 0, others = moments ? n - with_moments : n;
    int k = 0;
    for (; k + BLOCK <= others; k += BLOCK) few_dots(x, rows + k, BLOCK, 0, E, out + k * S);
    if (others % BLOCK) few_dots(x, rows + k, others % BLOCK, 0, E, out + k * S);
    if (moments) few_dots(x, rows + others, with_moments, 1, E, out + others * S);
}

/* Functions of their own, whose loops have all registers to themselves: what a token's coefficients are made of, */
NOINLINE void dots_with_rows(const float *x, const float *of_rows, long E, vec *out) {
    const float *rows[K];
    for (int k = 0; k < K; k++) rows[k] = of_rows + k * E;
    dots(x, rows, K, 1, E, out);
}

/* what goes back to them from views and carried streams, */
NOINLINE void dots_with_grads(const float *x, const float *seen, const float *carried, long E, vec *out) {
    const float *rows[M];
    for (int k = 0; k < M; k++) rows[k] = k < V ? seen + k * E : carried + (k - V) * E;
    dots(x, rows, M, 0, E, out);
}

/* and one behind the other. */
NOINLINE void dots_with_all(const float *x, const float *seen, const float *carried, const float *of_rows, long E,
                            vec *out) {
    const float *rows[M + K];
    for (int k = 0; k < M; k++) rows[k] = k < V ? seen + k * E : carried + (k - V) * E;
    for (int k = 0; k < K; k++) rows[M + k] = of_rows + k * E;
    dots(x, rows, M + K, 1, E, out);
}

/* to_j = sum_i weights[i * stride + j * step] x_i (+ beta_j output_j), for j < n. */
INLINE void mix(const float *x, const float *weights, int stride, int step, int n, const float *output,
                const float *beta, long E, float *to) {
    for (long e = 0; e < E; e += LANES) {
        vec h[S];
        UNROLL for (int i = 0; i < S; i++) h[i] = load(x + i * E + e, E - e);
        UNROLL for (int j = 0; j < n; j++) {
            vec new = output ? beta[j] * load(output + (j % V) * E + e, E - e) : weights[j * step] * h[0];
            UNROLL for (int i = output ? 0 : 1; i < S; i++) new += weights[i * stride + j * step] * h[i];
            store(to + j * E + e, new, E - e);
        }
    }
}

/* Tokens of a tile: as many as there are lanes, or fewer where their streams would not stay in the cache. */
static int tile_size(long E) {
    int tile = LANES;
    while (tile > TOGETHER && tile * S * E > IN_CACHE) tile /= 2;
    return tile;
}

/* 1 / deviation and mean of a stream, for the tokens of a tile, from its moments. */
INLINE void normalise(vec squares, vec totals, const Sizes *sizes, vec *rstd, vec *mean) {
    const float E = sizes->width;
    vec variance = squares / E;
    if (sizes->center) {
        *mean = totals / E;
        variance -= *mean * *mean;
        variance = pick(variance < 0.0f, fill(0), variance);
    }
    float numbers[LANES];
    memcpy(numbers, &variance, sizeof numbers);
    for (int j = 0; j < LANES; j++) numbers[j] = 1 / sqrtf(numbers[j] + 1e-6f);
    memcpy(rstd, numbers, sizeof numbers);
}

/* What tokens need of the parameters: the projections as rows (K, E), weighted and centered, then static alpha and beta
side by side (S, K), then the scales (K). Of static weights the second part alone. */
static void pack(const Parameters *from, float *packed, const Sizes *sizes) {
    const long E = sizes->width;
    for (int k = 0; from->alpha_fn && k < K; k++, packed += E) {
        double sum = 0;
        for (long e = 0; e < E; e++) {
            packed[e] = (k < M ? from->alpha_fn[e * M + k] : from->beta_fn[e]);
            if (from->norm_weight) packed[e] *= from->norm_weight[e];
            sum += packed[e];
        }
        for (long e = 0; sizes->norm && sizes->center && e < E; e++) packed[e] -= (float)(sum / E);
    }
    for (int i = 0; i < S; i++, packed += K) {
        memcpy(packed, from->static_alpha + i * M, M * sizeof(float));
        packed[M] = from->static_beta[i];
    }
    for (int k = 0; from->alpha_fn && k < K; k++) packed[k] = *(k < M ? from->alpha_scale : from->beta_scale);
}

/* DEPTH (output): following = beta * output + alpha_r^T streams. WIDTH (packed): views and coefficients of these. */
void forward(const float *streams, const float *output, const float *alpha, const float *beta, float *packed,
             float *following, float *views, float *new_alpha, float *new_beta, const Parameters *parameters,
             const Sizes *sizes) {
    const long T = sizes->tokens, E = sizes->width, tile = tile_size(E);
    const int dynamic = parameters->alpha_fn != NULL;
    const float *fixed = packed + (dynamic ? K * E : 0), *scale = fixed + COEFFICIENTS;
    if (packed) pack(parameters, packed, sizes);
#pragma omp parallel for num_threads(sizes->threads) schedule(static)
    for (long first = 0; first < T; first += tile) {
        const int tokens = T - first < tile ? T - first : tile;
        const float *x = streams + first * S * E;
        if (output) {
            for (int j = 0; j < tokens; j++) {
                const long t = first + j;
                if (S * E <= FEW) {
                    fetch(x + (tile + j) * S * E, S * E);
                    fetch(output + (tile + t) * V * E, V * E);
                    if (!dynamic) fetch_to_write(following + (tile + t) * S * E, S * E);
                }
                mix(x + j * S * E, alpha + t * S * M + V, M, 1, S, output + t * V * E, beta + t * S, E,
                    following + t * S * E);
            }
            x = following + first * S * E;
        }
        if (!packed) continue;
        float numbers[COEFFICIENTS][LANES];
        if (dynamic) {
            enum { N = COEFFICIENTS + MOMENTS };
            vec of_tokens[LEVELS + 1][N], *found = of_tokens[1];
            const int all = power_of_two(tokens);
            for (int j = 0; j < all; j++) {
                if (output)
                    fetch_to_write(following + (first + tile + j) * S * E, S * E);
                else
                    fetch(x + (tile + j) * S * E, S * E);
                if (j < tokens)
                    dots_with_rows(x + j * S * E, packed, E, of_tokens[j % 2]);
                else
                    memset(of_tokens[j % 2], 0, sizeof of_tokens[0]);
                add_lanes(N, N, j, all, of_tokens);
            }
            for (int i = 0; i < S; i++) {
                vec rstd = fill(1), mean;
                if (sizes->norm)
                    normalise(found[COEFFICIENTS + i], found[COEFFICIENTS + S + i], sizes, &rstd, &mean);
                for (int k = 0; k < K; k++) {
                    vec dynamic = found[k * S + i] * rstd;
                    if (sizes->tanh) dynamic = tanh_of(dynamic, expm1_twice(dynamic));
                    dynamic = fixed[i * K + k] + scale[k] * dynamic;
                    memcpy(numbers[i * K + k], &dynamic, sizeof dynamic);
                }
            }
        } else {
            for (int c = 0; c < COEFFICIENTS; c++) {
                for (int j = 0; j < LANES; j++) numbers[c][j] = fixed[c];
            }
        }
        for (int j = 0; j < tokens; j++) {
            const long t = first + j;
            fetch_to_write(views + (tile + t) * V * E, V * E);
            UNROLL for (int i = 0; i < S; i++) {
                UNROLL for (int k = 0; k < M; k++) new_alpha[(t * S + i) * M + k] = numbers[i * K + k][j];
                new_beta[t * S + i] = numbers[i * K + M][j];
            }
            mix(x + j * S * E, &numbers[0][j], K * LANES, LANES, V, NULL, NULL, E, views + t * V * E);
        }
    }
}

/* The gradients of the parameters, from what programs have added up, each in the order of packed (P, LENGTH(E)): the
first takes the sum. */
static void unpack(float *of, const Parameters *parameters, const Gradients *to, const Sizes *sizes) {
    const long E = sizes->width, P = sizes->programs;
    const int dynamic = parameters->alpha_fn != NULL;
    const float *weight = parameters->norm_weight, *fixed = of + K * E, *scale = fixed + COEFFICIENTS;
#pragma omp parallel for num_threads(sizes->threads) schedule(static)
    for (int k = dynamic ? 0 : K; k <= K; k++) { /* every row, and what is behind them */
        const long end = k < K ? (k + 1) * E : K * E + COEFFICIENTS + K;
        float *row = of + k * E;
        for (long p = 1; p < P; p++) {
            for (long e = k * E; e < end; e++) of[e] += of[p * LENGTH(E) + e];
        }
        if (k == K) continue;
        double sum = 0;
        for (long e = 0; e < E; e++) sum += row[e];
        for (long e = 0; sizes->norm && sizes->center && e < E; e++) row[e] -= (float)(sum / E);
        for (long e = 0; e < E; e++)
            *(k < M ? to->alpha_fn + e * M + k : to->beta_fn + e) = weight ? row[e] * weight[e] : row[e];
    }
    for (long e = 0; weight && e < E; e++) {
        to->norm_weight[e] = 0;
        for (int k = 0; k < K; k++)
            to->norm_weight[e] += of[k * E + e] * (k < M ? parameters->alpha_fn[e * M + k] : parameters->beta_fn[e]);
    }
    for (int i = 0; i < S; i++) {
        memcpy(to->static_alpha + i * M, fixed + i * K, M * sizeof(float));
        to->static_beta[i] = fixed[i * K + M];
    }
    if (!dynamic) return;
    *to->alpha_scale = 0;
    for (int k = 0; k < M; k++) *to->alpha_scale += scale[k];
    *to->beta_scale = scale[M];
}

/* The depth-connection of a tile backwards, from the gradient of the streams that it made. The tile that lies so many
tokens ahead is fetched by the way; its gradients only where they are there already. */
INLINE void back_to_output(const float *grad, const float *output, const float *beta, int tokens, long E, long ahead,
                           int has_grad, float *to_output, float *to_beta) {
    for (int from = 0; from < tokens; from += TOGETHER) {
        const int to = tokens - from < TOGETHER ? tokens : from + TOGETHER;
        vec of_beta[TOGETHER * S];
        for (int j = from; j < to; j++) {
            vec sums[S];
            UNROLL for (int i = 0; i < S; i++) sums[i] = (vec){0};
            for (long e = 0; e < E; e += LANES) {
                vec new[V];
                UNROLL for (int v = 0; v < V; v++) {
                    __builtin_prefetch(output + ((j + ahead) * V + v) * E + e, 0);
                    __builtin_prefetch(to_output + ((j + ahead) * V + v) * E + e, 1);
                }
                UNROLL for (int i = 0; i < S; i++) { /* every stream took the one output of HC */
                    if (has_grad) __builtin_prefetch(grad + ((j + ahead) * S + i) * E + e, 0);
                    vec g = load(grad + (j * S + i) * E + e, E - e);
                    new[i % V] = i < V ? beta[j * S + i] * g : new[i % V] + beta[j * S + i] * g;
                    sums[i] += load(output + (j * V + i % V) * E + e, E - e) * g;
                }
                UNROLL for (int v = 0; v < V; v++) store(to_output + (j * V + v) * E + e, new[v], E - e);
            }
            UNROLL for (int i = 0; i < S; i++) of_beta[(j - from) * S + i] = sums[i];
        }
        float found[TOGETHER * S];
        all_sums(of_beta, TOGETHER * S, found);
        memcpy(to_beta + from * S, found, (to - from) * S * sizeof(float));
    }
}

/* WIDTH (packed): to the streams, from views, carried streams and coefficients. DEPTH (output): on to output and beta
before it. Without WIDTH, grad_carried is the gradient of the streams behind the depth-connection.

A program goes through neighbouring tiles and adds up what the parameters get, in sums of its own: see unpack. */
void backward(const float *streams, const float *grad_views, const float *grad_carried, const float *grad_alpha,
              const float *grad_beta, const float *packed, const float *output, const float *beta,
              float *grad_streams, float *grad_output, float *grad_old_beta, float *of_programs,
              const Parameters *parameters, const Gradients *gradients, const Sizes *sizes) {
    const long T = sizes->tokens, E = sizes->width, P = sizes->programs;
    const long tile = tile_size(E), tiles = (T + tile - 1) / tile;
    const int dynamic = parameters->alpha_fn != NULL;
    const float *fixed = packed + (dynamic ? K * E : 0), *scale = fixed + COEFFICIENTS;
    enum { N = M * S, ALL = N + K * S + MOMENTS };
#pragma omp parallel for num_threads(sizes->threads) schedule(static)
    for (long p = 0; p < P; p++) {
        float *of_rows = of_programs + p * LENGTH(E);
        vec of_fixed[COEFFICIENTS], of_scale[K];
        memset(of_fixed, 0, sizeof of_fixed), memset(of_scale, 0, sizeof of_scale);
        if (dynamic) memset(of_rows, 0, K * E * sizeof(float));
        for (long place = tiles * p / P; place < tiles * (p + 1) / P; place++) {
            const long first = place * tile;
            const int tokens = T - first < tile ? T - first : tile;
            const float *x = streams + first * S * E, *seen = grad_views + first * V * E;
            const float *carried = grad_carried + first * S * E;
            float *to_streams = grad_streams + first * S * E;
            float numbers[COEFFICIENTS][LANES], back[COEFFICIENTS][LANES], along[S][LANES], shift[S][LANES];
            if (packed) {
                vec of_tokens[LEVELS + 1][ALL], *found = of_tokens[1];
                const int all = power_of_two(tokens);
                for (int j = 0; j < all; j++) {
                    if (S * E <= 4 * FEW) {
                        fetch(x + (tile + j) * S * E, S * E);
                        fetch(carried + (tile + j) * S * E, S * E);
                        fetch(seen + (tile + j) * V * E, V * E);
                    }
                    if (j >= tokens)
                        memset(of_tokens[j % 2], 0, sizeof of_tokens[0]);
                    else if (dynamic)
                        dots_with_all(x + j * S * E, seen + j * V * E, carried + j * S * E, packed, E,
                                      of_tokens[j % 2]);
                    else
                        dots_with_grads(x + j * S * E, seen + j * V * E, carried + j * S * E, E, of_tokens[j % 2]);
                    if (dynamic)
                        add_lanes(ALL, ALL, j, all, of_tokens);
                    else
                        add_lanes(ALL, N, j, all, of_tokens);
                }
                for (int i = 0; i < S; i++) {
                    vec rstd = fill(1), mean = {0}, inner = {0};
                    if (dynamic && sizes->norm)
                        normalise(found[ALL - 2 * S + i], found[ALL - S + i], sizes, &rstd, &mean);
                    for (int k = 0; k < K; k++) {
                        const int at = i * K + k;
                        float more[LANES] = {0};
                        for (int j = 0; j < tokens; j++) {
                            if (k == M)
                                more[j] = grad_beta[(first + j) * S + i];
                            else if (grad_alpha)
                                more[j] = grad_alpha[((first + j) * S + i) * M + k];
                        }
                        vec grad, number = fill(fixed[at]);
                        memcpy(&grad, more, sizeof grad);
                        if (k < M) grad += found[k * S + i];
                        of_fixed[at] += grad;
                        if (dynamic) {
                            vec projected = found[N + k * S + i] * rstd, value = projected;
                            vec expm1 = expm1_twice(projected);
                            if (sizes->tanh) value = tanh_of(projected, expm1);
                            number += scale[k] * value;
                            of_scale[k] += grad * value;
                            grad *= scale[k];
                            if (sizes->tanh) grad *= tanh_slope(expm1);
                            inner += grad * projected;
                            grad *= rstd;
                            memcpy(back[at], &grad, sizeof grad);
                        }
                        memcpy(numbers[at], &number, sizeof number);
                    }
                    inner *= sizes->norm ? -rstd * rstd / (float)E : (vec){0};
                    mean *= -inner;
                    memcpy(along[i], &inner, sizeof inner);
                    memcpy(shift[i], &mean, sizeof mean);
                }
            }
            for (int from = 0; packed && from < tokens; from += TOGETHER) {
                const int to = tokens - from < TOGETHER ? tokens : from + TOGETHER;
                for (long e = 0; e < E; e += LANES) {
                    vec row[K] = {0}, of_row[K] = {0};
                    UNROLL_ROWS for (int k = 0; dynamic && k < K; k++) {
                        row[k] = load(packed + k * E + e, E - e);
                        of_row[k] = load(of_rows + k * E + e, E - e);
                    }
                    for (int j = from; j < to; j++) {
                        vec h[S], grad[S];
                        UNROLL for (int i = 0; i < S; i++) {
                            const long at = (j * S + i) * E + e, next = at + tile * S * E;
                            __builtin_prefetch(to_streams + next, 1);
                            h[i] = load(x + at, E - e);
                            grad[i] = dynamic ? along[i][j] * h[i] + shift[i][j] : (vec){0};
                        }
                        UNROLL_ROWS for (int k = 0; k < M; k++) {
                            const float *g = k < V ? seen + (j * V + k) * E : carried + (j * S + k - V) * E;
                            vec of_k = load(g + e, E - e);
                            UNROLL for (int i = 0; i < S; i++) grad[i] += numbers[i * K + k][j] * of_k;
                        }
                        UNROLL_ROWS for (int k = 0; dynamic && k < K; k++) {
                            UNROLL for (int i = 0; i < S; i++) {
                                grad[i] += back[i * K + k][j] * row[k];
                                of_row[k] += back[i * K + k][j] * h[i];
                            }
                        }
                        UNROLL for (int i = 0; i < S; i++) store(to_streams + (j * S + i) * E + e, grad[i], E - e);
                    }
                    UNROLL_ROWS for (int k = 0; dynamic && k < K; k++) store(of_rows + k * E + e, of_row[k], E - e);
                }
            }
            if (output)
                back_to_output(packed ? to_streams : carried, output + first * V * E, beta + first * S, tokens, E,
                               tile, !packed, grad_output + first * V * E, grad_old_beta + first * S);
        }
        if (packed) {
            all_sums(of_fixed, COEFFICIENTS, of_rows + K * E);
            all_sums(of_scale, K, of_rows + K * E + COEFFICIENTS);
        }
    }
    if (packed) unpack(of_programs, parameters, gradients, sizes);
}
