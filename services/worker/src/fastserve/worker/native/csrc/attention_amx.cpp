// Attention in bf16 with tiles of AMX: up to 16 queries are the rows of A, pages are B as they are.
// A tile of keys is whole tiles of B. One of values is 8 words high, half of one.

#include "attend.h"

namespace fastserve {

#if FASTSERVE_AMX

namespace {

constexpr int VALUE_WORDS = LANES / Bf16::STEP;  // of a tile of values: its tokens
constexpr int MAX_TILES = 4;                     // of C

struct Attend {
    const KvPages& kv;
    const AttentionTask& task;
    const int layer;
    const int window;
    const Span span;
    const int count;   // queries: query i is head i % heads of token i / heads
    const size_t row;  // words of scores of a query, an odd number of cache lines or so
    int32_t* query;    // [count, dim / 2]
    float* score;      // [count, row]
    f32x16 best[TILE_ROWS];

    Attend(const KvPages& kv, int layer, const AttentionTask& task, int window, float* scratch)
        : kv(kv), task(task), layer(layer), window(window), span(task, window),
          count(task.tokens * task.heads), row(static_cast<size_t>(span.count + 1) * LANES),
          query(reinterpret_cast<int32_t*>(scratch)), score(scratch + count * kv.dim) {}

    void operator()(const int32_t* queries, int all_heads, float* out, size_t stride) {
        const int words = kv.dim / Bf16::STEP;
        for (int i = 0; i < count; i++) {
            const size_t token = task.token + i / task.heads, head = task.head + i % task.heads;
            memcpy(query + i * words, queries + (token * all_heads + head) * words, words * 4);
            best[i] = splat(NEVER);
        }
        TileShapes shapes;
        shapes.set(count, count);
        int tile = 0;
        for (; tile + MAX_TILES <= span.count; tile += MAX_TILES) scores<MAX_TILES>(tile);
        for (; tile < span.count; tile++) scores<1>(tile);
        float inverse[TILE_ROWS];
        for (int i = 0; i < count; i++) {
            const size_t keys = static_cast<size_t>(span.count) * LANES;
            float sum[1] = {largest(best[i])};
            weights<Bf16>(score + i * row, row, keys, sum);
            inverse[i] = 1.0f / sum[0];
        }
        // Of the last tile only the words that hold tokens: behind them may stand anything.
        const int left = task.position + task.tokens - (span.first + span.count - 1) * LANES;
        shapes.set_short(count, VALUE_WORDS, (left + 1) / Bf16::STEP);
        const int panels = kv.dim / LANES;
        int panel = 0;
        for (; panel + MAX_TILES <= panels; panel += MAX_TILES) {
            values<MAX_TILES>(panel, inverse, out, stride);
        }
        for (; panel < panels; panel += 2) values<2>(panel, inverse, out, stride);
    }

    const int32_t* page(bool of_values, int tile) const {
        return kv.tile(task.table, layer, of_values, task.kv_head, span.first + tile);
    }

    // Scores of NB tiles of keys, and the largest so far.
    template <int NB>
    ALWAYS_INLINE void scores(int tile) {
        const int words = kv.dim / Bf16::STEP;
        const int32_t* keys[NB];
        for (int j = 0; j < NB; j++) keys[j] = page(false, tile + j);
        for (int next = tile + NB; next < std::min(tile + 2 * NB, span.count); next++) {
            fetch(page(false, next), words * LANES);
        }
        for_each<NB>([]<int J>() { tile_zero<J>(); });
        for (int word = 0; word < words; word += TILE_WORDS) {
            tile_load<4>(query + word, words);
            for_each<NB>([&]<int J>() {
                tile_load<6 + J % 2>(keys[J] + word * LANES, LANES);
                tile_dot<J, 4, 6 + J % 2>();
            });
        }
        for_each<NB>([&]<int J>() { tile_store<J>(score + (tile + J) * LANES, row); });
        const float scale = 1.0f / std::sqrt(static_cast<float>(kv.dim));
        for (int i = 0; i < count; i++) {
            const int position = task.position + i / task.heads;
            for (int j = 0; j < NB; j++) {
                float* products = score + i * row + (tile + j) * LANES;
                const f32x16 found = scored(load(products), scale, (span.first + tile + j) * LANES,
                                            position, window);
                best[i] = max(best[i], found);
                store(products, found);
            }
        }
    }

    // The weighted sums of NB * 16 dimensions of the values.
    template <int NB>
    ALWAYS_INLINE void values(int panel, const float (&inverse)[TILE_ROWS], float* out,
                              size_t stride) {
        const auto* weight = reinterpret_cast<const int32_t*>(score);
        const size_t offset = static_cast<size_t>(panel) * VALUE_WORDS * LANES;
        for_each<NB>([]<int J>() { tile_zero<J>(); });
        for (int tile = 0; tile + 1 < span.count; tile++) {
            const int32_t* from = page(true, tile) + offset;
            fetch(page(true, tile + 1) + offset, NB * VALUE_WORDS * LANES);
            tile_load<4>(weight + tile * VALUE_WORDS, row);
            for_each<NB>([&]<int J>() {
                tile_load<5>(from + J * VALUE_WORDS * LANES, LANES);
                tile_dot<J, 4, 5>();
            });
        }
        const int32_t* from = page(true, span.count - 1) + offset;
        tile_load<6>(weight + (span.count - 1) * VALUE_WORDS, row);
        for_each<NB>([&]<int J>() {
            tile_load<7>(from + J * VALUE_WORDS * LANES, LANES);
            tile_dot<J, 6, 7>();
        });
        alignas(64) float sums[TILE_ROWS][NB][LANES];
        for_each<NB>([&]<int J>() { tile_store<J>(sums[0][J], NB * LANES); });
        for (int i = 0; i < count; i++) {
            float* at = out + i / task.heads * stride + i % task.heads * kv.dim + panel * LANES;
            for (int j = 0; j < NB; j++) store(at + j * LANES, load(sums[i][j]) * inverse[i]);
        }
    }
};

}  // namespace

void attend_amx(const KvPages& kv, int layer, const AttentionTask& task, const int32_t* queries,
                int all_heads, int window, float* out, size_t stride, float* scratch) {
    Attend(kv, layer, task, window, scratch)(queries, all_heads, out, stride);
}

#else

void attend_amx(const KvPages&, int, const AttentionTask&, const int32_t*, int, int, float*, size_t,
                float*) {
    __builtin_unreachable();
}

#endif

}  // namespace fastserve
