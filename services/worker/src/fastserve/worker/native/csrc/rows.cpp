// Activations become words for products.

#include <bit>
#include <cmath>
#include <limits>

#include "gemm.h"

namespace fastserve {

namespace {

constexpr int GROUP = group_words(Dtype::INT8) * Int8::STEP;
static_assert(GROUP == 2 * LANES);

// N groups become int8, step by step together (see exp): of a row, or the same of several rows.
// x, out: of the first one; the next are x_step and out_step further.
template <int N>
ALWAYS_INLINE void quantise(const float* x, size_t x_step, int32_t* out, size_t out_step) {
    constexpr auto INFINITE = std::bit_cast<int32_t>(std::numeric_limits<float>::infinity());
    i32x16 numbers[N][2];
    int32_t highest[N];
    float inverse[N];
    UNROLLED for (int i = 0; i < N; i++) {
        // As whole numbers, so that what is not finite is the largest.
        const i32x16 a = (i32x16)load(x + i * x_step) & INT32_MAX;
        const i32x16 b = (i32x16)load(x + i * x_step + LANES) & INT32_MAX;
        highest[i] = largest(a > b ? a : b);
    }
    UNROLLED for (int i = 0; i < N; i++) {
        const auto most = std::bit_cast<float>(highest[i]);
        inverse[i] = most > 0.0f ? 127.0f / most : 0.0f;
        // What is not finite has to stay so: the engine fails such a job.
        const float scale = highest[i] < INFINITE ? most / 127.0f : std::nanf("");
        out[i * out_step + Rows::SCALE] = std::bit_cast<int32_t>(scale);
    }
    UNROLLED for (int i = 0; i < N; i++) {
        UNROLLED for (int half = 0; half < 2; half++) {
            const f32x16 scaled = round(load(x + i * x_step + half * LANES) * inverse[i]);
            numbers[i][half] = __builtin_convertvector(scaled, i32x16);
            const i8x16 bytes = __builtin_convertvector(numbers[i][half], i8x16);
            memcpy(out + i * out_step + half * LANES / 4, &bytes, sizeof bytes);
        }
    }
    UNROLLED for (int i = 0; i < N; i++) {
        out[i * out_step + Rows::CORRECTION] = -128 * sum(numbers[i][0] + numbers[i][1]);
    }
}

// `count` numbers of N rows.
template <int N>
void quantise_rows(const float* x, size_t stride, int32_t* out, size_t words, int count) {
    constexpr int TOGETHER = N == 1 ? 4 : 1, PITCH = Rows::INT8_PITCH;
    int i = 0;
    for (; i + TOGETHER * GROUP <= count; i += TOGETHER * GROUP, out += TOGETHER * PITCH) {
        if constexpr (N == 1) {
            quantise<4>(x + i, GROUP, out, PITCH);
        } else {
            quantise<N>(x + i, stride, out, words);
        }
    }
    for (; i + GROUP <= count; i += GROUP, out += PITCH) quantise<N>(x + i, stride, out, words);
    if (i < count) {  // half a group is left
        float last[N][GROUP] = {};
        for (int row = 0; row < N; row++) store(last[row], load(x + row * stride + i));
        quantise<N>(last[0], GROUP, out, words);
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

void Rows::put(int first, int end, const float* x, size_t stride, int from, int to) {
    const int count = padded(to - from);
    int32_t* out = data.get() + static_cast<size_t>(first) * words;
    if (dtype == Dtype::INT8) {
        out += from / GROUP * INT8_PITCH;
        for (; first + 4 <= end; first += 4, x += 4 * stride, out += 4 * words) {
            quantise_rows<4>(x, stride, out, words, count);
        }
        for (; first < end; first++, x += stride, out += words) {
            quantise_rows<1>(x, stride, out, words, count);
        }
        return;
    }
    for (; first < end; first++, x += stride, out += words) {
        for (int i = 0; i < count; i += LANES) {
            if (dtype == Dtype::F32) {
                store(reinterpret_cast<float*>(out) + from + i, load(x + i));
            } else {
                const u16x16 rounded = to_bf16(load(x + i));
                memcpy(reinterpret_cast<uint16_t*>(out) + from + i, &rounded, sizeof rounded);
            }
        }
    }
}

}  // namespace fastserve
