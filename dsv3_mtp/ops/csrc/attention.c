// Causal attention of MLA's heads, forward and backward, its small products included: one task per sequence and head,
// whose scores never leave the cache of its core. c.py documents the shapes.
#include "products.h"

// One sequence's head. Matrices in scratch have `padded` rows, a multiple of BLOCK, and columns in whole vectors.
typedef struct {
    i64 length, padded, nope, rope, value, key_width, value_width;
    const float *angles;  // (length, 2, rope in whole vectors), see `angles_of`
} Shape;

static Shape shape_of(i64 length, i64 nope, i64 rope, i64 value, const float *angles) {
    return (Shape){length, up(length, BLOCK), nope, rope, value, up(nope + rope, LANES), up(value, LANES), angles};
}

// What rotary numbers are multiplied by, and what their neighbours in the pairs are. cos, sin: (length, rope / 2).
static float *angles_of(const float *cos, const float *sin, i64 length, i64 rope) {
    i64 width = up(rope, LANES);
    float *angles = zeros(2 * length * width + 1, sizeof(float));
    for (i64 t = 0; t < length; t++)
        for (i64 p = 0; p < rope; p++) {
            i64 pair = t * (rope / 2) + p / 2;
            angles[2 * t * width + p] = cos[pair], angles[(2 * t + 1) * width + p] = p % 2 ? sin[pair] : -sin[pair];
        }
    return angles;
}

// Rotary numbers p .. p + LANES of slot t, turned; turned back for a sign of -1.
static vec turn(vec x, Shape s, i64 t, i64 p, float sign) {
    i64 width = up(s.rope, LANES);
    const float *angle = s.angles + 2 * t * width + p;
    return x * *(const vec *)angle + swapped(x, 1) * (*(const vec *)(angle + width) * sign);
}

// Rows of `width` numbers, `stride` apart, into rows of `out_width`; the last `rope` numbers come from `rotary` and
// turn. What pads them stays 0.
static NOINLINE void collect(const real *x, i64 stride, i64 width, const real *rotary, i64 rotary_stride, i64 rope,
                             Shape s, real *out, i64 out_width) {
    for (i64 t = 0; t < s.length; t++, x += stride, rotary += rotary_stride, out += out_width) {
        for (size_t byte = 0; byte < (width + rope) * sizeof(real); byte += 64)
            __builtin_prefetch((const char *)(x + AHEAD * stride) + byte);
        for (i64 c = 0; c < width; c += LANES) set(out + c, get(x + c, width - c), width - c);
        for (i64 p = 0; p < rope; p += LANES)
            set(out + width + p, turn(get(rotary + p, rope - p), s, t, p, 1), rope - p);
    }
}

// Queries start .. start + BLOCK against the keys up to each tile's last query.
static void all_scores(const real *query, Right keys, i64 width, i64 start, Shape s, float *scores) {
    for (i64 m = 0; m < BLOCK; m += TILE)
        product(rows_of(query, width, start + m), keys, width / PER, sums_at(scores + m * s.padded, s.padded, 0),
                up(start + m + TILE, LANES));
}

// Of weights (BLOCK, padded) of the keys: weights @ values, up to each tile's last query.
static void weigh(const real *weights, Right values, i64 start, Shape s, float *out, i64 width) {
    for (i64 m = 0; m < BLOCK; m += TILE)
        product(rows_of(weights, s.padded, m), values, (start + m + TILE) / PER, sums_at(out + m * width, width, 0),
                width);
}

// Rows as the right side, where they lie.
static Right plain(const unit *x, i64 width) { return (Right){x, width, WIDE * LANES, WIDE}; }

// sums += weights^T @ rows, for keys up to the last query of the block and the queries that see them.
static void spread(const unit *weights, const unit *rows, i64 start, Shape s, float *sums, i64 width) {
    for (i64 key = 0; key < start + BLOCK; key += TILE) {
        i64 first = key > start ? key - start : 0;  // queries of this block before `first` do not see the key
        Left a = {weights + first / PER * s.padded + key, 1, s.padded};
        Right b = plain(rows + (start + first) / PER * width, width);
        product(a, b, (BLOCK - first) / PER, sums_at(sums + key * width, width, key < start), width);
    }
}

// All operands: query (batch, length, heads, nope + rope), kv (.., nope + value), k_rope (batch, length, rope) with
// rows `stride` apart.
typedef struct {
    const real *query, *kv, *k_rope;
    i64 stride, heads, length;
    const i64 *first;  // (batch, length): the slot where each query's document begins, NULL: 0
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

// In a row of the query `slot` the keys before `first` do not count; its own always does.
static void hide_before(float *row, i64 first, i64 slot) {
    for (i64 c = 0; c < first && c < slot; c++) row[c] = -INFINITY;
}

// In a row of which `seen` numbers count, the rest of its last vector becomes `value`. Returns where that ends.
static i64 hide(float *row, i64 seen, float value) {
    vec *last = (vec *)(row + (seen - 1) / LANES * LANES);
    *last = choose(lane <= (int32_t)((seen - 1) % LANES), *last, (vec){0} + value);
    return up(seen, LANES);
}

// One row of scores -> weights before they are divided by their sum; 0 from `seen` to `end`.
static NOINLINE void softmax_row(float *x, real *p, i64 seen, i64 end, float scale, float *top, float *inverse) {
    i64 whole = hide(x, seen, -INFINITY);
    vec most = *(vec *)x, sum = {0};
    for (i64 c = LANES; c < whole; c += LANES) most = larger(*(vec *)(x + c), most);
    float highest = *top = max_of(most);
    for (i64 c = 0; c < whole; c += LANES) {
        vec e = exponential((*(vec *)(x + c) - highest) * scale);
        sum += e;
        set(p + c, e, LANES);
    }
    for (i64 c = whole; c < end; c += LANES) set(p + c, (vec){0}, LANES);
    *inverse = 1 / sum_of(sum);
}

// The row of scores again, and the gradient of its probabilities -> probabilities p and gradient d of the scores.
static NOINLINE void softmax_row_backward(float *x, float *grad, real *p, real *d, i64 seen, i64 end, float scale,
                                          float top, float inverse) {
    i64 whole = hide(x, seen, -INFINITY);
    vec sum = {0};
    hide(grad, seen, 0);
    for (i64 c = 0; c < whole; c += LANES) {
        vec probability = exponential((*(vec *)(x + c) - top) * scale) * inverse;
        sum += probability * *(vec *)(grad + c);
        *(vec *)(x + c) = probability;
        set(p + c, probability, LANES);
    }
    float dot = sum_of(sum);
    for (i64 c = 0; c < whole; c += LANES)
        set(d + c, *(vec *)(x + c) * (*(vec *)(grad + c) - dot) * scale, LANES);
    for (i64 c = whole; c < end; c += LANES) set(p + c, (vec){0}, LANES), set(d + c, (vec){0}, LANES);
}

// out: (batch, length, heads, value); top, inverse: (batch, heads, length), what the backward makes each softmax of.
void attention(const real *query, const real *kv, const real *k_rope, i64 stride, const float *cos, const float *sin,
               const i64 *first, real *out, float *top, float *inverse, i64 batch, i64 length, i64 heads, i64 nope, i64 rope, i64 value,
               float scale) {
    Input in = {query, kv, k_rope, stride, heads, length, first};
    float *angles = angles_of(cos, sin, length, rope);
    Shape s = shape_of(length, nope, rope, value, angles);
    i64 kw = s.key_width, vw = s.value_width;
#pragma omp parallel
    {
        real *q = zeros(s.padded * (2 * kw + vw) + LANES * PER, sizeof(real));
        real *k = q + s.padded * kw, *v = k + s.padded * kw;
        unit *pairs = room(s.padded * vw + panel_size(kw, s.padded), sizeof(unit));
        unit *keys_at = pairs + s.padded * vw;
        float *scores = room(BLOCK * (s.padded + vw), sizeof(float)), *mixed = scores + BLOCK * s.padded;
        real *weights = zeros(BLOCK * s.padded, sizeof(real));
#pragma omp for schedule(static)
        for (i64 n = 0; n < batch * heads; n++) {
            i64 b = n / heads, h = n % heads;
            collect_head(in, b, h, s, q, k, v);
            Right keys = across(k, s.padded, kw, keys_at), values = plain(paired(v, s.padded, vw, vw, pairs), vw);
            for (i64 start = 0; start < length; start += BLOCK) {
                all_scores(q, keys, kw, start, s, scores);
                float *most = top + n * length + start, *factor = inverse + n * length + start;
                i64 rows = length - start < BLOCK ? length - start : BLOCK;
                for (i64 r = 0; first && r < rows; r++)
                    hide_before(scores + r * s.padded, first[b * length + start + r], start + r);
                for (i64 r = 0; r < rows; r++)
                    softmax_row(scores + r * s.padded, weights + r * s.padded, start + r + 1, start + BLOCK, scale,
                                most + r, factor + r);
                weigh(weights, values, start, s, mixed, vw);
                for (i64 r = 0; r < rows; r++) {
                    real *y = out + ((b * length + start + r) * heads + h) * value;
                    for (i64 c = 0; c < value; c += LANES)
                        set(y + c, *(vec *)(mixed + r * vw + c) * factor[r], value - c);
                }
            }
        }
        free(q), free(pairs), free(scores), free(weights);
    }
    free(angles);
}

// A row's gradient from scratch: the first `nope` numbers to `y`, the turned ones back to `rotary`.
static void give_back(const float *x, i64 t, Shape s, real *y, real *rotary) {
    for (i64 c = 0; c < s.nope; c += LANES) set(y + c, *(const vec *)(x + c), s.nope - c);
    for (i64 p = 0; p < s.rope; p += LANES)
        set(rotary + p, turn(*(const vec *)(x + s.nope + p), s, t, p, -1), s.rope - p);
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
    char *at = x.memory = zeros(8 * kw + 7 * vw + 6 * block + BLOCK * s.key_width + 4096, sizeof(float));
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
                        const float *sin, const i64 *first, const real *grad, const float *top, const float *inverse, real *grad_query,
                        real *grad_kv, float *grad_rope, real *grad_k_rope, i64 batch, i64 length, i64 heads, i64 nope,
                        i64 rope, i64 value, float scale) {
    Input in = {query, kv, k_rope, stride, heads, length, first};
    float *angles = angles_of(cos, sin, length, rope);
    Shape s = shape_of(length, nope, rope, value, angles);
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
                    if (first) hide_before(x.scores + at, first[b * length + start + r], start + r);
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
                for (i64 c = 0; c < nope; c += LANES) set(y + c, *(vec *)(x.grad_k + t * kw + c), nope - c);
                for (i64 c = 0; c < value; c += LANES)
                    set(y + nope + c, *(vec *)(x.grad_v + t * vw + c), value - c);
                memcpy(grad_rope + (n * length + t) * rope, x.grad_k + t * kw + nope, rope * sizeof(float));
            }
        }
        free(x.memory);
#pragma omp for schedule(static)
        for (i64 n = 0; n < batch * length; n++) {  // the key's rotary part is shared: summed over heads, turned back
            i64 b = n / length, t = n % length;
            float sum[rope + LANES];
            memset(sum, 0, sizeof(sum));
            for (i64 h = 0; h < heads; h++)
                for (i64 p = 0; p < rope; p++) sum[p] += grad_rope[((b * heads + h) * length + t) * rope + p];
            for (i64 p = 0; p < rope; p += LANES)
                set(grad_k_rope + n * rope + p, turn(*(vec *)(sum + p), s, t, p, -1), rope - p);
        }
    }
    free(angles);
}
