// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace fastpost {

// What was built and what this machine makes of it, for `fastpost env`: name, value.
std::vector<std::pair<std::string, std::string>> build_info();

}  // namespace fastpost
