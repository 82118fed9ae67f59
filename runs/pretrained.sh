#!/usr/bin/env bash
# What the demo's M knows before any ViSFT: names, captions, marked things, words; some minutes on two cores.
#
#     runs/pretrained.sh [OUT] [WEIGHTS]    # OUT/scores.md; out/pretrained and the committed M
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-out/pretrained} WEIGHTS=${2:-demo/eva_mini_clip.safetensors}
WORLD=$OUT/world
CLIP=(--clip demo/eva_mini_clip.json --clip-weights "$WEIGHTS" --text-cache "$OUT/texts" --workers 1)
[ -e "$WORLD" ] || python demo/world.py "$WORLD" --train 24000 --words 2
SETS=(); for set in plain sketch rotated noisy; do SETS+=(--set "$set=$WORLD/shapes/$set"); done
python eval_zeroshot.py classification "${CLIP[@]}" "${SETS[@]}" --out "$OUT/zeroshot"
for captions in "$WORLD"/coco/dataset_coco*.json; do
    python eval_zeroshot.py retrieval "${CLIP[@]}" --captions "$captions" --images "$WORLD/coco" \
        --out "$OUT/retrieval/$(basename "$captions" .json)"
done
for marked in 4000 24000; do # as many as the demo has for GOI, and more
    head -n "$marked" "$WORLD/goi/train.jsonl" > "$WORLD/goi/train_$marked.jsonl"
    python eval_goi.py --model eva_mini.px112 --weights "$WEIGHTS" --train "$WORLD/goi/train_$marked.jsonl" \
        --val "$WORLD/goi/val.jsonl" --size 112 --workers 1 --out "$OUT/goi_$marked"
done
python demo/probe.py --weights "$WEIGHTS" --out "$OUT/probe"
python - "$OUT" << 'END' | tee "$OUT/scores.md"
import json, sys
from pathlib import Path
from statistics import mean

out = Path(sys.argv[1])
rows = {f: json.loads(f.read_text())["rows"] for f in sorted(out.glob("**/result.json"))}
galleries = [r for f, r in rows.items() if "retrieval" in f.parts]
print("| | top-1 or R@1 | top-5 or R@5 |\n| --- | --- | --- |")
for name in ("plain", "sketch", "rotated", "noisy"):
    scores = [r["before"] for r in rows[out / "zeroshot/result.json"] if r["set"] == name]
    print(f"| classes, {name} | {scores[0]:.1f} | {scores[1]:.1f} |")
for title, way in (("image to text", "TR"), ("text to image", "IR")):
    scores = [mean(r["before"] for rs in galleries for r in rs if r["metric"] == f"{way}@{k}") for k in (1, 5)]
    print(f"| {title}, mean of {len(galleries)} galleries of 200 | {scores[0]:.1f} | {scores[1]:.1f} |")
for marked in (4000, 24000):
    goi = [r["before"] for r in rows[out / f"goi_{marked}/result.json"]]
    print(f"| the marked thing, a probe of [CLS] on {marked:,} | {goi[0]:.1f} | {goi[1]:.1f} |")
for r in rows[out / "probe/result.json"]:
    print(f"| a sign's word among 50, a probe of {r['set']} | {r['before']:.1f} | - |")
END
