#include "gemm.h"

#include <algorithm>
#include <cmath>

namespace fastserve {

namespace {

constexpr int MAX_ROWS = 6;    // rows and panels of a tile: 24 accumulators, 4 weights and an input
constexpr int MAX_PANELS = 4;  // fill the 32 registers
constexpr int ROW_BLOCK = 192;  // rows whose words stay in the second-level cache

struct Product {
    const Rows& x;
    const Linear& w;
    Output kind;
    float* out;
    size_t stride;
};

template <class T>
ALWAYS_INLINE typename T::Acc fresh(const Rows& x, int row, int group) {
    if constexpr (std::is_same_v<T, Int8>) return splat(x.correction[row * x.groups + group]);
    return typename T::Acc{};
}

// MR rows from `row` on, with NB panels from `panel` on.
template <class T, int MR, int NB>
void tile(const Product& p, int row, int panel) {
    constexpr bool INT8 = std::is_same_v<T, Int8>;
    constexpr int GROUP = INT8 ? GROUP_WORDS : FLOAT_GROUP_WORDS;
    const Rows& x = p.x;
    const Linear& w = p.w;
    const size_t panel_words = static_cast<size_t>(w.words) * LANES;
    const int32_t* weights = w.data.get() + panel * panel_words;
    const uint16_t* scales = w.scale.get() + static_cast<size_t>(panel) * w.groups * LANES;
    const int32_t* inputs = x.data.get() + static_cast<size_t>(row) * x.words;
    f32x16 total[MR][NB] = {};
    for (int group = 0; group < x.groups; group++) {
        const int first = group * GROUP;
        typename T::Acc acc[MR][NB];
        const int32_t* at[NB];
        for (int j = 0; j < NB; j++) at[j] = weights + j * panel_words + first * LANES;
        for (int i = 0; i < MR; i++) {
            for (int j = 0; j < NB; j++) acc[i][j] = fresh<T>(x, row + i, group);
        }
        accumulate<T>(acc, inputs + first, x.words, at, std::min(GROUP, w.words - first));
        if constexpr (INT8) {
            f32x16 scale[NB];
            for (int j = 0; j < NB; j++) scale[j] = load_bf16(scales + (j * w.groups + group) * LANES);
            for (int i = 0; i < MR; i++) {
                const f32x16 s = splat(x.scale[(row + i) * x.groups + group]);
                for (int j = 0; j < NB; j++) total[i][j] += to_float(acc[i][j]) * scale[j] * s;
            }
        } else {
            for (int i = 0; i < MR; i++) {
                for (int j = 0; j < NB; j++) total[i][j] += acc[i][j];
            }
        }
    }
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NB; j++) {
            const int column = (panel + j) * LANES;
            if (w.bias.get() != nullptr) total[i][j] += load(w.bias.get() + column);
        }
        float* out = p.out + (row + i) * p.stride;
        if (p.kind == Output::SWIGLU) {
            for (int j = 0; j + 1 < NB; j += 2) {
                store(out + (panel + j) / 2 * LANES, silu(total[i][j]) * total[i][j + 1]);
            }
            continue;
        }
        for (int j = 0; j < NB; j++) {
            float* at = out + (panel + j) * LANES;
            store(at, p.kind == Output::ADD ? load(at) + total[i][j] : total[i][j]);
        }
    }
}

using Tile = void (*)(const Product&, int row, int panel);

template <class T, int MR>
constexpr void fill(Tile (&row)[MAX_PANELS]) {
    row[0] = tile<T, MR, 1>;
    row[1] = tile<T, MR, 2>;
    row[2] = tile<T, MR, 3>;
    row[3] = tile<T, MR, 4>;
}

template <class T>
struct Tiles {
    Tile of[MAX_ROWS][MAX_PANELS];
    constexpr Tiles() : of() {
        fill<T, 1>(of[0]);
        fill<T, 2>(of[1]);
        fill<T, 3>(of[2]);
        fill<T, 4>(of[3]);
        fill<T, 5>(of[4]);
        fill<T, 6>(of[5]);
    }
};

constexpr Tiles<F32> F32_TILES;
constexpr Tiles<Bf16> BF16_TILES;
constexpr Tiles<Int8> INT8_TILES;

}  // namespace

void multiply(Pool& pool, const Rows& x, int rows, const Linear& w, Output kind, float* out,
              size_t stride) {
    const auto& tiles = w.dtype == Dtype::F32    ? F32_TILES.of
                        : w.dtype == Dtype::BF16 ? BF16_TILES.of
                                                 : INT8_TILES.of;
    const Product product{x, w, kind, out, stride};
    // Few panels: narrower strips, so that every thread gets as much as the others.
    const int width = w.panels >= 24 * pool.threads() ? MAX_PANELS : MAX_PANELS / 2;
    const int strips = (w.panels + width - 1) / width;
    const int blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    pool.each(strips * blocks, [&](int task) {
        const int first = task / strips * ROW_BLOCK;
        const int panel = task % strips * width;
        const int panels = std::min(width, w.panels - panel);
        int left = std::min(ROW_BLOCK, rows - first);
        int row = first;
        for (int tiles_left = (left + MAX_ROWS - 1) / MAX_ROWS; tiles_left > 0; tiles_left--) {
            const int count = (left + tiles_left - 1) / tiles_left;  // evenly, not 6, 6, 1
            tiles[count - 1][panels - 1](product, row, panel);
            row += count;
            left -= count;
        }
    });
}

void Rows::shape(Dtype new_dtype, int new_size, int rows) {
    dtype = new_dtype;
    size = new_size;
    words = padded(size) / step_of(dtype);
    groups = (words + group_words(dtype) - 1) / group_words(dtype);
    data.reserve(static_cast<size_t>(rows) * words);
    scale.reserve(static_cast<size_t>(rows) * groups);
    correction.reserve(static_cast<size_t>(rows) * groups);
}

void Rows::put(int row, const float* x) {
    int32_t* out = data.get() + static_cast<size_t>(row) * words;
    if (dtype == Dtype::F32) {
        for (int i = 0; i < padded(size); i += LANES) {
            store(reinterpret_cast<float*>(out) + i, load(x + i));
        }
        return;
    }
    if (dtype == Dtype::BF16) {
        auto* halves = reinterpret_cast<uint16_t*>(out);
        for (int i = 0; i < padded(size); i += LANES) {
            const u16x16 rounded = to_bf16(load(x + i));
            memcpy(halves + i, &rounded, sizeof rounded);
        }
        return;
    }
    auto* bytes = reinterpret_cast<int8_t*>(out);
    constexpr int GROUP = GROUP_WORDS * Int8::STEP;
    for (int group = 0; group < groups; group++) {
        const int first = group * GROUP, end = std::min(first + GROUP, padded(size));
        f32x16 most{}, spoilt{};
        for (int i = first; i < end; i += LANES) {
            const f32x16 v = load(x + i);
            most = max(most, max(v, -v));
            spoilt += v - v;  // 0, but NaN where v is not finite
        }
        const float highest = largest(most);
        const float inverse = highest > 0.0f ? 127.0f / highest : 0.0f;
        i32x16 total{};
        for (int i = first; i < end; i += LANES) {
            const i32x16 number = __builtin_convertvector(round(load(x + i) * inverse), i32x16);
            total += number;
            const i8x16 narrow = __builtin_convertvector(number, i8x16);
            memcpy(bytes + i, &narrow, sizeof narrow);
        }
        // What is not finite has to stay so: the engine fails such a job.
        scale[row * groups + group] = highest / 127.0f + sum(spoilt);
        correction[row * groups + group] = -128 * sum(total);
    }
}

void Linear::pack(Dtype new_dtype, int new_outputs, int new_inputs, const float* weight,
                  const float* new_bias, bool halves) {
    dtype = new_dtype;
    outputs = new_outputs;
    inputs = new_inputs;
    const int step = step_of(dtype);
    words = padded(inputs) / step;
    const int half = padded(outputs / 2);  // outputs of a half, with padding
    panels = (halves ? 2 * half : padded(outputs)) / LANES;
    data = Buffer<int32_t>(static_cast<size_t>(panels) * words * LANES);
    groups = (words + group_words(dtype) - 1) / group_words(dtype);
    if (dtype == Dtype::INT8) scale = Buffer<uint16_t>(static_cast<size_t>(panels) * groups * LANES);
    if (new_bias != nullptr) bias = Buffer<float>(panels * LANES);
    for (int place = 0; place < panels * LANES; place++) {
        const int panel = place / LANES, lane = place % LANES;
        // Row of `weight` that stands here; -1: padding.
        int source = place < outputs ? place : -1;
        if (halves) {
            const int in_half = panel / 2 * LANES + lane;
            source = in_half < outputs / 2 ? in_half + panel % 2 * (outputs / 2) : -1;
        }
        const float* row = source < 0 ? nullptr : weight + static_cast<size_t>(source) * inputs;
        int32_t* out = data.get() + static_cast<size_t>(panel) * words * LANES + lane;
        float inverse = 0.0f;
        if (new_bias != nullptr && source >= 0) bias[place] = new_bias[source];
        for (int word = 0; word < words; word++) {
            if (dtype == Dtype::INT8 && word % GROUP_WORDS == 0) {
                float highest = 0.0f;
                for (int i = word * step; i < std::min(inputs, (word + GROUP_WORDS) * step); i++) {
                    if (row != nullptr) highest = std::max(highest, std::fabs(row[i]));
                }
                // Rounded up, so that nothing exceeds 127.
                const uint16_t rounded = to_bf16(highest / 127.0f * (1.0f + 1.0f / 256));
                scale[(static_cast<size_t>(panel) * groups + word / GROUP_WORDS) * LANES + lane] =
                    rounded;
                inverse = highest > 0.0f ? 1.0f / from_bf16(rounded) : 0.0f;
            }
            uint32_t bits = 0;
            for (int part = 0; part < step; part++) {
                const int i = word * step + part;
                const float v = row != nullptr && i < inputs ? row[i] : 0.0f;
                if (dtype == Dtype::F32) {
                    memcpy(&bits, &v, sizeof bits);
                } else if (dtype == Dtype::BF16) {
                    bits |= static_cast<uint32_t>(to_bf16(v)) << (16 * part);
                } else {
                    const int number = std::clamp(static_cast<int>(std::nearbyintf(v * inverse)), -127, 127);
                    bits |= static_cast<uint32_t>(number + 128) << (8 * part);
                }
            }
            out[static_cast<size_t>(word) * LANES] = static_cast<int32_t>(bits);
        }
    }
}

}  // namespace fastserve
