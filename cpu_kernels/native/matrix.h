// What the kernels compute on: a stored matrix, whatever its element type.
#pragma once

#include <cstdint>

namespace jsparse {

enum class Type : int { kF32, kBF16, kF16, kI8, kI4, kI4x32, kI8x32 };

inline bool IsLowBit(Type type) { return type == Type::kI8 || type == Type::kI4 || type == Type::kI4x32; }

inline int64_t Bits(Type type) {
  switch (type) {
    case Type::kF32: return 32;
    case Type::kBF16:
    case Type::kF16: return 16;
    case Type::kI8:
    case Type::kI8x32: return 8;
    case Type::kI4:
    case Type::kI4x32: return 4;
  }
  return 0;
}

// Rows of `cols` elements. Element (i, j) is its stored value, times scale[i] where there are scales. kI4 packs two
// elements a byte, q + 8 each, the even one in the low nibble; an odd row ends in half a byte. kI4x32 packs q so too, for the
// value codebook[q] times a scale that 32 columns share: the row's scales, float16, follow its packed elements. kI8x32, of
// caches alone, has its scales elsewhere, bfloat16.
struct Matrix {
  Type type = Type::kF32;
  const void* data = nullptr;
  const float* scale = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // bytes from one row to the next
  int64_t ahead = 0;   // bytes from a row to what is read after it; 0 where that is simply the next rows
  const int8_t* codebook = nullptr;
  const uint16_t* group_scale = nullptr;  // of kI8x32, group_stride of them from one row to the next
  int64_t group_stride = 0;

  const uint8_t* Row(int64_t i) const { return static_cast<const uint8_t*>(data) + i * stride; }
};

// Of a row: 32 columns share a scale, where not all do.
inline int64_t NumGroups(int64_t cols) { return (cols + 31) / 32; }
// Of a row's elements.
inline int64_t RowBytes(Type type, int64_t cols) { return (cols * Bits(type) + 7) / 8; }
// Of a row with the scales that lie in it.
inline int64_t RowStride(Type type, int64_t cols) {
  return RowBytes(type, cols) + (type == Type::kI4x32 ? 2 * NumGroups(cols) : 0);
}

// Some rows of a matrix: those in `list`, or without a list the `count` rows from `first` on.
struct Rows {
  const int32_t* list = nullptr;
  int64_t first = 0;
  int64_t count = 0;

  int64_t operator[](int64_t i) const { return list ? list[i] : first + i; }
};

}  // namespace jsparse
