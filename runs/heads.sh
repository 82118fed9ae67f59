#!/usr/bin/env bash
# The demo's heads: stage 1 (Algorithm 1) on 24,000 made-up scenes, and what the heads score on others.
#
#     runs/heads.sh [OUT] [TASK...]    # OUT/half/TASK.safetensors (fp16) and .jsonl (its log), OUT/scores.md
#
# Hours on one core, an hour or so on two that are free; after an interruption the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-out/heads}
shift || true
[ $# -gt 0 ] || set -- captioning detection segmentation pose # and, when named, panoptic
WORLD=$OUT/world
M=(--model eva_mini.px112 --weights demo/eva_mini_clip.safetensors --coco "$WORLD/coco" --size 112)
TRAIN=(--batch 16 --lr 4e-4 --warmup 200 --workers 0 --cache "$OUT/features" --save-every 500 --resume)
declare -A OPTIONS=(
    [captioning]="--iters 3500 --lr 2e-3 --warmup 100"
    [detection]="--iters 10500 --queries 20 --layers 3 3 --dropout 0"
    [segmentation]="--iters 4000 --queries 20 --layers 2 3 --points 512 --data-fraction 0.5"
    [panoptic]="--iters 2000 --queries 20 --layers 2 3 --points 512 --data-fraction 0.33"
    [pose]="--iters 3000 --lr 1e-3 --data-fraction 0.5"
)
[ -e "$WORLD" ] || python demo/world.py "$WORLD" --train 24000 --words 64
mkdir -p "$OUT/half"
for task in "$@"; do
    read -ra options <<< "${OPTIONS[$task]}"
    python stage1_heads.py --task "$task" "${M[@]}" "${TRAIN[@]}" "${options[@]}" --out "$OUT/$task"
    python demo/miniature.py half "$OUT/$task/$task.safetensors" "$OUT/half/$task.safetensors"
    cp "$OUT/$task/log.jsonl" "$OUT/half/$task.jsonl"
    python eval_heads.py --task "$task" --head "$OUT/half" "${M[@]}" --batch 16 --workers 0 --out "$OUT/scores/$task"
done
python - "$OUT" << 'END' | tee "$OUT/scores.md"
import json, sys
from pathlib import Path

print("| T_n on 1,008 held-out scenes | metric | score |\n| --- | --- | --- |")
for path in sorted(Path(sys.argv[1]).glob("scores/*/result.json")):
    for row in json.loads(path.read_text())["rows"]:
        if row["metric"] in ("box AP", "box AP50", "mask AP", "mask AP50", "PQ", "keypoint AP", "keypoint AP50", "CIDEr", "BLEU-4"):
            print(f"| {path.parent.name} | {row['metric']} | {row['before']:.1f} |")
END
