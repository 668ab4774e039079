// The passes of a float32 training step that torch's CPU operators make in several: read once, written once.
// Built by kernels.py, which documents the shapes. Matrix products stay with torch.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
#define PARALLEL _Pragma("omp parallel for schedule(static)")

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
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
    return x < -60.0f ? 0.0f : fmaf(p, r * r, r + 1.0f) * power.f;
}

void rms_norm(const float *x, i64 stride, const float *weight, float *y, float *scale, i64 rows, i64 width, float eps) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const float *in = x + row * stride;
        float *out = y + row * width, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 c = 0; c < width; c++) sum += in[c] * in[c];
        float s = scale[row] = 1 / sqrtf(sum / width + eps);
#pragma omp simd
        for (i64 c = 0; c < width; c++) out[c] = in[c] * s * weight[c];
    }
}

// grad_weight: (parts, width), a partial sum for each of `parts` blocks of rows.
void rms_norm_backward(const float *grad, const float *x, i64 stride, const float *weight, const float *scale,
                       float *grad_x, float *grad_weight, i64 rows, i64 width, i64 parts) {
    PARALLEL
    for (i64 part = 0; part < parts; part++) {
        float *gw = grad_weight + part * width;
        memset(gw, 0, width * sizeof(float));
        for (i64 row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            const float *g = grad + row * width, *in = x + row * stride;
            float *out = grad_x + row * width, s = scale[row], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (i64 c = 0; c < width; c++) dot += g[c] * weight[c] * in[c];
            float shift = dot * s * s / width;
#pragma omp simd
            for (i64 c = 0; c < width; c++) {
                out[c] = s * (g[c] * weight[c] - in[c] * shift);
                gw[c] += g[c] * in[c] * s;
            }
        }
    }
}

// gate: one factor per row, or NULL.
void swiglu(const float *gate_up, const float *gate, float *y, i64 rows, i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const float *a = gate_up + row * 2 * width, *b = a + width;
        float *out = y + row * width, factor = gate ? gate[row] : 1.0f;
#pragma omp simd
        for (i64 c = 0; c < width; c++) out[c] = a[c] / (1 + exponential(-a[c])) * b[c] * factor;
    }
}

// With gate: also grad_gate, and y over again (it may take grad's place), which the down projection's gradient needs.
void swiglu_backward(const float *gate_up, const float *gate, const float *grad, float *grad_gate_up, float *y,
                     float *grad_gate, i64 rows, i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const float *a = gate_up + row * 2 * width, *b = a + width, *g = grad + row * width;
        float *grad_a = grad_gate_up + row * 2 * width, *grad_b = grad_a + width, *out = y + row * width;
        float factor = gate ? gate[row] : 1.0f, sum = 0;
        if (gate) {
#pragma omp simd reduction(+ : sum)
            for (i64 c = 0; c < width; c++) {
                float sigmoid = 1 / (1 + exponential(-a[c])), silu = a[c] * sigmoid, up = g[c] * factor;
                sum += g[c] * silu * b[c];
                grad_a[c] = up * b[c] * (sigmoid + silu * (1 - sigmoid));
                grad_b[c] = up * silu;
                out[c] = silu * b[c] * factor;
            }
            grad_gate[row] = sum;
        } else {
#pragma omp simd
            for (i64 c = 0; c < width; c++) {
                float sigmoid = 1 / (1 + exponential(-a[c])), silu = a[c] * sigmoid;
                grad_a[c] = g[c] * b[c] * (sigmoid + silu * (1 - sigmoid));
                grad_b[c] = g[c] * silu;
            }
        }
    }
}

// Row r of each (rows, width) matrix attends to its first `first + r + 1` columns; the others become 0.
void causal_softmax(float *scores, i64 batch, i64 rows, i64 width, i64 first, float scale) {
    PARALLEL
    for (i64 i = 0; i < batch * rows; i++) {
        float *s = scores + i * width, top = -INFINITY, sum = 0;
        i64 seen = first + i % rows + 1;
#pragma omp simd reduction(max : top)
        for (i64 c = 0; c < seen; c++) top = s[c] > top ? s[c] : top;
#pragma omp simd reduction(+ : sum)
        for (i64 c = 0; c < seen; c++) sum += s[c] = exponential((s[c] - top) * scale);
        float inverse = 1 / sum;
#pragma omp simd
        for (i64 c = 0; c < seen; c++) s[c] *= inverse;
        memset(s + seen, 0, (width - seen) * sizeof(float));
    }
}

// grad: of the probabilities, overwritten with that of the scores.
void causal_softmax_backward(const float *probs, float *grad, i64 batch, i64 rows, i64 width, i64 first, float scale) {
    PARALLEL
    for (i64 i = 0; i < batch * rows; i++) {
        const float *p = probs + i * width;
        float *g = grad + i * width, dot = 0;
        i64 seen = first + i % rows + 1;
#pragma omp simd reduction(+ : dot)
        for (i64 c = 0; c < seen; c++) dot += p[c] * g[c];
#pragma omp simd
        for (i64 c = 0; c < seen; c++) g[c] = p[c] * (g[c] - dot) * scale;
        memset(g + seen, 0, (width - seen) * sizeof(float));
    }
}

// (x_0, x_1), (x_2, x_3), ... turned by angle (sign 1) or back (sign -1), added to y or put there.
static inline void turn(const float *x, const float *cos, const float *sin, float sign, int add, float *y, i64 pairs) {
    for (i64 p = 0; p < pairs; p++) {
        float even = x[2 * p], odd = x[2 * p + 1], c = cos[p], s = sign * sin[p];
        y[2 * p] = (add ? y[2 * p] : 0) + even * c - odd * s;
        y[2 * p + 1] = (add ? y[2 * p + 1] : 0) + even * s + odd * c;
    }
}

// Between the projections' layout (B, T, H, .) and the products' (B, H, T, .), rotary part turned on the way.
// back 0: query, kv, k_rope -> q, k, v; back 1: the gradients of q, k, v -> those of query, kv, k_rope.
void heads(float *query, float *kv, float *k_rope, i64 stride, const float *cos, const float *sin, float *q, float *k,
           float *v, i64 batch, i64 length, i64 heads, i64 nope, i64 rope, i64 value, i64 back) {
    i64 width = nope + rope;
    size_t part = nope * sizeof(float), last = value * sizeof(float);
    PARALLEL
    for (i64 n = 0; n < batch * length; n++) {
        i64 b = n / length, t = n % length;
        const float *c = cos + t * (rope / 2), *s = sin + t * (rope / 2);
        float shared[rope], *rotary = k_rope + n * stride;
        memset(shared, 0, sizeof(shared));
        if (!back) turn(rotary, c, s, 1, 0, shared, rope / 2);
        for (i64 h = 0; h < heads; h++) {
            i64 at = (b * heads + h) * length + t;
            float *q_in = query + (n * heads + h) * width, *q_out = q + at * width, *k_out = k + at * width;
            float *kv_in = kv + (n * heads + h) * (nope + value), *v_out = v + at * value;
            if (back) {
                memcpy(q_in, q_out, part), memcpy(kv_in, k_out, part), memcpy(kv_in + nope, v_out, last);
                turn(q_out + nope, c, s, -1, 0, q_in + nope, rope / 2);
                turn(k_out + nope, c, s, -1, 1, shared, rope / 2);
            } else {
                memcpy(q_out, q_in, part), memcpy(k_out, kv_in, part), memcpy(v_out, kv_in + nope, last);
                turn(q_in + nope, c, s, 1, 0, q_out + nope, rope / 2);
                memcpy(k_out + nope, shared, sizeof(shared));
            }
        }
        if (back) memcpy(rotary, shared, sizeof(shared));
    }
}

// Overwrites logits (rows, width) with row_weight * (softmax - onehot(target)).
void cross_entropy(float *logits, const i64 *target, const float *row_weight, float *nll, i64 *prediction, i64 rows,
                   i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        float *x = logits + row * width, top = -INFINITY, sum = 0;
        int known = target[row] >= 0 && target[row] < width;  // a token outside the vocabulary has no loss: nan
        float own = known ? x[target[row]] : NAN;
        int32_t best = INT32_MAX, end = width;
#pragma omp simd reduction(max : top)
        for (i64 c = 0; c < width; c++) top = x[c] > top ? x[c] : top;
#pragma omp simd reduction(min : best)
        for (int32_t c = 0; c < end; c++) best = x[c] == top && c < best ? c : best;
#pragma omp simd reduction(+ : sum)
        for (i64 c = 0; c < width; c++) sum += x[c] = exponential(x[c] - top);
        prediction[row] = best < end ? best : 0;
        nll[row] = logf(sum) + top - own;
        float factor = row_weight[row] / sum;
#pragma omp simd
        for (i64 c = 0; c < width; c++) x[c] *= factor;
        if (known) x[target[row]] -= row_weight[row];
    }
}
