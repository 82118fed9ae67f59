"""COCO's captions as a training stream, and the vocabulary that they make.

coco/annotations/captions_train2017.json, coco/train2017/000000000009.jpg
or a Karpathy dataset_coco.json (its train and restval) beside the images of 2014 or 2017
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from data.coco import LISTS, Coco, annotation_file, check_on_disk, read
from data.references import karpathy
from data.stream import Stream
from files import read_json

SIDE, MOST_WORDS = 256, 50  # px; of a sentence; the authors' release


def tokenize(caption: str) -> list[str]:
    """Lower-case words of letters, digits and apostrophes; a hyphen parts two words, as in Karpathy's."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower())


def make_vocabulary(sentences: list[list[str]], min_count: int) -> list[str]:
    """What each token stands for: <pad>, words that occur min_count times, sorted, <unk>, <start>, <end>."""
    counts = Counter(word for sentence in sentences for word in sentence)
    kept = sorted(word for word, count in counts.items() if count >= min_count)
    return ["<pad>", *kept, "<unk>", "<start>", "<end>"]


def read_captions(
    coco: str | Path, split: str, read: Callable = read
) -> tuple[list[dict], list[tuple[int, list[str]]], str]:
    """The images (id, name below `coco`, size) of captions_*.json; its captions (row of the image, words).

    Raises ValueError for a caption of an unknown image, FileNotFoundError for images that are not on disk.
    Last is what the user should know of them.
    """
    file = read(annotation_file(coco, "captions", split), LISTS[:2])
    texts = file.annotations.column("caption", str)
    names = check_on_disk(file.path, Path(coco) / split, file.names)
    images = zip(file.ids.tolist(), names, map(tuple, file.sizes.tolist()), strict=True)
    images = [{"id": i, "name": f"{split}/{name}", "size": size} for i, name, size in images]
    sentences = zip(file.rows.tolist(), map(tokenize, texts), strict=True)
    return images, list(sentences), replaced(file.annotations.replaced)


def references(file: Coco) -> tuple[dict[int | str, list[str]], list[str]]:
    """{image id: its captions} of the images that have some, and what the user should know."""
    found, ids = {}, file.ids.tolist()
    for row, text in zip(file.rows.tolist(), file.annotations.column("caption", str), strict=True):
        found.setdefault(ids[row], []).append(text)
    half = file.annotations.replaced
    return found, [f"{file.path}{replaced(half)}"] * bool(half)


def read_karpathy(path: str | Path, coco: str | Path, split: str) -> tuple[list[dict], list[tuple], str]:
    """The same of the train and restval images of a Karpathy JSON, and what was left out.

    An image is FILEPATH/FILENAME (train2014/COCO_train2014_...jpg), SPLIT/ID.jpg, or, where the file tells no
    FILEPATH (Flickr30k's), FILENAME or SPLIT/FILENAME; those in no such place are left out: 5,000 of COCO's
    images of 2014 are not in train2017.
    """
    used = karpathy(path, read_json(path), ("train", "restval"))
    listed = {place: _listed(Path(coco) / place) for place in {split, *(i["place"] for i in used)}}
    images, sentences, half = [], [], 0
    for image in sorted(used, key=lambda image: image["id"]):
        candidates = [(image["place"], image["name"]), (split, image["name"])]
        if isinstance(image["id"], int):
            candidates.insert(1, (split, f"{image['id']:012d}.jpg"))
        name = next(
            (Path(place, name).as_posix() for place, name in candidates if name in listed[place]), None
        )
        if name:
            images.append({"id": image["id"], "name": name, "size": (0, 0)})  # not in the file
        row = len(images) - 1 if name else None
        texts = image["sentences"]
        for k, tokens in enumerate(texts.column("tokens", list)):
            if not {str, int}.issuperset(map(type, tokens)):
                texts.refuse(k, "tokens must be words")
            sentences.append((row, [texts.whole(str(word)) for word in tokens]))
        half += texts.replaced
    if not images:
        raise FileNotFoundError(
            f"{path}: none of its {len(used)} train and restval images is in "
            f"{', '.join(sorted(place or '.' for place in listed))} of {coco}"
        )
    return images, sentences, f", {len(used) - len(images)} images not in {coco} left out{replaced(half)}"


def _listed(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def replaced(count: int) -> str:
    return f", half a character (a lone surrogate) replaced in {count} texts" if count else ""


class Captions(Stream):
    """target: tokens (T + 2,) from <start> to <end>, of one of the image's captions, drawn for each epoch.

    captions: a Karpathy JSON, or None for COCO's own captions of the split
    vocabulary: by default from all captions read, whatever the fraction and the exclusion leave to train on
    """

    task = "captioning"

    def __init__(
        self, coco, split, seed=0, scale=1.0, fraction=1.0, exclude=frozenset(), skip_bad=False,
        read=read, captions=None, min_count=6, size=None, vocabulary=None,
    ):  # fmt: skip
        path = captions
        if captions:
            images, sentences, left_out = read_karpathy(captions, coco, split)
        else:
            path = annotation_file(coco, "captions", split)
            images, sentences, left_out = read_captions(coco, split, read)
        self.vocabulary = vocabulary or make_vocabulary([words for _, words in sentences], min_count)
        if len(self.vocabulary) == 4:
            raise ValueError(f"{path}: no word occurs {min_count} times in its captions: see --min-count")
        read = [(row, words) for row, words in sentences if row is not None]
        kept = sorted(((row, words) for row, words in read if words), key=lambda one: one[0])
        long = sum(len(words) > MOST_WORDS for _, words in kept)
        self._keep(images, kept)
        self.folder, self.scale, self.size = Path(coco), scale, size
        self.notes = [
            f"{path}: {len(self.ids)} images, {len(kept)} captions, {len(self.vocabulary)} tokens; "
            f"left out: {len(images) - len(self.ids)} images without captions, {len(read) - len(kept)} empty "
            f"captions; {long} captions cut at {MOST_WORDS} words{left_out}"
        ]
        self.choose(seed, fraction, exclude, skip_bad)

    def _keep(self, images: list[dict], kept: list[tuple[int, list[str]]]) -> None:
        """The images that have captions, and all tokens in one array.

        Caption k is tokens[ends[k]:ends[k + 1]]; image i has those from first[i] to first[i + 1] - 1.
        """
        token_of = {word: token for token, word in enumerate(self.vocabulary)}
        unk, start, end = (token_of[word] for word in ("<unk>", "<start>", "<end>"))
        coded = [[start, *(token_of.get(w, unk) for w in words[:MOST_WORDS]), end] for _, words in kept]
        rows, self.first = np.unique([row for row, _ in kept], return_index=True)
        self.first = np.append(self.first, len(kept))
        self.ends = np.cumsum([0, *map(len, coded)])
        self.tokens = np.array([token for tokens in coded for token in tokens], np.int32)
        images = [images[row] for row in rows]
        self.ids = np.array([image["id"] for image in images])
        self.names = [image["name"] for image in images]
        self.sizes = np.array([image["size"] for image in images], np.int32).reshape(-1, 2)
        words = np.frombuffer(" ".join(self.vocabulary).encode(), np.uint8)
        self.annotations = (self.tokens, self.ends, self.first, words)

    @property
    def classes(self) -> list[str]:
        return self.vocabulary

    def sample(self, image: Tensor, row: int, patch: int) -> tuple[Tensor, dict]:
        side = self.size or max(1, round(self.scale * SIDE / patch)) * patch
        k = int(torch.randint(int(self.first[row]), int(self.first[row + 1]), ()))
        tokens = torch.from_numpy(self.tokens[self.ends[k] : self.ends[k + 1]].astype(np.int64))
        return TF.resize(image, [side, side], antialias=True), {"tokens": tokens}
