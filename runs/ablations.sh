#!/usr/bin/env bash
# Every row of the paper's Tables 9-12: runs of stage 2 that differ from the default in one thing. Needs a head
# for each task in out/TASK, from stage 1 with the same --exclude-images: COCO's retrieval test images are mostly
# in train2017, and dataset_coco.json (Karpathy's) keeps them out. To be scored afterwards: COCO retrieval of
# out/ablations/NAME/lora_005000.safetensors, for all tables, and ImageNet, for Table 12. Eight GPUs, EVA-ViT-E.
#
#   runs/ablations.sh                # all rows, one after another
#   runs/ablations.sh rank8 tasks    # those whose name begins so
set -euo pipefail
cd "$(dirname "$0")/.."
HEADS=${HEADS:-out} OUT=${OUT:-out/ablations} COCO=${COCO:-coco} LAUNCH=${LAUNCH:-torchrun --nproc_per_node 8}
EXCLUDE=${EXCLUDE:---exclude-images dataset_coco.json} # EXCLUDE=" " trains on all images, as the authors did
WANTED=("$@")

row() { # row NAME OPTIONS...
    local name=$1 wanted
    shift
    for wanted in "${WANTED[@]:-}"; do
        if [[ $name == "$wanted"* ]]; then
            $LAUNCH stage2_lora.py --model "${MODEL:-eva_e}" --coco "$COCO" --heads "$HEADS" $EXCLUDE "$@" \
                --out "$OUT/$name" ${MORE:-}
            return
        fi
    done
}

# Table 9: rank of LoRA; 64 is the default of all tables
row rank8 --rank 8
row rank16 --rank 16
row rank32 --rank 32
row default # also Table 10's 100%, Table 11's ViT LR x 0 and Table 12's first row

# Table 10: part of the training data
row data25 --data-fraction 0.25
row data50 --data-fraction 0.5

# Table 11: the heads' learning rate, in ViT LRs; above 0 they train along
row heads0.1 --head-lr-ratio 0.1
row heads1 --head-lr-ratio 1

# Table 12: tasks; probabilities are the defaults' (0.4 captioning, 0.3 each other) made to sum to 1
row tasks_with_pose --tasks detection segmentation captioning pose
row tasks_panoptic --tasks detection panoptic captioning
row tasks_without_detection --tasks segmentation captioning
row tasks_without_segmentation --tasks detection captioning
row tasks_without_captioning --tasks detection segmentation
