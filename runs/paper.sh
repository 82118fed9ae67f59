#!/usr/bin/env bash
# The paper from weights to Tables 3 to 8 and Fig. 3, one command after another. Tables 9 to 12: runs/ablations.sh.
#
#     runs/paper.sh                           # EVA-ViT-G, 8 GPUs of one machine
#     MODEL=eva_e runs/paper.sh               # EVA-ViT-E, the 4.4 B one: Table 5, Table 6, its row of Table 4
#     runs/paper.sh table7_okvqa figure3      # the parts whose names begin so; a part is a folder in $OUT
#     LAUNCH="torchrun --nproc_per_node 2" runs/paper.sh      # another run: batches are per GPU
#
# A part is done when its folder has a file `done`, and is then passed over: a stopped run goes on with the same command.
# `touch` that file beside heads or LoRA that you have already; remove it to have a part again. Needs COCO 2017 in $COCO,
# the backbone in weights/$MODEL.safetensors (or WEIGHTS=pretrained), and the sets to evaluate on, where the names below
# say; a part whose data are not there is left out, and said.
#
# Each table has those checkpoints of stage 2 that it has in the paper; CHECKPOINTS="010000 050000" puts others in all.
# EXCLUDE="--exclude-images FILE" keeps images out of both stages; the authors trained on all. LLM=2.7b: of BLIP-2's OPTs.
# BLIP2: a folder with blip2-opt-2.7b, ..., or Salesforce on the hub; CLIP_WEIGHTS: a file, or open_clip downloads them.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-eva_g} COCO=${COCO:-coco} DATA=${DATA:-data_sets} OUT=${OUT:-out/$MODEL}
WEIGHTS=${WEIGHTS:-weights/$MODEL.safetensors} LAUNCH=${LAUNCH:-torchrun --nproc_per_node 8}
BLIP2=${BLIP2:-Salesforce} PICTURES=${PICTURES:-$COCO/val2017}
WANTED=("$@")
source runs/parts.sh
M=(--model "$MODEL" --weights "$WEIGHTS")
[ "$MODEL" = eva_e ] && CLIP=(--clip EVA02-E-14-plus) || CLIP=(--clip EVA01-g-14)
CLIP+=(${CLIP_WEIGHTS:+--clip-weights "$CLIP_WEIGHTS"})
HEADS=$OUT/stage1

# score NAME CHECKPOINTS NEED... -- COMMAND...: COMMAND with the dW of each checkpoint and, beside it, without
score() {
    local step lora
    for step in ${CHECKPOINTS:-$2}; do
        lora=$OUT/visft/lora_$step.safetensors
        run "$OUT/$1_$step" "$lora" "${@:3}" --compare "$lora"
    done
}

parts() {
    local task set images captions llm opt sets=() found=$DATA/imagenet-1k
    # Algorithm 1: the heads on the frozen M. 150k, 150k and 100k steps on 8 GPUs (Sec. 4.2); side by side if you have more
    for task in detection segmentation captioning; do
        run "$HEADS/$task" "$COCO" -- \
            $LAUNCH stage1_heads.py --task $task "${M[@]}" --coco "$COCO" ${EXCLUDE:-} --resume
    done
    # Algorithm 2: dW through the frozen heads, 50k steps; after 5k it is the paper's default ViSFT
    run "$OUT/visft" "$COCO" "$HEADS"/{detection,segmentation,captioning}/done -- \
        $LAUNCH stage2_lora.py "${M[@]}" --coco "$COCO" --heads "$HEADS" ${EXCLUDE:-} --resume

    # In domain, where the paper has no table
    for task in detection segmentation captioning; do
        score in_domain_$task 005000 "$COCO/val2017" "$HEADS/$task/done" -- \
            $LAUNCH eval_heads.py --task $task "${M[@]}" --coco "$COCO" --head "$HEADS"
    done

    # Algorithm 3
    if [ "$MODEL" = eva_g ]; then # clovaai's data_lmdb_release; 24 x 8 = 192 words
        score table3 "005000 015000" "$DATA"/lmdb/{training/MJ,training/ST,evaluation} -- $LAUNCH eval_ocr.py "${M[@]}" \
            --train "$DATA"/lmdb/training/{MJ,ST} --test "$DATA/lmdb/evaluation" --batch 24 --resume
    fi
    score table4 "005000 015000" "$DATA"/coco-goi/{train,val}.jsonl -- $LAUNCH eval_goi.py "${M[@]}" \
        --train "$DATA/coco-goi/train.jsonl" --val "$DATA/coco-goi/val.jsonl" --cache "$OUT/features" # M3IT's

    for set in imagenet-{a,r,sketch,1k} eurosat cifar-10{,0} gtsrb caltech-101; do # those of the nine that are there
        if [ -e "$DATA/$set" ]; then
            sets+=(--set "$set=$DATA/$set") found=$DATA/$set
        elif wanted table5; then
            say "$OUT/table5: without $set, no $DATA/$set"
        fi
    done
    score table5 005000 "$found" -- $LAUNCH eval_zeroshot.py classification "${CLIP[@]}" "${sets[@]}"

    for set in coco flickr30k; do
        captions=$DATA/dataset_$set.json images=$DATA/$set # Karpathy's
        [ $set = flickr30k ] || images=$COCO
        score table6_$set "005000 050000" "$captions" "$images" -- $LAUNCH eval_zeroshot.py retrieval "${CLIP[@]}" \
            --captions "$captions" --images "$images"
        [ "$MODEL" = eva_g ] || continue # BLIP-2's tower
        score table6_blip2_$set 005000 "$captions" "$images" -- $LAUNCH eval_zeroshot.py retrieval \
            --blip2 "$BLIP2/blip2-itm-vit-g" --captions "$captions" --images "$images"
    done
    [ "$MODEL" = eva_g ] || return 0

    for llm in ${LLM:-2.7b 6.7b}; do
        opt=$BLIP2/blip2-opt-$llm
        vqa vqav2 v2_OpenEnded_mscoco_val2014_questions.json "$COCO" v2_mscoco_val2014_annotations.json
        vqa okvqa OpenEnded_mscoco_val2014_questions.json "$COCO" mscoco_val2014_annotations.json
        vqa gqa testdev_balanced_questions.json "$DATA/gqa/images"
    done
    for llm in ${LLM:-2.7b}; do
        score table8_$llm "005000 015000" "$DATA"/nocaps/{nocaps_val_4500_captions.json,images} -- \
            $LAUNCH eval_caption.py --blip2 "$BLIP2/blip2-opt-$llm" --images "$DATA/nocaps/images" \
            --captions "$DATA/nocaps/nocaps_val_4500_captions.json" --resume
    done
    score figure3 005000 "$PICTURES" -- python visualize.py attention "$PICTURES" --limit 8 "${M[@]}"
}

vqa() { # vqa KIND QUESTIONS IMAGES [ANNOTATIONS], with the llm and opt of `parts`
    score table7_$1_$llm "005000 020000" "$DATA/$1/$2" "$3" -- $LAUNCH eval_vqa.py --kind $1 --blip2 "$opt" \
        --questions "$DATA/$1/$2" --images "$3" ${4:+--annotations "$DATA/$1/$4"} --resume
}

all parts
