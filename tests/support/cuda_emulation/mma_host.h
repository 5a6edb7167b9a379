// The instructions of csrc/cuda/mma.cuh on the CPU. Sums round towards zero, as on the hardware. An
// asynchronous copy first fills its destination with NaN and takes effect when it is waited for, so
// that reading too early shows.
#pragma once

#include <cuda_runtime.h>

namespace tracmod::cuda {

inline char* dynamic_shared() { return emu::shared_memory; }

namespace host {

inline float towards_zero(double value) {
  const float nearest = static_cast<float>(value);
  const bool over =
      std::isfinite(value) && std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return over ? std::nextafterf(nearest, 0.0f) : nearest;
}

inline float bf16(uint32_t word, int half) {
  return __uint_as_float(half == 0 ? word << 16 : word & 0xffff0000u);
}
inline float tf32(uint32_t word) { return __uint_as_float(word & 0xffffe000u); }

// The operand registers of one lane.
struct Operands {
  const uint32_t *a, *b;
};

// d += a b for one lane. Each register holds `values` numbers; value(register, i) is the i-th. The
// lanes exchange pointers to their registers; the table in mma.cuh shows which lane holds an
// element.
template <int values, class Value>
void multiply(float (&d)[4], const uint32_t* a, const uint32_t* b, Value value) {
  const int lane = emu::current % 32, first = emu::current - lane;
  const Operands mine{a, b};
  memcpy(emu::slots[emu::current], &mine, sizeof mine);
  emu::wait(emu::warp());
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int half = 0; half < 2; ++half) {
      for (int t = 0; t < 4; ++t) {
        Operands lane_a, lane_b;
        memcpy(&lane_a, emu::slots[first + row * 4 + t], sizeof lane_a);
        memcpy(&lane_b, emu::slots[first + column * 4 + t], sizeof lane_b);
        for (int v = 0; v < values; ++v) {
          const double left = value(lane_a.a[i / 2 + 2 * half], v);
          sum += left * value(lane_b.b[half], v);
        }
      }
    }
    d[i] = towards_zero(sum);
  }
  emu::wait(emu::warp());
}

inline void copy_later(void* to, const void* from, int bytes, int size) {
  const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (bits % size != 0) emu::fail("the addresses of an asynchronous copy are not aligned");
  if (bytes < 0 || bytes > size) emu::fail("an asynchronous copy of more bytes than its size");
  memset(to, 0xff, size);
  emu::fibers[emu::current].copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, size});
}

}  // namespace host

inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply<2>(d, a, b, host::bf16);
}

inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply<1>(d, a, b, [](uint32_t word, int) { return host::tf32(word); });
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isfinite(value) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emu::fail("a matrix's row is not aligned");
  const int lane = emu::current % 32;
  for (int i = 0; i < 4; ++i) {
    memcpy(&to[i], static_cast<const char*>(emu::from_lane(row, i * 8 + lane / 4)) + lane % 4 * 4,
           4);
  }
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emu::fail("a matrix's row is not aligned");
  const int lane = emu::current % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t values[2];
    for (int v = 0; v < 2; ++v) {
      const void* from = emu::from_lane(row, i * 8 + lane % 4 * 2 + v);
      memcpy(&values[v], static_cast<const char*>(from) + lane / 4 * 2, 2);
    }
    memcpy(&to[i], values, 4);
  }
}

inline void copy_16_later(void* to, const void* from, int bytes) {
  host::copy_later(to, from, bytes, 16);
}
inline void copy_4_later(void* to, const void* from, int bytes) {
  host::copy_later(to, from, bytes, 4);
}

inline void commit_copies() {
  emu::Fiber& fiber = emu::fibers[emu::current];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

template <int groups>
void wait_copies() {
  auto& under_way = emu::fibers[emu::current].groups;
  for (; under_way.size() > groups; under_way.pop_front()) {
    for (const emu::Copy& copy : under_way.front()) {
      memset(copy.to, 0, copy.size);
      memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

}  // namespace tracmod::cuda
