#!/usr/bin/env bash
# ViSFT from end to end on a made-up world, with a micro foundation model: minutes on two cores, nothing downloaded.
#
#     runs/demo.sh [OUT]              # OUT/report.md and OUT/report.html; OUT is out/demo
#     SEEDS=5 runs/demo.sh            # stage 2 and the evaluations five times: standard errors
#
# A step that is done, by OUT/times.tsv, is not repeated, and training goes on from its last checkpoint: after an
# interruption the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-${OUT:-out/demo}}
SEEDS=${SEEDS:-1}
[[ $SEEDS =~ ^[1-9][0-9]*$ ]] || { echo "demo.sh: SEEDS must be a number from 1 on, got $SEEDS" >&2; exit 2; }
VERSION=$(cat runs/demo.sh demo/*.py demo/*.json demo/*.safetensors ./*.py heads/*.py data/*.py scores/*.py | sha256sum | cut -c1-16)
if [ -e "$OUT" ] && [ "$(cat "$OUT/version" 2>/dev/null)" != "$VERSION" ]; then
    echo "demo.sh: $OUT exists and is not of this version of the code; nothing was changed. Remove it, or name" \
        "another folder: make demo OUT=FOLDER" >&2
    exit 2
fi
mkdir -p "$OUT" && echo "$VERSION" > "$OUT/version" || { echo "demo.sh: cannot write in $OUT" >&2; exit 2; }
trap 'exit 130' INT TERM
lanes=()
stopped() {
    for lane in "${lanes[@]}"; do kill -- "-$lane" 2> /dev/null || true; done
    echo "demo.sh: stopped; the same command goes on from here" >&2
}
trap '[ $? = 0 ] || stopped' EXIT

step() { # step WHAT FILE COMMAND...: run COMMAND, which makes FILE, unless it did so before
    local what=$1 file=$2 start=$SECONDS
    shift 2
    if [ -e "$file" ] && cut -f1 "$OUT/times.tsv" 2> /dev/null | grep -qxF "$what"; then
        echo "== $what: done before"
        return
    fi
    echo "== $what"
    "$@"
    printf '%s\t%s\n' "$what" $((SECONDS - start)) >> "$OUT/times.tsv"
}

WORLD=$OUT/world
M=(--model eva_mini.px112 --weights demo/eva_mini_clip.safetensors)
CLIP=(--clip demo/eva_mini_clip.json --clip-weights demo/eva_mini_clip.safetensors --text-cache "$OUT/texts")
SETS=(); for set in plain sketch rotated noisy; do SETS+=(--set "$set=$WORLD/shapes/$set"); done
TASKS=(detection segmentation captioning)
SCALE=(--image-scale 0.25) # long sides: detection 168 px, segmentation 252, captioning 70
RESUME=(--resume --save-every 50)
TRAIN=("${M[@]}" --coco "$WORLD/coco" "${SCALE[@]}" --warmup 20 --log-every 10 --workers 1 "${RESUME[@]}")
SEGMENTATION=(--iters 360 --batch 2 --lr 5e-4)
# What stage 2 needs; runs/miniature.sh tries others on another world
ITERS=150 ALPHA=8
STAGE2=("${TRAIN[@]}" --iters "$ITERS" --batch detection=2 segmentation=1 captioning=8 --rank 8
    --lora-alpha "$ALPHA" --lr 1e-3)

step "The world: scenes, words, classes, boxes" "$WORLD" python demo/world.py "$WORLD" --train 800 --val 210 --words 16000

stage1() { # stage1 TASK OPTIONS...
    local task=$1
    shift
    step "Stage 1 (Algorithm 1): T_$task on the frozen M" "$OUT/$task/$task.safetensors" \
        python stage1_heads.py --task "$task" "${TRAIN[@]}" "$@" --out "$OUT/$task"
}
stage1 detection --iters 120 --batch 4 --lr 5e-4
stage1 segmentation "${SEGMENTATION[@]}"
stage1 captioning --iters 180 --batch 16 --lr 2e-3

visft() { # visft SEED: stage 2 and all that is measured with it
    local seed=$1 task
    local RUN=$OUT/seed$seed
    local LORA=$RUN/visft/lora.safetensors
    step "Stage 2 (Algorithm 2): dW through the frozen heads, seed $seed" "$LORA" \
        python stage2_lora.py --tasks "${TASKS[@]}" --heads "$OUT" "${STAGE2[@]}" --seed "$seed" --out "$RUN/visft"

    # In domain: the frozen heads on scenes that no one trained on
    local BOTH=(--compare "$LORA" --seed "$seed" --workers 1)
    for task in "${TASKS[@]}"; do
        step "In domain: $task, seed $seed" "$RUN/$task/result.json" \
            python eval_heads.py --task "$task" --head "$OUT" "${M[@]}" "${BOTH[@]}" --coco "$WORLD/coco" \
            "${SCALE[@]}" --batch 8 --out "$RUN/$task"
    done

    # Algorithm 3: each with M and with M and dW; a new evaluation is a new step whose folder's name is its row's
    step "Algorithm 3: OCR (Table 3), seed $seed" "$RUN/ocr/result.json" \
        python eval_ocr.py "${M[@]}" "${BOTH[@]}" --train "$WORLD/words/train" --test "$WORLD/words/test" \
        --size 56 112 --charset 36 --width 128 --iters 1200 --batch 32 --lr 1e-3 --warmup 100 "${RESUME[@]}" \
        --cache "$OUT/features" --out "$RUN/ocr"
    step "Algorithm 3: grounded object identification (Table 4), seed $seed" "$RUN/goi/result.json" \
        python eval_goi.py "${M[@]}" "${BOTH[@]}" --train "$WORLD/goi/train.jsonl" --val "$WORLD/goi/val.jsonl" \
        --size 112 --out "$RUN/goi"
    step "Algorithm 3: zero-shot classification (Table 5), seed $seed" "$RUN/zeroshot/result.json" \
        python eval_zeroshot.py classification "${CLIP[@]}" "${BOTH[@]}" "${SETS[@]}" --out "$RUN/zeroshot"
    step "Algorithm 3: retrieval (Table 6), seed $seed" "$RUN/retrieval/result.json" \
        python eval_zeroshot.py retrieval "${CLIP[@]}" "${BOTH[@]}" --captions "$WORLD/coco/dataset_coco.json" \
        --images "$WORLD/coco" --out "$RUN/retrieval"
}
visft 0
lane() { for ((seed = $1; seed < SEEDS; seed += 2)); do OMP_NUM_THREADS=1 visft "$seed"; done; }
if ((SEEDS > 1)); then
    echo "== Seeds 1 to $((SEEDS - 1)), two at a time, a core each: see $OUT/lane1.log, lane2.log"
    set -m # each lane is a process group of its own, which can be stopped whole
    for first in 1 2; do
        lane $first >> "$OUT/lane$first.log" 2>&1 &
        lanes+=($!)
    done
    for lane in "${lanes[@]}"; do wait "$lane"; done
    set +m
fi
rm -rf "$OUT/features" # 0.4 GB for each M that read words

# Pictures of the first seed
SCENES=("$WORLD"/coco/val2017/*.jpg)
LAST=$(basename "${SCENES[3]}" .jpg)
SHOW=("${SCENES[@]:0:4}" "${M[@]}" --compare "$OUT/seed0/visft/lora.safetensors")
step "Loss curves" "$OUT/figures/curves/curves.png" \
    python visualize.py curves "$OUT"/{detection,segmentation,captioning,seed0/visft}/log.jsonl \
    --out "$OUT/figures/curves"
step "Attention of [CLS] (Fig. 3)" "$OUT/figures/attention/$LAST.png" \
    python visualize.py attention "${SHOW[@]}" --out "$OUT/figures/attention"
step "Boxes, masks and captions" "$OUT/figures/predict/${LAST}_captioning.png" \
    python visualize.py predict "${SHOW[@]}" --heads "$OUT" --tasks "${TASKS[@]}" "${SCALE[@]}" --sure 0.1 \
    --out "$OUT/figures/predict"

echo "== Report"
python demo/report.py "$OUT"
