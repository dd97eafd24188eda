// Products in int8 with tiles of AMX. A tile product is one group of 32 numbers, whose whole numbers
// are exact; they are scaled and added in floats by the operations of gemm.cpp, in the same order, so
// that both get the same bits.

#include <bit>

#include "amx.h"
#include "product.h"

namespace fastserve {

#if FASTSERVE_AMX

namespace {

#define INLINED __attribute__((always_inline))

constexpr int GROUP = group_words(Dtype::INT8);
constexpr int AHEAD = 4;  // groups that are multiplied before the first is read: stores take long

// ROWS rows against a strip. The totals of 16 rows and a panel stay in registers, or of 8 and two.
template <int ROWS>
struct Int8Tiles {
    static constexpr int MOST = ROWS > 8 ? 1 : 2;  // panels at a time
    const Product& p;
    const int row, strip, panels;

    void operator()() const {
        alignas(64) float totals[MAX_PANELS][ROWS][LANES];
        int first = 0;
        for (; first + MOST <= panels; first += MOST) sums<MOST>(first, totals + first);
        for (; first < panels; first++) sums<1>(first, totals + first);
        switch (panels) {
            case 1: return put<1>(totals);
            case 2: return put<2>(totals);
            case 3: return put<3>(totals);
            case 4: return put<4>(totals);
        }
    }

    // The totals of NB panels from `first` of the strip on.
    template <int NB>
    ALWAYS_INLINE void sums(int first, float (*totals)[ROWS][LANES]) const {
        const Rows& x = p.x;
        const Linear& w = p.w;
        const size_t vectors = static_cast<size_t>(strip) * w.width * LANES;
        const int32_t* weights = w.data + vectors * w.words + first * LANES;
        const uint16_t* scales = w.scale + vectors * w.groups + first * LANES;
        const int32_t* inputs = x.data.get() + static_cast<size_t>(row) * x.words;
        const size_t pitch = static_cast<size_t>(panels) * LANES;
        const int groups = x.groups, words = x.words;
        alignas(64) int32_t products[AHEAD][NB][ROWS][LANES];
        f32x16 total[NB][ROWS];
        for_each<NB * ROWS>([&]<int I>() INLINED { total[I / ROWS][I % ROWS] = f32x16{}; });
        const auto multiply = [&]<int AT>(int group) INLINED {
            tile_load<4 + AT % 2>(inputs + group * Rows::INT8_PITCH, words);
            for_each<NB>([&]<int J>() INLINED {
                constexpr int C = (AT * NB + J) % 4, B = 6 + (AT * NB + J) % 2;
                tile_zero<C>();
                tile_load<B>(weights + group * GROUP * pitch + J * LANES, pitch);
                tile_dot_int8<C, 4 + AT % 2, B>();
                tile_store<C>(products[AT][J], LANES);
            });
        };
        const auto scale = [&]<int AT>(int group) INLINED {
            for_each<NB>([&]<int J>() INLINED {
                const f32x16 weight = load_bf16(scales + group * pitch + J * LANES);
                const int32_t* rows = inputs + group * Rows::INT8_PITCH + Rows::SCALE;
                for_each<ROWS>([&]<int I>() INLINED {
                    const f32x16 s = splat(std::bit_cast<float>(rows[I * words]));
                    const i32x16 sums = *reinterpret_cast<const i32x16*>(products[AT][J][I]);
                    total[J][I] += to_float(sums) * weight * s;
                });
            });
        };
        for_each<AHEAD>([&]<int AT>() INLINED {
            if (AT < groups) multiply.template operator()<AT>(AT);
        });
        for (int group = 0; group < groups; group += AHEAD) {
            for_each<AHEAD>([&]<int AT>() INLINED {
                if (group + AT < groups) scale.template operator()<AT>(group + AT);
                if (group + AT + AHEAD < groups) {
                    multiply.template operator()<AT>(group + AT + AHEAD);
                }
            });
        }
        for_each<NB * ROWS>([&]<int I>() INLINED {
            store(totals[I / ROWS][I % ROWS], total[I / ROWS][I % ROWS]);
        });
    }

    template <int NB>
    ALWAYS_INLINE void put(const float (*totals)[ROWS][LANES]) const {
        for (int i = 0; i < ROWS; i++) {
            f32x16 total[NB];
            for (int j = 0; j < NB; j++) total[j] = load(totals[j][i]);
            finish<NB>(p, row + i, strip * p.w.width, total);
        }
    }
};

template <int ROWS>
void run(const Product& p, int row, int rows, int strip, int panels) {
    if constexpr (ROWS >= MIN_INT8_TILE_ROWS) {
        if (rows < ROWS) return run<ROWS - 1>(p, row, rows, strip, panels);
        Int8Tiles<ROWS>{p, row, strip, panels}();
    }
}

}  // namespace

void block_amx_int8(const Product& p, int row, int end, int strip, int panels) {
    TileShapes shapes;
    int shaped = 0;
    for (int tiles = (end - row + TILE_ROWS - 1) / TILE_ROWS; tiles > 0; tiles--) {
        const int rows = (end - row + tiles - 1) / tiles;  // evenly, so never few
        if (rows != shaped) shapes.set_int8(shaped = rows, GROUP);
        run<TILE_ROWS>(p, row, rows, strip, panels);
        row += rows;
    }
}

#else

void block_amx_int8(const Product&, int, int, int, int) { __builtin_unreachable(); }

#endif

}  // namespace fastserve
