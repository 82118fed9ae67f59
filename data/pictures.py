"""Any list of image files: found by name, transformed, those that cannot be read told apart."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from files import BadImage, open_picture

COCO_FOLDERS = ("", "val2014", "train2014", "val2017", "train2017")


class Pictures(Dataset):
    """(i, the transformed image), or (i, a line that says why image i cannot be read)."""

    def __init__(self, images: list[str] | np.ndarray, transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[int, Tensor | str]:
        try:
            return i, self.transform(open_picture(self.images[i]))
        except BadImage as error:
            cause = error.__cause__
            return i, f"{self.images[i]}: {type(cause).__name__}: {cause}"


def collate(items: list[tuple[int, Tensor | str]]) -> tuple[Tensor, Tensor | None, dict[int, str]]:
    """(b,) indices and (b, 3, h, w) images of those that could be read, and {index: why} of the others."""
    good = [(i, image) for i, image in items if not isinstance(image, str)]
    images = torch.stack([image for _, image in good]) if good else None
    return torch.tensor([i for i, _ in good]), images, {i: why for i, why in items if isinstance(why, str)}


def locate(folder: str | Path, images: Iterable[str], file: str | Path) -> list[str]:
    """The files of images that `file` names. Raises ValueError naming those that are not in the folder."""
    paths = {image: _locate(Path(folder), image) for image in images}
    if lost := [image for image, path in paths.items() if path is None]:
        many = f"{len(lost)} of {len(paths)} images"
        raise ValueError(f"{file}: {many} are not in {folder}: {', '.join(lost[:3])}")
    return list(paths.values())


def _locate(root: Path, image: str) -> str | None:
    """The file under its name, its last part alone, or COCO's number alone, in any of COCO's folders."""
    names = [image, Path(image).name]
    if number := re.search(r"(\d{12})\.jpg$", image):
        names.append(number[0])  # COCO_val2014_000000391895.jpg is 000000391895.jpg in COCO 2017
    tried = (root / folder / name for name in names for folder in COCO_FOLDERS)
    return next((str(path) for path in tried if path.is_file()), None)
