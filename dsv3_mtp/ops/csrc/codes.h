// Weights in int8, for drafts: a code times the scale of its output is the number. What is multiplied with them becomes codes
// of 8 bits as well, each row with a scale of its own.
//
// They lie in blocks of OUTPUTS, of four columns at a time: sums of outputs are side by side and need not be added up
// across a vector. The codes of x are moved by 128 into 0 to 255, as the processor's instruction wants one side; `shift`
// takes that back.
enum { OUTPUTS = 16, DEEP = 4, CHAINS = 4, WORTH_THREADS = 1 << 15 };  // CHAINS: sums that do not wait for one another
static const float TINY = 1e-30f;

static i64 blocks(i64 outputs) { return (outputs + OUTPUTS - 1) / OUTPUTS; }

static i64 steps(i64 width) { return (width + DEEP - 1) / DEEP; }

typedef int32_t integers __attribute__((vector_size(OUTPUTS * 4), aligned(4), may_alias));
typedef float floats __attribute__((vector_size(OUTPUTS * 4), aligned(4), may_alias));

// sum[o] += the products of DEEP codes of x with those of output o.
static inline void add_deep(integers *sum, const int8_t *w, const uint8_t *x) {
    integers codes = *(const integers *)w;
#ifdef __AVX512VNNI__
    int32_t all;
    memcpy(&all, x, DEEP);
    *sum = (integers)_mm512_dpbusd_epi32((__m512i)*sum, _mm512_set1_epi32(all), (__m512i)codes);
#else
#pragma GCC unroll 4
    for (int d = 0; d < DEEP; d++) *sum += (codes << (24 - 8 * d) >> 24) * (int32_t)x[d];
#endif
}

// y (few, OUTPUTS) of one block. x: (few, steps * DEEP).
static inline __attribute__((always_inline)) void block_of(const uint8_t *x, const float *x_scale, const int few,
                                                           const int8_t *w, const float *scale, const float *shift,
                                                           i64 count, floats *y) {
    integers sum[2][CHAINS] = {0};
    i64 s = 0;
    for (; s + CHAINS <= count; s += CHAINS)
#pragma GCC unroll 4
        for (int k = 0; k < CHAINS; k++)
#pragma GCC unroll 2
            for (int n = 0; n < few; n++)
                add_deep(&sum[n][k], w + (s + k) * OUTPUTS * DEEP, x + (n * count + s + k) * DEEP);
    for (; s < count; s++)
#pragma GCC unroll 2
        for (int n = 0; n < few; n++) add_deep(&sum[n][0], w + s * OUTPUTS * DEEP, x + (n * count + s) * DEEP);
#pragma GCC unroll 2
    for (int n = 0; n < few; n++) {
        integers all = sum[n][0] + sum[n][1] + (sum[n][2] + sum[n][3]);
        y[n] = (__builtin_convertvector(all, floats) * *(const floats *)scale - *(const floats *)shift) * x_scale[n];
    }
}

// codes (width): x over a scale, which is returned, to the nearest, and 128 more, which makes 1 to 255. Where a number is
// not finite the scale is nan, and so is every sum with it. Where all are below TINY, of which 127 / top may be infinite,
// it is 0.
static float to_codes(const float *x, i64 width, uint8_t *codes) {
    vec most = {0}, zeros = {0};
    i64 c = 0;
    for (; c + LANES <= width; c += LANES) {
        vec some = *(const vec *)(x + c);
        most = larger(larger(some, -some), most), zeros += some * 0.0f;
    }
    float top = max_of(most), zero = sum_of(zeros);
    for (; c < width; c++) top = fabsf(x[c]) > top ? fabsf(x[c]) : top, zero += x[c] * 0.0f;
    if (zero != 0) {
        memset(codes, 128, width);
        return NAN;
    }
    float factor = top > TINY ? 127 / top : 0;
    for (c = 0; c < width; c++) codes[c] = (int32_t)(x[c] * factor + 128.5f);
    return factor > 0 ? 1 / factor : 0;
}

// One block of outputs: y (rows, .) from number `left` on.
static void coded_block(const uint8_t *x, const float *x_scale, i64 rows, matrix w, i64 block, i64 count, i64 left, float *y,
                        i64 y_stride) {
    const int8_t *from = (const int8_t *)w.at + block * OUTPUTS * count * DEEP;
    const float *scale = w.scale + block * OUTPUTS, *shift = w.shift + block * OUTPUTS;
    for (i64 n = 0; n < rows; n += 2, x += 2 * count * DEEP) {
        floats some[2];
        if (n + 1 < rows) block_of(x, x_scale + n, 2, from, scale, shift, count, some);
        else block_of(x, x_scale + n, 1, from, scale, shift, count, some);
        for (i64 k = 0; k < 2 && n + k < rows; k++)
            memcpy(y + (n + k) * y_stride, some + k, (left < OUTPUTS ? left : OUTPUTS) * sizeof(float));
    }
}

// y = x @ w^T, of number `which` of w. x: (rows, width), y: (rows, outputs), each with a stride.
static void coded_product(const float *x, i64 x_stride, i64 rows, matrix w, i64 which, i64 width, i64 outputs, float *y,
                          i64 y_stride) {
    mark before = here();
    i64 count = steps(width), deep = count * DEEP, all = blocks(outputs), first = which * all;
    float *x_scale = take(rows, sizeof(float));
    uint8_t *codes = take(rows * deep, 1);
    for (i64 n = 0; n < rows; n++) x_scale[n] = to_codes(x + n * x_stride, width, codes + n * deep);
    if (outputs * width < WORTH_THREADS)
        for (i64 b = 0; b < all; b++)
            coded_block(codes, x_scale, rows, w, first + b, count, outputs - b * OUTPUTS, y + b * OUTPUTS, y_stride);
    else {
        PARALLEL
        for (i64 b = 0; b < all; b++)
            coded_block(codes, x_scale, rows, w, first + b, count, outputs - b * OUTPUTS, y + b * OUTPUTS, y_stride);
    }
    give_back(before);
}

// Writes w (outputs, width) as codes; those of a block that no output has are 0.
void decode_codes(const real *w, i64 outputs, i64 width, int8_t *codes, float *scale, float *shift) {
    i64 deep = steps(width) * DEEP, all = blocks(outputs) * OUTPUTS;
    memset(codes, 0, all * deep), memset(scale, 0, all * sizeof(float)), memset(shift, 0, all * sizeof(float));
    mark before = here();
    float *row = take(width, sizeof(float));
    uint8_t *own = take(width, 1);
    for (i64 o = 0; o < outputs; o++) {
        int8_t *to = codes + o / OUTPUTS * OUTPUTS * deep + o % OUTPUTS * DEEP;
        int32_t sum = 0;
        for (i64 c = 0; c < width; c++) row[c] = load(w[o * width + c]);
        scale[o] = to_codes(row, width, own);
        for (i64 c = 0; c < width; c++) {
            int8_t code = own[c] - 128;
            to[c / DEEP * DEEP * OUTPUTS + c % DEEP] = code, sum += code;
        }
        shift[o] = 128 * scale[o] * sum;
    }
    give_back(before);
}
