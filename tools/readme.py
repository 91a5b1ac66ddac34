#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the measured tables of README.md from bench/results/*.json: python tools/readme.py [--check]

Four kinds of files are read: `python -m bench --json` ("cases"), `python -m bench.train --json` ("steps"), `python -m
bench.train_step --json` ("runs") and what tools/gpu_check adds for a GPU ("tests"). --check changes nothing and fails
when README.md is not what they say.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {  # first word of a provider's name -> heading of its column; the family's fastest right answer counts
    "eager": "torch eager",
    "grouped_mm": "torch grouped_mm",
    "aten": "torch SDPA",
    "compile": "torch.compile",
    "lce": "F.linear_cross_entropy",
    "trl": "TRL",
    "liger": "Liger",
}
OURS = "fastpost"
NOTHING = "No measurements are committed yet."


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        print(__doc__.strip())
        return 0 if argv in (["-h"], ["--help"]) else 2
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = render(before, load(ROOT / "bench/results"), kernels(ROOT / "cuda/ops"))
    if argv:
        if after != before:
            print("README.md is not what bench/results says. Run: python tools/readme.py", file=sys.stderr)
        return int(after != before)
    readme.write_text(after, encoding="utf-8")
    return 0


def load(folder: Path) -> list[dict]:
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]


def render(text: str, results: list[dict], kernels_of: dict[str, list[str]]) -> str:
    """`text` with the part between each pair of markers replaced."""
    bench = [section for r in results if r.get("cases") for section in measured(r)]
    steps = [training(r) for r in results if r.get("steps")] + [train_step(r) for r in results if r.get("runs")]
    for name, body in (("measured", "\n\n".join(bench + steps) or NOTHING), ("gpu", gpus(results, kernels_of))):
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
        text, count = re.subn(pattern, lambda m, body=body: m[1] + "\n" + body + "\n\n" + m[2], text, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md: expected the markers of '{name}' once, found them {count} times.")
    return text


def where(r: dict) -> str:
    versions = ", ".join(f"{p} {v}" for p, v in r["versions"].items() if v and p not in ("fastpost", "transformers"))
    machine = r["gpu"] or f"{r['cpu']}, {r['hardware_threads']} hardware threads"
    return f"{machine}; {versions}; {r['date'][:10]}, commit {(r['commit'] or 'unknown')[:12]}"


# ---- kernels beside their peers --------------------------------------------------------------------------------------


def measured(r: dict) -> list[str]:
    """One table per number of threads: cases forward and backward (where an op has both), time, share of the limit,
    peers as multiples of it."""
    return [table for threads in r.get("threads", []) if (table := _table(r, threads))]


def _table(r: dict, threads: int | None) -> str:
    rows, families = [], []
    whole = "forward+backward"
    trained = {case["op"] for case in r["cases"] if whole in case["case"]}  # the others are of inference alone
    for case in r["cases"]:
        m = next((m for m in case["measured"] if m["threads"] == threads), None)
        if m is None or not case["limits"] or OURS not in m["median"]:
            continue
        if case["op"] in trained and whole not in case["case"]:
            continue
        rows.append((case, m))
        families += [f for f in (name.split()[0].strip(",") for name in case["errors"]) if f not in families]
    columns = {f: heading for f, heading in FAMILIES.items() if f in families}
    if not rows:
        return ""
    on = "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"
    on += ", CPU time" if r.get("clock") == "cpu" else ""
    head = ["op", "case", "ms", "share of limit", *columns.values()]
    lines = [f"**{where(r)}{on}.** Peers: their time ÷ ours.", ""]
    lines += [_row(head), _row(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for case, m in rows:
        ours = m["median"][OURS]
        share = "disagrees" if OURS in case["disagrees"] else f"{m['median'][case['limits'][0]] / ours:.2f}"
        name = case["case"].replace(" forward+backward", "")
        lines.append(
            _row([f"`{case['op']}`", name, _digits(ours * 1e3), share, *(_family(case, m, f) for f in columns)])
        )
    limits = ", ".join(sorted({case["limits"][0] for case, _ in rows}))
    verdict = " ".join(r.get("probe", {}).get("verdict", []))
    lines += ["", f"Share of limit: time of the limit, measured in the same run ({limits}), ÷ ours. {verdict}"]
    return "\n".join(lines).rstrip()


def _family(case: dict, m: dict, family: str) -> str:
    """How many times our time the fastest member takes whose result is right."""
    names = [n for n in case["errors"] if n.split()[0].strip(",") == family]
    right = [m["median"][n] for n in names if n not in case["disagrees"] and n in m["median"]]
    if OURS in case["disagrees"]:
        return "–"
    if not right:
        return "disagrees" if names else "failed" if any(n.split()[0] == family for n in case["failed"]) else "–"
    return f"{min(right) / m['median'][OURS]:.2f} ×"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


# ---- training as a whole ---------------------------------------------------------------------------------------------

NAMES = {"sft": "SFT", "dpo": "DPO", "simpo": "SimPO"}


def training(r: dict) -> str:
    """Tokens per second beside the fastest TRL and beside TRL as it comes; below it packing and the time to start."""
    source, model = r["steps"][0]["rows"], r["model"]
    lines = [f"**`fastpost train` of {model}, rows of {source}; {where(r)}, 1 thread, CPU time.**", ""]
    head = ["", "tokens / s", "TRL's fastest", "", "TRL as it comes", "", "peak GB", "TRL", "loss at step 0", "TRL"]
    lines += [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
    for part in r["steps"]:
        sides: dict[str, list[dict]] = {}
        for run in part["runs"]:
            sides.setdefault(run["side"], []).append(run)
        tps = {side: sum(_timed(runs, "step_tokens")) / sum(_timed(runs, "seconds")) for side, runs in sides.items()}
        peers = [side for side in sides if side.split(",")[0] == "trl"]
        what = "rows" if part["objective"] == "sft" else "pairs"
        row = [f"{NAMES[part['objective']]}, {part['rows_a_step']} {what}", f"{tps[OURS]:.0f}"]
        if "trl" in sides:
            fastest = max(peers, key=tps.get)
            said = f" ({fastest.removeprefix('trl, ')})" if fastest != "trl" else ""
            row += [f"{tps[fastest]:.0f}{said}", f"{tps[OURS] / tps[fastest]:.2f} ×"]
            row += [f"{tps['trl']:.0f}", f"{tps[OURS] / tps['trl']:.2f} ×"]
            row += [f"{max(run['peak_gb'] for run in sides[side]):.2f}" for side in (OURS, "trl")]
            row += [f"{sides[side][0]['loss'][0]:.5f}" for side in (OURS, "trl")]
        lines.append(_row(row + ["–"] * (len(head) - len(row))))
    packed = ", ".join(
        f"{_packed(case):.2f} × in {NAMES[case['kind']]} ({case['sequences_a_step']} sequences a step)"
        for case in r["packing"]
    )
    starts = ", ".join(
        f"{statistics.median(w['total'][0] - w['first step'][0] for w in s['warm']):.1f} s ({NAMES[s['objective']]}, "
        f"{s['count']} rows)"
        for s in r["start"]["starts"]
    )
    asked = statistics.median(r["start"]["help"])
    lines += ["", f"Tokens per second of packed rows ÷ those of rows padded to the longest of the step: {packed}. From "
              f"the command to the first step with a warm cache: {starts}; `fastpost --help`: {asked:.2f} s (wall "
              "time).", "", " ".join(r["probe"]["verdict"])]  # fmt: skip
    return "\n".join(lines)


def _timed(runs: list[dict], name: str) -> list[float]:
    """Of all steps but the first of each run."""
    return [x for run in runs for x in run[name][1:]]


def _packed(case: dict) -> float:
    """Against the faster of the padded forms."""
    ours, *others = case["seconds"].values()
    return min(statistics.median(b / a for a, b in zip(ours, other)) for other in others)


# ---- a whole training step -------------------------------------------------------------------------------------------


def train_step(r: dict) -> str:
    """Median seconds without the first step, highest peak and first loss of each side."""
    head = ["threads", "", "s / step", "peak GB", "loss at step 0"]
    objective = NAMES[r.get("objective", "simpo")]
    lines = [f"**One {objective} optimizer step, rows of {r['rows']}; {where(r)}.**", ""]
    lines += [_row(head), _row(["---:", "---", "---:", "---:", "---:"])]
    for threads in sorted({run["threads"] for run in r["runs"]}):
        for side in dict.fromkeys(run["side"] for run in r["runs"]):
            mine = [run for run in r["runs"] if (run["side"], run["threads"]) == (side, threads)]
            if mine:
                seconds = statistics.median(t for run in mine for t in run["seconds"][1:])
                peak = max(run["peak_gb"] for run in mine)
                lines.append(_row([str(threads), side, f"{seconds:.2f}", f"{peak:.2f}", f"{mine[0]['loss'][0]:.5f}"]))
    return "\n".join(lines)


# ---- what has run on which GPU ---------------------------------------------------------------------------------------


def kernels(folder: Path) -> dict[str, list[str]]:
    """op -> names of the __global__ functions in cuda/ops/<op>.cu (and <op>_sm90.cu)."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.cu")):
        text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", path.read_text(encoding="utf-8"))
        names = re.findall(r"__global__\s+void\s+(\w+)\s*\(", text)
        found.setdefault(re.sub(r"_sm\d+$", "", path.stem), []).extend(names)
    return found


def gpus(results: list[dict], kernels_of: dict[str, list[str]]) -> str:
    """A row per op and its kernels, a column per GPU: what a result file says of it, or "not yet run"."""
    seen: dict[str, list[dict]] = {}
    for r in results:
        if r.get("gpu"):
            seen.setdefault(r["gpu"], []).append(r)
    head = ["op", "kernels", *seen] if seen else ["op", "kernels", "any GPU"]
    lines = [_row(head), _row(["---"] * len(head))]
    for op, names in kernels_of.items():
        entries = [_entry(op, seen[gpu]) for gpu in seen] or ["not yet run"]
        lines.append(_row([f"`{op}`", ", ".join(f"`{n}`" for n in names), *entries]))
    for gpu, given in seen.items():
        for said in (r["sanitizer"] for r in given if r.get("sanitizer")):
            lines += ["", f"compute-sanitizer on {gpu}: {', '.join(f'{tool}: {what}' for tool, what in said.items())}."]
    return "\n".join(lines)


def _entry(op: str, results: list[dict]) -> str:
    said = []
    for r in results:
        stamp = f"{r['date'][:10]}, {(r['commit'] or 'unknown')[:12]}"
        tests = r.get("tests", {}).get(op)
        cases = [c for c in r.get("cases", []) if c["op"] == op]
        if tests:
            said.append(f"{tests['passed']} tests passed, {tests['failed']} failed ({stamp})")
        if cases:
            wrong = sum(OURS in c["disagrees"] for c in cases)
            said.append(f"{len(cases)} benchmarks, {wrong} wrong ({stamp})")
    return "; ".join(said) or "not yet run"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
