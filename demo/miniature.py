"""The paper's experiment in miniature: what its runs need beside the scripts, and demo/README.md's tables.

    python demo/miniature.py shuffle COCO OUT         # COCO with the annotations of other images
    python demo/miniature.py twice LORA OUT           # dW at twice its scale: a planted fault
    python demo/miniature.py graft M OUT              # the demo's CLIP with M as its vision tower
    python demo/miniature.py half HEAD OUT            # a head file in fp16
    python demo/miniature.py choice OUT               # the settings that were tried, and which is chosen
    python demo/miniature.py report OUT               # demo/README.md and its figures, from all results

runs/miniature.sh calls it. A difference is `after` less `before` of the same seed, on the same test items;
its interval is Student's over the seeds: it tells how sure the mean over seeds is, for these items.
"""

import argparse
import json
import os
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import t as student

HERE = Path(__file__).resolve().parent
CLIP, README, LOG = (HERE / f for f in ("eva_mini_clip.safetensors", "README.md", "eva_mini_clip.jsonl"))
METRICS = [  # evaluation, metric, what the tables call it; for every set of the evaluation
    ("ocr", "accuracy", "OCR, words right"),
    ("ocr", "edit similarity", "OCR, edit similarity"),
    ("goi", "top-1", "GOI, top-1"),
    ("goi", "top-5", "GOI, top-5"),
    ("zeroshot", "acc1", "zero-shot, top-1"),
    ("zeroshot", "acc5", "zero-shot, top-5"),
    ("retrieval", "TR@1", "image to text, R@1"),
    ("retrieval", "TR@5", "image to text, R@5"),
    ("retrieval", "IR@1", "text to image, R@1"),
    ("retrieval", "IR@5", "text to image, R@5"),
    ("probe", "top-1", "probe of a sign's word (a diagnostic)"),
]
MAIN = {  # the claim is about these
    ("ocr", "all sets found", "accuracy"): "OCR, words right in all sets",
    ("goi", "val", "top-1"): "GOI, top-1",
    ("zeroshot", "shifted", "acc1"): "zero-shot, top-1 of shifted things",
    ("retrieval", "coco", "R@1"): "retrieval, R@1 both ways",
}
KEPT = {  # and that these fall by a point at most
    ("zeroshot", "plain", "acc1"): "zero-shot, top-1 of plain things",
    ("retrieval", "coco", "TR@1"): "image to text, R@1",
    ("retrieval", "coco", "IR@1"): "text to image, R@1",
}
ROWS = {  # title: rows of runs/miniature.sh; `default` are the runs of the main effect
    "Table 9, rank r (the same scale)": ["rank4", "default", "rank16", "rank64"],
    "Table 10, part of the training data": ["data25", "data50", "default"],
    "Table 11, the heads' learning rate, in LoRA's": ["default", "heads0.1", "heads1"],
    "Table 12, tasks": ["default", "with_pose", "panoptic", "no_detection", "no_segmentation"]
    + ["no_captioning", "only_detection", "only_segmentation", "only_captioning"],
    "The tasks' gradients brought to one norm": ["default", "equal_gradients"],
    "LoRA's alpha: the scale of dW is alpha / 8": ["alpha2", "alpha8", "default"],
    "Controls": ["default", "random_heads", "shuffled_labels", "more_clip", "full"],
}
IN_DOMAIN = {
    "detection": ["box AP50", "box AP"],
    "segmentation": ["mask AP50", "mask AP"],
    "captioning": ["CIDEr"],
}
SHORT = [  # columns of these tables
    ("goi", "val", "top-1"),
    ("zeroshot", "plain", "acc1"),
    ("zeroshot", "shifted", "acc1"),
    ("retrieval", "coco", "TR@5"),
    ("retrieval", "coco", "IR@5"),
]
CHOICE = {  # what the setting is chosen by
    ("goi", "val", "top-1"): "GOI top-1",
    ("zeroshot", "shifted", "acc1"): "zero-shot, shifted",
    ("retrieval", "coco", "TR@1"): "image to text R@1",
    ("retrieval", "coco", "IR@1"): "text to image R@1",
}
HEADINGS = ["GOI top-1", "zero-shot top-1", "the same, shifted", "image to text R@5", "text to image R@5"]


# --- what the runs need


def shuffle(coco: Path, out: Path) -> None:
    """OUT: COCO's training split, each image with another's annotations, scaled to its size."""
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    if not (out / "train2017").is_symlink():
        (out / "train2017").symlink_to(os.path.relpath(coco / "train2017", out))
    for kind in ("instances", "captions"):
        content = json.loads((coco / "annotations" / f"{kind}_train2017.json").read_text())
        ids = [image["id"] for image in content["images"]]
        of = dict(zip(ids, np.random.default_rng(0).permutation(ids).tolist(), strict=True))
        sizes = {i["id"]: np.array([i["width"], i["height"]]) for i in content["images"]}
        for a in content["annotations"]:
            had, a["image_id"] = a["image_id"], of[a["image_id"]]
            scale = sizes[a["image_id"]] / sizes[had]
            if "bbox" in a:
                a["bbox"] = (np.array(a["bbox"]) * np.tile(scale, 2)).tolist()
                a["segmentation"] = [
                    (np.reshape(s, (-1, 2)) * scale).ravel().tolist() for s in a["segmentation"]
                ]
                a["area"] *= float(scale.prod())
        (out / "annotations" / f"{kind}_train2017.json").write_text(json.dumps(content))


def twice(lora: Path, out: Path) -> None:
    """The same A and B under twice the alpha."""
    with safe_open(lora, "pt") as file:
        header = json.loads(file.metadata()["lora"])
    header["alpha"] *= 2
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(load_file(lora), out, metadata={"lora": json.dumps(header)})


def graft(M: Path, out: Path) -> None:
    """The demo's CLIP, its vision trunk replaced by M."""
    state, trunk = load_file(CLIP), load_file(M)
    state |= {
        f"visual.trunk.{name}": value.to(state[f"visual.trunk.{name}"].dtype) for name, value in trunk.items()
    }
    save_file(state, out)


def half(head: Path, out: Path) -> None:
    """A head file in fp16, which tasks.load_head brings back to fp32."""
    with safe_open(head, "pt") as file:
        header = file.metadata()
    state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(head).items()}
    save_file(state, out, metadata=header)


# --- results


def scores(folder: Path) -> dict[tuple, dict]:
    """(evaluation, set, metric) -> {before, after, items} of one seed.

    items: half of the 95% interval of the difference over items, None where there is none
    Of several runs of an evaluation, as in `ocr` and `ocr_1`, the mean. `shifted` is the mean over shifted
    classes, R@1 that of both ways.
    """
    found, runs = {}, {}
    for path in sorted(folder.glob("*/result.json")):
        name = re.sub(r"_\d+$", "", path.parent.name)
        for r in json.loads(path.read_text())["rows"]:
            runs.setdefault((name, r["set"], r["metric"]), []).append(r)
    for key, rows in runs.items():
        for r in rows:
            r["items"] = None if r.get("low") is None else (r["high"] - r["low"]) / 2
        found[key] = mean_of(rows, other_items=key[0] == "retrieval")
    if shifted := [v for (e, s, m), v in found.items() if (e, m) == ("zeroshot", "acc1") and s != "plain"]:
        found["zeroshot", "shifted", "acc1"] = mean_of(shifted, other_items=False)  # the same things
    if ways := [found[key] for key in list(KEPT)[1:] if key in found]:
        found["retrieval", "coco", "R@1"] = mean_of(ways, other_items=False)  # the same pictures
    return found


def mean_of(rows: list[dict], other_items: bool) -> dict:
    """Before and after, and half the interval over items: independent, or as if all moved together."""
    values = {v: [r[v] for r in rows] for v in ("before", "after", "items")}
    found = {v: None if None in x else statistics.mean(x) for v, x in values.items()}
    if other_items and found["items"] is not None:
        found["items"] = sum(half**2 for half in values["items"]) ** 0.5 / len(rows)
    return found


def differences(main: list[dict], runs: list[dict], key: tuple) -> list[float]:
    """What each seed's run adds to M without dW, which the same seed of the main effect has scored.

    A run of another M has no dW: its scores are its `before`.
    """
    pairs = [(base[key]["before"], run[key]) for base, run in zip(main, runs, strict=False) if key in run]
    return [(r["before"] if r["after"] is None else r["after"]) - before for before, r in pairs]


def against(main: list[dict], a: list[dict], b: list[dict], key: tuple) -> list[float]:
    """What each seed's run of `a` scores more than the same seed's of `b`."""
    return [x - y for x, y in zip(differences(main, a, key), differences(main, b, key), strict=False)]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of n values and half of its 95% interval (Student's t, n - 1 degrees of freedom)."""
    if len(values) < 2:
        return statistics.mean(values), float("nan")
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def told(values: list[float]) -> str:
    mean, half = interval(values)
    mark = "**" if abs(mean) > max(half, 0.05) else ""  # the interval leaves 0 out, and the mean is not 0.0
    around = f" ± {half:.1f}" if len(values) > 1 else ""
    return f"{mark}{round(mean, 1) + 0.0:+.1f}{mark}{around}"  # no minus before a zero


def table(columns: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *lines)] + [""]


def seeds_of(folder: Path) -> list[dict]:
    """The scores of each seed's folder, in the seeds' order; only of those that are complete."""
    found = [scores(path) for path in sorted(folder.glob("seed*"), key=lambda p: int(p.name[4:]))]
    return [s for s in found if ("retrieval", "coco", "IR@5") in s]


def told_of(main: list[dict]) -> list[tuple[tuple, str]]:
    """(evaluation, set, metric) and its title, of all that the main effect is told in."""
    found = []
    for evaluation, metric, title in METRICS:
        for key in (k for k in main[0] if (k[0], k[2]) == (evaluation, metric) and k[1] != "shifted"):
            name = key[1].removesuffix(" found")  # of all sets that were found
            found.append((key, title if evaluation in ("goi", "retrieval") else f"{title}, {name}"))
    return found


# --- the blocks of demo/README.md


def log_block() -> list[str]:
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    shown = [line for k, line in enumerate(lines) if (k + 1) % 5 == 0 or k + 1 == len(lines)]
    kinds = ("plain", "sketch", "rotated", "noisy", "words")
    rows = [[str(r["step"]), f"{r['loss']:.2f}", *(f"{r[kind]:.1f}" for kind in kinds)] for r in shown]
    return table(["step", "loss", *kinds], rows)


def main_block(main: list[dict], side: list[dict] | None = None) -> list[str]:
    """The main effect; side: the runs of the same dW under a planted fault."""
    lines = []
    for key, title in told_of(main):
        line = effect(main, key, title)
        if side is not None:
            line.append(told(against(main, side, main, key)) if key in side[0] else "-")
        lines.append(line)
    fault = [] if side is None else ["fault: dW twice, less dW once"]
    return table([*EFFECT, *fault], lines)


EFFECT = ["", "before", "after", "difference, 95% over seeds", "over items"]


def effect(main: list[dict], key: tuple, title: str) -> list[str]:
    """Of a metric: its scores, the difference and its interval over seeds, that over items of one seed."""
    if key not in main[0]:
        return [title, "-", "-", "-", "-"]
    scores = [f"{statistics.mean(s[key][v] for s in main):.1f}" for v in ("before", "after")]
    items = [s[key]["items"] for s in main if s[key]["items"] is not None]
    over_items = f"± {statistics.mean(items):.1f}" if items else "-"
    return [title, *scores, told(differences(main, main, key)), over_items]


def claim(main: list[dict]) -> list[str]:
    """The claim, by the rule that was written down before: a table of its rows, and whether it holds."""
    known = {key: differences(main, main, key) for key in (*MAIN, *KEPT) if key in main[0]}
    if not {*MAIN, *KEPT} <= known.keys():
        return ["Not run yet in this world.", ""]
    rise = [title for key, title in MAIN.items() if (of := interval(known[key]))[0] > of[1]]
    fall = [title for key, title in KEPT.items() if interval(known[key])[0] < -1]
    holds = len(rise) >= 2 and not fall
    words = f"Of the four main rows {len(rise)} rise by more than their interval over {len(main)} seeds"
    words += f" ({'; '.join(rise)}). " if rise else ". "
    words += (
        f"More than a point is lost in: {'; '.join(fall)}. "
        if fall
        else "None of the rows that must not fall loses more than a point. "
    )
    words += f"By the rule the claim **{'holds' if holds else 'does not hold'}** in this miniature."
    lines = [effect(main, key, title) for key, title in (*MAIN.items(), *KEPT.items())]
    return [*table(EFFECT, lines), words, ""]


def gradient(folder: Path, task: str) -> str:
    """The norm of a task's gradient of dW, before clipping: the median over what these seeds logged."""
    logs = [path.read_text().splitlines() for path in folder.glob("seed*/visft/log.jsonl")]
    norms = [json.loads(line).get(f"{task}/grad_norm") for log in logs for line in log]
    return f"{statistics.median(n for n in norms if n is not None):.2g}"


def heads_block(out: Path, main: list[dict]) -> list[str]:
    """What the heads can do, how much they lose on held-out scenes, and the gradient that they hand to M."""
    lines = []
    for task, metrics in IN_DOMAIN.items():
        rows = [((task, "val2017", metric), f"{task}, {metric}", ".1f", "") for metric in metrics]
        rows.append((("losses", task, "loss"), f"{task}, loss", ".4f", gradient(out / "demo", task)))
        for key, title, form, last in rows:
            of_seeds = [s[key] for s in main if key in s]
            cells = [format(statistics.mean(s[v] for s in of_seeds), form) for v in ("before", "after")]
            mean, half = interval([s["after"] - s["before"] for s in of_seeds])
            lines.append([title, *cells, f"{mean:+{form}} ± {half:{form}}", last])
    if seeds_of(out / "rows" / "with_pose"):
        lines.append(["pose (row `with pose`)", *3 * ["-"], gradient(out / "rows" / "with_pose", "pose")])
    return table(["T_n on held-out scenes", *EFFECT[1:4], "gradient of dW"], lines)


def rows_block(out: Path, main: list[dict]) -> list[str]:
    """What differs from the default by one choice, beside the default with as many of its seeds."""
    everything = dict.fromkeys(name for names in ROWS.values() for name in names if name != "default")
    runs = {name: seeds_of(out / "rows" / name) for name in everything}

    def line(title: str, seeds: list[dict]) -> list[str]:
        return [title, str(len(seeds)), *(told(differences(main, seeds, key)) for key in SHORT)]

    lines = [line("default, all seeds", main)]
    for title, names in ROWS.items():
        runs["default"] = main[: max(len(runs[name]) for name in names if name != "default")]
        found = [name for name in names if runs[name]]
        if len(found) > 1:  # what the default is beside
            lines.append([f"*{title}*"] + [""] * (1 + len(SHORT)))
            lines += [line(name.replace("_", " "), runs[name]) for name in found]
    missing = [name.replace("_", " ") for name in everything if not runs[name]]
    left = [f"Not run yet: {', '.join(missing)}.", ""] if missing else []
    others = [runs[name] for name in everything if name not in ROWS["Controls"] and runs[name]]
    cells = [cell for seeds in others for cell in line("", seeds)[2:]]
    tested = (
        f"Of the {len(cells)} cells of rows that are no controls {str(cells).count('**') // 2} are bold; "
    )
    tested += f"chance alone makes {len(cells) / 20:.1f} so."
    return table(["", "seeds", *HEADINGS], lines) + [tested, "", *left]


def against_default(out: Path, main: list[dict]) -> list[str]:
    """Sentences: where a row differs from the default (or, the fault, from the same dW without it).

    That is by more than its interval over the seeds. The last one says which controls show the test's power.
    """
    lines, told_in = [], {}
    for name in [*dict.fromkeys(n for names in ROWS.values() for n in names if n != "default"), "fault"]:
        runs, found = seeds_of(out / "fault" if name == "fault" else out / "rows" / name), []
        for key, heading in zip(SHORT, HEADINGS, strict=True) if len(runs) > 1 else ():
            mean, half = interval(against(main, runs, main, key))
            if abs(mean) > half:
                found.append(f"{heading} {mean:+.1f} ± {half:.1f}")
        if runs:
            says = "; ".join(found) or "no difference that its seeds can tell"
            lines.append(f"- {name.replace('_', ' ')}: {says}")
            told_in[name] = len(found)
    controls = [name for name in [*ROWS["Controls"][1:], "fault"] if name in told_in]
    ways = {
        "can be told": [n for n in controls if told_in[n] >= 3],
        "cannot": [n for n in controls if told_in[n] < 3],
    }
    power = "; ".join(f"{way}: {', '.join(names).replace('_', ' ')}" for way, names in ways.items() if names)
    others = [count for name, count in told_in.items() if name not in controls]
    counted = (
        f"Of {len(SHORT) * len(others)} differences of rows that are no controls {sum(others)} can be told."
    )
    rule = f"By the rule, from the default in three rows or more, of the controls {power}."
    return [*lines, "", counted, "", rule, ""]


def verdict(main: list[dict]) -> list[str]:
    """Which way each metric of the main effect went, by its interval."""
    groups = {"raises": [], "lowers": [], "leaves undecided": []}
    for key, title in told_of(main):
        mean, half = interval(differences(main, main, key))
        way = "leaves undecided" if abs(mean) <= half else "raises" if mean > 0 else "lowers"
        groups[way].append(title)
    return [f"- Stage 2 {way}: {'; '.join(names) or 'nothing'}." for way, names in groups.items()] + [""]


def tried(out: Path) -> dict[str, tuple[float, list[float], dict[str, tuple[float, float]]]]:
    """Settings of stage 2 on the validation world, seed 0: plain things named, CHOICE, lost losses.

    The last is by how many percent each head's loss on held-out scenes falls, and half of its interval over
    them; M alone has none.
    """
    found = {}
    for folder in sorted((out / "choose").glob("*/retrieval")):
        of, lost = scores(folder.parent), {}
        keys = [("zeroshot", "plain", "acc1"), *CHOICE]
        plain, *values = (of[k]["after" if of[k]["before"] is None else "before"] for k in keys)
        for task in IN_DOMAIN:
            if loss := of.get(("losses", task, "loss")):
                percent = 100 / loss["before"]
                lost[task] = percent * (loss["before"] - loss["after"]), percent * loss["items"]
        found[folder.parent.name] = plain, values, lost
    return found


def choice_block(out: Path) -> list[str]:
    """The rule: the best mean of CHOICE, of those that name plain things a point worse than M at most."""
    settings = tried(out)
    if not settings:
        return ["Not run yet in this world.", ""]
    least = settings["M_alone"][0] - 1
    allowed = [name for name in settings if name not in ("M_alone", "long") and settings[name][0] >= least]
    best = max(allowed, key=lambda name: statistics.mean(settings[name][1]), default=None)
    rows = []
    for name, (plain, values, lost) in settings.items():
        title = name.replace("_", " ") + " (chosen)" * (name == best)
        losses = ["{:+.2f} ± {:.2f}".format(*lost[task]) if task in lost else "-" for task in IN_DOMAIN]
        rows.append([title, *(f"{v:.1f}" for v in (plain, *values, statistics.mean(values))), *losses])
    losses = [f"held-out loss of {task}, % lower" for task in IN_DOMAIN]
    return table(["", "plain", *CHOICE.values(), "mean, without plain", *losses], rows)


def times_block(path: Path) -> list[str]:
    """Minutes of each part, over all starts."""
    seconds = {}
    for line in path.read_text().splitlines():
        part, spent = line.split("\t")
        seconds[part] = seconds.get(part, 0) + int(spent)
    seconds["all"] = sum(seconds.values())
    return table(
        ["part", "minutes, of starts that were not interrupted"],
        [[part, f"{spent / 60:.1f}"] for part, spent in seconds.items()],
    )


def curves(out: Path, main: list[dict], path: Path) -> None:
    """Gain against steps of stage 2 and against alpha: over the seeds that all points have."""
    steps = {int(p.name): seeds_of(p) for p in (out / "steps").glob("[0-9]*")}
    settings = json.loads((out / "settings.json").read_text())
    steps[settings["iters"]] = main
    alphas = {int(p.name[5:]): seeds_of(p) for p in (out / "rows").glob("alpha*")}
    alphas[settings["alpha"]] = main
    seeds = min(len(runs) for runs in [*steps.values(), *alphas.values()] if runs)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, points, label in zip(axes, (steps, alphas), ("steps of stage 2", "LoRA's alpha"), strict=True):
        at = sorted(x for x, runs in points.items() if runs)
        for k, (key, heading) in enumerate(zip(SHORT, HEADINGS, strict=True)):
            gains = [interval(differences(main, points[x][:seeds], key)) for x in at]
            where = [x + 0.06 * (k - 2) for x in range(len(at))]  # side by side
            axis.errorbar(where, *zip(*gains, strict=True), label=heading, capsize=2, marker="o", ms=3)
        axis.set_xticks(range(len(at)), map(str, at))
        axis.axhline(0, color="gray", lw=0.8)
        axis.set_xlabel(label if len(at) > 1 else f"{label}: others not run yet")
    axes[0].set_ylabel(f"after - before, points, {seeds} seeds")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def dots(out: Path, path: Path) -> None:
    """Out of domain against in domain, a dot for each setting that was tried on the validation world."""
    settings = tried(out)
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, (_, values, lost) in settings.items():
        x = statistics.mean(loss for loss, _ in lost.values()) if lost else 0
        half = statistics.mean(half for _, half in lost.values()) if lost else 0  # the same scenes
        y = statistics.mean(values) - statistics.mean(settings["M_alone"][1])
        axis.errorbar(x, y, xerr=half, color="black", ecolor="silver", marker="o", ms=4)
        axis.annotate(f" {name.replace('_', ' ')}", (x, y), fontsize=7, va="bottom")
    axis.margins(x=0.2)
    axis.axhline(0, color="gray", lw=0.8)
    axis.axvline(0, color="gray", lw=0.8)
    axis.set_xlabel("in domain: losses of the heads on held-out scenes, mean, % lower (95% over scenes)")
    axis.set_ylabel("out of domain: after - before, points")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def forest(main: list[dict], keys: list[tuple], path: Path) -> None:
    """The differences of these keys and titles: a dot for each seed, mean and interval."""
    keys = [(key, title) for key, title in keys if key in main[0]]
    figure, axis = plt.subplots(figsize=(7.5, 0.26 * len(keys) + 0.8))
    for y, (key, _) in enumerate(reversed(keys)):
        values = differences(main, main, key)
        mean, half = interval(values)
        axis.plot(values, [y] * len(values), ".", color="silver")
        axis.errorbar(mean, y, xerr=half, color="black", marker="o", ms=4, capsize=2)
    axis.set_yticks(range(len(keys)), [title for _, title in reversed(keys)], fontsize=8)
    axis.axvline(0, color="gray", lw=0.8)
    axis.set_xlabel("after - before, points")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def report(out: Path, readme: Path) -> None:
    """Fill the blocks of demo/README.md between their marks, and draw its figures beside it.

    The claim's block is in the README of the folder above, too.
    """
    main = seeds_of(out / "demo")
    if not main:
        raise ValueError(f"{out}/demo holds no results: runs/miniature.sh makes them")
    fault = seeds_of(out / "fault")
    blocks = {
        "log": log_block(),
        "choice": ["![out of domain against in domain](choice.png)", "", *choice_block(out)],
        "claim": claim(main),
        "main": ["![main effect](main.png)", "", *main_block(main, fault or None)],
        "curves": ["![gain against steps and alpha](curves.png)", ""],
        "verdict": verdict(main),
        "heads": heads_block(out, main),
        "rows": rows_block(out, main),
        "against": against_default(out, main),
        "settings": [f"`{json.loads((out / 'settings.json').read_text())['stage2']}`", ""],
        "times": times_block(out / "seconds.tsv"),
    }
    for page, names in {readme: blocks, readme.parent.with_name(readme.name): ["claim"]}.items():
        text = page.read_text()
        for name in names:
            before, mark, rest = text.partition(f"<!-- {name} -->\n")
            _, end, after = rest.partition("<!-- end -->")
            if not (mark and end):
                raise ValueError(f"{page} has no block <!-- {name} --> ... <!-- end -->")
            text = before + mark + "\n".join(["", *blocks[name]]) + end + after
        part = page.with_suffix(".tmp")
        part.write_text(text)
        part.replace(page)
    forest(main, told_of(main), readme.with_name("main.png"))
    forest(main, [*MAIN.items(), *KEPT.items()], readme.with_name("claim.png"))
    curves(out, main, readme.with_name("curves.png"))
    dots(out, readme.with_name("choice.png"))
    print(f"{readme}: {len(main)} seeds")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["shuffle", "twice", "graft", "half", "choice", "report"])
    p.add_argument("paths", nargs="+", type=Path)
    args = p.parse_args()
    try:
        if args.what == "choice":
            print("\n".join(choice_block(args.paths[0])))
        elif args.what == "report":
            report(args.paths[0], args.paths[1] if len(args.paths) > 1 else README)
        else:
            {"shuffle": shuffle, "twice": twice, "graft": graft, "half": half}[args.what](*args.paths)
    except (ValueError, OSError) as error:
        print(f"miniature.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
