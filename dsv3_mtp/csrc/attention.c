// Causal attention of MLA's heads, forward and backward, its small products included: one task per sequence and head,
// whose scores never leave the cache of its core. kernels.py documents the shapes.
#include "products.h"

enum { STRIPE = 32 };  // columns that a loop takes at once

static void turn(float *x, const float *cos, const float *sin, float sign, i64 pairs) {
    for (i64 p = 0; p < pairs; p++) {
        float even = x[2 * p], odd = x[2 * p + 1], c = cos[p], s = sign * sin[p];
        x[2 * p] = even * c - odd * s;
        x[2 * p + 1] = even * s + odd * c;
    }
}

// One sequence's head. Matrices in scratch have `padded` rows, a multiple of BLOCK, and columns in whole vectors.
typedef struct {
    i64 length, padded, nope, rope, value, key_width, value_width;
    const float *cos, *sin;
} Shape;

static Shape shape_of(i64 length, i64 nope, i64 rope, i64 value, const float *cos, const float *sin) {
    return (Shape){length, up(length, BLOCK), nope, rope, value, up(nope + rope, LANES), up(value, LANES), cos, sin};
}

// Rows of `width` numbers, `stride` apart, into rows of `out_width`; the last `rope` numbers come from `rotary` and
// turn. What pads them stays 0.
static NOINLINE void collect(const real *x, i64 stride, i64 width, const real *rotary, i64 rotary_stride, i64 rope,
                             Shape s, real *out, i64 out_width) {
    for (i64 t = 0; t < s.length; t++, x += stride, rotary += rotary_stride, out += out_width) {
        float turned[rope + 1];
        for (size_t byte = 0; byte < (width + rope) * sizeof(real); byte += 64)
            __builtin_prefetch((const char *)(x + AHEAD * stride) + byte);
#pragma omp simd
        for (i64 c = 0; c < width; c++) out[c] = x[c];
        for (i64 p = 0; p < rope; p++) turned[p] = load(rotary[p]);
        turn(turned, s.cos + t * (rope / 2), s.sin + t * (rope / 2), 1, rope / 2);
        for (i64 p = 0; p < rope; p++) out[width + p] = store(turned[p]);
    }
}

// Queries start .. start + BLOCK against the keys up to each tile's last query.
static void all_scores(const real *query, Right keys, i64 width, i64 start, Shape s, float *scores) {
    for (i64 m = 0; m < BLOCK; m += TILE)
        product(rows_of(query, width, start + m), keys, width / PER, scores + m * s.padded, s.padded,
                up(start + m + TILE, LANES), 0);
}

// Of weights (BLOCK, padded) of the keys: weights @ values, up to each tile's last query.
static void weigh(const real *weights, Right values, i64 start, Shape s, float *out, i64 width) {
    for (i64 m = 0; m < BLOCK; m += TILE)
        product(rows_of(weights, s.padded, m), values, (start + m + TILE) / PER, out + m * width, width, width, 0);
}

// Rows as the right side, where they lie.
static Right plain(const unit *x, i64 width) { return (Right){x, width, WIDE * LANES, WIDE}; }

// sums += weights^T @ rows, for keys up to the last query of the block and the queries that see them.
static void spread(const unit *weights, const unit *rows, i64 start, Shape s, float *sums, i64 width) {
    for (i64 key = 0; key < start + BLOCK; key += TILE) {
        i64 first = key > start ? key - start : 0;  // queries of this block before `first` do not see the key
        Left a = {weights + first / PER * s.padded + key, 1, s.padded};
        Right b = plain(rows + (start + first) / PER * width, width);
        product(a, b, (BLOCK - first) / PER, sums + key * width, width, width, key < start);
    }
}

// All operands: query (batch, length, heads, nope + rope), kv (.., nope + value), k_rope (batch, length, rope) with
// rows `stride` apart.
typedef struct {
    const real *query, *kv, *k_rope;
    i64 stride, heads, length;
} Input;

// Head h of sequence b: rotated queries and keys, values, in rows.
static void collect_head(Input in, i64 b, i64 h, Shape s, real *q, real *k, real *v) {
    i64 width = s.nope + s.rope, q_stride = in.heads * width, kv_stride = in.heads * (s.nope + s.value);
    const real *query = in.query + b * s.length * q_stride + h * width;
    const real *kv = in.kv + b * s.length * kv_stride + h * (s.nope + s.value);
    collect(query, q_stride, s.nope, query + s.nope, q_stride, s.rope, s, q, s.key_width);
    collect(kv, kv_stride, s.nope, in.k_rope + b * s.length * in.stride, in.stride, s.rope, s, k, s.key_width);
    collect(kv + s.nope, kv_stride, s.value, kv, 0, 0, s, v, s.value_width);
}

static float sum_of(const float *x) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int l = 0; l < STRIPE; l++) sum += x[l];
    return sum;
}

// One row of scores -> weights before they are divided by their sum; 0 from `seen` to `end`. By stripes: a loop of any
// number of steps ends in scalar ones, and here most rows are short.
static NOINLINE void softmax_row(float *x, real *p, int seen, int end, float scale, float *top, float *inverse) {
    float part[STRIPE], most = -INFINITY;
    int whole = up(seen, STRIPE);
    for (int c = seen; c < whole; c++) x[c] = -INFINITY;
    for (int l = 0; l < STRIPE; l++) part[l] = -INFINITY;
    for (int from = 0; from < whole; from += STRIPE)
#pragma omp simd
        for (int l = 0; l < STRIPE; l++) part[l] = x[from + l] > part[l] ? x[from + l] : part[l];
#pragma omp simd reduction(max : most)
    for (int l = 0; l < STRIPE; l++) most = part[l] > most ? part[l] : most;
    memset(part, 0, sizeof(part));
    for (int from = 0; from < whole; from += STRIPE)
#pragma omp simd
        for (int l = 0; l < STRIPE; l++) {
            float e = exponential((x[from + l] - most) * scale);
            part[l] += e;
            p[from + l] = store(e);
        }
    memset(p + whole, 0, (end - whole) * sizeof(real));
    *top = most;
    *inverse = 1 / sum_of(part);
}

// The row of scores again, and the gradient of its probabilities -> probabilities p and gradient d of the scores.
static NOINLINE void softmax_row_backward(float *x, float *grad, real *p, real *d, int seen, int end, float scale,
                                          float top, float inverse) {
    float part[STRIPE] = {0};
    int whole = up(seen, STRIPE);
    for (int c = seen; c < whole; c++) x[c] = -INFINITY, grad[c] = 0;
    for (int from = 0; from < whole; from += STRIPE)
#pragma omp simd
        for (int l = 0; l < STRIPE; l++) {
            float probability = exponential((x[from + l] - top) * scale) * inverse;
            part[l] += probability * grad[from + l];
            x[from + l] = probability;
            p[from + l] = store(probability);
        }
    float dot = sum_of(part);
    for (int from = 0; from < whole; from += STRIPE)
#pragma omp simd
        for (int l = 0; l < STRIPE; l++) d[from + l] = store(x[from + l] * (grad[from + l] - dot) * scale);
    memset(p + whole, 0, (end - whole) * sizeof(real));
    memset(d + whole, 0, (end - whole) * sizeof(real));
}

// out: (batch, length, heads, value); top, inverse: (batch, heads, length), what the backward makes each softmax of.
void attention(const real *query, const real *kv, const real *k_rope, i64 stride, const float *cos, const float *sin,
               real *out, float *top, float *inverse, i64 batch, i64 length, i64 heads, i64 nope, i64 rope, i64 value,
               float scale) {
    Input in = {query, kv, k_rope, stride, heads, length};
    Shape s = shape_of(length, nope, rope, value, cos, sin);
    i64 kw = s.key_width, vw = s.value_width;
#pragma omp parallel
    {
        real *q = calloc(s.padded * (2 * kw + vw) + LANES * PER, sizeof(real));
        real *k = q + s.padded * kw, *v = k + s.padded * kw;
        unit *pairs = malloc((s.padded * vw + panel_size(kw, s.padded)) * sizeof(unit));
        unit *keys_at = pairs + s.padded * vw;
        float *scores = malloc(BLOCK * (s.padded + vw) * sizeof(float)), *mixed = scores + BLOCK * s.padded;
        real *weights = calloc(BLOCK * s.padded, sizeof(real));
#pragma omp for schedule(static)
        for (i64 n = 0; n < batch * heads; n++) {
            i64 b = n / heads, h = n % heads;
            collect_head(in, b, h, s, q, k, v);
            Right keys = across(k, s.padded, kw, keys_at), values = plain(paired(v, s.padded, vw, vw, pairs), vw);
            for (i64 start = 0; start < length; start += BLOCK) {
                all_scores(q, keys, kw, start, s, scores);
                float *most = top + n * length + start, *factor = inverse + n * length + start;
                i64 rows = length - start < BLOCK ? length - start : BLOCK;
                for (i64 r = 0; r < rows; r++)
                    softmax_row(scores + r * s.padded, weights + r * s.padded, start + r + 1, start + BLOCK, scale,
                                most + r, factor + r);
                weigh(weights, values, start, s, mixed, vw);
                for (i64 r = 0; r < rows; r++) {
                    real *y = out + ((b * length + start + r) * heads + h) * value;
#pragma omp simd
                    for (i64 c = 0; c < value; c++) y[c] = store(mixed[r * vw + c] * factor[r]);
                }
            }
        }
        free(q), free(pairs), free(scores), free(weights);
    }
}

// A row's gradient from scratch: the first `nope` numbers to `y`, the turned ones back to `rotary`.
static NOINLINE void give_back(float *x, i64 t, Shape s, real *y, real *rotary) {
    for (i64 c = 0; c < s.nope; c++) y[c] = store(x[c]);
    turn(x + s.nope, s.cos + t * (s.rope / 2), s.sin + t * (s.rope / 2), -1, s.rope / 2);
    for (i64 p = 0; p < s.rope; p++) rotary[p] = store(x[s.nope + p]);
}

// The two gradients that a block of queries gives: to itself (grad_q, BLOCK rows) and to all keys and values before it.
typedef struct {
    real *q, *k, *v, *g, *p, *d;             // rows
    unit *keys, *values;                     // transposed
    unit *q_pairs, *k_pairs, *g_pairs, *p_pairs, *d_pairs;
    float *scores, *slopes, *grad_q, *grad_k, *grad_v;
    void *memory;
} Scratch;

static void *take(char **at, i64 count, size_t size) {
    void *here = *at;
    *at += up(count * size, 64);
    return here;
}

static Scratch scratch_of(Shape s) {
    i64 kw = s.padded * s.key_width, vw = s.padded * s.value_width, block = BLOCK * s.padded;
    Scratch x;
    char *at = x.memory = calloc(8 * kw + 7 * vw + 6 * block + BLOCK * s.key_width + 4096, sizeof(float));
    x.q = take(&at, kw, sizeof(real)), x.k = take(&at, kw, sizeof(real)), x.v = take(&at, vw, sizeof(real));
    x.g = take(&at, vw, sizeof(real)), x.p = take(&at, block, sizeof(real)), x.d = take(&at, block, sizeof(real));
    x.keys = take(&at, panel_size(s.key_width, s.padded), sizeof(unit));
    x.values = take(&at, panel_size(s.value_width, s.padded), sizeof(unit));
    x.q_pairs = take(&at, kw, sizeof(unit)), x.k_pairs = take(&at, kw, sizeof(unit));
    x.g_pairs = take(&at, vw, sizeof(unit)), x.p_pairs = take(&at, block, sizeof(unit));
    x.d_pairs = take(&at, block, sizeof(unit)), x.scores = take(&at, block, sizeof(float));
    x.slopes = take(&at, block, sizeof(float)), x.grad_q = take(&at, BLOCK * s.key_width, sizeof(float));
    x.grad_k = take(&at, kw, sizeof(float)), x.grad_v = take(&at, vw, sizeof(float));
    return x;
}

void attention_backward(const real *query, const real *kv, const real *k_rope, i64 stride, const float *cos,
                        const float *sin, const real *grad, const float *top, const float *inverse, real *grad_query,
                        real *grad_kv, float *grad_rope, real *grad_k_rope, i64 batch, i64 length, i64 heads, i64 nope,
                        i64 rope, i64 value, float scale) {
    Input in = {query, kv, k_rope, stride, heads, length};
    Shape s = shape_of(length, nope, rope, value, cos, sin);
    i64 kw = s.key_width, vw = s.value_width, width = nope + rope;
#pragma omp parallel
    {
        Scratch x = scratch_of(s);
#pragma omp for schedule(static)
        for (i64 n = 0; n < batch * heads; n++) {
            i64 b = n / heads, h = n % heads;
            collect_head(in, b, h, s, x.q, x.k, x.v);
            collect(grad + (b * length * heads + h) * value, heads * value, value, grad, 0, 0, s, x.g, vw);
            Right keys = across(x.k, s.padded, kw, x.keys), values = across(x.v, s.padded, vw, x.values);
            Right k_down = plain(paired(x.k, s.padded, kw, kw, x.k_pairs), kw);
            const unit *q_pairs = paired(x.q, s.padded, kw, kw, x.q_pairs);
            const unit *g_pairs = paired(x.g, s.padded, vw, vw, x.g_pairs);
            for (i64 start = 0; start < length; start += BLOCK) {
                i64 end = start + BLOCK, rows = length - start < BLOCK ? length - start : BLOCK;
                all_scores(x.q, keys, kw, start, s, x.scores);
                all_scores(x.g, values, vw, start, s, x.slopes);
                for (i64 r = 0; r < rows; r++) {
                    i64 at = r * s.padded, row = n * length + start + r;
                    softmax_row_backward(x.scores + at, x.slopes + at, x.p + at, x.d + at, start + r + 1, end, scale,
                                         top[row], inverse[row]);
                }
                for (i64 r = rows; r < BLOCK; r++) {
                    memset(x.p + r * s.padded, 0, end * sizeof(real));
                    memset(x.d + r * s.padded, 0, end * sizeof(real));
                }
                weigh(x.d, k_down, start, s, x.grad_q, kw);
                for (i64 r = 0; r < rows; r++) {
                    real *y = grad_query + ((b * length + start + r) * heads + h) * width;
                    give_back(x.grad_q + r * kw, start + r, s, y, y + nope);
                }
                spread(paired(x.d, BLOCK, s.padded, end, x.d_pairs), q_pairs, start, s, x.grad_k, kw);
                spread(paired(x.p, BLOCK, s.padded, end, x.p_pairs), g_pairs, start, s, x.grad_v, vw);
            }
            for (i64 t = 0; t < length; t++) {
                real *y = grad_kv + ((b * length + t) * heads + h) * (nope + value);
                for (i64 c = 0; c < nope; c++) y[c] = store(x.grad_k[t * kw + c]);
                for (i64 c = 0; c < value; c++) y[nope + c] = store(x.grad_v[t * vw + c]);
                memcpy(grad_rope + (n * length + t) * rope, x.grad_k + t * kw + nope, rope * sizeof(float));
            }
        }
        free(x.memory);
#pragma omp for schedule(static)
        for (i64 n = 0; n < batch * length; n++) {  // the key's rotary part is shared: summed over heads, turned back
            i64 b = n / length, t = n % length;
            float sum[rope + 1];
            memset(sum, 0, sizeof(sum));
            for (i64 h = 0; h < heads; h++)
                for (i64 p = 0; p < rope; p++) sum[p] += grad_rope[((b * heads + h) * length + t) * rope + p];
            turn(sum, cos + t * (rope / 2), sin + t * (rope / 2), -1, rope / 2);
            for (i64 p = 0; p < rope; p++) grad_k_rope[n * rope + p] = store(sum[p]);
        }
    }
}
