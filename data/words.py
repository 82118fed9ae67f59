"""Pictures of single words: LMDB sets in clovaai's layout, or a gt.txt with a list of files.

    SET/data.mdb    num-samples -> 2077; image-000000001 -> JPEG or PNG; label-000000001 -> UTF-8; from 1
    SET/gt.txt      iiit5k/train/1009_2.png TAB You

    find(folders)          the sets in and below folders, by name
    Words(sets, size)      every word of these sets once: for scoring, so nothing is ever left out
    WordStream(parts, ...) endless, equal shares of each part: for training, so unusable labels are left out
    UsableWords(stream)    each word of a stream once: to compute its features once

The sample at position p of a stream depends on (seed, p) alone.
"""

import hashlib
import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import lmdb
import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from files import BadImage, open_picture, squash

LONGEST = 25  # characters of a training label: clovaai, ViTSTR, PARSeq
CHARSETS = {  # the first 36 or 94 of printable ASCII without the space, in the order of all three
    36: "0123456789abcdefghijklmnopqrstuvwxyz",
    94: "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
}


# --- sets


class LmdbWords:
    """An LMDB set, read-only. Raises ValueError if the folder holds no LMDB or it has no num-samples."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        try:
            environment = _environment(self.path)
            pages, page = environment.info()["last_pgno"] + 1, environment.stat()["psize"]
            has = (self.path / "data.mdb").stat().st_size
            if has < pages * page:  # to read beyond its end would be a SIGBUS
                wants = f"{has} bytes, its {pages} pages take {pages * page}"
                raise ValueError(f"{path / 'data.mdb'} is cut off: {wants}: copy it again")
            size = environment.begin().get(b"num-samples")
        except lmdb.Error as error:
            raise ValueError(f"{path / 'data.mdb'} cannot be opened as an LMDB: {error}") from error
        if size is None or not size.strip().isdigit() or int(size) >= 2**31:
            raise ValueError(f"{path / 'data.mdb'}: no count of words in num-samples (found {size})")
        self.size = int(size)

    def __len__(self) -> int:
        return self.size

    def where(self, i: int) -> str:
        return f"{self.path / 'data.mdb'}: image-{i + 1:09d}"

    def read(self, i: int) -> tuple[bytes, str]:
        """The encoded picture and the label of word i, from 0. Raises BadImage if one of them is missing."""
        try:
            with _environment(self.path).begin() as records:
                picture, label = (records.get(b"%s-%09d" % (kind, i + 1)) for kind in (b"image", b"label"))
        except lmdb.Error as error:
            raise BadImage(f"{self.where(i)} cannot be read: {error}: copy the file again") from error
        for kind, record in (("image", picture), ("label", label)):
            if record is None:
                raise BadImage(f"{self.path / 'data.mdb'}: no {kind}-{i + 1:09d} of {self.size} words")
        return picture, label.decode(errors="replace")

    def labels(self) -> Iterator[str]:
        """All labels in order, in one pass over their pages alone. Raises ValueError if one is missing."""
        read = 0
        try:
            with _environment(self.path).begin() as records, records.cursor() as cursor:
                cursor.set_range(b"label-")
                for i, (key, label) in zip(range(self.size), cursor.iternext(), strict=False):
                    if key != b"label-%09d" % (i + 1):
                        break
                    yield label.decode(errors="replace")
                    read += 1
        except lmdb.Error as error:
            why = f"label-{read + 1:09d} cannot be read: {error}: copy the file again"
            raise ValueError(f"{self.path / 'data.mdb'}: {why}") from error
        if read < self.size:
            raise ValueError(f"{self.path / 'data.mdb'}: no label-{read + 1:09d} of {self.size} words")


_OPEN: dict[Path, tuple[int, lmdb.Environment]] = {}


def _environment(path: Path) -> lmdb.Environment:
    """One per process and folder; a worker puts its own in the place of one that it inherited."""
    process, environment = _OPEN.get(path, (None, None))
    if process != os.getpid():
        if environment is not None:
            environment.close()
        options = dict(readonly=True, create=False, lock=False, readahead=False, meminit=False)
        environment = lmdb.open(str(path), max_readers=1, **options)
        _OPEN[path] = os.getpid(), environment
    return environment


class ListedWords:
    """The words of a gt.txt, its paths relative to its folder. Raises ValueError for a line without TAB."""

    def __init__(self, path: Path):
        self.path = path
        lines = (path / "gt.txt").read_text("utf-8-sig", errors="replace").split("\n")
        rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        for number, line in rows:
            if "\t" not in line:
                raise ValueError(f"{path / 'gt.txt'}:{number}: expected PATH TAB LABEL, found {line[:60]!r}")
        self.rows = [tuple(line.split("\t", 1)) for _, line in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        return str(self.path / self.rows[i][0])

    def read(self, i: int) -> tuple[bytes, str]:
        try:
            return Path(self.where(i)).read_bytes(), self.rows[i][1]
        except OSError as error:
            raise BadImage(f"{self.path / 'gt.txt'}: word {i + 1}: {error}") from error

    def labels(self) -> Iterator[str]:
        return (label for _, label in self.rows)


def find(folders: list[str]) -> dict[str, LmdbWords | ListedWords]:
    """The sets in and below folders, in the order of their paths, by their path below the folder.

    Raises FileNotFoundError for a folder without one, ValueError for an empty set or two of one name.
    """
    sets = {}
    for folder in map(Path, folders):
        here = {}
        for place, below, files in os.walk(folder, followlinks=True):
            below.sort()
            if "data.mdb" in files or "gt.txt" in files:
                kind = LmdbWords if "data.mdb" in files else ListedWords
                name = Path(place).relative_to(folder).as_posix()
                if name == ".":
                    name = folder.resolve().name
                here[name] = kind(Path(place))
                if not len(here[name]):
                    raise ValueError(f"{place}: a set without words")
        if not here:
            raise FileNotFoundError(f"{folder}: no data.mdb (LMDB) and no gt.txt in it or below")
        if twice := sets.keys() & here.keys():
            raise ValueError(f"{folder}: another set is called {min(twice)}: give the folder above both")
        sets.update(here)
    return sets


# --- samples


def load(words: LmdbWords | ListedWords, i: int, size: tuple[int, int]) -> tuple[Tensor, str]:
    """Word i of a set, (3, h, w) uint8 RGB squashed to size, and its label. Raises BadImage, saying where."""
    data, label = words.read(i)
    try:
        return squash(open_picture(data), size), label
    except BadImage as error:
        raise BadImage(f"{words.where(i)} {error}") from error


class Words(Dataset):
    """words[i] -> pixels (3, h, w) uint8, {image_id: SET/000000001, label, size}; an error is returned.

    limit: only the first so many words of each set
    """

    def __init__(self, sets: dict, size: tuple[int, int], limit: int | None = None):
        self.sets, self.size = sets, size
        self.items = [(name, i) for name, words in sets.items() for i in range(len(words))[:limit]]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        name, i = self.items[index]
        try:
            pixels, label = load(self.sets[name], i, self.size)
        except BadImage as error:
            return error
        return pixels, {"image_id": f"{name}/{i + 1:09d}", "label": label, "size": self.size}


class WordStream(Dataset):
    """stream[p, _] -> pixels, y as Words: position p of an endless stream, p mod n in part p of n.

    parts: n collections of sets (MJSynth, SynthText: half and half); within a part every epoch is a
        permutation of its own
    notes: what was left out and why; fingerprint: identifies labels and order, wherever the files lie
    With skip_bad a bad record is passed over for the next one and named in y["skipped"]; else the stream
    returns its error. Raises ValueError if a part has no usable word.
    """

    def __init__(self, parts: dict[str, dict], charset: str, size, seed: int, skip_bad: bool = False):
        self.charset, self.size, self.seed, self.skip_bad, self.notes = charset, size, seed, skip_bad, []
        self.parts, digest = [], hashlib.sha256()
        for part, sets in parts.items():
            rows, counts, before = array("i"), Counter(), 0
            digest.update(b"a part\n")
            for words in sets.values():
                for i, label in enumerate(words.labels(), before):
                    digest.update(f"{label}\n".encode(errors="replace"))
                    why = unusable(label, charset)
                    counts[why] += 1
                    if why is None:
                        rows.append(i)
                before += len(words)
            dropped = [f"{counts[why]} {why}" for why in sorted(why for why in counts if why)]
            usable = f"{part}: {counts[None]} of {before} words for training"
            self.notes.append(f"{usable}; dropped: {', '.join(dropped) or 'none'}")
            if not rows:
                raise ValueError(f"{self.notes[-1]}: nothing to train on")
            self.parts.append((list(sets.values()), np.array(rows, np.int32)))
        self.fingerprint = digest.hexdigest()[:16]
        self.first = [0, *accumulate(len(rows) for _, rows in self.parts)]  # usable words before each part
        self.epochs = {}  # part -> (epoch, its order)

    def index(self, position: int) -> int:
        """Which of the usable words, counted over all parts, is at a position."""
        part = position % len(self.parts)
        count = len(self.parts[part][1])
        epoch, at = divmod(position // len(self.parts), count)
        if self.epochs.get(part, (None,))[0] != epoch:
            self.epochs[part] = epoch, np.random.default_rng((self.seed, part, epoch)).permutation(count)
        return self.first[part] + int(self.epochs[part][1][at])

    def locate(self, index: int) -> tuple[LmdbWords | ListedWords, int]:
        """The set, and the word in it, of a usable word."""
        part = bisect_right(self.first, index) - 1
        sets, rows = self.parts[part]
        row = int(rows[index - self.first[part]])
        for words in sets:
            if row < len(words):
                return words, row
            row -= len(words)
        raise AssertionError("a row beyond the last set")

    def __getitem__(self, index: tuple[int, int]):
        position, skipped = index[0], []
        while True:
            words, i = self.locate(self.index(position + len(self.parts) * len(skipped)))
            try:
                pixels, label = load(words, i, self.size)
                break
            except BadImage as error:
                skipped.append(words.where(i))
                if not self.skip_bad or len(skipped) == len(self.parts[position % len(self.parts)][1]):
                    return BadImage(f"{error}: restore it, or use --skip-bad-images")
        label = spelled(label, self.charset)
        return pixels, {"image_id": words.where(i), "label": label, "size": self.size, "skipped": skipped}


class UsableWords(Dataset):
    """The words that a stream draws from, each once: items[i] -> pixels, y with image_id i, its index there.

    fingerprint: of pictures and labels; an error is returned, as by Words
    """

    def __init__(self, stream: WordStream):
        self.stream = stream

    def __len__(self) -> int:
        return self.stream.first[-1]

    def __getitem__(self, index: int):
        try:
            pixels, label = load(*self.stream.locate(index), self.stream.size)
        except BadImage as error:
            return BadImage(f"{error}: restore it")
        return pixels, {"image_id": index, "label": label, "size": self.stream.size}

    def read(self, index: int) -> tuple[bytes, str]:
        words, i = self.stream.locate(index)
        return words.read(i)

    @cached_property
    def labels(self) -> list[str]:
        """As they are trained on."""
        return [spelled(self.read(index)[1], self.stream.charset) for index in range(len(self))]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for data, label in map(self.read, range(len(self))):
            digest.update(b"%d %s\n" % (len(data), label.encode(errors="replace")) + data)
        return digest.hexdigest()


def spelled(label: str, charset: str) -> str:
    """A label as it is trained on: without white space, in lower case if the characters have no other."""
    label = "".join(label.split())
    return label if "A" in charset else label.lower()


def unusable(label: str, charset: str) -> str | None:
    """Why a label is not trained on, if it is not: clovaai's and ViTSTR's rules."""
    label = spelled(label, charset)
    if not label:
        return "empty"
    if len(label) > LONGEST:
        return f"longer than {LONGEST} characters"
    outside = label.strip(charset)  # from both ends: nothing is left if all of it is inside
    return "with characters outside the charset" if outside else None
