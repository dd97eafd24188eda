#include "attend.h"

namespace fastserve {

namespace {

constexpr int MAX_QUERIES = 6;  // of a task: see `dispatch`

// One task, N queries: query i is head i % heads of token i / heads.
template <class T, int N>
struct Attend {
    const KvPages& kv;
    const AttentionTask& task;
    const int window;
    const Span span;
    const int words;     // of a query
    const size_t row;    // words of scores of a query
    int32_t* query;      // [N, words]
    float* score;        // [N, row]
    const int32_t** keys;  // [span.count] tiles
    const bool far;        // the keys of several tokens are in a cache: others have just used them

    Attend(const KvPages& kv, int layer, const AttentionTask& task, int window, float* scratch)
        : kv(kv), task(task), window(window), span(task, window), words(kv.dim / T::STEP),
          row(static_cast<size_t>(span.count) * LANES), query(reinterpret_cast<int32_t*>(scratch)),
          score(scratch + N * kv.dim), keys(reinterpret_cast<const int32_t**>(score + N * row)),
          far(task.tokens == 1) {
        for (int tile = 0; tile < span.count; tile++) {
            keys[tile] = kv.tile(task.table, layer, false, task.kv_head, span.first + tile);
        }
    }

    void operator()(const int32_t* queries, int all_heads, float* out, size_t stride) {
        for (int i = 0; i < N; i++) {
            const size_t token = task.token + i / task.heads, head = task.head + i % task.heads;
            memcpy(query + i * words, queries + (token * all_heads + head) * words, words * 4);
        }
        f32x16 best[N];
        for (int i = 0; i < N; i++) best[i] = splat(NEVER);
        int tile = 0;
        for (; tile + 4 <= span.count; tile += 4) scores<4>(tile, best);
        for (; tile < span.count; tile++) scores<1>(tile, best);
        if (far) fetch(keys[0] + kv.to_values(), words * LANES);
        float sums[N], inverse[N];
        for (int i = 0; i < N; i++) sums[i] = largest(best[i]);
        weights<T>(score, row, row, sums);
        float* at[N];
        for (int i = 0; i < N; i++) {
            inverse[i] = 1.0f / sums[i];
            at[i] = out + i / task.heads * stride + i % task.heads * kv.dim;
        }
        const int panels = kv.dim / LANES;
        int panel = 0;
        for (; panel + 4 <= panels; panel += 4) values<4>(panel, inverse, at);
        for (; panel + 2 <= panels; panel += 2) values<2>(panel, inverse, at);
        for (; panel < panels; panel++) values<1>(panel, inverse, at);
    }

    // Scores of NB tiles, and the largest so far.
    template <int NB>
    ALWAYS_INLINE void scores(int tile, f32x16 (&best)[N]) {
        const float scale = 1.0f / std::sqrt(static_cast<float>(kv.dim));
        for (int next = tile + NB; far && next < std::min(tile + 2 * NB, span.count); next++) {
            fetch(keys[next], words * LANES);
        }
        const int32_t* at[NB];
        UNROLLED for (int j = 0; j < NB; j++) at[j] = keys[tile + j];
        f32x16 acc[N][NB];
        clear(acc);
        accumulate<T, 1>(acc, query, words, at, words);
        UNROLLED for (int j = 0; j < NB; j++) {
            const int key = (span.first + tile + j) * LANES;
            const bool all = window == 0 && key + LANES <= task.position;  // seen by all queries
            UNROLLED for (int i = 0; i < N; i++) {
                const f32x16 found =
                    all ? acc[i][j] * scale
                        : scored(acc[i][j], scale, key, task.position + i / task.heads, window);
                best[i] = max(best[i], found);
                store(score + i * row + (tile + j) * LANES, found);
            }
        }
    }

    // The weighted sum of NB * 16 dimensions of the values.
    template <int NB>
    ALWAYS_INLINE void values(int panel, const float (&inverse)[N], float* const (&out)[N]) {
        constexpr int WORDS = LANES / T::STEP;  // of a tile
        const auto* weight = reinterpret_cast<const int32_t*>(score);
        const size_t offset = kv.to_values() + panel * WORDS * LANES;
        f32x16 acc[N][NB];
        clear(acc);
        const auto add = [&](int tile, int count) __attribute__((always_inline)) {
            const int32_t* at[NB];
            UNROLLED for (int j = 0; j < NB; j++) at[j] = keys[tile] + offset + j * WORDS * LANES;
            accumulate<T, 1>(acc, weight + tile * WORDS, row, at, count);
        };
        for (int tile = 0; tile + 1 < span.count; tile++) {
            if (far) fetch(keys[tile + 1] + offset, NB * WORDS * LANES);
            add(tile, WORDS);
        }
        const int last = span.count - 1;
        const int tokens = task.position + task.tokens - (span.first + last) * LANES;
        add(last, (tokens + T::STEP - 1) / T::STEP);
        UNROLLED for (int i = 0; i < N; i++) {
            UNROLLED for (int j = 0; j < NB; j++) {
                store(out[i] + (panel + j) * LANES, acc[i][j] * inverse[i]);
            }
        }
    }

    template <int NB>
    static ALWAYS_INLINE void clear(f32x16 (&acc)[N][NB]) {
        UNROLLED for (int i = 0; i < N; i++) {
            UNROLLED for (int j = 0; j < NB; j++) acc[i][j] = f32x16{};
        }
    }
};

template <class T>
void dispatch(const KvPages& kv, int layer, const AttentionTask& task, const int32_t* queries,
              int all_heads, int window, float* out, size_t stride, float* scratch) {
    const auto run = [&]<int N>() {
        Attend<T, N>(kv, layer, task, window, scratch)(queries, all_heads, out, stride);
    };
    switch (task.tokens * task.heads) {
        case 1: return run.template operator()<1>();
        case 2: return run.template operator()<2>();
        case 3: return run.template operator()<3>();
        case 4: return run.template operator()<4>();
        case 5: return run.template operator()<5>();
        case 6: return run.template operator()<6>();
    }
}

// Numbers of one token, in the format T, into tiles from `keys` and `values` on.
template <class T, class Number>
ALWAYS_INLINE void put_in_tiles(int32_t* keys, int32_t* values, int token, const Number* k,
                                const Number* v, int dim, bool last) {
    constexpr int STEP = T::STEP;
    for (int d = 0; d < dim; d += STEP) memcpy(keys + d / STEP * LANES + token, k + d, 4);
    auto* numbers = reinterpret_cast<Number*>(values);
    for (int d = 0; d < dim; d++) {
        Number* word = numbers + ((d / LANES * (LANES / STEP) + token / STEP) * LANES + d % LANES) * STEP;
        word[token % STEP] = v[d];
        if (last && token % STEP + 1 < STEP) word[STEP - 1] = 0;
    }
}

}  // namespace

void KvPages::put(const int32_t* table, int layer, int head, int position, const float* k,
                  const float* v, bool last) const {
    int32_t* keys = tile(table, layer, false, head, position / LANES);
    int32_t* values = tile(table, layer, true, head, position / LANES);
    const int token = position % LANES;
    if (dtype == Dtype::F32) return put_in_tiles<F32>(keys, values, token, k, v, dim, last);
    for (int d = 0; d < dim; d += LANES) {  // 16 dimensions are whole words of K, a panel of V
        const u16x16 rounded[] = {to_bf16(load(k + d)), to_bf16(load(v + d))};
        uint16_t halves[2][LANES];
        memcpy(halves, rounded, sizeof halves);
        const int from = d * LANES / Bf16::STEP;
        put_in_tiles<Bf16>(keys + from, values + from, token, halves[0], halves[1], LANES, last);
    }
}

void KvPages::fetch(const int32_t* table, int layer, int head, int position) const {
    const int32_t* keys = tile(table, layer, false, head, position / LANES);
    const int step = step_of(dtype), word = position % LANES / step;
    for (int i = 0; i < dim / step; i++) __builtin_prefetch(keys + i * LANES, 1, 2);
    const int32_t* values = keys + to_values() + word * LANES;
    for (int i = 0; i < dim / LANES; i++) {
        __builtin_prefetch(values + i * LANES * LANES / step, 1, 2);
    }
}

int max_queries(Dtype kv, int dim) { return can_attend_amx(kv, dim) ? TILE_ROWS : MAX_QUERIES; }

size_t attention_scratch(const AttentionTask& task, int dim) {
    const size_t tokens = padded(task.position + task.tokens);
    constexpr size_t POINTER = sizeof(void*) / sizeof(float);
    return task.tokens * task.heads * (dim + tokens + LANES) + tokens / LANES * POINTER;
}

void attend(const KvPages& kv, int layer, const AttentionTask& task, const int32_t* queries,
            int all_heads, int window, float* out, size_t stride, float* scratch) {
    const auto kernel = can_attend_amx(kv.dtype, kv.dim) ? attend_amx
                        : kv.dtype == Dtype::F32         ? dispatch<F32>
                                                         : dispatch<Bf16>;
    kernel(kv, layer, task, queries, all_heads, window, out, stride, scratch);
}

}  // namespace fastserve
