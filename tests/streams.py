"""Batches of a stream as a stage reads them, without its ViT and its processes."""

import itertools
from types import SimpleNamespace

import torch

from data.stream import batches

BACKBONE = SimpleNamespace(patch=14, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def take(stream, count, batch=1, rank=0, world=1, **options) -> list:
    ranks = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
    return list(itertools.islice(batches(stream, batch, BACKBONE, ranks, **options), count))


def same(a, b) -> bool:
    (images, valid, y), (images2, valid2, y2) = a, b
    assert (valid is None) == (valid2 is None)
    boxes = all(torch.equal(t["boxes_cxcywh"], t2["boxes_cxcywh"]) for t, t2 in zip(y, y2, strict=True))
    ids = [t["image_id"] for t in y] == [t["image_id"] for t in y2]
    return torch.equal(images, images2) and boxes and ids and (valid is None or torch.equal(valid, valid2))
