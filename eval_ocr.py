"""Algorithm 3 with T_o = scene text recognition (Table 3): a 4-layer transformer head on the frozen ViT.

The paper's comparison (8 GPUs, eva_g), and one on a laptop:

    torchrun --nproc_per_node 8 eval_ocr.py --train lmdb/training/MJ lmdb/training/ST \\
        --test lmdb/evaluation --batch 24 --compare out/visft/lora_005000.safetensors
    python eval_ocr.py --model eva_mini --weights random --train DIR --test DIR --size 56 112 --width 192 \\
        --iters 500 --batch 64

Trains a head on the folders of --train in equal shares (MJSynth and SynthText: half and half), then reads
every word of every set found in --test. Writes OUT/result.json, OUT/words.jsonl (what was read) and, for each
of `before` and `after` (without and with dW*), OUT/VARIANT/ocr.safetensors, last.pt and log.jsonl.
"""

import argparse
import json
import math
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import evaluation
import feature_cache
import files
import training
from backbone import Features, add_backbone_options, backbone_settings, check_backbone_options, open_backbone
from data import words
from data.stream import batches, collate
from heads.ocr import OcrHead, tokens_of
from ranks import Ranks, check_finite, gather, launch, refuse_unused, start, to_device
from scores.words import alphanumeric, grade

SIZES = {  # the lists in clovaai's collection; PARSeq's has the same names, relabelled, and no IC03
    "IIIT5k_3000": 3000, "SVT": 647, "IC03_860": 860, "IC03_867": 867, "IC13_857": 857, "IC13_1015": 1015,
    "IC15_1811": 1811, "IC15_2077": 2077, "SVTP": 645, "CUTE80": 288,
}  # fmt: skip
COMBINED = {  # Sec. 4.1: "a combined set"; which lists of IC03, IC13 and IC15 it does not say
    "six sets, large lists": ["IIIT5k_3000", "SVT", "IC03_867", "IC13_1015", "IC15_2077", "SVTP"],
    "six sets, small lists": ["IIIT5k_3000", "SVT", "IC03_860", "IC13_857", "IC15_1811", "SVTP"],
    "nine lists": [name for name in SIZES if name != "CUTE80"],
}

# Options that may differ between a run and its resumption
MAY_CHANGE = {"out", "resume", "workers", "log_every", "save_every"}
MAY_CHANGE |= {"skip_bad_images", "train", "test", "limit"}


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--train", nargs="+", default=[], metavar="DIR", help="word sets, mixed in equal shares per DIR")
    add("--test", nargs="+", required=True, metavar="DIR", help="folders with word sets (LMDB or gt.txt)")
    add("--head", nargs="+", metavar="FILE", help="score only: a head per variant; no --train")
    add("--size", nargs="+", type=int, metavar="PX", help="side, or height and width (default: ViTSTR's 224)")
    add("--charset", type=int, choices=words.CHARSETS, default=94, help="94 as ViTSTR, or 36 without case")
    add("--width", type=int, default=512, help="of the head (not in the paper; a multiple of 8)")
    add("--iters", type=int, default=100_000, help="steps (not in the paper; ViTSTR: 300k)")
    add("--lr", type=float, default=5e-4, help="peak learning rate of the head (not in the paper)")
    cache = "compute M once for every training word, and keep it here: words x tokens x width x 4 bytes"
    add("--cache", metavar="DIR", help=cache)
    add("--skip-bad-images", action="store_true", help="in training, count undecodable images and go on")
    training.add_run_options(p)  # --warmup, --resume, --save-every, --log-every
    evaluation.add_options(p, out="out/ocr", batch=192)  # ViTSTR: 192 over all processes
    add_backbone_options(p)  # --model, --weights, --no-cls, --imagenet-norm
    args = p.parse_args()
    variants = check_options(args, p)

    # --- setup
    ranks = start(args, p)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # --- data
    test_sets = words.find(args.test)
    test = words.Words(test_sets, args.size, args.limit)
    stream = None
    if not args.head:
        parts, charset = {folder: words.find([folder]) for folder in args.train}, words.CHARSETS[args.charset]
        stream = words.WordStream(parts, charset, args.size, args.seed, args.skip_bad_images)
        ranks.say(*stream.notes)

    # --- model
    backbone = open_backbone(args, ranks)
    set_M = evaluation.attach(backbone.vit, args)

    # --- loop
    read, steps = {}, {}
    for variant in variants:
        set_M(variant)  # M(x), or M(x; dW*)
        if args.head:
            head_file = args.head[variants.index(variant)]
            T_o, steps[variant] = load_head(head_file, backbone)
        else:
            T_o, steps[variant] = train(args, variant, backbone, stream, ranks), args.iters
        read[variant] = score(args, T_o.to(ranks.device).eval(), backbone, test, ranks)

    # --- save
    # Alg. 3, line 6: accumulate results: Metric(E_o(y), R_o) on E_o
    result = summary(args, read, test_sets, steps, backbone, ranks.world, stream)
    if ranks.rank == 0:
        lines = []
        for image_id, (label, _) in read[variants[0]].items():
            texts = {variant: answers[image_id][1] for variant, answers in read.items()}
            lines.append(json.dumps({"image_id": image_id, "label": label, **texts}) + "\n")
        files.write(out / "words.jsonl", "".join(lines))
    evaluation.write_result(args, result, [args.weights, args.lora, *(args.head or [])])


def check_options(args: argparse.Namespace, p: argparse.ArgumentParser) -> list[str]:
    """Refuse what cannot work before anything is loaded; returns the variants to score, in order."""
    variants = evaluation.check_options(args)
    training.check_run_options(args)
    check_backbone_options(args)
    if args.width < 8 or args.width % 8:
        raise ValueError(f"--width must be a multiple of 8, the attention heads, got {args.width}")
    if bool(args.train) == bool(args.head):
        raise ValueError("give --train DIR ... to train a head, or --head FILE to score one")
    if args.cache and args.skip_bad_images:
        raise ValueError("--cache has M see every training word: it cannot go with --skip-bad-images")
    if args.head and args.size is None:
        args.size = files.read_header(args.head[0], "head").get("size")
    args.size = tuple(args.size or [224])
    if len(args.size) == 1:
        args.size *= 2
    if len(args.size) != 2 or min(args.size) < 1:
        raise ValueError(f"--size takes a side, or height and width, got {args.size}")
    if args.head:
        check_heads(args, variants)
        names = "cache charset width iters lr warmup resume save_every log_every skip_bad_images"
        refuse_unused(args, p, names, "with --head: nothing is trained")
    for variant in variants if not args.head else ():
        training.check_new(args, Path(args.out) / variant)
    return variants


def check_heads(args: argparse.Namespace, variants: list[str]) -> None:
    """Raises ValueError if the heads know other features than those that they are to score."""
    if len(args.head) != len(variants):
        raise ValueError(f"--head: {len(args.head)} files to score {' and '.join(variants)}: one for each")
    for path, variant in zip(args.head, variants, strict=True):
        header = files.read_header(path, "head")
        if header["task"] != "ocr":
            raise ValueError(f"{path} is a head for {header['task']}, not one of eval_ocr.py")
        expected = {**backbone_settings(args), "size": list(args.size), "lora": lora_hash(args, variant)}
        wrong = [f"{k} {header.get(k)}, not {now}" for k, now in expected.items() if header.get(k) != now]
        if wrong:
            raise ValueError(f"{path}, to score {variant}, was trained with {'; '.join(wrong)}")


def lora_hash(args: argparse.Namespace, variant: str) -> str | None:
    return files.sha256(args.lora) if variant == "after" else None


# --- T_o


def train(args, variant: str, backbone, stream: words.WordStream, ranks: Ranks) -> OcrHead:
    """T_o on frozen features, as in stage 1; for each variant from the same start, words and order."""
    out = Path(args.out) / variant
    torch.manual_seed(args.seed)
    head = new_head(args, backbone).to(ranks.device).train()
    trained = dict(head.named_parameters())
    T_o = training.parallel(head, ranks.device)
    optimizer = training.sharded_adamw([{"params": list(trained.values())}])
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=ranks.dtype == torch.float16)

    header = {"size": args.size, "lora": lora_hash(args, variant), **backbone_settings(args)}
    made_of = {"words": stream.fingerprint, "dW": header["lora"], "M": files.fingerprint(args.weights)}
    run = training.Checkpoint(out, args, trained, optimizer, scaler, made_of, MAY_CHANGE)
    first = run.load() if args.resume else 0
    log = training.Log(out, first, args.iters, args.log_every)
    if args.cache:
        features = cached_features(args, variant, backbone, stream, ranks, first)
    else:
        features = frozen_features(args, backbone, stream, ranks, first)
    for step in range(first, args.iters):
        lr = training.learning_rate(step, args.lr, args.warmup, args.iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        f, y = log.next(features)
        loss, parts = T_o(f, y)
        parts["grad_norm"] = training.minimize(loss, optimizer, scaler)
        save = (step + 1) % args.save_every == 0 or step + 1 == args.iters
        log.add(step + 1, "ocr", y, loss, parts, lr, save)
        if save:
            if ranks.rank == 0:
                known = {"task": "ocr", "config": head.config, "step": step + 1, **header}
                files.save(head.state_dict(), out / "ocr.safetensors", head=known)
            run.save(step + 1)  # last: what is resumed from it is complete
    return head


def frozen_features(args, backbone, stream: words.WordStream, ranks: Ranks, first: int) -> Iterator:
    """f = M(x) and y of this rank's batches, from step `first` on, without end."""
    for batch in batches(stream, args.batch, backbone, ranks, first, args.workers):
        images, valid, y = to_device(batch, ranks.device)
        with torch.no_grad(), ranks.autocast():
            f = backbone(images, valid)
        yield f, y


def cached_features(args, variant: str, backbone, stream, ranks: Ranks, first: int) -> Iterator:
    """The same with M having seen every word but once, before."""
    rows, cols = (side // backbone.patch for side in args.size)
    shape = (backbone.has_cls + rows * cols, backbone.dim)
    usable = words.UsableWords(stream)
    tokens = feature_cache.features(args, usable, backbone, ranks, variant, tokens_of, shape)  # (n, N, dim)
    for step in count(first):
        at = (step * ranks.world + ranks.rank) * args.batch  # as data.stream.batches
        drawn = [stream.index(position) for position in range(at, at + args.batch)]
        x = torch.from_numpy(tokens[drawn]).to(ranks.device)
        grid = x[:, backbone.has_cls :].transpose(1, 2).unflatten(2, (rows, cols))
        cls = x[:, 0] if backbone.has_cls else None
        yield Features(cls, grid, None), [{"image_id": i, "label": usable.labels[i]} for i in drawn]


def new_head(args, backbone) -> OcrHead:
    """Raises ValueError if --size is not a whole number of patches."""
    if any(side % backbone.patch for side in args.size):
        raise ValueError(f"--size {args.size}: the sides must be multiples of the patch, {backbone.patch}")
    tokens = backbone.has_cls + math.prod(side // backbone.patch for side in args.size)
    return OcrHead(backbone.dim, tokens, words.CHARSETS[args.charset], words.LONGEST, args.width)


def load_head(path: str, backbone) -> tuple[OcrHead, int]:
    """T_o and its steps of training. Raises ValueError if it was made for features of another width."""
    header = files.read_header(path, "head")
    config = header["config"]
    if config.pop("reading", "tokens") != "tokens":  # a choice that heads once had
        raise ValueError(f"{path} reads by queries, which is gone: train it again")
    fields = files.Items(path, [config], "config")
    fields.column("charset", str)
    for key in ("tokens", "longest", "width", "depth"):
        fields.column(key, int)
    return files.read_head(path, OcrHead, config, backbone.dim), header.get("step")


# --- E_o


@torch.no_grad()
def score(args, T_o: OcrHead, backbone, test: words.Words, ranks: Ranks) -> dict[str, tuple]:
    """{image_id: (label, what was read)} of all words, on every rank."""
    to_batch = partial(collate, patch=backbone.patch, mean=backbone.mean, std=backbone.std)
    R_o = {}  # Alg. 3, line 1: initialize results list R_o
    loader = tqdm(evaluation.loader(test, args, ranks, to_batch), "reading", disable=ranks.rank > 0)
    for batch in loader:  # Alg. 3, line 2: for x in E_o(x)
        images, valid, y = to_device(batch, ranks.device)
        with ranks.autocast():
            f = backbone(images, valid)  # Alg. 3, line 3: extract feature f* = M(x; dW*) for input x
        check_finite(f.grid, y, ranks)
        answers = T_o.predict(f, y)  # Alg. 3, line 4: predicting R_o = [R_o, T_o(f*)]
        R_o |= {t["image_id"]: (t["label"], a["text"]) for t, a in zip(y, answers, strict=True)}
    return gather(R_o)


def published(sets: dict) -> dict[str, str]:
    """{the list's name in SIZES: the set's name here}. Raises ValueError if two sets are the same list."""
    known = {}
    for name in sets:
        last = name.rpartition("/")[2]
        last = "IIIT5k_3000" if last == "IIIT5k" else last  # PARSeq's name
        if last in SIZES and known.setdefault(last, name) != name:
            raise ValueError(f"--test: {known[last]} and {name} are both {last}: give one of them")
    return known


def table_rows(sets: dict, read: dict[str, dict]) -> tuple[list[dict], list[str]]:
    """Rows of result.json, the combined ones first, and what is to be said about them."""
    scores = {}  # set -> variant -> (n, 2): right, similarity
    for variant, answers in read.items():
        for image_id, answer in answers.items():
            of_set = scores.setdefault(image_id.rpartition("/")[0], {})
            of_set.setdefault(variant, []).append(grade(*answer))

    def rows_of(title: str, names: list[str]) -> list[dict]:
        joined = {v: np.concatenate([scores[name][v] for name in names]) for v in read} if names else {}
        metrics = enumerate(("accuracy", "edit similarity"))
        return [evaluation.result_row(title, m, {v: s[:, k] for v, s in joined.items()}) for k, m in metrics]

    known, rows, notes = published(sets), [], []
    absent = {title: [name for name in lists if name not in known] for title, lists in COMBINED.items()}
    for title, lists in COMBINED.items():
        if present := [known[name] for name in lists if name in known]:
            without = f" (without {', '.join(absent[title])})" if absent[title] else ""
            rows += rows_of(title + without, present)
    rows += rows_of("all sets found", list(scores))
    for name in scores:
        rows += rows_of(name, [name])
    if known:
        for name in absent["six sets, large lists"]:
            rows += rows_of(name, [])
            notes.append(f"{name}: not found")
    for name, here in known.items():
        if len(sets[here]) != SIZES[name]:
            notes.append(f"{here}: {len(sets[here])} words; the published list has {SIZES[name]}")
    return rows, notes


def summary(args, read: dict, sets: dict, steps: dict, backbone, world: int, stream) -> dict:
    """Table 3, what is beside it, and all of it as a result; printed once."""
    rows, notes = table_rows(sets, read)
    trained_on = None if stream is None else args.iters * args.batch * world
    if stream is not None:
        notes.append(f"each head was trained on {trained_on} words")
    labels = {image_id: label for image_id, (label, _) in next(iter(read.values())).items()}
    if bare := [image_id for image_id, label in labels.items() if not alphanumeric(label)]:
        right = {variant: sum(grade(*answers[i])[0] == 1 for i in bare) for variant, answers in read.items()}
        counts = ", ".join(f"{n} {variant}" for variant, n in right.items())
        what = "labels without a digit or letter count as right where none is read"
        notes.append(f"{len(bare)} {what}: {counts}")
    if dist.get_rank() == 0:
        columns = ["Model", "Params", "Iters", f"Accuracy: {rows[0]['set']}"]
        lines = [[*evaluation.model_columns(args, v, backbone.vit), rows[0][v]] for v in read]
        print(evaluation.table(columns, lines), evaluation.rows_table(rows), *notes, sep="\n")
    return {
        "table": "Table 3: words read right / words, %; case-insensitive, digits and letters only",
        "combined": rows[0]["set"],
        "rows": rows,
        "notes": notes,
        "head_steps": steps,
        "training_words": trained_on,
        "training_sets": None if stream is None else stream.notes,
        "protocol": {
            "picture": f"RGB, squashed to {args.size} by bicubic interpolation, the backbone's normalization",
            "training labels": "no white space; dropped: empty, over 25 characters, outside the charset",
            "test labels": "none dropped",
            "combined": "average over words, not over sets",
        },
    }


if __name__ == "__main__":
    launch(main)
