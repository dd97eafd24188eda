// Aligned memory that is not initialised twice.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <sys/mman.h>
#include <utility>
#include <vector>

namespace fastserve {

// A block of `count` elements, zeroed; grows, but never shrinks or copies.
template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t count) { reserve(count); }
    ~Buffer() { std::free(data_); }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }

    // Room for `count` elements; what was there is lost if it has to grow.
    void reserve(size_t count) {
        if (count <= count_) return;
        std::free(data_);
        data_ = nullptr;
        // Weights are read from end to end in every step: huge pages save the page walks.
        const size_t page = count * sizeof(T) >= HUGE_PAGE ? HUGE_PAGE : 64;
        const size_t bytes = (count * sizeof(T) + page - 1) / page * page;
        void* memory = std::aligned_alloc(page, bytes);
        if (memory == nullptr) throw std::bad_alloc();
        if (page == HUGE_PAGE) madvise(memory, bytes, MADV_HUGEPAGE);
        __builtin_memset(memory, 0, bytes);
        data_ = static_cast<T*>(memory);
        count_ = count;
    }

    T* get() const { return data_; }
    T& operator[](size_t i) const { return data_[i]; }

private:
    static constexpr size_t HUGE_PAGE = size_t{1} << 21;

    void swap(Buffer& other) {
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
    }

    T* data_ = nullptr;
    size_t count_ = 0;
};

// Memory for many things that live as long as it does. What is small shares huge pages.
class Arena {
public:
    // `count` zeroed elements, 64 bytes aligned.
    template <class T>
    T* take(size_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > CHUNK / 4) {  // too much would be left over at the end of a chunk
            chunks_.emplace_back(bytes);
            return reinterpret_cast<T*>(chunks_.back().get());
        }
        if (bytes > left_) {
            chunks_.emplace_back(CHUNK);
            next_ = chunks_.back().get();
            left_ = CHUNK;
        }
        char* taken = next_;
        next_ += bytes;
        left_ -= bytes;
        return reinterpret_cast<T*>(taken);
    }

private:
    static constexpr size_t CHUNK = size_t{1} << 23;

    std::vector<Buffer<char>> chunks_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

}  // namespace fastserve
