"""Algorithm 3 with BLIP-2 as T_o: captions of NoCaps (Table 8) or COCO, before and after ViSFT.

    torchrun --nproc_per_node 8 eval_caption.py --blip2 Salesforce/blip2-opt-2.7b --images nocaps/val \\
        --compare out/visft/lora_005000.safetensors --captions nocaps_val_4500_captions.json
    python eval_caption.py --captions nocaps_val_4500_captions.json --results before.json after.json

--captions is NoCaps' file, scored in-, near- and out-of-domain and over all, each with its own document
frequencies; or captions of COCO: Karpathy's dataset_coco.json (its test images) or a captions_*.json. The
second form scores captions that are there already. Captions are kept as they come, so that --resume goes on
after a kill. Writes OUT/results_{before,after}.json in the official format, and OUT/result.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import answers
import evaluation
import files
from data.pictures import Pictures, collate, locate
from ranks import launch, start
from scores.captions import caption_scores, check_images

DOMAINS = ("in-domain", "near-domain", "out-domain")  # NoCaps'; "overall" is all of them


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--captions", required=True, metavar="FILE", help="NoCaps', Karpathy's or COCO's JSON")
    add("--images", metavar="DIR", help="the images that FILE names")
    add(
        "--prompt",
        default="a photo of",
        help="what captions go on from (BLIP-2; LAVIS: none before finetuning)",
    )
    length = dict(length_penalty=None, length_help="of beams, 0 = off (default: 1)")
    answers.add_generation_options(p, beams=5, most=30, least=8, **length)
    evaluation.add_options(p, "out/caption", batch=16)
    args = p.parse_args()
    variants = answers.check_generation_options(args, evaluation.check_options(args))

    # --- setup
    ranks = start(args, p)

    # --- data
    E = read(args.captions)[: args.limit]
    if args.results:
        captions = [read_results(path) for path in args.results]
        for found in captions:
            check_images([item["id"] for item in E], found)
        return report(args, E, dict(zip(variants, captions, strict=True)), {}, [])
    pictures = locate(args.images, [item["image"] for item in E], args.captions)

    # --- model
    import blip2  # transformers: seconds that --help need not wait

    blip = blip2.Blip2(args.blip2, ranks.dtype, ranks.device)
    set_M, notes = blip.attach(args.lora)
    settings = answers.generation_settings(args, length_penalty=1.0)
    protocol = {"generation": settings, "prompt": args.prompt, "blip2": blip.version}

    # --- resume
    hashes = [files.sha256(file) for file in (args.captions, args.lora) if file]
    # Alg. 3, line 1: initialize results list R_o, with what a killed run has left behind
    R_o = answers.Answers(args, ranks, {**protocol, "files": hashes})
    done = {i for i, item in enumerate(E) if R_o.have([item["id"]], variants)}
    batches = evaluation.loader(Pictures(pictures, blip.transform), args, ranks, collate, done)

    # --- loop
    for index, x, unread in tqdm(batches, disable=ranks.rank > 0):  # Alg. 3, line 2: for x in E_o(x)
        for why in unread.values():
            raise ValueError(why)
        found = {}
        for variant in variants:
            set_M(variant)
            f = blip.vision(x)  # Alg. 3, line 3: extract feature f* = M(x; dW*) for input x
            prompts = [args.prompt] * len(x)
            found[variant] = blip.generate(blip.queries(f), prompts, settings, args.batch)  # Alg. 3, line 4
        R_o.add([E[i]["id"] for i in index], found)

    # Alg. 3, line 6: accumulate results, Metric(E_o(y), R_o) on E_o
    found = R_o.gather(item["id"] for item in E[ranks.rank :: ranks.world])
    captions = {variant: {item["id"]: found[item["id"]][variant] for item in E} for variant in variants}
    report(args, E, captions, protocol, notes, blip.files)


# --- data


def read(path: str) -> list[dict]:
    """A dict per image: id, image (its file), references (captions), domain (NoCaps', or None).

    Raises FileNotFoundError, or ValueError for another format, ids that are there twice, images without any.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--captions {path}: no such file")
    try:
        content = json.loads(Path(path).read_text())
        if "annotations" in content:  # COCO's format
            items = [
                dict(id=i["id"], image=i["file_name"], references=[], domain=i.get("domain"))
                for i in content["images"]
            ]
            by_id = {item["id"]: item for item in items}
            for annotation in content["annotations"]:
                by_id[annotation["image_id"]]["references"].append(annotation["caption"])
        else:  # Karpathy's
            items = [
                dict(
                    id=i["cocoid"],
                    image=f"{i['filepath']}/{i['filename']}",
                    references=[sentence["raw"] for sentence in i["sentences"]],
                    domain=None,
                )
                for i in content["images"]
                if i["split"] == "test"
            ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: neither NoCaps', COCO's nor Karpathy's captions ({what})") from error
    if not items or len({item["id"] for item in items}) < len(items):
        raise ValueError(
            f"{path}: {len(items)} images (of Karpathy's the test images); each must be there once"
        )
    if bare := [item["id"] for item in items if not item["references"]]:
        raise ValueError(
            f"{path}: {len(bare)} of {len(items)} images have no caption, the first is {bare[0]}"
        )
    if other := {item["domain"] for item in items} - {None, *DOMAINS}:
        raise ValueError(f"{path}: domain must be one of {', '.join(DOMAINS)}, got {other.pop()}")
    return items


def read_results(path: str) -> dict:
    """{image id: caption} from the official format, a list of {image_id, caption}."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--results {path}: no such file")
    try:
        rows = json.loads(Path(path).read_text())
        captions = {row["image_id"]: row["caption"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file, a list of image_id and caption") from error
    if len(captions) < len(rows):
        raise ValueError(f"{path}: {len(rows) - len(captions)} images are there twice")
    return captions


# --- save


def report(
    args, E: list[dict], captions: dict[str, dict], protocol: dict, notes: list[str], weights=()
) -> None:
    """The official results files, the paper's table, every domain and metric, OUT/result.json."""
    if dist.get_rank() > 0:
        return
    sets = {domain: [item for item in E if item["domain"] == domain] for domain in DOMAINS}
    sets = {domain: items for domain, items in sets.items() if items}
    name = "NoCaps" if sets else "COCO"
    sets["overall"] = E
    notes = [f"{name}: {len(E)} images, {sum(len(i['references']) for i in E)} captions", *notes]
    rows = []
    for domain, items in sets.items():
        references = {item["id"]: item["references"] for item in items}
        scores = {}
        for variant, found in captions.items():
            scored = caption_scores(references, {i: found[i] for i in references})
            notes += [f"{domain}: {note}" for note in scored.pop("notes")]
            per_image = scored.pop("per_image")
            for metric, score in scored.items():
                per_item = np.array([per_image[i] for i in references])
                scores.setdefault(metric, {})[variant] = per_item if metric.startswith("cider") else score
        rows += [evaluation.result_row(f"{name} {domain}", metric, s, len(items)) for metric, s in scores.items()]
    if not args.results:
        for variant, found in captions.items():
            path = Path(args.out) / f"results_{variant}.json"
            files.write_json(path, [{"image_id": i, "caption": c} for i, c in found.items()])
            notes.append(f"{path}: the captions")
    print(*dict.fromkeys(notes), sep="\n")
    cider = [row for row in rows if row["metric"].startswith("cider")]
    columns = ["Table 8, CIDEr", *(row["set"] for row in cider)]
    print(
        evaluation.table(columns, [[variant, *(row[variant] for row in cider)] for variant in captions])
        + "\n"
    )
    print(evaluation.rows_table(rows))
    protocol = {**protocol, "notes": list(dict.fromkeys(notes))}
    paths = [args.captions, args.lora, *(args.results or ()), *weights]
    evaluation.write_result(args, {"rows": rows, "protocol": protocol}, paths)


if __name__ == "__main__":
    launch(main)
