// SPDX-License-Identifier: Apache-2.0
// Which instruction set the SIMD kernels run on. Chosen once: the best that the CPU has, or FASTPOST_ISA.
#pragma once

namespace fastpost {

enum class Isa { Baseline, Avx2, Avx512, Avx512Bf16 };

Isa cpu_isa();
bool is_amd();
bool has_matrix_units();  // AMX with bfloat16
const char* name(Isa isa);

// Picks the copy of a kernel table that was compiled for this CPU. A *_simd.cpp file defines `const Table* table()` in
// namespace fastpost::<isa>; FP_DECLARE_SIMD(Table, table) declares them all and defines fastpost::table().
// clang-format off
#ifdef FP_X86_DISPATCH
#define FP_DECLARE_SIMD(Table, table)          \
  namespace baseline { const Table* table(); } \
  namespace avx2 { const Table* table(); }     \
  namespace avx512 { const Table* table(); }   \
  namespace avx512bf16 { const Table* table(); } \
  inline const Table& table() {                \
    static const Table* chosen = [] {          \
      switch (cpu_isa()) {                     \
        case Isa::Avx512Bf16: return avx512bf16::table(); \
        case Isa::Avx512: return avx512::table(); \
        case Isa::Avx2: return avx2::table();  \
        default: return baseline::table();     \
      }                                        \
    }();                                       \
    return *chosen;                            \
  }
#else
#define FP_DECLARE_SIMD(Table, table)          \
  namespace baseline { const Table* table(); } \
  inline const Table& table() { return *baseline::table(); }
#endif
// clang-format on

}  // namespace fastpost
