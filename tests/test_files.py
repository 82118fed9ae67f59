"""Files: whole or not at all, headers, pictures, against Pillow, hashlib and files that are broken."""

import hashlib
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import files


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "new" / "a.json"
    files.write(path, "first")
    with pytest.raises(OSError, match=rf"a.json: not written: .*{error.args[-1]}"):
        with files.replacing(path) as part:
            part.write_text("half")
            raise error
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["a.json"]
    with files.replacing(path) as part:
        part.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_the_disks_error_is_told_where_torch_hides_it(tmp_path):
    """torch's writer raises its own RuntimeError while the disk's is on its way."""
    with pytest.raises(OSError, match="File too large"):
        with files.replacing(tmp_path / "last.pt"):
            try:
                raise OSError(27, "File too large")
            except OSError:
                raise RuntimeError("PytorchStreamWriter failed")  # noqa: B904


def test_a_killed_interruption_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with files.replacing(tmp_path / "a.json") as part:
            part.write_text("half")
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_too(tmp_path):
    with files.replacing(tmp_path / "blip2") as part:
        part.mkdir()
        (part / "config.json").write_text("{}")
    assert (tmp_path / "blip2" / "config.json").is_file() and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_fit_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_500_000_000))
    tensors = {"a": torch.zeros(1, dtype=torch.float32).expand(500_000_000)}
    with pytest.raises(OSError, match=r"a.safetensors: needs 2.0 GB, the disk has 1.5 GB: nothing written"):
        with files.replacing(tmp_path / "a.safetensors", tensors["a"].numel() * 4):
            raise AssertionError("written")
    assert not list(tmp_path.iterdir())


def test_tensors_and_headers_come_back(tmp_path):
    path = tmp_path / "head.safetensors"
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(3)}  # not contiguous
    files.save(tensors, path, head={"task": "detection", "config": {"dim": 8}})
    assert files.read_header(path, "head") == {"task": "detection", "config": {"dim": 8}}
    read = files.read_tensors(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], v) for k, v in tensors.items())
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["head"])["task"] == "detection"
    with pytest.raises(ValueError, match=r"head.safetensors: not one of our LoRA files \(KeyError: 'lora'\)"):
        files.read_header(path, "LoRA")
    files.save(tensors, tmp_path / "M.safetensors")
    with safe_open(tmp_path / "M.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # as transformers and timm want it
    with pytest.raises(FileNotFoundError, match="no LoRA file at .*absent"):
        files.read_header(tmp_path / "absent", "LoRA")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text: not one of our head files"):
        files.read_header(tmp_path / "text", "head")


def test_sha256_is_hashlibs(tmp_path):
    content = np.random.default_rng(0).bytes((1 << 24) + 5)  # more than is read at a time
    (tmp_path / "a").write_bytes(content)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_fingerprint_sees_each_piece_size_and_name(tmp_path):
    content = bytes(300_000)
    (tmp_path / "w.pt").write_bytes(content)
    known = files.fingerprint(tmp_path / "w.pt")
    assert known == files.fingerprint(tmp_path / "w.pt") and files.fingerprint("random") == "random"
    for at in (0, 65_536, 150_000, 299_999):
        (tmp_path / "x.pt").write_bytes(content[:at] + b"1" + content[at + 1 :])
        assert files.fingerprint(tmp_path / "x.pt") != known
    (tmp_path / "x.pt").write_bytes(content + b"0")
    assert files.fingerprint(tmp_path / "x.pt") != known
    shutil.copy(tmp_path / "w.pt", tmp_path / "a.safetensors")
    of_a = files.fingerprint(tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert len({known, of_a, files.fingerprint(tmp_path)}) == 3


def test_json_takes_paths(tmp_path):
    files.write_json(tmp_path / "a.json", {"file": tmp_path, "é": 1.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"file": str(tmp_path), "é": 1.5}


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    return file.getvalue()


def test_pictures_are_pillows_in_rgb(tmp_path):
    """Grey, palette and transparent ones too; files, bytes and arrays alike."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    for mode in ("RGB", "L", "P", "RGBA"):
        picture = colours.convert(mode)
        expected = np.asarray(picture.convert("RGB"))
        path = tmp_path / f"{mode}.png"
        path.write_bytes(encoded(picture))
        for source in (path, str(path), path.read_bytes()):
            np.testing.assert_array_equal(np.asarray(files.open_picture(source)), expected)
        read = files.read_picture(path, (5, 7))
        assert read.dtype == torch.uint8 and torch.equal(read, files.read_picture(path))
        np.testing.assert_array_equal(read.permute(1, 2, 0), expected)
    np.testing.assert_array_equal(files.open_picture(np.asarray(colours)), colours)


def test_16_bit_grey_is_rounded_to_its_255th():
    """All 65,536 values."""
    grey = np.arange(65536).reshape(256, 256)
    read = np.asarray(files.open_picture(encoded(Image.fromarray(grey.astype(np.uint16)))))
    expected = (2 * 255 * grey + 65535) // (2 * 65535)  # the nearest whole number, in whole numbers
    np.testing.assert_array_equal(read, np.stack([expected] * 3, -1))


def test_bad_pictures_are_named(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    path = tmp_path / "a.jpg"
    whole = encoded(picture, format="JPEG")
    for content in (whole[:-900], b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(files.BadImage, match=rf"{path} cannot be decoded \(.*\)$"):
            files.read_picture(path)
    path.write_bytes(whole)
    with pytest.raises(files.BadImage, match=f"{path} is 70 x 50 pixels, its annotations say 50 x 70"):
        files.read_picture(path, (70, 50))


def test_squash_is_pillows_bicubic():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    squashed = files.squash(picture, (14, 28))  # h, w
    expected = picture.resize((28, 14), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(squashed.permute(1, 2, 0), expected)
