// Python bindings of the native engine, and the only file that knows Python.
//
// Each op here does the same five things: it reads the DLPack capsules, checks every argument
// before any memory is touched, asks Python for scratch memory, releases the GIL, and calls the
// CPU or the CUDA implementation depending on where the tensors are. Scratch memory comes from the
// caller's framework (`allocate`), so the engine allocates nothing and the framework's caching
// allocator and memory limits apply to it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/signs.h"
#include "cpu/tiles.h"
#include "kernels.h"
#include "tensor.h"

namespace py = pybind11;
using namespace py::literals;
using Capsule = py::capsule;

namespace tracmod {
namespace {

TensorView view(const Capsule& capsule, const std::string& op, const std::string& argument) {
  // The capsule holds a DLManagedTensor, whose first member is the DLTensor.
  void* tensor = PyCapsule_GetPointer(capsule.ptr(), "dltensor");
  if (tensor == nullptr) throw py::error_already_set();
  return TensorView(*static_cast<dlpack::Tensor*>(tensor), op, argument);
}

void check_built_for(const TensorView& tensor, const std::string& op, const std::string& argument) {
  if (tensor.device_name() == "cpu") return;
#ifdef TRACMOD_WITH_CUDA
  if (tensor.is_cuda()) return;
  reject(op, argument, "a tensor on cpu or cuda", tensor.device_name());
#else
  reject(op, argument, "a tensor on cpu (this build of tracmod has no CUDA)", tensor.device_name());
#endif
}

template <class Enum>
Enum choose(const std::string& name, const std::string& op, const std::string& argument,
            std::initializer_list<std::pair<const char*, Enum>> choices) {
  std::string names;
  for (const auto& [choice, value] : choices) {
    if (name == choice) return value;
    names += (names.empty() ? "" : ", ") + std::string(choice);
  }
  reject(op, argument, "one of " + names, "'" + name + "'");
}

Layer layer_named(const std::string& name, const std::string& op) {
  return choose<Layer>(name, op, "layer",
                       {{"linear", Layer::linear},
                        {"elementwise", Layer::elementwise},
                        {"embedding", Layer::embedding}});
}

Kind kind_named(const std::string& name, const std::string& op) {
  return choose<Kind>(
      name, op, "kind",
      {{"rademacher", Kind::rademacher}, {"sjlt", Kind::sjlt}, {"identity", Kind::identity},
       {"sketch", Kind::sketch}});
}

// Checks that lengths are in [0, S]. Lengths on a GPU are not read here, because that would make
// the host wait for the GPU; instead the kernels write NaN for an example with an invalid length.
const int64_t* checked_lengths(const TensorView& lengths, int64_t batch, int64_t tokens,
                               const std::string& op, const std::string& argument) {
  lengths.check_dtype("int64").check_shape({batch}, "(B,)").check_contiguous();
  const int64_t* values = lengths.as<int64_t>();
  if (lengths.is_cuda()) return values;
  for (int64_t b = 0; b < batch; ++b) {
    if (values[b] < 0 || values[b] > tokens) {
      reject(op, argument, "values from 0 to S = " + std::to_string(tokens),
             std::to_string(values[b]) + " at example " + std::to_string(b));
    }
  }
  return values;
}

// Checks that column numbers of R are not negative. Numbers on a GPU are not read here; the kernels
// only hash them, so a negative one cannot touch memory outside of a tensor.
const int64_t* checked_columns(const TensorView& columns, int64_t size, const std::string& legend,
                               const std::string& op, const std::string& argument) {
  columns.check_dtype("int64").check_shape({size}, legend).check_contiguous();
  const int64_t* values = columns.as<int64_t>();
  if (columns.is_cuda()) return values;
  for (int64_t i = 0; i < size; ++i) {
    if (values[i] < 0) {
      reject(op, argument, "values of 0 or more",
             std::to_string(values[i]) + " at column " + std::to_string(i));
    }
  }
  return values;
}

void check_columns(const Capsule& columns, const std::string& op, const std::string& argument) {
  const TensorView tensor = view(columns, op, argument);
  tensor.check_dtype("int64").check_ndim({1}, "(columns,)");
  checked_columns(tensor, tensor.size(0), "(columns,)", op, argument);
}

void check_lengths(const Capsule& lengths, int64_t batch, int64_t tokens, const std::string& op,
                   const std::string& argument) {
  checked_lengths(view(lengths, op, argument), batch, tokens, op, argument);
}

// Checks x, g and lengths of one batch. `suffix` is appended to argument names in error messages:
// "" where there is one batch, "1" and "2" where there are two.
Gradients gradients_of(const TensorView& x, const TensorView& g,
                       const std::optional<Capsule>& lengths, Layer layer, const std::string& op,
                       const std::string& suffix) {
  check_built_for(x, op, "x" + suffix);
  g.check_device(x);
  Gradients result{};
  result.dtype = g.float_type();
  const bool ids = layer == Layer::embedding;
  x.check_dtype(ids ? "int64" : g.dtype_name());
  const int rank = x.ndim() + (ids ? 1 : 0);
  if (ids) {
    x.check_ndim({1, 2}, "(B, S) or (B,)");
  } else {
    x.check_ndim({2, 3}, layer == Layer::linear ? "(B, S, I) or (B, I)" : "(B, S, D) or (B, D)");
  }
  g.check_ndim({rank}, layer == Layer::linear ? (rank == 3 ? "(B, S, O), as x has three dimensions"
                                                           : "(B, O), as x has two dimensions")
                                              : "of x" + std::string(ids ? " followed by D" : ""));
  result.batch = x.size(0);
  result.tokens = rank == 3 ? x.size(1) : 1;
  result.in = ids ? 1 : x.size(rank - 1);
  result.out = g.size(rank - 1);
  std::vector<int64_t> expected{result.batch};
  if (rank == 3) expected.push_back(result.tokens);
  expected.push_back(layer == Layer::elementwise ? result.in : result.out);
  g.check_shape(expected, layer == Layer::linear ? "with B and S of x" : "of x");
  x.check_contiguous();
  g.check_contiguous();
  result.x = x.data();
  result.g = g.data();
  if (lengths) {
    const TensorView tensor = view(*lengths, op, "lengths" + suffix);
    tensor.check_device(x);
    result.lengths = checked_lengths(tensor, result.batch, result.tokens, op, "lengths" + suffix);
  }
  return result;
}

// Keys select the random signs. If both sides of a layer, or two layers that are summed into the
// same features, had the same signs, inner products of features would be biased.
void check_keys(const Projection& projection, const std::string& op) {
  for (int j = 0; j < projection.outputs; ++j) {
    const uint64_t key = projection.output[j].key;
    if (key == projection.input_key) {
      reject(op, "output_key",
             "a key other than input_key (the same signs on both sides bias inner products)",
             std::to_string(key));
    }
    for (int i = 0; i < j; ++i) {
      if (key == projection.output[i].key) {
        reject(op, "output_key",
               "distinct keys (the same signs for two outputs bias inner products)",
               std::to_string(key) + " twice");
      }
    }
  }
}

void check_projection(const Gradients& gradients, const Projection& projection, int64_t offset,
                      int64_t width, const std::string& op) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  const int64_t k_out = projection.k_out, k_in = projection.k_in;
  if (k_out < 1) reject(op, "k_out", "1 or more", text(k_out));
  if (k_in < 1) reject(op, "k_in", "1 or more", text(k_in));
  if (offset < 0) reject(op, "offset", "0 or more", text(offset));
  if (k_out > width || k_in > width || offset + k_out * k_in > width) {
    reject(op, "k_out, k_in and offset", "offset + k_out * k_in of at most K = " + text(width),
           text(offset) + " + " + text(k_out) + " * " + text(k_in));
  }
  if (k_out * k_in >= int64_t{1} << 31) {
    reject(op, "k_out and k_in", "k_out * k_in below 2^31", text(k_out * k_in));
  }
  const bool linear = projection.layer == Layer::linear;
  if (projection.rows < 0 || projection.rows >= int64_t{1} << 31) {
    reject(op, "rows", "0 or more, below 2^31", text(projection.rows));
  }
  if (projection.rows > 0 && !(linear && projection.kind == Kind::sketch)) {
    reject(op, "rows", "0 unless layer is linear and kind is sketch", text(projection.rows));
  }
  if (projection.layer == Layer::embedding && projection.bias) {
    reject(op, "bias", "False for layer embedding", "True");
  }
  if (projection.kind == Kind::identity) {
    if (projection.layer == Layer::embedding) {
      reject(op, "kind", "rademacher, sjlt or sketch for layer embedding", "identity");
    }
    const int64_t bias = projection.bias ? 1 : 0;
    const int64_t exact_out = linear ? gradients.out : 1 + bias;
    const int64_t exact_in = linear ? gradients.in + bias : gradients.in;
    if (k_out != exact_out || k_in != exact_in) {
      reject(op, "k_out and k_in",
             text(exact_out) + " and " + text(exact_in) + " for kind identity",
             text(k_out) + " and " + text(k_in));
    }
  } else if (linear) {
    check_keys(projection, op);
  }
}

// Scratch memory allocated by the caller's framework; it is valid as long as `owner` lives.
struct Memory {
  Capsule owner;
  void* data;
};

Memory allocate_on(const py::function& allocate, size_t bytes, const std::string& op) {
  Capsule owner = allocate(bytes).cast<Capsule>();
  void* data = view(owner, op, "scratch").data();
  return {std::move(owner), data};
}

// The per-output arguments of project_gradients: the gradients of each layer that reads x, their
// keys and the numbers of their columns of R_out, as lists of equal length.
struct Outputs {
  const std::vector<Capsule>& g;
  const std::vector<uint64_t>& keys;
  const std::vector<std::optional<Capsule>>& columns;

  void check(const Projection& projection, const std::string& op) const {
    if (g.empty() || g.size() > kMaxOutputs) {
      reject(op, "g", "1 to " + std::to_string(kMaxOutputs) + " tensors", std::to_string(g.size()));
    }
    const std::string same_count = "as many entries as g, " + std::to_string(g.size());
    if (keys.size() != g.size()) reject(op, "output_key", same_count, std::to_string(keys.size()));
    if (columns.size() != g.size()) {
      reject(op, "output_columns", same_count, std::to_string(columns.size()));
    }
    if (g.size() > 1 && projection.layer != Layer::linear) {
      reject(op, "g", "one tensor unless layer is linear", std::to_string(g.size()));
    }
    if (g.size() > 1 && projection.kind == Kind::identity) {
      reject(op, "g", "one tensor for kind identity", std::to_string(g.size()));
    }
    if (g.size() > 1 && projection.kind == Kind::sketch && projection.rows == 0) {
      reject(op, "g", "one tensor for kind sketch with rows 0", std::to_string(g.size()));
    }
  }

  std::string name(const std::string& argument, size_t j) const {
    return g.size() == 1 ? argument : argument + "[" + std::to_string(j) + "]";
  }
};

// Checks and fills the outputs of `projection`; returns the Gradients of x and the first output.
Gradients read_outputs(const TensorView& x, const Outputs& outputs,
                       const std::optional<Capsule>& lengths, const std::string& op,
                       Projection& projection) {
  outputs.check(projection, op);
  const TensorView first = view(outputs.g[0], op, outputs.name("g", 0));
  const Gradients result = gradients_of(x, first, lengths, projection.layer, op, "");
  projection.outputs = static_cast<int>(outputs.g.size());
  for (size_t j = 0; j < outputs.g.size(); ++j) {
    const TensorView g = view(outputs.g[j], op, outputs.name("g", j));
    g.check_device(x).check_dtype(first.dtype_name());
    const Gradients checked = gradients_of(x, g, std::nullopt, projection.layer, op, "");
    projection.output[j] = {checked.g, checked.out, outputs.keys[j], nullptr};
  }
  return result;
}

void read_columns(const TensorView& x, const Gradients& gradients, const Outputs& outputs,
                  const std::optional<Capsule>& input_columns, const std::string& op,
                  Projection& projection) {
  const auto read = [&](const Capsule& columns, const std::string& argument, int64_t size,
                        const std::string& legend) {
    if (projection.layer != Layer::linear || projection.kind == Kind::identity) {
      reject(op, argument,
             projection.kind == Kind::identity ? "None for kind identity"
                                               : "None unless layer is linear",
             "a tensor");
    }
    const TensorView tensor = view(columns, op, argument);
    tensor.check_device(x);
    return checked_columns(tensor, size, legend, op, argument);
  };
  if (input_columns) {
    projection.input_columns = read(*input_columns, "input_columns",
                                    gradients.in + (projection.bias ? 1 : 0), "(I + bias,)");
  }
  for (size_t j = 0; j < outputs.columns.size(); ++j) {
    if (!outputs.columns[j]) continue;
    projection.output[j].columns = read(*outputs.columns[j], outputs.name("output_columns", j),
                                        projection.output[j].size, "(O,)");
  }
}

void project_gradients(const Capsule& x_capsule, const std::vector<Capsule>& g_capsules,
                       const Capsule& out_capsule, const std::optional<Capsule>& lengths,
                       int64_t offset, const std::string& layer, const std::string& kind,
                       int64_t k_out, int64_t k_in, int64_t rows, uint64_t seed,
                       uint64_t input_key, const std::vector<uint64_t>& output_keys, bool bias,
                       const std::optional<Capsule>& input_columns,
                       const std::vector<std::optional<Capsule>>& output_columns,
                       const py::function& allocate, int threads,
                       [[maybe_unused]] uintptr_t stream) {
  const std::string op = "project_gradients";
  const TensorView x = view(x_capsule, op, "x"), out = view(out_capsule, op, "out");
  Projection projection{};
  projection.layer = layer_named(layer, op);
  projection.kind = kind_named(kind, op);
  projection.bias = bias;
  projection.k_out = k_out;
  projection.k_in = k_in;
  projection.rows = rows;
  projection.seed = seed;
  projection.input_key = input_key;
  const Outputs outputs{g_capsules, output_keys, output_columns};
  const Gradients gradients = read_outputs(x, outputs, lengths, op, projection);
  read_columns(x, gradients, outputs, input_columns, op, projection);
  out.check_device(x).check_dtype("float32").check_ndim({2}, "(B, K)");
  out.check_shape({gradients.batch, out.size(1)}, "(B, K)").check_contiguous();
  check_projection(gradients, projection, offset, out.size(1), op);
  if (gradients.batch == 0) return;
  float* target = out.as<float>() + offset;
#ifdef TRACMOD_WITH_CUDA
  if (x.is_cuda()) {
    const Memory scratch =
        allocate_on(allocate, cuda::project_gradients_scratch(gradients, projection), op);
    const py::gil_scoped_release release;
    const cuda::DeviceGuard guard(x.device_id());
    cuda::project_gradients(gradients, projection, target, out.size(1), scratch.data,
                            reinterpret_cast<void*>(stream));
    return;
  }
#endif
  const Memory scratch =
      allocate_on(allocate, cpu::project_gradients_scratch(gradients, projection, threads), op);
  const py::gil_scoped_release release;
  cpu::project_gradients(gradients, projection, target, out.size(1), scratch.data, threads);
}

void linear(const Capsule& x_capsule, const Capsule& weight_capsule, const Capsule& out_capsule,
            const std::optional<Capsule>& bias_capsule, bool transposed,
            const py::function& allocate, int threads) {
  const std::string op = "linear";
  const TensorView x = view(x_capsule, op, "x"), weight = view(weight_capsule, op, "weight");
  const TensorView out = view(out_capsule, op, "out");
  if (x.device_name() != "cpu") reject(op, "x", "a tensor on cpu", x.device_name());
  x.check_dtype("float32").check_ndim({2}, "(T, depth)").check_contiguous();
  weight.check_device(x).check_dtype("float32").check_ndim({2}, "(O, I)").check_contiguous();
  const int64_t depth = weight.size(transposed ? 0 : 1), columns = weight.size(transposed ? 1 : 0);
  x.check_shape({x.size(0), depth}, transposed ? "(T, O) for weight (O, I)" : "(T, I) for weight");
  out.check_device(x).check_dtype("float32").check_shape({x.size(0), columns}, "(T, columns)");
  out.check_contiguous();
  Linear job{x.as<float>(), weight.as<float>(), nullptr, x.size(0), depth, columns, transposed};
  if (bias_capsule) {
    const TensorView bias = view(*bias_capsule, op, "bias");
    bias.check_device(x).check_dtype("float32").check_shape({columns}, "(columns,)");
    bias.check_contiguous();
    job.bias = bias.as<float>();
  }
  const Memory scratch = allocate_on(allocate, cpu::linear_scratch(job, threads), op);
  const py::gil_scoped_release release;
  cpu::linear(job, out.as<float>(), scratch.data, threads);
}

void gradient_dot(const Capsule& x1_capsule, const Capsule& g1_capsule, const Capsule& x2_capsule,
                  const Capsule& g2_capsule, const Capsule& out_capsule,
                  const std::optional<Capsule>& lengths1, const std::optional<Capsule>& lengths2,
                  const std::string& layer_name, bool bias, const py::function& allocate,
                  int threads, [[maybe_unused]] uintptr_t stream) {
  const std::string op = "gradient_dot";
  const Layer layer = layer_named(layer_name, op);
  const TensorView x1 = view(x1_capsule, op, "x1"), g1 = view(g1_capsule, op, "g1");
  const TensorView x2 = view(x2_capsule, op, "x2"), g2 = view(g2_capsule, op, "g2");
  const TensorView out = view(out_capsule, op, "out");
  const Gradients first = gradients_of(x1, g1, lengths1, layer, op, "1");
  x2.check_device(x1);
  const Gradients second = gradients_of(x2, g2, lengths2, layer, op, "2");
  g2.check_dtype(g1.dtype_name());
  if (second.in != first.in) {
    reject(op, "x2", "the last dimension of x1, " + std::to_string(first.in), join(x2.shape()));
  }
  if (second.out != first.out) {
    reject(op, "g2", "the last dimension of g1, " + std::to_string(first.out), join(g2.shape()));
  }
  if (layer == Layer::embedding && bias) reject(op, "bias", "False for layer embedding", "True");
  out.check_device(x1).check_dtype("float32");
  out.check_shape({first.batch, second.batch}, "(B1, B2)").check_contiguous();
  if (first.batch == 0 || second.batch == 0) return;
#ifdef TRACMOD_WITH_CUDA
  if (x1.is_cuda()) {
    const Memory scratch =
        allocate_on(allocate, cuda::gradient_dot_scratch(first, second, layer, bias), op);
    const py::gil_scoped_release release;
    const cuda::DeviceGuard guard(x1.device_id());
    cuda::gradient_dot(first, second, layer, bias, out.as<float>(), scratch.data,
                       reinterpret_cast<void*>(stream));
    return;
  }
#endif
  const Memory scratch =
      allocate_on(allocate, cpu::gradient_dot_scratch(first, second, layer, bias, threads), op);
  const py::gil_scoped_release release;
  cpu::gradient_dot(first, second, layer, bias, out.as<float>(), scratch.data, threads);
}

// Checks one of top_k_dot's two lists, the rows of every checkpoint: C tensors (rows, K) that agree
// with `first` in dtype, device and K, and with each other in shape.
std::vector<const void*> checked_rows(const std::vector<Capsule>& capsules, const TensorView& first,
                                      const std::string& op, const std::string& argument) {
  std::vector<const void*> pointers;
  std::vector<int64_t> shape;
  for (size_t c = 0; c < capsules.size(); ++c) {
    const TensorView rows = view(capsules[c], op, argument + "[" + std::to_string(c) + "]");
    rows.check_device(first).check_dtype(first.dtype_name()).check_ndim({2}, "(rows, K)");
    if (c == 0) shape = {rows.size(0), first.size(1)};
    rows.check_shape(shape, argument == "queries" ? "(Q, K)" : "(N, K)").check_contiguous();
    pointers.push_back(rows.data());
  }
  return pointers;
}

// Checks that group numbers are in [0, G). Numbers on a GPU are not read here; there, an invalid
// one turns the group sums into NaN.
const int64_t* checked_groups(const TensorView& groups, int64_t trains, int64_t num_groups,
                              const std::string& op) {
  groups.check_dtype("int64").check_shape({trains}, "(N,)").check_contiguous();
  const int64_t* values = groups.as<int64_t>();
  if (groups.is_cuda()) return values;
  for (int64_t n = 0; n < trains; ++n) {
    if (values[n] < 0 || values[n] >= num_groups) {
      reject(op, "groups", "values from 0 to num_groups - 1 = " + std::to_string(num_groups - 1),
             std::to_string(values[n]) + " at row " + std::to_string(n));
    }
  }
  return values;
}

Ranking checked_ranking(const Capsule& scores_capsule, const Capsule& indices_capsule,
                        const TensorView& like, int64_t queries, const std::string& op,
                        const std::string& prefix) {
  const TensorView scores = view(scores_capsule, op, "state." + prefix + "scores");
  const TensorView indices = view(indices_capsule, op, "state." + prefix + "indices");
  scores.check_device(like).check_dtype("float32").check_ndim({2}, "(Q, k)");
  const int64_t k = scores.size(1);
  scores.check_shape({queries, k}, "(Q, k)");
  indices.check_device(like).check_dtype("int64").check_shape({queries, k}, "(Q, k)");
  scores.check_contiguous();
  indices.check_contiguous();
  return {scores.as<float>(), indices.as<int64_t>(), k};
}

void top_k_dot(const std::vector<Capsule>& queries, const std::vector<Capsule>& trains,
               const std::vector<double>& weights, bool cosine, int64_t index_offset,
               const std::optional<Capsule>& groups, const Capsule& scores, const Capsule& indices,
               const Capsule& opponent_scores, const Capsule& opponent_indices,
               const std::optional<Capsule>& group_sums, const py::function& allocate, int threads,
               [[maybe_unused]] uintptr_t stream) {
  const std::string op = "top_k_dot";
  const size_t checkpoints = queries.size();
  if (checkpoints == 0) reject(op, "queries", "at least one tensor", "an empty list");
  if (trains.size() != checkpoints || weights.size() != checkpoints) {
    reject(op, trains.size() != checkpoints ? "trains" : "weights",
           "as many as queries, " + std::to_string(checkpoints),
           std::to_string(trains.size() != checkpoints ? trains.size() : weights.size()));
  }
  const TensorView first = view(queries[0], op, "queries[0]");
  check_built_for(first, op, "queries[0]");
  first.check_ndim({2}, "(Q, K)");
  const auto query_rows = checked_rows(queries, first, op, "queries");
  const auto train_rows = checked_rows(trains, first, op, "trains");
  TopK job{};
  job.queries = first.size(0);
  job.trains = view(trains[0], op, "trains[0]").size(0);
  job.width = first.size(1);
  job.checkpoints = static_cast<int64_t>(checkpoints);
  job.query_rows = query_rows.data();
  job.train_rows = train_rows.data();
  job.weights = weights.data();
  job.dtype = first.float_type();
  job.cosine = cosine;
  job.index_offset = index_offset;
  job.proponents = checked_ranking(scores, indices, first, job.queries, op, "");
  job.opponents =
      checked_ranking(opponent_scores, opponent_indices, first, job.queries, op, "opponent_");
  if (groups && group_sums) {
    const TensorView sums = view(*group_sums, op, "state.group_sums");
    sums.check_device(first).check_dtype("float64").check_ndim({2}, "(Q, G)");
    job.num_groups = sums.size(1);
    sums.check_shape({job.queries, job.num_groups}, "(Q, G)").check_contiguous();
    const TensorView group_ids = view(*groups, op, "groups");
    group_ids.check_device(first);
    job.groups = checked_groups(group_ids, job.trains, job.num_groups, op);
    job.group_sums = sums.as<double>();
  }
  if (job.queries == 0 || job.trains == 0) return;
#ifdef TRACMOD_WITH_CUDA
  if (first.is_cuda()) {
    const Memory scratch = allocate_on(allocate, cuda::top_k_dot_scratch(job), op);
    const py::gil_scoped_release release;
    const cuda::DeviceGuard guard(first.device_id());
    cuda::top_k_dot(job, scratch.data, reinterpret_cast<void*>(stream));
    return;
  }
#endif
  const Memory scratch = allocate_on(allocate, cpu::top_k_dot_scratch(job, threads), op);
  const py::gil_scoped_release release;
  cpu::top_k_dot(job, scratch.data, threads);
}

void quantize_rows(const Capsule& rows_capsule, const Capsule& codes_capsule,
                   const Capsule& scales_capsule, int threads, [[maybe_unused]] uintptr_t stream) {
  const std::string op = "quantize_rows";
  const TensorView rows = view(rows_capsule, op, "rows"), codes = view(codes_capsule, op, "codes");
  const TensorView scales = view(scales_capsule, op, "scales");
  check_built_for(rows, op, "rows");
  const DType dtype = rows.float_type();
  rows.check_ndim({2}, "(N, K)").check_contiguous();
  codes.check_device(rows).check_dtype("int8").check_shape(rows.shape(), "(N, K)");
  codes.check_contiguous();
  scales.check_device(rows).check_dtype("float32").check_shape({rows.size(0)}, "(N,)");
  scales.check_contiguous();
  const Quantization job{rows.data(), rows.size(0),       rows.size(1),
                         dtype,       codes.as<int8_t>(), scales.as<float>()};
  if (job.count == 0) return;
  const py::gil_scoped_release release;
#ifdef TRACMOD_WITH_CUDA
  if (rows.is_cuda()) {
    const cuda::DeviceGuard guard(rows.device_id());
    cuda::quantize_rows(job, reinterpret_cast<void*>(stream));
    return;
  }
#endif
  cpu::quantize_rows(job, threads);
}

void projection_matrix(const Capsule& out_capsule, const std::string& kind, uint64_t seed,
                       uint64_t key) {
  const std::string op = "projection_matrix";
  const TensorView out = view(out_capsule, op, "out");
  out.check_dtype("float32").check_ndim({2}, "(k, size)").check_contiguous();
  const Kind which =
      choose<Kind>(kind, op, "kind", {{"rademacher", Kind::rademacher}, {"sjlt", Kind::sjlt}});
  cpu::projection_matrix(which, out.size(0), out.size(1), seed, key, out.as<float>());
}

py::dict build_info() {
  py::dict info;
  info["version"] = TRACMOD_VERSION;
  info["compiler"] = TRACMOD_COMPILER;
#ifdef TRACMOD_WITH_CUDA
  info["cuda"] = TRACMOD_CUDA_TOOLKIT;
  info["cuda_architectures"] = TRACMOD_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  info["instructions"] = cpu::tiles().name;
  info["dense_signs"] = cpu::signs().write_indices == nullptr ? "products" : "tables";
  return info;
}

}  // namespace
}  // namespace tracmod

PYBIND11_MODULE(_C, m) {
  using namespace tracmod;
  m.doc() = "Native engine of tracmod; its public interface is tracmod.kernels.";
  cpu::tiles();  // selects the instruction set now, so that importing reports a wrong
                 // TRACMOD_INSTRUCTIONS
  m.def("build_info", &build_info);
  m.def("check_lengths", &check_lengths, "lengths"_a, "batch"_a, "tokens"_a, "op"_a, "argument"_a);
  m.def("check_columns", &check_columns, "columns"_a, "op"_a, "argument"_a);
  // `make stubs` generates tracmod/_C.pyi from these names.
  m.def("project_gradients", &project_gradients, "x"_a, "g"_a, "out"_a, "lengths"_a, "offset"_a,
        "layer"_a, "kind"_a, "k_out"_a, "k_in"_a, "rows"_a, "seed"_a, "input_key"_a, "output_keys"_a,
        "bias"_a, "input_columns"_a, "output_columns"_a, "allocate"_a, "threads"_a, "stream"_a);
  m.def("linear", &linear, "x"_a, "weight"_a, "out"_a, "bias"_a, "transposed"_a, "allocate"_a,
        "threads"_a);
  m.def("gradient_dot", &gradient_dot, "x1"_a, "g1"_a, "x2"_a, "g2"_a, "out"_a, "lengths1"_a,
        "lengths2"_a, "layer"_a, "bias"_a, "allocate"_a, "threads"_a, "stream"_a);
  m.def("top_k_dot", &top_k_dot, "queries"_a, "trains"_a, "weights"_a, "cosine"_a,
        "index_offset"_a, "groups"_a, "scores"_a, "indices"_a, "opponent_scores"_a,
        "opponent_indices"_a, "group_sums"_a, "allocate"_a, "threads"_a, "stream"_a);
  m.def("quantize_rows", &quantize_rows, "rows"_a, "codes"_a, "scales"_a, "threads"_a, "stream"_a);
  m.def("projection_matrix", &projection_matrix, "out"_a, "kind"_a, "seed"_a, "key"_a);
}
