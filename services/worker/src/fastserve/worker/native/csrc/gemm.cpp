#include "gemm.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "product.h"

namespace fastserve {

namespace {

// Rows and panels of a tile: 24 accumulators, 4 vectors of weights and an input fill the 32
// registers.
constexpr int MAX_ROWS = 6;
constexpr int ROW_BLOCK = 192;  // rows whose words stay in the second-level cache

// An accumulator for the group of inputs at `at`.
template <class T>
ALWAYS_INLINE typename T::Acc fresh(const int32_t* at) {
    if constexpr (std::is_same_v<T, Int8>) return splat(at[Rows::CORRECTION]);
    return typename T::Acc{};
}

// What a strip fetches of some pieces, a few lines at a time.
class Lines {
public:
    // In each of `steps` steps with so many words of inputs.
    Lines(const Pieces& pieces, int steps, int words) : pieces_(pieces) {
        // More than a line per word is more than memory delivers meanwhile.
        each_ = std::min((pieces.count * pieces.lines + steps - 1) / steps, words);
        begin();
    }

    ALWAYS_INLINE void step() {
        for (int i = 0; i < each_ && left_ > 0; i++) {
            __builtin_prefetch(at_, 0, 2);
            at_ += LINE;
            if (--left_ == 0) begin();
        }
    }

private:
    static constexpr int LINE = 64;

    void begin() {
        if (begun_ == pieces_.count) return;
        at_ = pieces_.base + pieces_.pitch * pieces_.index[begun_++];
        left_ = pieces_.lines;
    }

    const Pieces pieces_;
    int each_, begun_ = 0;
    const char* at_ = nullptr;
    int left_ = 0;  // lines of the piece
};

// What is fetched into the second-level cache meanwhile.
struct Ahead {
    const int32_t* weights = nullptr;
    int vectors = 0;
    Lines* lines = nullptr;
};

// MR rows from `row` on, with a strip of NB panels.
template <class T, int MR, int NB>
void tile(const Product& p, int row, int strip, Pool::Claim& claim, Ahead ahead) {
    constexpr bool INT8 = std::is_same_v<T, Int8>;
    constexpr int GROUP = group_words(INT8 ? Dtype::INT8 : Dtype::F32);
    constexpr int PITCH = INT8 ? Rows::INT8_PITCH : GROUP;
    const Rows& x = p.x;
    const Linear& w = p.w;
    const int panel = strip * w.width;
    const size_t vectors = static_cast<size_t>(panel) * LANES;  // before this strip, per word
    const int32_t* weights = w.data + vectors * w.words;
    const uint16_t* scales = w.scale + vectors * w.groups;
    const int32_t* inputs = x.data.get() + static_cast<size_t>(row) * x.words;
    const int fetches = (ahead.vectors + x.groups - 1) / x.groups;  // while a group is computed
    f32x16 total[MR][NB];
    UNROLLED for (int i = 0; i < MR; i++) {
        UNROLLED for (int j = 0; j < NB; j++) total[i][j] = f32x16{};
    }
    for (int group = 0; group < x.groups; group++, inputs += PITCH) {
        for (int i = 0; i < fetches; i++, ahead.weights += LANES) {
            __builtin_prefetch(ahead.weights, 0, 2);
        }
        if (ahead.lines != nullptr) ahead.lines->step();
        if (INT8 && fetches > 0) {  // the scales of the next strip, too
            __builtin_prefetch(scales + (x.groups + group) * NB * LANES, 0, 2);
        }
        const int first = group * GROUP;
        typename T::Acc acc[MR][NB];
        const int32_t* at[NB];
        UNROLLED for (int j = 0; j < NB; j++) at[j] = weights + (first * NB + j) * LANES;
        UNROLLED for (int i = 0; i < MR; i++) {
            UNROLLED for (int j = 0; j < NB; j++) acc[i][j] = fresh<T>(inputs + i * x.words);
        }
        accumulate<T, NB>(acc, inputs, x.words, at, std::min(GROUP, w.words - first));
        f32x16 scale[NB];
        if constexpr (INT8) {
            UNROLLED for (int j = 0; j < NB; j++) {
                scale[j] = load_bf16(scales + (group * NB + j) * LANES);
            }
        }
        UNROLLED for (int i = 0; i < MR; i++) {
            UNROLLED for (int j = 0; j < NB; j++) {
                if constexpr (INT8) {
                    const auto s = std::bit_cast<float>(inputs[i * x.words + Rows::SCALE]);
                    total[i][j] += to_float(acc[i][j]) * scale[j] * s;
                } else {
                    total[i][j] += acc[i][j];
                }
            }
        }
    }
    if (!claim()) return;
    UNROLLED for (int i = 0; i < MR; i++) finish<NB>(p, row + i, panel, total[i]);
}

using Tile = void (*)(const Product&, int row, int strip, Pool::Claim&, Ahead);

// Tiles of MR rows and 1 to 4 panels.
template <class T, int MR>
constexpr Tile TILES[MAX_PANELS] = {tile<T, MR, 1>, tile<T, MR, 2>, tile<T, MR, 3>, tile<T, MR, 4>};

template <class T, int MR>
constexpr const Tile* tiles_of(int rows) {
    if constexpr (MR == 0) {
        return nullptr;
    } else {
        return rows == MR ? TILES<T, MR> : tiles_of<T, MR - 1>(rows);
    }
}

// The rows [row, end) with a strip of so many panels.
template <class T>
void block(const Product& product, int row, int end, int strip, int panels) {
    // With fewer tiles memory is the limit, and to fetch what comes next would hold this up.
    constexpr int AHEAD_TILES = std::is_same_v<T, Int8> ? 2 : 3, PIECES_TILES = 3;
    const Linear& w = product.w;
    const int all = (end - row + MAX_ROWS - 1) / MAX_ROWS, vectors = panels * w.words;
    const int32_t* next = w.data + (static_cast<size_t>(strip) * w.width + panels) * w.words * LANES;
    const Pieces& ahead = product.ahead;
    const int strips = w.strips(), groups = product.x.groups;
    Lines lines(ahead.part(static_cast<int64_t>(ahead.count) * strip / strips,
                           static_cast<int64_t>(ahead.count) * (strip + 1) / strips),
                all * groups, group_words(w.dtype));
    Pool::Claim sure;
    for (int tiles = all; tiles > 0; tiles--) {
        const int count = (end - row + tiles - 1) / tiles;  // evenly, not 6, 6, 1
        Ahead fetched;
        if (all >= AHEAD_TILES) {  // a part of the next strip
            fetched = {next + (all - tiles) * vectors / all * LANES, vectors / all};
        }
        if (all >= PIECES_TILES) fetched.lines = &lines;
        tiles_of<T, MAX_ROWS>(count)[panels - 1](product, row, strip, sure, fetched);
        row += count;
    }
}

void block_int8(const Product& product, int row, int end, int strip, int panels) {
    const bool tiles = AMX && end - row >= MIN_INT8_TILE_ROWS;
    (tiles ? block_amx_int8 : block<Int8>)(product, row, end, strip, panels);
}

}  // namespace

void multiply(Pool& pool, const Rows& x, int rows, const Linear& w, Output kind, float* out,
              size_t stride, Rows* words, const Pieces& ahead) {
    const auto run = w.dtype == Dtype::F32    ? block<F32>
                     : w.dtype == Dtype::INT8 ? block_int8
                     : AMX                    ? block_amx
                                              : block<Bf16>;
    const Product product{x, w, kind, out, stride, ahead};
    if (rows <= MAX_ROWS && !(AMX && w.dtype == Dtype::BF16)) {  // a tile for each strip
        const Tile* tiles = w.dtype == Dtype::F32    ? tiles_of<F32, MAX_ROWS>(rows)
                            : w.dtype == Dtype::INT8 ? tiles_of<Int8, MAX_ROWS>(rows)
                                                     : tiles_of<Bf16, MAX_ROWS>(rows);
        pool.race(w.strips(), [product, tiles](int strip, int, Pool::Claim& claim) {
            const Linear& w = product.w;
            tiles[std::min(w.width, w.panels - strip * w.width) - 1](product, 0, strip, claim, {});
        });
        if (words != nullptr) {
            pool.each(rows, [&](int row, int) { words->put(row, out + row * stride); });
        }
        return;
    }
    // Whoever has computed the numbers makes words of them, as soon as whole groups are there.
    const int outputs = w.width * LANES / (kind == Output::SWIGLU ? 2 : 1);  // of a strip
    const int group = group_words(w.dtype) * step_of(w.dtype);
    const int together = words != nullptr ? (group + outputs - 1) / outputs : 1;
    const int parts = (w.strips() + together - 1) / together;
    const int blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    pool.each(parts * blocks, [&](int task, int) {
        const int begin = task % parts * together, first = task / parts * ROW_BLOCK;
        const int end = std::min(rows, first + ROW_BLOCK);
        for (int strip = begin; strip < std::min(begin + together, w.strips()); strip++) {
            run(product, first, end, strip, std::min(w.width, w.panels - strip * w.width));
        }
        if (words == nullptr) return;
        const int from = begin * outputs, to = std::min(words->size, from + together * outputs);
        words->put(first, end, out + first * stride + from, stride, from, to);
    });
}

void Linear::pack(Arena& arena, Dtype new_dtype, int new_outputs, int new_inputs,
                  const float* weight, const float* new_bias, bool halves) {
    dtype = new_dtype;
    outputs = new_outputs;
    inputs = new_inputs;
    const int step = step_of(dtype), group = group_words(dtype);
    words = words_of(dtype, inputs);
    const int half = padded(outputs / 2);  // outputs of a half, with padding
    panels = (halves ? 2 * half : padded(outputs)) / LANES;
    // Few panels: narrow strips, so that every thread gets as much as the others. In int8 the totals
    // change after every 8 words, and with narrow strips there are registers for them too.
    width = panels >= 96 && dtype != Dtype::INT8 ? MAX_PANELS : MAX_PANELS / 2;
    groups = (words + group - 1) / group;
    data = arena.take<int32_t>(static_cast<size_t>(panels) * words * LANES);
    if (dtype == Dtype::INT8) {
        scale = arena.take<uint16_t>(static_cast<size_t>(panels) * groups * LANES);
    }
    if (new_bias != nullptr) bias = arena.take<float>(static_cast<size_t>(panels) * LANES);
    for (int place = 0; place < panels * LANES; place++) {
        const int panel = place / LANES, lane = place % LANES;
        // Row of `weight` that stands here; -1: padding.
        int source = place < outputs ? place : -1;
        if (halves) {
            const int in_half = panel / 2 * LANES + lane;
            source = in_half < outputs / 2 ? in_half + panel % 2 * (outputs / 2) : -1;
        }
        const float* row = source < 0 ? nullptr : weight + static_cast<size_t>(source) * inputs;
        const int strip = panel / width, panels_here = std::min(width, panels - strip * width);
        // Of word or group i: this many vectors after the beginning of the strip.
        const int run = dtype == Dtype::BF16 ? BF16_RUN : 1;
        const auto vector = [&](int i) {
            return (size_t(i / run) * panels_here + panel % width) * run + i % run;
        };
        int32_t* out = data + static_cast<size_t>(strip) * width * words * LANES + lane;
        uint16_t* scales = scale + static_cast<size_t>(strip) * width * groups * LANES + lane;
        float inverse = 0.0f;
        if (new_bias != nullptr && source >= 0) bias[place] = new_bias[source];
        for (int word = 0; word < words; word++) {
            if (dtype == Dtype::INT8 && word % group == 0 && row != nullptr) {
                float highest = 0.0f;
                for (int i = word * step; i < std::min(inputs, (word + group) * step); i++) {
                    highest = std::max(highest, std::fabs(row[i]));
                }
                const uint16_t rounded = to_bf16(highest / 127.0f);
                scales[vector(word / group) * LANES] = rounded;
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
                    // Beyond 127 only where the scale was rounded down.
                    const int number = std::clamp(static_cast<int>(std::nearbyintf(v * inverse)), -127, 127);
                    bits |= static_cast<uint32_t>((number + Int8::OFFSET) & 0xff) << (8 * part);
                }
            }
            out[vector(word) * LANES] = static_cast<int32_t>(bits);
        }
    }
}

}  // namespace fastserve
