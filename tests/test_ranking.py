"""Ranks, recall and accuracy against brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scores.ranking import Cosines, accuracy, classify, ranks_of, recall


@pytest.mark.parametrize("values", ["distinct", "ties", "collapsed"])
def test_ranks_and_recall_are_a_brute_force_count(values):
    """40 images with 5 to 7 captions, in any order; a tie counts against the model."""
    rng = np.random.default_rng(0)
    image_of = rng.permutation(np.repeat(np.arange(40), rng.integers(5, 8, 40)))
    T = len(image_of)
    S = rng.normal(size=(T, 40)).astype(np.float32)
    S[np.arange(T), image_of] += 1
    S = {"distinct": S, "ties": S.round(), "collapsed": 0 * S}[values]
    by_caption, by_image = [], []
    for t in range(T):
        by_caption.append(sum(S[t, i] >= S[t, image_of[t]] for i in range(40) if i != image_of[t]))
    for i in range(40):
        best = max(S[t, i] for t in range(T) if image_of[t] == i)
        by_image.append(sum(S[t, i] >= best for t in range(T) if image_of[t] != i))
    of = torch.from_numpy(image_of)
    ours = ranks_of(torch.from_numpy(S), of, block=7)
    assert ours[0].tolist() == by_caption and ours[1].tolist() == by_image
    scores = recall(torch.from_numpy(S), of)
    assert list(scores) == ["TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10"]
    for K in (1, 5, 10):
        assert scores[f"TR@{K}"].mean().item() == np.mean(np.array(by_image) < K)
        assert scores[f"IR@{K}"].mean().item() == pytest.approx(np.mean(np.array(by_caption) < K), abs=1e-12)
    if values == "collapsed":
        assert not any(score.any() for score in scores.values())


def test_ranks_of_features_hold_also_where_images_and_captions_are_the_same():
    """Blocks of features against loops over the whole product in float64; a third is there twice or more."""
    torch.manual_seed(0)
    image_of = torch.arange(60).repeat_interleave(torch.randint(5, 8, (60,)))[torch.randperm(330)]
    T, f = len(image_of), F.normalize(torch.randn(60, 96), dim=1)
    W = F.normalize(f[image_of] + 1.5 * torch.randn(T, 96), dim=1)
    f[40:], W[::3] = f[:20], W[:1] + 0 * W[::3]  # the last 20 images are the first 20; many captions are one
    S = W.double() @ f.double().T
    by_caption = [int((S[t] >= S[t, i] - 1e-12).sum()) - 1 for t, i in enumerate(image_of)]
    own = torch.zeros_like(S, dtype=torch.bool)
    own[torch.arange(T), image_of] = True
    best = S.masked_fill(~own, -torch.inf).amax(0)
    by_image = ((S >= best - 1e-12) & ~own).sum(0).tolist()
    for block in (17, 60, 512):
        ours = ranks_of(Cosines(W, f), image_of, block)
        assert ours[0].tolist() == by_caption and ours[1].tolist() == by_image
    whole = recall(W @ f.T, image_of)
    for metric, score in recall(Cosines(W, f), image_of).items():
        assert torch.equal(score, whole[metric])


def test_the_similarity_is_never_held_whole():
    seen = []

    class Watched(Cosines):
        def __getitem__(self, at):
            seen.append(super().__getitem__(at))
            return seen[-1]

    recall(Watched(torch.randn(5000, 2), torch.randn(1000, 2)), torch.arange(5000) % 1000)
    assert max(S.numel() for S in seen) <= 512 * 5000  # 10 blocks of captions, 2 of images
    assert sum(S.numel() for S in seen) == 2 * 5000 * 1000


def test_recall_at_all_there_is_is_not_scored():
    scores = recall(torch.eye(6), torch.arange(6))
    assert list(scores) == ["TR@1", "TR@5", "IR@1", "IR@5"] and scores["IR@1"].mean() == 1


def test_accuracy_by_loops():
    """Class 3 of 7 has no images: it is no part of the mean over classes."""
    torch.manual_seed(0)
    target = torch.tensor([0, 0, 0, 1, 2, 2, 4, 5, 6, 6])
    W = torch.randn(7, 8)
    f = W[target] + torch.randn(10, 8)
    W[5] = W[2]  # as ImageNet's two `missile`s: the first of the list is named
    top = classify(f, W)
    scores = accuracy(top, target, 7)
    logits = f @ W.T
    order = [sorted(range(7), key=lambda c: (-logits[i, c].item(), c)) for i in range(10)]
    assert top.tolist() == [o[:5] for o in order]
    right = [o[0] == t for o, t in zip(order, target.tolist(), strict=True)]
    assert 0 < sum(right) and scores["acc1"].tolist() == right
    assert scores["acc5"].tolist() == [t in o[:5] for o, t in zip(order, target.tolist(), strict=True)]
    of_class = {
        c: [r for r, t in zip(right, target.tolist(), strict=True) if t == c] for c in target.tolist()
    }
    expected = np.mean([np.mean(r) for r in of_class.values()])
    assert len(of_class) == 6 and scores["mean per class"].mean().item() == pytest.approx(expected, abs=1e-12)
    assert "acc5" not in accuracy(top[:, :3], target.clamp(max=2), 3)
