// Products in bf16 with tiles of AMX. Every output is summed in a tile of its own from the first
// word to the last, for one row as for 512.

#include <algorithm>

#include "amx.h"
#include "product.h"

namespace fastserve {

#if FASTSERVE_AMX

namespace {

constexpr int TILE = TILE_WORDS * LANES;  // words of a tile of weights

// The rows of A in one tile or two, against NB panels from `first` of a strip on.
template <int ROW_TILES, int NB>
struct Tiles {
    static_assert(ROW_TILES * NB <= 4);
    const Product& p;
    const int row, rows;
    const int strip, first, panels;

    // C tile of row tile i and panel j.
    static constexpr int c(int i, int j) { return ROW_TILES == 1 ? j : 2 * i + j; }

    void operator()() const {
        for_each<NB>([]<int J>() {
            tile_zero<c(0, J)>();
            if constexpr (ROW_TILES == 2) tile_zero<c(1, J)>();
        });
        const int words = p.w.words, panel = strip * p.w.width;
        const int32_t* inputs = p.x.data.get() + static_cast<size_t>(row) * words;
        const int32_t* weights =
            p.w.data + static_cast<size_t>(panel) * words * LANES + first * TILE;
        for (int word = 0; word < words; word += TILE_WORDS) {
            tile_load<4>(inputs + word, words);
            if constexpr (ROW_TILES == 2) {
                tile_load<5>(inputs + static_cast<size_t>(TILE_ROWS) * words + word, words);
            }
            for_each<NB>([&]<int J>() {
                tile_load<6 + J % 2>(weights + J * TILE, LANES);
                tile_dot<c(0, J), 4, 6 + J % 2>();
                if constexpr (ROW_TILES == 2) tile_dot<c(1, J), 5, 6 + J % 2>();
            });
            weights += panels * TILE;
        }
        alignas(64) float totals[ROW_TILES * TILE_ROWS][NB][LANES];
        for_each<NB>([&]<int J>() {
            tile_store<c(0, J)>(totals[0][J], NB * LANES);
            if constexpr (ROW_TILES == 2) tile_store<c(1, J)>(totals[TILE_ROWS][J], NB * LANES);
        });
        for (int i = 0; i < rows; i++) {
            f32x16 total[NB];
            for (int j = 0; j < NB; j++) total[j] = load(totals[i][j]);
            finish<NB>(p, row + i, panel + first, total);
        }
    }
};

}  // namespace

void block_amx(const Product& p, int row, int end, int strip, int panels) {
    TileShapes shapes;
    // Two by two tiles: each that is loaded is used twice.
    for (; end - row > TILE_ROWS; row += 2 * TILE_ROWS) {
        const int rows = std::min(end - row, 2 * TILE_ROWS);
        shapes.set(TILE_ROWS, rows - TILE_ROWS);
        int first = 0;
        for (; first + 2 <= panels; first += 2) Tiles<2, 2>{p, row, rows, strip, first, panels}();
        if (first < panels) Tiles<2, 1>{p, row, rows, strip, first, panels}();
    }
    // Few rows: the whole strip at once, so that memory is read from end to end.
    const int rows = end - row;
    if (rows <= 0) return;
    shapes.set(rows, rows);
    switch (panels) {
        case 1: return Tiles<1, 1>{p, row, rows, strip, 0, panels}();
        case 2: return Tiles<1, 2>{p, row, rows, strip, 0, panels}();
        case 3: return Tiles<1, 3>{p, row, rows, strip, 0, panels}();
        case 4: return Tiles<1, 4>{p, row, rows, strip, 0, panels}();
    }
}

#else

void block_amx(const Product&, int, int, int, int) { __builtin_unreachable(); }

#endif

}  // namespace fastserve
