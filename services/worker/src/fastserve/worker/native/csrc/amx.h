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

#if defined(__AMX_BF16__)
constexpr bool AMX = true;
#else
constexpr bool AMX = false;
#endif

constexpr int TILE_ROWS = 16;
constexpr int TILE_WORDS = 16;

#if defined(__AMX_BF16__)

// The shapes of a thread's tiles, for as long as this lives:
//   C of first rows: 0, 1; of second rows: 2, 3; A: first rows 4, second rows 5; B: 6, 7.
// Whoever else uses tiles in the thread (PyTorch does) sets its own shapes, so none are kept.
class TileShapes {
public:
    TileShapes() = default;
    ~TileShapes() { asm volatile("tilerelease" ::: "memory"); }
    TileShapes(const TileShapes&) = delete;
    TileShapes& operator=(const TileShapes&) = delete;

    // Rows of the first and of the second tile of A, 1 to 16.
    void set(int first, int second) {
        const int rows[] = {first, first, second, second, first, second, TILE_ROWS, TILE_ROWS};
        for (int tile = 0; tile < 8; tile++) {
            config_.row_bytes[tile] = TILE_WORDS * 4;
            config_.rows[tile] = static_cast<uint8_t>(rows[tile]);
        }
        asm volatile("ldtilecfg %0" ::"m"(config_) : "memory");
    }

private:
    struct alignas(64) {
        uint8_t palette = 1;
        uint8_t start_row = 0;
        uint8_t reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config_;
};

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
ALWAYS_INLINE void tile_store(float* to, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * 4), "i"(TILE) : "memory");
}

// C += A x B in bf16.
template <int C, int A, int B>
ALWAYS_INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace fastserve
