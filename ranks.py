"""The processes of a run: started, addressed, and left cleanly.

`python script.py` runs the same code as `torchrun`, in a group of one. Beside training.py, nothing else knows
of processes but through these functions.
"""

import argparse
import gc
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

SEEDS = 2**63  # --seed is below
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ranks:
    """This process: its number, how many there are, its device, and the type the frozen ViT computes in."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    def seed(self, seed: int, step: int) -> None:
        """What follows depends on these alone. Call it after fetching data: a new loader draws numbers."""
        # Hashed, as a CPU's generator looks at 32 bits alone
        place = hashlib.sha256(f"{seed} {step * self.world + self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(place[:8], "little"))

    def free_memory(self) -> float:
        """Bytes of this rank's GPU that a step may take, less a part for fragments; none on a CPU."""
        return 0.85 * torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0.0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, *lines: str) -> None:
        """Print, once for all ranks."""
        if self.rank == 0 and lines:
            print(*lines, sep="\n", flush=True)


def add_process_options(p: argparse.ArgumentParser) -> None:
    """Of every script that starts ranks."""
    add = p.add_argument_group("processes").add_argument
    dtypes = "type of the frozen models (auto: fp16 on GPUs, fp32 on CPUs)"
    add("--backbone-dtype", choices=["auto", *DTYPES], default="auto", help=dtypes)
    add("--workers", type=int, help="loader processes per rank and task (0 = none; default: by the cores)")
    add("--seed", type=int, default=0, help="of all that is drawn: initialization, data order, augmentation")


def loader_processes(tasks: int = 1) -> int:
    """What --workers is if it is not given: two a task, fewer where this machine's ranks have fewer cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(2, cores // (tasks * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))


def check_process_options(args: argparse.Namespace, tasks: int = 1) -> None:
    """Fill in the default of --workers. Raises ValueError."""
    if args.workers is None:
        args.workers = loader_processes(tasks)
    if args.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {args.workers}")
    if not 0 <= args.seed < SEEDS:
        raise ValueError(f"--seed must be at least 0 and below 2^63, got {args.seed}")


def refuse_unused(args: argparse.Namespace, p: argparse.ArgumentParser, names: str, why: str) -> None:
    """Raises ValueError if one of the options `names` is given that has no effect, and why."""
    for name in names.split():
        if getattr(args, name) != p.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect {why}")


def start(args: argparse.Namespace, options: argparse.ArgumentParser) -> Ranks:
    """Join the process group that torchrun describes, or make one of one; say what runs.

    options: the parser of args, for its groups: one a line
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # the heads' fp32 matrix products may use TF32
        # Sums of 16-bit products stay in fp32 to the end: dW would be lost in partial sums that are rounded
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    dtype = args.backbone_dtype
    if dtype == "auto":
        dtype = "fp16" if cuda else "fp32"  # not bf16: see PAPER.md
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, DTYPES[dtype])
    made_by = provenance()
    ranks.say(
        f"{made_by['command']} | commit {made_by['commit']}",
        " ".join(f"{name} {number}" for name, number in made_by["versions"].items()),
        f"{ranks.world} x {torch.cuda.get_device_name(device) if cuda else 'cpu'}, backbone in {dtype}",
        *options_by_group(args, options),
    )
    return ranks


def options_by_group(args: argparse.Namespace, options: argparse.ArgumentParser) -> list[str]:
    """A line `group: name=value ...` for each of argparse's groups of options, and one for all others."""
    left, lines = dict(vars(args)), []
    for group in options._action_groups:  # argparse has no public name for them
        names = [action.dest for action in group._group_actions if action.dest in left]
        values = " ".join(f"{name}={left.pop(name)}" for name in names)
        lines += [f"{group.title}: {values}"] if values else []
    rest = " ".join(f"{name}={value}" for name, value in left.items())
    return lines + ([f"also: {rest}"] if rest else [])


def provenance() -> dict:
    """What a result depends on beside its options: the command, this code's commit, versions."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here, as in slim containers
        commit = ""
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "fairscale")}
    versions = {"python": platform.python_version(), **versions, "torch": torch.__version__}
    return {"command": shlex.join(sys.argv), "commit": commit or "unknown", "versions": versions}


def launch(main: Callable[[], None]) -> None:
    """Run a script's main and leave the group cleanly. The user's errors are one line and exit code 2.

    A rank with an error leaves at once, without a word to the others, which may be waiting for it in a
    collective. With gloo that fails then, as the connection is closed. With NCCL they go on waiting for their
    GPUs, but torchrun sees a rank end and sends the others SIGTERM, which ends them wherever they wait: no
    watchdog is needed. destroy_process_group after an error would wait for collectives that never end.
    """
    code, line = 0, None
    try:
        main()  # its DDP wrappers go when it returns: gloo can abort at exit if they outlive the group
        if dist.is_initialized():
            dist.barrier()
    except KeyboardInterrupt:
        code, line = 130, "interrupted; if the script has --resume, that goes on from what is saved"
    except Exception as error:
        code, line = 2, users_error(error)
        if line is None:
            leave(traceback.format_exc())
            raise
    finally:
        if line:
            line = f"{Path(sys.argv[0]).name}: {line}"
            leave(line, code)
            print(line, file=sys.stderr, flush=True)
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


def users_error(error: Exception) -> str | None:
    """The line to say if it is no fault of the code: raised by our own code, or a process that has ended."""
    if isinstance(error, ValueError | OSError | FloatingPointError):
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(where).is_relative_to(Path(__file__).parent) and ".venv" not in where
        return str(error) if ours else None
    if "DataLoader worker" in str(error):  # torch raises it wherever the script happens to be
        why = "for lack of memory, or as a file brought a library down: --workers 0 shows where"
        return f"a loader process died, {why}: {error}"
    if isinstance(error, RuntimeError) and re.search("Connection (closed|reset) by peer", str(error)):
        return "another rank has ended: see what it said"
    return None


def leave(words: str, code: int = 1) -> None:
    """End this process, if there are others, now: what Python does at exit could wait for them."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        print(words, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def to_device(item, device: torch.device):
    """Every tensor in nested lists, tuples and dicts, without waiting for the copy."""
    if isinstance(item, Tensor):
        return item.to(device, non_blocking=True)
    if isinstance(item, dict):
        return {k: to_device(v, device) for k, v in item.items()}
    return type(item)(to_device(v, device) for v in item) if isinstance(item, list | tuple) else item


def check_finite(f: Tensor, y: list[dict], ranks: Ranks) -> None:
    """Features that are not finite are never scored.

    f: (B, ...), or (2 B, ...) with mirrored crops behind; y: B dicts with image_id
    Raises FloatingPointError naming the images, the type and the cure.
    """
    finite = f.isfinite().flatten(1).all(1).view(-1, len(y)).all(0).tolist()  # (B,)
    if bad := [str(t["image_id"]) for t, good in zip(y, finite, strict=True) if not good]:
        raise FloatingPointError(
            f"M's features of {len(bad)} of {len(y)} images are not finite in {ranks.dtype} "
            f"({', '.join(bad[:3])}): try --backbone-dtype bf16 or fp32, or another LoRA"
        )


def gather(mine: dict, everywhere: bool = True) -> dict:
    """Every rank's {item: answer} together, in the items' order, on every rank or on the first alone."""
    parts = [None] * dist.get_world_size()
    if everywhere:
        dist.all_gather_object(parts, mine)
    else:
        dist.gather_object(mine, parts if dist.get_rank() == 0 else None)
        if dist.get_rank() > 0:
            return {}
    joined = {item: answer for part in parts for item, answer in part.items()}
    assert len(joined) == sum(map(len, parts)), "an item was answered on two ranks"
    return dict(sorted(joined.items()))


def mean_over_ranks(values: list[float], device: torch.device) -> Tensor:
    """The average of each value over the ranks, so that losses are normalized by what all of them hold."""
    mean = torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean
