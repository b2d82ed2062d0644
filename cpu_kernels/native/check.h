// Arguments from outside, checked before a kernel sees them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "matrix.h"

namespace jsparse {

enum class Element : int { kF32, kBF16, kF16, kI8, kU8, kI32, kU32, kOther };

struct Buffer {
  std::string name;
  Element element;
  std::vector<int64_t> dims;
  const void* data;
};

// Collects what is wrong; `message` is empty while nothing is.
class Checker {
 public:
  explicit Checker(std::string operation) : operation_(std::move(operation)) {}

  // The buffer has this element type and shape, -1 standing for any size, and lies at a multiple of its element.
  void Expect(const Buffer& buffer, Element element, const std::vector<int64_t>& dims);
  // A matrix of `rows` (-1: any) rows of `cols` elements, whole or low-bit with one scale a row; a whole matrix has
  // an empty `scale`.
  Matrix ExpectMatrix(const Buffer& values, const Buffer& scale, int64_t rows, int64_t cols);
  void Fail(const std::string& problem);

  const std::string& message() const { return message_; }

 private:
  std::string operation_;
  std::string message_;
};

}  // namespace jsparse
