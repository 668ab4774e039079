// Small products for attention.c, whose operands lie in the cache: TILE rows of the left side, one number
// at a time, times vectors of the right side.
#include <stdlib.h>

#include "kernels.h"

#define NOINLINE __attribute__((noinline))
// A tile of a product is TILE x (WIDE * LANES). Then rows of a block, and rows that are fetched ahead.
enum { TILE = LANES / 2, WIDE = 3, BLOCK = 64, AHEAD = 8 };

// What one multiply-add takes from each side along the summed dimension: a float, or two neighbours of bfloat16.
#ifdef BFLOAT16
enum { PER = 2 };
typedef uint32_t unit __attribute__((may_alias));
typedef bits units;

static inline vec multiply_add(vec sum, unit a, units b) {
#ifdef __AVX512BF16__
    // Not the intrinsic: for that GCC 12 copies every sum at every step, and three vectors no longer fit the registers.
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"((units){0} + a), "v"(b));
    return sum;
#else
    float low = load(a), high = (word){.u = a & 0xffff0000}.f;
    return sum + low * (vec)(b << 16) + high * (vec)(b & 0xffff0000);
#endif
}
#else
enum { PER = 1 };
typedef float unit;
typedef vec units;

static inline vec multiply_add(vec sum, unit a, units b) { return sum + a * b; }
#endif

// Memory in whole cache lines: a vector that lies in two costs twice.
static inline void *room(i64 count, size_t size) { return aligned_alloc(64, (count * size + 63) / 64 * 64); }

static inline void *zeros(i64 count, size_t size) { return memset(room(count, size), 0, count * size); }

// Element (row m, depth k) is at[m * row + k * deep].
typedef struct { const unit *at; i64 row, deep; } Left;

// Columns in panels of `wide` vectors, `next` units from one to the next; (depth k, column n) of one is
// at[k * deep + n].
typedef struct { const unit *at; i64 deep, next; int wide; } Right;

// Where a tile goes, added or not.
typedef struct { float *at; i64 stride; int add; } Out;

static Out sums_at(float *at, i64 stride, int add) { return (Out){at, stride, add}; }

static inline __attribute__((always_inline)) void tile(Left a, Right b, i64 depth, Out c, const int wide) {
    vec sum[TILE][WIDE];
#pragma GCC unroll 8
    for (int m = 0; m < TILE; m++)
#pragma GCC unroll 3
        for (int n = 0; n < wide; n++) sum[m][n] = c.add ? *(vec *)(c.at + m * c.stride + n * LANES) : (vec){0};
    for (i64 k = 0; k < depth; k++) {
        const unit *left = a.at + k * a.deep, *right = b.at + k * b.deep;
        units column[WIDE];
#pragma GCC unroll 3
        for (int n = 0; n < wide; n++) column[n] = *(const units *)(right + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < TILE; m++)
#pragma GCC unroll 3
            for (int n = 0; n < wide; n++) sum[m][n] = multiply_add(sum[m][n], left[m * a.row], column[n]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < TILE; m++)
#pragma GCC unroll 3
        for (int n = 0; n < wide; n++) *(vec *)(c.at + m * c.stride + n * LANES) = sum[m][n];
}

// TILE rows of c, `columns` of them (whole vectors), become a @ b or grow by it.
static void product(Left a, Right b, i64 depth, Out c, i64 columns) {
    i64 step = b.wide * LANES;
    for (i64 n = 0; n < columns; n += step, b.at += b.next, c.at += step) {
        i64 wide = (columns - n) / LANES < b.wide ? (columns - n) / LANES : b.wide;
        if (wide == 3) tile(a, b, depth, c, 3);
        else if (wide == 2) tile(a, b, depth, c, 2);
        else tile(a, b, depth, c, 1);
    }
}

static i64 up(i64 x, i64 multiple) { return (x + multiple - 1) / multiple * multiple; }

// Rows as the left side: summed over their columns.
static Left rows_of(const real *x, i64 width, i64 row) {
    return (Left){(const unit *)x + row * (width / PER), width / PER, 1};
}

// As a side that is summed over its rows: columns of x (rows, width) -> units (rows / PER, columns), `out_width` from
// row to row.
static NOINLINE const unit *packed(const real *x, i64 rows, i64 width, i64 columns, i64 out_width, unit *out) {
    for (i64 row = 0; row < rows; row += PER) {
        unit *y = out + row / PER * out_width;
        const real *in = x + row * width;
#pragma omp simd
        for (i64 c = 0; c < columns; c++) {
#ifdef BFLOAT16
            y[c] = in[c] | (uint32_t)in[width + c] << 16;
#else
            y[c] = in[c];
#endif
        }
    }
    return out;
}

// The same where x need not be moved: floats stay where they are.
static const unit *paired(const real *x, i64 rows, i64 width, i64 columns, unit *out) {
#ifdef BFLOAT16
    return packed(x, rows, width, columns, width, out);
#else
    (void)rows, (void)width, (void)columns, (void)out;
    return x;
#endif
}

// LANES vectors become their transpose: halves change places, then quarters, ...
static inline void transpose(units *x) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) {
        mask first = lane + (((lane & half) != 0) & (LANES - half)), second = first + half;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & half) continue;
            bits low = (bits)x[i], high = (bits)x[i + half];
            x[i] = (units)shuffle(low, high, first);
            x[i + half] = (units)shuffle(low, high, second);
        }
    }
}

// Columns of a right side in panels that leave no single vector over, if that can be.
static int panel_of(i64 columns) { return columns / LANES % 3 == 1 ? 2 : WIDE; }

// Units of a right side in panels.
static i64 panel_size(i64 width, i64 columns) { return up(columns, panel_of(columns) * LANES) * width; }

// x^T as a right side, x: (columns, width) -> panels of (width / PER, columns). What the panels take: `panel_size`.
// Where width is not in whole vectors of units, up to one vector beyond x is read.
static NOINLINE Right across(const real *x, i64 columns, i64 width, unit *out) {
    i64 depth = width / PER, step = panel_of(columns) * LANES;
    for (i64 n = 0; n < columns; n += LANES) {
        unit *panel = out + n / step * step * depth + n % step;
        for (i64 k = 0; k < depth; k += LANES) {
            units block[LANES];
            for (int l = 0; l < LANES; l++) block[l] = *(const units *)((const unit *)x + (n + l) * depth + k);
            transpose(block);
            for (int l = 0; l < LANES && k + l < depth; l++) *(units *)(panel + (k + l) * step) = block[l];
        }
    }
    return (Right){out, step, step * depth, step / LANES};
}
