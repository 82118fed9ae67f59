"""Lists of image files: what cannot be read is told by name."""

from test_zeroshot import picture
from torchvision.transforms import PILToTensor

from data.pictures import Pictures, collate


def test_unreadable_images_are_told_by_name(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "c.png", 3)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "d.png").write_text("not an image")
    data = Pictures([str(tmp_path / f"{n}.png") for n in "abcde"], PILToTensor())
    index, images, bad = collate([data[i] for i in range(5)])
    assert index.tolist() == [0, 2] and images.shape == (2, 3, 12, 10) and list(bad) == [1, 3, 4]
    assert "b.png: OSError" in bad[1] and "UnidentifiedImageError" in bad[3] and "FileNotFound" in bad[4]
    index, images, bad = collate([data[1]])
    assert len(index) == 0 and images is None
