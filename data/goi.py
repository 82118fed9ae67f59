"""Grounded object identification: pictures with one object pointed out by a red box, and its class.

    Records(path)        M3IT's coco-goi: train.jsonl, val.jsonl; a line each
                         {"input": "header\\nperson\\ndog", "image_str": BASE64, "outputs": "dog"}
    BoxedCoco(folder, split)   not M3IT: built from COCO's instances, one per image, with a red box around it

Both: data[i] -> pixels (3, h, w) uint8, {image_id: i, size}; labels (n,), names, notes, fingerprint, where(i)
M3IT's lines have no coordinates; its instructions speak of "the given image region": it must be marked in
the picture, in red as others who use these data say.
"""

import base64
import hashlib
import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from data.coco import read_instances
from files import BadImage, open_picture, read_picture, squash

NOT_A_CLASS = ("__background__", "N/A")
COCO_NAMES = [
    name for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"] if name not in NOT_A_CLASS
]  # the 80, in the order of their ids


class Records(Dataset):
    """A JSONL file by byte offsets: no more of it in memory than the line that is read.

    names: the label space; None: COCO's 80, or, if most lines name another class, all that the file names
    Lines that cannot be used are counted in notes, with their numbers; with `strict` they are refused.
    Raises ValueError if none can be used.
    """

    def __init__(self, path, size: tuple[int, int], names=None, strict=False, limit: int | None = None):
        self.path, self.size = Path(path), size
        lines, outputs, options, bad, digest = [], [], set(), {}, hashlib.sha256()
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    try:
                        record = parse(line)
                        lines.append((offset, len(line), number))
                        outputs.append(record["outputs"])
                        options |= set(record["options"])
                    except ValueError as error:
                        bad.setdefault(str(error), []).append(number)
                offset += len(line)
        if names is None:
            others = sum(name not in COCO_NAMES for name in outputs)
            names = sorted(options | set(outputs)) if 2 * others > len(outputs) else COCO_NAMES
        self.names, label_of = names, {name: label for label, name in enumerate(names)}
        usable = [k for k, name in enumerate(outputs) if name in label_of]
        if strangers := [lines[k][2] for k, name in enumerate(outputs) if name not in label_of]:
            bad[f"class outside the {len(names)}"] = strangers
        note = f"{path}: {len(usable)} records of {len(names)} classes"
        if bad:
            note += f"; left out: {'; '.join(_unused(why, bad[why]) for why in sorted(bad))}"
        self.notes = [note]
        if bad and strict:
            raise ValueError(f"--strict: {note}")
        if not usable:
            raise ValueError(f"{note}: nothing to use")
        usable = usable[:limit]
        self.lines = np.array([lines[k] for k in usable], np.int64)  # (n, 3): offset, length, line number
        self.labels = np.array([label_of[outputs[k]] for k in usable])
        digest.update(self.lines.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int):
        offset, length, number = self.lines[i].tolist()
        with open(self.path, "rb") as file:
            file.seek(offset)
            picture = base64.b64decode(json.loads(file.read(length))["image_str"])
        try:
            pixels = squash(open_picture(picture), self.size)
        except BadImage as error:
            return BadImage(f"{self.path}:{number}: image_str {error}")
        return pixels, {"image_id": i, "size": self.size}

    def where(self, i: int) -> dict:
        return {"line": int(self.lines[i, 2])}


def _unused(why: str, numbers: list[int]) -> str:
    more = ", ..." if len(numbers) > 3 else ""
    return f"{len(numbers)} {why} (line {', '.join(map(str, numbers[:3]))}{more})"


def parse(line: bytes) -> dict:
    """outputs and options of a record. Raises ValueError, saying what kind of unusable line it is."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError("not JSON") from error
    if not isinstance(record, dict) or not isinstance(record.get("outputs"), str):
        raise ValueError("without outputs")
    try:
        with Image.open(BytesIO(base64.b64decode(record["image_str"], validate=True))):
            pass  # the header alone: its pixels are decoded when they are needed
    except (KeyError, TypeError) as error:
        raise ValueError("without image_str") from error
    except Exception as error:  # decoders raise what they like
        raise ValueError("whose image_str is no picture") from error
    options = str(record.get("input", "")).split("\n")[1:]
    return {"outputs": record["outputs"].strip(), "options": [o.strip() for o in options if o.strip()]}


def _key(image_id: int | str) -> int:
    """A number to draw by, not negative: the id where it is one."""
    if isinstance(image_id, int) and image_id >= 0:
        return image_id
    return int.from_bytes(hashlib.sha256(str(image_id).encode()).digest()[:8], "little")


class BoxedCoco(Dataset):
    """One object of each image, drawn from the seed, in a red box of 3 px. Raises as read_instances does."""

    def __init__(self, folder, split: str, size: tuple[int, int], seed: int = 0, limit: int | None = None):
        data, self.size, self.folder = read_instances(folder, split), size, Path(folder) / split
        counts = np.diff(data.first)
        self.data, self.rows = data, np.flatnonzero(counts)[:limit]
        rows = self.rows
        if not len(rows):
            raise ValueError(f"{self.folder}: no image with an object")
        draws = [
            np.random.default_rng((seed, _key(data.ids[row].item()))).integers(counts[row]) for row in rows
        ]
        self.chosen = data.first[rows] + np.array(draws, np.int64)
        self.labels, self.names = data.labels[self.chosen], [c["name"] for c in data.categories]
        empty = f"{(counts == 0).sum()} images without an object left out"
        self.notes = [*data.notes, f"{split}: not M3IT: {len(rows)} boxes drawn into COCO's images; {empty}"]
        files = [(self.folder / data.names[row]).stat() for row in rows]
        stamps = np.array([(f.st_size, f.st_mtime_ns) for f in files], np.int64)
        arrays = (data.ids[rows], data.boxes_xyxy[self.chosen], self.labels, stamps)
        self.fingerprint = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        row, name = self.rows[i], self.data.names[self.rows[i]]
        try:
            pixels = read_picture(self.folder / name, tuple(self.data.sizes[row].tolist()))
        except BadImage as error:
            return error
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        ImageDraw.Draw(image).rectangle(self.where(i)["box_xyxy"], outline=(255, 0, 0), width=3)
        return squash(image, self.size), {"image_id": i, "size": self.size}

    def where(self, i: int) -> dict:
        box = self.data.boxes_xyxy[self.chosen[i]].round().astype(int).tolist()
        return {"file_name": self.data.names[self.rows[i]], "box_xyxy": box}
