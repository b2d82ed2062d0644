#include "check.h"

namespace jsparse {

namespace {

const char* Name(Element element) {
  switch (element) {
    case Element::kF32: return "float32";
    case Element::kBF16: return "bfloat16";
    case Element::kF16: return "float16";
    case Element::kI8: return "int8";
    case Element::kU8: return "uint8";
    case Element::kI32: return "int32";
    case Element::kU32: return "uint32";
    case Element::kOther: break;
  }
  return "another type";
}

int64_t Size(Element element) {
  switch (element) {
    case Element::kF32:
    case Element::kI32:
    case Element::kU32: return 4;
    case Element::kBF16:
    case Element::kF16: return 2;
    default: return 1;
  }
}

std::string Shape(const std::vector<int64_t>& dims) {
  std::string text = "(";
  for (size_t i = 0; i < dims.size(); ++i) {
    text += (i ? ", " : "") + (dims[i] < 0 ? std::string("any") : std::to_string(dims[i]));
  }
  return text + ")";
}

bool Fits(const std::vector<int64_t>& found, const std::vector<int64_t>& wanted) {
  if (found.size() != wanted.size()) return false;
  for (size_t i = 0; i < found.size(); ++i) {
    if (wanted[i] >= 0 && found[i] != wanted[i]) return false;
  }
  return true;
}

}  // namespace

void Checker::Fail(const std::string& problem) {
  message_ += (message_.empty() ? operation_ + ": " : "; ") + problem;
}

void Checker::Expect(const Buffer& buffer, Element element, const std::vector<int64_t>& dims) {
  if (buffer.element != element) {
    Fail(buffer.name + " is " + Name(buffer.element) + ", expected " + Name(element));
  }
  if (!Fits(buffer.dims, dims)) Fail(buffer.name + " has shape " + Shape(buffer.dims) + ", expected " + Shape(dims));
  if (reinterpret_cast<uintptr_t>(buffer.data) % Size(buffer.element)) {
    Fail(buffer.name + " is not aligned to its elements of " + std::to_string(Size(buffer.element)) + " bytes");
  }
}

Matrix Checker::ExpectMatrix(const Buffer& values, const Buffer& scale, int64_t rows, int64_t cols) {
  Matrix matrix;
  switch (values.element) {
    case Element::kF32: matrix.type = Type::kF32; break;
    case Element::kBF16: matrix.type = Type::kBF16; break;
    case Element::kF16: matrix.type = Type::kF16; break;
    case Element::kI8: matrix.type = Type::kI8; break;
    case Element::kU8: matrix.type = Type::kI4; break;
    default:
      Fail(values.name + " is " + Name(values.element) +
           ", expected float32, bfloat16, float16, int8 or uint8 (two 4-bit elements)");
      return matrix;
  }
  const bool grouped = matrix.type == Type::kI4 && scale.element == Element::kI8;
  if (grouped) matrix.type = Type::kI4x32;
  matrix.stride = RowStride(matrix.type, cols);
  Expect(values, values.element, {rows, matrix.stride / Size(values.element)});
  matrix.rows = values.dims.empty() ? 0 : values.dims[0];
  matrix.cols = cols;
  matrix.data = values.data;
  if (grouped) {
    Expect(scale, Element::kI8, {16});
    matrix.codebook = static_cast<const int8_t*>(scale.data);
  } else {
    const bool scaled = IsLowBit(matrix.type);
    Expect(scale, Element::kF32, scaled ? std::vector<int64_t>{matrix.rows, 1} : std::vector<int64_t>{0});
    matrix.scale = scaled ? static_cast<const float*>(scale.data) : nullptr;
  }
  return matrix;
}

}  // namespace jsparse
