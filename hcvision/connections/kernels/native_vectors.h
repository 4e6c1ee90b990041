/* Arithmetic on vectors of LANES numbers, and sums over their lanes; see native.c. */

#include <math.h>
#include <stddef.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")
#define LEVELS (LANES == 16 ? 4 : LANES == 8 ? 3 : 2) /* of sums of neighbours */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int ivec __attribute__((vector_size(4 * LANES)));
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* A vector whose place in a row has ``left`` numbers to the end: what is beyond the end is 0, and is not stored. */
INLINE vec load(const float *from, long left) {
    vec x = {0};
    memcpy(&x, from, TAIL && left < LANES ? left * sizeof(float) : sizeof x);
    return x;
}

INLINE void store(float *to, vec x, long left) {
    memcpy(to, &x, TAIL && left < LANES ? left * sizeof(float) : sizeof x);
}

/* Have so many numbers come to the cache. */
INLINE void fetch(const float *from, long number) {
    for (long e = 0; e < number; e += 64 / sizeof(float)) __builtin_prefetch(from + e, 0);
}

INLINE void fetch_to_write(const float *to, long number) {
    for (long e = 0; e < number; e += 64 / sizeof(float)) __builtin_prefetch(to + e, 1);
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

/* Tokens come one after the other with n vectors each, those with even numbers in found[0], with odd ones in found[1].
When the last of them has come, found[1] holds n vectors with the sums of token j in lane j; until then partners wait in
the other rows, one for every level. ``tokens`` is a power of two, from 2 to LANES; rows are ``stride`` vectors long. */
INLINE void add_lanes(int stride, int n, int token, int tokens, vec (*found)[stride]) {
    const vec *waiting = found[0];
    for (int level = 1; token >> (level - 1) & 1; waiting = found[++level]) {
        vec *to = 1 << level == tokens || token >> level & 1 ? found[1] : found[level + 1];
        for (int c = 0; c < n; c++) to[c] = pairs(waiting[c], found[1][c]);
    }
    if (token + 1 < tokens) return;
    for (; tokens < LANES; tokens *= 2) {
        for (int c = 0; c < n; c++) found[1][c] = pairs(found[1][c], (vec){0});
    }
}

/* The least from 2 on that is no less. */
INLINE int power_of_two(int least) {
    int found = 2;
    while (found < least) found *= 2;
    return found;
}

/* The number in every lane. */
INLINE vec fill(float x) { return x - (vec){0}; }

INLINE vec pick(ivec where, vec yes, vec no) { return (vec)((where & (ivec)yes) | (~where & (ivec)no)); }

/* exp(2 |x|) - 1, where exp(40) stands for all that is larger: tanh is 1 there. */
INLINE vec expm1_twice(vec x) {
    vec y = 2.0f * (vec)((ivec)x & 0x7fffffff);
    y = pick(y > 40.0f, fill(40), y);
    vec n = (y * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest integer */
    vec r = (y - n * 0.693359375f) + n * 2.12194440e-4f;   /* y = n ln 2 + r */
    vec p = 1.0f / 720 + r * (1.0f / 5040);
    p = 1.0f / 24 + r * (1.0f / 120 + r * p);
    p = r + r * r * (0.5f + r * (1.0f / 6 + r * p));
    vec power = (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
    return power * p + (power - 1.0f);
}

INLINE vec tanh_of(vec x, vec expm1) {
    vec size = expm1 / (expm1 + 2.0f);
    return pick(x < 0.0f, -size, size);
}

/* 1 - tanh(x)^2, which would cancel where tanh is near 1. */
INLINE vec tanh_slope(vec expm1) { return 4.0f * (expm1 + 1.0f) / ((expm1 + 2.0f) * (expm1 + 2.0f)); }
