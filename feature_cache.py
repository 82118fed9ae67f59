"""Features of the frozen M that are computed once and kept, under a name of all they depend on."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from backbone import Features
from data.stream import load
from files import BadImage
from ranks import Ranks, check_finite, to_device

MADE = 1  # count up when pictures or features are made in another way: older caches are then not used


@torch.no_grad()
def features(
    args, items, backbone, ranks: Ranks, variant: str, take: Callable, shape: tuple[int, ...]
) -> np.ndarray:
    """take(M(x)) of every item, (n, *shape) float32, memory-mapped, in args.cache.

    items: items[i] -> pixels, y with i as image_id; items.fingerprint tells pictures and order
    take: Features of B items -> (B, *shape)
    A file under its final name is complete: it is written under another and renamed.
    """
    shape = (len(items), *shape)
    made_of = {
        "made": MADE, "model": args.model, "weights": fingerprint(backbone.vit, variant), "shape": shape,
        "data": items.fingerprint, "size": args.size, "imagenet_norm": args.imagenet_norm,
        "computed": f"{ranks.dtype} on {ranks.device.type}",
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(args.cache) / f"{name}.npy"
    part = [None]  # the file in the making, None if there is nothing to do: rank 0 says
    if ranks.rank == 0 and not complete(path, shape):
        part = [path.with_suffix(f".{os.getpid()}.tmp")]
        reserve(part[0], shape)
    dist.broadcast_object_list(part)
    if part[0]:
        array = np.lib.format.open_memmap(part[0], "r+")
        share = range(ranks.rank, len(items), ranks.world)
        shares = [share[at : at + args.batch] for at in range(0, len(share), args.batch)]
        loaded = load(items, shares, backbone, ranks, args.workers)
        bar = dict(total=len(shares), disable=ranks.rank > 0, dynamic_ncols=True)
        for batch in tqdm(loaded, f"features {variant}", **bar):
            images, valid, y = to_device(batch, ranks.device)
            with ranks.autocast():
                f = take(backbone(images, valid))
            check_finite(f, y, ranks)
            array[[t["image_id"] for t in y]] = f.cpu().numpy()
        array.flush()
        dist.barrier()
        if ranks.rank == 0:
            part[0].replace(path)
            path.with_suffix(".json").write_text(json.dumps(made_of, indent=1))
        dist.barrier()
    return np.load(path, mmap_mode="r")


def of_stream(args, stream, backbone, ranks: Ranks) -> np.ndarray:
    """M's patch tokens of every image of a training stream, (n, D, H, W); a stream of fixed --size."""
    side = -(-args.size // backbone.patch)
    shape = (backbone.dim, side, side)
    return features(args, Rows(stream, backbone.patch), backbone, ranks, "", lambda f: f.grid, shape)


def look_up(kept: np.ndarray, stream, y: list[dict], ranks: Ranks) -> Features:
    """What M says of a batch; heads do not look at [CLS]."""
    at = np.searchsorted(stream.rows, [t["row"] for t in y])
    return Features(None, torch.from_numpy(kept[at]).to(ranks.device), None)  # grid (B, D, H, W)


class Rows(Dataset):
    """The images of a stream, each once, in the order of stream.rows."""

    def __init__(self, stream, patch: int):
        self.stream, self.patch = stream, patch
        self.fingerprint = f"{stream.task} {stream.fingerprint}"

    def __len__(self) -> int:
        return len(self.stream.rows)

    def __getitem__(self, i: int):
        try:
            image, target = self.stream.read(int(self.stream.rows[i]), self.patch)
        except BadImage as error:
            return error
        return image, {"image_id": i, "size": target["size"]}


def reserve(path: Path, shape: tuple[int, ...]) -> None:
    """An .npy of zeros that has its place on the disk: to be told of a full disk now, not by a SIGBUS later.

    Raises OSError with the size if there is no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    need, free = 4 * math.prod(shape), shutil.disk_usage(path.parent).free
    if free < need:
        has = f"the disk has {free / 1e9:.1f} GB"
        raise OSError(f"{path.parent}: features {shape} take {need / 1e9:.1f} GB, {has}: see --cache")
    try:
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        with open(path, "rb+") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path}: no room for features of {need / 1e9:.1f} GB: {error}") from error


def complete(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # absent, or cut off by a full disk
        return False
    return array.shape == shape and array.dtype == np.float32


def fingerprint(model: nn.Module, variant: str) -> str:
    """Of the weights in memory, wherever they came from; of dW and its scale too, where it is in use."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if variant == "after" or "lora_" not in name:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    scales = [layer.alpha / layer.rank for layer in model.modules() if hasattr(layer, "lora_A")]
    return digest.hexdigest() + (f" {scales}" if variant == "after" else "")
