#include "model.h"

#include <algorithm>
#include <cmath>

namespace fastserve {

namespace {

constexpr int MANY_ROWS = 8;
constexpr size_t MOST_AHEAD = size_t{16} << 20;  // bytes: half of what such CPUs share

// out = x / rms(x) * weight, all of them [padded(size)].
void rms_norm(const float* x, const float* weight, int size, float epsilon, float* out) {
    f32x16 squares{};
    for (int i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    const float mean = sum(squares) / static_cast<float>(size);
    const float scale = 1.0f / std::sqrt(mean + epsilon);
    for (int i = 0; i < size; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
}

// Rotates pairs (i, i + dim / 2) of x [dim] in place.
void rope(float* x, const float* cos, const float* sin, int dim) {
    const int half = dim / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

}  // namespace

Model::Model(const Shape& shape)
    : shape_(shape), layers_(shape.layers),
      hidden_stride_(padded(shape.hidden)),
      qkv_stride_(padded((shape.heads + 2 * shape.kv_heads) * shape.dim)),
      attended_stride_(padded(shape.heads * shape.dim)),
      middle_stride_(padded(shape.intermediate)),
      own_words_(static_cast<Dtype>(shape.weights) != Dtype::INT8 ||
                 shape.dim % (group_words(Dtype::INT8) * Int8::STEP) == 0),
      scratch_(shape.threads),
      pool_(shape.threads) {}

void Model::set_matrix(int layer, Weight which, int outputs, int inputs, const float* weight,
                       const float* bias) {
    Linear& target = which == Weight::HEAD      ? head_
                     : which == Weight::QKV     ? layers_[layer].qkv
                     : which == Weight::OUTPUT  ? layers_[layer].output
                     : which == Weight::GATE_UP ? layers_[layer].gate_up
                                                : layers_[layer].down;
    target.pack(arena_, static_cast<Dtype>(shape_.weights), outputs, inputs, weight, bias,
                which == Weight::GATE_UP);
}

void Model::set_vector(int layer, Weight which, int size, const float* values) {
    Buffer<float>& target = which == Weight::FINAL_NORM   ? final_norm_
                            : which == Weight::INPUT_NORM ? layers_[layer].input_norm
                            : which == Weight::POST_NORM  ? layers_[layer].post_norm
                            : which == Weight::QUERY_NORM ? layers_[layer].query_norm
                                                          : layers_[layer].key_norm;
    target = Buffer<float>(padded(size));
    std::copy(values, values + size, target.get());
}

void Model::set_embedding(Dtype dtype, const void* rows) {
    embedding_dtype_ = dtype;
    embedding_ = rows;
}

void Model::set_rope(const float* cos, const float* sin) {
    cos_ = cos;
    sin_ = sin;
}

void Model::forward(const Batch& batch) {
    pool_.settle();  // what a late task reads stays as it is and where it is until here
    plan(batch);
    const int count = batch.tokens;
    const KvPages kv{batch.kv,          shape_.layers, shape_.kv_heads,
                     shape_.block_size, shape_.dim,    static_cast<Dtype>(shape_.kv)};
    choose_ahead(batch, kv);
    each_row(count, [&](int token, int) { embed(token, batch.token_ids[token]); });
    for (int index = 0; index < shape_.layers; index++) layer(index, count, kv);
    if (batch.logit_rows == 0) return;
    each_row(batch.logit_rows,
             [&](int i, int thread) { normalise(wanted_[i], final_norm_.get(), i, thread); });
    // Few rows of logits are read from the cache next; many would push out what the product reads.
    const bool aligned = reinterpret_cast<uintptr_t>(batch.logits) % 64 == 0;
    const Output kind = aligned && batch.logit_rows > MANY_ROWS ? Output::FAR : Output::STORE;
    multiply(pool_, hidden_words_, batch.logit_rows, head_, kind, batch.logits,
             batch.logits_stride);
}

// What every layer of the iteration shares, and memory for it.
void Model::plan(const Batch& batch) {
    tokens_.clear();
    attention_.clear();
    wanted_.clear();
    copy_tables(batch);
    // Heads that share their keys go together, as long as there is a task for every thread.
    const int group = shape_.heads / shape_.kv_heads;
    const int most = max_queries(static_cast<Dtype>(shape_.kv), shape_.dim);
    int together = std::min(group, most);
    const auto tasks = [&] {
        return std::max(batch.rows, batch.tokens * together / most) * shape_.kv_heads *
               (group / together);
    };
    while (together > 1 && tasks() < 2 * shape_.threads) together = (together + 1) / 2;
    size_t scratch = hidden_stride_;
    const int32_t* table = tables_.data();
    for (int row = 0; row < batch.rows; table += blocks_of(batch, row++)) {
        const int count = batch.query_lens[row], start = batch.context_lens[row] - count;
        const int first = static_cast<int>(tokens_.size());
        for (int i = 0; i < count; i++) tokens_.push_back({table, start + i, i + 1 == count});
        const int span = std::max(1, most / together);  // tokens of a task
        for (int i = 0; i < count; i += span) {
            for (int head = 0; head < shape_.heads;) {
                const int in_group = std::min(together, group - head % group);
                attention_.push_back({table, first + i, start + i, std::min(span, count - i), head,
                                      in_group, head / group});
                head += in_group;
                scratch = std::max(scratch, attention_scratch(attention_.back(), shape_.dim) +
                                                span * in_group * shape_.dim);
            }
        }
    }
    for (int i = 0; i < batch.logit_rows; i++) {
        int end = 0;
        for (int row = 0; row <= batch.wanted[i]; row++) end += batch.query_lens[row];
        wanted_.push_back(end - 1);
    }
    // The tasks with the longest contexts first: nobody waits for one that began last.
    std::stable_sort(attention_.begin(), attention_.end(), [](const auto& a, const auto& b) {
        return a.position > b.position;
    });
    const size_t count = batch.tokens;
    x_.reserve(count * hidden_stride_);
    qkv_.reserve(count * qkv_stride_);
    if (!own_words_) attended_.reserve(count * attended_stride_);
    middle_.reserve(count * middle_stride_);
    queries_.reserve(count * shape_.heads * shape_.dim);
    const auto dtype = static_cast<Dtype>(shape_.weights);
    hidden_words_.shape(dtype, shape_.hidden, batch.tokens);
    attended_words_.shape(dtype, shape_.heads * shape_.dim, batch.tokens);
    middle_words_.shape(dtype, shape_.intermediate, batch.tokens);
    for (auto& buffer : scratch_) buffer.reserve(scratch);
}

int Model::blocks_of(const Batch& batch, int row) const {
    return (batch.context_lens[row] + shape_.block_size - 1) / shape_.block_size;
}

// The caller's go with the iteration, which a late task may outlast.
void Model::copy_tables(const Batch& batch) {
    tables_.clear();
    for (int row = 0; row < batch.rows; row++) {
        const int32_t* table = batch.block_tables + batch.table_starts[row];
        tables_.insert(tables_.end(), table, table + blocks_of(batch, row));
    }
}

// Products of many rows leave memory idle, and attention does nothing but wait for it: meanwhile the
// next layer's keys and values are fetched, of as many rows as the cache has room for.
void Model::choose_ahead(const Batch& batch, const KvPages& kv) {
    ahead_.clear();
    const size_t most = MOST_AHEAD / (kv.pieces(0, tables_).lines * 64);
    const int32_t* table = tables_.data();
    for (int row = 0; row < batch.rows; table += blocks_of(batch, row++)) {
        const int seen = batch.context_lens[row] - batch.query_lens[row] + 1 - shape_.window;
        const int first = shape_.window ? std::max(0, seen) / shape_.block_size : 0;
        const int last = std::min<size_t>(blocks_of(batch, row), first + most - ahead_.size());
        ahead_.insert(ahead_.end(), table + first, table + last);
    }
}

// task(row, thread) for all rows, a few at a time.
template <class Task>
void Model::each_row(int rows, const Task& task) {
    const int chunk = std::max(1, std::min(8, rows / (4 * pool_.threads())));
    pool_.each((rows + chunk - 1) / chunk, [&](int i, int thread) {
        for (int row = i * chunk; row < std::min(rows, (i + 1) * chunk); row++) task(row, thread);
    });
}

void Model::layer(int index, int tokens, const KvPages& kv) {
    const Layer& layer = layers_[index];
    each_row(tokens, [&](int token, int thread) {
        const Token& where = tokens_[token];
        for (int head = 0; where.last && head < shape_.kv_heads; head++) {
            kv.fetch(where.table, index, head, where.position);  // see rotate
        }
        normalise(token, layer.input_norm.get(), token, thread);
    });
    multiply(pool_, hidden_words_, tokens, layer.qkv, Output::STORE, qkv_.get(), qkv_stride_);
    each_row(tokens, [&](int token, int) { rotate(token, index, kv); });
    pool_.race(static_cast<int>(attention_.size()), [=, this](int i, int thread, auto& claim) {
        const AttentionTask& task = attention_[i];
        const size_t width = static_cast<size_t>(task.heads) * shape_.dim;
        float* found = scratch_[thread].get();
        attend(kv, index, task, queries_.get(), shape_.heads, shape_.window, found, width,
               found + task.tokens * width);
        if (!claim()) return;
        const int from = task.head * shape_.dim;
        if (own_words_) {
            attended_words_.put(task.token, task.token + task.tokens, found, width, from,
                                from + width);
            return;
        }
        float* out = attended_.get() + task.token * attended_stride_ + from;
        for (int token = 0; token < task.tokens; token++) {
            std::copy_n(found + token * width, width, out + token * attended_stride_);
        }
    });
    if (!own_words_) {
        each_row(tokens, [&](int token, int) {
            attended_words_.put(token, attended_.get() + token * attended_stride_);
        });
    }
    multiply(pool_, attended_words_, tokens, layer.output, Output::ADD, x_.get(), hidden_stride_);
    each_row(tokens, [&](int token, int thread) {
        normalise(token, layer.post_norm.get(), token, thread);
    });
    Pieces ahead;
    if (index + 1 < shape_.layers) ahead = kv.pieces(index + 1, ahead_);
    const int some = ahead.count * 2 / 3;  // gate and up take twice as long as down
    multiply(pool_, hidden_words_, tokens, layer.gate_up, Output::SWIGLU, middle_.get(),
             middle_stride_, &middle_words_, ahead.part(0, some));
    multiply(pool_, middle_words_, tokens, layer.down, Output::ADD, x_.get(), hidden_stride_,
             nullptr, ahead.part(some, ahead.count));
}

void Model::embed(int token, int32_t id) {
    float* x = x_.get() + static_cast<size_t>(token) * hidden_stride_;
    const size_t from = static_cast<size_t>(id) * shape_.hidden;
    for (int i = 0; i < shape_.hidden; i++) {
        x[i] = embedding_dtype_ == Dtype::F32
                   ? static_cast<const float*>(embedding_)[from + i]
                   : from_bf16(static_cast<const uint16_t*>(embedding_)[from + i]);
    }
}

void Model::normalise(int token, const float* weight, int slot, int thread) {
    float* normed = scratch_[thread].get();
    rms_norm(x_.get() + static_cast<size_t>(token) * hidden_stride_, weight, shape_.hidden,
             shape_.epsilon, normed);
    hidden_words_.put(slot, normed);
}

void Model::rotate(int token, int layer, const KvPages& kv) {
    const Token& where = tokens_[token];
    const Layer& weights = layers_[layer];
    const int dim = shape_.dim, half = dim / 2;
    const float* cos = cos_ + static_cast<size_t>(where.position) * half;
    const float* sin = sin_ + static_cast<size_t>(where.position) * half;
    float* heads = qkv_.get() + static_cast<size_t>(token) * qkv_stride_;
    const auto prepare = [&](float* head, const Buffer<float>& norm) {
        if (norm.get() != nullptr) rms_norm(head, norm.get(), dim, shape_.epsilon, head);
        rope(head, cos, sin, dim);
    };
    const size_t words = static_cast<size_t>(shape_.heads) * dim / step_of(kv.dtype);
    int32_t* out = queries_.get() + token * words;
    for (int head = 0; head < shape_.heads; head++) {
        float* query = heads + head * dim;
        prepare(query, weights.query_norm);
        for (int i = 0; i < dim; i += LANES) {
            if (kv.dtype == Dtype::F32) {
                store(reinterpret_cast<float*>(out) + head * dim + i, load(query + i));
            } else {
                const u16x16 rounded = to_bf16(load(query + i));
                memcpy(reinterpret_cast<uint16_t*>(out) + head * dim + i, &rounded, sizeof rounded);
            }
        }
    }
    for (int head = 0; head < shape_.kv_heads; head++) {
        float* key = heads + (shape_.heads + head) * dim;
        const float* value = heads + (shape_.heads + shape_.kv_heads + head) * dim;
        prepare(key, weights.key_norm);
        kv.put(where.table, layer, head, where.position, key, value, where.last);
    }
}

}  // namespace fastserve
