// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "ops.h"

namespace fastpost {

void moe_route(Tensor, int64_t, bool, bool, float, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
               Tensor) {
  throw std::runtime_error("[moe_route] is being built");
}
void moe_route_backward(Tensor, bool, bool, float, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) {
  throw std::runtime_error("[moe_route] is being built");
}
void moe_route_plan(Tensor, int64_t, Tensor, Tensor, Tensor, Tensor) {
  throw std::runtime_error("[moe_route] is being built");
}
int64_t moe_route_bytes(Tensor, int64_t, int64_t) { throw std::runtime_error("[moe_route] is being built"); }

}  // namespace fastpost
