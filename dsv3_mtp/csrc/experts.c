// The routed experts of one layer, forward and backward: a block of an expert's rows is gathered and goes through all
// of its products while it is in the cache. kernels.py documents the shapes.
#include "products.h"

typedef struct {
    const real *x, *gate_up, *down;  // (tokens, width), (experts, 2 * hidden, width), (experts, width, hidden)
    const i64 *source, *first;       // token of each row, first row of each expert and one after the last
    const float *gates;              // of each row
    i64 width, hidden;
} Experts;

// x as a right side, x: (rows, columns) -> panels of (rows / PER, columns).
static NOINLINE Right down(const real *x, i64 rows, i64 columns, unit *out) {
    i64 depth = rows / PER, step = panel_of(columns) * LANES;
    for (i64 n = 0; n < columns; n += step)
        packed(x + n, rows, columns, columns - n < step ? columns - n : step, step, out + n * depth);
    return (Right){out, step, step * depth, step / LANES};
}

// Rows at .. at + rows of x[source], and zeros up to BLOCK.
static void gather(const real *x, const i64 *source, i64 rows, i64 width, real *out) {
    for (i64 r = 0; r < rows; r++) memcpy(out + r * width, x + source[r] * width, width * sizeof(real));
    memset(out + rows * width, 0, (BLOCK - rows) * width * sizeof(real));
}

// x @ b for a block of rows: `width` numbers each -> `columns`.
static void multiply(const real *x, i64 rows, i64 width, Right b, float *out, i64 columns) {
    for (i64 m = 0; m < rows; m += TILE)
        product(rows_of(x, width, m), b, width / PER, out + m * columns, columns, columns, 0);
}

// sums (columns of x, columns of b) becomes x^T @ b over a block of rows or, with `add`, grows by it.
static void multiply_across(const unit *x, i64 rows, i64 width, Right b, float *sums, i64 columns, int add) {
    for (i64 m = 0; m < width; m += TILE)
        product((Left){x + m, 1, width}, b, up(rows, PER) / PER, sums + m * columns, columns, columns, add);
}

// Where a product may put `rows` rows that belong at y: there if they are floats and whole tiles, else in `scratch`.
static float *place(real *y, i64 rows, float *scratch) {
#ifdef BFLOAT16
    (void)y, (void)rows;
    return scratch;
#else
    return rows % TILE ? scratch : y;
#endif
}

// `count` numbers, whole vectors.
static void put(const float *x, real *y, i64 count) {
    if ((const void *)x == y) return;
    for (i64 c = 0; c < count; c += LANES) set(y + c, *(const vec *)(x + c), LANES);
}

// inner: (rows, 2 * hidden) before silu, for the backward; out: (rows, width).
void experts(const real *x, const real *gate_up, const real *down_proj, const i64 *source, const i64 *first,
             const float *gates, real *inner, real *out, i64 number, i64 width, i64 hidden) {
#pragma omp parallel
    {
        unit *up_at = room((panel_size(width, 2 * hidden) + panel_size(hidden, width)), sizeof(unit));
        unit *down_at = up_at + panel_size(width, 2 * hidden);
        real *block = room(BLOCK * (width + hidden), sizeof(real)), *middle = block + BLOCK * width;
        float *wide = room(BLOCK * (width + 2 * hidden), sizeof(float));
#pragma omp for schedule(dynamic)
        for (i64 e = 0; e < number; e++) {
            if (first[e] == first[e + 1]) continue;
            Right to_inner = across(gate_up + e * 2 * hidden * width, 2 * hidden, width, up_at);
            Right to_out = across(down_proj + e * width * hidden, width, hidden, down_at);
            for (i64 at = first[e]; at < first[e + 1]; at += BLOCK) {
                i64 rows = first[e + 1] - at < BLOCK ? first[e + 1] - at : BLOCK;
                gather(x, source + at, rows, width, block);
                float *y = place(inner + at * 2 * hidden, rows, wide);
                multiply(block, rows, width, to_inner, y, 2 * hidden);
                put(y, inner + at * 2 * hidden, rows * 2 * hidden);
                for (i64 r = 0; r < rows; r++) {
                    const real *a = inner + (at + r) * 2 * hidden;
                    swiglu_row(a, a + hidden, gates[at + r], middle + r * hidden, hidden);
                }
                y = place(out + at * width, rows, wide);
                multiply(middle, rows, hidden, to_out, y, width);
                put(y, out + at * width, rows * width);
            }
        }
        free(up_at), free(block), free(wide);
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
        unit *down_at = room((panels + BLOCK * (2 * width + 4 * hidden + 256)), sizeof(unit));
        unit *up_at = down_at + panel_size(width, hidden), *pairs = down_at + panels;
        unit *right = pairs + BLOCK * (width + 2 * hidden);
        real *g = room(BLOCK * (2 * width + 4 * hidden), sizeof(real)), *rows_x = g + BLOCK * width;
        real *middle = rows_x + BLOCK * width, *grad_inner = middle + BLOCK * hidden;
        float *wide = room((BLOCK * (width + hidden) + up_size + down_size), sizeof(float));
        float *up_scratch = wide + BLOCK * (width + hidden), *down_scratch = up_scratch + up_size;
#pragma omp for schedule(dynamic)
        for (i64 e = 0; e < number; e++) {
            Right to_middle = down(down_proj + e * down_size, width, hidden, down_at);
            Right to_x = down(gate_up + e * up_size, 2 * hidden, width, up_at);
            real *up_end = grad_gate_up + e * up_size, *down_end = grad_down + e * down_size;
            float *up_sums = place(up_end, 0, up_scratch), *down_sums = place(down_end, 0, down_scratch);
            int add = 0;
            for (i64 at = first[e]; at < first[e + 1]; at += BLOCK, add = 1) {
                i64 rows = first[e + 1] - at < BLOCK ? first[e + 1] - at : BLOCK;
                gather(grad, source + at, rows, width, g);
                multiply(g, rows, width, to_middle, wide, hidden);
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
                float *y = place(grad_rows + at * width, rows, wide);
                multiply(grad_inner, rows, 2 * hidden, to_x, y, width);
                put(y, grad_rows + at * width, rows * width);
            }
            if (grad_gate_up && !add) memset(up_sums, 0, up_size * sizeof(float));
            if (grad_down && !add) memset(down_sums, 0, down_size * sizeof(float));
            if (grad_gate_up) put(up_sums, up_end, up_size);
            if (grad_down) put(down_sums, down_end, down_size);
        }
        free(down_at), free(g), free(wide);
    }
}
