#!/usr/bin/env bash
# The paper from weights to tables, one command after another, each skipped where its result is there: a stopped run goes
# on with the same command. EVA-ViT-G by default; MODEL=eva_e is the 4.4 B one of most tables.
#
#     runs/paper.sh                      # 8 GPUs of one machine
#     LAUNCH="torchrun --nproc_per_node 2" runs/paper.sh
#
# Needs COCO 2017 in $COCO, the backbone in weights/$MODEL.safetensors (or WEIGHTS=pretrained), and the sets to evaluate
# on, where the names below say; an evaluation whose data are not there is left out, and said. README.md lists them.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-eva_g} COCO=${COCO:-coco} DATA=${DATA:-data_sets} OUT=${OUT:-out/$MODEL}
WEIGHTS=${WEIGHTS:-weights/$MODEL.safetensors} LAUNCH=${LAUNCH:-torchrun --nproc_per_node 8}
M=(--model "$MODEL" --weights "$WEIGHTS")
LORA=$OUT/visft/lora_005000.safetensors # Sec. 4.2: the paper's default ViSFT, of the checkpoints every 5k steps

run() { # run RESULT NEEDS COMMAND...
    local result=$1 needs=$2
    shift 2
    if [ -e "$result" ]; then
        echo "== $result: done before"
    elif [ ! -e "$needs" ]; then
        echo "== $result: left out, no $needs"
    else
        echo "== $result"
        "$@"
    fi
}
resumed() { [ -e "$1/last.pt" ] && echo --resume || true; } # a stopped training goes on from its checkpoint

# Algorithm 1: the heads on the frozen M. 150k, 150k and 100k steps on 8 GPUs (Sec. 4.2); side by side if you have more
for task in detection segmentation captioning; do
    mkdir -p "$OUT/$task"
    run "$OUT/$task/done" "$COCO" bash -c '"$@" && touch "$0"' "$OUT/$task/done" \
        $LAUNCH stage1_heads.py --task $task "${M[@]}" --coco "$COCO" --out "$OUT/$task" $(resumed "$OUT/$task")
done

# Algorithm 2: dW through the frozen heads, 50k steps; 5k of them are enough for $LORA
run "$OUT/visft/lora_050000.safetensors" "$OUT/captioning/done" \
    $LAUNCH stage2_lora.py "${M[@]}" --coco "$COCO" --heads "$OUT" --out "$OUT/visft" $(resumed "$OUT/visft")

# Algorithm 3: without and with dW
for task in detection segmentation captioning; do
    run "$OUT/eval_$task/result.json" "$LORA" $LAUNCH eval_heads.py --task $task "${M[@]}" --coco "$COCO" \
        --head "$OUT" --compare "$LORA" --out "$OUT/eval_$task"
done
OCR=$DATA/lmdb # clovaai's data_lmdb_release; Table 3
run "$OUT/ocr/result.json" "$OCR" $LAUNCH eval_ocr.py "${M[@]}" --train "$OCR/training/MJ" "$OCR/training/ST" \
    --test "$OCR/evaluation" --batch 24 --compare "$LORA" --out "$OUT/ocr" $(resumed "$OUT/ocr/before")
GOI=$DATA/coco-goi # M3IT's; Table 4
run "$OUT/goi/result.json" "$GOI" $LAUNCH eval_goi.py "${M[@]}" --train "$GOI/train.jsonl" --val "$GOI/val.jsonl" \
    --compare "$LORA" --out "$OUT/goi"

[ "$MODEL" = eva_e ] && CLIP=EVA02-E-14-plus || CLIP=EVA01-g-14
SETS=() FOUND=$DATA/imagenet-1k # Table 5: those of the nine that are there
for set in imagenet-1k imagenet-a imagenet-r imagenet-sketch eurosat cifar-10 cifar-100 gtsrb caltech-101; do
    if [ -e "$DATA/$set" ]; then SETS+=(--set "$set=$DATA/$set") FOUND=$DATA/$set; fi
done
run "$OUT/classification/result.json" "$FOUND" $LAUNCH eval_zeroshot.py classification --clip $CLIP \
    ${SETS[@]+"${SETS[@]}"} --compare "$LORA" --out "$OUT/classification"
for set in coco flickr30k; do # Table 6
    run "$OUT/retrieval_$set/result.json" "$DATA/dataset_$set.json" $LAUNCH eval_zeroshot.py retrieval --clip $CLIP \
        --captions "$DATA/dataset_$set.json" --images "$DATA/$set" --compare "$LORA" --out "$OUT/retrieval_$set"
done

if [ "$MODEL" = eva_g ]; then # Tables 6 to 8 with BLIP-2, whose tower is EVA-ViT-G
    BLIP2=${BLIP2:-Salesforce/blip2-opt-2.7b}
    for set in coco flickr30k; do
        run "$OUT/retrieval_blip2_$set/result.json" "$DATA/dataset_$set.json" $LAUNCH eval_zeroshot.py retrieval \
            --blip2 Salesforce/blip2-itm-vit-g --captions "$DATA/dataset_$set.json" --images "$DATA/$set" \
            --compare "$LORA" --out "$OUT/retrieval_blip2_$set"
    done
    run "$OUT/vqav2/result.json" "$DATA/vqav2" $LAUNCH eval_vqa.py --blip2 "$BLIP2" --kind vqav2 \
        --questions "$DATA/vqav2/v2_OpenEnded_mscoco_val2014_questions.json" \
        --annotations "$DATA/vqav2/v2_mscoco_val2014_annotations.json" --images "$DATA/coco/val2014" \
        --compare "$LORA" --out "$OUT/vqav2" --resume
    run "$OUT/nocaps/result.json" "$DATA/nocaps" $LAUNCH eval_caption.py --blip2 "$BLIP2" \
        --captions "$DATA/nocaps/nocaps_val_4500_captions.json" --images "$DATA/nocaps/images" \
        --compare "$LORA" --out "$OUT/nocaps" --resume
fi
