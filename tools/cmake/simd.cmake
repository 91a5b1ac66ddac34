# SPDX-License-Identifier: Apache-2.0
# Compile each *_simd.cpp once per instruction set. The macro FP_ISA names the namespace of that copy; cpp/core/isa.cpp
# picks one at run time. Such a file includes no standard header with inline code: the linker keeps only one copy of
# an inline function, and it could be the AVX-512 one.
function(fastpost_add_simd_sources target)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(isas baseline avx2 avx512 avx512bf16)
    set(flags_baseline "")
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
    set(flags_avx512bf16 ${flags_avx512} -mavx512bf16 -mavx512vnni)  # every CPU with the first has the second
    target_compile_definitions(${target} PRIVATE FP_X86_DISPATCH)
  else()
    set(isas baseline)
    set(flags_baseline "")
  endif()
  foreach(isa ${isas})
    add_library(${target}_${isa} OBJECT ${ARGN})
    target_include_directories(${target}_${isa} PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/cpp)
    target_compile_definitions(${target}_${isa} PRIVATE FP_ISA=${isa})
    # -ffp-contract=fast lets the plain C++ fallback use fma where the set has it; errno would block vector code.
    target_compile_options(${target}_${isa} PRIVATE -O3 -fno-math-errno -ffp-contract=fast ${flags_${isa}})
    fastpost_add_warnings(${target}_${isa})
    # GCC 12 and 13 warn about _mm512_undefined_ps inside their own header.
    target_compile_options(${target}_${isa} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized -Wno-uninitialized>)
    target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:${target}_${isa}>)
  endforeach()
endfunction()
