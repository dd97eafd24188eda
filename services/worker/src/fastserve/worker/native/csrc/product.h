// What the ways to multiply (gemm.cpp, gemm_amx.cpp) share.
#pragma once

#include "gemm.h"

namespace fastserve {

constexpr int MAX_PANELS = 4;  // of a strip

struct Product {
    const Rows& x;
    const Linear& w;
    Output kind;
    float* out;
    size_t stride;
    const Pieces& ahead;
};

// Puts the products of a row with NB panels, from `panel` on, where they belong.
template <int NB>
ALWAYS_INLINE void finish(const Product& p, int row, int panel, f32x16 (&total)[NB]) {
    if (p.w.bias != nullptr) {
        for (int j = 0; j < NB; j++) total[j] += load(p.w.bias + (panel + j) * LANES);
    }
    float* out = p.out + row * p.stride;
    if (p.kind == Output::SWIGLU) {
        for (int j = 0; j + 1 < NB; j += 2) {
            store(out + (panel + j) / 2 * LANES, silu(total[j]) * total[j + 1]);
        }
        return;
    }
    for (int j = 0; j < NB; j++) {
        float* at = out + (panel + j) * LANES;
        if (p.kind == Output::FAR) {
            store_far(at, total[j]);
        } else {
            store(at, p.kind == Output::ADD ? load(at) + total[j] : total[j]);
        }
    }
}

// bf16 with AMX, where the level has it: the rows [row, end) with a strip of so many panels.
void block_amx(const Product& product, int row, int end, int strip, int panels);

// The same in int8, with the bits that gemm.cpp gets. For at least so many rows: with fewer it is
// slower than that.
void block_amx_int8(const Product& product, int row, int end, int strip, int panels);
constexpr int MIN_INT8_TILE_ROWS = 8;

}  // namespace fastserve
