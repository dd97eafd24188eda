// Activations become words for products.

#include <bit>
#include <cmath>
#include <limits>

#include "gemm.h"

namespace fastserve {

namespace {

constexpr int GROUP = group_words(Dtype::INT8) * Int8::STEP;
static_assert(GROUP == 2 * LANES);

// N groups of a row become int8, step by step together (see exp).
template <int N>
ALWAYS_INLINE void quantise(const float* x, int32_t* out) {
    constexpr auto INFINITE = std::bit_cast<int32_t>(std::numeric_limits<float>::infinity());
    i32x16 numbers[N][2];
    int32_t highest[N];
    float inverse[N];
    UNROLLED for (int i = 0; i < N; i++) {
        // As whole numbers, so that what is not finite is the largest.
        const i32x16 a = (i32x16)load(x + i * GROUP) & INT32_MAX;
        const i32x16 b = (i32x16)load(x + i * GROUP + LANES) & INT32_MAX;
        highest[i] = largest(a > b ? a : b);
    }
    UNROLLED for (int i = 0; i < N; i++) {
        const auto most = std::bit_cast<float>(highest[i]);
        inverse[i] = most > 0.0f ? 127.0f / most : 0.0f;
        // What is not finite has to stay so: the engine fails such a job.
        const float scale = highest[i] < INFINITE ? most / 127.0f : std::nanf("");
        out[i * Rows::INT8_PITCH + Rows::SCALE] = std::bit_cast<int32_t>(scale);
    }
    UNROLLED for (int i = 0; i < N; i++) {
        UNROLLED for (int half = 0; half < 2; half++) {
            const f32x16 scaled = round(load(x + i * GROUP + half * LANES) * inverse[i]);
            numbers[i][half] = __builtin_convertvector(scaled, i32x16);
            const i8x16 bytes = __builtin_convertvector(numbers[i][half], i8x16);
            memcpy(out + i * Rows::INT8_PITCH + half * LANES / 4, &bytes, sizeof bytes);
        }
    }
    UNROLLED for (int i = 0; i < N; i++) {
        out[i * Rows::INT8_PITCH + Rows::CORRECTION] = -128 * sum(numbers[i][0] + numbers[i][1]);
    }
}

}  // namespace

void Rows::shape(Dtype new_dtype, int new_size, int new_rows) {
    dtype = new_dtype;
    size = new_size;
    rows = new_rows;
    words = words_of(dtype, size);
    groups = (words + group_words(dtype) - 1) / group_words(dtype);
    if (dtype == Dtype::INT8) words = groups * INT8_PITCH;
    data.reserve(static_cast<size_t>(rows) * words);
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
    int group = 0;
    for (; (group + 4) * GROUP <= padded(size); group += 4, x += 4 * GROUP, out += 4 * INT8_PITCH) {
        quantise<4>(x, out);
    }
    for (; (group + 1) * GROUP <= padded(size); group++, x += GROUP, out += INT8_PITCH) {
        quantise<1>(x, out);
    }
    if (group < groups) {  // half a group is left
        float last[GROUP] = {};
        store(last, load(x));
        quantise<1>(last, out);
    }
}

}  // namespace fastserve
