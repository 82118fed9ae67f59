"""Algorithm 3 with CLIP's own text tower as T_o: zero-shot classification (Table 5) and retrieval (Table 6).

The paper's, before and after ViSFT, in one pass over the images:

    torchrun --nproc_per_node 8 eval_zeroshot.py classification --compare out/visft/lora_005000.safetensors \\
        --set imagenet-1k=imagenet/val --set imagenet-a=imagenet-a --set eurosat=EuroSAT ...
    torchrun --nproc_per_node 8 eval_zeroshot.py retrieval --compare out/visft/lora_005000.safetensors \\
        --captions dataset_coco.json --images coco
    torchrun --nproc_per_node 8 eval_zeroshot.py retrieval --blip2 Salesforce/blip2-itm-vit-g --compare ...

Any open_clip model goes by its name (--clip), or by a config file of its own; LoRA needs a timm vision tower,
such as EVA's. Prints the paper's table and every difference with its 95% interval; writes OUT/result.json.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import evaluation
from data import zeroshot
from data.pictures import Pictures, collate
from ranks import Ranks, gather, launch, refuse_unused, start
from scores.ranking import TOP, Cosines, accuracy, classify, recall


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="task", required=True)
    for command, table in ((classification, 5), (retrieval, 6)):
        q = commands.add_parser(command.__name__, help=f"Table {table}")
        q.set_defaults(command=command)
        add, which = q.add_argument, q.add_mutually_exclusive_group()
        name = dict(default="EVA02-E-14-plus", metavar="NAME|CONFIG.json", help="a model of open_clip")
        which.add_argument("--clip", **name)
        weights = "a file, a name of open_clip's (downloads; default: its first), or `random`"
        add("--clip-weights", metavar="FILE|TAG", help=weights)
        add("--text-cache", default="out/texts", metavar="DIR", help="keeps text features for the next run")
        evaluation.add_options(q, f"out/{command.__name__}", batch=64)
        if command is classification:
            known = f"one of {', '.join(zeroshot.KNOWN)}, or any other if DIR has a names.json; repeatable"
            add("--set", dest="sets", action="append", required=True, metavar="NAME=DIR", help=known)
        else:
            blip = "a folder, or a name on the hub: the first stage of BLIP-2 instead of CLIP"
            which.add_argument("--blip2", metavar="DIR|NAME", help=blip)
            top = "how many of each ranking BLIP-2's matching head ranks again (LAVIS: 128)"
            add("--rerank", type=int, default=128, metavar="K", help=top)
            formats = "Karpathy's JSON (its test images), COCO's captions, or a list of image and caption"
            add("--captions", required=True, metavar="FILE", help=formats)
            add("--images", required=True, metavar="DIR", help="folder of the images that FILE names")
    args = p.parse_args()
    command = retrieval_with_blip2 if getattr(args, "blip2", None) else args.command
    del args.command  # what is left are options
    command(args, commands.choices[args.task], evaluation.check_options(args))


def answers(E, clip, T_o: Callable[[Tensor], Tensor], empty: Tensor, set_M, variants, args, ranks: Ranks):
    """Alg. 3, lines 1 to 4, in one pass over the images for all variants, on all ranks.

    T_o: what is kept of features (b, D); empty: (n, ...), zeros of what it gives for the n images
    Returns {variant: R_o}, as `empty`; (n,) how many features of an image were not finite; {image: why it
    cannot be read}.
    """
    R_o = {variant: empty.to(ranks.device, copy=True) for variant in variants}  # Alg. 3, line 1
    broken, bad = torch.zeros(len(empty), dtype=torch.int64, device=ranks.device), {}
    images = Pictures(E.images, clip.transform)
    batches = evaluation.loader(images, args, ranks, collate)
    for index, x, unread in tqdm(batches, E.name, disable=ranks.rank > 0):  # Alg. 3, line 2: for x in E_o(x)
        bad |= unread
        if x is None:
            continue
        index, x = index.to(ranks.device, non_blocking=True), clip.pixels(x)
        for variant in variants:
            set_M(variant)
            f = clip.image_features(x)  # Alg. 3, line 3: f* = M(x; dW*)
            R_o[variant][index] = T_o(f)  # Alg. 3, line 4: R_o = [R_o, T_o(f*)]
            broken[index] += ~f.isfinite().all(1)
    for part in (*R_o.values(), broken):  # every image was on one rank and is 0 on the others
        dist.all_reduce(part)
    return R_o, broken, gather(bad)


def classification(args: argparse.Namespace, options: argparse.ArgumentParser, variants: list[str]) -> None:
    """Table 5: the class whose name is nearest to an image."""
    from clip import Clip, cached_texts, check_clip  # open_clip: seconds that --help need not wait

    config = check_clip(args)
    sets = dict(s.partition("=")[::2] for s in args.sets)
    if "" in (*sets, *sets.values()) or len(sets) < len(args.sets):
        raise ValueError(f"--set wants NAME=DIR, each NAME once; got {' '.join(args.sets)}")

    # --- setup
    ranks = start(args, options)
    torch.set_float32_matmul_precision("highest")  # similarities decide by their last digits

    # --- data
    order = [name for name in zeroshot.KNOWN if name in sets]
    order += [name for name in sets if name not in order]
    benchmarks = [zeroshot.open_set(name, sets[name], args.limit) for name in order]

    # --- model
    clip = Clip(args.clip, args.clip_weights, ranks, args.seed)
    set_M = evaluation.attach(clip.tower, args)

    # --- loop
    rows, used = [], {}
    for E in benchmarks:
        ranks.say(*E.notes)
        n, W = len(E.images), cached_texts(clip, E.texts, E.templates, config, args)  # (C, D)
        empty = torch.zeros(n, min(TOP, len(W)), dtype=torch.int64)
        R_o, broken, bad = answers(E, clip, partial(classify, W=W), empty, set_M, variants, args, ranks)
        check_gallery(E, broken, bad, least=1)
        if ranks.rank > 0:
            continue
        # Alg. 3, line 6: accumulate results, Metric(E_o(y), R_o)
        y = E.target.to(ranks.device)
        good = torch.tensor([i for i in range(n) if i not in bad], device=ranks.device)
        scores = {variant: accuracy(R[good], y[good], len(W)) for variant, R in R_o.items()}
        rows += score_rows(E, scores, dict.fromkeys(scores[variants[0]], len(good)))
        used[E.name] = about(E, bad)

    # --- save
    if ranks.rank == 0:
        top1 = [row for row in rows if row["metric"] == "acc1"]
        columns = ["Table 5, top-1 %", *(zeroshot.KNOWN.get(row["set"], row["set"]) for row in top1)]
        report(columns, top1, rows, variants)
        protocol = clip_protocol(clip, "to the first class of the list")
        result = {"task": args.task, "rows": rows, "sets": used, "protocol": protocol, "clip": config}
        evaluation.write_result(args, result, [args.clip_weights, args.lora])


def retrieval(args: argparse.Namespace, options: argparse.ArgumentParser, variants: list[str]) -> None:
    """Table 6, upper half: the caption of an image and the image of a caption."""
    from clip import Clip, cached_texts, check_clip

    refuse_unused(args, options, "rerank", "with --clip: only BLIP-2 ranks again")
    config = check_clip(args)

    # --- setup
    ranks = start(args, options)
    torch.set_float32_matmul_precision("highest")  # similarities decide by their last digits

    # --- data
    E = zeroshot.open_captions(args.captions, args.images, args.limit)
    ranks.say(*E.notes)

    # --- model
    clip = Clip(args.clip, args.clip_weights, ranks, args.seed)
    set_M = evaluation.attach(clip.tower, args)

    # --- loop
    n, W = len(E.images), cached_texts(clip, E.texts, E.templates, config, args)  # (T, D)
    T_o = torch.nn.Identity()  # keeps the features: captions can be ranked when all images are in
    R_o, broken, bad = answers(E, clip, T_o, torch.zeros(n, clip.dim), set_M, variants, args, ranks)
    check_gallery(E, broken, bad, least=n)
    if ranks.rank > 0:
        return
    # Alg. 3, line 6: accumulate results, Metric(E_o(y), R_o)
    y = E.target.to(ranks.device)
    scores = {variant: recall(Cosines(W, f), y) for variant, f in R_o.items()}
    counts = {metric: len(W) if metric.startswith("IR") else n for metric in scores[variants[0]]}

    # --- save
    rows = score_rows(E, scores, counts)
    report(retrieval_columns(rows), rows, rows, variants)
    protocol = clip_protocol(clip, "against the model")
    result = {"task": args.task, "rows": rows, "sets": {E.name: about(E, bad)}, "protocol": protocol}
    evaluation.write_result(args, {**result, "clip": config}, [args.clip_weights, args.lora, args.captions])


def retrieval_with_blip2(args, options: argparse.ArgumentParser, variants: list[str]) -> None:
    """Table 6, lower half: by ITC alone, then with the K best of every ranking ranked again by ITM + ITC."""
    import blip2  # transformers

    refuse_unused(args, options, "clip_weights text_cache", "with --blip2, which has its weights and texts")
    if args.rerank < 1:
        raise ValueError(f"--rerank must be at least 1, got {args.rerank}")
    blip_config = blip2.read_config(args.blip2, retrieval=True)
    if args.lora:
        blip2.spare_block(args.lora, blip_config)

    # --- setup
    ranks = start(args, options)
    torch.set_float32_matmul_precision("highest")

    # --- data
    E = zeroshot.open_captions(args.captions, args.images, args.limit)
    ranks.say(*E.notes)

    # --- model
    blip = blip2.Blip2(args.blip2, ranks.dtype, ranks.device, retrieval=True)
    set_M, notes = blip.attach(args.lora)
    tokens, n = blip.caption_tokens(E.texts), len(E.images)
    mine = range(ranks.rank, len(tokens), ranks.world)
    W = torch.zeros(len(tokens), blip.config.image_text_hidden_size, device=ranks.device)  # (T, d)
    if mine:
        W[mine.start :: mine.step] = blip.text_features([tokens[t] for t in mine])
    dist.all_reduce(W)

    # --- loop
    R_o = {v: W.new_zeros(n, blip.config.num_query_tokens, W.shape[1]) for v in variants}  # Alg. 3, line 1
    features, bad = {variant: [] for variant in variants}, {}
    batches = evaluation.loader(Pictures(E.images, blip.transform), args, ranks, collate)
    for index, x, unread in tqdm(batches, E.name, disable=ranks.rank > 0):  # Alg. 3, line 2
        bad |= unread
        if x is None:
            continue
        for variant in variants:
            set_M(variant)
            f = blip.vision(x)  # Alg. 3, line 3: f* = M(x; dW*)
            R_o[variant][index.to(ranks.device)] = blip.image_features(f)  # Alg. 3, line 4
            features[variant].append(f)  # for the matching of this rank's images
    check_gallery(E, torch.zeros(n), gather(bad), least=n)
    y, scores = E.target.to(ranks.device), {}
    for variant in variants:  # Alg. 3, line 6: accumulate results, Metric(E_o(y), R_o)
        dist.all_reduce(R_o[variant])
        similarity = blip2.contrast(R_o[variant], W)  # (T, I)
        of_caption, of_image = blip2.candidates(similarity, args.rerank)
        matched = matches(blip, features[variant], tokens, of_caption | of_image, args.batch, ranks)
        scores[variant] = {f"ITC {metric}": score for metric, score in recall(similarity, y).items()}
        for way, chosen in (("TR", of_image), ("IR", of_caption)):
            again = recall(blip2.rerank(similarity, chosen, matched), y)
            scores[variant] |= {f"ITM {metric}": again[metric] for metric in again if metric.startswith(way)}
    if ranks.rank > 0:
        return
    counts = {metric: len(tokens) if " IR" in metric else n for metric in scores[variants[0]]}

    # --- save
    rows = score_rows(E, scores, counts)
    ranks.say(*notes)
    report(retrieval_columns(rows), rows, rows, variants)
    protocol = {"blip2": blip.version, "ITM re-ranks": args.rerank, "ties": "against the model"}
    result = {"task": args.task, "rows": rows, "protocol": protocol | {"notes": notes, "sets": E.notes}}
    evaluation.write_result(args, result, [args.captions, args.lora, *blip.files])


def matches(blip, features: list[Tensor], tokens: list, chosen: Tensor, batch: int, ranks: Ranks) -> Tensor:
    """(T, I) ITM logits where chosen, 0 elsewhere; features: of this rank's images, every world-th"""
    logits = torch.zeros(chosen.shape, device=chosen.device)
    if features:
        mine = slice(ranks.rank, None, ranks.world)
        pairs = chosen[:, mine].T.nonzero().flip(1)  # (pairs, 2), image by image
        of_pairs = blip.match_pairs(torch.cat(features), tokens, pairs, batch)
        logits[:, mine][pairs[:, 0], pairs[:, 1]] = of_pairs
    dist.all_reduce(logits)
    return logits


# --- save


def check_gallery(E: zeroshot.Benchmark, broken: Tensor, bad: dict[int, str], least: int) -> None:
    """Refuse features that are not finite, and fewer readable images than the benchmark needs."""
    wrong = broken.nonzero().flatten().tolist()
    if wrong:
        shown = ", ".join(str(E.images[i]) if isinstance(E.images, list) else str(i) for i in wrong[:3])
        raise FloatingPointError(f"{E.name}: features of {len(wrong)} images are not finite: {shown}")
    if len(E.images) - len(bad) < least:
        shown = "; ".join(list(bad.values())[:3])
        raise ValueError(f"{E.name}: {len(bad)} of {len(E.images)} images cannot be read: {shown}")


def score_rows(E: zeroshot.Benchmark, scores: dict[str, dict[str, Tensor]], counts: dict[str, int]) -> list:
    """A row of result.json for each metric; scores: {variant: {metric: of the items}}, counts: {metric: n}"""
    rows = []
    for metric, count in counts.items():
        of_variants = {variant: score[metric].cpu().numpy() for variant, score in scores.items()}
        rows.append(evaluation.result_row(E.name, metric, of_variants, count))
    return rows


def about(E: zeroshot.Benchmark, bad: dict[int, str]) -> dict:
    texts = hashlib.sha256(json.dumps(E.texts).encode()).hexdigest()
    used = {"images": len(E.images) - len(bad), "skipped": list(bad.values()), "notes": E.notes}
    return used | {"texts": len(E.texts), "texts sha256": texts, "templates": E.templates}


def clip_protocol(clip, ties: str) -> dict:
    return {
        "image": [str(step) for step in clip.steps],
        "texts": "mean over the templates of normalized features, normalized again (open_clip)",
        "ties": ties,
        "interval": "95%, paired bootstrap over images; p: McNemar's exact test",
    }


def retrieval_columns(rows: list[dict]) -> list[str]:
    return ["Table 6, %", *(f"{row['set']} {row['metric']}" for row in rows)]


def report(columns: list[str], shown: list[dict], rows: list[dict], variants: list[str]) -> None:
    """The paper's table, then every metric with its difference and interval."""
    lines = [[variant, *(row[variant] for row in shown)] for variant in variants]
    print(evaluation.table(columns, lines), "", evaluation.rows_table(rows), sep="\n", flush=True)


if __name__ == "__main__":
    launch(main)
