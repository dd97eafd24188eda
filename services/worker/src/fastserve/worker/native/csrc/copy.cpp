// Copies of KV blocks to memory that processes share, and back.
//
// Such memory mostly has pages of 4 KiB, and a plain copy waits for the translation of each. Here the
// first line of the page after is asked for while one moves, and stores go past the caches, which
// saves reading what is overwritten and leaves them to the iterations.

#include "copy.h"

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastserve {

#if defined(__AVX2__)
namespace {

constexpr size_t PAGE = 4096;
constexpr size_t LINE = 64;

#if defined(__AVX512F__)
inline void move_line(char* to, const char* from) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#else
inline void move_line(char* to, const char* from) {
    auto* target = reinterpret_cast<__m256i*>(to);
    const auto* source = reinterpret_cast<const __m256i*>(from);
    const __m256i low = _mm256_loadu_si256(source), high = _mm256_loadu_si256(source + 1);
    _mm256_stream_si256(target, low);
    _mm256_stream_si256(target + 1, high);
}
#endif

}  // namespace
#endif

void copy(char* to, const char* from, size_t bytes) {
#if defined(__AVX2__)
    const size_t head = -reinterpret_cast<uintptr_t>(to) % LINE;  // stores need whole lines
    if (bytes > head + PAGE) {
        std::memcpy(to, from, head);
        to += head, from += head, bytes -= head;
        for (; bytes >= PAGE; to += PAGE, from += PAGE, bytes -= PAGE) {
            __builtin_prefetch(from + PAGE);  // never faults, past the end either
            for (size_t at = 0; at < PAGE; at += LINE) move_line(to + at, from + at);
        }
        _mm_sfence();  // the stores are seen before anything that comes later
    }
#endif
    std::memcpy(to, from, bytes);
}

}  // namespace fastserve
