// The steps of decoding: few rows (tokens), so that a product costs what reading its weights costs. Each weight is read
// once for all rows, and a row's sums have one order whatever rows stand beside it: a token that is verified behind
// drafts gets the bits that it gets alone. c_decode.py documents the shapes.
#include "decode.h"

#include "codes.h"

// Rows of x and of a weight that are multiplied at once.
enum { FEW = 2, TOGETHER = 8, BLOCK_OF_SLOTS = 64 };

static float *zeros_for(i64 count) { return take(count, sizeof(float)); }

static i64 padded(i64 count) { return (count + LANES - 1) / LANES * LANES; }

// In lanes without the bit `half` what a has there and `half` further on, added; in the others the same of b.
static inline __attribute__((always_inline)) vec added(vec a, vec b, const int half) {
    mask first = lane + (((lane & half) != 0) & (LANES - half)), second = first + half;
    return (vec)shuffle((bits)a, (bits)b, first) + (vec)shuffle((bits)a, (bits)b, second);
}

// The sum of each of TOGETHER vectors.
static inline __attribute__((always_inline)) void sums_of(const vec *x, float *y) {
    vec fours[4], twos[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) fours[i] = added(x[i], x[i + 4], LANES / 2);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) twos[i] = added(fours[i], fours[i + 2], LANES / 4);
    vec all = added(twos[0], twos[1], LANES / 8);
    if (LANES / TOGETHER > 1) all += swapped(all, 1);
#pragma GCC unroll 8
    for (int m = 0; m < TOGETHER; m++) y[m] = all[m * (LANES / TOGETHER)];
}

// Columns that are multiplied at once, and x as `dots` reads it.
#if defined(BFLOAT16) && defined(__AVX512BF16__)
enum { COLUMNS = 2 * LANES };
typedef real ready;

static void prepare(const float *x, i64 width, ready *y) {
    for (i64 c = 0; c < width; c += LANES) *(reals *)(y + c) = narrow(*(const vec *)(x + c));
}

static inline vec multiply_add(vec sum, const ready *x, bits w) {
    // Not the intrinsic, for which GCC 12 copies every sum at every step.
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(*(const bits *)x), "v"(w));
    return sum;
}
#elif defined(BFLOAT16)
// As 32-bit numbers neighbours in w are the two halves, and a shift and a mask make floats of them, where widening each for
// itself takes twice as much. So x has, in whole blocks of COLUMNS, first those at even places, then those at odd ones.
enum { COLUMNS = 2 * LANES };
typedef float ready;

static void prepare(const float *x, i64 width, ready *y) {
    const mask even = lane * 2 & (2 * LANES - 1), odd = even + 1;
    i64 c = 0;
    for (; c + COLUMNS <= width; c += COLUMNS) {
        bits low = *(const bits *)(x + c), high = *(const bits *)(x + c + LANES);
        *(bits *)(y + c) = shuffle(low, high, even), *(bits *)(y + c + LANES) = shuffle(low, high, odd);
    }
    memcpy(y + c, x + c, (width - c) * sizeof(float));
}

static inline vec multiply_add(vec sum, const ready *x, bits w) {
    return sum + *(const vec *)x * (vec)(w << 16) + *(const vec *)(x + LANES) * (vec)(w & 0xffff0000);
}
#else
enum { COLUMNS = LANES };
typedef float ready;

static inline vec multiply_add(vec sum, const ready *x, bits w) { return sum + *(const vec *)x * (vec)w; }
#endif

// `ready` numbers of which only some are left.
static inline vec rest(const ready *x) {
#if defined(BFLOAT16) && defined(__AVX512BF16__)
    return widen(*(const reals *)x);
#else
    return *(const vec *)x;
#endif
}

// y (few, TOGETHER) = x @ w^T, x: (few, width), w: (TOGETHER, width); rows of x and y have strides. Behind a row of x a
// vector may be read, of which finite numbers count nothing.
static inline __attribute__((always_inline)) void dots(const ready *x, i64 x_stride, const int few, const real *w,
                                                       i64 width, float *y, i64 y_stride) {
    vec sum[FEW][TOGETHER] = {0};
    i64 c = 0;
    for (; c + COLUMNS <= width; c += COLUMNS)
#pragma GCC unroll 8
        for (int m = 0; m < TOGETHER; m++) {
            bits column = *(const bits *)(w + m * width + c);
#pragma GCC unroll 2
            for (int n = 0; n < few; n++) sum[n][m] = multiply_add(sum[n][m], x + n * x_stride + c, column);
        }
    for (; c < width; c += LANES)
#pragma GCC unroll 8
        for (int m = 0; m < TOGETHER; m++)
#pragma GCC unroll 2
            for (int n = 0; n < few; n++) sum[n][m] += rest(x + n * x_stride + c) * get(w + m * width + c, width - c);
#pragma GCC unroll 2
    for (int n = 0; n < few; n++) sums_of(sum[n], y + n * y_stride);
}

static float dot(const float *x, const real *w, i64 width) {
    vec sum = {0};
    for (i64 c = 0; c < width; c += LANES) sum += *(const vec *)(x + c) * get(w + c, width - c);
    return sum_of(sum);
}

// What `product` multiplies: rows of x with a stride, and the same as `dots` reads them.
typedef struct {
    const float *x;
    const ready *ready;
    i64 stride, ready_stride, rows;
} left;

// Of `product`: TOGETHER outputs, or the `outputs` that are left.
static void some(const left *a, const real *w, i64 width, i64 outputs, float *y, i64 y_stride) {
    i64 n = 0, stride = a->ready_stride;
    if (outputs < TOGETHER)
        for (; n < a->rows; n++)
            for (i64 m = 0; m < outputs; m++) y[n * y_stride + m] = dot(a->x + n * a->stride, w + m * width, width);
    else {  // the weights are there once the block after the next one is asked for
        for (i64 c = 0; c < TOGETHER * width; c += 64 / sizeof(real)) __builtin_prefetch(w + 2 * TOGETHER * width + c);
        for (; n + FEW <= a->rows; n += FEW)
            dots(a->ready + n * stride, stride, FEW, w, width, y + n * y_stride, y_stride);
        for (; n < a->rows; n++) dots(a->ready + n * stride, stride, 1, w, width, y + n * y_stride, y_stride);
    }
}

static matrix numbers(const real *at) { return (matrix){.at = at}; }

// y = x @ w^T. x: (rows, width), y: (rows, outputs), each with a stride; w: number `which` of several (outputs, width).
static void product(const float *x, i64 x_stride, i64 rows, matrix w, i64 which, i64 width, i64 outputs, float *y,
                    i64 y_stride) {
    if (w.scale) {
        coded_product(x, x_stride, rows, w, which, width, outputs, y, y_stride);
        return;
    }
    const real *at = (const real *)w.at + which * outputs * width;
    mark before = here();
#ifdef BFLOAT16
    left a = {x, take(rows * width, sizeof(ready)), x_stride, width, rows};
    for (i64 n = 0; n < rows && outputs >= TOGETHER; n++)
        prepare(x + n * x_stride, width, (ready *)a.ready + n * width);
#else
    left a = {x, x, x_stride, x_stride, rows};
#endif
    if (outputs * width < WORTH_THREADS)  // a clause `if` costs as much as many of these products
        for (i64 o = 0; o < outputs; o += TOGETHER) some(&a, at + o * width, width, outputs - o, y + o, y_stride);
    else {
        PARALLEL
        for (i64 o = 0; o < outputs; o += TOGETHER) some(&a, at + o * width, width, outputs - o, y + o, y_stride);
    }
    give_back(before);
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

// x (width) becomes its softmax, and zeros up to a whole vector.
static void softmax(float *x, i64 width) {
    vec most = {0}, sum = {0};
    most += -INFINITY;
    for (i64 c = width; c < padded(width); c++) x[c] = -INFINITY;
    for (i64 c = 0; c < width; c += LANES) most = larger(*(vec *)(x + c), most);
    float top = max_of(most);
    for (i64 c = 0; c < width; c += LANES) {
        vec e = exponential(*(vec *)(x + c) - top);
        sum += e;
        *(vec *)(x + c) = e;
    }
    float scale = 1 / sum_of(sum);
    for (i64 c = 0; c < width; c += LANES) *(vec *)(x + c) *= scale;
}

// Heads that are mixed at once: their sums wait for themselves only.
enum { MIXED = 4 };

static inline __attribute__((always_inline)) void mix_some(const float *p, i64 p_stride, const int heads, i64 from, i64 to,
                                                           const real *past, i64 entry, i64 width, float *y, i64 y_stride) {
    for (i64 c = 0; c < width; c += LANES) {
        vec sum[MIXED];
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) sum[h] = *(vec *)(y + h * y_stride + c);
        for (i64 s = from; s < to; s++) {
            vec value = get(past + s * entry + c, width - c);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) sum[h] += p[h * p_stride + s] * value;
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) *(vec *)(y + h * y_stride + c) = sum[h];
    }
}

// y (heads, y_stride) += p (heads, p_stride) @ the first `width` columns of past (slots, entry).
static void mix(const float *p, i64 p_stride, i64 heads, i64 slots, const real *past, i64 entry, i64 width, float *y,
                i64 y_stride) {
    for (i64 from = 0; from < slots; from += BLOCK_OF_SLOTS) {
        i64 to = from + BLOCK_OF_SLOTS < slots ? from + BLOCK_OF_SLOTS : slots, h = 0;
        for (; h + MIXED <= heads; h += MIXED)
            mix_some(p + h * p_stride, p_stride, MIXED, from, to, past, entry, width, y + h * y_stride, y_stride);
        for (; h < heads; h++)
            mix_some(p + h * p_stride, p_stride, 1, from, to, past, entry, width, y + h * y_stride, y_stride);
    }
}

// Slots of a cache that are computed: `length` from first[b] on in row b.
typedef struct {
    const float *angles;
    const i64 *first;
    i64 batch, length, slots;
} window;

// x + MLA(norm(x)), absorbed. One slot of one row asks: its head's values (heads, value), from asked (heads, nope + rope).
static void look(const layer *l, const float *asked, const float *angles, const real *past, i64 end, float *values) {
    i64 entry = l->rank + l->rope, mixed_width = padded(l->rank), ends = padded(end);
    mark before = here();
    float *query = zeros_for(l->heads * entry), *scores = zeros_for(l->heads * ends);
    float *mixed = zeros_for(l->heads * mixed_width);
    for (i64 h = 0; h < l->heads; h++, asked += l->nope + l->rope) {
        float *to = query + h * entry;
        if (l->w_uk) product(asked, 0, 1, numbers(l->w_uk), h, l->nope, l->rank, to, 0);
        else memcpy(to, asked, l->rank * sizeof(float));
        rotate(asked + l->nope, angles, l->rope, to + l->rank);
    }
    product(query, entry, l->heads, numbers(past), 0, entry, end, scores, ends);
    for (i64 h = 0; h < l->heads; h++) softmax(scores + h * ends, end);
    mix(scores, ends, l->heads, end, past, entry, l->rank, mixed, mixed_width);
    for (i64 h = 0; h < l->heads; h++)
        product(mixed + h * mixed_width, 0, 1, numbers(l->w_uv), h, l->rank, l->value, values + h * l->value, 0);
    give_back(before);
}

// x (rows, hidden) of all slots of the window; the cache gets their entries, and y the `count` rows that are asked for,
// whose numbers ascend.
static void attention(const layer *l, const real *x, real *cache, real *y, const window *at, const i64 *asked_for,
                      i64 count) {
    i64 rows = at->batch * at->length, entry = l->rank + l->rope, low_width = l->q_rank + entry;
    i64 wide = l->heads * (l->nope + l->rope), hidden = l->hidden, all_values = l->heads * l->value;
    mark before = here();
    float *in = zeros_for(rows * hidden), *h = zeros_for(rows * hidden), *low = zeros_for(rows * low_width);
    float *asked = zeros_for(count * wide), *values = zeros_for(count * all_values), *added = zeros_for(count * hidden);
    widen_row(x, rows * hidden, in);
    for (i64 n = 0; n < rows; n++) direction(in + n * hidden, hidden, l->floor, h + n * hidden);
    product(h, hidden, rows, l->down, 0, hidden, low_width, low, low_width);
    for (i64 n = 0; n < rows; n++) {  // the new entries of the cache
        float *latent = low + n * low_width + l->q_rank, *key = latent + l->rank;
        i64 row = n / at->length, slot = at->first[row] + n % at->length;
        direction(latent, l->rank, l->kv_floor, latent);
        rotate(key, at->angles + slot * l->rope, l->rope, key);
        narrow_row(latent, entry, cache + (row * at->slots + slot) * entry);
    }
    for (i64 i = 0; i < count; i++) {  // the others end here
        i64 n = asked_for[i];
        if (l->q_rank) direction(low + n * low_width, l->q_rank, l->q_floor, low + i * low_width);
        if (n == i) continue;
        memcpy(in + i * hidden, in + n * hidden, hidden * sizeof(float));
        memcpy(h + i * hidden, h + n * hidden, hidden * sizeof(float));
    }
    if (l->q_rank) product(low, low_width, count, l->up, 0, l->q_rank, wide, asked, wide);
    else product(h, hidden, count, l->up, 0, hidden, wide, asked, wide);
    for (i64 i = 0; i < count; i++) {
        i64 row = asked_for[i] / at->length, slot = at->first[row] + asked_for[i] % at->length;
        look(l, asked + i * wide, at->angles + slot * l->rope, cache + row * at->slots * entry, slot + 1,
             values + i * all_values);
    }
    product(values, all_values, count, l->out, 0, all_values, hidden, added, hidden);
    for (i64 c = 0; c < count * hidden; c++) in[c] += added[c];
    narrow_row(in, count * hidden, y);
    give_back(before);
}

// where[i]: which are the `count` largest of x. They become -inf.
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
static void route(const layer *l, const float *h, float *gates) {
    i64 experts = l->experts, size = experts / l->groups;
    mark before = here();
    i64 *where = take(experts + l->groups, sizeof(i64));
    float *score = zeros_for(experts), *biased = zeros_for(experts), *best = zeros_for(l->groups), sum = 0;
    product(h, 0, 1, numbers(l->router), 0, l->hidden, experts, score, 0);
    for (i64 e = 0; e < experts; e++) score[e] = 1 / (1 + expf(-score[e]));
    for (i64 e = 0; e < experts; e++) biased[e] = score[e] + l->bias[e];
    if (l->groups > 1) {
        for (i64 g = 0; g < l->groups; g++) {
            float one = -INFINITY, two = -INFINITY;
            for (i64 e = g * size; e < (g + 1) * size; e++)
                if (biased[e] > one) two = one, one = biased[e];
                else if (biased[e] > two) two = biased[e];
            best[g] = one + two;
        }
        take_largest(best, l->groups, l->topk_group, where);
        for (i64 g = 0; g < l->groups; g++) {
            int kept = 0;
            for (i64 k = 0; k < l->topk_group; k++) kept |= where[k] == g;
            for (i64 e = g * size; e < (g + 1) * size && !kept; e++) biased[e] = -INFINITY;
        }
    }
    take_largest(biased, experts, l->top_k, where);
    for (i64 k = 0; k < l->top_k; k++) sum += score[where[k]];
    for (i64 k = 0; k < l->top_k; k++)
        gates[where[k]] = score[where[k]] / (l->normalise ? sum + 1e-20f : 1) * l->scaling;
    give_back(before);
}

// The weights of a SwiGLU: numbers gate, up and down of several.
typedef struct {
    matrix gate_of, up_of, down_of;
    i64 gate, up, down;
} swiglu;

// out (rows, hidden) = down (silu(gate h) * up h). a, b: room for (rows, width).
static void feed_forward(const float *h, i64 rows, i64 hidden, swiglu w, i64 width, float *a, float *b, float *out) {
    product(h, hidden, rows, w.gate_of, w.gate, hidden, width, a, width);
    product(h, hidden, rows, w.up_of, w.up, hidden, width, b, width);
    for (i64 c = 0; c < rows * width; c += LANES) {
        vec x = *(vec *)(a + c);
        *(vec *)(a + c) = x / (1.0f + exponential(-x)) * *(vec *)(b + c);
    }
    product(a, width, rows, w.down_of, w.down, width, hidden, out, hidden);
}

// x becomes x + common(norm(x)) + the sum over the chosen experts of gate * expert(norm(x)).
static void mlp(const layer *l, real *x, i64 rows) {
    i64 hidden = l->hidden, width = l->width, widest = width > l->common_width ? width : l->common_width;
    mark before = here();
    float *sum = zeros_for(rows * hidden), *h = zeros_for(rows * hidden), *picked = zeros_for(rows * hidden);
    float *a = zeros_for(rows * widest), *b = zeros_for(rows * widest), *out = zeros_for(rows * hidden);
    float *gates = zeros_for(rows * l->experts);
    widen_row(x, rows * hidden, sum);
    for (i64 n = 0; n < rows; n++) {
        float *row = h + n * hidden;
        direction(sum + n * hidden, hidden, l->mlp_floor, row);
        for (i64 c = 0; c < hidden; c++) row[c] *= l->gain[c];
        // the router reads the numbers that it reads in training; behind the row nothing is yet
        for (i64 c = 0; c < hidden; c += LANES) *(vec *)(row + c) = widen(narrow(*(vec *)(row + c)));
        if (l->experts) route(l, row, gates + n * l->experts);
    }
    if (l->common_width) {
        swiglu common = {l->common_gate, l->common_up, l->common_down, 0, 0, 0};
        feed_forward(h, rows, hidden, common, l->common_width, a, b, out);
        for (i64 c = 0; c < rows * hidden; c++) sum[c] += out[c];
    }
    for (i64 e = 0; e < l->experts; e++) {
        swiglu own = {l->gate_up, l->gate_up, l->expert_down, 2 * e, 2 * e + 1, e};
        i64 count = 0, next = 0;
        for (i64 n = 0; n < rows; n++)
            if (gates[n * l->experts + e] != 0)
                memcpy(picked + count++ * hidden, h + n * hidden, hidden * sizeof(float));
        if (!count) continue;
        feed_forward(picked, count, hidden, own, width, a, b, out);
        for (i64 n = 0; n < rows; n++) {
            float factor = gates[n * l->experts + e], *from = out + next * hidden;
            if (factor == 0) continue;
            for (i64 c = 0; c < hidden; c++) sum[n * hidden + c] += factor * from[c];
            next++;
        }
    }
    narrow_row(sum, rows * hidden, x);
    give_back(before);
}

// y (rows, outputs) = x @ w^T.
static void linear(const float *x, i64 rows, matrix w, i64 width, i64 outputs, real *y) {
    mark before = here();
    float *out = zeros_for(rows * outputs);
    product(x, width, rows, w, 0, width, outputs, out, outputs);
    narrow_row(out, rows * outputs, y);
    give_back(before);
}

// y (rows, hidden): what the first layer reads. Of tokens the embedding, of `given` states (rows, hidden) themselves; both,
// or one of them, side by side, each normed, times `merge`.
static void begin(const stack *s, const i64 *tokens, const real *given, i64 rows, real *y) {
    i64 hidden = s->layers->hidden, width = s->parts * hidden;
    if (!s->merge.at) {
        for (i64 n = 0; n < rows; n++)
            memcpy(y + n * hidden, tokens ? s->table + tokens[n] * hidden : given + n * hidden, hidden * sizeof(real));
        return;
    }
    mark before = here();
    float *in = zeros_for(rows * width);
    for (i64 n = 0; n < rows; n++) {
        float *part = in + n * width;
        if (tokens) widen_row(s->table + tokens[n] * hidden, hidden, part), part += hidden;
        widen_row(given + n * hidden, hidden, part);
    }
    for (i64 n = 0; n < rows * s->parts; n++)
        direction(in + n * hidden, hidden, s->floors[n % s->parts], in + n * hidden);
    linear(in, rows, s->merge, width, hidden, y);
    give_back(before);
}

i64 decode_layers(const stack *s, const i64 *ids, i64 ids_stride, const real *given, real *states, real *out,
                  real *const *caches, const float *angles, const i64 *first, i64 batch, i64 length, i64 slots,
                  const i64 *asked_for, i64 asked_count) {
    window at = {angles, first, batch, length, slots};
    i64 rows = batch * length, hidden = s->layers->hidden, outside = 0;
    mark before = here();
    i64 *every = take(2 * rows, sizeof(i64)), *tokens = ids ? every + rows : NULL;
    for (i64 n = 0; n < rows; n++) {
        every[n] = n;
        if (!ids) continue;
        tokens[n] = ids[n / length * ids_stride + n % length];
        outside += tokens[n] < 0 || tokens[n] >= s->vocab;
    }
    if (outside) {
        give_back(before);
        return outside;
    }
    begin(s, tokens, given, rows, states);
    for (i64 k = 0; k < s->count; k++, states += rows * hidden) {
        int last = k == s->count - 1;
        real *y = last ? out : states + rows * hidden;
        i64 left = last ? asked_count : rows;
        attention(s->layers + k, states, caches[k], y, &at, last ? asked_for : every, left);
        mlp(s->layers + k, y, left);
    }
    float *row = zeros_for(hidden);
    for (i64 n = 0; n < asked_count; n++) {
        widen_row(out + n * hidden, hidden, row);
        direction(row, hidden, s->norm_floor, row);
        for (i64 c = 0; c < hidden; c++) row[c] *= s->gain[c];
        narrow_row(row, hidden, out + (asked_count + n) * hidden);
    }
    give_back(before);
    return 0;
}

void decode_linear(const real *x, const matrix *w, real *y, i64 rows, i64 width, i64 outputs) {
    mark before = here();
    float *in = zeros_for(rows * width);
    widen_row(x, rows * width, in);
    linear(in, rows, *w, width, outputs, y);
    give_back(before);
}

i64 decode_largest(const real *x, i64 *y, i64 rows, i64 width) {
    i64 wrong = 0;
    for (i64 n = 0; n < rows; n++, x += width) {
        vec most = {0}, zeros = {0};
        most += -INFINITY;
        for (i64 c = 0; c < width; c += LANES) {
            vec some = get_or(x + c, width - c, -INFINITY);
            most = larger(some, most);
            zeros += choose(some == some, (vec){0}, some);  // nan from the first nan on
        }
        float best = max_of(most);
        y[n] = -1;
        if (sum_of(zeros) == 0 && fabsf(best) < INFINITY)
            while (load(x[++y[n]]) != best) {}
        else wrong++;
    }
    return wrong;
}
