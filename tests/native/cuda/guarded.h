// Memory that ends where a page does, the next of which cannot be touched.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

namespace emulated {

class Guarded {
 public:
  explicit Guarded(std::size_t size) : size_(size) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    // What lies before is as long as alignment asks for.
    const std::size_t used = (size + 15) / 16 * 16;
    length_ = (used + page - 1) / page * page + page;
    void* start = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    start_ = static_cast<char*>(start);
    std::memset(start_, 0xff, length_ - page);  // NaN of every type
    mprotect(start_ + length_ - page, page, PROT_NONE);
    data_ = start_ + length_ - page - used;
  }
  Guarded(Guarded&& other) noexcept
      : size_(other.size_), length_(other.length_), start_(std::exchange(other.start_, nullptr)), data_(other.data_) {}
  Guarded& operator=(Guarded&&) = delete;
  ~Guarded() {
    if (start_) munmap(start_, length_);
  }

  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_, length_ = 0;
  char *start_ = nullptr, *data_ = nullptr;
};

}  // namespace emulated
