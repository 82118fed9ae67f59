"""Files in and out: written whole or not at all; safetensors with a JSON header; pictures and JSON read in.

with files.replacing("card.md") as part: part.write_text(text)
files.save(tensors, "lora.safetensors", lora={"rank": 64})
files.read_header("lora.safetensors", "LoRA")
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# --- out


@contextmanager
def replacing(path: str | Path, need: int = 0) -> Iterator[Path]:
    """A file or folder to write in the place of `path`, which takes its place when all of it is on the disk.

    need: bytes, if known before. Raises OSError, leaving `path` as it was, if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(path.parent).free) < need:
        needs = f"needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB"
        raise OSError(f"{path}: {needs}: nothing written")
    part = path.with_name(f"{path.name}.tmp")
    try:
        yield part
        if part.is_file():
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer hides the disk's error
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: not written: {cause}") from error
    finally:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def write(path: str | Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    write(path, json.dumps(content, indent=1, default=str))


def save(tensors: dict[str, Tensor], path: str | Path, **header: dict) -> None:
    """Tensors as safetensors, on whatever device they are; header: lora={...} or head={...}, or nothing."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {kind: json.dumps(content) for kind, content in header.items()} or {"format": "pt"}
    with replacing(path, sum(value.nbytes for value in tensors.values())) as part:
        save_file(tensors, part, metadata=metadata)


# --- in


def read_header(path: str | Path, kind: str) -> dict:
    """The JSON header of a file that `save` wrote; kind: LoRA or head.

    Raises FileNotFoundError, or ValueError if the file is not one of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} file at {path}")
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[kind.lower()])
    except Exception as error:
        raise ValueError(f"{path}: not one of our {kind} files ({type(error).__name__}: {error})") from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def sha256(path: str | Path) -> str:
    stat = Path(path).stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: str, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(path: str | Path) -> str:
    """Tells weights apart in a second, however large: a hash of the size and of 256 pieces of 64 kB.

    path: a file, or a folder of .safetensors; what is no file (`random`) is its own fingerprint
    """
    path, piece = Path(path), 1 << 16
    digest = hashlib.sha256()
    weights = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size}".encode())
        with open(file, "rb") as content:
            for at in range(0, size, max(piece, size // 256)):
                content.seek(at)
                digest.update(content.read(piece))
    return digest.hexdigest()[:16] if weights else str(path)


class BadImage(ValueError):
    """A file that is not the picture that it should be."""


def open_picture(source: str | Path | bytes | np.ndarray) -> Image.Image:
    """A picture in RGB: a file, the bytes of one, or (h, w, 3) uint8. Raises BadImage, without the place."""
    try:
        if isinstance(source, np.ndarray):
            return Image.fromarray(source)
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"cannot be decoded ({error})") from error


def read_picture(path: str | Path, size: tuple[int, int] = (0, 0)) -> Tensor:
    """(3, h, w) uint8 RGB. Raises BadImage for a file that is truncated, unreadable or not of that size.

    size: h, w; or 0, 0 where the annotations do not tell
    """
    try:
        image = open_picture(path)
    except BadImage as error:
        raise BadImage(f"{path} {error}: restore it, or use --skip-bad-images") from error
    if any(size) and (image.height, image.width) != tuple(size):
        found, annotated = f"{image.width} x {image.height}", f"{size[1]} x {size[0]}"
        raise BadImage(f"{path} is {found} pixels, its annotations say {annotated}")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, h, w)


def squash(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8 of an RGB picture, bicubic to size (h, w) whatever its shape: nothing is cut off."""
    pixels = np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)
