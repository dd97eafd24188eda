// Paged attention that reads the pages where they are.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "simd.h"

namespace fastserve {

// The KV cache: data[block, layer, K or V, kv head, ...a page of block_size tokens].
//
// A page is a row of tiles of 16 tokens, laid out so that both products of attention find their
// operands as `accumulate` wants them, without a transposition and without a copy:
//   K tile [dim / STEP, 16 tokens, STEP]               words run along the head dimension
//   V tile [dim / 16, 16 / STEP, 16 dimensions, STEP]  words run along the tokens
// Tokens beyond the context hold anything. A V word that reaches beyond it ends in zeros.
struct KvPages {
    void* data;
    int layers, kv_heads, block_size, dim;
    Dtype dtype;  // F32 or BF16

    int32_t* tile(const int32_t* table, int layer, bool values, int head, int index) const {
        const int per_page = block_size / LANES;
        const size_t page = ((static_cast<size_t>(table[index / per_page]) * layers + layer) * 2 +
                             values) * kv_heads + head;
        return static_cast<int32_t*>(data) +
               (page * per_page + index % per_page) * (LANES * dim / step_of(dtype));
    }

    // Words from a tile of keys to that of the same tokens' values.
    size_t to_values() const {
        return static_cast<size_t>(kv_heads) * block_size * dim / step_of(dtype);
    }

    // The keys and values of all heads in these blocks.
    Pieces pieces(int layer, const std::vector<int32_t>& blocks) const {
        const size_t bytes = 2 * to_values() * sizeof(int32_t);
        return {static_cast<const char*>(data) + layer * bytes, layers * bytes, blocks.data(),
                static_cast<int>(blocks.size()), static_cast<int>(bytes / 64)};
    }

    // Writes k and v [dim] of one head at a position. last: no later position is written yet.
    void put(const int32_t* table, int layer, int head, int position, const float* k,
             const float* v, bool last) const;

    // Fetches the lines that `put` writes, each of which lies apart, into the second-level cache.
    void fetch(const int32_t* table, int layer, int head, int position) const;
};

// Queries that share their keys: `tokens` successive tokens of a row, with `heads` of the query
// heads of one KV head; tokens * heads is at most `max_queries`.
struct AttentionTask {
    const int32_t* table;  // blocks of the row
    int token;             // the first one, as an index into the batch
    int position;          // of the first one
    int tokens;
    int head, heads;
    int kv_head;
};

int max_queries(Dtype kv, int dim);

// Floats of scratch memory that a task needs.
size_t attention_scratch(const AttentionTask& task, int dim);

// queries: words [batch tokens, all heads, dim / STEP] in the format of `kv`. out [tokens, heads *
// dim] gets the results of the task; `stride` floats from token to token. window: how many positions
// a query sees, itself included (0: all).
void attend(const KvPages& kv, int layer, const AttentionTask& task, const int32_t* queries,
            int all_heads, int window, float* out, size_t stride, float* scratch);

}  // namespace fastserve
