// A borrowed view of a tensor that another framework owns, read from a DLPack capsule, and the
// checks of its dtype, shape, device and strides. A failed check throws one sentence of the form
// "op: argument: expected ..., got ...".
//
// The view does not take ownership: it does not rename the capsule to "used_dltensor", so the
// capsule's own destructor still frees the tensor.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace tracmod {

// The part of DLPack's ABI (version 0.8, the unversioned capsule) that is read here. It is declared
// here so that the build needs no DLPack headers.
namespace dlpack {
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
constexpr int32_t kCPU = 1, kCUDA = 2, kCUDAHost = 3;
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4;
}  // namespace dlpack

[[noreturn]] inline void reject(const std::string& op, const std::string& argument,
                                const std::string& expected, const std::string& got) {
  throw std::invalid_argument(op + ": " + argument + ": expected " + expected + ", got " + got);
}

inline std::string join(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

class TensorView {
 public:
  TensorView(const dlpack::Tensor& tensor, std::string op, std::string argument)
      : tensor_(tensor), op_(std::move(op)), argument_(std::move(argument)) {}

  void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }

  int ndim() const { return tensor_.ndim; }
  int64_t size(int dim) const { return tensor_.shape[dim]; }
  std::vector<int64_t> shape() const { return {tensor_.shape, tensor_.shape + tensor_.ndim}; }
  int device_id() const { return tensor_.device.id; }
  bool is_cuda() const { return tensor_.device.type == dlpack::kCUDA; }

  std::string dtype_name() const {
    const auto& dtype = tensor_.dtype;
    const char* kind = dtype.code == dlpack::kInt      ? "int"
                       : dtype.code == dlpack::kUInt   ? "uint"
                       : dtype.code == dlpack::kFloat  ? "float"
                       : dtype.code == dlpack::kBFloat ? "bfloat"
                                                       : "an unknown type of ";
    return kind + std::to_string(dtype.bits) + (dtype.code > 4 ? " bits" : "");
  }

  std::string device_name() const {
    if (is_cuda()) return "cuda:" + std::to_string(tensor_.device.id);
    const bool cpu =
        tensor_.device.type == dlpack::kCPU || tensor_.device.type == dlpack::kCUDAHost;
    return cpu ? "cpu" : "a device of DLPack type " + std::to_string(tensor_.device.type);
  }

  DType float_type() const {
    if (dtype_name() == "float32") return DType::float32;
    if (dtype_name() == "bfloat16") return DType::bfloat16;
    reject(op_, argument_, "float32 or bfloat16", dtype_name());
  }

  const TensorView& check_dtype(const std::string& expected) const {
    if (dtype_name() != expected) reject(op_, argument_, expected, dtype_name());
    return *this;
  }

  // `legend` names the sizes for the error message, for example "(B, S, I)".
  const TensorView& check_shape(const std::vector<int64_t>& expected,
                                const std::string& legend) const {
    if (shape() != expected) {
      reject(op_, argument_, "shape " + legend + " = " + join(expected), join(shape()));
    }
    return *this;
  }

  const TensorView& check_ndim(std::initializer_list<int> allowed,
                               const std::string& legend) const {
    for (const int ndim : allowed) {
      if (tensor_.ndim == ndim) return *this;
    }
    reject(op_, argument_, "shape " + legend, join(shape()));
  }

  const TensorView& check_device(const TensorView& other) const {
    if (device_name() != other.device_name()) {
      reject(op_, argument_, "the device of " + other.argument_ + ", " + other.device_name(),
             device_name());
    }
    return *this;
  }

  // Row-major without gaps. The stride of a dimension of size 1 is arbitrary and is not checked,
  // nor are the strides of a tensor without elements.
  const TensorView& check_contiguous() const {
    if (tensor_.strides == nullptr) return *this;
    int64_t stride = 1;
    bool contiguous = true;
    for (int dim = tensor_.ndim - 1; dim >= 0; --dim) {
      if (tensor_.shape[dim] == 0) return *this;
      if (tensor_.shape[dim] != 1 && tensor_.strides[dim] != stride) contiguous = false;
      stride *= tensor_.shape[dim];
    }
    if (!contiguous) {
      const std::vector<int64_t> strides(tensor_.strides, tensor_.strides + tensor_.ndim);
      reject(op_, argument_, "a contiguous tensor", "strides " + join(strides));
    }
    return *this;
  }

 private:
  dlpack::Tensor tensor_;
  std::string op_, argument_;
};

}  // namespace tracmod
