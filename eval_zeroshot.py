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
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor
from tqdm import tqdm

import backbone as vit  # registers eva_mini with timm
import blip2
import common
import evaluation
import lora
from data import zeroshot

TOP = 5  # of the classes, for acc5
RECALL_AT = (1, 5, 10)  # Table 6 has 5


# --- the model


class Clip:
    """A frozen open_clip model. Features are L2-normalized float32.

    tower: its vision tower M, where LoRA goes; dim: the width D of the common space; transform: PIL image ->
    (3, h, w) uint8, open_clip's own but for the last two steps, which `pixels` does on the device
    """

    def __init__(self, name: str, weights: str, ranks: common.Ranks, seed: int):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                source = None if weights == "random" else weights
                model, _, transform = open_clip.create_model_and_transforms(name, source)
            self.tokenize = open_clip.get_tokenizer(name)
        except Exception as error:  # whatever open_clip meets: no network, a file that does not fit
            raise ValueError(f"--clip {name} --clip-weights {weights}: {str(error)[:300]}") from error
        self.steps = transform.transforms
        *steps, to_tensor, normalize = self.steps
        assert isinstance(to_tensor, ToTensor) and isinstance(normalize, Normalize), transform
        self.transform, self.ranks = Compose([*steps, PILToTensor()]), ranks
        self.mean, self.std = (
            torch.tensor(v, device=ranks.device)[:, None, None] for v in (normalize.mean, normalize.std)
        )
        self.model = model.to(ranks.device, ranks.dtype).requires_grad_(False).eval()
        self.tower = getattr(model.visual, "trunk", model.visual)
        self.dim: int = open_clip.get_model_config(name)["embed_dim"]

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 -> normalized floats on the device."""
        images = images.to(self.ranks.device, non_blocking=True)
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, D)"""
        with self.ranks.autocast():
            f = self.model.encode_image(pixels)
        return F.normalize(f.float(), dim=-1)

    def text_features(self, texts: list[str], templates: list[str], batch: int) -> Tensor:
        """(T, D): of each text the mean over the templates, of normalized features, normalized again.

        Raises FloatingPointError naming texts whose features are not finite.
        """
        W = torch.zeros(len(texts), self.dim, device=self.ranks.device)
        mine = range(self.ranks.rank, len(texts), self.ranks.world)
        if mine:
            at_once = max(1, batch // len(templates))
            share = [texts[i] for i in mine]
            with self.ranks.autocast():
                columns = open_clip.build_zero_shot_classifier(
                    self.model, self.tokenize, share, templates, at_once, self.ranks.device
                )  # (D, mine)
            W[mine.start :: mine.step] = columns.T.float()
        dist.all_reduce(W)
        broken = (~W.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise FloatingPointError(
                f"{len(broken)} texts have features that are not finite: {texts[broken[0]]}"
            )
        return W


def check_clip(args: argparse.Namespace) -> dict:
    """Refuse a model, weights or LoRA that do not go together, before anything is loaded.

    Leaves open_clip's name in args.clip and the weights in args.clip_weights; returns open_clip's config.
    """
    if args.clip.endswith(".json"):
        path = Path(args.clip)
        if not path.is_file():
            raise FileNotFoundError(f"--clip {path}: no such file")
        try:
            open_clip.add_model_config(path)
        except ValueError as error:
            raise ValueError(f"--clip {path} is not JSON: {error}") from error
        args.clip = path.stem
        if path.stem not in open_clip.list_models():
            raise ValueError(f"{path}: not an open_clip config (embed_dim, vision_cfg, text_cfg)")
    if args.clip not in open_clip.list_models():
        raise ValueError(f"--clip {args.clip}: neither a model that open_clip has nor a .json config of one")
    config = open_clip.get_model_config(args.clip)
    tags = open_clip.list_pretrained_tags_by_model(args.clip)
    args.clip_weights = args.clip_weights or next(iter(tags), None)
    if args.clip_weights not in ("random", *tags) and not Path(args.clip_weights or "").is_file():
        raise FileNotFoundError(
            f"--clip-weights {args.clip_weights}: neither a file nor `random` nor one of open_clip's for "
            f"{args.clip} ({', '.join(tags) or 'it has none'})"
        )
    if args.lora:
        tower = config["vision_cfg"].get("timm_model_name")
        if tower is None:
            raise ValueError(f"--clip {args.clip} has no timm vision tower, so {args.lora} cannot go into it")
        tuned = lora.read_header(args.lora).get("backbone")
        if tuned and _architecture(vit.TIMM_NAMES.get(tuned, tuned)) != _architecture(tower):
            raise ValueError(f"{args.lora} was tuned on {tuned}; the tower of --clip {args.clip} is {tower}")
    return config


def check_blip2(args: argparse.Namespace) -> None:
    if args.clip_weights:
        raise ValueError("--clip-weights goes with --clip; --blip2 has its weights")
    if args.rerank < 1:
        raise ValueError(f"--rerank must be at least 1, got {args.rerank}")
    config = blip2.read_config(args.blip2, retrieval=True)
    if args.lora:
        blip2.spare_block(args.lora, config)


def _architecture(timm_name: str) -> str:
    """open_clip's eva_giant_patch14_224 is timm's eva_giant_patch14_clip_224.laion400m."""
    return timm_name.partition(".")[0].replace("_clip_", "_")


def cached_texts(clip: Clip, E: zeroshot.Benchmark, config: dict, args: argparse.Namespace) -> Tensor:
    """(T, D) features of E's texts, from --text-cache where the same model met the same list before."""
    W, found, path = torch.zeros(len(E.texts), clip.dim), [False], None
    if clip.ranks.rank == 0:
        weights = args.clip_weights
        weights = evaluation.sha256(weights) if Path(weights).is_file() else [weights, args.seed]
        made_of = [config, weights, str(clip.ranks.dtype), E.texts, E.templates]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
        path = Path(args.text_cache) / f"{key}.safetensors"
        if path.is_file():
            W, found = load_file(path)["texts"], [True]
    W = W.to(clip.ranks.device)
    dist.broadcast_object_list(found, device=clip.ranks.device)  # rank 0's answer is all ranks'
    if found[0]:
        dist.broadcast(W, src=0)
        return W
    W = clip.text_features(E.texts, E.templates, args.batch)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        save_file({"texts": W.cpu()}, part)
        part.replace(path)
    return W


# --- what is measured


def classify(f: Tensor, W: Tensor) -> Tensor:
    """(B, 5) the classes nearest to f (B, D), best first; of equal ones the first in the list."""
    return (f @ W.T).sort(dim=1, descending=True, stable=True).indices[:, :TOP]


def accuracy(R: Tensor, target: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Scores (n,) whose means are acc1, acc5 and the mean over the classes of the accuracy within each.

    R: (n, 5) classes, best first; target: (n,)
    """
    right = (R == target[:, None]).double()  # (n, 5)
    count = torch.bincount(target, minlength=num_classes).double()
    share = len(target) / (count[target] * (count > 0).sum())  # an image's share in its class's, over 1 / n
    scores = {"acc1": right[:, 0], "acc5": right.sum(1), "mean per class": right[:, 0] * share}
    return {metric: score for metric, score in scores.items() if metric != "acc5" or num_classes > TOP}


class Cosines:
    """The similarities W f^T of T captions, (T, D), and I images, (I, D), computed where they are looked up.

    Whole, COCO's 25,010 x 5,000 would be 0.5 GB. Two blocks may differ in an entry's last digit, so what is
    compared must come from one block.
    """

    def __init__(self, W: Tensor, f: Tensor):
        self.W, self.f = W, f
        self.shape = len(W), len(f)

    def __getitem__(self, at: tuple[slice, slice]) -> Tensor:
        captions, images = at
        return self.W[captions] @ self.f[images].T


def ranks_of(similarity: Tensor | Cosines, image_of: Tensor, block: int = 512) -> tuple[Tensor, Tensor]:
    """Where the right answer comes, 0 = first, every tie taken against the model.

    similarity: (T, I) of T captions and I images, looked up `block` captions and `block` images at a time;
    image_of: (T,) the image of each caption
    Returns (T,) the rank of its image among the images for each caption, and (I,) the rank of the best of its
    captions among those of other images for each image.
    """
    (T, I), by_caption, by_image = similarity.shape, [], []  # noqa: E741
    for at in range(0, T, block):
        S, image = similarity[at : at + block, :], image_of[at : at + block]  # (b, I)
        own = S.gather(1, image[:, None])
        by_caption.append((S >= own).sum(1, dtype=torch.int32) - 1)  # less the right one
    for at in range(0, I, block):
        S = similarity[:, at : at + block]  # (T, b)
        mine = ((image_of >= at) & (image_of < at + block)).nonzero()[:, 0]  # their captions
        image = image_of[mine] - at
        own, best = S[mine, image], S.new_full((S.shape[1],), -torch.inf)
        best.scatter_reduce_(0, image, own, "amax")  # (b,)
        count = (S >= best).sum(0, dtype=torch.int32)
        by_image.append(count.index_add_(0, image, -(own >= best[image]).int()))  # less its own
    return torch.cat(by_caption), torch.cat(by_image)


def recall(similarity: Tensor | Cosines, image_of: Tensor) -> dict[str, Tensor]:
    """Scores (I,) whose means are R@K of text retrieval (over images) and of image retrieval (over captions).

    A caption's hit is counted with its image, so that whoever draws images draws their captions with them.
    """
    T, I = similarity.shape  # noqa: E741
    by_caption, by_image = ranks_of(similarity, image_of)
    scores = {f"TR@{K}": (by_image < K).double() for K in RECALL_AT}
    for K in RECALL_AT:
        hits = torch.zeros(I, dtype=torch.float64, device=image_of.device)
        scores[f"IR@{K}"] = hits.index_add_(0, image_of, (by_caption < K).double()) * (I / T)
    return {metric: score for metric, score in scores.items() if int(metric[3:]) < (I, T)[metric[0] == "T"]}


def check_images(E: zeroshot.Benchmark, broken: Tensor, bad: dict[int, str], task: str) -> None:
    """Refuse features that are not finite, and a gallery that is not the benchmark's."""
    wrong = broken.nonzero().flatten().tolist()
    if wrong:
        shown = ", ".join(str(E.images[i]) if isinstance(E.images, list) else str(i) for i in wrong[:3])
        raise FloatingPointError(f"{E.name}: features of {len(wrong)} images are not finite: {shown}")
    if bad and (task == "retrieval" or len(bad) == len(E.images)):
        shown = "; ".join(list(bad.values())[:3])
        raise ValueError(f"{E.name}: {len(bad)} of {len(E.images)} images cannot be read: {shown}")


def report(rows: list[dict], variants: list[str], task: str) -> None:
    """The paper's table, then every metric with its difference and interval."""
    if task == "classification":
        rows_of_table = [r for r in rows if r["metric"] == "acc1"]
        columns = ["Table 5, top-1 %", *(zeroshot.KNOWN.get(r["set"], r["set"]) for r in rows_of_table)]
    else:
        rows_of_table = rows
        columns = ["Table 6, %", *(f"{r['set']} {r['metric']}" for r in rows)]
    print(evaluation.table(columns, [[v, *(r[v] for r in rows_of_table)] for v in variants]) + "\n")
    print(evaluation.rows_table(rows))


def retrieve_with_blip2(args, E: zeroshot.Benchmark, variants: list[str], ranks: common.Ranks) -> None:
    """Table 6, lower half: by ITC alone, then with the K best of every ranking ranked again by ITM + ITC."""
    blip = blip2.Blip2(args.blip2, ranks.dtype, ranks.device, retrieval=True)
    become, notes = blip.attach(args.lora)
    tokens, n = blip.caption_tokens(E.texts), len(E.images)
    mine = range(ranks.rank, len(tokens), ranks.world)
    W = torch.zeros(len(tokens), blip.config.image_text_hidden_size, device=ranks.device)  # (T, d)
    if mine:
        W[mine.start :: mine.step] = blip.text_features([tokens[t] for t in mine])
    dist.all_reduce(W)
    R = {v: W.new_zeros(n, blip.config.num_query_tokens, W.shape[1]) for v in variants}  # Alg. 3, line 1
    kept, bad = {variant: [] for variant in variants}, {}
    batches = evaluation.loader(zeroshot.Pictures(E.images, blip.transform), args, ranks, zeroshot.collate)
    for index, x, unread in tqdm(batches, E.name, disable=ranks.rank > 0):  # Alg. 3, line 2
        bad |= unread
        for variant in variants if x is not None else ():
            become(variant)
            f = blip.vision(x)  # Alg. 3, line 3: f* = M(x; dW*)
            R[variant][index.to(ranks.device)] = blip.image_features(f)  # Alg. 3, line 4
            kept[variant].append(f)  # for the matching of this rank's images
    check_images(E, torch.zeros(n), evaluation.gather(bad), args.task)
    y, scores = E.target.to(ranks.device), {}
    for variant in variants:  # Alg. 3, line 6: accumulate results, Metric(E_o(y), R_o)
        dist.all_reduce(R[variant])
        similarity = blip2.contrast(R[variant], W)  # (T, I)
        of_caption, of_image = blip2.candidates(similarity, args.rerank)
        matched = torch.zeros_like(similarity)
        if kept[variant]:
            own = slice(ranks.rank, None, ranks.world)
            pairs = (of_caption | of_image)[:, own].T.nonzero().flip(1)  # (pairs, 2), image by image
            logits = blip.match_pairs(torch.cat(kept[variant]), tokens, pairs, args.batch)
            matched[:, own][pairs[:, 0], pairs[:, 1]] = logits
        dist.all_reduce(matched)
        found = {f"ITC {metric}": score for metric, score in recall(similarity, y).items()}
        for way, chosen in (("TR", of_image), ("IR", of_caption)):
            again = recall(blip2.rerank(similarity, chosen, matched), y)
            found |= {f"ITM {metric}": score for metric, score in again.items() if metric.startswith(way)}
        scores[variant] = found
    if ranks.rank > 0:
        return
    rows = []
    for metric in scores[variants[0]]:
        of_variants = {v: scores[v][metric].cpu().numpy() for v in variants}
        rows.append(evaluation.row(E.name, metric, of_variants, len(tokens) if " IR" in metric else n))
    print(*E.notes, *notes, sep="\n")
    report(rows, variants, args.task)
    protocol = {
        "blip2": blip.version,
        "ITM re-ranks": args.rerank,
        "ties": "against the model",
        "notes": notes,
    }
    result = {"task": args.task, "rows": rows, "protocol": protocol | {"sets": E.notes}}
    evaluation.write_result(args, result, [args.captions, args.lora, *blip.files])


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = p.add_subparsers(dest="task", required=True)
    for task, table in (("classification", 5), ("retrieval", 6)):
        t = tasks.add_parser(task, help=f"Table {table}")
        add = t.add_argument
        which = t.add_mutually_exclusive_group()
        clip = dict(default="EVA02-E-14-plus", metavar="NAME|CONFIG.json", help="a model of open_clip")
        which.add_argument("--clip", **clip)
        weights = "a file, a name of open_clip's (downloads; default: its first), or `random`"
        add("--clip-weights", metavar="FILE|TAG", help=weights)
        add("--text-cache", default="out/texts", metavar="DIR", help="keeps text features for the next run")
        evaluation.add_options(t, f"out/{task}", batch=64)
        if task == "classification":
            known = f"one of {', '.join(zeroshot.KNOWN)}, or any other if DIR has a names.json; repeatable"
            add("--set", dest="sets", action="append", required=True, metavar="NAME=DIR", help=known)
        else:
            blip = "a folder, or a name on the hub: the first stage of BLIP-2 instead of CLIP"
            which.add_argument("--blip2", metavar="DIR|NAME", help=blip)
            top = "how many of each ranking BLIP-2's matching head ranks again (LAVIS: 128)"
            add("--rerank", type=int, default=blip2.RERANKED, metavar="K", help=top)
            formats = "Karpathy's JSON (its test images), COCO's captions, or a list of image and caption"
            add("--captions", required=True, metavar="FILE", help=formats)
            add("--images", required=True, metavar="DIR", help="folder of the images that FILE names")
    args = p.parse_args()
    variants = evaluation.check_options(args)
    with_blip2 = getattr(args, "blip2", None)
    config = check_blip2(args) if with_blip2 else check_clip(args)
    sets = dict(s.partition("=")[::2] for s in getattr(args, "sets", ()))
    if args.task == "classification" and ("" in (*sets, *sets.values()) or len(sets) < len(args.sets)):
        raise ValueError(f"--set wants NAME=DIR, each NAME once; got {' '.join(args.sets)}")

    # --- setup
    ranks = common.start(args)
    torch.set_float32_matmul_precision("highest")  # similarities decide by their last digits

    # --- data
    if args.task == "classification":
        order = [name for name in zeroshot.KNOWN if name in sets]
        order += [name for name in sets if name not in order]
        benchmarks = [zeroshot.open_set(name, sets[name], args.limit) for name in order]
    else:
        benchmarks = [zeroshot.open_captions(args.captions, args.images, args.limit)]

    if with_blip2:
        return retrieve_with_blip2(args, benchmarks[0], variants, ranks)

    # --- model
    clip = Clip(args.clip, args.clip_weights, ranks, args.seed)
    become = evaluation.attach(clip.tower, args)

    # --- loop
    rows, used = [], {}
    for E in benchmarks:
        if ranks.rank == 0:
            print(*E.notes, sep="\n", flush=True)
        n, W = len(E.images), cached_texts(clip, E, config, args)  # (T, D)
        if args.task == "classification":
            T_o, R_o = partial(classify, W=W), torch.zeros(n, min(TOP, len(W)), dtype=torch.int64)
        else:  # the features: captions can be ranked when all images are in
            T_o, R_o = torch.nn.Identity(), torch.zeros(n, clip.dim)
        R = {variant: R_o.to(ranks.device, copy=True) for variant in variants}  # Alg. 3, line 1
        broken, bad = torch.zeros(n, dtype=torch.int64, device=ranks.device), {}
        images = zeroshot.Pictures(E.images, clip.transform)
        batches = evaluation.loader(images, args, ranks, zeroshot.collate)
        for index, x, unread in tqdm(batches, E.name, disable=ranks.rank > 0):  # Alg. 3, line 2
            bad |= unread
            if x is None:
                continue
            index, x = index.to(ranks.device, non_blocking=True), clip.pixels(x)
            for variant in variants:
                become(variant)
                f = clip.image_features(x)  # Alg. 3, line 3: f* = M(x; dW*)
                R[variant][index] = T_o(f)  # Alg. 3, line 4
                broken[index] += ~f.isfinite().all(1)
        for part in (*R.values(), broken):  # every image was on one rank and is 0 on the others
            dist.all_reduce(part)
        bad = evaluation.gather(bad)
        check_images(E, broken, bad, args.task)
        if ranks.rank > 0:
            continue
        # Alg. 3, line 6: accumulate results, Metric(E_o(y), R_o)
        y = E.target.to(ranks.device)
        if args.task == "classification":
            good = torch.tensor([i for i in range(n) if i not in bad], device=ranks.device)
            scores = {v: accuracy(R[v][good], y[good], len(W)) for v in variants}
        else:
            scores = {v: recall(Cosines(W, R[v]), y) for v in variants}
        for metric in scores[variants[0]]:
            counted = len(W) if metric.startswith("IR") else n - len(bad)
            of_variants = {v: scores[v][metric].cpu().numpy() for v in variants}
            rows.append(evaluation.row(E.name, metric, of_variants, counted))
        texts = hashlib.sha256(json.dumps(E.texts).encode()).hexdigest()
        used[E.name] = {"images": n - len(bad), "skipped": list(bad.values()), "notes": E.notes}
        used[E.name] |= {"texts": len(W), "texts sha256": texts, "templates": E.templates}
    if ranks.rank > 0:
        return

    # --- save
    report(rows, variants, args.task)
    protocol = {
        "image": [str(step) for step in clip.steps],
        "texts": "mean over the templates of normalized features, normalized again (open_clip)",
        "ties": "to the first class of the list" if args.task == "classification" else "against the model",
        "interval": "95%, paired bootstrap over images; p: McNemar's exact test",
    }
    result = {"task": args.task, "rows": rows, "sets": used, "protocol": protocol, "clip": config}
    evaluation.write_result(args, result, [args.clip_weights, args.lora, getattr(args, "captions", None)])


if __name__ == "__main__":
    common.launch(main)
