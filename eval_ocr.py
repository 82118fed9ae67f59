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
import re
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import backbone as vit
import common
import evaluation
import feature_cache
import heads
from backbone import Features
from data import coco, words
from heads.matching import mean_over_ranks

SIZES = {  # the lists in clovaai's collection; PARSeq's has the same names, relabelled, and no IC03
    "IIIT5k_3000": 3000, "SVT": 647, "IC03_860": 860, "IC03_867": 867, "IC13_857": 857, "IC13_1015": 1015,
    "IC15_1811": 1811, "IC15_2077": 2077, "SVTP": 645, "CUTE80": 288,
}  # fmt: skip
COMBINED = {  # Sec. 4.1: "a combined set"; which lists of IC03, IC13 and IC15 it does not say
    "six sets, large lists": ["IIIT5k_3000", "SVT", "IC03_867", "IC13_1015", "IC15_2077", "SVTP"],
    "six sets, small lists": ["IIIT5k_3000", "SVT", "IC03_860", "IC13_857", "IC15_1811", "SVTP"],
    "nine lists": [name for name in SIZES if name != "CUTE80"],
}
IGNORE = -100  # of cross_entropy: what comes after a word's end


class OcrHead(nn.Module):
    """T_o: a 4-layer transformer over the patch tokens, read character by character (Sec. 4.3, after ViTSTR).

    dim: width of the features; tokens: how many, [CLS] included
    reading: `tokens` takes the characters from the first patch tokens in order, as ViTSTR (arXiv 2105.08582);
        `queries` from learned queries that attend to all tokens
    """

    def __init__(self, dim: int, tokens: int, charset: str, reading="tokens", width=512, depth=4):
        super().__init__()
        self.config = dict(dim=dim, tokens=tokens, charset=charset, reading=reading, width=width, depth=depth)
        self.charset, self.length = charset, words.LONGEST + 1  # the characters and the end
        if reading == "tokens" and tokens < self.length + 1:
            raise ValueError(
                f"{tokens} tokens are too few to read {self.length} from: larger --size, or --reading queries"
            )
        self.project = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        # As large as the projected tokens: at ViT's 0.02 the head learns late where it is reading
        self.position = nn.Parameter(0.5 * torch.randn(1, tokens, width))
        self.queries = (
            nn.Parameter(0.5 * torch.randn(1, self.length, width)) if reading == "queries" else None
        )
        layer = nn.TransformerEncoderLayer if self.queries is None else nn.TransformerDecoderLayer
        shape = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)  # as DeiT, ViTSTR
        self.layers = nn.ModuleList(layer(width, 8, 4 * width, **shape) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, 1 + len(charset))  # 0 is the end, 1 the first character

    def forward(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(f, y)

    def logits(self, f) -> Tensor:
        """Features -> (B, 26, 1 + characters)."""
        x = self.project(tokens_of(f)) + self.position  # (B, N, width)
        if self.queries is not None:
            q = self.queries.expand(len(x), -1, -1)  # (B, 26, width)
            for layer in self.layers:
                q = layer(q, x)
            return self.classify(self.norm(q))
        for layer in self.layers:
            x = layer(x)
        first = 0 if f.cls is None else 1  # ViTSTR reads from [CLS] on, and ignores what that says
        return self.classify(self.norm(x[:, first : first + self.length]))

    def loss(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, averaged over all characters and ends of the batch on all ranks; y: B labels."""
        logits, targets = self.logits(f), self.encode([t["label"] for t in y]).to(f.grid.device)
        characters = mean_over_ranks([sum(len(self.spell(t["label"])) + 1 for t in y)], logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        right = (logits.argmax(-1) == targets) | (targets == IGNORE)
        return loss / characters[0], {"right": right.all(1).float().mean()}

    @torch.no_grad()
    def predict(self, f, y: list[dict]) -> list[dict]:
        """The most likely character at each place up to the first end; all of them if there is no end."""
        best = self.logits(f).argmax(-1).tolist()  # (B, 26)
        return [{"image_id": t["image_id"], "text": self.decode(row)} for t, row in zip(y, best, strict=True)]

    def spell(self, label: str) -> str:
        return words.spelled(label, self.charset)

    def encode(self, labels: list[str]) -> Tensor:
        """(B, 26): the characters, the end, then IGNORE."""
        rows = [[1 + self.charset.index(c) for c in self.spell(label)] + [0] for label in labels]
        return torch.tensor([row + [IGNORE] * (self.length - len(row)) for row in rows])

    def decode(self, row: list[int]) -> str:
        end = row.index(0) if 0 in row else len(row)
        return "".join(self.charset[k - 1] for k in row[:end])


def tokens_of(f: Features) -> Tensor:
    """(B, N, dim): [CLS], if there is one, and the patch tokens."""
    x = f.grid.flatten(2).transpose(1, 2)
    return x if f.cls is None else torch.cat([f.cls[:, None], x], 1)


def check_options(args: argparse.Namespace) -> list[str]:
    """Refuse what cannot work before anything is loaded; returns the variants to score, in order."""
    variants = evaluation.check_options(args)
    for name, least in dict(iters=1, warmup=0, save_every=1, log_every=1).items():
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
            )
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise ValueError(f"--lr must be positive, got {args.lr}")
    if args.width < 8 or args.width % 8:
        raise ValueError(f"--width must be a multiple of 8, the attention heads, got {args.width}")
    if bool(args.train) == bool(args.head):
        raise ValueError("give --train DIR ... to train a head, or --head FILE to score one")
    if args.cache and args.skip_bad_images:
        raise ValueError("--cache has M see every training word: it cannot go with --skip-bad-images")
    if args.head and args.size is None:
        args.size = heads.read_header(args.head[0]).get("size")
    args.size = tuple(args.size or [224])
    args.size *= 2 if len(args.size) == 1 else 1
    if len(args.size) != 2 or min(args.size) < 1:
        raise ValueError(f"--size takes a side, or height and width, got {args.size}")
    if args.head:
        check_heads(args, variants)
    for path in (Path(args.out) / variant / "last.pt" for variant in variants):
        if path.exists() and not (args.resume or args.head):
            raise ValueError(f"{path.parent} holds a run: pass --resume to go on with it, or another --out")
    return variants


def check_heads(args: argparse.Namespace, variants: list[str]) -> None:
    """Raises ValueError if the heads know other features than those that they are to score."""
    if len(args.head) != len(variants):
        raise ValueError(f"--head: {len(args.head)} files to score {' and '.join(variants)}: one for each")
    for path, variant in zip(args.head, variants, strict=True):
        header = heads.read_header(path)
        if header["task"] != "ocr":
            raise ValueError(f"{path} is a head for {header['task']}, not one of eval_ocr.py")
        expected = {**common.features_of(args), "size": list(args.size), "lora": lora_hash(args, variant)}
        wrong = [f"{k} {header[k]}, not {now}" for k, now in expected.items() if header[k] != now]
        if wrong:
            raise ValueError(f"{path}, to score {variant}, was trained with {'; '.join(wrong)}")


def lora_hash(args: argparse.Namespace, variant: str) -> str | None:
    return evaluation.sha256(args.lora) if variant == "after" else None


# --- T_o


def train(args, variant: str, backbone, stream: words.WordStream, ranks: common.Ranks) -> OcrHead:
    """T_o on frozen features, as in stage 1; for each variant from the same start, words and order."""
    out = Path(args.out) / variant
    torch.manual_seed(args.seed)
    head = new_head(args, backbone).to(ranks.device).train()
    trained = dict(head.named_parameters())
    T_o = common.parallel(head, ranks.device)
    optimizer = common.sharded_adamw([{"params": list(trained.values())}])
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=ranks.dtype == torch.float16)

    header = {"size": args.size, "lora": lora_hash(args, variant), **common.features_of(args)}
    data = {"words": stream.fingerprint, "lora": header["lora"]}
    run = common.Checkpoint(out, args, trained, optimizer, scaler, data)
    first = run.load() if args.resume else 0
    log = common.Log(out, first, args.iters, args.log_every)
    batches = frozen_features(args, variant, backbone, stream, ranks, first)
    for step in range(first, args.iters):
        lr = common.learning_rate(step, args.lr, args.warmup, args.iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        f, y = next(batches)
        loss, parts = T_o(f, y)
        parts["grad_norm"] = common.minimize(loss, optimizer, scaler)
        save = (step + 1) % args.save_every == 0 or step + 1 == args.iters
        log.add(step + 1, "ocr", y, loss, parts, lr, save)
        if save:
            run.save(step + 1)
            if ranks.rank == 0:
                heads.save(head, out / "ocr.safetensors", "ocr", step=step + 1, **header)
    return head


def frozen_features(
    args, variant: str, backbone, stream: words.WordStream, ranks: common.Ranks, first: int
) -> Iterator[tuple[Features, list[dict]]]:
    """f = M(x) and y of this rank's batches from step `first` on; with --cache M sees every word but once."""
    if not args.cache:
        for batch in coco.batches(stream, args.batch, backbone, ranks, first, args.workers):
            images, valid, y = common.to_device(batch, ranks.device)
            with torch.no_grad(), ranks.autocast():
                f = backbone(images, valid)
            yield f, y  # without end
    rows, cols = (side // backbone.patch for side in args.size)
    shape = (backbone.has_cls + rows * cols, backbone.dim)
    usable = words.UsableWords(stream)
    kept = feature_cache.features(args, usable, backbone, ranks, variant, tokens_of, shape)  # (n, N, dim)
    for step in count(first):
        at = (step * ranks.world + ranks.rank) * args.batch  # as coco.batches
        drawn = [stream.index(position) for position in range(at, at + args.batch)]
        x = torch.from_numpy(kept[drawn]).to(ranks.device)
        grid = x[:, backbone.has_cls :].transpose(1, 2).unflatten(2, (rows, cols))
        f = Features(x[:, 0] if backbone.has_cls else None, grid, None)
        yield f, [{"image_id": i, "label": usable.labels[i]} for i in drawn]


def new_head(args, backbone) -> OcrHead:
    """Raises ValueError if --size is not a whole number of patches."""
    if any(side % backbone.patch for side in args.size):
        raise ValueError(f"--size {args.size}: the sides must be multiples of the patch, {backbone.patch}")
    tokens = backbone.has_cls + math.prod(side // backbone.patch for side in args.size)
    return OcrHead(backbone.dim, tokens, words.CHARSETS[args.charset], args.reading, args.width)


def load_head(path: str, backbone) -> OcrHead:
    """Raises ValueError if it was made for features of another width."""
    head = OcrHead(**heads.read_header(path)["config"])
    if head.config["dim"] != backbone.dim:
        raise ValueError(f"{path} was made for a backbone of width {head.config['dim']}, not {backbone.dim}")
    head.load_state_dict(load_file(path))
    return head


# --- E_o


@torch.no_grad()
def score(args, T_o: OcrHead, backbone, test: words.Words, ranks: common.Ranks) -> dict[str, tuple]:
    """{image_id: (label, what was read)} of all words, on every rank."""
    collate = partial(coco.collate, patch=backbone.patch, mean=backbone.mean, std=backbone.std)
    R_o = {}  # Alg. 3, line 1: initialize results list R_o
    loader = tqdm(evaluation.loader(test, args, ranks, collate), "reading", disable=ranks.rank > 0)
    for batch in loader:  # Alg. 3, line 2: for x in E_o(x)
        if isinstance(batch, Exception):
            raise batch
        images, valid, y = common.to_device(batch, ranks.device)
        with ranks.autocast():
            f = backbone(images, valid)  # Alg. 3, line 3: extract feature f* = M(x; dW*) for input x
        answers = T_o.predict(f, y)  # Alg. 3, line 4: predicting R_o = [R_o, T_o(f*)]
        R_o |= {t["image_id"]: (t["label"], a["text"]) for t, a in zip(y, answers, strict=True)}
    return evaluation.gather(R_o)


def grade(label: str, text: str) -> tuple[float, float]:
    """Whether a word is right, and its similarity, 1 - edit distance / length of the longer; both 0..1.

    Case and whatever is not a digit or a letter a-z do not count (Table 3 as clovaai and ViTSTR score).
    """
    a, b = alphanumeric(label), alphanumeric(text)
    longer = max(len(a), len(b))
    return float(a == b), 1 - edit_distance(a, b) / longer if longer else 1.0


def alphanumeric(text: str) -> str:
    return re.sub("[^0-9a-z]", "", text.lower())


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


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
            name = image_id.rpartition("/")[0]
            scores.setdefault(name, {}).setdefault(variant, []).append(grade(*answer))

    def rows(title: str, names: list[str]) -> list[dict]:
        both = {v: np.concatenate([scores[name][v] for name in names]) for v in read}
        metrics = enumerate(("accuracy", "edit similarity"))
        return [evaluation.row(title, m, {v: s[:, k] for v, s in both.items()}) for k, m in metrics]

    known, result, notes = published(sets), [], []
    for title, lists in COMBINED.items() if known else ():
        if found := [name for name in lists if name in known]:
            missing = [name for name in lists if name not in known]
            title += f" (without {', '.join(missing)})" if missing else ""
            result += rows(title, [known[name] for name in found])
    result += rows("all sets found", list(scores))
    for name in scores:
        result += rows(name, [name])
    for name in next(iter(COMBINED.values())) if known else ():
        if name not in known:
            result += [evaluation.row(name, m, {}) for m in ("accuracy", "edit similarity")]
            notes.append(f"{name}: not found")
    for name, at in known.items():
        if len(sets[at]) != SIZES[name]:
            notes.append(f"{at}: {len(sets[at])} words; the published list has {SIZES[name]}")
    return result, notes


def summary(args, read: dict, sets: dict, steps: dict, backbone, world: int, stream) -> dict:
    """Table 3, what is beside it, and all of it as a result; printed once."""
    rows, notes = table_rows(sets, read)
    first = next(iter(read.values()))
    empty = [image_id for image_id, (label, _) in first.items() if not alphanumeric(label)]
    if stream is not None:
        notes.append(f"each head was trained on {args.iters * args.batch * world} words")
    if empty:
        right = {v: sum(grade(*answers[i])[0] == 1 for i in empty) for v, answers in read.items()}
        told = ", ".join(f"{n} {variant}" for variant, n in right.items())
        notes.append(
            f"{len(empty)} labels without a digit or letter count as right where none is read: {told}"
        )
    result = {
        "table": "Table 3: words read right / words, %; case-insensitive, digits and letters only",
        "combined": rows[0]["set"],
        "rows": rows,
        "notes": notes,
        "head_steps": steps,
        "training_words": None if stream is None else args.iters * args.batch * world,
        "training_sets": None if stream is None else stream.notes,
        "protocol": {
            "picture": f"RGB, squashed to {args.size} by bicubic interpolation, the backbone's normalization",
            "training labels": "no white space; dropped: empty, over 25 characters, outside the charset",
            "test labels": "none dropped",
            "combined": "average over words, not over sets",
        },
    }
    if dist.get_rank() == 0:
        columns = ["Model", "Params", "Iters", f"Accuracy: {rows[0]['set']}"]
        lines = [[*evaluation.model_columns(args, v, backbone.vit), rows[0][v]] for v in read]
        print(evaluation.table(columns, lines), evaluation.rows_table(rows), *notes, sep="\n")
    return result


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--train", nargs="+", default=[], metavar="DIR", help="word sets, mixed in equal shares per DIR")
    add("--test", nargs="+", required=True, metavar="DIR", help="folders with word sets (LMDB or gt.txt)")
    add("--head", "--eval-only", nargs="+", metavar="FILE", help="score only: a head per variant; no --train")
    add("--size", nargs="+", type=int, metavar="PX", help="side, or height and width (default: ViTSTR's 224)")
    add("--charset", type=int, choices=words.CHARSETS, default=94, help="94 as ViTSTR, or 36 without case")
    add("--reading", choices=["tokens", "queries"], default="tokens", help="ViTSTR's, or a query decoder")
    add("--width", type=int, default=512, help="of the head (not in the paper; a multiple of 8)")
    add("--iters", type=int, default=100_000, help="steps (not in the paper; ViTSTR: 300k)")
    add("--lr", type=float, default=5e-4, help="peak learning rate of the head (not in the paper)")
    add("--warmup", type=int, default=2000, help="steps of linear warm-up (0 = off)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=int, default=5000, help="steps between checkpoints")
    add("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    kept = "compute M once for every training word, and keep it here: words x tokens x width x 4 bytes"
    add("--cache", metavar="DIR", help=kept)
    add("--skip-bad-images", action="store_true", help="in training, count undecodable images and go on")
    evaluation.add_options(p, out="out/ocr", batch=192)  # ViTSTR: 192 over all processes
    evaluation.add_backbone_options(p)
    args = p.parse_args()
    variants = check_options(args)

    # --- setup
    ranks = common.start(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # --- data
    test_sets = words.find(args.test)
    test = words.Words(test_sets, args.size, args.limit)
    stream = None
    if not args.head:
        parts = {folder: words.find([folder]) for folder in args.train}
        stream = words.WordStream(
            parts, words.CHARSETS[args.charset], args.size, args.seed, args.skip_bad_images
        )
        if ranks.rank == 0:
            print(*stream.notes, sep="\n", flush=True)

    # --- model
    backbone = vit.load(args.model, args.weights, ranks.dtype, ranks.device, args.seed, not args.no_cls)
    if args.imagenet_norm:
        backbone.mean, backbone.std = vit.IMAGENET_NORM
    become = evaluation.attach(backbone.vit, args)

    # --- loop
    read, steps = {}, {}
    for k, variant in enumerate(variants):
        become(variant)  # M(x), or M(x; dW*)
        if args.head:
            T_o, steps[variant] = load_head(args.head[k], backbone), heads.read_header(args.head[k])["step"]
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
        evaluation.write(out / "words.jsonl", "".join(lines))
    evaluation.write_result(args, result, [args.weights, args.lora, *(args.head or [])])


if __name__ == "__main__":
    common.launch(main)
