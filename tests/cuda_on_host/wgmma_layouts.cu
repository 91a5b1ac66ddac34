// SPDX-License-Identifier: Apache-2.0
// Whether CuTe describes factors of WGMMA in shared memory as wide_tile.cuh does, and finds each element where gathered rows
// are put. A program for the host; says what differs, or nothing.
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "cuda/ops/grouped_gemm.cuh"

namespace {

namespace cuda = fastpost::cuda;
namespace gmma = cute::SM90::GMMA;
using T = cutlass::bfloat16_t;

// element(copied row, column in it) -> (row of the product, what is summed over)
template <gmma::Major kMajor, class Layout, class Element>
void compare(const char* name, const Layout& layout, int boxes, int copied_rows, Element element) {
  const auto plain = cute::as_position_independent_swizzle_layout(layout);
  int differ = 0;
  for (int thread = 0; thread < 128; ++thread) {
    const cuda::GatherShare share = cuda::gather_share(thread);
    for (int box = 0; box < boxes; ++box) {
      for (int i = 0; i < copied_rows / cuda::kGatherStep; ++i) {
        for (int c = 0; c < 8; ++c) {
          const auto [row, k] = element(share.row + i * cuda::kGatherStep, box * 64 + share.column + c);
          const int at = share.offset + i * cuda::kGatherBytes + box * cuda::kBoxBytes + 2 * c;
          differ += 2 * static_cast<int>(plain(row, k)) != at;
        }
      }
    }
  }
  if (differ) std::printf("%s: %d elements lie elsewhere\n", name, differ);
  const auto tensor = cute::make_tensor(cute::make_smem_ptr(static_cast<T*>(nullptr)), layout);
  const auto slice = cute::local_tile(tensor, cute::Shape<cute::_256, cute::_16>{}, cute::make_coord(0, 0));
  const uint64_t theirs = gmma::make_gmma_desc<kMajor>(slice), ours = cuda::wide_descriptor(kMajor == gmma::Major::MN);
  if (theirs != ours)
    std::printf("%s: descriptor %llx, not %llx\n", name, static_cast<unsigned long long>(theirs),
                static_cast<unsigned long long>(ours));
  if (2 * static_cast<int>(plain(0, 16)) != cuda::wide_step(kMajor == gmma::Major::MN) * 16) {
    std::printf("%s: the next 16 are elsewhere\n", name);
  }
}

struct Place {
  int row, k;
};

}  // namespace

int main() {
  using Shape = cute::Shape<cute::_256, cute::_64>;
  compare<gmma::Major::K>("in rows", cute::tile_to_shape(gmma::Layout_K_SW128_Atom<T>{}, Shape{}), 1, 256,
                          [](int copied, int column) { return Place{copied, column}; });
  compare<gmma::Major::MN>(
      "in columns", cute::tile_to_shape(gmma::Layout_MN_SW128_Atom<T>{}, Shape{}, cute::Step<cute::_2, cute::_1>{}), 4,
      64, [](int copied, int column) { return Place{column, copied}; });
}
