// The steps of decoding: few rows (tokens), so that a product costs what reading its weights costs. Each weight is read
// once for all rows, and a row's sums have one order whatever rows stand beside it: a token that is verified behind
// drafts gets the bits that it gets alone. c_decode.py documents the shapes.
#include <stdlib.h>

#include "kernels.h"

// Rows of x and of a weight that are multiplied at once.
enum { FEW = 2, TOGETHER = 8, WORTH_THREADS = 1 << 15, BLOCK_OF_SLOTS = 64 };

// Zeros, and a vector of them behind the last.
static float *zeros_for(i64 count) { return calloc(count + LANES, sizeof(float)); }

// y (few, many) = x @ w^T, x: (few, width), w: (many, width); rows of x and y have strides. Behind a row of x a vector may be
// read, of which finite numbers count nothing.
static inline __attribute__((always_inline)) void dots(const float *x, i64 x_stride, const int few, const real *w,
                                                       i64 width, const int many, float *y, i64 y_stride) {
    vec sum[FEW][TOGETHER] = {0};
    i64 c = 0;
    for (; c + LANES <= width; c += LANES)
#pragma GCC unroll 8
        for (int m = 0; m < many; m++) {
            __builtin_prefetch(w + (c + 2 * width) * TOGETHER + m * LANES);  // two blocks ahead, line after line
            vec column = widen(*(const reals *)(w + m * width + c));
#pragma GCC unroll 2
            for (int n = 0; n < few; n++) sum[n][m] += *(const vec *)(x + n * x_stride + c) * column;
        }
    if (c < width)
#pragma GCC unroll 8
        for (int m = 0; m < many; m++)
#pragma GCC unroll 2
            for (int n = 0; n < few; n++)
                sum[n][m] += *(const vec *)(x + n * x_stride + c) * get(w + m * width + c, width - c);
#pragma GCC unroll 2
    for (int n = 0; n < few; n++)
#pragma GCC unroll 8
        for (int m = 0; m < many; m++) y[n * y_stride + m] = sum_of(sum[n][m]);
}

// y = x @ w^T. x: (rows, width), y: (rows, outputs), each with a stride; w: (outputs, width).
static void product(const float *x, i64 x_stride, i64 rows, const real *w, i64 width, i64 outputs, float *y,
                    i64 y_stride) {
#pragma omp parallel for schedule(static) if (outputs * width >= WORTH_THREADS)
    for (i64 o = 0; o < outputs; o += TOGETHER)
        for (i64 n = 0; n < rows; n += FEW) {
            const float *in = x + n * x_stride;
            float *at = y + n * y_stride + o;
            const real *weights = w + o * width;
            int pair = n + FEW <= rows;
            if (o + TOGETHER > outputs)
                for (i64 m = 0; m < outputs - o; m++, weights += width, at++)
                    if (pair) dots(in, x_stride, FEW, weights, width, 1, at, y_stride);
                    else dots(in, x_stride, 1, weights, width, 1, at, y_stride);
            else if (pair) dots(in, x_stride, FEW, weights, width, TOGETHER, at, y_stride);
            else dots(in, x_stride, 1, weights, width, TOGETHER, at, y_stride);
        }
}

static void widen_row(const real *x, i64 width, float *y) {
    for (i64 c = 0; c < width; c++) y[c] = load(x[c]);
}

static void narrow_row(const float *x, i64 width, real *y) {
    for (i64 c = 0; c < width; c += LANES) set(y + c, *(const vec *)(x + c), width - c);
}

// y = x / |(x, floor)|, which may be x.
static void direction(const float *x, i64 width, float floor, float *y) {
    vec squares = {0};
    i64 c = 0;
    for (; c + LANES <= width; c += LANES) squares += *(const vec *)(x + c) * *(const vec *)(x + c);
    float sum = sum_of(squares) + floor * floor;
    for (; c < width; c++) sum += x[c] * x[c];
    float scale = 1 / sqrtf(sum);
    for (c = 0; c < width; c++) y[c] = x[c] * scale;
}

static void rotate(const float *x, const float *angles, i64 width, float *y) {
    for (i64 p = 0; p < width; p += 2) {
        float even = x[p], odd = x[p + 1], cosine = angles[p], sine = angles[p + 1];
        y[p] = even * cosine - odd * sine;
        y[p + 1] = even * sine + odd * cosine;
    }
}

static void softmax(float *x, i64 width) {
    float most = -INFINITY, sum = 0;
    for (i64 c = 0; c < width; c++) most = x[c] > most ? x[c] : most;
    for (i64 c = 0; c < width; c += LANES) {
        float some[LANES];
        for (int l = 0; l < LANES; l++) some[l] = c + l < width ? x[c + l] - most : -INFINITY;
        vec e = exponential(*(vec *)some);
        sum += sum_of(e);
        memcpy(x + c, &e, (width - c < LANES ? width - c : LANES) * sizeof(float));
    }
    for (i64 c = 0; c < width; c++) x[c] /= sum;
}

// y (heads, y_stride) = p (heads, slots) @ the first `width` columns of past (slots, entry).
static void mix(const float *p, i64 heads, i64 slots, const real *past, i64 entry, i64 width, float *y, i64 y_stride) {
    memset(y, 0, heads * y_stride * sizeof(float));
    for (i64 from = 0; from < slots; from += BLOCK_OF_SLOTS) {
        i64 to = from + BLOCK_OF_SLOTS < slots ? from + BLOCK_OF_SLOTS : slots;
        for (i64 h = 0; h < heads; h++)
            for (i64 c = 0; c < width; c += LANES) {
                vec *at = (vec *)(y + h * y_stride + c), sum = *at;
                for (i64 s = from; s < to; s++) sum += p[h * slots + s] * get(past + s * entry + c, width - c);
                *at = sum;
            }
    }
}

void decode_linear(const real *x, const real *w, real *y, i64 rows, i64 width, i64 outputs) {
    float *in = zeros_for(rows * width), *out = zeros_for(rows * outputs);
    widen_row(x, rows * width, in);
    product(in, width, rows, w, width, outputs, out, outputs);
    narrow_row(out, rows * outputs, y);
    free(in), free(out);
}

void decode_attention(const real *x, const real *down, const real *up, const real *w_uk, const real *w_uv,
                      const real *out, const float *angles, const i64 *first, real *cache, real *y, i64 batch,
                      i64 length, i64 slots, i64 hidden, i64 q_rank, i64 rank, i64 rope, i64 heads, i64 nope,
                      i64 value, float floor, float q_floor, float kv_floor) {
    i64 rows = batch * length, entry = rank + rope, low_width = q_rank + entry, wide = heads * (nope + rope);
    i64 mixed_width = (rank + LANES - 1) / LANES * LANES, seen = 0;
    for (i64 b = 0; b < batch; b++) seen = first[b] + length > seen ? first[b] + length : seen;
    float *in = zeros_for(rows * hidden), *h = zeros_for(rows * hidden), *low = zeros_for(rows * low_width);
    float *asked = zeros_for(rows * wide), *query = zeros_for(heads * entry), *scores = zeros_for(heads * seen);
    float *mixed = zeros_for(heads * mixed_width), *values = zeros_for(rows * heads * value);
    float *added = zeros_for(rows * hidden);
    widen_row(x, rows * hidden, in);
    for (i64 n = 0; n < rows; n++) direction(in + n * hidden, hidden, floor, h + n * hidden);
    product(h, hidden, rows, down, hidden, low_width, low, low_width);
    for (i64 n = 0; n < rows; n++) {  // the new entries of the cache
        float *latent = low + n * low_width + q_rank, *key = latent + rank;
        i64 slot = first[n / length] + n % length;
        real *to = cache + (n / length * slots + slot) * entry;
        direction(latent, rank, kv_floor, latent);
        rotate(key, angles + slot * rope, rope, key);
        for (i64 c = 0; c < entry; c += LANES) set(to + c, *(vec *)(latent + c), entry - c);
        if (q_rank) direction(low + n * low_width, q_rank, q_floor, low + n * low_width);
    }
    if (q_rank) product(low, low_width, rows, up, q_rank, wide, asked, wide);
    else product(h, hidden, rows, up, hidden, wide, asked, wide);
    for (i64 n = 0; n < rows; n++) {
        i64 slot = first[n / length] + n % length, end = slot + 1;
        const real *past = cache + n / length * slots * entry;
        for (i64 i = 0; i < heads; i++) {
            const float *from = asked + n * wide + i * (nope + rope);
            float *to = query + i * entry;
            if (w_uk) product(from, 0, 1, w_uk + i * rank * nope, nope, rank, to, 0);
            else memcpy(to, from, rank * sizeof(float));
            rotate(from + nope, angles + slot * rope, rope, to + rank);
        }
        product(query, entry, heads, past, entry, end, scores, end);
        for (i64 i = 0; i < heads; i++) softmax(scores + i * end, end);
        mix(scores, heads, end, past, entry, rank, mixed, mixed_width);
        for (i64 i = 0; i < heads; i++)
            product(mixed + i * mixed_width, 0, 1, w_uv + i * value * rank, rank, value, values + (n * heads + i) * value,
                    0);
    }
    product(values, heads * value, rows, out, heads * value, hidden, added, hidden);
    for (i64 c = 0; c < rows * hidden; c++) in[c] += added[c];
    narrow_row(in, rows * hidden, y);
    free(in), free(h), free(low), free(asked), free(query), free(scores), free(mixed), free(values), free(added);
}

// The `count` largest of x, those set to -inf not among them, become -inf; where[i]: which.
static void take_largest(float *x, i64 width, i64 count, i64 *where) {
    for (i64 k = 0; k < count; k++) {
        i64 best = 0;
        for (i64 c = 1; c < width; c++)
            if (x[c] > x[best]) best = c;
        where[k] = best;
        x[best] = -INFINITY;
    }
}

// Gates (experts,) of one row, 0 for experts that are not chosen. h: its normed state.
static void route(const float *h, const real *router, const float *bias, i64 hidden, i64 experts, i64 groups,
                  i64 topk_group, i64 top_k, i64 normalise, float scaling, float *gates) {
    float *score = zeros_for(experts), *biased = zeros_for(experts), *best = zeros_for(groups), sum = 0;
    i64 *where = calloc(experts + groups, sizeof(i64)), size = experts / groups;
    product(h, hidden, 1, router, hidden, experts, score, 0);
    for (i64 e = 0; e < experts; e++) score[e] = 1 / (1 + expf(-score[e]));
    for (i64 e = 0; e < experts; e++) biased[e] = score[e] + bias[e];
    if (groups > 1) {
        for (i64 g = 0; g < groups; g++) {
            float one = -INFINITY, two = -INFINITY;
            for (i64 e = g * size; e < (g + 1) * size; e++)
                if (biased[e] > one) two = one, one = biased[e];
                else if (biased[e] > two) two = biased[e];
            best[g] = one + two;
        }
        take_largest(best, groups, topk_group, where);
        for (i64 g = 0; g < groups; g++) {
            int kept = 0;
            for (i64 k = 0; k < topk_group; k++) kept |= where[k] == g;
            if (!kept)
                for (i64 e = g * size; e < (g + 1) * size; e++) biased[e] = -INFINITY;
        }
    }
    take_largest(biased, experts, top_k, where);
    for (i64 k = 0; k < top_k; k++) sum += score[where[k]];
    for (i64 k = 0; k < top_k; k++) gates[where[k]] = score[where[k]] / (normalise ? sum + 1e-20f : 1) * scaling;
    free(score), free(biased), free(best), free(where);
}

// out (rows, hidden) = down (silu(gate h) * up h). a, b: room for (rows, width).
static void feed_forward(const float *h, i64 rows, i64 hidden, const real *gate, const real *up, const real *down,
                         i64 width, float *a, float *b, float *out) {
    product(h, hidden, rows, gate, hidden, width, a, width);
    product(h, hidden, rows, up, hidden, width, b, width);
    for (i64 c = 0; c < rows * width; c += LANES) {
        vec x = *(vec *)(a + c);
        *(vec *)(a + c) = x / (1.0f + exponential(-x)) * *(vec *)(b + c);
    }
    product(a, width, rows, down, width, hidden, out, hidden);
}

void decode_mlp(const real *x, const float *gain, const real *router, const float *bias, const real *gate_up,
                const real *down, const real *common_gate, const real *common_up, const real *common_down, real *y,
                i64 rows, i64 hidden, i64 experts, i64 width, i64 common_width, i64 groups, i64 topk_group, i64 top_k,
                i64 normalise, float scaling, float floor) {
    i64 widest = width > common_width ? width : common_width;
    float *sum = zeros_for(rows * hidden), *h = zeros_for(rows * hidden), *picked = zeros_for(rows * hidden);
    float *a = zeros_for(rows * widest), *b = zeros_for(rows * widest), *out = zeros_for(rows * hidden);
    float *gates = zeros_for(rows * experts);
    widen_row(x, rows * hidden, sum);
    for (i64 n = 0; n < rows; n++) {
        float *row = h + n * hidden;
        direction(sum + n * hidden, hidden, floor, row);
        for (i64 c = 0; c < hidden; c++) row[c] *= gain[c];
        // the router sees the numbers that it sees in training; the next row is not there yet
        for (i64 c = 0; c < hidden; c += LANES) *(vec *)(row + c) = widen(narrow(*(vec *)(row + c)));
        if (experts)
            route(row, router, bias, hidden, experts, groups, topk_group, top_k, normalise, scaling,
                  gates + n * experts);
    }
    if (common_width) {
        feed_forward(h, rows, hidden, common_gate, common_up, common_down, common_width, a, b, out);
        for (i64 c = 0; c < rows * hidden; c++) sum[c] += out[c];
    }
    for (i64 e = 0; e < experts; e++) {
        const real *gate = gate_up + e * 2 * width * hidden;
        i64 count = 0;
        for (i64 n = 0; n < rows; n++)
            if (gates[n * experts + e] != 0)
                memcpy(picked + count++ * hidden, h + n * hidden, hidden * sizeof(float));
        if (!count) continue;
        feed_forward(picked, count, hidden, gate, gate + width * hidden, down + e * hidden * width, width, a, b, out);
        count = 0;
        for (i64 n = 0; n < rows; n++) {
            float factor = gates[n * experts + e];
            if (factor == 0) continue;
            for (i64 c = 0; c < hidden; c++) sum[n * hidden + c] += factor * out[count * hidden + c];
            count++;
        }
    }
    narrow_row(sum, rows * hidden, y);
    free(sum), free(h), free(picked), free(a), free(b), free(out), free(gates);
}
