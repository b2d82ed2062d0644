// The native operations against plain loops in double precision, for every instruction set this processor runs, on
// buffers of exactly the size they need. `tests/cpu_kernels/test_native.py` builds it with sanitizers.

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "check.h"
#include "ops.h"

using namespace jsparse;

namespace {

int failures = 0;

void Expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// ---- Pools

class Threads {
 public:
  explicit Threads(int count) {
    for (int i = 1; i < count; ++i) threads_.emplace_back([this] { Loop(); });
    pool.num_threads = count;
    pool.schedule = [this](std::function<void()> task) {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
      wake_.notify_one();
    };
  }

  ~Threads() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  Pool pool;

 private:
  void Loop() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
  bool stop_ = false;
};

// ---- Matrices with their exact values

struct Stored {
  std::unique_ptr<uint8_t[]> data;
  std::unique_ptr<float[]> scale;
  std::unique_ptr<int8_t[]> codebook;
  std::vector<uint16_t> group_scale;  // bfloat16
  Matrix view;
  std::vector<double> values;

  const double* Row(int64_t i) const { return values.data() + i * view.cols; }
};

class Random {
 public:
  float Normal() { return normal_(engine_); }
  int Whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }

  std::vector<float> Vector(int64_t n) {
    std::vector<float> x(n);
    for (float& value : x) value = Normal();
    return x;
  }

  // Vectors that rounding to 16 bits leaves as they are.
  std::vector<float> Steps(int64_t num_x, int64_t n) {
    std::vector<float> x(num_x * n);
    for (float& value : x) value = Whole(-32767, 32767) / 16384.0f;
    for (int64_t m = 0; m < num_x; ++m) x[m * n + Whole(0, n - 1)] = -32767 / 16384.0f;
    return x;
  }

  Stored Make(Type type, int64_t rows, int64_t cols) {
    Stored s;
    const int64_t stride = RowStride(type, cols);
    s.data.reset(new uint8_t[rows * stride]());
    const bool row_scales = type == Type::kI8 || type == Type::kI4;
    if (row_scales) s.scale.reset(new float[rows]);
    if (type == Type::kI4x32) {
      s.codebook.reset(new int8_t[16]);
      for (int q = 0; q < 16; ++q) s.codebook[q] = static_cast<int8_t>(-127 + 17 * q - Whole(0, 1));
      s.codebook[0] = -128;
    }
    s.values.resize(rows * cols);
    for (int64_t i = 0; i < rows; ++i) {
      if (row_scales) s.scale[i] = 0.1f + 0.01f * Whole(0, 9);
      uint8_t* row = s.data.get() + i * stride;
      for (int64_t j = 0; j < cols; ++j) s.values[i * cols + j] = Put(type, row, j) * (row_scales ? s.scale[i] : 1.0);
      if (Bits(type) == 4 && cols % 2) row[cols / 2] |= Whole(0, 15) << 4;  // what pads an odd row is nobody's
      for (int64_t group = 0; group < stride - RowBytes(type, cols); group += 2) {
        // Of either sign, subnormal now and then.
        const double scale = PutHalf(row + RowBytes(type, cols) + group, Whole(0, 5) ? Whole(5, 9) : 0);
        for (int64_t j = group * 16; j < std::min(cols, group * 16 + 32); ++j) {
          s.values[i * cols + j] = s.codebook[static_cast<int>(s.values[i * cols + j]) + 8] * scale;
        }
      }
    }
    const int64_t groups = NumGroups(cols);
    for (int64_t i = 0; type == Type::kI8x32 && i < rows * groups; ++i) {
      const float scale = Whole(4, 12) / 512.0f;
      uint32_t bits;
      std::memcpy(&bits, &scale, 4);
      s.group_scale.push_back(static_cast<uint16_t>(bits >> 16));
      const int64_t first = i / groups * cols + i % groups * 32;
      for (int64_t j = 0; j < std::min<int64_t>(32, cols - i % groups * 32); ++j) s.values[first + j] *= scale;
    }
    s.view = {type, s.data.get(), s.scale.get(), rows, cols, stride, 0, s.codebook.get(), s.group_scale.data(), groups};
    return s;
  }

 private:
  double Put(Type type, uint8_t* row, int64_t j) {
    const float value = Normal();
    switch (type) {
      case Type::kF32:
        std::memcpy(row + 4 * j, &value, 4);
        return value;
      case Type::kBF16: {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits &= 0xffff0000u;
        const uint16_t half = static_cast<uint16_t>(bits >> 16);
        std::memcpy(row + 2 * j, &half, 2);
        float rounded;
        std::memcpy(&rounded, &bits, 4);
        return rounded;
      }
      case Type::kF16: return PutHalf(row + 2 * j, Whole(0, 9) ? Whole(11, 16) : 0);
      case Type::kI8:
      case Type::kI8x32: {
        const int q = Whole(-127, 127);
        row[j] = static_cast<uint8_t>(static_cast<int8_t>(q));
        return q;
      }
      case Type::kI4:
      case Type::kI4x32: {
        const int q = Whole(type == Type::kI4 ? -7 : -8, 7);
        row[j / 2] |= static_cast<uint8_t>((q + 8) << (j % 2 ? 4 : 0));
        return q;
      }
    }
    return 0;
  }

  // A float16 of that exponent, 0 for a subnormal one.
  double PutHalf(uint8_t* to, int exponent) {
    const int sign = Whole(0, 1), mantissa = Whole(0, 1023);
    const uint16_t half = static_cast<uint16_t>(sign << 15 | exponent << 10 | mantissa);
    std::memcpy(to, &half, 2);
    const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return sign ? -magnitude : magnitude;
  }

  std::mt19937 engine_{7};
  std::normal_distribution<float> normal_;
};

std::vector<double> Product(const Stored& w, const std::vector<double>& x) {
  std::vector<double> y(w.view.rows);
  for (int64_t i = 0; i < w.view.rows; ++i) {
    for (int64_t j = 0; j < w.view.cols; ++j) y[i] += w.Row(i)[j] * x[j];
  }
  return y;
}

void ExpectClose(const std::vector<float>& found, const std::vector<double>& wanted, double tolerance,
                 const std::string& what) {
  double largest = 1, error = 0;
  bool close = true;
  for (double value : wanted) largest = std::fmax(largest, std::fabs(value));
  for (size_t i = 0; i < wanted.size(); ++i) {
    error = std::fmax(error, std::fabs(found[i] - wanted[i]));  // which leaves out NaN
    close = close && std::fabs(found[i] - wanted[i]) <= tolerance * largest;
  }
  Expect(close, what + ": error " + std::to_string(error / largest));
}

struct Case {
  const Kernels& kernels;
  Threads& threads;
  Random& random;
  std::string name;

  Context context() const { return {kernels, threads.pool}; }
};

const Type kTypes[] = {Type::kF32, Type::kBF16, Type::kF16, Type::kI8, Type::kI4, Type::kI4x32};
const char* const kTypeNames[] = {"f32", "bf16", "f16", "i8", "i4", "i4x32", "i8x32"};

// Of an FFN: a down_t of low bits meets hidden values rounded to 16 bits.
double Tolerance(Type type) { return IsLowBit(type) ? 3e-4 : 1e-5; }

void TestTakeRows(const Case& c) {
  for (Type type : kTypes) {
    for (int64_t cols : {1, 31, 128, 517}) {
      const Stored w = c.random.Make(type, 9, cols);
      const std::vector<int32_t> indices = {8, 0, -1, 9, 8};
      std::vector<float> out(indices.size() * cols);
      TakeRows(c.context(), w.view, indices.data(), indices.size(), out.data());
      for (size_t i = 0; i < indices.size(); ++i) {
        std::vector<double> wanted(cols, 0.0);
        if (indices[i] >= 0 && indices[i] < 9) wanted.assign(w.Row(indices[i]), w.Row(indices[i]) + cols);
        ExpectClose({out.begin() + i * cols, out.begin() + (i + 1) * cols}, wanted, 1e-6,
                    c.name + " take_rows " + kTypeNames[static_cast<int>(type)]);
      }
    }
  }
}

// Every float16, by a thread that flushes subnormal numbers to zero and by one that does not.
void TestFloat16(const Case& c) {
  constexpr int64_t rows = 64, cols = 1024;
  std::vector<uint16_t> bits(rows * cols);
  std::iota(bits.begin(), bits.end(), 0);
  std::vector<int32_t> indices(rows);
  std::iota(indices.begin(), indices.end(), 0);
  const Matrix w{Type::kF16, reinterpret_cast<const uint8_t*>(bits.data()), nullptr, rows, cols, 2 * cols, 0};
  for (bool flush : {false, true}) {
    std::vector<float> out(rows * cols);
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    if (flush) _mm_setcsr(before | 0x8040);
#endif
    TakeRows({c.kernels, Pool()}, w, indices.data(), rows, out.data());  // on this thread
#if defined(__x86_64__)
    _mm_setcsr(before);
#endif
    int64_t wrong = 0;
    for (size_t i = 0; i < bits.size(); ++i) {
      const int exponent = bits[i] >> 10 & 31, mantissa = bits[i] & 1023;
      double wanted = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
      if (exponent == 31) wanted = mantissa ? NAN : INFINITY;
      if (bits[i] >> 15) wanted = -wanted;
      wrong += std::isnan(wanted) ? !std::isnan(out[i]) : out[i] != wanted;
    }
    Expect(wrong == 0, c.name + ": " + std::to_string(wrong) + " float16 numbers are wrong" + (flush ? ", flushed" : ""));
  }
}

void TestLinear(const Case& c) {
  for (Type type : kTypes) {
    for (int64_t cols : {1, 31, 128, 517}) {
      for (int64_t num_x : {1, 2, 3, 5, 6, 8, 9, 37}) {
        const Stored first = c.random.Make(type, 103, cols), second = c.random.Make(type, 5, cols);
        const std::vector<float> x = IsLowBit(type) ? c.random.Steps(num_x, cols) : c.random.Vector(num_x * cols);
        std::vector<float> a(num_x * 103), b(num_x * 5);
        Linear(c.context(), x.data(), num_x, {first.view, second.view}, {a.data(), b.data()});
        for (int64_t m = 0; m < num_x; ++m) {
          const std::vector<double> token(x.begin() + m * cols, x.begin() + (m + 1) * cols);
          const std::string what = c.name + " linear " + kTypeNames[static_cast<int>(type)] + " " +
                                   std::to_string(cols) + " columns, " + std::to_string(num_x) + " vectors";
          ExpectClose({a.begin() + m * 103, a.begin() + (m + 1) * 103}, Product(first, token), 1e-5, what);
          ExpectClose({b.begin() + m * 5, b.begin() + (m + 1) * 5}, Product(second, token), 1e-5, what);
        }
      }
    }
  }
}

void TestRmsNorm(const Case& c) {
  for (int64_t n : {1, 3, 64, 517}) {
    for (int64_t num_x : {1, 19}) {
      const std::vector<float> x = c.random.Vector(num_x * n), scale = c.random.Vector(n);
      std::vector<float> found(num_x * n);
      RmsNorm(c.context(), x.data(), num_x, n, scale.data(), 0.01f, found.data());
      std::vector<double> wanted(num_x * n);
      for (int64_t m = 0; m < num_x; ++m) {
        double mean = 0.01;
        for (int64_t i = 0; i < n; ++i) mean += double{x[m * n + i]} * x[m * n + i] / n;
        for (int64_t i = 0; i < n; ++i) wanted[m * n + i] = x[m * n + i] / std::sqrt(mean) * scale[i];
      }
      ExpectClose(found, wanted, 1e-6, c.name + " rms_norm " + std::to_string(n));
    }
  }
}

struct FfnCase {
  Stored gate, up, down_t, a, b;
  std::vector<float> x, bias, threshold;
  int64_t num_x;

  FfnCase(Random& random, Type type, Type predictor, int64_t width, int64_t neurons, int64_t rank, int64_t num_x)
      : gate(random.Make(type, neurons, width)), up(random.Make(type, neurons, width)),
        down_t(random.Make(type, neurons, width)), a(random.Make(predictor, rank, width)),
        b(random.Make(predictor, neurons, rank)),
        x(IsLowBit(type) ? random.Steps(num_x, width) : random.Vector(num_x * width)), bias(neurons, 0.0f),
        threshold(neurons, 0.0f), num_x(num_x) {}

  Ffn ffn(const FfnSpec& spec) const {
    return {gate.view, spec.up == UpActivation::kNone ? Matrix{} : up.view, down_t.view, threshold.data()};
  }
  Predictor predictor() const { return {a.view, b.view, bias.data()}; }
  std::vector<double> Token(int64_t m) const {
    return {x.begin() + m * gate.view.cols, x.begin() + (m + 1) * gate.view.cols};
  }

  // One token's products, which no activation, bias or threshold changes.
  struct Products {
    std::vector<double> gate, up, scores;
  };
  Products ProductsOf(int64_t m) const {
    const std::vector<double> token = Token(m);
    return {Product(gate, token), Product(up, token), Product(b, Product(a, token))};
  }

  // y of one token over the predicted neurons (all without `sparse`), and the two counts.
  std::vector<double> Oracle(const Products& of, const FfnSpec& spec, bool sparse, int32_t* counts) const {
    const auto& [g, u, scores] = of;
    std::vector<double> y(down_t.view.cols);
    counts[0] = counts[1] = 0;
    for (int64_t j = 0; j < gate.view.rows; ++j) {
      if (sparse && !(scores[j] + bias[j] > 0)) continue;
      double h = spec.activation == Activation::kSilu ? g[j] / (1 + std::exp(-g[j])) : g[j] > threshold[j] ? g[j] : 0;
      if (spec.activation == Activation::kRelu2) h *= h;
      if (spec.up != UpActivation::kNone) h *= spec.up == UpActivation::kRelu ? std::fmax(u[j], 0) : u[j];
      ++counts[0];
      counts[1] += h != 0;
      for (size_t i = 0; i < y.size(); ++i) y[i] += h * down_t.Row(j)[i];
    }
    return y;
  }
};

// No token leaves a neuron out.
const std::vector<float> kOnes(64, 1.0f);
const Route kAll{kOnes.data(), 1};

void TestFfn(const Case& c) {
  const struct {
    Activation activation;
    UpActivation up;
    float threshold;
  } kinds[] = {{Activation::kRelu, UpActivation::kLinear, 0},
               {Activation::kRelu, UpActivation::kRelu, 0},
               {Activation::kRelu, UpActivation::kLinear, 0.5},
               {Activation::kRelu, UpActivation::kNone, 0.25},
               {Activation::kRelu2, UpActivation::kNone, 0},
               {Activation::kSilu, UpActivation::kLinear, 0}};
  const struct {
    int64_t width, neurons, rank;
  } shapes[] = {{8, 1, 1}, {33, 127, 7}, {96, 300, 24}, {1100, 90, 9}};
  for (Type type : kTypes) {
    for (const auto& shape : shapes) {
      for (int64_t num_x : {1, 3, 11}) {
        const Type predictor = num_x == 1 ? Type::kI4 : num_x == 3 ? Type::kI8 : Type::kBF16;
        FfnCase f(c.random, type, predictor, shape.width, shape.neurons, shape.rank, num_x);
        const std::string what = c.name + " ffn " + kTypeNames[static_cast<int>(type)] + " of width " +
                                 std::to_string(shape.width) + ", " + std::to_string(num_x) + " vectors";
        std::vector<float> y(num_x * shape.width);
        std::vector<int32_t> counts(num_x * 2);
        int32_t wanted_counts[2];
        std::vector<FfnCase::Products> products;
        for (int64_t m = 0; m < num_x; ++m) products.push_back(f.ProductsOf(m));
        for (const auto& kind : kinds) {
          FfnSpec spec{kind.activation, kind.up, false};
          f.threshold.assign(shape.neurons, kind.threshold);
          DenseFfn(c.context(), f.x.data(), num_x, f.ffn(spec), spec, y.data());
          for (int64_t m = 0; m < num_x; ++m) {
            ExpectClose({y.begin() + m * shape.width, y.begin() + (m + 1) * shape.width},
                        f.Oracle(products[m], spec, false, wanted_counts), Tolerance(type), what + ", dense");
          }
          if (kind.activation == Activation::kSilu) continue;
          for (float bias : {-INFINITY, 0.0f, INFINITY}) {
            f.bias.assign(shape.neurons, bias);
            for (int64_t m = 0; m < num_x; ++m) {  // rounding must not decide
              const std::vector<double>& scores = products[m].scores;
              double largest = 0;
              for (double score : scores) largest = std::fmax(largest, std::fabs(score));
              for (int64_t j = 0; j < shape.neurons; ++j) {
                if (bias == 0 && std::fabs(scores[j]) < 1e-3 * largest) f.bias[j] = INFINITY;
              }
            }
            for (bool parallel : {false, true}) {
              spec.parallel = parallel;
              SparseFfn(c.context(), f.x.data(), num_x, f.ffn(spec), f.predictor(), spec, kAll, y.data(), counts.data());
              for (int64_t m = 0; m < num_x; ++m) {
                ExpectClose({y.begin() + m * shape.width, y.begin() + (m + 1) * shape.width},
                            f.Oracle(products[m], spec, true, wanted_counts), Tolerance(type), what + ", sparse");
                Expect(counts[2 * m] == wanted_counts[0] && counts[2 * m + 1] == wanted_counts[1], what + ", counts");
              }
            }
          }
        }
      }
    }
  }
}

// Three groups of neurons, each token with its own factors: zero leaves a group out, whose rows hold NaN.
void TestRoute(const Case& c) {
  FfnCase f(c.random, Type::kF32, Type::kI4, 33, 126, 7, 2);
  f.bias.assign(126, INFINITY);
  FfnSpec spec{Activation::kRelu, UpActivation::kLinear, false};
  const std::vector<float> factors = {1, 0, 0.5f, 0, 0, 2};
  for (bool parallel : {false, true}) {
    spec.parallel = parallel;
    std::vector<double> wanted[2];
    for (int64_t m : {0, 1}) {
      wanted[m].assign(33, 0);
      const std::vector<double> token = f.Token(m), g = Product(f.gate, token), u = Product(f.up, token);
      for (int64_t j = 0; j < 126; ++j) {
        for (int64_t i = 0; i < 33; ++i) {
          wanted[m][i] += factors[m * 3 + j / 42] * std::fmax(g[j], 0) * u[j] * f.down_t.Row(j)[i];
        }
      }
    }
    float* rows = reinterpret_cast<float*>(f.gate.data.get());
    std::vector<float> saved(rows + 42 * 33, rows + 84 * 33);
    std::fill(rows + 42 * 33, rows + 84 * 33, NAN);
    std::vector<float> y(66);
    std::vector<int32_t> counts(4);
    SparseFfn(c.context(), f.x.data(), 2, f.ffn(spec), f.predictor(), spec, {factors.data(), 3}, y.data(), counts.data());
    std::copy(saved.begin(), saved.end(), rows + 42 * 33);
    for (int64_t m : {0, 1}) ExpectClose({y.begin() + m * 33, y.begin() + (m + 1) * 33}, wanted[m], 1e-5, c.name + " route");
    Expect(counts[0] == 84 && counts[2] == 42, c.name + " route, counts");
  }
}

// A token's results beside others have the bits that they have alone.
void TestCompany(const Case& c) {
  const auto same = [&](const float* many, const float* alone, int64_t n, const std::string& what) {
    Expect(!std::memcmp(many, alone, n * sizeof(float)), c.name + " " + what + ": other bits than alone");
  };
  for (Type type : kTypes) {
    for (int64_t num_x : {2, 3, 5, 8, 9, 61}) {
      FfnCase f(c.random, type, Type::kI8, 517, 230, 19, num_x);
      const std::string what = std::string(kTypeNames[static_cast<int>(type)]) + ", " + std::to_string(num_x) + " vectors";
      const FfnSpec spec{Activation::kRelu, UpActivation::kLinear, false};
      std::vector<float> linear(num_x * 230), dense(num_x * 517), sparse(num_x * 517), alone(517);
      std::vector<int32_t> counts(num_x * 2);
      std::vector<float> norm(num_x * 517);
      const std::vector<float> scale = c.random.Vector(517);
      RmsNorm(c.context(), f.x.data(), num_x, 517, scale.data(), 1e-5f, norm.data());
      Linear(c.context(), f.x.data(), num_x, {f.gate.view}, {linear.data()});
      DenseFfn(c.context(), f.x.data(), num_x, f.ffn(spec), spec, dense.data());
      SparseFfn(c.context(), f.x.data(), num_x, f.ffn(spec), f.predictor(), spec, kAll, sparse.data(), counts.data());
      for (int64_t m = 0; m < num_x; ++m) {
        const float* x = f.x.data() + m * 517;
        RmsNorm(c.context(), x, 1, 517, scale.data(), 1e-5f, alone.data());
        same(norm.data() + m * 517, alone.data(), 517, "norm " + what);
        Linear(c.context(), x, 1, {f.gate.view}, {alone.data()});
        same(linear.data() + m * 230, alone.data(), 230, "linear " + what);
        DenseFfn(c.context(), x, 1, f.ffn(spec), spec, alone.data());
        same(dense.data() + m * 517, alone.data(), 517, "dense " + what);
        SparseFfn(c.context(), x, 1, f.ffn(spec), f.predictor(), spec, kAll, alone.data(), counts.data());
        same(sparse.data() + m * 517, alone.data(), 517, "sparse " + what);
      }
    }
  }
}

// NaN and infinity among a token's elements come out as NaN, of that token alone.
void TestDamage(const Case& c) {
  for (Type type : {Type::kI8, Type::kI4, Type::kI4x32}) {
    for (float damage : {NAN, INFINITY, -INFINITY}) {
      FfnCase f(c.random, type, Type::kI4, 70, 90, 7, 2);
      f.bias.assign(90, INFINITY);
      f.x[69] = damage;
      const FfnSpec spec{Activation::kSilu, UpActivation::kLinear, false};
      std::vector<float> linear(2 * 90), dense(2 * 70);
      Linear(c.context(), f.x.data(), 2, {f.gate.view}, {linear.data()});
      DenseFfn(c.context(), f.x.data(), 2, f.ffn(spec), spec, dense.data());
      const auto are_nan = [](const float* from, int64_t n) {
        return std::count_if(from, from + n, [](float value) { return std::isnan(value); });
      };
      Expect(are_nan(linear.data(), 90) == 90 && !are_nan(linear.data() + 90, 90), c.name + ": damage hides in a product");
      Expect(are_nan(dense.data(), 70) == 70 && !are_nan(dense.data() + 70, 70), c.name + ": damage hides in an FFN");
    }
  }
}

struct AttendCase {
  Attention shape;
  Stored keys, values;
  std::vector<float> q, k, v;  // what every type holds exactly, of k and v
  std::vector<int32_t> start, count;

  AttendCase(Random& random, const Attention& shape, std::vector<int32_t> start, std::vector<int32_t> count)
      : shape(shape), start(std::move(start)), count(std::move(count)) {
    const int64_t row = shape.num_kv_heads * shape.head_dim, tokens = shape.batch * shape.tokens;
    for (Stored* side : {&keys, &values}) {
      *side = random.Make(shape.cache_type, shape.batch * shape.slots * shape.num_kv_heads, shape.head_dim);
    }
    q = random.Steps(tokens * shape.num_heads, shape.head_dim);
    for (std::vector<float>* side : {&k, &v}) {
      for (int64_t i = 0; i < tokens * row; ++i) {
        const bool largest = i % shape.head_dim % 32 == 0;
        side->push_back((largest ? 127 : random.Whole(-127, 127)) / 64.0f);
      }
    }
  }

  // All that the caches hold.
  std::vector<uint8_t> Caches() const {
    std::vector<uint8_t> all;
    for (const Stored* side : {&keys, &values}) {
      all.insert(all.end(), side->data.get(), side->data.get() + side->view.rows * side->view.stride);
      const uint8_t* scales = reinterpret_cast<const uint8_t*>(side->group_scale.data());
      all.insert(all.end(), scales, scales + 2 * side->group_scale.size());
    }
    return all;
  }

  void SetCaches(const std::vector<uint8_t>& all) {
    const uint8_t* from = all.data();
    const auto take = [&from](void* to, int64_t bytes) {
      std::copy(from, from + bytes, static_cast<uint8_t*>(to));
      from += bytes;
    };
    for (Stored* side : {&keys, &values}) {
      take(side->data.get(), side->view.rows * side->view.stride);
      take(side->group_scale.data(), 2 * side->group_scale.size());
    }
  }

  // All tokens in one call, or in calls of some tokens.
  std::vector<float> Run(const Context& context, int64_t at_once) {
    std::vector<float> out(q.size(), NAN);
    const int64_t query = shape.num_heads * shape.head_dim, row = shape.num_kv_heads * shape.head_dim;
    for (int64_t first = 0; first < shape.tokens; first += at_once) {
      const int64_t some = std::min(at_once, shape.tokens - first);
      const auto part = [&](const std::vector<float>& all, int64_t size) {
        std::vector<float> taken;
        for (int64_t b = 0; b < shape.batch; ++b) {
          const auto from = all.begin() + (b * shape.tokens + first) * size;
          taken.insert(taken.end(), from, from + some * size);
        }
        return taken;
      };
      const std::vector<float> now_q = part(q, query), now_k = part(k, row), now_v = part(v, row);
      std::vector<float> now_out(now_q.size());
      std::vector<int32_t> now_start, now_count;
      for (int64_t b = 0; b < shape.batch; ++b) {
        now_start.push_back(start[b] + first);
        now_count.push_back(std::clamp<int64_t>(count[b] - first, 0, some));
      }
      Attention now = shape;
      now.tokens = some;
      Attend(context, now, {now_q.data(), now_k.data(), now_v.data(), now_start.data(), now_count.data(),
                            keys.data.get(), values.data.get(), keys.group_scale.data(), values.group_scale.data(),
                            now_out.data()});
      for (int64_t b = 0; b < shape.batch; ++b) {
        std::copy(now_out.begin() + b * some * query, now_out.begin() + (b + 1) * some * query,
                  out.begin() + (b * shape.tokens + first) * query);
      }
    }
    return out;
  }

  // Token by token; the caches' exact values take them.
  std::vector<double> Oracle() {
    std::vector<double> out(q.size());
    const int64_t row = shape.num_kv_heads * shape.head_dim, head_dim = shape.head_dim;
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t t = 0; t < count[b]; ++t) {
        const int64_t position = start[b] + t, token = b * shape.tokens + t, now = position % shape.slots;
        for (int64_t i = 0; i < row; ++i) {
          keys.values[(b * shape.slots + now) * row + i] = k[token * row + i];
          values.values[(b * shape.slots + now) * row + i] = v[token * row + i];
        }
        for (int64_t h = 0; h < shape.num_heads; ++h) {
          const int64_t kv = h / (shape.num_heads / shape.num_kv_heads);
          double* wanted = out.data() + (token * shape.num_heads + h) * head_dim;
          double total = 0;
          for (int64_t slot = 0; slot < shape.slots; ++slot) {
            const int64_t age = ((position - slot) % shape.slots + shape.slots) % shape.slots;
            if (age > position || age >= shape.window) continue;
            double score = 0;
            for (int64_t i = 0; i < head_dim; ++i) {
              score += shape.scale * q[(token * shape.num_heads + h) * head_dim + i] *
                       keys.Row((b * shape.slots + slot) * shape.num_kv_heads + kv)[i];
            }
            total += std::exp(score);
            for (int64_t i = 0; i < head_dim; ++i) {
              wanted[i] += std::exp(score) * values.Row((b * shape.slots + slot) * shape.num_kv_heads + kv)[i];
            }
          }
          for (int64_t i = 0; i < head_dim; ++i) wanted[i] /= total;
        }
      }
    }
    return out;
  }
};

// One token in an unfilled cache and one in a ring that has gone round; several, of ragged number, over the wrap; and an
// idle sequence. In one call, in calls of some tokens, and one by one.
void TestAttend(const Case& c) {
  const struct {
    int64_t heads, kv_heads, head_dim, slots, window;
  } shapes[] = {{4, 4, 64, 200, 1 << 20}, {6, 2, 128, 96, 96}, {4, 2, 10, 70, 33},
                {7, 1, 128, 65, 65}, {10, 2, 64, 65, 65}, {6, 1, 96, 65, 40}};
  for (Type type : {Type::kF32, Type::kBF16, Type::kF16, Type::kI8x32}) {
    for (const auto& s : shapes) {
      for (int64_t tokens : {1, 2, 40}) {
        const bool wraps = tokens == 1 || s.window < s.slots;
        const int32_t last = static_cast<int32_t>(wraps ? s.slots + 31 : s.slots - tokens);
        const Attention shape{3, tokens, s.heads, s.kv_heads, s.head_dim, s.slots, type, s.window, 0.3f};
        AttendCase f(c.random, shape, {5, last, 7}, {static_cast<int32_t>(tokens + 1) / 2, static_cast<int32_t>(tokens), 0});
        const std::string what = c.name + " attend " + kTypeNames[static_cast<int>(type)] + " " +
                                 std::to_string(s.slots) + " slots, " + std::to_string(tokens) + " tokens";
        const std::vector<uint8_t> before = f.Caches();
        const std::vector<float> found = f.Run(c.context(), tokens);
        const std::vector<uint8_t> after = f.Caches();
        // The last sequence is idle.
        const size_t keys = f.keys.view.rows * f.keys.view.stride;
        Expect(!std::memcmp(after.data() + keys / 3 * 2, before.data() + keys / 3 * 2, keys / 3), what + ": idle rows");
        for (int64_t at_once : {1, 7}) {
          f.SetCaches(before);
          const std::vector<float> again = f.Run(c.context(), at_once);
          Expect(!std::memcmp(again.data(), found.data(), found.size() * sizeof(float)), what + ": other bits by parts");
          Expect(f.Caches() == after, what + ": another cache by parts");
        }
        ExpectClose(found, f.Oracle(), 1e-5, what);
      }
    }
  }
}

std::vector<float> Everything(const Kernels& kernels, const Pool& pool) {
  Random random;
  FfnCase f(random, Type::kBF16, Type::kI4, 160, 700, 40, 3);
  const Context context{kernels, pool};
  std::vector<float> y(3 * 160), z(3 * 160), o(9 * 700);
  std::vector<int32_t> counts(6);
  const FfnSpec spec{Activation::kRelu, UpActivation::kLinear, false};
  SparseFfn(context, f.x.data(), 3, f.ffn(spec), f.predictor(), spec, kAll, y.data(), counts.data());
  DenseFfn(context, f.x.data(), 3, f.ffn(spec), spec, z.data());
  Linear(context, f.x.data(), 3, {f.gate.view, f.up.view, f.down_t.view}, {o.data(), o.data() + 2100, o.data() + 4200});
  y.insert(y.end(), z.begin(), z.end());
  y.insert(y.end(), o.begin(), o.end());
  for (Type type : {Type::kBF16, Type::kI8x32}) {
    AttendCase a(random, {2, 3, 4, 2, 64, 300, type, 1 << 20, 0.3f}, {250, 100}, {3, 2});
    const std::vector<float> attended = a.Run(context, 3);
    y.insert(y.end(), attended.begin(), attended.end());
  }
  return y;
}

void TestThreads(const Kernels& kernels) {
  const Pool alone;
  const std::vector<float> wanted = Everything(kernels, alone);
  for (int count : {2, 4}) {
    Threads threads(count);
    for (int repeat = 0; repeat < 20; ++repeat) {
      const std::vector<float> found = Everything(kernels, threads.pool);
      Expect(!std::memcmp(found.data(), wanted.data(), wanted.size() * sizeof(float)),
             std::string(kernels.name) + ": " + std::to_string(count) + " threads give other bits than one");
    }
  }
  // A pool so busy that its threads start when the operation is long over.
  std::vector<std::function<void()>> late;
  const Pool busy{4, [&](std::function<void()> task) { late.push_back(std::move(task)); }};
  Expect(Everything(kernels, busy) == wanted, std::string(kernels.name) + ": a busy pool changes the result");
  for (const auto& task : late) task();
  Expect(!late.empty(), "no help was asked for");
}

void TestChecker() {
  alignas(8) float data[8] = {};
  const auto message = [&](const Buffer& buffer) {
    Checker check("linear");
    check.Expect(buffer, Element::kF32, {2, -1});
    return check.message();
  };
  Expect(message({"x", Element::kF32, {2, 4}, data}).empty(), "a good buffer is refused");
  const std::string shape = message({"x", Element::kF32, {3, 4}, data});
  Expect(shape == "linear: x has shape (3, 4), expected (2, any)", shape);
  const std::string type = message({"x", Element::kI8, {2, 4}, data});
  Expect(type == "linear: x is int8, expected float32", type);
  const std::string place = message({"x", Element::kF32, {2, 1}, reinterpret_cast<uint8_t*>(data) + 2});
  Expect(place == "linear: x is not aligned to its elements of 4 bytes", place);
  Checker check("linear");
  check.ExpectMatrix({"weight 0", Element::kU8, {2, 4}, data}, {"weight 0's scale", Element::kF32, {3, 1}, data}, -1, 9);
  Expect(check.message() == "linear: weight 0 has shape (2, 4), expected (any, 5); weight 0's scale has shape (3, 1), "
                            "expected (2, 1)", check.message());
}

}  // namespace

// Tests the instruction set that the argument names, or all that this processor runs.
int main(int num_arguments, char** arguments) {
  Random random;
  for (const Kernels* const* kernels = RunnableKernels(); *kernels; ++kernels) {
    if (num_arguments > 1 && std::strcmp(arguments[1], (*kernels)->name) != 0) continue;
    Threads threads(2);
    const Case c{**kernels, threads, random, (*kernels)->name};
    TestTakeRows(c);
    TestFloat16(c);
    TestLinear(c);
    TestRmsNorm(c);
    TestFfn(c);
    TestRoute(c);
    TestCompany(c);
    TestDamage(c);
    TestAttend(c);
    TestThreads(**kernels);
    std::printf("%s: done\n", (*kernels)->name);
  }
  TestChecker();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
