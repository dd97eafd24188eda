// Tiles of AMX: eight registers of up to 16 rows of 64 bytes, and products of whole tiles.
//
// A product adds A [rows, 16 words] x B [16 words, 16 outputs] to C [rows, 16 outputs]. A row of C
// depends on that row of A alone, and its sum over the words has one order whatever the rows are.
//
// Spelled out as assembly, since compilers do not take a template's number for a register.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace fastserve {

constexpr int TILE_ROWS = 16;
constexpr int TILE_WORDS = 16;

#if FASTSERVE_AMX

// The shapes of a thread's tiles, for as long as this lives. Setting them empties the tiles.
// Whoever else uses tiles in the thread (PyTorch does) sets its own shapes, so none are kept.
class TileShapes {
public:
    TileShapes() = default;
    ~TileShapes() { asm volatile("tilerelease" ::: "memory"); }
    TileShapes(const TileShapes&) = delete;
    TileShapes& operator=(const TileShapes&) = delete;

    // Rows of a first and of a second tile of A, 1 to 16, and of what belongs to them.
    // C of first rows: 0, 1; of second rows: 2, 3; A: first rows 4, second rows 5; B: 6, 7.
    void set(int first, int second) {
        const int rows[] = {first, first, second, second, first, second};
        for (int tile = 0; tile < 6; tile++) shape(tile, rows[tile], TILE_WORDS);
        for (int tile = 6; tile < 8; tile++) shape(tile, TILE_WORDS, LANES);
        load();
    }

    // C of `rows`: 0 to 3; A and B of `words`: 4, 5; of `last_words`: 6, 7. Words: 1 to 16.
    void set_short(int rows, int words, int last_words) {
        for (int tile = 0; tile < 4; tile++) shape(tile, rows, LANES);
        shape(4, rows, words);
        shape(5, words, LANES);
        shape(6, rows, last_words);
        shape(7, last_words, LANES);
        load();
    }

    // int8: C and A of `rows` rows, 0 to 3 and 4, 5; `words` words of A and B, B: 6, 7.
    void set_int8(int rows, int words) {
        for (int tile = 0; tile < 4; tile++) shape(tile, rows, LANES);
        for (int tile = 4; tile < 6; tile++) shape(tile, rows, words);
        for (int tile = 6; tile < 8; tile++) shape(tile, words, LANES);
        load();
    }

private:
    void shape(int tile, int rows, int words) {
        config_.rows[tile] = static_cast<uint8_t>(rows);
        config_.row_bytes[tile] = static_cast<uint16_t>(words * 4);
    }

    void load() { asm volatile("ldtilecfg %0" ::"m"(config_) : "memory"); }

    struct alignas(64) {
        uint8_t palette = 1;
        uint8_t start_row = 0;
        uint8_t reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config_;
};

// action<0>() to action<N - 1>(): a tile's number has to be known to the compiler.
template <int N, class Action>
ALWAYS_INLINE void for_each(const Action& action) {
    if constexpr (N > 0) {
        for_each<N - 1>(action);
        action.template operator()<N - 1>();
    }
}

template <int TILE>
ALWAYS_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

// Rows are `stride` words apart.
template <int TILE>
ALWAYS_INLINE void tile_load(const int32_t* from, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * 4), "i"(TILE) : "memory");
}

template <int TILE>
ALWAYS_INLINE void tile_store(void* to, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * 4), "i"(TILE) : "memory");
}

// C += A x B in bf16.
template <int C, int A, int B>
ALWAYS_INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// C += A x B in int8, both with a sign, into whole numbers.
template <int C, int A, int B>
ALWAYS_INLINE void tile_dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace fastserve
