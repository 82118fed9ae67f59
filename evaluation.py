"""What every evaluation (Algorithm 3) shares: options, M with and without dW, ranks' shares, the result.

    --lora none        M as it was pretrained                        variants: before
    --lora FILE        M with dW*                                    variants: after
    --compare FILE     both, on the same items in the same order     variants: before, after

A difference of tenths of a point is only worth reading if it is paired: `paired` gives it with an interval.
"""

import argparse
import hashlib
import json
import signal
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import common
import lora

# --- options


def add_options(p: argparse.ArgumentParser, out: str, batch: int) -> None:
    """The options of every evaluation; `out` and `batch` are defaults."""
    add, which = p.add_argument, p.add_mutually_exclusive_group()
    which.add_argument("--lora", default="none", metavar="FILE|none", help="score M with this dW, or without")
    which.add_argument("--compare", metavar="FILE", help="score without and with this dW, paired")
    add("--out", default=out, help="folder for result.json and all else that this run writes")
    add("--batch", type=int, default=batch, help="per process")
    add("--limit", type=int, help="only the first N items of each set; marks the result as partial")
    add("--workers", type=int, default=4, help="loader processes per rank (0 = none)")
    add("--seed", type=int, default=0, help="of whatever is trained or drawn")
    types = "type of the frozen models (auto: bf16 on GPUs that have it, else fp16; CPU: fp32)"
    add("--backbone-dtype", choices=["auto", *common.DTYPES], default="auto", help=types)


def add_backbone_options(p: argparse.ArgumentParser) -> None:
    """For evaluations of the bare vision model: which one."""
    add = p.add_argument
    add("--model", default="eva_g", help="eva_g, eva_e (Table 2), eva_mini, or the name of any timm ViT")
    add("--weights", help="a file, `pretrained` or `random` (default: weights/MODEL.safetensors)")
    add("--no-cls", action="store_true", help="no [CLS] in the sequence (the authors' release)")
    add("--imagenet-norm", action="store_true", help="ImageNet's mean and std (the release), not the model's")


def check_options(args: argparse.Namespace) -> list[str]:
    """Refuse what cannot work before anything is loaded. Returns the variants to score, in order.

    Leaves the LoRA file, or None, in args.lora. Raises ValueError, FileNotFoundError.
    """
    for name, least in dict(batch=1, limit=1, workers=0, seed=0).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    args.lora = args.compare or (None if args.lora == "none" else args.lora)
    if hasattr(args, "weights"):
        args.weights = args.weights or f"weights/{args.model}.safetensors"
        common.check_weights(args.weights)
    if args.lora:
        tuned = lora.read_header(args.lora).get("backbone")
        if tuned and tuned != getattr(args, "model", tuned):
            raise ValueError(f"{args.lora} was tuned on {tuned}, not on --model {args.model}")
    return ["before", "after"] if args.compare else ["after" if args.lora else "before"]


def attach(vit: nn.Module, args: argparse.Namespace) -> Callable[[str], None]:
    """Load dW, if any, into M; returns a function that makes M the `before` or the `after` it is told."""
    if args.lora:
        lora.load(vit, args.lora)
    return lambda variant: lora.switch(vit, on=variant == "after") and None


# --- items


def loader(
    items: Dataset, args: argparse.Namespace, ranks: common.Ranks, collate=None, done: Container[int] = ()
) -> DataLoader:
    """This rank's share, items rank, rank + world, ...: each once over all ranks, nothing doubled to pad.

    done: items that need not come again; a batch is left out when all of it is done, so that a resumed run
    makes the batches that it would have made
    """
    share = range(ranks.rank, len(items), ranks.world)
    batches = [share[at : at + args.batch] for at in range(0, len(share), args.batch)]
    return DataLoader(
        items,
        batch_sampler=[batch for batch in batches if not all(i in done for i in batch)],
        collate_fn=collate,
        num_workers=args.workers,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=_ignore_interrupt,
    )


def _ignore_interrupt(_) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


def gather(mine: dict) -> dict:
    """Every rank's {item: answer} together, in the items' order, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    joined = {item: answer for part in parts for item, answer in part.items()}
    assert len(joined) == sum(map(len, parts)), "an item was answered on two ranks"
    return dict(sorted(joined.items()))


class Answers:
    """OUT/answers_RANK.jsonl: this rank's answers as they come, and those that a killed run left behind.

    settings: what the answers depend on, a line at each start
    Raises ValueError if there are answers without --resume, or with it answers under other settings.
    """

    def __init__(self, args: argparse.Namespace, ranks: common.Ranks, settings: dict):
        out, settings = Path(args.out), json.loads(json.dumps(settings))
        paths = sorted(out.glob("answers_*.jsonl"))
        if paths and not args.resume:
            raise ValueError(f"--out {out} holds answers: pass --resume to go on with them, or another --out")
        self.found: dict = {}  # {item: {variant: answer}}
        for line in (line for path in paths for line in path.read_text().splitlines()):
            try:
                content = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            then = content.get("settings", settings)
            keys = [k for k in {**then, **settings} if then.get(k) != settings.get(k)]
            if keys:
                changed = "; ".join(f"{k} was {then.get(k)}, is {settings.get(k)}" for k in keys)
                raise ValueError(f"--resume {out}: changed: {changed}; put it back, or take a new --out")
            if "item" in content:
                self.found[content["item"]] = content["answers"]
        out.mkdir(parents=True, exist_ok=True)
        dist.barrier()  # everyone has read
        path = out / f"answers_{ranks.rank}.jsonl"
        torn = path.exists() and not path.read_text().endswith("\n")
        self.file = open(path, "a")
        self._write(["\n"] * torn + [json.dumps({"settings": settings}) + "\n"])

    def have(self, items: Iterable, variants: list[str]) -> bool:
        return all(variant in self.found.get(item, ()) for item in items for variant in variants)

    def add(self, items: list, answers: dict[str, list]) -> None:
        """answers: {variant: one for each of the items}"""
        rows = [{v: answers[v][i] for v in answers} for i in range(len(items))]
        self.found |= dict(zip(items, rows, strict=True))
        self._write(
            [json.dumps({"item": k, "answers": row}) + "\n" for k, row in zip(items, rows, strict=True)]
        )

    def gather(self, mine: Iterable) -> dict:
        """{item: {variant: answer}} of all ranks; mine: the items of this rank's share."""
        return gather({item: self.found[item] for item in mine})

    def _write(self, lines: list[str]) -> None:
        self.file.write("".join(lines))
        self.file.flush()  # safe from a kill of this process, if not from one of the machine


def check_images(expected, found) -> None:
    """Raises ValueError naming images that have no prediction, and predictions for images not in the set."""
    for what, ids in (
        ("have no prediction", [i for i in expected if i not in found]),
        ("are predicted for, but are not in the annotations", [i for i in found if i not in expected]),
    ):
        if ids:
            raise ValueError(
                f"{len(ids)} images {what}: {', '.join(map(str, ids[:5]))}{', ...' * (len(ids) > 5)}"
            )


# --- what it says


def paired(before, after, seed: int = 0, resamples: int = 10_000) -> dict:
    """Mean scores of the same n items before and after, and the difference with its 95% interval.

    before, after: (n,) scores. Interval: percentiles of a paired bootstrap over items; p: McNemar's exact
    test (two-sided binomial over the items that changed) if the scores are 0 or 1, else None.
    Raises ValueError if the two are not of the same items.
    """
    before, after = (np.asarray(x, np.float64) for x in (before, after))
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"not the same items before and after: {before.shape} and {after.shape} scores")
    values, counts = np.unique(after - before, return_counts=True)
    n, rng = len(before), np.random.default_rng(seed)
    # To draw n items is to draw how often each value occurs; in parts, as the values may be many
    parts = [rng.multinomial(n, counts / n, size=100) @ values / n for _ in range(resamples // 100)]
    low, high = np.percentile(np.concatenate(parts), [2.5, 97.5])
    p = None
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        from scipy.stats import binomtest  # a second to import, for --compare alone

        gained, lost = int((after > before).sum()), int((after < before).sum())
        p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    means = dict(before=before.mean(), after=after.mean(), difference=(after - before).mean())
    return {**{k: float(v) for k, v in means.items()}, "low": float(low), "high": float(high), "p": p, "n": n}


def row(name: str, metric: str, scores: dict[str, np.ndarray | float], n: int | None = None) -> dict:
    """A line of result.json's `rows`, in percent points; None where nothing was scored.

    scores: {variant: (n,) scores in 0..1 of the items, whose mean it is, or one score of them all}
    n: how many items, where it is not the number of scores
    """
    line = {"set": name, "metric": metric, **dict.fromkeys(("before", "after", "difference", "low", "high"))}
    line |= {"p": None, "n": n or max(map(np.size, scores.values()), default=0)}
    line |= {variant: 100 * float(np.mean(score)) for variant, score in scores.items()}
    if len(scores) == 2:
        line["difference"] = line["after"] - line["before"]
        if np.ndim(scores["before"]):
            found = paired(**scores)
            line |= {k: 100 * found[k] for k in ("difference", "low", "high")} | {"p": found["p"]}
    return line


def rows_table(rows: list[dict]) -> str:
    """All rows in markdown, the interval in one column."""
    columns = ["set", "metric", "n", "before", "after", "difference", "95% interval", "p (McNemar)"]
    lines = []
    for r in rows:
        interval = None if r["low"] is None else f"{r['low']:+.2f} .. {r['high']:+.2f}"
        p = None if r["p"] is None else f"{r['p']:.2g}"
        lines.append([r["set"], r["metric"], r["n"], r["before"], r["after"], r["difference"], interval, p])
    return table(columns, lines)


def model_columns(args: argparse.Namespace, variant: str, vit: nn.Module) -> list:
    """Model, Params, Iters: how a line of the paper's tables begins."""
    count = sum(p.numel() for name, p in vit.named_parameters() if "lora_" not in name)
    params = f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.1f}M"
    if variant == "before":
        return [args.model, params, 0]
    return [f"{args.model} ViSFT", params, lora.read_header(args.lora).get("step", "unknown")]


def table(columns: list[str], rows: list[list]) -> str:
    """Markdown; floats with two decimals, None as a dash."""

    def cell(v) -> str:  # + 0.0: no minus before a zero
        return "-" if v is None else f"{round(v, 2) + 0.0:.2f}" if isinstance(v, float) else str(v)

    cells = [[cell(v) for v in r] for r in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text)
    part.replace(path)


def write_json(path: Path, content) -> None:
    write(path, json.dumps(content, indent=1, default=str))


def write_result(args: argparse.Namespace, result: dict, files: list[str | None]) -> None:
    """OUT/result.json: the result, every option, the command, versions, and the hashes of `files`."""
    if dist.get_rank() > 0:
        return
    hashes = {str(f): sha256(f) for f in files if f and Path(f).is_file()}
    content = {"partial": args.limit is not None, **result, "options": vars(args), "sha256": hashes}
    path = Path(args.out) / "result.json"
    write_json(path, {**content, **common.provenance()})
    print(f"{path}{' (partial: --limit)' if args.limit else ''}", flush=True)


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
