"""COCO's captions as a training stream, and the vocabulary that they make.

coco/annotations/captions_train2017.json, coco/train2017/000000000009.jpg
or a Karpathy dataset_coco.json (its train and restval) beside the images of 2014 or 2017
"""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from data.coco import annotation_file, check_on_disk, read_json
from data.stream import Stream

SIDE, MOST_WORDS = 256, 50  # px; of a sentence; the authors' release


def tokenize(caption: str) -> list[str]:
    """Lower-case words of letters, digits and apostrophes; a hyphen parts two words, as in Karpathy's."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower())


def make_vocabulary(sentences: list[list[str]], min_count: int) -> list[str]:
    """What each token stands for: <pad>, words that occur min_count times, sorted, <unk>, <start>, <end>."""
    counts = Counter(word for sentence in sentences for word in sentence)
    kept = sorted(word for word, count in counts.items() if count >= min_count)
    return ["<pad>", *kept, "<unk>", "<start>", "<end>"]


def read_captions(coco: str | Path, split: str) -> tuple[list[dict], list[tuple[int, list[str]]]]:
    """The images (id, name below `coco`, size) of captions_*.json; its captions (row of the image, words).

    Raises ValueError for a caption of an unknown image, FileNotFoundError for images that are not on disk.
    """
    path = annotation_file(coco, "captions", split)
    content = read_json(path, ("images", "annotations"))
    try:
        images = sorted(content["images"], key=lambda image: image["id"])
        row_of = {image["id"]: row for row, image in enumerate(images)}
        names = [image["file_name"] for image in images]
        found = [
            {"id": image["id"], "name": f"{split}/{name}", "size": (image["height"], image["width"])}
            for image, name in zip(images, names, strict=True)
        ]
        for a in content["annotations"]:
            if a["image_id"] not in row_of:
                raise ValueError(f"{path}: caption {a['id']}: unknown image id {a['image_id']}")
            if not isinstance(a["caption"], str):
                raise ValueError(f"{path}: caption {a['id']} is not a string: {a['caption']!r}")
        sentences = [(row_of[a["image_id"]], tokenize(a["caption"])) for a in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO captions file: {type(error).__name__}: {error}") from error
    check_on_disk(path, Path(coco) / split, names)
    return found, sentences


def read_karpathy(path: str | Path, coco: str | Path, split: str) -> tuple[list[dict], list[tuple], str]:
    """The same of the train and restval images of a Karpathy JSON, and what was left out.

    An image is FILEPATH/FILENAME (train2014/COCO_train2014_...jpg) or SPLIT/ID.jpg; those in neither place
    are left out: 5,000 of COCO's images of 2014 are not in train2017.
    """
    content = read_json(Path(path), ("images",))
    try:
        used = [i for i in content["images"] if i["split"] in ("train", "restval")]
        places = {place: _listed(Path(coco) / place) for place in {split, *(i["filepath"] for i in used)}}
        images, sentences = [], []
        for image in sorted(used, key=lambda image: image["cocoid"]):
            candidates = (image["filepath"], image["filename"]), (split, f"{image['cocoid']:012d}.jpg")
            name = next((f"{place}/{name}" for place, name in candidates if name in places[place]), None)
            if name:
                images.append({"id": image["cocoid"], "name": name, "size": (0, 0)})  # not in the file
            row = len(images) - 1 if name else None
            sentences += [(row, [str(word) for word in s["tokens"]]) for s in image["sentences"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a Karpathy dataset_coco.json: {type(error).__name__}: {error}"
        ) from error
    if not images:
        raise FileNotFoundError(
            f"{path}: none of its {len(used)} train and restval images is in "
            f"{', '.join(sorted(places))} of {coco}"
        )
    return images, sentences, f", {len(used) - len(images)} images not in {coco} left out"


def _listed(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


class Captions(Stream):
    """target: tokens (T + 2,) from <start> to <end>, of one of the image's captions, drawn for each epoch.

    captions: a Karpathy JSON, or None for COCO's own captions of the split
    vocabulary: from all captions read, whatever the fraction and the exclusion leave to train on
    """

    task = "captioning"

    def __init__(
        self, coco, split, seed=0, scale=1.0, fraction=1.0, exclude=frozenset(), skip_bad=False,
        captions=None, min_count=6,
    ):  # fmt: skip
        path, left_out = captions, ""
        if captions:
            images, sentences, left_out = read_karpathy(captions, coco, split)
        else:
            path = annotation_file(coco, "captions", split)
            images, sentences = read_captions(coco, split)
        self.vocabulary = make_vocabulary([words for _, words in sentences], min_count)
        if len(self.vocabulary) == 4:
            raise ValueError(f"{path}: no word occurs {min_count} times in its captions: see --min-count")
        read = [(row, words) for row, words in sentences if row is not None]
        kept = sorted(((row, words) for row, words in read if words), key=lambda one: one[0])
        long = sum(len(words) > MOST_WORDS for _, words in kept)
        self._keep(images, kept)
        self.folder, self.scale = Path(coco), scale
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
        self.ids = np.array([image["id"] for image in images], np.int64)
        self.names = [image["name"] for image in images]
        self.sizes = np.array([image["size"] for image in images], np.int32).reshape(-1, 2)
        words = np.frombuffer(" ".join(self.vocabulary).encode(), np.uint8)
        self.annotations = (self.tokens, self.ends, self.first, words)

    @property
    def classes(self) -> list[str]:
        return self.vocabulary

    def sample(self, image: Tensor, row: int, patch: int) -> tuple[Tensor, dict]:
        side = max(1, round(self.scale * SIDE / patch)) * patch
        k = int(torch.randint(int(self.first[row]), int(self.first[row + 1]), ()))
        tokens = torch.from_numpy(self.tokens[self.ends[k] : self.ends[k + 1]].astype(np.int64))
        return TF.resize(image, [side, side], antialias=True), {"tokens": tokens}
