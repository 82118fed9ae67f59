"""Run the benchmarks one after another and write README.md anew from what they print.

    python benchmarks/run.py                       # all of them, an hour on 2 cores
    python benchmarks/run.py --only lora zeroshot  # these; the others keep their stored results
    python benchmarks/run.py --only                # none: README.md from docstrings and stored results
    python benchmarks/run.py --quick               # does each of them run? Nothing is stored

A benchmark is any other script of this folder: its docstring says what it measures and what limits it, it
prints markdown tables and, last, a line of JSON. results/NAME.json keeps what it printed, when and where.
"""

import argparse
import ast
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
INTRODUCTION = """# Benchmarks

Every section is a script of this folder, with the table that it printed. What is compared runs interleaved
in one process, and figures are medians: the ratios are what to read. `python benchmarks/run.py` runs all
scripts and writes this page anew, `python benchmarks/run.py --only NAME` one of them. Figures are measured
unless a section calls them computed, and on a CPU unless it names a GPU. Two scripts need COCO, in `coco`:
loaders.py and overfit.py. Where no other machine is named, a section's is:
"""
QUICK = {  # the shortest run that still goes everywhere
    "blip2": ["--images", 1, "--rounds", 1],
    "captioner": ["--images", 2, "--repeats", 1, "--search-repeats", 1],
    "detr": ["--side", 4, "--reps", 1],
    "detr_loss": ["--reps", 2],
    "eval_heads": ["--depth", 1, "--image-scale", 0.2, "--rounds", 1, "--maps", 2],
    "evaluations": ["--few", 2, "--many", 8],
    "goi": ["--features", 1000, "--epochs", 1],
    "growth": ["--reps", 1, "--out", "out/growth"],
    "kept": ["--iters", 4, "--rounds", 1, "--batch", 2, "--size", 32],
    "loaders": ["--iters", 10, "--skip", 2, "--image-scale", 0.2],  # segmentation is drawn once
    "loading": ["--model", "vit_small_patch14_dinov2.lvd142m", "--layers", 1],
    "lora": ["--reps", 2, "--blocks", 1, "--images", 4],
    "memory": ["--models", "eva_mini", "--blocks", 0],
    "mask2former": ["--side", 16, "--repeats", 1],
    "ocr": ["--words", 20, "--rounds", 1, "--steps", 1],
    "overfit": ["--iters", 1, "--side", 112],
    "reading": ["--words", 64, "--iters", 2],
    "rope": ["--depth", 1, "--rounds", 2],
    "steps": ["--iters", 2, "--skip", 1, "--image-scale", 0.2],
    "vlm": ["--images", 1, "--rounds", 1, "--loaded", 64, 1],
    "world": ["--scenes", 10, "--rounds", 1],
    "zeroshot": ["--images", 8, "--repeats", 1],
}


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem != "run")


def machine() -> str:
    """This machine's processor with its vector instructions (many share a name), its cores, and torch."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    model = f"{model or platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"{os.cpu_count()} cores of {model}, torch {torch.__version__.split('+')[0]}"


def load(seconds: float = 2.0) -> float | None:
    """The part of all cores' time that is taken now, before anything of ours runs; None where unknown."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None

    def times() -> tuple[int, int]:
        values = [int(x) for x in stat.read_text().split("\n")[0].split()[1:9]]
        return sum(values), values[3] + values[4]  # all; idle and waiting for the disk

    before = times()
    time.sleep(seconds)
    total, idle = (after - b for after, b in zip(times(), before, strict=True))
    return 1 - idle / max(1, total)


def run(name: str, options: list) -> dict:
    """Run a benchmark, showing what it prints; its result. Raises RuntimeError if it fails."""
    begin, others = time.perf_counter(), load()
    command = ["python", f"benchmarks/{name}.py", *map(str, options)]
    print(f"\n$ {' '.join(command)}", flush=True)
    printed = []
    process = subprocess.Popen(
        [sys.executable, "-u", *command[1:]], cwd=HERE.parent, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        printed.append(line)
    if process.wait():
        raise RuntimeError(f"{name}.py failed with exit code {process.returncode}")
    text, answer = read(name, "".join(printed))
    when = dict(date=datetime.date.today().isoformat(), machine=machine(), load=others)
    when["seconds"] = round(time.perf_counter() - begin)
    return {"command": " ".join(command), **when, "table": text, "answer": answer}


def read(name: str, printed: str) -> tuple[str, dict | list]:
    """The markdown from the first table on, and the last line's JSON. Raises RuntimeError if either lacks."""
    *lines, last = printed.strip().splitlines() or [""]
    try:
        answer = json.loads(last)
    except ValueError as error:
        raise RuntimeError(f"{name}.py: the last line is not JSON: {last[:80]!r}") from error
    first = next((i for i, line in enumerate(lines) if line.startswith("|")), None)
    if first is None:
        raise RuntimeError(f"{name}.py has printed no markdown table")
    return "\n".join(lines[first:]).strip(), answer


def prose(name: str) -> tuple[str, str]:
    """Title and text of a script's docstring, without its examples of commands."""
    title, *rest = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())).split("\n\n")
    title = " ".join(title.split()).rstrip(".")
    return title, "\n\n".join(part for part in rest if not part.startswith("    "))


def page(results: dict[str, dict]) -> str:
    """README.md: a section for every script, in the order of their names."""
    newest = max((r["date"], r["machine"]) for r in results.values())[1] if results else machine()
    parts = [f"{INTRODUCTION}{newest}.\n"]
    for name in names():
        title, text = prose(name)
        parts.append(f"## {title}\n\n{text}\n")
        if name not in results:
            parts.append(f"    python benchmarks/{name}.py\n\nNot measured yet.\n")
            continue
        r = results[name]
        where = [r["date"], *([r["machine"]] if r["machine"] != newest else ())]
        where += [f"other processes took {r['load']:.0%} of the CPU at the start"] if r["load"] else []
        device = r["answer"].get("device") if isinstance(r["answer"], dict) else None
        where += [device] if device not in (None, "cpu") else []
        where += [r["note"]] if "note" in r else []
        parts.append(f"    {r['command']}\n\n{'; '.join(where)}.\n\n{r['table']}\n")
    return "\n".join(parts)


def stored() -> dict[str, dict]:
    return {n: json.loads(p.read_text()) for n in names() if (p := HERE / f"results/{n}.json").is_file()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", metavar="NAME", help=f"of {', '.join(names())} (default: all)")
    p.add_argument("--quick", action="store_true", help="the shortest run of each; stores nothing")
    args = p.parse_args()
    chosen = names() if args.only is None else args.only
    if unknown := sorted(set(chosen) - set(names())):
        p.error(f"--only: no benchmark {', '.join(unknown)}; there are {', '.join(names())}")
    failed = []
    for name in chosen:
        try:
            result = run(name, QUICK.get(name, []) if args.quick else [])
        except RuntimeError as error:
            print(f"run.py: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        if not args.quick:
            (HERE / "results").mkdir(exist_ok=True)
            (HERE / f"results/{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            (HERE / "README.md").write_text(page(stored()))
    if not args.quick:
        (HERE / "README.md").write_text(page(stored()))
    if failed:
        sys.exit(f"run.py: failed: {', '.join(failed)}" + ("" if args.quick else "; their old results stay"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; what had ended is stored and on the page")
