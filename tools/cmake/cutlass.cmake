# SPDX-License-Identifier: Apache-2.0
# Find the CUTLASS headers: -D CUTLASS_INCLUDE_DIR, then the environment, then the PyPI package nvidia-cutlass.
set(CUTLASS_INCLUDE_DIR "$ENV{CUTLASS_INCLUDE_DIR}" CACHE PATH "Folder that holds cutlass/cutlass.h")
if(NOT EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/cutlass.h")
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u, pathlib as p; s = u.find_spec('cutlass_library'); print(p.Path(s.origin).parent / 'source' / 'include' if s else '')"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(EXISTS "${found}/cutlass/cutlass.h")
    set(CUTLASS_INCLUDE_DIR "${found}" CACHE PATH "" FORCE)
  else()
    message(FATAL_ERROR "fastpost: CUDA is on but the CUTLASS headers were not found. Type one of\n"
      "  pip install --no-deps nvidia-cutlass==4.2.0.0     (then build with --no-build-isolation)\n"
      "  pip install . -C cmake.define.FASTPOST_CUDA=ON -C cmake.define.CUTLASS_INCLUDE_DIR=/path/to/cutlass/include\n"
      "or build for CPU only: -C cmake.define.FASTPOST_CUDA=OFF")
  endif()
endif()
message(STATUS "fastpost: CUTLASS headers in ${CUTLASS_INCLUDE_DIR}")
