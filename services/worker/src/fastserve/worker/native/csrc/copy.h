#pragma once

#include <cstddef>
#include <cstdint>

namespace fastserve {

// `bytes` from `from` to `to`, which must not overlap.
void copy(char* to, const char* from, size_t bytes);

}  // namespace fastserve
