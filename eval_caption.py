"""Algorithm 3 with a multimodal model as T_o: captions of NoCaps (Table 8) or COCO, before and after ViSFT.

    torchrun --nproc_per_node 8 eval_caption.py --blip2 Salesforce/blip2-opt-2.7b --images nocaps/val \\
        --compare out/visft/lora_005000.safetensors --captions nocaps_val_4500_captions.json
    python eval_caption.py --vlm llava-hf/llava-1.5-7b-hf --images coco/val2017 --compare LORA ...
    python eval_caption.py --captions nocaps_val_4500_captions.json --results before.json after.json

--captions is NoCaps' file, scored in-, near- and out-of-domain and over all, each with its own document
frequencies; or captions of COCO: Karpathy's dataset_coco.json (its test images) or a captions_*.json. The
last form scores captions that are there already. Captions are kept as they come, so that --resume goes on
after a kill. Writes OUT/results_{before,after}.json in the official format, and OUT/result.json.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import answers
import evaluation
import files
from data.pictures import Pictures, collate, locate
from data.references import read as read_references
from ranks import launch, start
from scores.captions import caption_scores, check_images

DOMAINS = ("in-domain", "near-domain", "out-domain")  # NoCaps'; "overall" is all of them


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--captions", required=True, metavar="FILE", help="NoCaps', Karpathy's or COCO's JSON")
    add("--images", metavar="DIR", help="the images that FILE names")
    answers.add_generation_options(p, prompt="what asks for a caption, or what BLIP-2's captions go on from")
    evaluation.add_options(p, "out/caption", batch=16)
    args = p.parse_args()
    variants = answers.check_generation_options(args, evaluation.check_options(args), "caption")

    # --- setup
    ranks = start(args, p)

    # --- data
    E, notes = read(args.captions)
    E = E[: args.limit]
    if args.results:
        captions = [read_results(path) for path in args.results]
        for of_images in captions:
            check_images([item.id for item in E], of_images)
        return report(args, E, dict(zip(variants, captions, strict=True)), {}, notes)
    pictures = locate(args.images, [item.image for item in E], args.captions)

    # --- model
    model = answers.open_model(args, ranks)
    set_M, of_tower = model.attach(args.lora)
    settings = answers.generation_settings(args)
    protocol = {"generation": settings, "prompt": args.prompt, **model.protocol}
    (prompt,), of_prompt = model.prompts(args.prompt, [""])
    notes += of_tower + of_prompt

    # --- resume
    hashes = [files.sha256(file) for file in (args.captions, args.lora) if file]
    # Alg. 3, line 1: initialize results list R_o, with what a killed run has left behind
    R_o = answers.Answers(args, ranks, {**protocol, "files": hashes})
    done = {i for i, item in enumerate(E) if R_o.have([item.id], variants)}
    batches = evaluation.loader(Pictures(pictures, model.transform), args, ranks, collate, done)

    # --- loop
    for index, x, unread in tqdm(batches, disable=ranks.rank > 0):  # Alg. 3, line 2: for x in E_o(x)
        if unread:
            raise ValueError(next(iter(unread.values())))
        texts = {}
        for variant in variants:
            set_M(variant)
            f = model.see(x)  # Alg. 3, line 3: extract feature f* = M(x; dW*) for input x
            # Alg. 3, line 4: predicting R_o = [R_o, T_o(f*)]
            texts[variant] = model.generate(f, [prompt] * len(x), settings, args.batch)
        R_o.add([E[i].id for i in index], texts)

    # Alg. 3, line 6: accumulate results, Metric(E_o(y), R_o) on E_o
    everyones = R_o.gather(item.id for item in E[ranks.rank :: ranks.world])
    captions = {variant: {item.id: everyones[item.id][variant] for item in E} for variant in variants}
    report(args, E, captions, protocol, notes, model.files)


# --- data


class Item(NamedTuple):
    """image: its file's name; references: captions; domain: NoCaps'"""

    id: int | str
    image: str
    references: list[str]
    domain: str | None = None


def read(path: str) -> tuple[list[Item], list[str]]:
    """The images of a file of captions, as data.references reads it, and what the user should know.

    Raises FileNotFoundError, or ValueError for another format, images without a caption, unknown domains.
    """
    _, images, notes = read_references(path)
    items = [Item(**image) for image in images]
    if not items:
        raise ValueError(f"{path}: 0 images (of Karpathy's JSON, the test images are read)")
    if bare := [item.id for item in items if not item.references]:
        many = f"{len(bare)} of {len(items)} images"
        raise ValueError(f"{path}: {many} have no caption, the first is {files.shown(bare[0])}")
    if other := [item for item in items if item.domain not in (None, *DOMAINS)]:
        first = f"{files.shown(other[0].domain)} of image {files.shown(other[0].id)}"
        raise ValueError(f"{path}: domain must be one of {', '.join(DOMAINS)}, got {first}")
    return items, notes


def read_results(path: str) -> dict:
    """{image id: caption} from the official format, a list of {image_id, caption}."""
    rows = files.Items(path, files.read_json(path), "results")
    return dict(zip(rows.ids("image_id"), rows.column("caption", str), strict=True))


# --- save


def report(args, E: list[Item], captions: dict[str, dict], protocol: dict, notes: list, weights=()) -> None:
    """The official results files, the paper's table, every domain and metric, OUT/result.json."""
    if dist.get_rank() > 0:
        return
    sets = {domain: [item for item in E if item.domain == domain] for domain in DOMAINS}
    sets = {domain: items for domain, items in sets.items() if items}
    name = "NoCaps" if sets else "COCO"
    sets["overall"] = E
    notes = [f"{name}: {len(E)} images, {sum(len(item.references) for item in E)} captions", *notes]
    rows = []
    for domain, items in sets.items():
        references = {item.id: item.references for item in items}
        scores = {}  # metric -> variant -> of each image, or of them all
        for variant, of_images in captions.items():
            scored = caption_scores(references, {i: of_images[i] for i in references})
            notes += [f"{domain}: {note}" for note in scored.pop("notes")]
            per_image = scored.pop("per_image")
            per_image = np.array([per_image[i] for i in references])
            for metric, score in scored.items():
                scores.setdefault(metric, {})[variant] = per_image if metric.startswith("cider") else score
        title = f"{name} {domain}"
        rows += [evaluation.result_row(title, metric, s, len(items)) for metric, s in scores.items()]
    if not args.results:
        for variant, of_images in captions.items():
            path = Path(args.out) / f"results_{variant}.json"
            files.write_json(path, [{"image_id": i, "caption": c} for i, c in of_images.items()])
            notes.append(f"{path}: the captions")
    notes = list(dict.fromkeys(notes))
    cider = [row for row in rows if row["metric"].startswith("cider")]
    columns = ["CIDEr" if args.vlm else "Table 8, CIDEr", *(row["set"] for row in cider)]
    table = evaluation.table(columns, [[variant, *(row[variant] for row in cider)] for variant in captions])
    print(*notes, table, "", evaluation.rows_table(rows), sep="\n")
    paths = [args.captions, args.lora, *(args.results or ()), *weights]
    evaluation.write_result(args, {"rows": rows, "protocol": {**protocol, "notes": notes}}, paths)


if __name__ == "__main__":
    launch(main)
