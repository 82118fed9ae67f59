#!/usr/bin/env bash
# Beyond the paper: LLaVA-1.5's own tower, OpenAI's CLIP ViT-L/14 at 336 px, tuned; five question sets before and after.
#
#     runs/vlm.sh                             # 8 GPUs of one machine
#     runs/vlm.sh textvqa pope                # the parts whose names begin so; a part is a folder in $OUT
#     VLM=weights/llava-1.5-7b-hf runs/vlm.sh # a folder instead of the hub's name: also the tuned LLaVA as a folder
#
# A part is done when its folder has a file `done`, as in runs/paper.sh; what has no data is left out, and said.
#
# Needs COCO 2017 in $COCO, for POPE, VQAv2 and OK-VQA too (2014's pictures are found in 2017's folders), and in $DATA
#     textvqa/TextVQA_0.5.1_val.json, textvqa/train_images/    pope/coco_pope_{random,popular,adversarial}.json
#     vqav2, okvqa, gqa                                         as runs/paper.sh
# POPE's 500 pictures are of val2014 and most are in train2017: they are kept out of both stages where POPE's files are
# there. So are most of VQAv2's and OK-VQA's, which are too many to be kept out; TextVQA's and GQA's are not COCO's.
#
# Costs, COMPUTED (benchmarks/memory.py --models $MODEL; benchmarks/vlm.py), hours for all GPUs together at an assumed
# 50 TFLOP/s in the stages, whose batches are small, and 150 in LLaVA:
#     detection       150k steps x 8 x 2.0 TFLOP    13 GPU hours
#     segmentation    150k steps x 8 x 6.2 TFLOP    41
#     captioning      100k steps x 8 x 6.7 TFLOP    30
#     visft             5k steps x 8 x 7.8 TFLOP     2 (50k steps: 17); at most 6.2 GB of a GPU, 0.6 of which M's weights
#     the five sets   245k questions x 2 x 8.5 TFLOP    8, of which VQAv2 7; 14.1 GB of weights and 6.3 for 16 questions
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-vit_large_patch14_clip_quickgelu_336} COCO=${COCO:-coco} DATA=${DATA:-data_sets} OUT=${OUT:-out/vlm}
WEIGHTS=${WEIGHTS:-pretrained} LAUNCH=${LAUNCH:-torchrun --nproc_per_node 8} STEP=${STEP:-005000}
VLM=${VLM:-llava-hf/llava-1.5-7b-hf} # whose tower is frozen at OpenAI's weights, which timm downloads for both stages
WANTED=("$@")
source runs/parts.sh
M=(--model "$MODEL" --weights "$WEIGHTS")
HEADS=$OUT/stage1 LORA=$OUT/visft/lora_$STEP.safetensors
POPE=("$DATA"/pope/coco_pope_{random,popular,adversarial}.json)

# score NAME NEED... -- OPTIONS...: the answers of LLaVA with dW and without it
score() {
    local name=$1 need=()
    shift
    while [ "$1" != -- ]; do need+=("$1"); shift; done
    run "$OUT/$name" "$LORA" "${need[@]}" -- $LAUNCH eval_vqa.py --vlm "$VLM" --kind "$name" --compare "$LORA" \
        --batch 16 --resume "${@:2}"
}

export_vlm() { # --out FOLDER: the whole LLaVA with dW merged into its tower
    mkdir -p "$2"
    python convert.py export "$2/model" --to transformers --weights "$VLM" --lora "$LORA"
}

parts() {
    local task exclude=()
    if [ -z "${LIST:-}" ] && [ -e "${POPE[0]}" ]; then
        exclude=(--exclude-images "$OUT/pope_images.txt")
        mkdir -p "$OUT"
        cat "${POPE[@]}" | { grep -o 'COCO_val2014_[0-9]*' || true; } | sed 's/.*_0*//' | sort -un > "$OUT/pope_images.txt"
    fi
    for task in detection segmentation captioning; do
        run "$HEADS/$task" "$COCO" -- \
            $LAUNCH stage1_heads.py --task $task "${M[@]}" --coco "$COCO" "${exclude[@]}" --resume
    done
    run "$OUT/visft" "$COCO" "$HEADS"/{detection,segmentation,captioning}/done -- \
        $LAUNCH stage2_lora.py "${M[@]}" --coco "$COCO" --heads "$HEADS" "${exclude[@]}" --resume

    score pope "${POPE[@]}" "$COCO" -- --questions "${POPE[@]}" --images "$COCO"
    score textvqa "$DATA"/textvqa/{TextVQA_0.5.1_val.json,train_images} -- \
        --questions "$DATA/textvqa/TextVQA_0.5.1_val.json" --images "$DATA/textvqa/train_images"
    score gqa "$DATA"/gqa/{testdev_balanced_questions.json,images} -- \
        --questions "$DATA/gqa/testdev_balanced_questions.json" --images "$DATA/gqa/images"
    score okvqa "$DATA/okvqa/OpenEnded_mscoco_val2014_questions.json" "$COCO" -- --images "$COCO" \
        --questions "$DATA/okvqa/OpenEnded_mscoco_val2014_questions.json" \
        --annotations "$DATA/okvqa/mscoco_val2014_annotations.json"
    score vqav2 "$DATA/vqav2/v2_OpenEnded_mscoco_val2014_questions.json" "$COCO" -- --images "$COCO" \
        --questions "$DATA/vqav2/v2_OpenEnded_mscoco_val2014_questions.json" \
        --annotations "$DATA/vqav2/v2_mscoco_val2014_annotations.json"
    run "$OUT/export" "$VLM" "$LORA" -- export_vlm
}

all parts
