// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace fastpost {

// Hands out pieces of the caller's workspace. Without memory behind it, it only adds up what is needed.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

}  // namespace fastpost
