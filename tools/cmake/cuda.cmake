# SPDX-License-Identifier: Apache-2.0
# Decide whether CUDA is built, and how. Result: FASTPOST_BUILD_CUDA, FASTPOST_CUDA_BUILT (the arch list as text).
set(FASTPOST_BUILD_CUDA OFF)
set(FASTPOST_CUDA_BUILT "")
file(GLOB gpu_devices /dev/nvidia[0-9]* /dev/dxg)
find_program(FASTPOST_NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin)
if(FASTPOST_CUDA STREQUAL "AUTO")
  if(FASTPOST_NVCC AND gpu_devices)
    set(FASTPOST_BUILD_CUDA ON)
  elseif(FASTPOST_NVCC)
    message(STATUS "fastpost: nvcc is here but no GPU is; building for CPU. To build CUDA kernels anyway:\n"
      "     FASTPOST_CUDA=ON pip install .")
  endif()
elseif(FASTPOST_CUDA)
  set(FASTPOST_BUILD_CUDA ON)
endif()

if(FASTPOST_BUILD_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES ${FASTPOST_CUDA_ARCHITECTURES})
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "fastpost: CUDA was asked for but nvcc was not found. Put it on PATH, or type\n"
      "  CUDACXX=/path/to/nvcc FASTPOST_CUDA=ON pip install .")
  endif()
  enable_language(CUDA)
  string(REPLACE ";" "," FASTPOST_CUDA_BUILT "${FASTPOST_CUDA_ARCHITECTURES}")
  string(REPLACE "-real" "" FASTPOST_CUDA_BUILT "${FASTPOST_CUDA_BUILT}")
  file(GLOB cuda_sources CONFIGURE_DEPENDS cuda/ops/*.cu)
  include(cutlass)  # sets CUTLASS_INCLUDE_DIR or stops with the command to type
  add_library(fastpost_cuda STATIC ${cuda_sources})
  # The CUDA runtime is linked statically: the core then loads on machines without a GPU and beside any torch.
  set_target_properties(fastpost_cuda PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
    CUDA_RUNTIME_LIBRARY Static POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(fastpost_cuda PUBLIC ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/cpp)
  if(CUTLASS_INCLUDE_DIR)
    target_include_directories(fastpost_cuda SYSTEM PRIVATE ${CUTLASS_INCLUDE_DIR})
  endif()
  # Registers that spill to memory count as a warning.
  target_compile_options(fastpost_cuda PRIVATE -Xcompiler=-Wall,-Wextra -Xptxas=-warn-spills
    $<$<BOOL:${FASTPOST_WERROR}>:-Werror=all-warnings>)
endif()
