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
  # Files named *_sm90.cu use instructions of sm_90a alone, through CUTLASS: each is compiled for nothing else.
  file(GLOB cuda_sources CONFIGURE_DEPENDS cuda/ops/*.cu)
  file(GLOB sm90_sources CONFIGURE_DEPENDS cuda/ops/*_sm90.cu)
  list(REMOVE_ITEM cuda_sources ${sm90_sources})
  add_library(fastpost_cuda STATIC ${cuda_sources})
  set(cuda_targets fastpost_cuda)
  include(cutlass)  # sets CUTLASS_INCLUDE_DIR or stops with the command to type
  if(CUTLASS_INCLUDE_DIR AND "${FASTPOST_CUDA_ARCHITECTURES}" MATCHES "90a")
    add_library(fastpost_cuda_sm90 OBJECT ${sm90_sources})
    list(APPEND cuda_targets fastpost_cuda_sm90)
    target_sources(fastpost_cuda PRIVATE $<TARGET_OBJECTS:fastpost_cuda_sm90>)
    target_include_directories(fastpost_cuda_sm90 SYSTEM PRIVATE ${CUTLASS_INCLUDE_DIR})
    # NDEBUG whatever the build type: one assert inside CUTLASS's main loop and its matrix instructions run one by one.
    target_compile_options(fastpost_cuda_sm90 PRIVATE --expt-relaxed-constexpr -DNDEBUG)
  endif()
  foreach(target ${cuda_targets})
    # The CUDA runtime is linked statically: the core then loads on machines without a GPU and beside any torch.
    set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
      CUDA_RUNTIME_LIBRARY Static POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden)
    target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/cpp)
    # Registers that spill to memory count as a warning.
    target_compile_options(${target} PRIVATE -Xcompiler=-Wall,-Wextra -Xptxas=-warn-spills
      $<$<BOOL:${FASTPOST_WERROR}>:-Werror=all-warnings>)
    if(TARGET fastpost_cuda_sm90)
      target_compile_definitions(${target} PRIVATE FASTPOST_SM90)
    endif()
  endforeach()
  if(TARGET fastpost_cuda_sm90)
    set_target_properties(fastpost_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  endif()
endif()
