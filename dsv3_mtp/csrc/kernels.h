// What kernels.c, attention.c and experts.c share. kernels.py builds them twice, for float32 tensors and (-DBFLOAT16)
// for bfloat16 ones: `real` is what lies in memory, all arithmetic is float.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef union { float f; int32_t i; uint32_t u; } word;
#define PARALLEL _Pragma("omp parallel for schedule(static)")

#ifdef BFLOAT16
typedef uint16_t real;

static inline float load(real x) { return (word){.u = (uint32_t)x << 16}.f; }

// To the nearest, ties to even; nan stays nan.
static inline real store(float x) {
    uint32_t u = (word){.f = x}.u;
    u = x != x ? 0x7fc00000 : u + 0x7fff + ((u >> 16) & 1);
    return u >> 16;
}
#else
typedef float real;

static inline float load(real x) { return x; }

static inline real store(float x) { return x; }
#endif

// e^x to 2 units in the last place (the polynomial of Cephes' expf), nan for nan. Below e^-60 it is 0: sums with 1 do
// not see it, and a gradient made of it would be denormal, with which a matrix product takes five times as long.
static inline float exponential(float x) {
    x = -87.0f > x ? -87.0f : x;
    x = 88.0f < x ? 88.0f : x;
    float n = rintf(x * 1.44269504f), r = fmaf(n, -0.693359375f, x), p = 1.9875691500e-4f;
    r = fmaf(n, 2.12194440e-4f, r);
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    int32_t exponent = (int32_t)n + 127;
    word power = {.i = (exponent < 41 ? 0 : exponent) << 23};
    return fmaf(p, r * r, r + 1.0f) * power.f;
}

static inline void swiglu_row(const real *a, const real *b, float factor, real *out, i64 width) {
#pragma omp simd
    for (i64 c = 0; c < width; c++) {
        float x = load(a[c]);
        out[c] = store(x / (1 + exponential(-x)) * load(b[c]) * factor);
    }
}

// grad: of the result. Also makes that again, in `out`; returns the gradient of factor.
static inline float swiglu_row_backward(const real *a, const real *b, float factor, const float *grad, real *grad_a,
                                        real *grad_b, real *out, i64 width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 c = 0; c < width; c++) {
        float x = load(a[c]), up = load(b[c]), sigmoid = 1 / (1 + exponential(-x)), silu = x * sigmoid;
        float scaled = grad[c] * factor;
        sum += grad[c] * silu * up;
        grad_a[c] = store(scaled * up * (sigmoid + silu * (1 - sigmoid)));
        grad_b[c] = store(scaled * silu);
        out[c] = store(silu * up * factor);
    }
    return sum;
}
