#!/usr/bin/env bash
# ViSFT from end to end on a made-up world, with a micro foundation model: minutes on two cores, nothing downloaded.
#
#     runs/demo.sh [OUT]              # OUT/report.md and OUT/report.html; OUT is out/demo
#     SEEDS=5 runs/demo.sh            # stage 2 and the evaluations five times: standard errors; 0: the world alone
#     HEADS=train runs/demo.sh        # with heads of one's own, by runs/heads.sh: hours
#     JOBS=1 runs/demo.sh             # nothing side by side: for a machine with one core
#
# A step that is done, by OUT/times.tsv, is not repeated, and training goes on from its last checkpoint: after an
# interruption the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-${OUT:-out/demo}}
SEEDS=${SEEDS:-1} HEADS=${HEADS:-demo/heads} JOBS=${JOBS:-2}
[[ $SEEDS =~ ^(0|[1-9][0-9]*)$ ]] || { echo "demo.sh: SEEDS must be a number, got $SEEDS" >&2; exit 2; }
[[ $JOBS =~ ^[12]$ ]] || { echo "demo.sh: JOBS must be 1 or 2, got $JOBS" >&2; exit 2; }
[ "$HEADS" = train ] || [ -d "$HEADS" ] ||
    { echo "demo.sh: HEADS must be \`train\` or a folder of heads, got $HEADS" >&2; exit 2; }
VERSION=$(cat runs/demo.sh runs/heads.sh demo/*.{py,json,safetensors} demo/heads/*.safetensors ./*.py {heads,data,scores}/*.py |
    sha256sum | cut -c1-16)
if [ -e "$OUT" ] && [ "$(cat "$OUT/version" 2>/dev/null)" != "$VERSION" ]; then
    echo "demo.sh: $OUT exists and is not of this version of the code; nothing was changed. Remove it, or name" \
        "another folder: make demo OUT=FOLDER" >&2
    exit 2
fi
mkdir -p "$OUT" && echo "$VERSION" > "$OUT/version" || { echo "demo.sh: cannot write in $OUT" >&2; exit 2; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so small a model gains nothing from more
trap 'exit 130' INT TERM
lanes=() following=
stopped() {
    for lane in "${lanes[@]}"; do kill -- "-$lane" 2> /dev/null || true; done
    [ -z "$following" ] || kill "$following" 2> /dev/null || true
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

lane() { # lane LOG FUNCTION...: on a core of its own, in a process group that can be stopped whole
    local log=$1
    shift
    set -m
    "$@" >> "$log" 2>&1 &
    set +m
    last=$!
    lanes+=("$last")
}

follow() { # follow LOG: show what the lane does that writes it, until that ends
    echo "== Beside that:"
    tail -n 1 -f "$1" & following=$!
    wait "$last"
    kill "$following" 2> /dev/null || true
    following=
}

WORLD=$OUT/world
M=(--model eva_mini.px112 --weights demo/eva_mini_clip.safetensors)
CLIP=(--clip demo/eva_mini_clip.json --clip-weights demo/eva_mini_clip.safetensors --text-cache "$OUT/texts")
SETS=(); for set in plain sketch rotated noisy; do SETS+=(--set "$set=$WORLD/shapes/$set"); done
TASKS=(detection segmentation captioning)
SIZE=(--size 112) # as M and the heads were trained
RESUME=(--resume --save-every 50)
TRAIN=("${M[@]}" --coco "$WORLD/coco" "${SIZE[@]}" --log-every 10 --workers 0 "${RESUME[@]}")
# What stage 2 needs: of what runs/miniature.sh tried on another world, the best by the rule in demo/README.md
ITERS=150 ALPHA=32
STAGE2=("${TRAIN[@]}" --warmup 20 --iters "$ITERS" --batch detection=8 segmentation=4 captioning=16 --lr 1e-3)
LORA=(--rank 8 --lora-alpha "$ALPHA")
READER=(--train "$WORLD/words/train" --test "$WORLD/words/test" --size 56 112 --charset 36 --width 128 --workers 0
    --iters 500 --batch 32 --lr 1e-3 --warmup 100 "${RESUME[@]}")

step "The world: scenes, words, classes, boxes" "$WORLD" \
    python demo/world.py "$WORLD" --train "${SCENES:-800}" --val "${VAL:-504}" --words 8000
if [ "$HEADS" = train ]; then
    HEADS=$OUT/heads/half
    step "Stage 1 (Algorithm 1): all heads, on a world of 24,000 scenes" "$HEADS/segmentation.safetensors" \
        bash runs/heads.sh "$OUT/heads" "${TASKS[@]}" # which goes on by itself where it stopped
fi

((SEEDS > 0)) || return 0 2> /dev/null || exit 0 # runs/miniature.sh's choice needs no more

stage1() { # to be seen: the heads of stage 2 were trained for longer
    step "Stage 1 (Algorithm 1): a minute of T_captioning on the frozen M" "$OUT/stage1/captioning.safetensors" \
        python stage1_heads.py --task captioning "${TRAIN[@]}" --iters 150 --batch 16 --lr 2e-3 --warmup 20 \
        --out "$OUT/stage1"
}

ocr() { # ocr SEED: the longest step
    step "Algorithm 3: OCR (Table 3), seed $1" "$OUT/seed$1/ocr/result.json" \
        python eval_ocr.py "${M[@]}" "${READER[@]}" --compare "$OUT/seed$1/visft/lora.safetensors" --seed "$1" \
        --cache "$OUT/features" --out "$OUT/seed$1/ocr"
}

stage2() { # stage2 SEED
    step "Stage 2 (Algorithm 2): dW through the frozen heads, seed $1" "$OUT/seed$1/visft/lora.safetensors" \
        python stage2_lora.py --tasks "${TASKS[@]}" --heads "$HEADS" --head-words "${STAGE2[@]}" "${LORA[@]}" \
        --seed "$1" --out "$OUT/seed$1/visft"
}

evaluate() { # evaluate SEED: what is measured with it, but for OCR
    local seed=$1 task
    local RUN=$OUT/seed$seed
    local LORA=$RUN/visft/lora.safetensors

    # In domain: the frozen heads on scenes that no one trained on
    local BOTH=(--compare "$LORA" --seed "$seed" --workers 0)
    for task in "${TASKS[@]}"; do
        step "In domain: $task, seed $seed" "$RUN/$task/result.json" \
            python eval_heads.py --task "$task" --head "$HEADS" "${M[@]}" "${BOTH[@]}" --coco "$WORLD/coco" \
            "${SIZE[@]}" --batch 16 --out "$RUN/$task"
    done

    # Algorithm 3: each with M and with M and dW; a new evaluation is a new step whose folder's name is its row's
    step "Algorithm 3: grounded object identification (Table 4), seed $seed" "$RUN/goi/result.json" \
        python eval_goi.py "${M[@]}" "${BOTH[@]}" --train "$WORLD/goi/train.jsonl" --val "$WORLD/goi/val.jsonl" \
        --size 112 --out "$RUN/goi"
    step "Algorithm 3: zero-shot classification (Table 5), seed $seed" "$RUN/zeroshot/result.json" \
        python eval_zeroshot.py classification "${CLIP[@]}" "${BOTH[@]}" "${SETS[@]}" --out "$RUN/zeroshot"
    step "Algorithm 3: retrieval (Table 6), seed $seed" "$RUN/retrieval/result.json" \
        python eval_zeroshot.py retrieval "${CLIP[@]}" "${BOTH[@]}" --captions "$WORLD/coco/dataset_coco.json" \
        --images "$WORLD/coco" --out "$RUN/retrieval"
}

pictures() { # of the first seed
    local scenes=("$WORLD"/coco/val2017/*.jpg)
    local last=$(basename "${scenes[3]}" .jpg)
    local show=("${scenes[@]:0:4}" "${M[@]}" --compare "$OUT/seed0/visft/lora.safetensors")
    step "Loss curves" "$OUT/figures/curves/curves.png" \
        python visualize.py curves "$OUT"/{stage1,seed0/visft}/log.jsonl --out "$OUT/figures/curves"
    step "Attention of [CLS] (Fig. 3)" "$OUT/figures/attention/$last.png" \
        python visualize.py attention "${show[@]}" --out "$OUT/figures/attention"
    step "Boxes, masks and captions" "$OUT/figures/predict/${last}_captioning.png" \
        python visualize.py predict "${show[@]}" --heads "$HEADS" --tasks "${TASKS[@]}" "${SIZE[@]}" \
        --out "$OUT/figures/predict"
}

if [ "$JOBS" = 2 ]; then
    lane "$OUT/stage2.log" stage2 0
    stage1
    follow "$OUT/stage2.log"
    lane "$OUT/ocr.log" ocr 0
    evaluate 0
    pictures
    follow "$OUT/ocr.log"
else
    stage1
    stage2 0
    evaluate 0
    pictures
    ocr 0
fi
seeds() { for ((seed = $1; seed < SEEDS; seed += JOBS)); do stage2 "$seed"; evaluate "$seed"; ocr "$seed"; done; }
if ((SEEDS > 1)); then
    echo "== Seeds 1 to $((SEEDS - 1)), $JOBS at a time, a core each: see $OUT/lane1.log, ..."
    lanes=()
    for ((first = 1; first <= JOBS; first++)); do lane "$OUT/lane$first.log" seeds "$first"; done
    for lane in "${lanes[@]}"; do wait "$lane"; done
fi
rm -rf "$OUT/features" # 0.2 GB for each M that read words

echo "== Report"
python demo/report.py "$OUT"
echo "$((SECONDS / 60)) min $((SECONDS % 60)) s"
