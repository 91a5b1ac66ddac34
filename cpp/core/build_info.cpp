// SPDX-License-Identifier: Apache-2.0
#include "core/build_info.h"

#include "core/isa.h"
#include "core/parallel.h"

namespace fastpost {

std::vector<std::pair<std::string, std::string>> build_info() {
  const std::string archs = FASTPOST_CUDA_ARCHS;
  // clang-format off
  return {
      {"version", FASTPOST_VERSION},
      {"compiler", __VERSION__},
      {"cuda", archs.empty() ? "off" : archs},
      {"cpu_isa", name(cpu_isa())},
      {"threads", thread_source()},
  };
  // clang-format on
}

}  // namespace fastpost
