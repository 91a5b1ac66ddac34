# SPDX-License-Identifier: Apache-2.0
"""`fastpost env [--json]`: what is installed, what was built, what this machine has. Made to be pasted in reports."""

from __future__ import annotations

import difflib
import json
import re
import textwrap

from fastpost.cli import probes
from fastpost.cli.probes import REBUILD, attempt

USAGE = "usage: fastpost env [--json]     versions, what was built, what was found; --json for programs"
VARIABLES = {
    "FASTPOST_REFERENCE": "1 = every op runs through its plain-torch reference (slow)",
    "FASTPOST_ISA": "baseline, avx2, avx512 or avx512bf16 instead of the best that the CPU has",
    "FASTPOST_CPU_GEMM": "fused or torch: whose matrix products linear_logprob uses on the CPU, whatever suits it best",
    "FASTPOST_TRACEBACK": "1 = the command shows a traceback instead of one sentence",
}
"""Every variable that fastpost itself reads when it runs."""
BUILD_VARIABLES = ("FASTPOST_CUDA",)  # pyproject.toml reads them: they say nothing about what is installed


def main(argv: list[str]) -> int:
    if any(a not in ("--json",) for a in argv):
        print(USAGE)
        return 0 if argv[0] in ("-h", "--help") else 2
    report = collect()
    print(json.dumps(report, indent=2, ensure_ascii=False) if argv else render(report))
    return 0


def collect() -> dict:
    """The whole report. A probe that failed is {"error": what happened}, with "do" where there is something to do."""
    report = {"fastpost": attempt(probes.package), "python": attempt(probes.interpreter)}
    report |= probes.load("torch", "core")
    report |= {"cpu": attempt(probes.cpu), "gpu": attempt(probes.gpus)}
    report |= {"packages": attempt(probes.packages), "environment": attempt(probes.environment)}
    advice = [attempt(lambda f=f: f(report)) for f in ADVICE]
    report["advice"] = [line for lines in advice if isinstance(lines, list) for line in lines]
    return report


# ---- what follows from it ----


def unloaded(report: dict) -> list[str]:
    return [f"{name}: {report[name]['do']}" for name in ("torch", "core") if report[name].get("do")]


def stale(report: dict) -> list[str]:
    built, here = report["core"].get("version"), report["fastpost"].get("version")
    if not built or built == here:
        return []
    return [f"The core was built as {built}, the Python files are {here}. {REBUILD}"]


def torch_too_old(report: dict) -> list[str]:
    if report["torch"].get("exchange_api", True):
        return []
    return [f"torch {report['torch']['version']} has no DLPack exchange API: pip install 'torch>=2.11'"]


def gpu_unused(report: dict) -> list[str]:
    seen, core = report["gpu"].get("gpus", []), report["core"]
    lines = []
    if seen and "version" in report["torch"] and report["torch"]["cuda"] is None:
        lines.append("There is a GPU, but this torch has no CUDA. Install a torch with CUDA 13.")
    if seen and core.get("cuda") == "off":
        rebuild = REBUILD.replace("pip", "FASTPOST_CUDA=ON pip")
        lines.append(f"There is a GPU, but this core has no CUDA kernels. {rebuild}")
    elif core.get("cuda"):
        for gpu in seen:
            if not runs_on(core["cuda"], gpu["capability"]):
                lines.append(f"The core was built for {core['cuda']}, which does not run on {gpu['name']} "
                             f"({gpu['capability']}). Rebuild with -C cmake.define.FASTPOST_CUDA_ARCHITECTURES="
                             f"{gpu['capability'].replace('.', '')}-real")  # fmt: skip
    return lines


def runs_on(architectures: str, capability: str) -> bool:
    """Whether code for "80,90a-real" (CMake's spelling) runs on a GPU "8.6". A number alone brings PTX, which the
    driver compiles for any newer GPU; -real: same major and no newer minor; with a letter: exactly that one."""
    major, minor = capability.split(".")
    for arch in architectures.split(","):
        number, letter, real = re.fullmatch(r"(\d+)([a-z]?)(-real)?", arch.strip()).groups()
        same = number[:-1] == major and (number[-1] == minor if letter else number[-1] <= minor)
        if same or (not (letter or real) and int(number) <= int(major + minor)):
            return True
    return False


def variables(report: dict) -> list[str]:
    lines = []
    for name in report["environment"]:
        if name in VARIABLES:
            lines.append(f"{name} is set: {VARIABLES[name]}.")
        elif name.startswith("FASTPOST_") and name not in BUILD_VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            lines.append(f"{name} is set, but fastpost reads no such variable.{hint}")
    return lines


ADVICE = (unloaded, stale, torch_too_old, gpu_unused, variables)


# ---- for people ----


def render(report: dict) -> str:
    """Every section as `key value, key value, …`: whatever a probe found, it can be shown."""
    lines = []
    for section, found in report.items():
        if section == "advice":
            paragraphs = found
        elif "error" in found:
            paragraphs = [f"FAILED  {found['error']}"]
        else:
            items = [f"{key} {show(value)}" for key, value in found.items() if value not in (None, [])]
            absent = [key for key, value in found.items() if value in (None, [])]
            paragraphs = [", ".join(items)] + ([f"none: {', '.join(absent)}"] if absent else [])
        rows = [row for p in paragraphs for row in textwrap.wrap(p, 105, subsequent_indent="  ", **WHOLE_WORDS)]
        lines += [f"{label:<12} {row}" for label, row in zip([section, *[""] * len(rows)], rows or ["nothing"])]
    return "\n".join(lines)


WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}


def show(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(show, value))
    if isinstance(value, dict):
        return f"({', '.join(f'{k} {show(v)}' for k, v in value.items())})"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
