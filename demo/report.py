"""The demo's report, from what its runs left behind: report.md and report.html (pictures inside).

    python demo/report.py out/demo

Reads OUT/seed*/EVALUATION/result.json (the `rows` of every evaluation script), OUT/figures/*.png and
OUT/times.tsv, and takes whatever is there.
"""

import argparse
import base64
import html
import json
import re
import statistics
import sys
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that ours are found from any folder

from data import words
from files import open_picture
from scores.words import alphanumeric

ORDER = ["detection", "segmentation", "captioning", "ocr", "goi", "zeroshot", "retrieval"]
PAPER = {  # the paper's own differences for tasks of the same kind and metric, in points, EVA-ViT-G or -E
    ("ocr", "accuracy"): "+2.5 after 5k steps, +3.2 after 15k (Table 3)",
    ("goi", "top-1"): "+0.6 / +0.3 (Table 4, G / E)",
    ("goi", "top-5"): "+0.2 / +0.4 (Table 4, G / E)",
    ("zeroshot", "acc1"): "+0.1 to +0.3; EuroSAT +1.3 (Table 5)",
    ("retrieval", "TR@5"): "0.0 to +1.1 (Table 6)",
    ("retrieval", "IR@5"): "0.0 to +1.1 (Table 6)",
}
COLUMNS = [
    "evaluation",
    "set",
    "metric",
    "n",
    "before",
    "after",
    "difference",
    "error",
    "the paper's difference",
]
INTRODUCTION = """A micro CLIP model (eva_mini, 2.8 M parameters, pretrained on pictures with a sentence
each) is the vision foundation model M. Stage 1 trains task heads on it while it is frozen (Algorithm 1), here
one of them for a minute, to be seen; stage 2 trained LoRA on its queries and values through heads that were
trained for hours, now frozen (Algorithm 2); then M was tested on other tasks, before and after (Algorithm 3).
All is made up and small: it shows how ViSFT is run, and what it did here. Whether it helps, with five seeds,
intervals, the paper's ablations and controls, is in demo/README.md; runs/miniature.sh repeats that."""
DETAIL = re.compile(r"^(box|mask|keypoint) (AP75|AP[sml]|AR.*)$")  # left to the result.json
FORMS = {"n": "{:.0f}", "before": "{:.1f}", "after": "{:.1f}", "difference": "{:+.2f}"}


def collect(out: Path) -> dict[tuple, list[dict]]:
    """(evaluation, set, metric) -> its row of every seed; in domain first, then as the paper's tables."""
    rows = {}
    paths = sorted(out.glob("seed*/*/result.json"))
    known = [path for name in ORDER for path in paths if path.parent.name == name]
    for path in known + [path for path in paths if path.parent.name not in ORDER]:
        for row in json.loads(path.read_text())["rows"]:
            if not DETAIL.search(row["metric"]):
                rows.setdefault((path.parent.name, row["set"], row["metric"]), []).append(row)
    return rows


def error(rows: list[dict]) -> str:
    """Standard error over seeds; of one seed, the interval over items."""
    differences = [r["difference"] for r in rows if r["difference"] is not None]
    if len(differences) > 1:
        return f"± {statistics.stdev(differences) / len(differences) ** 0.5:.2f} ({len(differences)} seeds)"
    if len(differences) == 1 and rows[0].get("low") is not None:
        return f"{rows[0]['low']:+.1f} .. {rows[0]['high']:+.1f} (95%, items)"
    return "-"


def mean(rows: list[dict], key: str, form: str) -> str:
    values = [r[key] for r in rows if r[key] is not None]
    return form.format(statistics.mean(values)) if values else "-"


def table(rows: dict[tuple, list[dict]]) -> list[list[str]]:
    lines = []
    for (evaluation, name, metric), runs in rows.items():
        scores = [mean(runs, key, form) for key, form in FORMS.items()]
        lines.append([evaluation, name, metric, *scores, error(runs), PAPER.get((evaluation, metric), "-")])
    return lines


def sections(out: Path) -> list[tuple]:
    """Its parts: ("text", str), ("heading", str), ("table", columns, lines), ("picture", path, name)."""
    seeds, times = len(list(out.glob("seed*"))), out / "times.tsv"
    steps = [line.split("\t") for line in times.read_text().splitlines()] if times.is_file() else []
    parts = [("text", " ".join(INTRODUCTION.split()))]
    rows = table(collect(out))
    parts += [("heading", "Before and after")]
    if rows:
        told = f"Percent, mean of {seeds} seed{'s' * (seeds > 1)} of stage 2 and of the probes."
        told += " Detection, segmentation and captioning are in domain: what stage 2 trained for."
        parts += [("text", told), ("table", COLUMNS, rows)]
    else:
        parts += [("text", "No evaluation has been run.")]
    draw_words(out)
    captions = {
        "curves": "Losses of stage 1 and stage 2.",
        "attention": "Fig. 3: what [CLS] of the last layer looks at, before and after; one scale per column.",
        "predict": "What the heads of stage 1 answer on validation scenes, before and after stage 2.",
        "words": "Words of the test sets as the OCR heads read them, before and after.",
    }
    for folder, told in captions.items():
        found = sorted((out / "figures" / folder).glob("*.png"))
        parts += [("heading", told)] * bool(found) + [("picture", path, path.stem) for path in found]
    if steps:
        total = sum(float(seconds) for _, seconds in steps)
        parts += [
            ("heading", "Wall time"),
            ("table", ["step", "seconds, since it last started"], [*steps, ["sum", f"{total:.0f}"]]),
            ("text", "OCR ran beside the other evaluations, so the whole took less than the sum."),
        ]
    return parts


def draw_words(out: Path, each: int = 4) -> None:
    """OUT/figures/words/words.png: some words of each outcome, the first of each set in turn."""
    said = out / "seed0" / "ocr" / "words.jsonl"
    if not said.is_file():
        return
    rows, places = [json.loads(line) for line in said.read_text().splitlines()], {}
    for row in rows:
        right = tuple(alphanumeric(row[v]) == alphanumeric(row["label"]) for v in ("before", "after"))
        name, _, number = row["image_id"].rpartition("/")
        places.setdefault(right, {}).setdefault(name, []).append((int(number) - 1, row))
    titles = {(True, True): "right in both", (False, True): "right after", (True, False): "right before",
              (False, False): "right in neither"}  # fmt: skip
    sets = words.find([str(out / "world" / "words" / "test")])
    figure, axes = plt.subplots(len(titles), each, figsize=(2.6 * each, 1.5 * len(titles)), squeeze=False)
    for line, (right, title) in zip(axes, titles.items(), strict=True):
        turns = [[(name, *one) for one in found[:each]] for name, found in places.get(right, {}).items()]
        chosen = [one for turn in zip_longest(*turns) for one in turn if one][:each]
        for axis in line:
            axis.axis("off")
        for axis, (name, i, row) in zip(line, chosen, strict=False):
            axis.imshow(open_picture(sets[name].read(i)[0]))
            axis.set_title(f"{row['before']} | {row['after']}\n({title}, {name})", fontsize=7)
    path = out / "figures" / "words" / "words.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_first(out: Path, width: int = 1000) -> None:
    """OUT/first.jpg, which README shows: attention of [CLS], then boxes, of one scene, before and after."""
    scenes = sorted((out / "figures" / "predict").glob("*_detection.png"))[1:2]
    attention = [out / "figures" / "attention" / path.name.replace("_detection", "") for path in scenes]
    if not all(path.is_file() for path in scenes + attention) or not scenes:
        return
    parts = [open_picture(path) for path in attention + scenes]
    parts = [part.resize((width, part.height * width // part.width)) for part in parts]
    both = Image.new("RGB", (width, sum(part.height for part in parts)))
    for part, top in zip(parts, (0, parts[0].height), strict=True):
        both.paste(part, (0, top))
    both.save(out / "first.jpg", quality=85)


def markdown(parts: list[tuple], out: Path) -> str:
    lines = ["# ViSFT, the demo", ""]
    for kind, *rest in parts:
        if kind == "table":
            columns, rows = rest
            for cells in (columns, ["---"] * len(columns), *rows):
                lines.append(f"| {' | '.join(cells)} |")
        elif kind == "picture":
            lines.append(f"![{rest[1]}]({rest[0].relative_to(out)})")
        else:
            lines.append(f"## {rest[0]}" if kind == "heading" else rest[0])
        lines.append("")
    return "\n".join(lines)


def page(parts: list[tuple]) -> str:
    """One HTML file with its pictures in it."""
    body = ["<h1>ViSFT, the demo</h1>"]
    for kind, *rest in parts:
        if kind == "table":
            columns, rows = rest
            cells = ["".join(f"<th>{html.escape(c)}</th>" for c in columns)]
            cells += ["".join(f"<td>{html.escape(c)}</td>" for c in row) for row in rows]
            body.append(f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>")
        elif kind == "picture":
            data = base64.b64encode(rest[0].read_bytes()).decode()
            body.append(f'<img alt="{html.escape(rest[1])}" src="data:image/png;base64,{data}">')
        else:
            tag = "h2" if kind == "heading" else "p"
            body.append(f"<{tag}>{html.escape(rest[0])}</{tag}>")
    style = (
        "body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:2px 8px;text-align:left}"
    )
    head = f'<meta charset="utf-8"><title>ViSFT, the demo</title><style>{style}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="folder of the demo's runs")
    args = p.parse_args()
    if not args.out.is_dir():
        print(f"report.py: no folder {args.out}: runs/demo.sh makes it", file=sys.stderr)
        sys.exit(2)
    parts = sections(args.out)
    draw_first(args.out)
    for name, content in (("report.md", markdown(parts, args.out)), ("report.html", page(parts))):
        part = args.out / f"{name}.tmp"
        part.write_text(content)
        part.replace(args.out / name)
        print(args.out / name)


if __name__ == "__main__":
    main()
