// Products of activations with packed weights: y = x W^T + b.
#pragma once

#include <cstdint>

#include "amx.h"
#include "memory.h"
#include "pool.h"
#include "simd.h"

namespace fastserve {

enum class Dtype : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };

constexpr int step_of(Dtype dtype) {
    return dtype == Dtype::F32 ? F32::STEP : dtype == Dtype::BF16 ? Bf16::STEP : Int8::STEP;
}

constexpr int padded(int count, int multiple = LANES) {
    return (count + multiple - 1) / multiple * multiple;
}

// Words of one panel that follow each other in packed weights of bf16: with AMX a whole tile.
constexpr int BF16_RUN = AMX ? TILE_WORDS : 1;

// The sum over a row of inputs is taken in groups of so many words, each into a fresh accumulator:
// one long chain of additions would lose digits. (A product of AMX tiles sums its 16 words apart by
// itself.) In int8 a group is 32 numbers, and has a scale of its own in inputs and weights: with 64
// the perplexity of a small model rises by 1 %.
constexpr int group_words(Dtype dtype) { return dtype == Dtype::INT8 ? 8 : 32; }

// Words of a row of so many numbers, padding included: with AMX whole tiles.
constexpr int words_of(Dtype dtype, int size) {
    const int tile = dtype == Dtype::BF16             ? BF16_RUN
                     : AMX && dtype == Dtype::INT8 ? group_words(dtype)
                                                      : 1;
    return padded(padded(size) / step_of(dtype), tile);
}

// Activations as products want them: rows of words of 32 bits.
//
// int8: number = value * scale of its row and group. Products are taken with 128 added to the
// weights (see Int8); `correction` is -128 times the sum of a group, what has to be added to them.
// Both stand behind the words of their group: whoever reads a row has them in the cache.
struct Rows {
    static constexpr int SCALE = group_words(Dtype::INT8), CORRECTION = SCALE + 1;
    static constexpr int INT8_PITCH = CORRECTION + 1;  // words from group to group

    Dtype dtype = Dtype::F32;
    int rows = 0;
    int size = 0;    // numbers in a row
    int words = 0;   // from row to row
    int groups = 0;  // in a row, the last one maybe shorter
    Buffer<int32_t> data;

    void shape(Dtype dtype, int size, int rows);
    // Puts x [size] into a row. x has room for a multiple of 16 and is zero there.
    void put(int row, const float* x) { put(row, row + 1, x, 0, 0, size); }
    // Puts the numbers [from, to) of the rows [first, end): whole groups (int8) or multiples of 16,
    // or up to the end. x is where those of the first row begin; the next is `stride` further.
    void put(int first, int end, const float* x, size_t stride, int from, int to);
};

// Memory that is read soon, in `count` pieces of `lines` cache lines: piece i is `pitch` bytes times
// index[i] from `base` on.
struct Pieces {
    const char* base = nullptr;
    size_t pitch = 0;
    const int32_t* index = nullptr;
    int count = 0, lines = 0;

    // The pieces [from, to).
    Pieces part(int from, int to) const { return {base, pitch, index + from, to - from, lines}; }
};

// Weights [outputs, inputs], packed for being read from end to end. A panel is 16 outputs, a vector
// one word of each of them; a strip is `width` panels, word after word, one vector of each panel.
// With AMX and bf16: 16 words after 16 words, one tile [16 words, 16 outputs] of each panel.
struct Linear {
    Dtype dtype = Dtype::F32;
    int outputs = 0, inputs = 0;
    int words = 0;   // per output
    int groups = 0;  // per output
    int panels = 0;  // the last one filled up with zeros
    int width = 0;   // the last strip has the panels that are left
    // In the arena that they were packed into:
    int32_t* data = nullptr;    // [strips, words, width, 16]; [strips, words / 16, width, 16, 16]
    uint16_t* scale = nullptr;  // int8: bf16 [strips, groups, width, 16]
    float* bias = nullptr;      // [panels, 16], if there is one

    int strips() const { return (panels + width - 1) / width; }

    // weight [outputs, inputs] row by row; bias [outputs] or null. `halves`: the outputs are two
    // halves, gate and up, whose panels are to alternate (see SWIGLU).
    void pack(Arena& arena, Dtype dtype, int outputs, int inputs, const float* weight,
              const float* bias, bool halves);
};

enum class Output {
    STORE,   // out = y
    FAR,     // out = y, past the caches; aligned to 64 bytes
    ADD,     // out += y
    SWIGLU,  // out = silu(gate) * up, for weights packed in halves
};

// out[row, :] of `rows` rows, `stride` floats apart (a multiple of 16, for whole panels). `words`, if
// given, gets them as well, as inputs of the next product. `ahead`: what is to be in the cache
// afterwards, as far as memory has time while many rows are computed; not with AMX.
void multiply(Pool& pool, const Rows& x, int rows, const Linear& w, Output kind, float* out,
              size_t stride, Rows* words = nullptr, const Pieces& ahead = {});

}  // namespace fastserve
