// Products of activations with packed weights: y = x W^T + b.
#pragma once

#include <cstdint>

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

// The sum over a row of inputs is taken in groups of so many words, each into a fresh accumulator:
// one long chain of additions would lose digits. In int8 every group has a scale of its own.
#ifndef GW
#define GW 8
#endif
constexpr int GROUP_WORDS = GW;
constexpr int FLOAT_GROUP_WORDS = 32;
constexpr int group_words(Dtype d) { return d == Dtype::INT8 ? GROUP_WORDS : FLOAT_GROUP_WORDS; }

// Activations as products want them: rows of words of 32 bits.
//
// int8: number = value * scale of its row and group. Weights are stored with 128 added, since the
// instruction wants one operand without sign; `correction` is -128 times the sum of a group, what
// has to be added to its products.
struct Rows {
    Dtype dtype = Dtype::F32;
    int size = 0;    // numbers in a row
    int words = 0;   // words in a row, padding included
    int groups = 0;  // of GROUP_WORDS, the last one maybe shorter
    Buffer<int32_t> data;
    Buffer<float> scale;         // [rows, groups]
    Buffer<int32_t> correction;  // [rows, groups]

    void shape(Dtype dtype, int size, int rows);
    // Puts x [size] into a row. x has room for a multiple of 16 and is zero there.
    void put(int row, const float* x);
};

// Weights [outputs, inputs], packed: panels of 16 outputs, and in a panel word after word of the
// inputs, one for each output.
struct Linear {
    Dtype dtype = Dtype::F32;
    int outputs = 0, inputs = 0;
    int words = 0;   // per output
    int panels = 0;  // of 16 outputs, the last one filled up with zeros
    Buffer<int32_t> data;
    int groups = 0;
    Buffer<uint16_t> scale;  // int8: bf16 [panels, groups, 16]
    Buffer<float> bias;   // if there is one

    // weight [outputs, inputs] row by row; bias [outputs] or null. `halves`: the outputs are two
    // halves, gate and up, whose panels are to alternate (see SWIGLU).
    void pack(Dtype dtype, int outputs, int inputs, const float* weight, const float* bias,
              bool halves);
};

enum class Output {
    STORE,   // out = y
    ADD,     // out += y
    SWIGLU,  // out = silu(gate) * up, for weights packed in halves
};

// out[row, :] of `rows` rows, `stride` floats apart (a multiple of 16, for whole panels). To be
// called by all threads of a pool.
void multiply(Pool& pool, const Rows& x, int rows, const Linear& w, Output kind, float* out,
              size_t stride);

}  // namespace fastserve
