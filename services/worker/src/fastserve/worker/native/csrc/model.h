// A Llama-family decoder: weights, and one iteration over a batch.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "memory.h"
#include "pool.h"

namespace fastserve {

// The following are shared with library.py, field by field.

struct Shape {
    int32_t layers, hidden, heads, kv_heads, dim, intermediate, vocab;
    int32_t block_size;
    int32_t window;   // positions a query sees, itself included; 0: all
    int32_t weights;  // Dtype
    int32_t kv;       // Dtype, F32 or BF16
    int32_t threads;
    float epsilon;
};

enum class Weight : int32_t {
    QKV = 0, OUTPUT, GATE_UP, DOWN, HEAD,            // matrices
    INPUT_NORM, POST_NORM, QUERY_NORM, KEY_NORM, FINAL_NORM,  // vectors
};

// As batch.py says; block tables one after the other, `tables[row]` begins at `table_starts[row]`.
struct Batch {
    int32_t tokens, rows, logit_rows;
    const int32_t* token_ids;     // [tokens]
    const int32_t* query_lens;    // [rows]
    const int32_t* context_lens;  // [rows]
    const int32_t* block_tables;
    const int32_t* table_starts;  // [rows]
    const int32_t* wanted;        // [logit_rows] rows
    void* kv;
    float* logits;        // [logit_rows, logits_stride]
    int64_t logits_stride;  // a multiple of 16, at least `vocab`
    int32_t bell;  // an eventfd to write to first; -1: none
};

class Model {
public:
    explicit Model(const Shape& shape);

    void set_matrix(int layer, Weight which, int outputs, int inputs, const float* weight,
                    const float* bias);
    void set_vector(int layer, Weight which, int size, const float* values);
    // Not copied. dtype: F32 or BF16; [vocab, hidden].
    void set_embedding(Dtype dtype, const void* rows);
    // cos and sin [positions, dim / 2]; not copied.
    void set_rope(const float* cos, const float* sin);

    void forward(const Batch& batch);

private:
    struct Layer {
        Linear qkv, output, gate_up, down;
        Buffer<float> input_norm, post_norm, query_norm, key_norm;
    };
    // A token of the batch: where it stands.
    struct Token {
        const int32_t* table;
        int position;
        bool last;  // of its row
    };

    void plan(const Batch& batch);
    int blocks_of(const Batch& batch, int row) const;
    void copy_tables(const Batch& batch);
    void choose_ahead(const Batch& batch, const KvPages& kv);
    void layer(int index, int tokens, const KvPages& kv);
    void embed(int token, int32_t id);
    // hidden_words_[slot] = x[token], normalised and ready for a product.
    void normalise(int token, const float* weight, int slot, int thread);
    void rotate(int token, int layer, const KvPages& kv);
    template <class Task>
    void each_row(int rows, const Task& task);

    const Shape shape_;
    Arena arena_;  // of the matrices
    std::vector<Layer> layers_;
    Buffer<float> final_norm_;
    Linear head_;
    const void* embedding_ = nullptr;
    Dtype embedding_dtype_ = Dtype::F32;
    const float *cos_ = nullptr, *sin_ = nullptr;

    // Of the batch that runs.
    std::vector<int32_t> tables_;  // the blocks of each row, one row after the other
    std::vector<int32_t> ahead_;   // those that the next layer's attention finds in the cache
    std::vector<Token> tokens_;
    std::vector<AttentionTask> attention_;
    std::vector<int> wanted_;  // tokens whose logits are wanted
    const size_t hidden_stride_, qkv_stride_, attended_stride_, middle_stride_;
    const bool own_words_;  // no two heads share a group of the numbers that attention finds
    Buffer<float> x_, qkv_, attended_, middle_;  // [tokens, stride]; x_ is the residual stream
    Buffer<int32_t> queries_;                    // words [tokens, heads, dim / STEP]
    Rows hidden_words_, attended_words_, middle_words_;  // inputs of products
    std::vector<Buffer<float>> scratch_;                 // one for each thread
    Pool pool_;  // the last: it ends before what its tasks read
};

}  // namespace fastserve
