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
from typing import NoReturn

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

IDS = "id", "question_id", "cocoid", "imgid", "image_id"  # what tells an item of a JSON file from the others
KINDS = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "an object"}
KINDS[bool] = "true or false"
FIELDS = {  # of the headers of our files
    "LoRA": {"rank": (int,), "alpha": (int, float), "targets": (list,)},
    "head": {"task": (str,), "config": (dict,)},
}

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


def read_json(path: str | Path):
    """What a JSON file holds; a byte-order mark is no part of it. Raises FileNotFoundError, ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; download it again") from error


@contextmanager
def expecting(path: str | Path, what: str) -> Iterator[None]:
    """Whatever is not as it is read within is one line: FILE is not `what`."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is not {what}: {type(error).__name__}: {error}") from error


class Items:
    """A list of objects in a JSON file, read by columns; what is amiss is told by file, place and id.

    name: of the list; replaced: how many texts had half a character (a lone surrogate), now a ?
    """

    def __init__(self, path: str | Path, items, name: str):
        self.path, self.items, self.name, self.replaced = path, items, name, 0
        if type(items) is not list:
            raise ValueError(f"{path}: no list called {name}")
        if other := [i for i, item in enumerate(items) if type(item) is not dict]:
            self.refuse(other[0], f"must be an object, got {shown(items[other[0]])}")

    def where(self, i: int) -> str:
        item = self.items[i] if type(self.items[i]) is dict else {}
        names = (f" ({key} {shown(item[key])})" for key in IDS if key in item)
        return f"{self.name}[{i}] of {len(self.items)}{next(names, '')}"

    def refuse(self, i: int, why: str) -> NoReturn:
        raise ValueError(f"{self.path}: {self.where(i)}: {why}")

    def column(self, key: str, *types: type, default=None) -> list:
        """A field of every item. Raises ValueError where it is missing or of another type.

        default: what stands where it is missing or null
        """
        values, good = [item.get(key) for item in self.items], set(types)
        if default is not None:
            values = [default if value is None else value for value in values]
        if not good.issuperset(map(type, values)):
            i = next(i for i, value in enumerate(values) if type(value) not in good)
            if key not in self.items[i]:
                self.refuse(i, f"no field {key}")
            expected = " or ".join(KINDS[kind] for kind in types if not (kind is int and float in types))
            self.refuse(i, f"{key} must be {expected}, got {shown(values[i])}")
        return [self.whole(value) for value in values] if str in types else values

    def floats(self, key: str, values: list, places=None) -> np.ndarray:
        """The values of a field as float64; places: whose they are. Raises ValueError for one too large."""
        try:
            return np.array(values, np.float64)
        except OverflowError:
            large = (any(abs(v) > 1e308 for v in np.ravel(np.array(value, object))) for value in values)
            i = list(large).index(True)
            self.refuse(i if places is None else int(places[i]), f"{key} holds a number that is too large")

    def whole(self, text):
        """A text in which half characters, which no file can hold, are replaced."""
        if type(text) is not str or text.isascii():
            return text
        mended = text.encode("utf-8", "replace").decode()
        self.replaced += mended != text
        return mended

    def ids(self, key: str = "id") -> list[int] | list[str]:
        """Ids, all whole numbers or all text. Raises ValueError if one is there twice."""
        ids = self.column(key, int, str)
        for i, value in enumerate(ids):
            if type(value) is not type(ids[0]):
                self.refuse(
                    i, f"{key} {shown(value)} beside {shown(ids[0])}: write all as numbers, or all as text"
                )
            if type(value) is int and not -(2**63) <= value < 2**63:
                self.refuse(i, f"{key} {shown(value)} has more than 64 bits: write the ids as text")
        if len(set(ids)) < len(ids):
            seen = set()
            i = next(i for i, value in enumerate(ids) if value in seen or seen.add(value))
            self.refuse(i, f"{key} {shown(ids[i])} is there before, at {self.where(ids.index(ids[i]))}")
        return ids

    def refer(self, key: str, place_of: dict, what: str) -> list[int]:
        """Where each item's reference leads; place_of: {id: place}. Raises ValueError for an unknown id."""
        ids = self.column(key, int, str)
        places = [place_of.get(value, -1) for value in ids]
        if -1 in places:
            i = places.index(-1)
            known = f"{shown(next(iter(place_of)))} and the like" if place_of else "none"
            self.refuse(i, f"unknown {what} id {shown(ids[i])} (known: {known})")
        return places


def shown(value) -> str:
    """A value of the user's in a message: in quotes if it is text, on one line, not all of a long one."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_header(path: str | Path, kind: str) -> dict:
    """The JSON header of a file that `save` wrote; kind: LoRA or head.

    Raises FileNotFoundError, or ValueError if the file is not one of ours or the header lacks a field.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} file at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[kind.lower()])
    except Exception as error:
        raise ValueError(f"{path}: not one of our {kind} files ({type(error).__name__}: {error})") from error
    fields = Items(path, [header], f"{kind} header")
    for key, types in FIELDS[kind].items():
        fields.column(key, *types)
    return header


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ValueError if one cannot be read or holds NaN or infinity."""
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if broken := [k for k, v in state.items() if v.is_floating_point() and not v.float().isfinite().all()]:
        raise ValueError(f"{path}: {shown(broken[0])} is not finite, of {len(broken)} such tensors")
    return state


def check(state: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raises ValueError with the first few names, shapes and kinds of number that are not those expected."""
    wrong = [f"missing {k}" for k in expected if k not in state]
    wrong += [f"unexpected {shown(k)}" for k in state if k not in expected]
    for k, v in ((k, v) for k, v in state.items() if k in expected):
        if v.shape != expected[k].shape:
            wrong.append(f"{k} is {tuple(v.shape)}, expected {tuple(expected[k].shape)}")
        elif v.is_floating_point() != expected[k].is_floating_point():
            wrong.append(f"{k} holds {v.dtype}, expected {expected[k].dtype}")
    if wrong:
        more = [f"and {len(wrong) - 4} more"] if len(wrong) > 4 else []
        raise ValueError(f"{what}, {len(wrong)} tensors: {'; '.join([*wrong[:4], *more])}")


def read_head(path: str | Path, Head: type[nn.Module], config: dict, dim: int) -> nn.Module:
    """Head(**config) for features of width `dim`, with the file's weights. Raises ValueError."""
    if config.get("dim") != dim:
        raise ValueError(f"{path} was made for a backbone of width {shown(config.get('dim'))}, not {dim}")
    state = read_tensors(path)
    most = max((n for value in state.values() for n in value.shape), default=0)
    try:
        numbers = {
            k: v if type(v) is list else [v] for k, v in config.items() if k != "points"
        }  # of the loss
        sizes = {k: v for k, v in numbers.items() if {int}.issuperset(map(type, v))}
        if wrong := [k for k, v in sizes.items() if not all(0 < n <= most for n in v)]:
            raise ValueError(f"{wrong[0]} {shown(config[wrong[0]])}, of its tensors no side is above {most}")
        head = Head(**config)
    except Exception as error:  # whatever a size that is none makes torch raise
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"{path}: its header describes no {Head.__name__} ({why})") from error
    check(state, head.state_dict(), f"{path} is not the {Head.__name__} of its header")
    head.load_state_dict(state)
    return head


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


# --- pictures in
#
# One reader for every script: 8 bits of RGB. 16-bit grey and floats in 0..1 are scaled; what is transparent
# lies on white; of an animation it is the first frame. The pixels are those that are stored: orientations of
# EXIF's are not applied, as COCO's annotations and sizes are for pixels as they are stored.

MOST_16, ORIENTATION = 65535, 0x0112  # EXIF's tag


class BadImage(ValueError):
    """A file that is not the picture that it should be."""


def open_picture(source: str | Path | bytes | np.ndarray) -> Image.Image:
    """A picture in RGB: a file, the bytes of one, or (h, w, 3) uint8. Raises BadImage, without the place."""
    try:
        if isinstance(source, np.ndarray):
            return Image.fromarray(source)
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.mode == "F" or image.mode[0] == "I":
                return Image.fromarray(_to_8_bits(image)).convert("RGB")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # decoders raise what they like
        raise BadImage(f"cannot be decoded ({str(error) or type(error).__name__})") from error


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """(h, w) uint8 of 16-bit or float grey, scaled by its range. Raises ValueError for what is beyond."""
    values = np.asarray(image, np.float64)
    low, high = values.min(), values.max()
    most = 1 if image.mode == "F" else MOST_16
    # 32 bits, of which who knows how many are used
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError(f"32-bit whole numbers from {low:g} to {high:g}: store it with 8 or 16 bits")
    if not (low >= 0 and high <= most):
        raise ValueError(f"numbers from {low:g} to {high:g}, expected 0 to {most}: store it in 8 or 16 bits")
    return (values * (255 / most) + 0.5).astype(np.uint8)


def read_picture(path: str | Path, size: tuple[int, int] = (0, 0)) -> Tensor:
    """(3, h, w) uint8 RGB. Raises BadImage for a file that is truncated, unreadable or not of that size.

    size: h, w; or 0, 0 where the annotations do not tell
    """
    try:
        image = open_picture(path)
    except BadImage as error:
        raise BadImage(f"{path} {error}") from error
    if any(size) and (image.height, image.width) != tuple(size):
        found, annotated = f"{image.width} x {image.height}", f"{size[1]} x {size[0]}"
        with Image.open(path) as stored:
            turned = stored.getexif().get(ORIENTATION, 1)
        why = f" (EXIF orientation {turned}: they are for the turned picture; turn its pixels)"
        why = why if turned > 4 and image.size == tuple(size) else ""
        raise BadImage(f"{path} is {found} pixels, its annotations say {annotated}{why}")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, h, w)


def squash(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8 of an RGB picture, bicubic to size (h, w) whatever its shape: nothing is cut off."""
    pixels = np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)
