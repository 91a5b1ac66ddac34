// SPDX-License-Identifier: Apache-2.0
// Large pages for large tensors. Fresh memory costs a page fault for each 4 KiB, which for a gradient of the weight's size
// is as much as writing it three times.
#pragma once

#include "core/tensor.h"

namespace fastpost {

// Asks the system to back a CPU tensor that nobody has touched yet with large pages. A wish: where it cannot be granted,
// nothing happens.
void use_large_pages(Tensor t);

}  // namespace fastpost
