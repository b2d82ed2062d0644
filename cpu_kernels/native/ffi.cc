// The operations as XLA FFI handlers, and the Python module that hands them out as capsules.

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "ops.h"
#include "xla/ffi/api/ffi.h"

namespace jsparse {
namespace {

namespace ffi = xla::ffi;

Element ElementOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32: return Element::kF32;
    case ffi::DataType::BF16: return Element::kBF16;
    case ffi::DataType::F16: return Element::kF16;
    case ffi::DataType::S8: return Element::kI8;
    case ffi::DataType::U8: return Element::kU8;
    case ffi::DataType::S32: return Element::kI32;
    case ffi::DataType::U32: return Element::kU32;
    default: return Element::kOther;
  }
}

Buffer Named(std::string name, ffi::AnyBuffer buffer) {
  const auto dims = buffer.dimensions();
  return {std::move(name), ElementOf(buffer.element_type()), {dims.begin(), dims.end()}, buffer.untyped_data()};
}

// The operands and results of one call by name, in order.
class Call {
 public:
  Call(const char* operation, ffi::RemainingArgs args, ffi::RemainingRets rets)
      : check(operation), args_(args), rets_(rets) {}

  Buffer Arg(const std::string& name) {
    auto buffer = args_.get<ffi::AnyBuffer>(next_arg_++);
    if (buffer.has_value()) return Named(name, *buffer);
    check.Fail(name + " is missing");
    return {name, Element::kOther, {}, nullptr};
  }

  const float* Vectors(const std::string& name, const std::vector<int64_t>& dims) {
    const Buffer buffer = Arg(name);
    check.Expect(buffer, Element::kF32, dims);
    return static_cast<const float*>(buffer.data);
  }

  Matrix MatrixArg(const std::string& name, int64_t rows, int64_t cols) {
    const Buffer values = Arg(name), scale = Arg(name + "'s scale");
    return check.ExpectMatrix(values, scale, rows, cols);
  }

  void* Ret(const std::string& name, Element element, const std::vector<int64_t>& dims) {
    auto buffer = rets_.get<ffi::AnyBuffer>(next_ret_++);
    if (!buffer.has_value()) {
      check.Fail(name + " is missing");
      return nullptr;
    }
    const Buffer named = Named(name, **buffer);
    check.Expect(named, element, dims);
    return (*buffer)->untyped_data();
  }

  // Nothing of what `Arg`s follow is known before x: its rows and width.
  std::pair<const float*, std::vector<int64_t>> X() {
    const Buffer x = Arg("x");
    check.Expect(x, Element::kF32, {-1, -1});
    return {static_cast<const float*>(x.data), x.dims.size() == 2 ? x.dims : std::vector<int64_t>{0, 0}};
  }

  size_t matrices_left() const { return args_.size() > next_arg_ ? (args_.size() - next_arg_) / 2 : 0; }
  ffi::Error Wrong() const { return ffi::Error::InvalidArgument(check.message()); }
  bool ok() const { return check.message().empty(); }
  // To be called when every operand and result has been taken.
  bool complete() {
    if (args_.size() > next_arg_ || rets_.size() > next_ret_) check.Fail("there are more operands or results than it has");
    return ok();
  }

  Checker check;

 private:
  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  size_t next_arg_ = 0, next_ret_ = 0;
};

Pool PoolOf(ffi::ThreadPool& threads) {
  return {threads.num_threads(), [&threads](std::function<void()> task) { threads.Schedule(std::move(task)); }};
}

// An attribute that stands for one of `names`.
template <class Enum, size_t kCount>
Enum Choice(Call& call, const char* attribute, int64_t value, const char* const (&names)[kCount]) {
  if (value >= 0 && value < static_cast<int64_t>(kCount)) return static_cast<Enum>(value);
  call.check.Fail(std::string(attribute) + " is " + std::to_string(value) + ", expected 0 to " +
                  std::to_string(kCount - 1));
  return Enum{};
}

FfnSpec SpecOf(Call& call, int64_t activation, int64_t up_activation, bool parallel) {
  return {Choice<Activation>(call, "activation", activation, kActivations),
          Choice<UpActivation>(call, "up_activation", up_activation, kUpActivations), parallel};
}

Ffn FfnArgs(Call& call, const FfnSpec& spec, int64_t width) {
  Ffn ffn;
  ffn.gate = call.MatrixArg("gate", -1, width);
  if (spec.up != UpActivation::kNone) ffn.up = call.MatrixArg("up", ffn.gate.rows, width);
  ffn.down_t = call.MatrixArg("down_t", ffn.gate.rows, width);
  ffn.threshold = call.Vectors("threshold", {ffn.gate.rows});
  return ffn;
}

ffi::Error TakeRowsHandler(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Call call("take_rows", args, rets);
  const Buffer indices = call.Arg("indices");
  call.check.Expect(indices, Element::kI32, {-1});
  auto out = rets.get<ffi::AnyBuffer>(0);
  if (!out.has_value() || (*out)->dimensions().size() != 2) call.check.Fail("the output is no matrix");
  if (!call.ok()) return call.Wrong();
  const int64_t columns = (*out)->dimensions()[1];
  const Matrix matrix = call.MatrixArg("matrix", -1, columns);
  float* rows = static_cast<float*>(call.Ret("rows", Element::kF32, {indices.dims[0], columns}));
  if (!call.complete()) return call.Wrong();
  TakeRows({BestKernels(), PoolOf(threads)}, matrix, static_cast<const int32_t*>(indices.data), indices.dims[0], rows);
  return ffi::Error::Success();
}

ffi::Error LinearHandler(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Call call("linear", args, rets);
  const auto [x, dims] = call.X();
  if (!call.ok()) return call.Wrong();
  std::vector<Matrix> weights;
  std::vector<float*> outs;
  const size_t count = call.matrices_left();
  for (size_t i = 0; i < count; ++i) {
    weights.push_back(call.MatrixArg("weight " + std::to_string(i), -1, dims[1]));
    outs.push_back(static_cast<float*>(
        call.Ret("output " + std::to_string(i), Element::kF32, {dims[0], weights.back().rows})));
  }
  if (!call.complete()) return call.Wrong();
  if (count) Linear({BestKernels(), PoolOf(threads)}, x, dims[0], weights, outs);
  return ffi::Error::Success();
}

ffi::Error RmsNormHandler(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, float eps) {
  Call call("rms_norm", args, rets);
  const auto [x, dims] = call.X();
  if (!call.ok()) return call.Wrong();
  const float* scale = call.Vectors("scale", {dims[1]});
  float* out = static_cast<float*>(call.Ret("out", Element::kF32, dims));
  if (!call.complete()) return call.Wrong();
  RmsNorm({BestKernels(), PoolOf(threads)}, x, dims[0], dims[1], scale, eps, out);
  return ffi::Error::Success();
}

ffi::Error DenseFfnHandler(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           int64_t activation, int64_t up_activation) {
  Call call("dense_ffn", args, rets);
  const auto [x, dims] = call.X();
  if (!call.ok()) return call.Wrong();
  const FfnSpec spec = SpecOf(call, activation, up_activation, false);
  const Ffn ffn = FfnArgs(call, spec, dims[1]);
  float* y = static_cast<float*>(call.Ret("y", Element::kF32, dims));
  if (!call.complete()) return call.Wrong();
  DenseFfn({BestKernels(), PoolOf(threads)}, x, dims[0], ffn, spec, y);
  return ffi::Error::Success();
}

ffi::Error SparseFfnHandler(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets,
                            int64_t activation, int64_t up_activation, bool parallel) {
  Call call("sparse_ffn", args, rets);
  const auto [x, dims] = call.X();
  if (!call.ok()) return call.Wrong();
  const FfnSpec spec = SpecOf(call, activation, up_activation, parallel);
  if (spec.activation == Activation::kSilu) call.check.Fail("activation is silu, which has no zeros to skip");
  const Ffn ffn = FfnArgs(call, spec, dims[1]);
  Predictor predictor;
  predictor.a = call.MatrixArg("a", -1, dims[1]);
  predictor.b = call.MatrixArg("b", ffn.gate.rows, predictor.a.rows);
  predictor.bias = call.Vectors("bias", {ffn.gate.rows});
  const Buffer factors = call.Arg("route");
  call.check.Expect(factors, Element::kF32, {dims[0], -1});
  if (call.ok() && (factors.dims[1] < 1 || ffn.gate.rows % factors.dims[1])) {
    call.check.Fail("route has " + std::to_string(factors.dims[1]) + " groups, which do not divide " +
                    std::to_string(ffn.gate.rows) + " neurons");
  }
  float* y = static_cast<float*>(call.Ret("y", Element::kF32, dims));
  int32_t* counts = static_cast<int32_t*>(call.Ret("counts", Element::kI32, {dims[0], 2}));
  if (!call.complete()) return call.Wrong();
  const Route route{static_cast<const float*>(factors.data), factors.dims[1]};
  SparseFfn({BestKernels(), PoolOf(threads)}, x, dims[0], ffn, predictor, spec, route, y, counts);
  return ffi::Error::Success();
}

ffi::Error AttendHandler(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t window) {
  Call call("attend", args, rets);
  const Buffer q = call.Arg("q");
  call.check.Expect(q, Element::kF32, {-1, -1, -1, -1});
  if (!call.ok()) return call.Wrong();
  const int64_t batch = q.dims[0], tokens = q.dims[1], num_heads = q.dims[2], head_dim = q.dims[3];
  const Buffer k = call.Arg("k");
  call.check.Expect(k, Element::kF32, {batch, tokens, -1, head_dim});
  if (!call.ok()) return call.Wrong();
  const int64_t num_kv_heads = k.dims[2];
  const float* v = call.Vectors("v", k.dims);
  const Buffer start = call.Arg("start"), count = call.Arg("count");
  call.check.Expect(start, Element::kI32, {batch});
  call.check.Expect(count, Element::kI32, {batch});
  const Buffer keys = call.Arg("keys"), values = call.Arg("values");
  const Buffer key_scale = call.Arg("the keys' scale"), value_scale = call.Arg("the values' scale");
  const bool scaled = keys.element == Element::kI8;
  if (!scaled && keys.element != Element::kF32 && keys.element != Element::kBF16 && keys.element != Element::kF16) {
    call.check.Fail("keys are neither float32, bfloat16, float16 nor int8");
  }
  call.check.Expect(keys, keys.element, {batch, -1, num_kv_heads, head_dim});
  call.check.Expect(values, keys.element, keys.dims);
  const Element scale = scaled ? Element::kBF16 : Element::kF32;
  std::vector<int64_t> scales{0};
  if (scaled && keys.dims.size() == 4) scales = {batch, keys.dims[1], num_kv_heads, NumGroups(head_dim)};
  call.check.Expect(key_scale, scale, scales);
  call.check.Expect(value_scale, scale, scales);
  if (num_kv_heads < 1 || num_heads % num_kv_heads) {
    call.check.Fail("the " + std::to_string(num_heads) + " heads of q are no multiple of the " +
                    std::to_string(num_kv_heads) + " of k");
  }
  if (window < 1) call.check.Fail("window is " + std::to_string(window) + ", expected at least 1");
  float* out = static_cast<float*>(call.Ret("out", Element::kF32, q.dims));
  void* new_keys = call.Ret("new keys", keys.element, keys.dims);
  void* new_values = call.Ret("new values", keys.element, keys.dims);
  void* new_key_scale = call.Ret("the new keys' scale", scale, scales);
  void* new_value_scale = call.Ret("the new values' scale", scale, scales);
  if (new_keys != keys.data || new_values != values.data ||
      (scaled && (new_key_scale != key_scale.data || new_value_scale != value_scale.data))) {
    call.check.Fail("the cache is not updated in place");
  }
  if (!call.complete()) return call.Wrong();
  const AttentionArrays arrays{static_cast<const float*>(q.data),
                               static_cast<const float*>(k.data),
                               v,
                               static_cast<const int32_t*>(start.data),
                               static_cast<const int32_t*>(count.data),
                               new_keys,
                               new_values,
                               static_cast<uint16_t*>(new_key_scale),
                               static_cast<uint16_t*>(new_value_scale),
                               out};
  for (int64_t b = 0; b < batch; ++b) {
    if (arrays.start[b] < 0) call.check.Fail("start " + std::to_string(b) + " is negative");
    if (arrays.count[b] < 0 || arrays.count[b] > tokens) {
      call.check.Fail("count " + std::to_string(b) + " is " + std::to_string(arrays.count[b]) + " of " +
                      std::to_string(tokens) + " tokens");
    }
  }
  if (keys.dims[1] < 1) call.check.Fail("the cache has no slots");
  if (!call.ok()) return call.Wrong();
  const Type type = keys.element == Element::kF32    ? Type::kF32
                    : keys.element == Element::kBF16 ? Type::kBF16
                    : keys.element == Element::kF16  ? Type::kF16
                                                     : Type::kI8x32;
  const Attention shape{batch,  tokens, num_heads, num_kv_heads, head_dim, keys.dims[1], type,
                        window, 1.0f / __builtin_sqrtf(static_cast<float>(head_dim))};
  Attend({BestKernels(), PoolOf(threads)}, shape, arrays);
  return ffi::Error::Success();
}

ffi::Error ReadHandler(ffi::ThreadPool threads, ffi::AnyBuffer data, ffi::Result<ffi::Buffer<ffi::U32>> sum) {
  if (ElementOf(data.element_type()) == Element::kOther) {
    return ffi::Error::InvalidArgument("read: data is of another type than the kernels' own");
  }
  if (sum->element_count() != 1) return ffi::Error::InvalidArgument("read: the result is not one number");
  const uint64_t read =
      ReadAll({BestKernels(), PoolOf(threads)}, data.untyped_data(), static_cast<int64_t>(data.size_bytes()));
  sum->typed_data()[0] = static_cast<uint32_t>(read);
  return ffi::Error::Success();
}

ffi::Error ThreadsHandler(ffi::ThreadPool threads, ffi::Result<ffi::Buffer<ffi::S32>> count) {
  if (count->element_count() != 1) return ffi::Error::InvalidArgument("threads: the result is not one number");
  count->typed_data()[0] = static_cast<int32_t>(threads.num_threads());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(kTakeRows, TakeRowsHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kLinear, LinearHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kRmsNorm, RmsNormHandler,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kDenseFfn, DenseFfnHandler,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("activation").Attr<int64_t>(
        "up_activation"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(kSparseFfn, SparseFfnHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("up_activation")
                                  .Attr<bool>("parallel"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kAttend, AttendHandler,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("window"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kRead, ReadHandler, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::U32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kThreads, ThreadsHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Ret<ffi::Buffer<ffi::S32>>());

PyObject* Handlers(PyObject*, PyObject*) {
  static constexpr struct {
    const char* name;
    XLA_FFI_Handler* handler;
  } kHandlers[] = {{"take_rows", kTakeRows}, {"rms_norm", kRmsNorm},     {"linear", kLinear}, {"dense_ffn", kDenseFfn},
                   {"attend", kAttend},      {"sparse_ffn", kSparseFfn}, {"read", kRead},     {"threads", kThreads}};
  PyObject* result = PyDict_New();
  for (const auto& entry : kHandlers) {
    PyObject* capsule = PyCapsule_New(reinterpret_cast<void*>(entry.handler), "xla._CUSTOM_CALL_TARGET", nullptr);
    const bool failed = !result || !capsule || PyDict_SetItemString(result, entry.name, capsule);
    Py_XDECREF(capsule);
    if (failed) {
      Py_XDECREF(result);
      return nullptr;
    }
  }
  return result;
}

PyObject* InstructionSet(PyObject*, PyObject*) { return PyUnicode_FromString(BestKernels().name); }

template <size_t kCount>
PyObject* Tuple(const char* const (&names)[kCount]) {
  PyObject* result = PyTuple_New(kCount);
  for (size_t i = 0; result && i < kCount; ++i) {
    PyObject* name = PyUnicode_FromString(names[i]);
    if (!name || PyTuple_SetItem(result, i, name)) {
      Py_DECREF(result);
      return nullptr;
    }
  }
  return result;
}

PyObject* Activations(PyObject*, PyObject*) { return Tuple(kActivations); }
PyObject* UpActivations(PyObject*, PyObject*) { return Tuple(kUpActivations); }

PyMethodDef kMethods[] = {
    {"handlers", Handlers, METH_NOARGS, "XLA FFI handlers by name, as capsules."},
    {"activations", Activations, METH_NOARGS, "The names of what is applied to gate values, in the order of their codes."},
    {"up_activations", UpActivations, METH_NOARGS, "The same of up values."},
    {"instruction_set", InstructionSet, METH_NOARGS, "Which of the compiled kernels this processor runs."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace jsparse

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&jsparse::kModule); }
