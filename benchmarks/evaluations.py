"""Items per second of every evaluation script, from its command to its result.

    python benchmarks/evaluations.py

Each script runs on a few items of the demo's world and on many, M without dW, one loader process: seconds
are the difference, so that imports and models do not count; what grows with the items does (reading, M, T_o,
scores). M is eva_mini at 112 px, or at a quarter of the task's size; BLIP-2 is a random one of 56 px
(tests/tiny_blip2.py). With so small an M the heads' own work and reading limit most of them; with EVA-ViT-G
M does (eval_heads.py, zeroshot.py and ocr.py of this folder measure shares).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo import world  # noqa: E402
from tests import tiny_blip2  # noqa: E402

M = "--model eva_mini.px112 --weights demo/eva_mini_clip.safetensors"
CLIP = "--clip demo/eva_mini_clip.json --clip-weights demo/eva_mini_clip.safetensors"
HEADS = ("detection", "segmentation", "panoptic", "captioning", "pose")


def seconds(command: str, out: Path) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command.split(), "--workers", "1", "--out", str(out)],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - start


def write_questions(coco: Path, folder: Path, count: int) -> None:
    """A question for each image, in VQAv2's files."""
    images = json.loads((coco / "annotations/captions_val2017.json").read_text())["images"][:count]
    answers = [{"answer": "yes", "answer_id": k, "answer_confidence": "yes"} for k in range(10)]
    ids = [{"question_id": i["id"], "image_id": i["id"]} for i in images]
    questions = [{**one, "question": "What is this?"} for one in ids]
    annotations = [{**one, "answer_type": "other", "answers": answers} for one in ids]
    (folder / "q.json").write_text(json.dumps({"data_subtype": "val2017", "questions": questions}))
    (folder / "a.json").write_text(json.dumps({"annotations": annotations}))
    (folder / "vqa").mkdir()
    for image in images:
        name = f"COCO_val2017_{image['id']:012d}.jpg"
        (folder / "vqa" / name).symlink_to(coco / "val2017" / image["file_name"])


def commands(folder: Path) -> dict[str, str]:
    """What is counted: the command that evaluates it, but for --limit."""
    data, blip = folder / "world", folder / "blip2"
    coco, words, goi = (data / name for name in ("coco", "words", "goi"))
    in_domain = f"eval_heads.py --head {folder} {M} --coco {coco} --image-scale 0.25 --batch 8"
    items = {task: "persons" if task == "pose" else "images" for task in HEADS}
    return {f"{task}, {what}": f"{in_domain} --task {task}" for task, what in items.items()} | {
        "OCR, words": f"eval_ocr.py {M} --head {folder}/ocr/before/ocr.safetensors --test {words}/test/plain "
        "--batch 32",
        "GOI, a picture to train on and one to test": f"eval_goi.py {M} --train {goi}/train.jsonl "
        f"--val {goi}/val.jsonl --size 112 --batch 32",
        "zero-shot classification, pictures": f"eval_zeroshot.py classification {CLIP} --batch 32 "
        f"--text-cache {folder}/texts --set plain={data}/shapes/plain",
        "retrieval, images with 5 captions": f"eval_zeroshot.py retrieval {CLIP} --batch 32 "
        f"--text-cache {folder}/texts --captions {coco}/dataset_coco.json --images {coco}",
        "VQA by 5 beams, questions": f"eval_vqa.py --blip2 {blip} --kind vqav2 --questions {folder}/q.json "
        f"--annotations {folder}/a.json --images {folder}/vqa --batch 16",
        "captions by 5 beams, images": f"eval_caption.py --blip2 {blip} --images {coco}/val2017 --batch 16 "
        f"--captions {coco}/annotations/captions_val2017.json",
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--few", type=int, default=16)
    p.add_argument("--many", type=int, default=400)
    p.add_argument("--rounds", type=int, default=1, help="medians are taken over")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        world.write_world(folder / "world", args.many, 2 * args.many, 64, size=112, seed=0)
        tiny_blip2.write(folder / "blip2", "opt")
        write_questions(folder / "world/coco", folder, args.many)
        stage1 = f"stage1_heads.py {M} --coco {folder}/world/coco --image-scale 0.25 --iters 1 --batch 1"
        for task in HEADS:
            seconds(f"{stage1} --task {task}", folder / task)
        words = f"--train {folder}/world/words/train --test {folder}/world/words/test/plain --limit 1"
        head = "--size 56 112 --charset 36 --width 128 --iters 1 --batch 32"
        seconds(f"eval_ocr.py {M} {words} {head}", folder / "ocr")
        print("| evaluation, items | items / s |\n|---|---|", flush=True)
        answer = vars(args)
        for number, (name, command) in enumerate(commands(folder).items()):
            spent = {args.few: [], args.many: []}
            for k in range(args.rounds):
                for n, times in spent.items():
                    times.append(seconds(f"{command} --limit {n}", folder / f"{number}_{n}_{k}"))
            few, many = map(statistics.median, spent.values())
            answer[name] = (args.many - args.few) / (many - few)
            print(f"| {name} | {answer[name]:.1f} |", flush=True)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
