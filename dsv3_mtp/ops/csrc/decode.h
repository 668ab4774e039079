// The steps of decoding: layers (decode.c), and a whole step that drafts and verifies (step.c). c_layer.py and c_decode.py
// fill the structures.
#include "kernels.h"
#include "room.h"

// A weight (outputs, width), or several one behind the other. In `real` numbers; or, with a scale, in int8 (codes.h).
typedef struct {
    const void *at;
    const float *scale, *shift;
} matrix;

// A decoder layer; c_layer.py says what it is. Where there are no experts, or nothing beside them, their sizes
// are 0.
typedef struct {
    matrix down, up, out, gate_up, expert_down, common_gate, common_up, common_down;
    const real *w_uk, *w_uv, *router;
    const float *gain, *bias;
    i64 hidden, q_rank, rank, rope, heads, nope, value;
    i64 experts, width, common_width, groups, topk_group, top_k, normalise;
    float floor, q_floor, kv_floor, mlp_floor, scaling;
} layer;

// Decoder layers, one after the other, what the first one reads, and the norm behind the last one.
typedef struct {
    const real *table;  // (vocab, hidden)
    matrix merge;       // (hidden, parts * hidden), or nothing is merged
    const float *floors, *gain;
    const layer *layers;
    i64 vocab, parts, count;
    float norm_floor;
} stack;

// tokens: those of row b begin at ids[b * ids_stride]; NULL: none are read. states: (count, rows, hidden), what each layer
// reads; out: (2, asked_count, hidden), the output of the last layer and the same normed, of the rows asked_for, whose
// numbers ascend. caches: of each layer (batch, slots, rank + rope). Returns how many tokens are outside the vocabulary;
// then nothing is computed.
i64 decode_layers(const stack *s, const i64 *ids, i64 ids_stride, const real *given, real *states, real *out,
                  real *const *caches, const float *angles, const i64 *first, i64 batch, i64 length, i64 slots,
                  const i64 *asked_for, i64 asked_count);

// y (rows, outputs) = x @ w^T.
void decode_linear(const real *x, const matrix *w, real *y, i64 rows, i64 width, i64 outputs);

// y (rows): where the largest of x (rows, width) is, the first of them; -1 where it is not finite or nan is beside it.
// Returns of how many rows that is so.
i64 decode_largest(const real *x, i64 *y, i64 rows, i64 width);
