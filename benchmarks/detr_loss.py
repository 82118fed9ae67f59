"""Time of the detection loss, matching included: `Detr.criterion` beside transformers' DETR loss.

    python benchmarks/detr_loss.py

Forward and backward on the same outputs of 6 levels x 100 queries and the same 7 to 20 targets an image,
interleaved, in one process. `quartiles` are of the ratio within each round, `best` is the ratio of the
fastest runs, `others` is the share of the CPU time that other processes took. `transfers` are calls of
Tensor.cpu(), `waits` the other places where the host of a GPU must wait for a value or a size (ours /
theirs): item(), a condition on a tensor, a boolean mask as an index.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that ours are found from any folder

from heads.detr import Detr

LEVELS, QUERIES, CLASSES = 6, 100, 80  # Sec. 4.2; COCO
FASTER = 1.3  # at least


def targets(batch: int) -> list[dict]:
    """7 to 20 boxes an image (COCO's average image has 7), inside the image."""
    y = []
    for n in torch.randint(7, 21, (batch,)).tolist():
        size = 0.02 + 0.48 * torch.rand(n, 2)
        centre = size / 2 + (1 - size) * torch.rand(n, 2)
        y.append({"labels": torch.randint(CLASSES, (n,)), "boxes_cxcywh": torch.cat([centre, size], 1)})
    return y


def ours(head: Detr, logits: Tensor, boxes: Tensor, y: list[dict]) -> Tensor:
    loss, _ = head.criterion(logits, boxes, y)
    logits.grad = boxes.grad = None
    loss.backward()
    return loss.detach()


def their_loss(head: Detr, logits: Tensor, boxes: Tensor, y: list[dict]) -> Tensor:
    """transformers' DETR loss with our weights; it has the matching in it."""
    weight = head.weight
    config = SimpleNamespace(
        num_labels=CLASSES,
        eos_coefficient=head.no_object_weight,
        auxiliary_loss=True,
        decoder_layers=LEVELS,
        class_cost=weight["class"],
        bbox_cost=weight["l1"],
        giou_cost=weight["giou"],
        bbox_loss_coefficient=weight["l1"],
        giou_loss_coefficient=weight["giou"],
    )
    labels = [{"class_labels": t["labels"], "boxes": t["boxes_cxcywh"]} for t in y]
    return ForObjectDetectionLoss(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)[0]


def theirs(head: Detr, logits: Tensor, boxes: Tensor, y: list[dict]) -> Tensor:
    loss = their_loss(head, logits, boxes, y)
    logits.grad = boxes.grad = None
    loss.backward()
    return loss.detach()


class Waits(TorchDispatchMode):
    """Counts operations whose result the host needs at once, or whose output size depends on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.count += 1
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.count += any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return function(*args, **(kwargs or {}))


def transfers(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Calls of Tensor.cpu(), and waits."""
    calls, cpu = [], Tensor.cpu

    def counted(t: Tensor) -> Tensor:
        calls.append(t.shape)
        return cpu(t)

    with mock.patch.object(Tensor, "cpu", counted), Waits() as waits:
        run()
    return len(calls), waits.count


def interleaved(runs: dict[str, Callable], reps: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each run in each round, and the share of the CPU time that other processes took meanwhile.

    Rounds begin with a run each in turn; the first is not counted.
    """
    names, seconds = list(runs), {name: [] for name in runs}
    for r in range(reps + 1):
        if r == 1:
            start, (all_start, own_start) = time.perf_counter(), cpu_seconds()
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            begin = time.perf_counter()
            runs[name]()
            if r > 0:
                seconds[name].append(time.perf_counter() - begin)
    all_end, own_end = cpu_seconds()
    others = (all_end - all_start) - (own_end - own_start)
    return seconds, max(0.0, others / (time.perf_counter() - start) / os.cpu_count())


def cpu_seconds() -> tuple[float, float]:
    """CPU time so far of all that runs on this machine (Linux; stolen time included), and of this process."""
    stat = Path("/proc/stat")
    ticks = [int(n) for n in stat.read_text().split("\n")[0].split()[1:9]] if stat.exists() else [0] * 8
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), time.process_time()  # 3, 4: idle


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = f"{os.cpu_count()} x {models[0]}" if models else platform.processor()
    return f"{cpu}, load {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reps", type=int, default=51, help="rounds (at least 2) to take medians over")
    p.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8], help="images")
    args = p.parse_args()

    # --- setup
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    header = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": args.threads,
        "reps": args.reps,
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
    }
    print(*(f"{name}: {value}" for name, value in header.items()), sep=" | ", end="\n\n")
    head = Detr(dim=192, categories=[{"id": i, "name": str(i)} for i in range(CLASSES)])

    # --- loop
    print("| batch | targets | ours, ms | theirs | ratio | quartiles | best | others | transfers | waits |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    results = {}
    for B in args.batch:
        y = targets(B)
        logits = torch.randn(LEVELS, B, QUERIES, CLASSES + 1, requires_grad=True)
        boxes = torch.rand(LEVELS, B, QUERIES, 4, requires_grad=True)
        runs = {f.__name__: partial(f, head, logits, boxes, y) for f in (ours, theirs)}
        loss, grads = {}, {}
        for name, run in runs.items():
            loss[name], grads[name] = run(), (logits.grad, boxes.grad)
        torch.testing.assert_close(loss["ours"], loss["theirs"], rtol=1e-4, atol=0)
        torch.testing.assert_close(grads["ours"], grads["theirs"], rtol=1e-3, atol=1e-5)  # the same pairs
        cpu, waits = zip(*(transfers(run) for run in runs.values()), strict=True)
        seconds, others = interleaved(runs, args.reps)

        median = {name: statistics.median(s) for name, s in seconds.items()}
        faster = median["theirs"] / median["ours"]
        low, _, high = statistics.quantiles((b / a for a, b in zip(*seconds.values(), strict=True)), n=4)
        best = min(seconds["theirs"]) / min(seconds["ours"])
        print(
            f"| {B} | {sum(len(t['labels']) for t in y)} | {1e3 * median['ours']:.2f} "
            f"| {1e3 * median['theirs']:.2f} | {faster:.2f} | {low:.2f} to {high:.2f} | {best:.2f} "
            f"| {others:.0%} | {cpu[0]} / {cpu[1]} | {waits[0]} / {waits[1]} |"
        )
        results[B] = {
            "faster": faster,
            "best": best,
            "others": others,
            "loss": {name: value.item() for name, value in loss.items()},
            "transfers": cpu,
            "waits": waits,
            "ms": {name: [round(1e3 * t, 3) for t in s] for name, s in seconds.items()},
        }

    # --- save
    met = {
        f"at least {FASTER} x as fast": all(r["faster"] >= FASTER for r in results.values()),
        "one transfer a batch": all(r["transfers"][0] == 1 for r in results.values()),
        "no wait besides": all(r["waits"][0] == 0 for r in results.values()),
    }
    print("\n| target | |\n|---|---|")
    for name, reached in met.items():
        print(f"| {name} | {'met' if reached else 'MISSED'} |")
    print("\n" + json.dumps({**header, "met": met, "batches": results}))


if __name__ == "__main__":
    main()
