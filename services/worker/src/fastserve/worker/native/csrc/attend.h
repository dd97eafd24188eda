// What the ways to attend (attention.cpp, attention_amx.cpp) share.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "amx.h"
#include "attention.h"

namespace fastserve {

constexpr f32x16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Pages lie far apart, which the hardware does not foresee: one tile is fetched while another is used.
ALWAYS_INLINE void fetch(const int32_t* from, int words) {
    UNROLLED for (int i = 0; i < words; i += LANES) __builtin_prefetch(from + i);
}

// The keys that a task looks at, in tiles.
struct Span {
    int first, count;  // tiles

    Span(const AttentionTask& task, int window) {
        const int from = window ? std::max(0, task.position - window + 1) : 0;
        first = from / LANES;
        count = (task.position + task.tokens - 1) / LANES + 1 - first;
    }
};

// The products of a query at `position` with the 16 keys from `key` on become scores: -inf for keys
// that it does not see. window 0: it sees all before it.
ALWAYS_INLINE f32x16 scored(f32x16 products, float scale, int key, int position, int window) {
    const f32x16 keys = LANE + static_cast<float>(key);
    const float newest = static_cast<float>(position);
    const float oldest = window ? newest - static_cast<float>(window) : -1.0f;
    f32x16 found = products * scale;
    found = keys > newest ? splat(NEVER) : found;
    return keys > oldest ? found : splat(NEVER);
}

// Turns the scores of N queries, `row` floats apart, over `count` keys into weights in the format T,
// as words along the tokens, in place. best: the largest score of each; becomes the sum of weights.
template <class T, int N>
ALWAYS_INLINE void weights(float* score, size_t row, size_t count, float (&best)[N]) {
    f32x16 total[N];
    UNROLLED for (int i = 0; i < N; i++) total[i] = f32x16{};
    for (size_t t = 0; t < count; t += LANES) {
        f32x16 weight[N];
        UNROLLED for (int i = 0; i < N; i++) weight[i] = load(score + i * row + t) - best[i];
        exp(weight);
        UNROLLED for (int i = 0; i < N; i++) {
            total[i] += weight[i];
            if constexpr (T::STEP == 1) {
                store(score + i * row + t, weight[i]);
            } else {  // half as wide, so never ahead of what is still to be read
                const u16x16 rounded = to_bf16(weight[i]);
                memcpy(reinterpret_cast<uint16_t*>(score + i * row) + t, &rounded, sizeof rounded);
            }
        }
    }
    UNROLLED for (int i = 0; i < N; i++) best[i] = sum(total[i]);
}

// As `attend`, in bf16 with AMX, where can_attend_amx says so.
void attend_amx(const KvPages& kv, int layer, const AttentionTask& task, const int32_t* queries,
                int all_heads, int window, float* out, size_t stride, float* scratch);

constexpr bool can_attend_amx(Dtype kv, int dim) {
    return AMX && kv == Dtype::BF16 && dim % (TILE_WORDS * Bf16::STEP) == 0;
}

}  // namespace fastserve
