# SPDX-License-Identifier: Apache-2.0
# Decide whether CUDA is built, and how. Result: FASTPOST_BUILD_CUDA, FASTPOST_CUDA_BUILT (the arch list as text).
set(FASTPOST_BUILD_CUDA OFF)
set(FASTPOST_CUDA_BUILT "")
if(FASTPOST_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  file(GLOB gpu_devices /dev/nvidia[0-9]* /dev/dxg)
  if(CMAKE_CUDA_COMPILER AND gpu_devices)
    set(FASTPOST_BUILD_CUDA ON)
  elseif(CMAKE_CUDA_COMPILER)
    message(STATUS "fastpost: nvcc is here but no GPU is; building for CPU. To build CUDA kernels anyway:\n"
      "     pip install . -C cmake.define.FASTPOST_CUDA=ON")
  endif()
elseif(FASTPOST_CUDA)
  set(FASTPOST_BUILD_CUDA ON)
endif()

if(FASTPOST_BUILD_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES ${FASTPOST_CUDA_ARCHITECTURES})
  enable_language(CUDA)
  string(REPLACE ";" "," FASTPOST_CUDA_BUILT "${FASTPOST_CUDA_ARCHITECTURES}")
  string(REPLACE "-real" "" FASTPOST_CUDA_BUILT "${FASTPOST_CUDA_BUILT}")
  include(cutlass)  # sets CUTLASS_INCLUDE_DIR or stops with the command to type
  file(GLOB cuda_sources CONFIGURE_DEPENDS cuda/ops/*.cu cuda/core/*.cu)
  add_library(fastpost_cuda STATIC ${cuda_sources})
  set_target_properties(fastpost_cuda PROPERTIES CUDA_STANDARD 20 CUDA_RUNTIME_LIBRARY Static
    POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(fastpost_cuda PUBLIC ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/cpp)
  target_include_directories(fastpost_cuda SYSTEM PRIVATE ${CUTLASS_INCLUDE_DIR})
  # Objectives are constexpr functions shared with the host; warnings are errors because no one watches a nvcc log.
  target_compile_options(fastpost_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:
    --expt-relaxed-constexpr -Werror all-warnings -Xptxas -warn-spills>)
endif()
