// The passes of a training step that torch's CPU operators make in several: read once, written once. kernels.py
// documents the shapes. The products around them stay with torch.
#include "kernels.h"

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

void swiglu(const real *a, const real *b, real *y, i64 rows, i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) swiglu_row(a + row * width, b + row * width, 1, y + row * width, width);
}

void swiglu_backward(const real *gate_proj, const real *up_proj, const real *grad, real *grad_gate_proj,
                     real *grad_up_proj, i64 rows, i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const real *a = gate_proj + row * width, *b = up_proj + row * width, *g = grad + row * width;
        real *grad_a = grad_gate_proj + row * width, *grad_b = grad_up_proj + row * width;
#pragma omp simd
        for (i64 c = 0; c < width; c++) {
            float x = load(a[c]), sigmoid = 1 / (1 + exponential(-x)), silu = x * sigmoid;
            grad_a[c] = store(load(g[c]) * load(b[c]) * (sigmoid + silu * (1 - sigmoid)));
            grad_b[c] = store(load(g[c]) * silu);
        }
    }
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
