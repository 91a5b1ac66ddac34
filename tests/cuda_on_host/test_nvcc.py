# SPDX-License-Identifier: Apache-2.0
"""Every file of cuda/ops through nvcc, for the architectures that CMake builds: no warning, no register in memory, and
matrix instructions that are there and run ahead."""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import on_host
import pytest

NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

DEFAULT = re.search(r'FASTPOST_CUDA_ARCHITECTURES "([^"]+)"', (on_host.ROOT / "CMakeLists.txt").read_text())[1]
ARCHITECTURES = [arch.removesuffix("-real") for arch in DEFAULT.split(";")]
FLAGS = ["-std=c++20", "-O3", "-DFASTPOST_SM90", f"-I{on_host.ROOT}", f"-I{on_host.ROOT}/cpp",
         "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings", "-Xptxas=-v,-warn-spills"]  # fmt: skip


def beside(package: str, *below: str) -> Path | None:
    """A path in the folder of an installed package, if it is there."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*below) if spec and spec.origin else None
    return path if path and path.exists() else None


CUTLASS = os.environ.get("CUTLASS_INCLUDE_DIR") or beside("cutlass_library", "source", "include")
CUOBJDUMP = shutil.which("cuobjdump") or beside("triton", "backends", "nvidia", "bin", "cuobjdump")
HOPPER = [source for source in on_host.KERNELS if source.stem.endswith("_sm90")]  # as tools/cmake/cuda.cmake has it
SOURCES = [*(HOPPER if CUTLASS else []), *(source for source in on_host.KERNELS if source not in HOPPER)]


def architectures(stem):
    return ["90a"] if stem.endswith("_sm90") else ARCHITECTURES


def compile_all(sources, folder):
    """{stem: (return code, everything that was printed, object file)}; what takes longest comes first in `sources`."""

    def run(source):
        special = ["-DNDEBUG", "--expt-relaxed-constexpr", "-isystem", str(CUTLASS)] if source in HOPPER else []
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures(source.stem)]
        target = folder / (source.stem + ".o")
        command = [NVCC, *FLAGS, *special, *targets, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        return source.stem, (done.returncode, done.stdout + done.stderr, target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(run, sources))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_all(SOURCES, tmp_path_factory.mktemp("nvcc"))


def spills(log):
    return [line for line in log.splitlines() if re.search(r"[1-9]\d* bytes (spill|stack frame)", line)]


@pytest.mark.parametrize("stem", [source.stem for source in SOURCES])
def test_compiles(stem, compiled):
    code, log, _ = compiled[stem]
    assert code == 0, log
    for arch in architectures(stem):
        assert f"for 'sm_{arch}'" in log
    # A stack frame is a local array that is indexed at run time: memory where registers were meant.
    assert "bytes stack frame" in log and not spills(log), "\n".join(spills(log))


needs_cutlass = pytest.mark.skipif(CUTLASS is None, reason="needs the headers: pip install --no-deps nvidia-cutlass")


@needs_cutlass
@pytest.mark.parametrize("stem", [source.stem for source in HOPPER])
def test_matrix_instructions_run_ahead(stem, compiled):
    _, log, _ = compiled[stem]
    # ptxas says so, as mere information, when it has to wait for each one (C7510) or ignores setmaxnreg (C7508).
    assert not re.search(r"C75\d\d|Performance Loss|serialized", log), log
    # 384 threads share 65536 registers; more than 168 each would not start.
    assert int(re.search(r"Used (\d+) registers", log)[1]) <= 168


@needs_cutlass
@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")
@pytest.mark.parametrize("stem", [source.stem for source in HOPPER])
def test_machine_code_is_hoppers(stem, compiled):
    path = os.pathsep.join([os.environ["PATH"], str(Path(CUOBJDUMP).parent)])  # it calls nvdisasm
    done = subprocess.run([CUOBJDUMP, "--dump-sass", compiled[stem][2]], capture_output=True, text=True,
                          env=os.environ | {"PATH": path})  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", done.stdout, re.M)
    count = {word: sum(w.startswith(word) for w in words) for word in ("HGMMA", "UTMALDG", "USETMAXREG", "LDL", "STL")}
    # A step of 64 in K is four instructions (int4: two of 32 are two each); the loop's first is written out once more.
    assert count["HGMMA"] >= 8 and "HGMMA.64x256x16.F32.BF16" in words, count
    kernels = done.stdout.count("Function :")
    assert count["UTMALDG"] >= kernels, count  # tensor copies
    assert count["USETMAXREG"] == 2 * kernels, count  # registers moved to those that compute
    assert count["LDL"] == count["STL"] == 0, count
    # Each wait covers a step: one wait for each instruction would be what C7510 warns of.
    step = 2 if stem.startswith("int4") else 4
    assert sum(w.startswith("WARPGROUP.ARRIVE") for w in words) <= count["HGMMA"] // step


@needs_cutlass
def test_layouts_are_cutes(tmp_path):
    program = tmp_path / "wgmma_layouts"
    flags = ["-std=c++20", "-O1", "--expt-relaxed-constexpr", "-DNDEBUG", "-arch=sm_90a", "-isystem", CUTLASS]
    include = [f"-I{on_host.ROOT}", f"-I{on_host.ROOT}/cpp"]
    command = [NVCC, *flags, *include, on_host.HERE / "wgmma_layouts.cu", "-o", program]
    subprocess.run([str(c) for c in command], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    # CuTe mentions that on the host a shared address means nothing; it takes 0.
    assert [line for line in said.splitlines() if "cast_smem_ptr_to_uint" not in line] == []


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
    code, log, _ = compile_all([source], tmp_path)["spilling"]
    assert code != 0 and "spilled to local memory" in log
