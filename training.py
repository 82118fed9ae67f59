"""What both stages, and evaluations that train a head, share: options, optimizer, checkpoints, log.

Gradients are averaged by torch's DDP; the optimizer state is sharded by fairscale's OSS (ZeRO, Sec. 4.2).
"""

import argparse
import json
import math
import os
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from fairscale.optim.oss import OSS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import files
from ranks import check_process_options, to_device

CLIP_GRAD = 0.1  # L2 norm over all trained parameters; not in the paper; the authors' release
WEIGHT_DECAY = 1e-4  # the authors' release
CHECKPOINTS = ("last.pt", "previous.pt")  # in a run's folder, the newest first
CONTENT = dict(step=int, options=dict, trained=dict, optimizer=dict, scaler=dict)  # of a checkpoint
# Options of both stages that may differ between a run and its resumption
MAY_CHANGE = {"out", "resume", "coco", "captions", "workers", "log_every", "save_every", "exclude_images"}
MAY_CHANGE |= {"skip_bad_images"}  # what stopped a run is passed over when it goes on


# --- options


def add_options(p: argparse.ArgumentParser) -> None:
    """The options that both stages share: the data, the schedule and the run."""
    add = p.add_argument_group("data").add_argument
    add("--coco", default="coco", help="folder that holds annotations/ and train2017/")
    add("--split", default="train2017", help="which of its images and annotations")
    karpathy = "a Karpathy dataset_coco.json (its train and restval; default: captions_SPLIT.json)"
    add("--captions", metavar="FILE", help=f"captioning: {karpathy}")
    add("--min-count", type=int, default=6, help="captioning: how often a word must occur (the release: 6)")
    add("--exclude-images", metavar="FILE", help="ids to leave out, or a Karpathy JSON (its test and val)")
    add("--data-fraction", type=float, default=1.0, help="train on this part of the images (Table 10)")
    add("--skip-bad-images", action="store_true", help="count undecodable images and take the next one")
    run = p.add_argument_group("run")
    add_run_options(run)
    compiled = "torch.compile the ViT's blocks: some minutes at first, and other roundings of the same sums"
    run.add_argument("--compile", action="store_true", help=compiled)


def add_run_options(run) -> None:
    """Of a run that trains, to a parser or one of its groups; eval_ocr.py has them, too."""
    add = run.add_argument
    add("--warmup", type=int, default=2000, help="steps of linear warm-up (Sec. 4.2: 2000; 0 = off)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=int, default=5000, help="steps between checkpoints (Sec. 4.2: 5k)")
    add("--log-every", type=int, default=50, help="steps between lines of log.jsonl")


def check_options(args: argparse.Namespace) -> None:
    """Refuse impossible values and missing files before anything is loaded."""
    check_process_options(args, len(args.tasks) if "tasks" in args else 1)
    check_run_options(args)
    if args.min_count < 1:
        raise ValueError(f"--min-count must be at least 1, got {args.min_count}")
    if not 0 < args.data_fraction <= 1:
        raise ValueError(f"--data-fraction must be in (0, 1], got {args.data_fraction}")
    if args.exclude_images and not Path(args.exclude_images).is_file():
        raise FileNotFoundError(f"--exclude-images {args.exclude_images}: no such file")
    check_new(args, args.out)


def check_run_options(args: argparse.Namespace) -> None:
    for name, least in dict(iters=1, warmup=0, save_every=1, log_every=1).items():
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
            )
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise ValueError(f"--lr must be positive, got {args.lr}")


def check_new(args: argparse.Namespace, out: str | Path) -> None:
    """Raises ValueError if a run's folder has a checkpoint, whole or not, and --resume is not given."""
    if not args.resume and any((Path(out) / name).exists() for name in CHECKPOINTS):
        raise ValueError(f"--out {out} holds a run: pass --resume to go on with it, or another --out")


# --- ranks


def parallel(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Average what `module` trains over the ranks. Its frozen weights, equal everywhere, are not sent."""
    fixed = [name for name, p in module.named_parameters() if not p.requires_grad]
    fixed += [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, fixed)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


# --- optimizer


def learning_rate(step: int, peak: float, warmup: int, iters: int) -> float:
    """Linear warm-up, then half a cosine down to 0 (Sec. 4.2)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, iters - warmup)))


def sharded_adamw(groups: list[dict]) -> OSS:
    """AdamW, its state spread over the ranks (ZeRO). broadcast_fp16 would round the weights at every step."""
    optimizer = OSS(groups, torch.optim.AdamW, lr=0.0, weight_decay=WEIGHT_DECAY, broadcast_fp16=False)
    # When the state is put together it goes to others pickled. A pickled CUDA tensor comes back on the GPU
    # that it was on, where each rank would open a context of its own for it
    optimizer.optim.register_state_dict_post_hook(lambda _, state: on_host(state))
    return optimizer


def on_host(state: dict) -> dict:
    state = to_device(state, torch.device("cpu"))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # to_device does not wait
    return state


def minimize(loss: Tensor, optimizer: OSS, scaler: torch.amp.GradScaler, equal: bool = False) -> Tensor:
    """One step: backward, clip, update. Returns the gradient's norm before clipping, still on the device.

    equal: smaller gradients are brought to the norm at which larger ones are clipped
    """
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    # Not OSS.clip_grad_norm, which goes wrong when a head sits out a step; under DDP a rank has all gradients
    norm = nn.utils.clip_grad_norm_(trained, CLIP_GRAD)
    if equal:
        gradients = [p.grad for p in trained if p.grad is not None]
        torch._foreach_mul_(gradients, CLIP_GRAD / norm.clamp(1e-12, CLIP_GRAD))  # of nothing, nothing
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    # Under fp16 an overflow is no fault: the scaler has skipped that step
    return norm.nan_to_num(posinf=0) if scaler.is_enabled() else norm


# --- checkpoint


@dataclass
class Checkpoint:
    """OUT/last.pt: what trains, optimizer, scaler, step and options, as tensors and JSON values only.

    trained: by name; made_of: identifies the data, M and the heads; may_change: options that a resumption may
    change
    """

    out: Path
    args: argparse.Namespace
    trained: dict[str, Tensor]
    optimizer: OSS
    scaler: torch.amp.GradScaler
    made_of: dict
    may_change: set[str]

    def save(self, step: int) -> None:
        """Whole or not at all; the one before stays as OUT/previous.pt. All ranks must call it."""
        self.optimizer.consolidate_state_dict(recipient_rank=0)
        if dist.get_rank() == 0:
            state = {
                "step": step,
                "options": self.options(),
                "trained": {name: p.detach().cpu() for name, p in self.trained.items()},
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            last = self.out / "last.pt"
            try:
                with files.replacing(last) as part:
                    with open(part, "wb") as file:  # given a path, torch.save would hide the disk's error
                        torch.save(state, file)
                        file.flush()
                        os.fsync(file.fileno())  # before last.pt moves
                    if last.exists():
                        last.replace(self.out / "previous.pt")
            except OSError as error:
                raise OSError(
                    f"{error}, at step {step}. The last checkpoint is good: make room, then --resume"
                ) from error
        dist.barrier()

    def load(self) -> int:
        """Put everything back and return the step to go on with; 0 if there is no checkpoint yet.

        Raises ValueError if there are checkpoints, but none can be read, or listing the options that differ
        from the run's.
        """
        path, state, damaged = self.newest()
        if damaged and state is None:
            raise ValueError(
                f"--resume: {'; '.join(damaged)}. Remove what is damaged to start again at step 0"
            )
        if damaged:
            print(f"{damaged[0]}: going on from the one before it")
        if state is None:
            print(f"nothing to resume in {self.out}: starting at step 0")
            return 0
        now, then = self.options(), state["options"]
        names = [k for k in {**then, **now} if then.get(k) != now.get(k)]
        if names:
            shown = files.shown
            changed = "; ".join(f"{k} was {shown(then.get(k))}, is {shown(now.get(k))}" for k in names)
            raise ValueError(f"--resume {path}: changed: {changed}; put it back, or take a new --out")
        with torch.no_grad(), files.expecting(path, "a checkpoint of this run"):
            files.check(state["trained"], self.trained, f"{path} is not of this run")
            for name, p in self.trained.items():
                p.copy_(state["trained"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            for moments in self.optimizer.optim.state.values():
                moments["step"] = moments["step"].cpu()  # OSS put it on the GPU: AdamW would wait for it
            self.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def newest(self) -> tuple[Path | None, dict | None, list[str]]:
        """The newest checkpoint that can be read, what it holds, and what is damaged."""
        damaged = []
        for path in (self.out / name for name in CHECKPOINTS):
            try:
                with zipfile.ZipFile(path) as file:
                    if broken := file.testzip():  # torch.load reads past changed bytes
                        raise zipfile.BadZipFile(broken)
                state = torch.load(path, map_location="cpu", weights_only=True)
                if wrong := [key for key, kind in CONTENT.items() if type(state[key]) is not kind]:
                    raise TypeError(wrong)
                if state["step"] < 0:
                    raise ValueError(state["step"])
                return path, state, damaged
            except FileNotFoundError:
                continue
            except Exception as error:  # whatever a half-written file makes them raise
                damaged.append(f"{path} cannot be read ({type(error).__name__})")
        return None, None, damaged

    def options(self) -> dict:
        """What a resumption must not change. More ranks with smaller batches are the same run."""
        options = {k: v for k, v in vars(self.args).items() if k not in self.may_change}
        batch, world = options["batch"], dist.get_world_size()
        if isinstance(batch, dict):
            options["batch"] = {task: n * world for task, n in batch.items()}
        else:
            options["batch"] = batch * world
        return {**options, **self.made_of}


# --- log


class Log:
    """OUT/log.jsonl, and the progress bar with the moving average of each task's loss.

    Losses stay on the device until a line is due: no step waits.
    """

    def __init__(self, out: Path, first: int, iters: int, every: int):
        self.every, self.averages = every, {}
        self.pending: list[tuple] = []  # step, task, image ids, names, values
        self.skipped = self.images = 0
        self.waited, self.since = 0.0, time.perf_counter()
        self.path = out / "log.jsonl" if dist.get_rank() == 0 else None
        if self.path:
            out.mkdir(parents=True, exist_ok=True)
        if self.path and self.path.exists():  # lines after the checkpoint will be written again
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= first))
        hidden = self.path is None
        self.bar = tqdm(total=iters, initial=first, disable=hidden, dynamic_ncols=True, unit="step")

    def say(self, lines: list[str]) -> None:
        """Print, once for all ranks."""
        if self.path:
            print(*lines, sep="\n", flush=True)

    def next(self, stream: Iterator):
        """The next batch of a stream; how long it lets the step wait is noted."""
        start = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, step: int, task: str, y: list[dict], loss: Tensor, parts: dict, lr: float, save: bool):
        """Note a finished step (counted from 1); write a line when one is due, or `save` is about to happen.

        Raises FloatingPointError on every rank, naming step, task and images, if a loss or gradient was not
        finite.
        """
        values = {"loss": loss.detach(), **parts}
        ids = [t["image_id"] for t in y]
        self.pending.append((step, task, ids, list(values), torch.stack(list(values.values()))))
        self.skipped += sum(len(t.get("skipped", ())) for t in y)
        self.images += len(y)
        self.bar.update()
        if save or step % self.every == 0:
            self.write(lr)
            self.pending.clear()

    def write(self, lr: float) -> None:
        """The line of what is pending: the ranks' means, since their losses are each normalized over all."""
        flat = torch.cat([values for *_, values in self.pending])
        broken = torch.stack([~values.isfinite().all() for *_, values in self.pending]).to(flat.dtype)
        skipped = torch.tensor([self.skipped], device=flat.device, dtype=flat.dtype)
        reduced = torch.cat([flat, broken, skipped])
        dist.all_reduce(reduced)  # sums over the ranks, of which every one has run the same tasks
        *sums, skipped = reduced.tolist()
        for pending, anywhere, here in zip(self.pending, sums[len(flat) :], broken.tolist(), strict=True):
            if anywhere:
                step, task, images, *_ = pending
                where = f"images {images}" if here else "on another rank"
                raise FloatingPointError(
                    f"loss or gradient not finite at step {step}, task {task}, {where}. The last "
                    "checkpoint is good: lower --lr; if M overflows fp16, --backbone-dtype bf16"
                )
        if not self.path:
            return
        means, remaining = {}, iter(sums)
        for _, task, _, names, _ in self.pending:
            for name in names:
                means.setdefault(f"{task}/{name}", []).append(next(remaining) / dist.get_world_size())
        line = {"step": self.pending[-1][0], "lr": lr} | {name: sum(v) / len(v) for name, v in means.items()}
        if skipped:
            line["skipped_images"] = int(skipped)
        speed = self.speed(flat.device)
        with open(self.path, "a") as file:
            file.write(json.dumps(line | speed) + "\n")
        for name, losses in means.items():
            task, _, part = name.partition("/")
            for loss in losses if part == "loss" else ():  # over some 50 steps of its task
                self.averages[task] = 0.98 * self.averages.get(task, loss) + 0.02 * loss
        shown = {task: f"{loss:.3f}" for task, loss in self.averages.items()}
        self.bar.set_postfix(shown | {"images/s": f"{speed['images_per_second']:.3g}"})

    def speed(self, device: torch.device) -> dict:
        """Of the steps since the line before: seconds a step, the share of them that rank 0 waited for data,
        images/s over all ranks, and on a GPU the most memory that was ever taken, in GB."""
        now = time.perf_counter()
        seconds = now - self.since
        speed = {
            "seconds": round(seconds / len(self.pending), 4),
            "waiting": round(self.waited / seconds, 4),
            "images_per_second": round(self.images * dist.get_world_size() / seconds, 2),
        }
        if device.type == "cuda":
            speed["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        self.waited, self.images, self.since = 0.0, 0, now
        return speed
