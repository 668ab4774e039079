// The routed experts of one layer, forward and backward: a block of an expert's rows is gathered and goes through all
// of its products while it is in the cache. kernels.py documents the shapes.
#include "products.h"

typedef struct {
    const real *x, *gate_up, *down;  // (tokens, width), (experts, 2 * hidden, width), (experts, width, hidden)
    const i64 *source, *first;       // token of each row, first row of each expert and one after the last
    const float *gates;              // of each row
    i64 width, hidden;
} Experts;

// Rows at .. at + rows of x[source], and zeros up to BLOCK.
static void gather(const real *x, const i64 *source, i64 rows, i64 width, real *out) {
    for (i64 r = 0; r < rows; r++) memcpy(out + r * width, x + source[r] * width, width * sizeof(real));
    memset(out + rows * width, 0, (BLOCK - rows) * width * sizeof(real));
}

// Where sums that belong at y grow: there if they are floats, else in `scratch`.
static float *place(real *y, float *scratch) {
#ifdef BFLOAT16
    (void)y;
    return scratch;
#else
    (void)scratch;
    return y;
#endif
}

static void put(const float *x, real *y, i64 count) {
    if ((const void *)x == y) return;
    for (i64 c = 0; c < count; c += LANES) set(y + c, *(const vec *)(x + c), LANES);
}

// inner: (rows, 2 * hidden) before silu, for the backward; out: (rows, width).
void experts(const real *x, const real *gate_up, const real *down_proj, const i64 *source, const i64 *first,
             const float *gates, real *inner, real *out, i64 number, i64 width, i64 hidden) {
#pragma omp parallel
    {
        unit *up_at = room(panel_size(width, 2 * hidden) + panel_size(hidden, width), sizeof(unit));
        unit *down_at = up_at + panel_size(width, 2 * hidden);
        real *block = room(BLOCK * (width + hidden), sizeof(real)), *middle = block + BLOCK * width;
#pragma omp for schedule(dynamic)
        for (i64 e = 0; e < number; e++) {
            if (first[e] == first[e + 1]) continue;
            Right to_inner = across(gate_up + e * 2 * hidden * width, 2 * hidden, width, up_at);
            Right to_out = across(down_proj + e * width * hidden, width, hidden, down_at);
            for (i64 at = first[e]; at < first[e + 1]; at += BLOCK) {
                i64 rows = first[e + 1] - at < BLOCK ? first[e + 1] - at : BLOCK;
                gather(x, source + at, rows, width, block);
                Out to = rows_at(inner + at * 2 * hidden, 2 * hidden, rows);
                multiply(block, rows, width, to_inner, to, 2 * hidden);
                for (i64 r = 0; r < rows; r++) {
                    const real *a = inner + (at + r) * 2 * hidden;
                    swiglu_row(a, a + hidden, gates[at + r], middle + r * hidden, hidden);
                }
                multiply(middle, rows, hidden, to_out, rows_at(out + at * width, width, rows), width);
            }
        }
        free(up_at), free(block);
    }
}

// grad: (tokens, width). grad_rows: (rows, width), of each row's x. Weights that need no gradient have NULL for theirs.
void experts_backward(const real *x, const real *gate_up, const real *down_proj, const i64 *source, const i64 *first,
                      const float *gates, const real *inner, const real *grad, real *grad_rows, float *grad_gates,
                      real *grad_gate_up, real *grad_down, i64 number, i64 width, i64 hidden) {
    i64 up_size = 2 * hidden * width, down_size = width * hidden;
#pragma omp parallel
    {
        i64 panels = panel_size(width, hidden) + panel_size(2 * hidden, width);
        unit *down_at = room(panels + BLOCK * (2 * width + 4 * hidden + 256), sizeof(unit));
        unit *up_at = down_at + panel_size(width, hidden), *pairs = down_at + panels;
        unit *right = pairs + BLOCK * (width + 2 * hidden);
        real *g = room(BLOCK * (2 * width + 4 * hidden), sizeof(real)), *rows_x = g + BLOCK * width;
        real *middle = rows_x + BLOCK * width, *grad_inner = middle + BLOCK * hidden;
        float *wide = room(BLOCK * hidden + up_size + down_size, sizeof(float));
        float *up_scratch = wide + BLOCK * hidden, *down_scratch = up_scratch + up_size;
#pragma omp for schedule(dynamic)
        for (i64 e = 0; e < number; e++) {
            Right to_middle = down(down_proj + e * down_size, width, hidden, down_at);
            Right to_x = down(gate_up + e * up_size, 2 * hidden, width, up_at);
            real *up_end = grad_gate_up + e * up_size, *down_end = grad_down + e * down_size;
            float *up_sums = place(up_end, up_scratch), *down_sums = place(down_end, down_scratch);
            int add = 0;
            for (i64 at = first[e]; at < first[e + 1]; at += BLOCK, add = 1) {
                i64 rows = first[e + 1] - at < BLOCK ? first[e + 1] - at : BLOCK;
                gather(grad, source + at, rows, width, g);
                multiply(g, rows, width, to_middle, sums_at(wide, hidden, 0), hidden);
                memset(middle + rows * hidden, 0, (BLOCK - rows) * hidden * sizeof(real));
                memset(grad_inner + rows * 2 * hidden, 0, (BLOCK - rows) * 2 * hidden * sizeof(real));
                for (i64 r = 0; r < rows; r++) {
                    const real *a = inner + (at + r) * 2 * hidden;
                    real *grad_a = grad_inner + r * 2 * hidden;
                    grad_gates[at + r] = swiglu_row_backward(a, a + hidden, gates[at + r], wide + r * hidden, grad_a,
                                                             grad_a + hidden, middle + r * hidden, hidden);
                }
                if (grad_down)
                    multiply_across(paired(g, BLOCK, width, width, pairs), rows, width,
                                    down(middle, BLOCK, hidden, right), down_sums, hidden, add);
                if (grad_gate_up) {
                    gather(x, source + at, rows, width, rows_x);
                    multiply_across(paired(grad_inner, BLOCK, 2 * hidden, 2 * hidden, pairs), rows, 2 * hidden,
                                    down(rows_x, BLOCK, width, right), up_sums, width, add);
                }
                multiply(grad_inner, rows, 2 * hidden, to_x, rows_at(grad_rows + at * width, width, rows), width);
            }
            if (grad_gate_up && !add) memset(up_sums, 0, up_size * sizeof(float));
            if (grad_down && !add) memset(down_sums, 0, down_size * sizeof(float));
            if (grad_gate_up) put(up_sums, up_end, up_size);
            if (grad_down) put(down_sums, down_end, down_size);
        }
        free(down_at), free(g), free(wide);
    }
}
