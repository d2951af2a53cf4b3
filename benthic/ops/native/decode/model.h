// What a decoder is told once: sizes, and where each weight lies. Mirrored field by field in
// benthic/inference/native_layout.py.
#pragma once

#include "matrix.h"

namespace benthic {

// Norms and biases are fp32. Matrices that a layer lacks have no rows.
struct Layer {
    const float *attention_norm, *q_norm, *kv_norm, *ffn_norm, *router_bias;
    Matrix q_a, q_b;     // q_b alone, on the layer's input, where queries are not compressed
    Matrix kv_a;
    Matrix key, value;   // stacks of a matrix per head: (c, nope), transposed, and (value, c)
    Matrix o;
    Matrix gate_up, down;                // dense or shared experts; gate_up is a stack of two
    Matrix router;
    Matrix expert_gate_up, expert_down;  // gate, then up, of each expert
    const float *embed_norm, *hidden_norm;  // of an MTP module, which joins an embedding and a hidden state
    Matrix project;

    bool sparse() const { return router.rows > 0; }
};

struct Model {
    const Layer* layers;
    Matrix embed, head;
    Matrix draft_head;  // of MTP modules, whose guesses may be rough; no rows: `head`
    int64_t width, heads, q_rank, c, nope, rope, value;
    int64_t groups, top_groups, top_k, normalise;
    float eps, latent_eps, softmax_scale, gate_scale;
};

// One step: a new token of each of `batch` sequences through layers [first, last).
struct Request {
    int64_t batch, first, last;
    int64_t* tokens;
    const float* previous;     // (batch, width) hidden states that an MTP module, layer `first`, joins to them
    const int64_t* positions;  // of the new tokens
    const int32_t* table;      // (batch, table_stride): the pages of each sequence
    int64_t table_stride;
    char* const* pages;        // of each layer, page_count of them
    int64_t page_count;
    Kind page_kind;            // fp32, bf16 or fp8
    const float *cos, *sin;    // (angles, rope / 2)
    int64_t angles;            // positions they are there for
    const float* norm;         // after the last layer
    float* hidden;             // (batch, width) after that norm
    const int32_t* head_rows;  // head_count of the rows, the head's; null: all
    int64_t head_count;
    float* logits;             // (head rows, vocabulary), or null
    int64_t* best;             // of each head row, the first of its largest logits, or null
    float *peak, *log_sum;     // the largest, and the logarithm of the sum of exponentials measured from it, or null
    int32_t* experts;          // (batch, sparse layers, top_k): whom each token chose, or null
};

// Drafts to be made before a step, by the MTP module in layer `layer`, which is repeated on its own output.
struct DraftRequest {
    int64_t layer, rows;       // rows that the module reads first, several of a sequence in order
    int64_t* tokens;
    const float* previous;     // (rows, width)
    const int64_t* positions;
    const float* norm;
    int64_t sequences;
    const int32_t *last;       // of each sequence, the last of these rows
    const int32_t *depth;      // drafts, at least one
    const int32_t *to;         // the row of the step whose token the first draft is, of the same pages; others follow
    double seconds;            // they took
};

}  // namespace benthic
