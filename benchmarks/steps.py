"""Steps of stage 1 and stage 2 for every task: where the time goes, in one process and in two.

    python benchmarks/steps.py

Runs `stage1_heads.py` and `stage2_lora.py` themselves on the demo's world, 640 px, with eva_mini of random
weights, and clocks from outside what they call. `data` is waiting for the next batch; `M` the backbone's
forward; `T_n` the head's forward with its loss, matching included; `backward` also recomputes M's blocks in
stage 2; `update` is clipping and AdamW; `sending` is what a second process adds where nothing else is left to
do: the wait for the last gradients at the end of the backward pass, and OSS's broadcast of what each process
updated. The two processes share this machine (gloo), each with half of the cores, and have a batch each. `MB
sent` are the gradients that are averaged and the updated weights that are broadcast at a step. Medians of
steps; shares of their sum.

GFLOP are counted, not measured: torch.utils.flop_counter on the same steps, which knows products,
convolutions and attention. `of the ceiling` is their rate as a part of that of a 1024 x 1024 matrix product
on as many threads. Width 192 and one image at a time do not fill it: the many small operations of the heads,
the losses and the optimizer limit such steps more than arithmetic.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from fairscale.optim.oss import OSS
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, which has a lora.py too

import backbone as vit  # noqa: E402
import stage1_heads  # noqa: E402
import stage2_lora  # noqa: E402
import tasks  # noqa: E402
import training  # noqa: E402
from demo import world  # noqa: E402

PARTS = ("data", "M", "T_n", "backward", "update", "sending")


def once(init):
    """All cases share the group of the first: gloo cannot make a second one of the same name."""
    return lambda *args, **kwargs: None if dist.is_initialized() else init(*args, **kwargs)


class Clock:
    """Seconds of each part of each step, by wrapping what the stages call. With `count`, GFLOP instead."""

    def __init__(self, count: bool):
        self.steps, self.now, self.start, self.count = [], defaultdict(float), None, count
        self.ready, self.counter = None, None

    def timed(self, part: str, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.now[part] += time.perf_counter() - start

        return call

    def begin(self, fetch):
        """Log.next comes first in a step, but for its learning rate."""

        def fetched(*args):
            self.start = time.perf_counter()
            if self.count:
                self.counter = FlopCounterMode(display=False)
                self.counter.__enter__()
            return self.timed("data", fetch)(*args)

        return fetched

    def end(self, add):
        """Log.add comes last in a step, before it is saved."""

        def added(*args):
            self.now["all"] = time.perf_counter() - self.start
            if self.counter:
                self.counter.__exit__(None, None, None)
                self.now["gflop"] = self.counter.get_total_flops() / 1e9
                self.counter = None
            self.steps.append(dict(self.now))
            self.now.clear()
            add(*args)

        return added

    def backward(self, function):
        def call(*args, **kwargs):
            start, self.ready = time.perf_counter(), None
            function(*args, **kwargs)
            end = time.perf_counter()
            waited = end - self.ready if self.ready else 0.0
            self.now["backward"] += end - start - waited
            self.now["sending"] += waited

        return call

    def parallel(self, function):
        """DDP with a hook that sends as it would, and notes how much and when the last bucket was ready."""

        def hook(_, bucket):
            self.now["bytes"] += bucket.buffer().nbytes
            if bucket.is_last():
                self.ready = time.perf_counter()
            sum_ = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
            return sum_.then(lambda done: done.value()[0])

        def wrapped(*args):
            module = function(*args)
            if dist.get_world_size() > 1:
                module.register_comm_hook(None, hook)
            return module

        return wrapped

    def broadcast(self, function):
        def call(oss, *args):
            self.now["bytes"] += sum(p.nbytes for group in oss.param_groups for p in group["params"])
            return self.timed("sending", function)(oss, *args)

        return call

    def run(self, script, options: list) -> list[dict]:
        """The script's steps, one dict of seconds each."""
        places = [
            (training.Log, "next", self.begin),
            (training.Log, "add", self.end),
            (training, "minimize", lambda function: self.timed("minimize", function)),
            (vit.Backbone, "forward", lambda function: self.timed("M", function)),
            (torch.Tensor, "backward", self.backward),
            (training, "parallel", self.parallel),
            (dist, "init_process_group", once),
        ]
        if dist.is_torchelastic_launched():
            places.append((OSS, "_broadcast_params", self.broadcast))
        with ExitStack() as stack, open(os.devnull, "w") as nowhere:
            for holder, name, wrap in places:
                stack.enter_context(patch.object(holder, name, wrap(getattr(holder, name))))
            stack.enter_context(patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, options)]))
            stack.enter_context(patch.object(sys, "stdout", nowhere))
            script.main()
        for step in self.steps:
            step["update"] = step["minimize"] - step["backward"] - step.get("sending", 0.0)
            step["T_n"] = step["all"] - step["data"] - step["M"] - step["minimize"]
        return self.steps


def child(args: argparse.Namespace) -> None:
    """All cases in this process, or in each of two; rank 0 writes what it measured."""
    torch.set_num_threads(max(1, args.threads // int(os.environ.get("WORLD_SIZE", 1))))
    found, folder = {}, Path(args.child)
    for stage, script in enumerate((stage1_heads, stage2_lora), 1):
        for task in args.tasks:
            same = {"model": "eva_mini", "weights": "random", "coco": folder / "coco", "workers": 1}
            same |= {"image-scale": args.image_scale, "warmup": 0, "min-count": 1, "log-every": 10**6}
            same["iters"] = args.iters
            same |= {"task": task} if stage == 1 else {"tasks": task, "heads": folder / f"1 {task}"}
            if task in ("captioning", "pose"):
                same["batch"] = args.batch
            for count in (False, True) if "RANK" not in os.environ else (False,):
                out = folder / f"{stage} {task}{' counted' * count}{' two' * ('RANK' in os.environ)}"
                options = [x for k, v in {**same, "out": out}.items() for x in (f"--{k}", v)]
                steps = Clock(count).run(script, options)[args.skip :]
                if count:
                    found[f"{stage} {task}"]["gflop"] = statistics.mean(s["gflop"] for s in steps)
                    continue
                case = {part: statistics.median(s.get(part, 0.0) for s in steps) for part in (*PARTS, "all")}
                case["mean"] = statistics.mean(s["all"] for s in steps)
                case["mb"] = steps[-1].get("bytes", 0) / 1e6
                found[f"{stage} {task}"] = case
    gc.collect()
    dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / f"steps{os.environ.get('WORLD_SIZE', 1)}.json").write_text(json.dumps(found))


def ceiling(threads: int) -> float:
    """GFLOP/s of a product of 1024 x 1024 matrices, the median of some."""
    torch.set_num_threads(threads)
    a, b, seconds = torch.randn(1024, 1024), torch.randn(1024, 1024), []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(seconds[1:]) / 1e9


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", nargs="+", choices=tasks.NAMES, default=tasks.NAMES)
    p.add_argument("--iters", type=int, default=12, help="steps of each case")
    p.add_argument("--skip", type=int, default=3, help="first steps that do not count")
    p.add_argument("--batch", type=int, default=4, help="of captioning and pose; the other tasks have 1")
    p.add_argument("--image-scale", type=float, default=0.4, help="times the release's image sizes")
    p.add_argument("--threads", type=int, default=2, help="of torch, over all processes")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(args)
    with tempfile.TemporaryDirectory() as folder:
        world.write(Path(folder) / "coco", "train2017", 32, 640, seed=0)
        for processes in (1, 2):
            start = [sys.executable] + ["-m", "torch.distributed.run", "--nproc_per_node", "2"] * (
                processes == 2
            )
            own = [__file__, *sys.argv[1:], "--child", folder]
            subprocess.run([*start, *own], check=True, cwd=ROOT)
        one, two = (json.loads((Path(folder) / f"steps{n}.json").read_text()) for n in (1, 2))
    best = ceiling(args.threads)
    print(f"| stage, task | processes | ms a step | {' | '.join(PARTS)} | MB sent | GFLOP | of the ceiling |")
    print("|---" * (len(PARTS) + 6) + "|")
    for case in one:
        for processes, found in ((1, one[case]), (2, two[case])):
            total = sum(found[part] for part in PARTS)
            shares = " | ".join(f"{found[part] / total:.0%}" for part in PARTS)
            rate = ["", ""]
            if processes == 1:
                rate = [f"{found['gflop']:.1f}", f"{found['gflop'] / found['mean'] / best:.0%}"]
            cells = [f"{1e3 * found['all']:.0f}", shares, f"{found['mb']:.1f}", *rate]
            print(f"| {case} | {processes} | {' | '.join(cells)} |")
    print(f"\nThe ceiling, measured: {best:.0f} GFLOP/s in fp32 with {args.threads} threads.")
    answer = {"torch": torch.__version__, **vars(args), "ceiling_gflops": best, "one": one, "two": two}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
