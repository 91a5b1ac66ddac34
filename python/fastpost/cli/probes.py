# SPDX-License-Identifier: Apache-2.0
"""What `fastpost env` looks at. Standard library only; each probe may fail, and none takes another with it.

torch and the core are loaded in a child process: a library that takes its process down (an instruction the CPU lacks, a
broken driver) is then one line of the report and not its end.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "numpy transformers tokenizers peft pyyaml safetensors matplotlib gguf triton trl liger-kernel bitsandbytes "
    "nvidia-cutlass pytest hypothesis ruff clang-format tensorboard wandb trackio jsonschema"
).split()
OTHER_VARIABLES = (
    "OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_HOME PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF HF_HOME "
    "HF_HUB_OFFLINE LD_PRELOAD LD_LIBRARY_PATH PYTHONPATH WORLD_SIZE RANK LOCAL_RANK"
).split()
FEATURES = (
    "sse4_2 avx f16c fma avx2 avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16 avx_vnni amx_tile "
    "amx_bf16 amx_int8 "  # x86-64
    "asimd asimdhp asimddp bf16 i8mm sve sve2"  # arm64
).split()
SECONDS = 120  # a child that takes longer hangs
REBUILD = "Build it again, in a clone of fastpost: pip install --force-reinstall --no-deps ."


def attempt(probe: Callable):
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


# ---- torch and the core, in a child process ----

MARK = "fastpost env: "  # in front of the child's own lines: libraries print, too


def load(*stages: str) -> dict[str, dict]:
    """What each stage finds. A stage that ends the child is reported as such, and the rest run in a new one."""
    found: dict[str, dict] = {}
    while left := [s for s in stages if s not in found]:
        code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastpost.cli.probes import child; child()"
        flags = [f"-{name}" for name, on in (("S", sys.flags.no_site), ("E", sys.flags.ignore_environment)) if on]
        command = [sys.executable, *flags, "-c", code, json.dumps(sys.path), *left]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
            output, end = done.stdout, death(done)
        except subprocess.TimeoutExpired as late:
            output, end = (late.stdout or b"").decode(errors="replace"), f"no answer in {SECONDS} seconds"
        except OSError as error:
            output, end = "", str(error)
        for line in output.splitlines():
            if line.startswith(MARK):
                found.update(json.loads(line[len(MARK) :]))
        first = next((s for s in left if s not in found), None)
        if first is not None:
            found[first] = {"error": f"loading it ended the process: {end}", "do": remedy(first, end)}
    return found


def death(done: subprocess.CompletedProcess) -> str:
    if done.returncode < 0:
        try:
            return signal.Signals(-done.returncode).name
        except ValueError:
            return f"signal {-done.returncode}"
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"status {done.returncode}, {last[0]}"


def child() -> None:
    """Runs in the child: one marked line per stage, written before the next stage begins."""
    for stage in sys.argv[2:]:
        try:
            found = {"torch": load_torch, "core": load_core}[stage]()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            found = {"error": text, "do": remedy(stage, text)}
        print(f"\n{MARK}{json.dumps({stage: found})}", flush=True)


def load_torch() -> dict:
    import torch

    def seen():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [
            {"name": p.name, "capability": f"{p.major}.{p.minor}", "gib": round(p.total_memory / 2**30, 1)}
            for p in found
        ]

    return {
        "version": torch.__version__,
        "file": torch.__file__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "exchange_api": hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
        "gpus": attempt(seen),
    }


def load_core() -> dict:
    from fastpost import _core

    return {"file": _core.__file__, **dict(_core.build_info())}


def remedy(stage: str, error: str) -> str:
    """What to type after this error."""
    if stage == "torch":
        if "No module named 'torch'" in error:
            return "Install it: pip install 'torch>=2.11'"
        return "torch itself does not load here; reinstall it: pip install --force-reinstall torch"
    here = Path(__file__).resolve().parent.parent
    others = sorted(f.name for f in here.glob("_core.*") if f.suffix in (".so", ".pyd"))
    source = here.parent.parent / "CMakeLists.txt"  # python/fastpost in a clone
    if "No module named 'fastpost._core'" in error or "cannot import name '_core'" in error:
        if others:
            tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
            return f"{here} holds {', '.join(others)}: not for this {tag}. Reinstall with this Python."
        if source.is_file():
            return f"fastpost comes from a source tree whose core is not built. Build it: pip install {source.parent}"
        return "The installation is incomplete: pip install --force-reinstall --no-deps fastpost"
    if "FASTPOST_ISA" in error:
        return "Unset FASTPOST_ISA, or set it to one that this CPU has."
    if re.search(r"GLIBC(XX)?_|CXXABI_", error):
        return f"It was built on a newer system than this one. {REBUILD}"
    if "SIGILL" in error:
        return f"It was built for another kind of CPU. {REBUILD}"
    return REBUILD


# ---- what is around ----


def package() -> dict:
    import fastpost

    found = {"version": fastpost.__version__, "file": str(Path(fastpost.__file__).parent), "installed": "no metadata"}
    try:
        distribution = metadata.distribution("fastpost")
    except metadata.PackageNotFoundError:
        return found
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = " (editable)" if origin.get("dir_info", {}).get("editable") else ""
    return found | {"installed": f"{distribution.version} from {origin.get('url', 'an index')}{editable}"}


def interpreter() -> dict:
    libc = " ".join(platform.libc_ver()).strip()
    system = f"{platform.system()} {platform.release()} {platform.machine()}{', ' + libc if libc else ''}"
    return {"version": platform.python_version(), "file": sys.executable, "system": system}


def cpu() -> dict:
    text = attempt(lambda: Path("/proc/cpuinfo").read_text())
    fields: dict[str, str] = {}
    for line in text.splitlines() if isinstance(text, str) else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "instruction_sets": [f for f in FEATURES if f in flags],
        "hardware_threads": os.cpu_count(),
        "usable_threads": usable,
        "container_cpus": attempt(container_cpus),
        "memory_gib": attempt(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)),
        "container_memory_gib": attempt(container_memory),
    }


def container_cpus() -> float | None:
    """CPUs that the control group grants, None for no limit; os.cpu_count() does not know of it."""
    file = Path("/sys/fs/cgroup/cpu.max")
    quota, period = (file.read_text().split() if file.is_file() else ("max", "1"))[:2]
    return None if quota == "max" else int(quota) / int(period)


def container_memory() -> float | None:
    file = Path("/sys/fs/cgroup/memory.max")
    limit = file.read_text().strip() if file.is_file() else "max"
    return None if limit == "max" else round(int(limit) / 2**30, 1)


def gpus() -> dict:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        devices = sorted(str(p) for p in Path("/dev").glob("nvidia[0-9]*"))
        return {"gpus": [], "device_files": devices, "note": "nvidia-smi is not on PATH"}
    fields = ("name", "compute_cap", "driver_version", "memory.total")
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        said = (done.stdout + done.stderr).strip() or f"status {done.returncode}"
        return {"gpus": [], "note": f"nvidia-smi: {said.splitlines()[-1]}"}
    keys = ("name", "capability", "driver", "memory")
    return {"gpus": [dict(zip(keys, map(str.strip, line.split(",")))) for line in done.stdout.strip().splitlines()]}


def packages() -> dict[str, str | None]:
    def version(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def environment() -> dict[str, str]:
    ours = sorted(name for name in os.environ if name.startswith("FASTPOST_"))
    return {name: os.environ[name] for name in (*ours, *OTHER_VARIABLES) if name in os.environ}
