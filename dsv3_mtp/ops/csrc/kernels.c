// The passes of a training step that torch's CPU operators make in several: read once, written once. c.py
// documents the shapes. The products around them stay with torch.
#include "kernels.h"

void rms_norm(const real *x, i64 stride, const real *weight, real *y, float *scale, i64 rows, i64 width, float eps) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const real *in = x + row * stride;
        vec squares = {0};
        for (i64 c = 0; c < width; c += LANES) squares += get(in + c, width - c) * get(in + c, width - c);
        float s = scale[row] = 1 / sqrtf(sum_of(squares) / width + eps);
        for (i64 c = 0; c < width; c += LANES)
            set(y + row * width + c, get(in + c, width - c) * s * get(weight + c, width - c), width - c);
    }
}

// grad_weight: (parts, width), a partial sum for each of `parts` blocks of rows.
void rms_norm_backward(const real *grad, const real *x, i64 stride, const real *weight, const float *scale,
                       real *grad_x, float *grad_weight, i64 rows, i64 width, i64 parts) {
    PARALLEL
    for (i64 part = 0; part < parts; part++) {
        float sums[width + LANES];
        memset(sums, 0, sizeof(sums));
        for (i64 row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            const real *g = grad + row * width, *in = x + row * stride;
            float s = scale[row];
            vec dots = {0};
            for (i64 c = 0; c < width; c += LANES)
                dots += get(g + c, width - c) * get(weight + c, width - c) * get(in + c, width - c);
            float shift = sum_of(dots) * s * s / width;
            for (i64 c = 0; c < width; c += LANES) {
                vec slope = get(g + c, width - c), value = get(in + c, width - c);
                set(grad_x + row * width + c, (slope * get(weight + c, width - c) - value * shift) * s, width - c);
                *(vec *)(sums + c) += slope * value * s;
            }
        }
        memcpy(grad_weight + part * width, sums, width * sizeof(float));
    }
}

// y = silu(a) * b * gates, rows of a and b `stride` apart. gates NULL: 1.
void swiglu(const real *a, i64 a_stride, const real *b, i64 b_stride, const float *gates, real *y, i64 rows,
            i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        float factor = gates ? gates[row] : 1;
        for (i64 at = row * width, c = 0; c < width; c += LANES) {
            vec x = get(a + row * a_stride + c, width - c), up = get(b + row * b_stride + c, width - c);
            set(y + at + c, x / (1.0f + exponential(-x)) * up * factor, width - c);
        }
    }
}

// Rows of grad_a and grad_b are `stride` apart. With gates also their gradient, and y of the forward again.
void swiglu_backward(const real *grad, const real *a, i64 a_stride, const real *b, i64 b_stride, const float *gates,
                     real *grad_a, real *grad_b, i64 stride, float *grad_gates, real *y, i64 rows, i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        float factor = gates ? gates[row] : 1;
        vec sum = {0};
        for (i64 at = row * width, c = 0; c < width; c += LANES) {
            vec x = get(a + row * a_stride + c, width - c), up = get(b + row * b_stride + c, width - c);
            vec g = get(grad + at + c, width - c), scaled = g * factor;
            vec sigmoid = 1.0f / (1.0f + exponential(-x)), silu = x * sigmoid;
            set(grad_a + row * stride + c, scaled * up * (sigmoid + silu * (1.0f - sigmoid)), width - c);
            set(grad_b + row * stride + c, scaled * silu, width - c);
            if (!gates) continue;
            sum += g * silu * up;
            set(y + at + c, silu * up * factor, width - c);
        }
        if (gates) grad_gates[row] = sum_of(sum);
    }
}

// y[row] = the sum of x[index[row][0]], x[index[row][1]], ..., `many` of them; -1 stands for none. Returns how many of
// these indices are outside -1 .. x_rows - 1; then y is not written.
i64 sum_rows(const real *x, i64 x_rows, const i64 *index, real *y, i64 rows, i64 many, i64 width) {
    i64 outside = 0;
    for (i64 n = 0; n < rows * many; n++) outside += index[n] < -1 || index[n] >= x_rows;
    if (outside) return outside;
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        for (i64 c = 0; c < width; c += LANES) {
            vec sum = {0};
            for (i64 j = 0; j < many; j++) {
                i64 from = index[row * many + j];
                if (from >= 0) sum += get(x + from * width + c, width - c);
            }
            set(y + row * width + c, sum, width - c);
        }
    }
    return 0;
}

// Overwrites logits (rows, width) with row_weight * (softmax - onehot(target)).
void cross_entropy(real *logits, const i64 *target, const float *row_weight, float *nll, i64 *prediction, i64 rows,
                   i64 width) {
    PARALLEL
    for (i64 row = 0; row < rows; row++) {
        real *x = logits + row * width;
        int known = target[row] >= 0 && target[row] < width;  // a token outside the vocabulary has no loss: nan
        float own = known ? load(x[target[row]]) : NAN;
        vec most = {0}, sums = {0};
        mask first = {0};  // where each lane's largest is
        most -= INFINITY;
        for (i64 c = 0; c < width; c += LANES) {
            vec value = get_or(x + c, width - c, -INFINITY);
            mask more = value > most;
            first = (more & (int32_t)c) | (~more & first);
            most = larger(value, most);
        }
        float top = max_of(most);
        i64 best = width - 1;
        for (int l = 0; l < LANES; l++) best = most[l] == top && first[l] + l < best ? first[l] + l : best;
        for (i64 c = 0; c < width; c += LANES) sums += exponential(get_or(x + c, width - c, -INFINITY) - top);
        float sum = sum_of(sums);
        prediction[row] = best;
        nll[row] = logf(sum) + top - own;
        vec factor = (vec){0} + row_weight[row] / sum;
        for (i64 c = 0; c < width; c += LANES) set(x + c, exponential(get(x + c, width - c) - top) * factor, width - c);
        if (known) {
            vec gradient = exponential((vec){0} + (own - top)) * factor - row_weight[row];
            set(x + target[row], gradient, 1);
        }
    }
}

// Block-FP8 as numbers: y = code * scale of its 128 x 128 block, of `matrices` (rows, columns) one after the other, each
// with blocks of its own; partial ones at the right and lower edge. A block has 256 different numbers: they are made
// once and looked up.
void dequantise(const uint8_t *codes, const float *scales, real *y, i64 matrices, i64 rows, i64 columns) {
    enum { EDGE = 128 };
    i64 down = (rows + EDGE - 1) / EDGE, across = (columns + EDGE - 1) / EDGE;
    float numbers[256];  // of E4M3: four bits of exponent, three of fraction, no infinity
    for (int n = 0; n < 256; n++) {
        int exponent = n >> 3 & 15, fraction = n & 7;
        float size = exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
        numbers[n] = (n & 127) == 127 ? NAN : n & 128 ? -size : size;
    }
    PARALLEL
    for (i64 band = 0; band < matrices * down; band++) {
        i64 first = band % down * EDGE, last = first + EDGE < rows ? first + EDGE : rows;
        for (i64 block = 0; block < across; block++) {
            i64 left = block * EDGE, right = left + EDGE < columns ? left + EDGE : columns;
            real table[256];
            for (int n = 0; n < 256; n++) table[n] = rounded(numbers[n] * scales[band * across + block]);
            for (i64 row = band / down * rows + first; row < band / down * rows + last; row++)
                for (i64 c = row * columns + left; c < row * columns + right; c++) y[c] = table[codes[c]];
        }
    }
}
