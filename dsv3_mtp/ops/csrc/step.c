// One step of decoding in one call: drafts of a module, one forward of the trunk on the last known token and the drafts,
// which of them stand, and the token behind them. Between two calls of C the weights have driven everything else from the
// caches, and what Python does then takes several times as long as in a loop of its own.
#include "decode.h"

enum { BLOCK = 64 };  // probabilities that are added up at a time

// c_step.py says what these are.
typedef struct {
    const stack *trunk, *module;        // no module: nothing is drafted
    matrix output, draft_output;        // (vocab, hidden), (among, hidden)
    const i64 *draft_ids;               // the tokens of draft_output; NULL: all
    i64 vocab, among, normed;
} model;

typedef struct {
    i64 *ids, *last, *filled;
    real *ring, *const *caches, *const *module_caches;
    const float *angles;
    i64 batch, ids_stride, ring_width, slots;
} batch;

// p (width) = softmax(logits / temperature). Behind it there is room for a vector.
static void probabilities(const real *logits, i64 width, float temperature, float *p) {
    vec most = {0}, sum = {0};
    most += -INFINITY;
    for (i64 c = 0; c < width; c += LANES) {
        vec x = get_or(logits + c, width - c, -INFINITY) / temperature;
        most = larger(x, most);
        *(vec *)(p + c) = x;
    }
    float top = max_of(most);
    for (i64 c = 0; c < width; c += LANES) {
        vec e = exponential(*(vec *)(p + c) - top);
        sum += e;
        *(vec *)(p + c) = e;
    }
    float scale = 1 / sum_of(sum);
    for (i64 c = 0; c < width; c++) p[c] *= scale;
}

static double block_sum(const float *p, i64 width) {
    vec sum = {0};
    for (i64 c = 0; c < BLOCK && c + LANES <= width; c += LANES) sum += *(const vec *)(p + c);
    double all = sum_of(sum);
    for (i64 c = width / LANES * LANES; c < width && width < BLOCK; c++) all += p[c];
    return all;
}

// The number that a coin in [0, 1) falls on, of p that need not add up to 1; -1: nothing in p is positive, or it is nan.
static i64 pick(const float *p, i64 width, double coin) {
    double total = 0;
    for (i64 c = 0; c < width; c += BLOCK) total += block_sum(p + c, width - c);
    if (!(total > 0 && total < INFINITY)) return -1;
    i64 from = 0, found = -1;
    for (double left = coin * total; from < width && found < 0; from += BLOCK) {
        double here = block_sum(p + from, width - from);
        if (left >= here && from + BLOCK < width) {
            left -= here;
            continue;
        }
        for (i64 c = from; c < width; c++) {  // by a rounding, it may be one behind the block
            if (p[c] > 0) found = c;
            if (left < p[c]) break;
            left -= p[c];
        }
    }
    for (i64 c = width - 1; found < 0; c--)
        if (p[c] > 0) found = c;
    return found;
}

// A token of logits (width,): the largest at temperature 0, else drawn from p, which is filled; -1 where none can be.
static i64 draw(const real *logits, i64 width, float temperature, double coin, float *p) {
    if (temperature == 0) {
        i64 best;
        decode_largest(logits, &best, 1, width);
        return best;
    }
    probabilities(logits, width, temperature, p);
    return pick(p, width, coin);
}

// Draft number k of every row, in `drawn` (its number among the drafts' tokens) and in ids. state: (2, batch, hidden), of
// the draft before, then of this one. q: (batch, .), which `q_stride` apart, its probabilities.
static i64 draft(const model *m, batch *rows, i64 k, float temperature, const double *coins, i64 coins_stride,
                 real *state, float *q, i64 q_stride, i64 *drawn, i64 drawn_stride) {
    i64 hidden = m->trunk->layers->hidden, length = 1, wrong, count = rows->batch;
    for (i64 b = 0; b < count && !k; b++)  // the slots whose tokens became known
        length = rows->last[b] - rows->filled[b] > length ? rows->last[b] - rows->filled[b] : length;
    mark before = here();
    i64 *first = take(count * (length + 2), sizeof(i64)), *asked = first + count, *tokens = asked + count;
    real *given = take(count * length * hidden, sizeof(real)), *logits = take(count * m->among, sizeof(real));
    real *states = take(count * length * hidden, sizeof(real)), *chained = state + m->normed * count * hidden;
    for (i64 b = 0; b < count; b++) {
        first[b] = k ? rows->last[b] - 1 + k : rows->filled[b];
        asked[b] = b * length + (k ? 0 : rows->last[b] - rows->filled[b] - 1);
        for (i64 t = 0; t < length; t++) {
            tokens[b * length + t] = rows->ids[b * rows->ids_stride + first[b] + 1 + t];
            const real *from = k ? chained + b * hidden
                                 : rows->ring + (b * rows->ring_width + (first[b] + t) % rows->ring_width) * hidden;
            memcpy(given + (b * length + t) * hidden, from, hidden * sizeof(real));
        }
    }
    wrong = decode_layers(m->module, m->module->table ? tokens : NULL, length, given, states, state, rows->module_caches,
                          rows->angles, first, count, length, rows->slots, asked, count);
    if (!wrong) decode_linear(state + count * hidden, &m->draft_output, logits, count, hidden, m->among);
    for (i64 b = 0; b < count && !wrong; b++) {
        i64 at = draw(logits + b * m->among, m->among, temperature, coins ? coins[b * coins_stride] : 0, q + b * q_stride);
        wrong = at < 0 ? -1 : 0, drawn[b * drawn_stride] = at;
        if (wrong) break;
        rows->ids[b * rows->ids_stride + rows->last[b] + 1 + k] = m->draft_ids ? m->draft_ids[at] : at;
        if (!k) rows->filled[b] = rows->last[b] > rows->filled[b] ? rows->last[b] : rows->filled[b];
    }
    give_back(before);
    return wrong;
}

// The trunk on the last known token and the drafts. logits: (batch, length, vocab).
static i64 forward(const model *m, batch *rows, i64 length, real *logits) {
    i64 hidden = m->trunk->layers->hidden, count = rows->batch * length;
    mark before = here();
    i64 *tokens = take(2 * count, sizeof(i64)), *asked = tokens + count;
    real *states = take(m->trunk->count * count * hidden, sizeof(real));
    real *out = take(2 * count * hidden, sizeof(real)), *normed = out + count * hidden;
    for (i64 n = 0; n < count; n++)
        tokens[n] = rows->ids[n / length * rows->ids_stride + rows->last[n / length] + n % length], asked[n] = n;
    i64 wrong = decode_layers(m->trunk, tokens, length, NULL, states, out, rows->caches, rows->angles, rows->last,
                              rows->batch, length, rows->slots, asked, count);
    for (i64 n = 0; n < count && m->module && !wrong; n++) {
        i64 row = n / length, slot = rows->last[row] + n % length;
        memcpy(rows->ring + (row * rows->ring_width + slot % rows->ring_width) * hidden,
               (m->normed ? normed : out) + n * hidden, hidden * sizeof(real));
    }
    if (!wrong) decode_linear(normed, &m->output, logits, count, hidden, m->vocab);
    give_back(before);
    return wrong;
}

// One row: how many of its `count` drafts stand, and the token behind them in *next. Greedy: the longest prefix that the
// main model says. Sampling: a draft stands with probability min(1, p / q), the first that falls is replaced by a draw from
// (p - q)+. logits: (count + 1, vocab); q: of each draft; drawn: its number there; p: room.
static i64 verify(const model *m, const real *logits, i64 count, float temperature, const double *coins, const float *q,
                  i64 q_stride, const i64 *drawn, float *p, i64 *next) {
    for (i64 k = 0;; k++, logits += m->vocab, q += q_stride) {
        i64 token = k == count ? -1 : m->draft_ids ? m->draft_ids[drawn[k]] : drawn[k];
        if (temperature == 0) {
            decode_largest(logits, next, 1, m->vocab);
            if (k == count || *next != token) return k;
            continue;
        }
        probabilities(logits, m->vocab, temperature, p);
        if (k < count) {
            if (coins[k] * q[drawn[k]] < p[token]) continue;
            for (i64 c = 0; c < m->among; c++) {
                float *of = p + (m->draft_ids ? m->draft_ids[c] : c);
                *of = *of > q[c] ? *of - q[c] : 0;
            }
        }
        *next = pick(p, m->vocab, coins[count]);
        if (*next < 0 && k < count) {  // p and q differ by rounding only
            probabilities(logits, m->vocab, temperature, p);
            *next = pick(p, m->vocab, coins[count]);
        }
        return k;
    }
}

// Whether all slots that a step reads and writes exist, and every row has a slot to draft at.
static int fits(const batch *rows, i64 count) {
    i64 most = rows->slots < rows->ids_stride - 1 ? rows->slots : rows->ids_stride - 1, lag = 0, last_begin = 0;
    for (i64 b = 0; b < rows->batch; b++) {
        i64 m = rows->last[b], begin = rows->filled[b];
        if (m < 0 || m + count + 1 > most) return 0;
        if (count && (begin < 0 || begin >= m)) return 0;
        lag = m - begin > lag ? m - begin : lag, last_begin = begin > last_begin ? begin : last_begin;
    }
    return !count || (lag <= rows->ring_width && last_begin + lag + 1 <= most);
}

// coins: (batch, 2 count + 1) in [0, 1), of each row to draw the drafts, to test them, and for the token behind them; NULL
// where temperature is 0. tokens: (batch, count + 1), of each row accepted[b] drafts and one more, which are in ids behind
// last[b] as well. Returns 0; -1 where logits are not finite; -2 where slots would not exist; else how many tokens are
// outside the vocabulary.
i64 decode_step(const model *m, batch *rows, i64 count, float temperature, const double *coins, i64 *accepted,
                i64 *tokens) {
    if (!fits(rows, count)) return -2;
    i64 q_stride = m->among + LANES, each = 2 * count + 1, wrong = 0, length = count + 1;
    mark before = here();
    float *q = take(temperature == 0 ? 0 : rows->batch * count * q_stride, sizeof(float));
    float *p = take(m->vocab, sizeof(float));
    i64 *drawn = take(rows->batch * count + 1, sizeof(i64));
    real *state = take(2 * rows->batch * m->trunk->layers->hidden, sizeof(real));
    real *logits = take(rows->batch * length * m->vocab, sizeof(real));
    for (i64 k = 0; k < count && !wrong; k++)
        wrong = draft(m, rows, k, temperature, coins ? coins + k : NULL, each, state, temperature == 0 ? q : q + k * q_stride,
                      temperature == 0 ? 0 : count * q_stride, drawn + k, count);
    if (!wrong) wrong = forward(m, rows, length, logits);
    for (i64 b = 0; b < rows->batch && !wrong; b++) {
        i64 next = -1, *known = rows->ids + b * rows->ids_stride + rows->last[b] + 1;
        accepted[b] = verify(m, logits + b * length * m->vocab, count, temperature,
                             coins ? coins + b * each + count : NULL, temperature == 0 ? q : q + b * count * q_stride,
                             temperature == 0 ? 0 : q_stride, drawn + b * count, p, &next);
        if (next < 0) wrong = -1;
        known[accepted[b]] = next;
        memcpy(tokens + b * length, known, (accepted[b] + 1) * sizeof(i64));
    }
    give_back(before);
    return wrong;
}
