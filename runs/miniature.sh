#!/usr/bin/env bash
# The paper's experiment in miniature, on the demo's world: the main effect with error bars, Tables 9-12, and controls
# that the paper lacks. Fills demo/README.md with what it measures.
#
#     runs/miniature.sh [OUT]              # OUT is out/miniature
#     PARTS=choose runs/miniature.sh       # a part alone, of: choose main; and on what main has left: more fault rows steps
#     ROWS="rank no_" runs/miniature.sh    # of the rows those whose names begin so
#
# What is done is not repeated: after an interruption the same command goes on where it stopped.
set -euo pipefail
OUT=${1:-${OUT:-out/miniature}} SEEDS=${SEEDS:-5} ROW_SEEDS=${ROW_SEEDS:-3} PARTS=" ${PARTS:-choose main more fault rows steps} "
MINIATURE=$OUT SEEDS_WANTED=$SEEDS
echo "== The main effect takes the time of $SEEDS demos on larger test sets, all parts hours; rows and controls: $ROW_SEEDS seeds"
STARTED=$SECONDS
VAL=1008 SCENES=4000
[[ $PARTS == *" main "* ]] || SEEDS=0
source "$(dirname "$0")/demo.sh" "$MINIATURE/demo" # the main effect: the demo, with more seeds; and its settings
MAIN=$OUT OUT=$MINIATURE SEEDS=$SEEDS_WANTED
[[ $PARTS != *" main "* ]] || printf '%s\t%s\n' main $((SECONDS - STARTED)) >> "$OUT/seconds.tsv"
set -m # each run in the background is a process group of its own, which can be stopped whole
stopped() {
    for job in $(jobs -p); do kill -- "-$job" 2> /dev/null || true; done
    echo "miniature.sh: stopped; the same command goes on from here" >&2
}
trap '[ $? = 0 ] || stopped' EXIT
ALL=("${STAGE2[@]}" "${LORA[@]}")
printf '{"iters": %s, "alpha": %s, "stage2": "%s"}\n' "$ITERS" "$ALPHA" "${ALL[*]/#$WORLD*/COCO}" \
    > "$OUT/settings.json"
rm -f "$OUT/failed"
# From here on two runs at a time, a core each

both() { # both FUNCTION ARGUMENTS...: in the background, as soon as a core is free
    while (($(jobs -rp | wc -l) >= 2)); do wait -n || true; done
    [ ! -e "$OUT/failed" ] || exit 1
    "$@" &
}

all_done() {
    wait
    [ ! -e "$OUT/failed" ] || exit 1
}

part() { # part NAME: whether it is wanted; says so
    [[ $PARTS == *" $1 "* ]] || return 1
    echo "== $1"
    STARTED=$SECONDS
}

ended() { # ended NAME: all of it is done
    all_done
    printf '%s\t%s\n' "$1" $((SECONDS - STARTED)) >> "$OUT/seconds.tsv"
}

once() { # once FILE COMMAND...: run COMMAND, which makes FILE last of all, unless it did so before
    local file=$1 folder
    shift
    [ ! -e "$file" ] || return 0
    folder=$(dirname "$file")
    mkdir -p "$folder"
    "$@" >> "$folder/log.txt" 2>&1 || { echo "failed: $*: see $folder/log.txt" >&2; touch "$OUT/failed"; exit 1; }
    echo "   $(date +%H:%M:%S) $file"
}

score() { # score FOLDER SEED WORLD LORA [M CLIP]: what the tables of rows show, of M with dW, or of another M
    local folder=$1 world=$3 sets=() set shared=(--lora "$4" --seed "$2" --workers 0)
    local m=("${M[@]}" "${shared[@]}" ${5:+--weights "$5"}) clip=("${CLIP[@]}" "${shared[@]}" ${6:+--clip-weights "$6"})
    for set in plain sketch rotated noisy; do sets+=(--set "$set=$world/shapes/$set"); done
    once "$folder/goi/result.json" python eval_goi.py "${m[@]}" --train "$WORLD/goi/train.jsonl" \
        --val "$world/goi/val.jsonl" --size 112 --out "$folder/goi"
    once "$folder/zeroshot/result.json" python eval_zeroshot.py classification "${clip[@]}" "${sets[@]}" \
        --out "$folder/zeroshot"
    galleries "$folder" "$world" "${clip[@]}"
}

galleries() { # galleries FOLDER WORLD OPTIONS...: retrieval in each of the world's; the tables have their mean
    local folder=$1 world=$2 captions name
    for captions in "$world"/coco/dataset_coco*.json; do
        name=$(basename "${captions/dataset_coco/retrieval}" .json)
        once "$folder/$name/result.json" python eval_zeroshot.py retrieval "${@:3}" \
            --captions "$captions" --images "$world/coco" --out "$folder/$name"
    done
}

more() { # more SEED: what the main effect has beside the demo's: losses, probes, galleries, OCR heads of two more seeds
    local run=$MAIN/seed$1 k
    once "$run/losses/result.json" python demo/losses.py "$HEADS" "$WORLD/coco" "$run/visft/lora.safetensors" \
        --out "$run/losses"
    once "$run/probe/result.json" python demo/probe.py --lora "$run/visft/lora.safetensors" --out "$run/probe"
    galleries "$run" "$WORLD" "${CLIP[@]}" --compare "$run/visft/lora.safetensors" --seed "$1" --workers 0
    for k in 1 2; do
        once "$run/ocr_$k/result.json" python eval_ocr.py "${M[@]}" "${READER[@]}" --seed "$(($1 + 10 * k))" \
            --compare "$run/visft/lora.safetensors" --cache "$run/features_$k" --out "$run/ocr_$k"
        rm -rf "$run/features_$k" # 0.2 GB for each M that read words
    done
}

row() { # row NAME SEED OPTIONS...: stage 2 with OPTIONS after the demo's own, then its scores
    local name=$1 seed=$2 run=$OUT/rows/$1/seed$2 words=(--head-words)
    shift 2
    [[ $name != no_captioning && $name != only_[ds]* ]] || words=()
    once "$run/visft/lora.safetensors" python stage2_lora.py --tasks "${TASKS[@]}" --heads "$HEADS" "${STAGE2[@]}" \
        "${LORA[@]}" "${words[@]}" --seed "$seed" "$@" --out "$run/visft"
    score "$run" "$seed" "$WORLD" "$run/visft/lora.safetensors"
}

fault() { # fault FOLDER SEED LORA: the same dW at twice its scale, in evaluation only
    once "$1/lora.safetensors" python demo/miniature.py twice "$3" "$1/lora.safetensors"
    score "$1" "$2" "$WORLD" "$1/lora.safetensors"
}

wanted() { # wanted NAME: whether ROWS has the beginning of its name; all are, without ROWS
    local start
    [ -n "${ROWS:-}" ] || return 0
    for start in $ROWS; do [[ $1 != "$start"* ]] || return 0; done
    return 1
}

rows() { # rows NAME OPTIONS...: with every seed, if it is wanted
    wanted "$1" || return 0
    for ((seed = 0; seed < ROW_SEEDS; seed++)); do both row "$1" "$seed" "${@:2}"; done
}

full() { # full SEED: all of M is tuned, at a rate of its own
    local run=$OUT/rows/full/seed$1
    once "$run/visft/M.safetensors" python stage2_lora.py --tasks "${TASKS[@]}" --heads "$HEADS" "${STAGE2[@]}" \
        --head-words --seed "$1" --full --lr 3e-4 --out "$run/visft"
    once "$run/clip.safetensors" python demo/miniature.py graft "$run/visft/M.safetensors" "$run/clip.safetensors"
    score "$run" "$1" "$WORLD" none "$run/visft/M.safetensors" "$run/clip.safetensors"
}

more_clip() { # more_clip SEED: as many steps of contrastive pretraining as stage 2 has, from the same M
    local run=$OUT/rows/more_clip/seed$1
    once "$run/clip/eva_mini_clip.safetensors" python demo/pretrain.py --weights demo/eva_mini_clip.safetensors \
        --steps "$ITERS" --decay "$((ITERS / 2))" --lr 1e-4 --patch-dropout 0 --batch 32 --pictures "$((ITERS * 32))" \
        --seed "$((100 + $1))" --resume --out "$run/clip"
    score "$run" "$1" "$WORLD" none "$run/clip/eva_mini_clip.safetensors" "$run/clip/eva_mini_clip.safetensors"
}

# Settings of stage 2, on a world that nothing else sees
if part choose; then
    once "$OUT/validation/goi/val.jsonl" bash -c "rm -rf '$OUT/validation' && python demo/world.py '$OUT/validation' \
        --seed 1000 --train 800 --words 64"
    choose() { # choose NAME OPTIONS...: from the first guess, whose rate is 1e-3
        local run=$OUT/choose/$1
        once "$run/visft/lora.safetensors" python stage2_lora.py --tasks "${TASKS[@]}" --heads "$HEADS" "${STAGE2[@]}" \
            --rank 8 --lora-alpha 8 --head-words --lr 1e-3 "${@:2}" --out "$run/visft"
        once "$run/losses/result.json" python demo/losses.py "$HEADS" "$OUT/validation/coco" \
            "$run/visft/lora.safetensors" --scenes 300 --out "$run/losses"
        score "$run" 0 "$OUT/validation" "$run/visft/lora.safetensors"
    }
    both score "$OUT/choose/M_alone" 0 "$OUT/validation" none
    both choose first_guess
    both choose equal_gradients_500 --equal-gradients --iters 500
    both choose captions_alone_500 --tasks captioning --batch 16 --iters 500
    both choose steps_500 --iters 500
    both choose lr_3e-3 --lr 3e-3
    both choose alpha_32 --lora-alpha 32
    both choose equal_gradients --equal-gradients
    both choose captions_alone --tasks captioning --batch 16
    both choose lr_3e-4 --lr 3e-4
    both choose rank_32 --rank 32 --lora-alpha 32
    both choose captions_often --probs 0.15 0.15 0.7
    both choose first_blocks --lora-blocks 0 2
    both choose last_blocks --lora-blocks 3 5
    both choose steps_1000 --iters 1000
    # As long, beside stage 1, as the paper's 5,000 steps: looked at after the others, and not to be chosen
    once "$OUT/many/goi/val.jsonl" bash -c "rm -rf '$OUT/many' && python demo/world.py '$OUT/many' --train 24000 \
        --val 8 --words 8"
    both choose long --equal-gradients --iters 3000 --coco "$OUT/many/coco"
    ended choose
fi

if part more; then
    for ((seed = 0; seed < SEEDS; seed++)); do both more "$seed"; done
    ended more
fi

if part fault; then
    for ((seed = 0; seed < SEEDS; seed++)); do
        both fault "$OUT/fault/seed$seed" "$seed" "$MAIN/seed$seed/visft/lora.safetensors"
    done
    ended fault
fi

if part rows; then
    # Heads that are none: one step at no rate
    head() { # head FOLDER TASK OPTIONS...
        once "$1/$2.safetensors" python stage1_heads.py --task "$2" "${TRAIN[@]}" "${@:3}" --out "$1"
    }
    nothing=(--iters 1 --warmup 0 --lr 1e-12 --batch 2) # sizes as runs/heads.sh has them
    both head "$OUT/random/detection" detection "${nothing[@]}" --queries 20 --layers 3 3 --dropout 0
    both head "$OUT/random/segmentation" segmentation "${nothing[@]}" --queries 20 --layers 2 3 --points 512
    both head "$OUT/random/captioning" captioning "${nothing[@]}"
    both once "$OUT/shuffled/annotations/captions_train2017.json" python demo/miniature.py shuffle "$WORLD/coco" \
        "$OUT/shuffled"
    all_done
    lacking() { # the heads of Table 12 that HEADS has not: panoptic's would make the repository too large
        local row task
        for row in with_pose panoptic; do
            task=${row#with_}
            ! wanted "$row" || [ -e "$HEADS/$task.safetensors" ] ||
                once "$OUT/heads/scores/$task/result.json" bash runs/heads.sh "$OUT/heads" "$task"
        done
        rm -rf "$OUT/heads/features"
    }
    both lacking
    scaled() { echo --rank "$1" --lora-alpha $(($1 * ALPHA / 8)); } # the same scale
    rows heads0.1 --head-lr-ratio 0.1 # Table 11
    rows heads1 --head-lr-ratio 1
    rows random_heads --heads "$OUT/random" # controls
    rows shuffled_labels --coco "$OUT/shuffled"
    for name in full more_clip; do
        for ((seed = 0; seed < ROW_SEEDS; seed++)); do ! wanted "$name" || both "$name" "$seed"; done
    done
    rows equal_gradients --equal-gradients
    rows no_detection --tasks segmentation captioning --batch segmentation=4 captioning=16 # Table 12
    rows no_segmentation --tasks detection captioning --batch detection=8 captioning=16
    rows no_captioning --tasks detection segmentation --batch detection=8 segmentation=4
    rows only_detection --tasks detection --batch 8
    rows only_segmentation --tasks segmentation --batch 4
    rows only_captioning --tasks captioning --batch 16
    rows rank4 $(scaled 4) # Table 9
    rows rank16 $(scaled 16)
    rows rank64 $(scaled 64)
    rows data25 --data-fraction 0.25 # Table 10
    rows data50 --data-fraction 0.5
    rows alpha2 --lora-alpha 2 # curves
    rows alpha8 --lora-alpha 8
    all_done # also the heads that were lacking
    rows with_pose --heads "$HEADS" "$OUT/heads/half" --tasks "${TASKS[@]}" pose # Table 12
    rows panoptic --heads "$HEADS" "$OUT/heads/half" --tasks detection panoptic captioning \
        --batch detection=8 panoptic=4 captioning=16
    ended rows
fi

# The paper's checkpoints: gain against steps
if part steps; then
    for step in 50 100 200 400; do # stage 2 saves every 50
        for ((seed = 0; step < ITERS && seed < ROW_SEEDS; seed++)); do
            both score "$OUT/steps/$step/seed$seed" "$seed" "$WORLD" \
                "$MAIN/seed$seed/visft/lora_$(printf %06d "$step").safetensors"
        done
    done
    ended steps
fi

if [ -e "$MAIN/seed0" ]; then
    echo "== demo/README.md"
    python demo/miniature.py report "$OUT"
else
    python demo/miniature.py choice "$OUT"
fi
