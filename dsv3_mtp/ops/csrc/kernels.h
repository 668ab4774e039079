// What kernels.c and attention.c share. c.py builds them twice, for float32 tensors and (-DBFLOAT16)
// for bfloat16 ones: `real` is what lies in memory, all arithmetic is float, LANES numbers at a time.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef union { float f; uint32_t u; } word;
#define PARALLEL _Pragma("omp parallel for schedule(static)")

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(LANES * 4)));  // of a comparison: all bits of a lane, or none
typedef uint32_t bits __attribute__((vector_size(LANES * 4), aligned(2), may_alias));  // also two bfloat16 a lane
#ifdef __AVX512F__
static const mask lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};  // a loop here is no constant to GCC
#else
static const mask lane = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

static inline vec choose(mask which, vec yes, vec no) { return (vec)((which & (mask)yes) | (~which & (mask)no)); }

static inline vec larger(vec a, vec b) {  // b where one is nan
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

#ifdef BFLOAT16
typedef uint16_t real;
typedef uint16_t reals __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

static inline float load(real x) { return (word){.u = (uint32_t)x << 16}.f; }

static inline real rounded(float x) {  // as `narrow`, but small numbers stay what they are
    uint32_t u = (word){.f = x}.u;
    return (x == x ? u + 0x7fff + ((u >> 16) & 1) : u) >> 16;
}

static inline vec widen(reals x) { return (vec)(__builtin_convertvector(x, bits) << 16); }

// To the nearest, ties to even; nan stays nan.
static inline reals narrow(vec x) {
#ifdef __AVX512BF16__  // which makes numbers below 2^-126 zero
    return (reals)_mm512_cvtneps_pbh((__m512)x);
#else
    bits u = (bits)x, rounded = u + 0x7fff + ((u >> 16) & 1);
    return __builtin_convertvector((bits)choose(x == x, (vec)rounded, (vec)u) >> 16, reals);
#endif
}
#else
typedef float real;
typedef vec reals;

static inline float load(real x) { return x; }

static inline real rounded(float x) { return x; }

static inline reals widen(vec x) { return x; }

static inline reals narrow(vec x) { return x; }
#endif

// LANES numbers at x; where only `left` are there, `fill` stands for the others.
static inline vec get_or(const real *x, i64 left, float fill) {
    if (left >= LANES) return widen(*(const reals *)x);
    float some[LANES];
    for (int l = 0; l < LANES; l++) some[l] = l < left ? load(x[l]) : fill;
    return *(const vec *)some;
}

static inline vec get(const real *x, i64 left) { return get_or(x, left, 0); }

static inline void set(real *y, vec x, i64 left) {
    reals low = narrow(x);
    if (left >= LANES) *(reals *)y = low;
    else memcpy(y, &low, left * sizeof(real));
}

// Numbers `from` of low and high, one after the other.
static inline bits shuffle(bits low, bits high, mask from) {
#ifdef __clang__  // which has no __builtin_shuffle, and makes one of this
    bits out;
    for (int l = 0; l < LANES; l++) out[l] = from[l] < LANES ? low[from[l] % LANES] : high[from[l] % LANES];
    return out;
#else
    return __builtin_shuffle(low, high, from);
#endif
}

// Lane l becomes that of l ^ by.
static inline vec swapped(vec x, int by) {
    return (vec)shuffle((bits)x, (bits)x, lane ^ by);
}

static inline float sum_of(vec x) {
#pragma GCC unroll 4
    for (int by = LANES / 2; by; by /= 2) x += swapped(x, by);
    return x[0];
}

static inline float max_of(vec x) {
#pragma GCC unroll 4
    for (int by = LANES / 2; by; by /= 2) x = larger(x, swapped(x, by));
    return x[0];
}

// e^x, nan for nan. Below e^-60 it is 0: sums with 1 do not see it, and a gradient made of it would be denormal, with
// which a matrix product takes five times as long. For float to 2 units in the last place (the polynomial of Cephes'
// expf), for bfloat16, whose own rounding is 2^-9, to 2^-17 (one fitted to the largest relative error).
static inline vec exponential(vec x) {
    const float round = 0x1.8p23f + 127;  // added: x / ln 2 to the nearest number n, and n + 127 in the lowest bits
    mask counts = ~(x < -60.0f);
    x = -larger((vec){0} - 88.0f, -x);
    vec shifted = x * 1.44269504f + round, n = shifted - round;
#ifdef BFLOAT16
    vec r = x - n * 0.69314718f, p = r * 4.127774e-2f + 1.6753514e-1f;
    p = p * r + 5.0005116e-1f;
#else
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f, p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
#endif
    p = (p * (r * r) + (r + 1.0f)) * (vec)((bits)shifted << 23);
    return (vec)((mask)p & counts);
}
