#!/usr/bin/env bash
# Both stages on made-up scenes with a small random EVA-ViT: some three minutes on two cores, nothing downloaded.
# It shows that everything runs, not that ViSFT helps: a random backbone has no fine-grained knowledge to unleash.
# Stage 2 starts at a higher loss than stage 1 ended with: after 200 steps DETR's 100 queries still answer alike
# once dropout is off (as it is in stage 2), and it was dropout that spread them over the objects.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-out/demo}
if [ -e "$OUT" ]; then
    echo "demo.sh: $OUT exists: remove it, or give another folder: runs/demo.sh OUT" >&2
    exit 2
fi
COMMON=(--model eva_mini --weights random --coco "$OUT/coco" --image-scale 0.33 --warmup 20 --log-every 20 --workers 1)

python demo/world.py "$OUT/coco" --train 64 --val 16
python stage1_heads.py --task detection "${COMMON[@]}" --iters 200 --batch 2 --lr 3e-4 --out "$OUT/detection"
python stage2_lora.py --tasks detection --heads "$OUT" "${COMMON[@]}" --iters 100 --batch 2 --lr 1e-3 --out "$OUT/visft"

python - "$OUT/detection/log.jsonl" "$OUT/visft/log.jsonl" <<'END'
import json, sys
for path in sys.argv[1:]:
    for row in map(json.loads, open(path)):
        print(f"{path}  step {row['step']:4d}  loss {row['detection/loss']:6.2f}")
END
