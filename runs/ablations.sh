#!/usr/bin/env bash
# Every row of the paper's Tables 9-12: runs of stage 2 that differ from the default in one thing, and their scores:
# COCO retrieval for all tables, ImageNet-1K for Table 12. EVA-ViT-E, eight GPUs.
#
#     runs/ablations.sh                # everything, one after another
#     runs/ablations.sh rank8 tasks    # the parts whose names begin so
#
# What is a part, when it is done, and where the data are: as in runs/paper.sh. COCO's retrieval test images are mostly in
# train2017, and dataset_coco.json (Karpathy's) keeps them out of both stages here. EXCLUDE= trains on all images, as
# the authors did; the heads of such a paper.sh will do: HEADS=out/eva_e/stage1.
#
# The scores are of the checkpoint of 5k steps, in a schedule of 50k. To save the rest of them: end a row (Ctrl-C) once
# its lora_005000.safetensors is there, `touch` the file `done` beside it, and give the command again.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-eva_e} COCO=${COCO:-coco} DATA=${DATA:-data_sets} OUT=${OUT:-out/ablations}
WEIGHTS=${WEIGHTS:-weights/$MODEL.safetensors} LAUNCH=${LAUNCH:-torchrun --nproc_per_node 8} HEADS=${HEADS:-$OUT/stage1}
EXCLUDE=${EXCLUDE---exclude-images $DATA/dataset_coco.json}
WANTED=("$@")
source runs/parts.sh
STAGE=(--model "$MODEL" --weights "$WEIGHTS" --coco "$COCO" $EXCLUDE --resume)
[ "$MODEL" = eva_g ] && CLIP=(--clip EVA01-g-14) || CLIP=(--clip EVA02-E-14-plus)
CLIP+=(${CLIP_WEIGHTS:+--clip-weights "$CLIP_WEIGHTS"})

row() { # row NAME "TASKS" OPTIONS...: stage 2, then NAME_coco and, for Table 12, NAME_imagenet
    local name=$1 task step lora heads=()
    for task in $2; do heads+=("$HEADS/$task/done"); done
    run "$OUT/$name" "$COCO" "${heads[@]}" -- \
        $LAUNCH stage2_lora.py "${STAGE[@]}" --heads "$HEADS" --tasks $2 "${@:3}" ${MORE:-}
    for step in ${CHECKPOINTS:-005000}; do
        lora=$OUT/$name/lora_$step.safetensors
        run "$OUT/${name}_coco_$step" "$lora" "$DATA/dataset_coco.json" "$COCO" -- $LAUNCH eval_zeroshot.py retrieval \
            "${CLIP[@]}" --captions "$DATA/dataset_coco.json" --images "$COCO" --compare "$lora"
        [[ $name == default || $name == tasks_* ]] || continue
        run "$OUT/${name}_imagenet_$step" "$lora" "$DATA/imagenet-1k" -- $LAUNCH eval_zeroshot.py classification \
            "${CLIP[@]}" --set "imagenet-1k=$DATA/imagenet-1k" --compare "$lora"
    done
}

parts() {
    local task three="detection segmentation captioning"
    for task in detection segmentation captioning pose panoptic; do
        run "$HEADS/$task" "$COCO" -- $LAUNCH stage1_heads.py --task $task "${STAGE[@]}"
    done

    row default "$three" # Table 9's r = 64, Table 10's 100%, Table 11's ViT LR x 0, Table 12's first row

    # Table 9: rank of LoRA
    row rank8 "$three" --rank 8
    row rank16 "$three" --rank 16
    row rank32 "$three" --rank 32

    # Table 10: part of the training data
    row data25 "$three" --data-fraction 0.25
    row data50 "$three" --data-fraction 0.5

    # Table 11: the heads' learning rate, in ViT LRs; above 0 they train along
    row heads0.1 "$three" --head-lr-ratio 0.1
    row heads1 "$three" --head-lr-ratio 1

    # Table 12: tasks; probabilities are the defaults' (0.4 captioning, 0.3 each other) made to sum to 1
    row tasks_with_pose "$three pose"
    row tasks_panoptic "detection panoptic captioning"
    row tasks_without_detection "segmentation captioning"
    row tasks_without_segmentation "detection captioning"
    row tasks_without_captioning "detection segmentation"
}

all parts
