"""What every evaluation (Algorithm 3) shares: options, M with and without dW, ranks' shares, the result.

    --lora none        M as it was pretrained                        variants: before
    --lora FILE        M with dW*                                    variants: after
    --compare FILE     both, on the same items in the same order     variants: before, after

A difference of tenths of a point is only worth reading if it is paired: `paired` gives it with an interval.
"""

import argparse
import signal
from collections.abc import Callable, Container
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import files
import lora
from ranks import Ranks, add_process_options, check_process_options, provenance

# --- options


def add_options(p: argparse.ArgumentParser, out: str | None, batch: int) -> None:
    """The options of every evaluation; `out` and `batch` are defaults."""
    group = p.add_argument_group("evaluation")
    add, which = group.add_argument, group.add_mutually_exclusive_group()
    which.add_argument("--lora", default="none", metavar="FILE|none", help="score M with this dW, or without")
    which.add_argument("--compare", metavar="FILE", help="score without and with this dW, paired")
    add("--out", default=out, help="folder for result.json and all else that this run writes")
    add("--batch", type=int, default=batch, help="per process")
    add("--limit", type=int, help="only the first N items of each set; marks the result as partial")
    add_process_options(p)


def check_options(args: argparse.Namespace) -> list[str]:
    """Refuse what cannot work before anything is loaded. Returns the variants to score, in order.

    Leaves the LoRA file, or None, in args.lora. Raises ValueError, FileNotFoundError.
    """
    check_process_options(args)
    for name, least in dict(batch=1, limit=1).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    args.lora = args.compare or (None if args.lora == "none" else args.lora)
    if args.lora:
        tuned = lora.read_header(args.lora).get("backbone")
        if tuned and tuned != getattr(args, "model", tuned):
            raise ValueError(f"{args.lora} was tuned on {tuned}, not on --model {args.model}")
    return ["before", "after"] if args.compare else ["after" if args.lora else "before"]


def attach(vit: nn.Module, args: argparse.Namespace) -> Callable[[str], None]:
    """Load dW, if any, into M; returns a function that sets M to `before`, M(x), or `after`, M(x; dW*)."""
    if args.lora:
        lora.load(vit, args.lora)

    def set_M(variant: str) -> None:
        lora.switch(vit, on=variant == "after")

    return set_M


# --- items


class Loader(DataLoader):
    """Raises the error that a data set returned: raised in a worker it would come with all its traceback."""

    def __iter__(self):
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


def loader(
    items: Dataset, args: argparse.Namespace, ranks: Ranks, collate=None, done: Container[int] = ()
) -> Loader:
    """This rank's share, items rank, rank + world, ...: each once over all ranks, nothing doubled to pad.

    done: items that need not come again; a batch is left out when all of it is done, so that a resumed run
    makes the batches that it would have made
    """
    share = range(ranks.rank, len(items), ranks.world)
    batches = [share[at : at + args.batch] for at in range(0, len(share), args.batch)]
    return Loader(
        items,
        batch_sampler=[batch for batch in batches if not all(i in done for i in batch)],
        collate_fn=collate,
        num_workers=args.workers,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=_ignore_interrupt,
    )


def _ignore_interrupt(_) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


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


def result_row(name: str, metric: str, scores: dict[str, np.ndarray | float], n: int | None = None) -> dict:
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
            both = paired(**scores)
            line |= {k: 100 * both[k] for k in ("difference", "low", "high")} | {"p": both["p"]}
    return line


def rows_table(rows: list[dict]) -> str:
    """All rows in markdown, the interval in one column."""
    columns = ["set", "metric", "n", "before", "after", "difference", "95% interval", "p (McNemar)"]
    lines = []
    for row in rows:
        interval = None if row["low"] is None else f"{row['low']:+.2f} .. {row['high']:+.2f}"
        p = None if row["p"] is None else f"{row['p']:.2g}"
        scores = [row[k] for k in ("before", "after", "difference")]
        lines.append([row["set"], row["metric"], row["n"], *scores, interval, p])
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

    def cell(value) -> str:
        if value is None:
            return "-"
        return f"{round(value, 2) + 0.0:.2f}" if isinstance(value, float) else str(value)  # 0.0: no minus 0

    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(args: argparse.Namespace, result: dict, used: list[str | None]) -> None:
    """OUT/result.json: the result, every option, the command, versions, hashes of the files `used`."""
    if dist.get_rank() > 0:
        return
    used = [p for f in used if f for p in (sorted(Path(f).glob("*.safetensors")) or [Path(f)])]  # of a folder
    hashes = {str(f): files.sha256(f) for f in used if f.is_file()}
    content = {"partial": args.limit is not None, **result, "options": vars(args), "sha256": hashes}
    path = Path(args.out) / "result.json"
    files.write_json(path, {**content, **provenance()})
    print(f"{path}{' (partial: --limit)' if args.limit else ''}", flush=True)
