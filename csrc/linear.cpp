// SPDX-License-Identifier: Apache-2.0
#include "linear.hpp"

#include <string.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "room.hpp"
#include "sizes.hpp"

namespace fastloss {
namespace {

constexpr int64_t kTaskElements = 64 * 1024;
constexpr int kMostParts = 8;  // of the rows, each with a number for every column

}  // namespace

void ordered_product(const Tensor& hidden, const Tensor& weight, const void* bias, const Tensor& out) {
  constexpr int64_t kTasksOfThread = 8, kMostPanels = 8, kLeastRows = 48;
  const int64_t rows = out.shape[0], classes = out.shape[1], depth = hidden.shape[1];
  const RowKernels& table = out.dtype == kF64 ? kernels().f64 : kernels().f32;
  const size_t itemsize = itemsize_of(hidden.dtype);
  const Tile matrix{weight.data, weight.dtype, weight.strides[0], weight.strides[1]};
  const int threads = rows * classes * depth < kSerialProduct ? 1 : get_num_threads();
  const bool stream = rows * classes * itemsize_of(out.dtype) >= kStreamBytes;
  // A task is a few panels of classes one after the other, so that it can fetch the next; or a part of the tokens of a panel,
  // where there are few panels.
  const int64_t panels = divided(classes, kLanes);
  const int64_t parts = std::clamp<int64_t>(divided(kTasksOfThread * threads, panels), 1, divided(rows, kLeastRows));
  const int64_t of_task = std::clamp<int64_t>(panels / (kTasksOfThread * threads), 1, kMostPanels);
  parallel_for(divided(panels, of_task) * parts, threads, [&](int64_t task) {
    thread_local Room<char> room;
    const int64_t first = task / parts * of_task * kLanes, part = task % parts;
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    const Tile to{out.data + begin * out.strides[0] * itemsize_of(out.dtype), out.dtype, out.strides[0], 1};
    table.ordered_product(hidden.data + begin * hidden.strides[0] * itemsize, hidden.strides[0], end - begin, matrix, first,
                          std::min(classes, first + of_task * kLanes), depth, bias, to, stream,
                          room.of(depth * kLanes * itemsize));
  });
}

void product(const Tensor& left, const Tensor& right, ProductSums sums, const Tensor& out) {
  constexpr int64_t kTasksOfThread = 8, kManyRows = 768, kLeastRows = 24, kMostColumns = 1024;
  const int64_t rows = out.shape[0], columns = out.shape[1], depth = right.shape[0];
  if (rows * columns == 0) return;
  const RowKernels& table = out.dtype == kF64 ? kernels().f64 : kernels().f32;
  const size_t itemsize = itemsize_of(out.dtype);
  const int64_t threads = rows * columns * depth < kSerialProduct ? 1 : get_num_threads();
  // A task packs what it reads of the right factor, some of its columns, and reads as many rows of the left: tasks are about as
  // high as wide while there are as many as threads. Where there are many rows, there are more tasks, for an even end.
  const int64_t panels = divided(columns, kLanes);
  int64_t across = 1;
  while (across < std::min(panels, threads) && across * across * rows < threads * columns) ++across;
  const int64_t wide = divided(panels, across) * kLanes;
  across = divided(columns, wide);
  const int64_t least = std::min(divided(threads, across), divided(rows, kLeastRows));
  const int64_t down = std::clamp(rows / kManyRows, least, kTasksOfThread * threads);
  const auto moved = [](const Tensor& matrix, int64_t elements) { return matrix.data + elements * itemsize_of(matrix.dtype); };
  parallel_for(across * down, static_cast<int>(threads), [&](int64_t task) {
    thread_local Room<char> room;
    const int64_t row = rows * (task / across) / down, rows_end = rows * (task / across + 1) / down;
    const int64_t end = std::min(columns, (task % across + 1) * wide);
    const Tile from{moved(left, row * left.strides[0]), left.dtype, left.strides[0], left.strides[1]};
    for (int64_t first = task % across * wide; first < end; first += kMostColumns) {
      const int64_t count = std::min(kMostColumns, end - first);
      const Tile with{moved(right, first * right.strides[1]), right.dtype, right.strides[1], right.strides[0]};
      table.product(from, rows_end - row, with, count, depth, sums, moved(out, row * out.strides[0] + first), out.strides[0],
                    room.of(room_of_product(count, depth) * itemsize));
    }
  });
}

void collect(const SampledGradient& sampled, Dtype values, const SparseRows& out) {
  const auto rows = static_cast<int64_t>(sampled.rows.size());
  out.start[0] = 0;
  for (int64_t row = 0; row < rows; ++row) out.start[row + 1] = out.start[row] + int64_t(sampled.rows[row].size());
  const int threads = out.start[rows] < kTaskElements ? 1 : get_num_threads();
  parallel_for(threads, threads, [&](int64_t part) {
    for (int64_t row = rows * part / threads; row < rows * (part + 1) / threads; ++row) {
      int64_t at = out.start[row];
      for (const Kept<double>& entry : sampled.rows[row]) {
        out.ids[at] = entry.column;
        if (values == kF64) {
          static_cast<double*>(out.values)[at++] = entry.value;
        } else {
          static_cast<float*>(out.values)[at++] = static_cast<float>(entry.value);
        }
      }
    }
  });
}

void multiply(const SparseRows& sparse, const Tensor& matrix, const Tensor& out) {
  const int64_t width = matrix.shape[1];
  const size_t itemsize = itemsize_of(matrix.dtype);
  const size_t value_size = matrix.dtype == kF64 ? sizeof(double) : sizeof(float);
  const Tile tile{matrix.data, matrix.dtype, matrix.strides[0], 1};
  const bool stream = sparse.rows * width * static_cast<int64_t>(itemsize) >= kStreamBytes;
  const RowKernels& table = matrix.dtype == kF64 ? kernels().f64 : kernels().f32;
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  const int threads = sparse.start[sparse.rows] * width < kTaskElements ? 1 : get_num_threads();
  parallel_for(divided(sparse.rows, grain), threads, [&](int64_t task) {
    for (int64_t row = task * grain; row < std::min(sparse.rows, (task + 1) * grain); ++row) {
      const int64_t begin = sparse.start[row];
      const Tile to{out.data + row * out.strides[0] * itemsize, out.dtype, 0, 1};
      table.weighted_rows(tile, width, sparse.ids + begin, static_cast<const char*>(sparse.values) + begin * value_size,
                          sparse.start[row + 1] - begin, to, stream);
    }
  });
}

void transpose(const SparseRows& sparse, Dtype values, const SparseRows& out) {
  const int64_t entries = sparse.start[sparse.rows];
  const size_t size = values == kF64 ? sizeof(double) : sizeof(float);
  // Each part of the rows counts its entries, and then knows where those of each id go.
  const int parts = entries < kTaskElements ? 1 : std::min(get_num_threads(), kMostParts);
  std::vector<int64_t> places(parts * out.rows);
  const auto in_parts = [&](auto visit) {
    parallel_for(parts, parts, [&](int64_t part) {
      int64_t* const of_part = places.data() + part * out.rows;
      for (int64_t row = sparse.rows * part / parts; row < sparse.rows * (part + 1) / parts; ++row) {
        for (int64_t k = sparse.start[row]; k < sparse.start[row + 1]; ++k) visit(row, k, of_part[sparse.ids[k]]);
      }
    });
  };
  in_parts([](int64_t, int64_t, int64_t& count) { ++count; });
  int64_t at = 0;
  for (int64_t id = 0; id < out.rows; ++id) {
    out.start[id] = at;
    for (int part = 0; part < parts; ++part) at += std::exchange(places[part * out.rows + id], at);
  }
  out.start[out.rows] = at;
  in_parts([&](int64_t row, int64_t k, int64_t& place) {
    out.ids[place] = static_cast<int32_t>(row);
    memcpy(static_cast<char*>(out.values) + place * size, static_cast<const char*>(sparse.values) + k * size, size);
    ++place;
  });
}

}  // namespace fastloss
