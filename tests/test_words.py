"""Word sets: LMDB in clovaai's layout and gt.txt, what is left out of training, the stream's order."""

import pickle
import random
import re
from io import BytesIO
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader

from data import words
from files import BadImage

SIZE = (28, 56)


def drawn(text: str) -> bytes:
    """A word as a PNG."""
    font = ImageFont.load_default(24)
    image = Image.new("RGB", (int(font.getlength(text)) + 12, 36), (230, 220, 200))
    ImageDraw.Draw(image).text((6, 4), text, (20, 30, 60), font)
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_lmdb(path: Path, labels: list[str], **records) -> Path:
    """clovaai's layout by the lmdb library; `records` replaces some, or with None removes them."""
    path.mkdir(parents=True)
    content = {"num-samples": str(len(labels)).encode()}
    for i, label in enumerate(labels, 1):
        content |= {f"image-{i:09d}": drawn(label or " "), f"label-{i:09d}": label.encode()}
    content |= {name.replace("_", "-"): value for name, value in records.items()}
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key, value in content.items():
            if value is not None:
                transaction.put(key.encode(), value)
    return path


def some_words(count: int, seed: int = 0, letters: str = "abcdef") -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randint(2, 4))) for _ in range(count)]


def expected(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB").resize(SIZE[::-1], Image.BICUBIC))


def test_lmdb_is_read_as_clovaai_writes_it(tmp_path):
    write_lmdb(tmp_path / "evaluation" / "IC13_857", ["One", "Two!", "3"])
    write_lmdb(tmp_path / "evaluation" / "a" / "SVT", ["x"])
    sets = words.find([str(tmp_path / "evaluation")])
    assert list(sets) == ["IC13_857", "a/SVT"] and [len(s) for s in sets.values()] == [3, 1]
    read = words.Words(sets, SIZE)
    pixels, y = read[1]
    assert y == {"image_id": "IC13_857/000000002", "label": "Two!", "size": SIZE}
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected(drawn("Two!")))
    assert read[3][1]["image_id"] == "a/SVT/000000001"
    assert list(sets["IC13_857"].labels()) == ["One", "Two!", "3"]
    assert len(words.Words(sets, SIZE, limit=2)) == 3


def test_gt_txt_is_read(tmp_path):
    (tmp_path / "crops").mkdir()
    for name in ("a", "b"):
        (tmp_path / "crops" / f"{name}.png").write_bytes(drawn(name))
    (tmp_path / "gt.txt").write_bytes("\ufeffcrops/a.png\tA\r\n\ncrops/b.png\tit's\tb".encode())
    sets = words.find([str(tmp_path)])
    assert list(sets) == [tmp_path.name]
    read = words.Words(sets, SIZE)
    assert [read[i][1]["label"] for i in range(2)] == ["A", "it's\tb"]
    assert np.array_equal(read[1][0].permute(1, 2, 0).numpy(), expected(drawn("b")))
    (tmp_path / "gt.txt").write_text("crops/a.png\tA\ncrops/b.png b\n")
    with pytest.raises(ValueError, match="gt.txt:2: expected PATH TAB LABEL, found 'crops/b.png b'"):
        words.find([str(tmp_path)])


def test_real_crops_go_through_both_readers(real_ocr, tmp_path):
    """284 of IIIT5k, ICDAR15 and two demos: the same pixels and labels from the files and from an LMDB."""
    listed = words.find([str(real_ocr)])
    rows = [line.split("\t") for line in (real_ocr / "gt.txt").read_text().splitlines()]
    from_files = words.Words(listed, SIZE)
    assert len(from_files) == len(rows) == 284
    records = {f"image_{i:09d}": (real_ocr / path).read_bytes() for i, (path, _) in enumerate(rows, 1)}
    write_lmdb(tmp_path / "real", [label for _, label in rows], **records)
    from_lmdb = words.Words(words.find([str(tmp_path)]), SIZE)
    for i, (_, label) in enumerate(rows):
        (a, y_a), (b, y_b) = from_files[i], from_lmdb[i]
        assert torch.equal(a, b) and y_a["label"] == y_b["label"] == label


def test_unusable_training_labels_are_dropped_and_counted(tmp_path):
    labels = ["Ok", "", "  ", "a" * 26, "a" * 25, "don't", "caf\u00e9", "two words"]
    write_lmdb(tmp_path / "s", labels, label_000000008=b"\xff\xfe")
    parts = {"s": words.find([str(tmp_path / "s")])}
    stream = words.WordStream(parts, words.CHARSETS[36], SIZE, seed=0)
    told = "2 empty, 1 longer than 25 characters, 3 with characters outside the charset"
    assert stream.notes == [f"s: 2 of 8 words for training; dropped: {told}"]
    assert sorted({stream[p, 14][1]["label"] for p in range(4)}) == ["a" * 25, "ok"]
    stream = words.WordStream(parts, words.CHARSETS[94], SIZE, seed=0)  # don't is fine with punctuation
    assert stream.notes[0].startswith("s: 3 of 8 words")
    assert "Ok" in {stream[p, 14][1]["label"] for p in range(6)}
    assert len(words.Words(parts["s"], SIZE)) == 8  # never in scoring
    write_lmdb(tmp_path / "t", ["", "!?"])
    with pytest.raises(ValueError, match="t: 0 of 2 words .* nothing to train on"):
        words.WordStream({"t": words.find([str(tmp_path / "t")])}, words.CHARSETS[36], SIZE, seed=0)


def test_charsets_are_printable_ascii_and_case_is_folded_only_without_capitals():
    assert set(words.CHARSETS[94]) == {chr(c) for c in range(33, 127)} and len(words.CHARSETS[94]) == 94
    assert words.CHARSETS[94].startswith(words.CHARSETS[36]) and len(words.CHARSETS[36]) == 36
    assert words.spelled(" A\tb ", words.CHARSETS[36]) == "ab"
    assert words.spelled(" A\tb ", words.CHARSETS[94]) == "Ab"


@pytest.fixture
def two_parts(tmp_path) -> dict:
    write_lmdb(tmp_path / "MJ" / "MJ_train", some_words(5, 0))
    write_lmdb(tmp_path / "MJ" / "MJ_valid", some_words(2, 1))
    write_lmdb(tmp_path / "ST", some_words(3, 2))
    return {name: words.find([str(tmp_path / name)]) for name in ("MJ", "ST")}


def test_parts_are_mixed_in_equal_shares_and_every_epoch_has_every_word(two_parts):
    stream = words.WordStream(two_parts, words.CHARSETS[36], SIZE, seed=3)
    where = [stream[p, 14][1]["image_id"] for p in range(2 * 21)]
    assert all("/MJ/" in w for w in where[::2]) and all("/ST/" in w for w in where[1::2])
    for part, size in ((where[::2], 7), (where[1::2], 3)):
        epochs = [part[i : i + size] for i in range(0, 21, size)]
        assert all(len(set(epoch)) == size and set(epoch) == set(epochs[0]) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # another order each time
    again = words.WordStream(two_parts, words.CHARSETS[36], SIZE, seed=3)
    assert [again[p, 14][1]["image_id"] for p in (41, 3, 17)] == [where[p] for p in (41, 3, 17)]
    assert again.fingerprint == stream.fingerprint
    other = words.WordStream({"ST": two_parts["ST"]}, words.CHARSETS[36], SIZE, seed=3)
    assert other.fingerprint != stream.fingerprint
    pooled = {"all": {**two_parts["MJ"], **two_parts["ST"]}}  # the same words in other shares
    assert words.WordStream(pooled, words.CHARSETS[36], SIZE, seed=3).fingerprint != stream.fingerprint


def test_parts_of_one_size_have_orders_of_their_own(tmp_path):
    parts = {n: words.find([str(write_lmdb(tmp_path / n, some_words(9, k)))]) for k, n in enumerate("ab")}
    stream = words.WordStream(parts, words.CHARSETS[36], SIZE, seed=3)
    orders = [[stream.index(2 * at + part) - 9 * part for at in range(9)] for part in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(9)) and orders[0] != orders[1]


def test_workers_open_their_own_environment(two_parts):
    """After this process has opened it: one handle must not cross a fork, two in a process are an error."""
    read = words.Words(two_parts["MJ"], SIZE)
    mine = [read[i][1]["label"] for i in range(len(read))]
    loader = DataLoader(read, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert [y["label"] for _, y in loader] == mine
    assert [read[i][1]["label"] for i in range(len(read))] == mine  # this process's is still open
    sent = pickle.loads(pickle.dumps(read))  # as to a spawned worker
    assert sent[0][1] == read[0][1]


def test_bad_sets_are_named(tmp_path):
    bad = {
        "no num": (dict(num_samples=None), "no num/data.mdb: no count of words in num-samples"),
        "num": (dict(num_samples=b"many"), "num/data.mdb: no count of words in num-samples .found b'many'"),
    }
    for name, (records, says) in bad.items():
        write_lmdb(tmp_path / name, ["a"], **records)
        with pytest.raises(ValueError, match=says):
            words.find([str(tmp_path / name)])
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"not an LMDB")
    with pytest.raises(ValueError, match="junk/data.mdb cannot be opened as an LMDB"):
        words.find([str(tmp_path / "junk")])
    for folder in ("absent", ""):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no data.mdb"):
            words.find([str(tmp_path / (folder or "empty"))])
    write_lmdb(tmp_path / "none", [])
    with pytest.raises(ValueError, match="none: a set without words"):
        words.find([str(tmp_path / "none")])
    for name in ("p/same", "q/same"):
        write_lmdb(tmp_path / name, ["a"])
    with pytest.raises(ValueError, match="another set is called same"):
        words.find([str(tmp_path / "p"), str(tmp_path / "q")])


@pytest.mark.parametrize(
    "record, value, says",
    [
        ("image_000000002", None, "no image-000000002 of 3 words"),
        ("image_000000002", b"\x89PNG junk", "image-000000002 cannot be decoded"),
        ("image_000000002", drawn("two")[:-40], "image-000000002 cannot be decoded"),
    ],
)
def test_bad_records_are_named_or_passed_over_and_counted(tmp_path, record, value, says):
    write_lmdb(tmp_path / "s", ["one", "two", "six"], **{record: value})
    sets = words.find([str(tmp_path)])
    error = words.Words(sets, SIZE)[1]
    assert isinstance(error, BadImage) and says in str(error)
    strict = words.WordStream({"s": sets}, words.CHARSETS[36], SIZE, seed=0)
    found = [strict[p, 14] for p in range(3)]
    assert sum(isinstance(item, BadImage) and "--skip-bad-images" in str(item) for item in found) == 1
    lenient = words.WordStream({"s": sets}, words.CHARSETS[36], SIZE, seed=0, skip_bad=True)
    samples = [lenient[p, 14][1] for p in range(3)]
    assert {y["label"] for y in samples} == {"one", "six"}
    assert [set(y["skipped"]) for y in samples if y["skipped"]] == [{sets["s"].where(1)}]


def test_a_missing_label_is_named(tmp_path):
    for number in (2, 3):
        write_lmdb(tmp_path / str(number), ["one", "two", "six"], **{f"label_{number:09d}": None})
        sets = words.find([str(tmp_path / str(number))])
        assert f"no label-{number:09d} of 3 words" in str(words.Words(sets, SIZE)[number - 1])
        with pytest.raises(ValueError, match=f"no label-{number:09d} of 3 words"):
            words.WordStream({"s": sets}, words.CHARSETS[36], SIZE, seed=0)


def test_a_page_of_an_lmdb_that_is_no_page_is_named(tmp_path):
    """Of a set of several pages each one's flags, which say what it is, are blotted out. The rest is read."""
    labels = ["one", "two", "six", "ten"] * 10
    pictures = {f"image_{i:09d}": drawn(text).ljust(1500, b"\0") for i, text in enumerate(labels, 1)}
    file = write_lmdb(tmp_path / "s", labels, **pictures) / "data.mdb"
    content, size, told = file.read_bytes(), 4096, []
    for page in range(2, len(content) // size):
        folder, flags = tmp_path / f"page{page}", page * size + 10
        folder.mkdir()
        (folder / "data.mdb").write_bytes(content[:flags] + b"\0\0" + content[flags + 2 :])
        try:
            (found,) = words.find([str(folder)]).values()
            assert list(found.labels()) == labels
        except ValueError as error:
            told.append(str(error))
        else:
            read = [words.Words({"s": found}, SIZE)[i] for i in range(40)]
            whole = [i for i in range(40) if not isinstance(read[i], BadImage)]
            assert [read[i][1]["label"] for i in whole] == [labels[i] for i in whole] and len(whole) > 20
            told += [str(item) for item in read if isinstance(item, BadImage)]
    for kind in ("opened as an LMDB", "label-0000000.. cannot be read", "image-0000000.. cannot be read"):
        assert any(re.search(f"data.mdb:? .*{kind}.*CORRUPTED", text) for text in told), told
    assert all("data.mdb" in text and "\n" not in text for text in told)


def test_an_lmdb_that_a_download_cut_off_is_refused(tmp_path):
    """By its size, before a page beyond its end is a SIGBUS."""
    path = write_lmdb(tmp_path / "set", [f"word{i}" for i in range(40)])
    file = path / "data.mdb"
    content = file.read_bytes()
    assert len(words.find([str(path)])["set"]) == 40
    for share in (0.5, 0.9):
        (tmp_path / f"cut{share}").mkdir()
        (tmp_path / f"cut{share}" / "data.mdb").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="data.mdb is cut off: .* bytes"):
            words.find([str(tmp_path / f"cut{share}")])
