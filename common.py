"""What both stages need and neither is about: options, ranks, the sharded optimizer, checkpoints, the log.

Everything that knows about processes is here. `python script.py` runs the same code as a group of one.
Gradients are averaged by torch's DDP; the optimizer state is sharded by fairscale's OSS (ZeRO, Sec. 4.2).
"""

import argparse
import gc
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import traceback
import zipfile
from dataclasses import dataclass
from pathlib import Path

import fairscale
import timm
import torch
import torch.distributed as dist
import torchvision
from fairscale.optim.oss import OSS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

CLIP_GRAD = 0.1  # L2 norm over all trained parameters; not in the paper; the authors' release
WEIGHT_DECAY = 1e-4  # the authors' release
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Options that may differ between a run and its resumption
MAY_CHANGE = {"out", "resume", "coco", "captions", "workers", "log_every", "save_every", "exclude_images"}
MAY_CHANGE |= {"skip_bad_images"}  # what stopped a run is passed over when it goes on
MAY_CHANGE |= {"checkpoint_blocks"}  # the same numbers, bit for bit
MAY_CHANGE |= {"train", "test", "limit"}  # of eval_ocr.py


# --- options


def add_training_options(p: argparse.ArgumentParser) -> None:
    """The options that both stages share."""
    add = p.add_argument
    add("--model", default="eva_g", help="eva_g, eva_e (Table 2), eva_mini, or the name of any timm ViT")
    add(
        "--weights",
        help="a file, `pretrained` (timm downloads), `random` (default: weights/MODEL.safetensors)",
    )
    add("--coco", default="coco", help="folder that holds annotations/ and train2017/")
    add("--split", default="train2017", help="which of its images and annotations")
    add("--warmup", type=int, default=2000, help="steps of linear warm-up (Sec. 4.2: 2000; 0 = off)")
    add("--seed", type=int, default=0, help="of the initialization, the data order and the augmentation")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    captions = (
        "captioning: a Karpathy dataset_coco.json (its train and restval; default: captions_SPLIT.json)"
    )
    add("--captions", metavar="FILE", help=captions)
    add("--min-count", type=int, default=6, help="captioning: how often a word must occur (the release: 6)")
    add("--workers", type=int, default=4, help="loader processes per rank and task (0 = none)")
    dtypes = (
        "type of the frozen ViT (auto: bf16 on GPUs that have it, else fp16; CPU: fp32); what trains is fp32"
    )
    add("--backbone-dtype", choices=["auto", *DTYPES], default="auto", help=dtypes)
    compiled = "torch.compile the ViT's blocks: some minutes at first, and other roundings of the same sums"
    add("--compile", action="store_true", help=compiled)
    add("--no-cls", action="store_true", help="no [CLS] in the sequence (the authors' release)")
    add("--imagenet-norm", action="store_true", help="ImageNet's mean and std (the release), not the model's")
    add("--exclude-images", metavar="FILE", help="ids to leave out, or a Karpathy JSON (its test and val)")
    add(
        "--image-scale", type=float, default=1.0, help="times the release's sizes (1: detection up to 672 px)"
    )
    add("--data-fraction", type=float, default=1.0, help="train on this part of the images (Table 10)")
    add("--skip-bad-images", action="store_true", help="count undecodable images and take the next one")


def check_training_options(args: argparse.Namespace) -> None:
    """Refuse impossible values and missing files before anything is loaded; fill in the default weights."""
    leasts = dict(iters=1, warmup=0, seed=0, save_every=1, log_every=1, workers=0, min_count=1)
    for name, least in leasts.items():
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
            )
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise ValueError(f"--lr must be positive, got {args.lr}")
    if not 0 < args.data_fraction <= 1:
        raise ValueError(f"--data-fraction must be in (0, 1], got {args.data_fraction}")
    if not 0 < args.image_scale <= 2:
        raise ValueError(f"--image-scale must be in (0, 2], got {args.image_scale}")
    args.weights = args.weights or f"weights/{args.model}.safetensors"
    check_weights(args.weights)
    if args.exclude_images and not Path(args.exclude_images).is_file():
        raise FileNotFoundError(f"--exclude-images {args.exclude_images}: no such file")
    if not args.resume and (Path(args.out) / "last.pt").exists():
        raise ValueError(f"--out {args.out} holds a run: pass --resume to go on with it, or another --out")


def check_weights(weights: str) -> None:
    if weights not in ("random", "pretrained") and not Path(weights).exists():
        raise FileNotFoundError(
            f"no backbone weights at {weights}: pass --weights FILE, or `pretrained` (timm downloads)"
        )


def features_of(args: argparse.Namespace) -> dict:
    """The options that decide which features a head or LoRA sees; kept in their files."""
    return {"backbone": args.model, "no_cls": args.no_cls, "imagenet_norm": args.imagenet_norm}


# --- ranks


@dataclass(frozen=True)
class Ranks:
    """This process: its number, how many there are, its device, and the type the frozen ViT computes in."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    def seed(self, seed: int, step: int) -> None:
        """What follows depends on these alone. Call it after fetching data: a new loader draws numbers."""
        torch.manual_seed((seed << 40) + step * self.world + self.rank)

    def free_memory(self) -> float:
        """Bytes of this rank's GPU that a step may take, less a part for fragments; none on a CPU."""
        return 0.85 * torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0.0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def start(args: argparse.Namespace) -> Ranks:
    """Join the process group that torchrun describes, or make one of one; say what runs."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # the heads' fp32 matrix products may use TF32
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    dtype = args.backbone_dtype
    if dtype == "auto":
        half = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        dtype = half if cuda else "fp32"
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, DTYPES[dtype])
    if ranks.rank == 0:
        told = provenance()
        print(told["command"], f"| commit {told['commit']}")
        print(*(f"{name} {version}" for name, version in told["versions"].items()))
        print(f"{ranks.world} x {torch.cuda.get_device_name(device) if cuda else 'cpu'}, backbone in {dtype}")
        print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    return ranks


def provenance() -> dict:
    """What a result depends on beside its options: the command, this code's commit, versions."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, timm, fairscale)}
    versions = {"python": platform.python_version(), **versions}
    return {"command": shlex.join(sys.argv), "commit": commit or "unknown", "versions": versions}


def launch(main) -> None:
    """Run a script's main and leave the group cleanly. The user's errors are one line and exit code 2."""
    code = 1
    try:
        main()  # its DDP wrappers go when it returns: gloo can abort at exit if they outlive the group
        if dist.is_initialized():
            dist.barrier()
        code = 0
    except (ValueError, OSError, FloatingPointError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if not Path(where).is_relative_to(Path(__file__).parent) or ".venv" in where:
            raise
        code = 2
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch raises it wherever the script happens to be
            raise
        code = 2
        told = "a loader process died, perhaps for lack of memory (see --workers)"
        print(f"{Path(sys.argv[0]).name}: {told}: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
        told = "interrupted; if the script has --resume, that goes on from what is saved"
        print(f"{Path(sys.argv[0]).name}: {told}", file=sys.stderr, flush=True)
    finally:
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


def to_device(item, device: torch.device):
    """Every tensor in nested lists, tuples and dicts, without waiting for the copy."""
    if isinstance(item, Tensor):
        return item.to(device, non_blocking=True)
    if isinstance(item, dict):
        return {k: to_device(v, device) for k, v in item.items()}
    return type(item)(to_device(v, device) for v in item) if isinstance(item, list | tuple) else item


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
    return OSS(groups, torch.optim.AdamW, lr=0.0, weight_decay=WEIGHT_DECAY, broadcast_fp16=False)


def minimize(loss: Tensor, optimizer: OSS, scaler: torch.amp.GradScaler) -> Tensor:
    """One step: backward, clip, update. Returns the gradient's norm before clipping, still on the device."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    # Not OSS.clip_grad_norm, which goes wrong when a head sits out a step; under DDP a rank has all gradients
    norm = nn.utils.clip_grad_norm_(trained, CLIP_GRAD)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    # Under fp16 an overflow is no fault: the scaler has skipped that step
    return norm.nan_to_num(posinf=0) if scaler.is_enabled() else norm


# --- checkpoint


@dataclass
class Checkpoint:
    """OUT/last.pt: what trains, optimizer, scaler, step and options, as tensors and JSON values only.

    trained: by name; data: identifies the training data
    """

    out: Path
    args: argparse.Namespace
    trained: dict[str, Tensor]
    optimizer: OSS
    scaler: torch.amp.GradScaler
    data: str | dict

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
            part, last, previous = (self.out / name for name in ("last.pt.tmp", "last.pt", "previous.pt"))
            try:
                with open(part, "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, RuntimeError) as error:  # torch's writer puts its own error over a full disk's
                part.unlink(missing_ok=True)
                cause = error if isinstance(error, OSError) else error.__context__ or error
                raise OSError(
                    f"{part} cannot be written at step {step} ({cause}). "
                    "The last checkpoint is good: make room, then --resume"
                ) from error
            if last.exists():
                last.replace(previous)
            part.replace(last)
        dist.barrier()

    def load(self) -> int:
        """Put everything back and return the step to go on with; 0 if there is no checkpoint yet.

        Raises ValueError if there are checkpoints, but none can be read, or listing the options that differ
        from the run's.
        """
        state, damaged = None, []
        for path in (self.out / "last.pt", self.out / "previous.pt"):
            try:
                with zipfile.ZipFile(path) as file:
                    if broken := file.testzip():  # torch.load reads past changed bytes
                        raise zipfile.BadZipFile(broken)
                state = torch.load(path, map_location="cpu", weights_only=True)
                break
            except FileNotFoundError:
                continue
            except Exception as error:  # whatever a half-written file makes them raise
                damaged.append(f"{path} cannot be read ({type(error).__name__})")
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
        changed = [
            f"{k} was {then.get(k)}, is {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k)
        ]
        if changed:
            raise ValueError(
                f"--resume {path}: changed: {'; '.join(changed)}; put it back, or take a new --out"
            )
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for moments in self.optimizer.optim.state.values():
            moments["step"] = moments["step"].cpu()  # OSS put it on the GPU, where AdamW would wait for it
        self.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def options(self) -> dict:
        """What a resumption must not change. More ranks with smaller batches are the same run."""
        options = {k: v for k, v in vars(self.args).items() if k not in MAY_CHANGE}
        batch, world = options["batch"], dist.get_world_size()
        options["batch"] = (
            {k: v * world for k, v in batch.items()} if isinstance(batch, dict) else batch * world
        )
        return {**options, "data": self.data}


# --- log


class Log:
    """OUT/log.jsonl, and the progress bar with the moving average of each task's loss.

    Losses stay on the device until a line is due: no step waits.
    """

    def __init__(self, out: Path, first: int, iters: int, every: int):
        self.every, self.pending, self.skipped, self.averages = every, [], 0, {}
        self.path = out / "log.jsonl" if dist.get_rank() == 0 else None
        if self.path:
            out.mkdir(parents=True, exist_ok=True)
        if self.path and self.path.exists():  # lines after the checkpoint will be written again
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= first))
        self.iters, self.bar = iters, None

    def say(self, lines: list[str]) -> None:
        """Print, once for all ranks."""
        if self.path:
            print(*lines, sep="\n", flush=True)

    def add(self, step: int, task: str, y: list[dict], loss: Tensor, parts: dict, lr: float, save: bool):
        """Note a finished step (counted from 1); write a line when one is due, or `save` is about to happen.

        Raises FloatingPointError on every rank, naming step, task and images, if a loss or gradient was not
        finite.
        """
        values = {"loss": loss.detach(), **parts}
        self.pending.append(
            (step, task, [t["image_id"] for t in y], list(values), torch.stack(list(values.values())))
        )
        self.skipped += sum(len(t.get("skipped", ())) for t in y)
        if self.bar is None:
            self.bar = tqdm(total=self.iters, initial=step - 1, disable=self.path is None, dynamic_ncols=True)
        self.bar.update()
        if not (save or step % self.every == 0):
            return
        flat = torch.cat([values for *_, values in self.pending])
        broken = torch.stack([~values.isfinite().all() for *_, values in self.pending]).to(flat.dtype)
        skipped = torch.tensor([self.skipped], device=flat.device, dtype=flat.dtype)
        reduced = torch.cat([flat, broken, skipped])
        dist.all_reduce(reduced)  # sums over the ranks, of which every one has run the same tasks
        *sums, skipped = reduced.tolist()
        broken_anywhere, broken_here = sums[len(flat) :], broken.tolist()
        broken = zip(self.pending, broken_anywhere, broken_here, strict=True)
        for (at, task_at, images, *_), anywhere, here in broken:
            if anywhere:
                where = f"images {images}" if here else "on another rank"
                raise FloatingPointError(
                    f"loss or gradient not finite at step {at}, task {task_at}, {where}. The last "
                    "checkpoint is good: lower --lr"
                )
        means, remaining = {}, iter(sums)
        for _, task_at, _, names, _ in self.pending:
            for name in names:
                means.setdefault(f"{task_at}/{name}", []).append(next(remaining) / dist.get_world_size())
        line = {"step": step, "lr": lr} | {name: sum(v) / len(v) for name, v in means.items()}
        if skipped:
            line["skipped_images"] = int(skipped)
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            for name, losses in means.items():
                task, _, part = name.partition("/")
                for loss in losses if part == "loss" else ():  # over some 50 steps of its task
                    self.averages[task] = 0.98 * self.averages.get(task, loss) + 0.02 * loss
            self.bar.set_postfix({task: f"{loss:.3f}" for task, loss in self.averages.items()})
        self.pending.clear()
