"""Training streams: `for images, valid, y in batches(stream, ...)`, without end.

The sample at position p of a task's stream, augmentation included, depends on (seed, task, p) alone: not on
workers, ranks, batches or restarts. So a resumed run goes on by its position, and two processes
read what one would read.
"""

import hashlib
import signal
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from files import BadImage, read_picture


class Stream(Dataset):
    """stream[p, patch] -> image (3, h, w) uint8, target: position p of an endless stream of one task.

    A subclass reads the annotations and turns one image into a `sample`. It sets: folder, ids (n,), names,
    sizes (n, 2), categories, notes (what the user should know), annotations (arrays, for the fingerprint).
    With skip_bad a bad image is passed over for the next one and named in target["skipped"]; else the stream
    returns its error.
    """

    task: str
    size: int | None = None  # px of the square that images are squashed to, not augmented
    seen = True  # False: black in the place of pictures, which are not read, as their features are kept

    def choose(self, seed: int, fraction: float, exclude: set, skip_bad: bool, counts=None) -> None:
        """Fix which images are used: a seeded part of those not excluded. Raises ValueError if none is.

        counts: (n,) annotations of each image, if there may be none at all
        """
        images = np.unique(self.ids)  # of pose, an image has a row for each of its persons
        kinds = {type(i) for i in (*exclude, *images[:1].tolist())}
        if len(kinds) > 1:
            one, other = next(iter(exclude)), images[0].item()
            raise ValueError(f"--exclude-images has ids like {one!r}, {self.folder} like {other!r}")
        left = images[[i not in exclude for i in images.tolist()]] if exclude else images
        if len(left) < len(images):
            self.notes.append(f"{len(images) - len(left)} images excluded, {len(left)} left")
        chosen = np.random.default_rng(seed).permutation(len(left))[: round(fraction * len(left))]  # Table 10
        self.rows = np.flatnonzero(np.isin(self.ids, left[chosen]))
        if not len(self.rows):
            raise ValueError(f"{self.folder}: no image left (fraction {fraction}, {len(exclude)} excluded)")
        if counts is not None and not np.any(counts[self.rows]):
            why = "; ".join(self.notes)
            raise ValueError(f"{self.folder}: nothing to train on in {len(self.rows)} images ({why})")
        self.seed, self.skip_bad, self.epoch = seed, skip_bad, -1

    @property
    def classes(self) -> list:
        """What the labels stand for, of which a head is built."""
        return self.categories

    @property
    def fingerprint(self) -> str:
        """Identifies the images and the annotations, wherever they lie."""
        arrays = (self.ids[self.rows], *self.annotations)
        return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]

    def row_at(self, position: int) -> int:
        """Which image is at a position: every epoch is a permutation of its own."""
        epoch, i = divmod(position, len(self.rows))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return int(self.order[i])

    def __getitem__(self, index: tuple[int, int]):
        position, patch = index
        key = hashlib.sha256(f"{self.seed} {self.task} {position}".encode()).digest()
        skipped = []
        while True:
            row = self.row_at(position + len(skipped))
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int.from_bytes(key[:7], "little"))
                    image, target = self.read(row, patch)
                return image, {**target, "skipped": skipped}
            except BadImage as error:
                skipped.append(self.names[row])
                if not self.skip_bad or len(skipped) == len(self.rows):
                    return BadImage(f"{error}: restore it, or use --skip-bad-images")

    def read(self, row: int, patch: int) -> tuple[Tensor, dict]:
        """One sample, and what is known of it. Raises BadImage."""
        size = tuple(self.sizes[row].tolist())
        black = torch.zeros((), dtype=torch.uint8).expand(3, *size)
        pixels = read_picture(self.folder / self.names[row], size) if self.seen else black
        image, target = self.sample(pixels, row, patch)
        sizes = {"orig_size": tuple(pixels.shape[1:]), "size": tuple(image.shape[1:])}
        return image, {"image_id": self.ids[row].item(), "row": row, **sizes, **target}

    def sample(self, image: Tensor, row: int, patch: int) -> tuple[Tensor, dict]:
        """One image as the task trains on it, augmented by torch's generator, which is seeded for it.

        image: (3, H, W) uint8; row: which image it is; patch: of the backbone
        Returns (3, h, w) uint8 and the task's target.
        """
        raise NotImplementedError


def collate(samples: list, patch: int, mean, std):
    """Samples of any size -> images (B, 3, h, w) normalized and padded to multiples of the patch, valid, y.

    valid: (B, h, w) bool, True on image; None when all have one size: then no whole patch is padding
    The first bad image, if any, is handed on as the error it is.
    """
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    sizes = [target["size"] for _, target in samples]
    h, w = (-(-max(side) // patch) * patch for side in zip(*sizes, strict=True))
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    images = torch.zeros(len(samples), 3, h, w)  # zero is the mean colour
    valid = torch.zeros(len(samples), h, w, dtype=torch.bool)
    for i, (image, target) in enumerate(samples):
        image = image.float().mul_(1 / 255).sub_(mean).div_(std)
        images[i, :, : image.shape[1], : image.shape[2]] = image
        valid[i, : image.shape[1], : image.shape[2]] = True
        target["padded_size"] = (h, w)
    return images, None if len(set(sizes)) == 1 else valid, [target for _, target in samples]


def batches(stream: Stream, batch: int, backbone, ranks, start: int = 0, workers: int = 0) -> Iterator:
    """images, valid, y of this rank's part of the stream, from its batch `start` on, without end.

    The workers start at once and keep two batches each ahead, however long a task waits for its turn.
    backbone: for its patch, mean, std; ranks: for rank, world, device. Raises BadImage where one turns up.
    """

    def positions():
        first = (start * ranks.world + ranks.rank) * batch
        while True:
            yield [(position, backbone.patch) for position in range(first, first + batch)]
            first += ranks.world * batch

    return load(stream, positions(), backbone, ranks, workers)


def load(items: Dataset, indices, backbone, ranks, workers: int) -> Iterator:
    """The batches of these lists of indices, collated. Raises BadImage where one turns up."""
    loader = DataLoader(
        items,
        batch_sampler=indices,
        collate_fn=partial(collate, patch=backbone.patch, mean=backbone.mean, std=backbone.std),
        num_workers=workers,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=_ignore_interrupt,
    )
    return checked(iter(loader))


def checked(batches: Iterator) -> Iterator:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _ignore_interrupt(_) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


def randint(least: int, most: int) -> int:
    """From `least` to `most`, both included, by torch's generator."""
    return int(torch.randint(least, most + 1, ()))
