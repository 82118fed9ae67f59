"""Scores of rankings: accuracy of zero-shot classification (Table 5), recall of retrieval (Table 6)."""

import torch
from torch import Tensor

TOP = 5  # of the classes, for acc5
RECALL_AT = (1, 5, 10)  # Table 6 has 5


def classify(f: Tensor, W: Tensor) -> Tensor:
    """(B, 5) the classes nearest to f (B, D), best first; of equal ones the first in the list."""
    return (f @ W.T).sort(dim=1, descending=True, stable=True).indices[:, :TOP]


def accuracy(R: Tensor, target: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Scores (n,) whose means are acc1, acc5 and the mean over the classes of the accuracy within each.

    R: (n, 5) classes, best first; target: (n,)
    """
    right = (R == target[:, None]).double()  # (n, 5)
    count = torch.bincount(target, minlength=num_classes).double()
    share = len(target) / (count[target] * (count > 0).sum())  # an image's share in its class's, over 1 / n
    scores = {"acc1": right[:, 0], "acc5": right.sum(1), "mean per class": right[:, 0] * share}
    if num_classes <= TOP:
        del scores["acc5"]
    return scores


class Cosines:
    """The similarities W f^T of T captions, (T, D), and I images, (I, D), computed where they are looked up.

    Whole, COCO's 25,010 x 5,000 would be 0.5 GB. Two blocks may differ in an entry's last digit, so what is
    compared must come from one block.
    """

    def __init__(self, W: Tensor, f: Tensor):
        self.W, self.f = W, f
        self.shape = len(W), len(f)

    def __getitem__(self, at: tuple[slice, slice]) -> Tensor:
        captions, images = at
        return self.W[captions] @ self.f[images].T


def ranks_of(similarity: Tensor | Cosines, image_of: Tensor, block: int = 512) -> tuple[Tensor, Tensor]:
    """Where the right answer comes, 0 = first, every tie taken against the model.

    similarity: (T, I) of T captions and I images, looked up `block` captions and `block` images at a time;
    image_of: (T,) the image of each caption
    Returns (T,) the rank of its image among the images for each caption, and (I,) the rank of the best of its
    captions among those of other images for each image.
    """
    (T, I), by_caption, by_image = similarity.shape, [], []  # noqa: E741
    for at in range(0, T, block):
        S, image = similarity[at : at + block, :], image_of[at : at + block]  # (b, I)
        own = S.gather(1, image[:, None])
        by_caption.append((S >= own).sum(1, dtype=torch.int32) - 1)  # less the right one
    for at in range(0, I, block):
        S = similarity[:, at : at + block]  # (T, b)
        mine = ((image_of >= at) & (image_of < at + block)).nonzero()[:, 0]  # their captions
        image = image_of[mine] - at
        own, best = S[mine, image], S.new_full((S.shape[1],), -torch.inf)
        best.scatter_reduce_(0, image, own, "amax")  # (b,)
        count = (S >= best).sum(0, dtype=torch.int32)
        by_image.append(count.index_add_(0, image, -(own >= best[image]).int()))  # less its own
    return torch.cat(by_caption), torch.cat(by_image)


def recall(similarity: Tensor | Cosines, image_of: Tensor) -> dict[str, Tensor]:
    """Scores (I,) whose means are R@K of text retrieval (over images) and of image retrieval (over captions).

    A caption's hit is counted with its image, so that whoever draws images draws their captions with them.
    """
    T, I = similarity.shape  # noqa: E741
    by_caption, by_image = ranks_of(similarity, image_of)
    scores = {f"TR@{K}": (by_image < K).double() for K in RECALL_AT}
    for K in RECALL_AT:
        hits = torch.zeros(I, dtype=torch.float64, device=image_of.device)
        scores[f"IR@{K}"] = hits.index_add_(0, image_of, (by_caption < K).double()) * (I / T)
    most = {"TR": T, "IR": I}  # of how many one is found: at as many or more, all are
    return {metric: score for metric, score in scores.items() if int(metric[3:]) < most[metric[:2]]}
