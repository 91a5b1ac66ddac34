// SPDX-License-Identifier: Apache-2.0
#include "core/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef FP_X86_DISPATCH
#include <cpuid.h>
#endif

namespace fastpost {
namespace {

constexpr Isa kAll[] = {Isa::Baseline, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16};

Isa best() {
#ifdef FP_X86_DISPATCH
  // These report what both the CPU and the operating system support.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return Isa::Avx512Bf16;
  if (avx512) return Isa::Avx512;
  if (avx2) return Isa::Avx2;
#endif
  return Isa::Baseline;
}

Isa choose() {
  const char* wanted = std::getenv("FASTPOST_ISA");
  if (!wanted || !*wanted) return best();
  for (Isa isa : kAll) {
    if (std::strcmp(wanted, name(isa)) == 0) {
      if (isa <= best()) return isa;
      throw std::invalid_argument("FASTPOST_ISA=" + std::string(wanted) + ": this CPU has only up to " + name(best()) +
                                  ".");
    }
  }
  throw std::invalid_argument("FASTPOST_ISA=" + std::string(wanted) +
                              ": expected baseline, avx2, avx512 or avx512bf16.");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

bool is_amd() {
#ifdef FP_X86_DISPATCH
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

bool has_matrix_units() {
#ifdef FP_X86_DISPATCH
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
  return false;
#endif
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::Avx2: return "avx2";
    case Isa::Avx512: return "avx512";
    case Isa::Avx512Bf16: return "avx512bf16";
    default: return "baseline";
  }
}

}  // namespace fastpost
