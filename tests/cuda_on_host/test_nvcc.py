# SPDX-License-Identifier: Apache-2.0
"""Every file of cuda/ops through nvcc, for the architectures that CMake builds: no warning, no register in memory."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import on_host
import pytest

NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

DEFAULT = re.search(r'FASTPOST_CUDA_ARCHITECTURES "([^"]+)"', (on_host.ROOT / "CMakeLists.txt").read_text())[1]
ARCHITECTURES = [arch.removesuffix("-real") for arch in DEFAULT.split(";")]
FLAGS = ["-std=c++20", "-O3", f"-I{on_host.ROOT}", f"-I{on_host.ROOT}/cpp", "-Xcompiler=-Wall,-Wextra",
         "-Werror=all-warnings", "-Xptxas=-v,-warn-spills",
         *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES)]  # fmt: skip


def compile_all(sources, folder):
    """{stem: (return code, everything that was printed)}"""

    def run(source):
        command = [NVCC, *FLAGS, "-c", str(source), "-o", str(folder / (source.stem + ".o"))]
        done = subprocess.run(command, capture_output=True, text=True)
        return source.stem, (done.returncode, done.stdout + done.stderr)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(run, sources))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_all(on_host.KERNELS, tmp_path_factory.mktemp("nvcc"))


def spills(log):
    return [line for line in log.splitlines() if re.search(r"[1-9]\d* bytes (spill|stack frame)", line)]


@pytest.mark.parametrize("stem", [source.stem for source in on_host.KERNELS])
def test_compiles(stem, compiled):
    code, log = compiled[stem]
    assert code == 0, log
    for arch in ARCHITECTURES:
        assert f"for 'sm_{arch}'" in log
    # A stack frame is a local array that is indexed at run time: memory where registers were meant.
    assert "bytes stack frame" in log and not spills(log), "\n".join(spills(log))


SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling(float* x, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i * n + threadIdx.x];
  for (int r = 0; r < n; ++r)
    for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i * 7 + 3) % 64] + r;
  for (int i = 0; i < 64; ++i) x[i * n + threadIdx.x] = a[i];
}
"""


def test_a_spill_is_an_error(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    code, log = compile_all([source], tmp_path)["spilling"]
    assert code != 0 and "spilled to local memory" in log
