"""Command lines of both stages that end within seconds, and what their logs say."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINI = ("--model", "eva_mini", "--weights", "random", "--workers", 0)
SPEED = {
    "seconds",
    "waiting",
    "images_per_second",
    "peak_gpu_gb",
}  # of a line of the log: never the same twice


def small(coco, **changed) -> list:
    options = {"coco": coco, "image-scale": 0.2, "warmup": 2, "log-every": 2, **changed}
    return [*MINI, *(x for k, v in options.items() for x in (f"--{k}", *(v if isinstance(v, list) else [v])))]


def stage1(coco, out, **changed) -> list:
    return ["--task", "detection", *small(coco, out=out, **{"iters": 4, "lr": 1e-4, **changed})]


def stage2(coco, out, head, **changed) -> list:
    return small(
        coco, out=out, heads=head, **{"tasks": "detection", "iters": 8, "lr": 1e-3, "rank": 4, **changed}
    )


def logged(out: Path) -> list[dict]:
    """The lines of a run's log.jsonl, without how fast it was."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


def losses(out: Path) -> list[float]:
    return [line["detection/loss"] for line in logged(out)]
