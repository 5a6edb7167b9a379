// Divides one block of memory, allocated by the caller, into aligned arrays. Without a block it
// only counts bytes, so the same function computes the size of the scratch memory and its layout,
// and the two cannot disagree.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tracmod {

class Scratch {
 public:
  explicit Scratch(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t start = (bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    bytes_ = start + static_cast<size_t>(count) * sizeof(T);
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + start);
  }

  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 256;
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace tracmod
