// SPDX-License-Identifier: Apache-2.0
// Columns of a matrix that become rows, for the packed factors of matrix products.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastloss {
namespace {

template <class T>
struct Square;  // rows of 16 bytes, as many as each has elements

// Elements of both in turn, of their low or their high halves.
#if defined(__clang__)
#define FASTLOSS_SHUFFLE(mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTLOSS_SHUFFLE(mask, a, b, ...) __builtin_shuffle(a, b, mask{__VA_ARGS__})
#endif

template <>
struct Square<double> {
  typedef double Row __attribute__((vector_size(16)));
  typedef int64_t Mask __attribute__((vector_size(16)));
  static Row low(Row a, Row b) { return FASTLOSS_SHUFFLE(Mask, a, b, 0, 2); }
  static Row high(Row a, Row b) { return FASTLOSS_SHUFFLE(Mask, a, b, 1, 3); }
};

template <>
struct Square<float> {
  typedef float Row __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  static Row low(Row a, Row b) { return FASTLOSS_SHUFFLE(Mask, a, b, 0, 4, 1, 5); }
  static Row high(Row a, Row b) { return FASTLOSS_SHUFFLE(Mask, a, b, 2, 6, 3, 7); }
};

template <>
struct Square<uint16_t> {
  typedef uint16_t Row __attribute__((vector_size(16)));
  typedef int16_t Mask __attribute__((vector_size(16)));
  static Row low(Row a, Row b) { return FASTLOSS_SHUFFLE(Mask, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static Row high(Row a, Row b) { return FASTLOSS_SHUFFLE(Mask, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
};

#undef FASTLOSS_SHUFFLE

template <class T>
inline void transpose_square(const T* from, int64_t step, T* to, int64_t to_step) {
  using Row = typename Square<T>::Row;
  constexpr int kSide = sizeof(Row) / sizeof(T);
  Row row[kSide], zipped[kSide];
  for (int i = 0; i < kSide; ++i) memcpy(&row[i], from + i * step, sizeof(Row));
  for (int round = 1; round < kSide; round *= 2) {  // a row with the one half of all behind it, log2 times
    for (int i = 0; i < kSide / 2; ++i) {
      zipped[2 * i] = Square<T>::low(row[i], row[i + kSide / 2]);
      zipped[2 * i + 1] = Square<T>::high(row[i], row[i + kSide / 2]);
    }
    for (int i = 0; i < kSide; ++i) row[i] = zipped[i];
  }
  for (int i = 0; i < kSide; ++i) memcpy(to + i * to_step, &row[i], sizeof(Row));
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Columns become rows of `to`. A tile fills whole cache lines of both, and each line that is read is read at once, since lines
// of different rows may drive each other out. Rows are read on and on, and ahead: they come from memory.
template <class T>
void transpose_block(const T* from, int64_t rows, int64_t step, int64_t columns, int64_t to_step, T* to) {
  constexpr int64_t kSide = sizeof(typename Square<T>::Row) / sizeof(T), kLine = 64 / sizeof(T), kTileColumns = 4 * kLine;
  const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t r = 0; r < whole_rows; r += kLine) {
    for (int64_t c = 0; c < whole_columns; c += kTileColumns) {
      for (int64_t j = r; j < smaller(whole_rows, r + kLine); j += kSide) {
        for (int64_t i = c; i < smaller(whole_columns, c + kTileColumns); i += kSide) {
          const T* square = from + j * step + i;
          if (i % kLine == 0) {
            for (int k = 0; k < kSide; ++k) __builtin_prefetch(square + k * step + kTileColumns);
          }
          transpose_square(square, step, to + i * to_step + j, to_step);
        }
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r) to[c * to_step + r] = from[r * step + c];
  }
}

}  // namespace
}  // namespace fastloss
