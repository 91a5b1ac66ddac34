// SPDX-License-Identifier: Apache-2.0
#include "core/large_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastpost {

void use_large_pages(Tensor t) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data) + t.numel() * itemsize(t.dtype)) / kPage * kPage;
  if (t.device == Device::CPU && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

}  // namespace fastpost
