// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace cutlass::arch {

template <unsigned kRegisters>
void warpgroup_reg_alloc() {}
template <unsigned kRegisters>
void warpgroup_reg_dealloc() {}

}  // namespace cutlass::arch
