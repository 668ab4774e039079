// The passes of a training step that torch's CPU operators make in several: read once, written once.
// kernels.py documents the shapes and builds this twice, for float32 tensors and (-DBFLOAT16) for bfloat16 ones: `real`
// is what lies in memory, all arithmetic is float. Matrix products stay with torch.
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
    uint32_t u = (word){.f = x}.u, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : rounded;
}
#else
typedef float real;

static inline float load(real x) { return x; }

static inline real store(float x) { return x; }
#endif

// e^x to 2 units in the last place (the polynomial of Cephes' expf), nan for nan. Below e^-60 it is 0: sums with 1 do
// not see it, and a gradient made of it would be denormal, with which a matrix product takes five times as long.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f), r = fmaf(n, -0.693359375f, x), p = 1.9875691500e-4f;
    r = fmaf(n, 2.12194440e-4f, r);
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    word power = {.i = ((int32_t)n + 127) << 23};
    return x < -60.0f ? 0.0f : fmaf(p, r * r, r + 1.0f) * power.f;
}

void rms_norm(const real *x, i64 stride, const real *weight, real *y, float *scale, i64 rows, i64 width, float eps) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const real *in = x + row * stride;
        real *out = y + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 c = 0; c < width; c++) sum += load(in[c]) * load(in[c]);
        float s = scale[row] = 1 / sqrtf(sum / width + eps);
#pragma omp simd
        for (i64 c = 0; c < width; c++) out[c] = store(load(in[c]) * s * load(weight[c]));
    }
}

// grad_weight: (parts, width), a partial sum for each of `parts` blocks of rows.
void rms_norm_backward(const real *grad, const real *x, i64 stride, const real *weight, const float *scale,
                       real *grad_x, float *grad_weight, i64 rows, i64 width, i64 parts) {
    PARALLEL
    for (i64 part = 0; part < parts; part++) {
        float *gw = grad_weight + part * width;
        memset(gw, 0, width * sizeof(float));
        for (i64 row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            const real *g = grad + row * width, *in = x + row * stride;
            real *out = grad_x + row * width;
            float s = scale[row], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (i64 c = 0; c < width; c++) dot += load(g[c]) * load(weight[c]) * load(in[c]);
            float shift = dot * s * s / width;
#pragma omp simd
            for (i64 c = 0; c < width; c++) {
                out[c] = store(s * (load(g[c]) * load(weight[c]) - load(in[c]) * shift));
                gw[c] += load(g[c]) * load(in[c]) * s;
            }
        }
    }
}

// silu(a) * b, their rows `stride` apart. gate: one factor per row, or NULL.
void swiglu(const real *gate_proj, const real *up_proj, i64 stride, const float *gate, real *y, i64 rows, i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const real *a = gate_proj + row * stride, *b = up_proj + row * stride;
        real *out = y + row * width;
        float factor = gate ? gate[row] : 1.0f;
#pragma omp simd
        for (i64 c = 0; c < width; c++) {
            float x = load(a[c]);
            out[c] = store(x / (1 + exponential(-x)) * load(b[c]) * factor);
        }
    }
}

// With gate: also grad_gate, and y over again (it may take grad's place), which the down projection's gradient needs.
void swiglu_backward(const real *gate_proj, const real *up_proj, i64 stride, const float *gate, const real *grad,
                     real *grad_gate_proj, real *grad_up_proj, real *y, float *grad_gate, i64 rows, i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const real *a = gate_proj + row * stride, *b = up_proj + row * stride, *g = grad + row * width;
        real *grad_a = grad_gate_proj + row * stride, *grad_b = grad_up_proj + row * stride, *out = y + row * width;
        float factor = gate ? gate[row] : 1.0f, sum = 0;
        if (gate) {
#pragma omp simd reduction(+ : sum)
            for (i64 c = 0; c < width; c++) {
                float x = load(a[c]), up = load(b[c]), sigmoid = 1 / (1 + exponential(-x)), silu = x * sigmoid;
                float own = load(g[c]), scaled = own * factor;
                sum += own * silu * up;
                grad_a[c] = store(scaled * up * (sigmoid + silu * (1 - sigmoid)));
                grad_b[c] = store(scaled * silu);
                out[c] = store(silu * up * factor);
            }
            grad_gate[row] = sum;
        } else {
#pragma omp simd
            for (i64 c = 0; c < width; c++) {
                float x = load(a[c]), sigmoid = 1 / (1 + exponential(-x)), silu = x * sigmoid;
                grad_a[c] = store(load(g[c]) * load(b[c]) * (sigmoid + silu * (1 - sigmoid)));
                grad_b[c] = store(load(g[c]) * silu);
            }
        }
    }
}

// Row r of each (rows, width) matrix attends to its first `first + r + 1` columns; the others become 0.
void causal_softmax(real *scores, i64 batch, i64 rows, i64 width, i64 first, float scale) {
    PARALLEL
    for (i64 i = 0; i < batch * rows; i++) {
        real *s = scores + i * width;
        float e[width], top = -INFINITY, sum = 0;
        i64 seen = first + i % rows + 1;
#pragma omp simd reduction(max : top)
        for (i64 c = 0; c < seen; c++) {
            e[c] = load(s[c]);
            top = e[c] > top ? e[c] : top;
        }
#pragma omp simd reduction(+ : sum)
        for (i64 c = 0; c < seen; c++) sum += e[c] = exponential((e[c] - top) * scale);
        float inverse = 1 / sum;
#pragma omp simd
        for (i64 c = 0; c < seen; c++) s[c] = store(e[c] * inverse);
        memset(s + seen, 0, (width - seen) * sizeof(real));
    }
}

// grad: of the probabilities, overwritten with that of the scores.
void causal_softmax_backward(const real *probs, real *grad, i64 batch, i64 rows, i64 width, i64 first, float scale) {
    PARALLEL
    for (i64 i = 0; i < batch * rows; i++) {
        const real *p = probs + i * width;
        real *g = grad + i * width;
        float dot = 0;
        i64 seen = first + i % rows + 1;
#pragma omp simd reduction(+ : dot)
        for (i64 c = 0; c < seen; c++) dot += load(p[c]) * load(g[c]);
#pragma omp simd
        for (i64 c = 0; c < seen; c++) g[c] = store(load(p[c]) * (load(g[c]) - dot) * scale);
        memset(g + seen, 0, (width - seen) * sizeof(real));
    }
}

// (x_0, x_1), (x_2, x_3), ... turned by angle (sign 1) or back (sign -1).
static inline void turn(const real *x, const float *cos, const float *sin, float sign, real *y, i64 pairs) {
    for (i64 p = 0; p < pairs; p++) {
        float even = load(x[2 * p]), odd = load(x[2 * p + 1]), c = cos[p], s = sign * sin[p];
        y[2 * p] = store(even * c - odd * s);
        y[2 * p + 1] = store(even * s + odd * c);
    }
}

// Between the projections' layout (B, T, H, .) and the products' (B, H, T, .), rotary part turned on the way.
// back 0: query, kv, k_rope -> q, k, v; back 1: the gradients of q, k, v -> those of query, kv, k_rope.
void heads(real *query, real *kv, real *k_rope, i64 stride, const float *cos, const float *sin, real *q, real *k,
           real *v, i64 batch, i64 length, i64 heads, i64 nope, i64 rope, i64 value, i64 back) {
    i64 width = nope + rope;
    size_t part = nope * sizeof(real), last = value * sizeof(real);
    PARALLEL
    for (i64 n = 0; n < batch * length; n++) {
        i64 b = n / length, t = n % length;
        const float *c = cos + t * (rope / 2), *s = sin + t * (rope / 2);
        real shared[rope], *rotary = k_rope + n * stride;
        float sum[rope];
        memset(sum, 0, sizeof(sum));
        if (!back) turn(rotary, c, s, 1, shared, rope / 2);
        for (i64 h = 0; h < heads; h++) {
            i64 at = (b * heads + h) * length + t;
            real *q_in = query + (n * heads + h) * width, *q_out = q + at * width, *k_out = k + at * width;
            real *kv_in = kv + (n * heads + h) * (nope + value), *v_out = v + at * value;
            if (back) {
                memcpy(q_in, q_out, part), memcpy(kv_in, k_out, part), memcpy(kv_in + nope, v_out, last);
                turn(q_out + nope, c, s, -1, q_in + nope, rope / 2);
                for (i64 p = 0; p < rope; p++) sum[p] += load(k_out[nope + p]);
            } else {
                memcpy(q_out, q_in, part), memcpy(k_out, kv_in, part), memcpy(v_out, kv_in + nope, last);
                turn(q_in + nope, c, s, 1, q_out + nope, rope / 2);
                memcpy(k_out + nope, shared, sizeof(shared));
            }
        }
        if (back) {  // the sum first: the heads' keys were turned by one angle
            for (i64 p = 0; p < rope; p++) shared[p] = store(sum[p]);
            turn(shared, c, s, -1, rotary, rope / 2);
        }
    }
}

// y[row] = x[index[row]]
void gather_rows(const real *x, const i64 *index, real *y, i64 rows, i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) memcpy(y + row * width, x + index[row] * width, width * sizeof(real));
}

// y[row] = the sum of x[index[row][0]], x[index[row][1]], ..., `many` of them
void sum_rows(const real *x, const i64 *index, real *y, i64 rows, i64 many, i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const i64 *from = index + row * many;
        for (i64 start = 0; start < width; start += 64) {
            i64 end = start + 64 < width ? 64 : width - start;
            float sum[64] = {0};
            for (i64 j = 0; j < many; j++) {
                const real *in = x + from[j] * width + start;
#pragma omp simd
                for (i64 c = 0; c < end; c++) sum[c] += load(in[c]);
            }
#pragma omp simd
            for (i64 c = 0; c < end; c++) y[row * width + start + c] = store(sum[c]);
        }
    }
}

// Overwrites logits (rows, width) with row_weight * (softmax - onehot(target)).
void cross_entropy(real *logits, const i64 *target, const float *row_weight, float *nll, i64 *prediction, i64 rows,
                   i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        real *x = logits + row * width;
        float top = -INFINITY, sum = 0;
        int known = target[row] >= 0 && target[row] < width;  // a token outside the vocabulary has no loss: nan
        float own = known ? load(x[target[row]]) : NAN;
        int32_t best = INT32_MAX, end = width;
#pragma omp simd reduction(max : top)
        for (i64 c = 0; c < width; c++) top = load(x[c]) > top ? load(x[c]) : top;
#pragma omp simd reduction(min : best)
        for (int32_t c = 0; c < end; c++) best = load(x[c]) == top && c < best ? c : best;
#pragma omp simd reduction(+ : sum)
        for (i64 c = 0; c < width; c++) sum += exponential(load(x[c]) - top);
        prediction[row] = best < end ? best : 0;
        nll[row] = logf(sum) + top - own;
        float factor = row_weight[row] / sum;
#pragma omp simd
        for (i64 c = 0; c < width; c++) x[c] = store(exponential(load(x[c]) - top) * factor);
        if (known) x[target[row]] = store(exponential(own - top) * factor - row_weight[row]);
    }
}
