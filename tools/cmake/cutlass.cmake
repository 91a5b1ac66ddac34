# SPDX-License-Identifier: Apache-2.0
# Find the CUTLASS headers: -D CUTLASS_INCLUDE_DIR, then the environment, then the PyPI package nvidia-cutlass. Without
# them a build that asked for CUDA stops; one that found a GPU by itself goes on without the kernels that need them.
set(CUTLASS_INCLUDE_DIR "$ENV{CUTLASS_INCLUDE_DIR}" CACHE PATH "Folder that holds cutlass/cutlass.h")
if(NOT EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/cutlass.h")
  set(script "import importlib.util as u, pathlib as p; s = u.find_spec('cutlass_library')"
    "print(p.Path(s.origin).parent / 'source' / 'include' if s else '')")
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${script}"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(EXISTS "${found}/cutlass/cutlass.h")
    set(CUTLASS_INCLUDE_DIR "${found}" CACHE PATH "" FORCE)
  else()
    set(CUTLASS_INCLUDE_DIR "" CACHE PATH "" FORCE)
  endif()
endif()
if(CUTLASS_INCLUDE_DIR)
  message(STATUS "fastpost: CUTLASS headers in ${CUTLASS_INCLUDE_DIR}")
else()
  if(NOT FASTPOST_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "fastpost: CUDA is on but the CUTLASS headers were not found. Type one of\n"
      "  FASTPOST_CUDA=ON pip install .                    (fetches them for this build)\n"
      "  pip install --no-deps nvidia-cutlass==4.2.0.0     (then build with --no-build-isolation)\n"
      "  pip install . -C cmake.define.FASTPOST_CUDA=ON -C cmake.define.CUTLASS_INCLUDE_DIR=/path/to/cutlass/include\n"
      "or build for CPU only: pip install . -C cmake.define.FASTPOST_CUDA=OFF")
  endif()
  message(WARNING "fastpost: no CUTLASS headers, so the kernels for Hopper are left out. FASTPOST_CUDA=ON pip install . "
    "builds all")
endif()
