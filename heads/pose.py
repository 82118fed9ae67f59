"""Pose head: ViTPose's decoders on a frozen ViT's patch tokens (Table 12; ViTPose, arXiv 2204.12484).

One person per crop, one heat map per keypoint. Coordinates are unbiased (UDP, arXiv 1911.07524): pixel 0 of a
crop and of its heat maps lie on one edge of the region in the image, the last pixel on the other.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SumOverRanks(torch.autograd.Function):
    """all_reduce whose gradient is all_reduce: what each rank's part does to the losses of all."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    backward = forward


class BatchNorm(nn.BatchNorm2d):
    """Over all ranks' crops in training, as ViTPose; torch's SyncBatchNorm does not run on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if not self.training or world == 1:
            return super().forward(x)
        mean = SumOverRanks.apply(x.mean((0, 2, 3))) / world  # (C,)
        x = x - mean[:, None, None]
        variance = SumOverRanks.apply(x.square().mean((0, 2, 3))) / world
        n = world * x.numel() / x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale[:, None, None] + self.bias[:, None, None]


class Pose(nn.Module):
    """Patch tokens of a person's crop -> K heat maps of four times the grid's size.

    dim: width D of the backbone
    categories: one, {"id", "name", "keypoints": K names, "mirror": K indices}

    y holds for each crop
        keypoints (K, 3): x and y in pixels of the crop, v > 0 where labelled: for the loss
        image_id, crop_cxcywh (4,) the region of the image in pixels, score of the box: to predict
    """

    sigma = 2.0  # of a target, in pixels of the heat map; ViTPose's
    blur = 11  # width in pixels of the Gaussian that smooths a heat map before it is read; ViTPose's
    sure = 0.2  # least score of a keypoint that counts for its person; ViTPose's

    def __init__(self, dim: int, categories: list[dict]):
        super().__init__()
        self.config = {"dim": dim, "categories": categories}
        names, mirror = categories[0]["keypoints"], categories[0]["mirror"]
        if sorted(mirror) != [*range(len(names))] or {*map(type, mirror)} != {int}:
            raise ValueError(f"mirror must hold each of the {len(names)} keypoints once")
        width = 256
        up = dict(kernel_size=4, stride=2, padding=1, bias=False)
        self.decoder = nn.Sequential(
            *(nn.ConvTranspose2d(dim, width, **up), BatchNorm(width), nn.ReLU()),
            *(nn.ConvTranspose2d(width, width, **up), BatchNorm(width), nn.ReLU()),
            nn.Conv2d(width, len(names), 1),
        )
        for layer in self.decoder:
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=0.001)  # ViTPose's
        nn.init.zeros_(self.decoder[-1].bias)
        self.register_buffer("mirror", torch.tensor(mirror), persistent=False)

    def forward(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(f, y)

    def loss(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over all pixels of all heat maps, zero for keypoints that are not labelled.

        Also returned for the log: the same over the heat maps of labelled keypoints alone.
        """
        heat = self.decoder(f.grid)  # (B, K, 4 H, 4 W)
        keypoints = torch.stack([t["keypoints"] for t in y])  # (B, K, 3)
        target, weight = self.targets(keypoints, heat.shape[2:], y[0]["padded_size"])
        error = (weight[:, :, None, None] * (heat - target)).square().mean((2, 3))  # (B, K)
        return error.mean(), {"labelled": (error.sum() / weight.sum().clamp(min=1)).detach()}

    def targets(self, keypoints: Tensor, size: tuple[int, int], crop: tuple[int, int]):
        """Gaussians around the keypoints (B, K, 3), cut off at 3 sigma: (B, K, *size); weights (B, K).

        size, crop: (h, w) of the heat map and of the crop in pixels. A keypoint that is labelled and whose
        Gaussian reaches into the heat map has weight 1, else 0.
        """
        h, w = size
        scales = (w - 1) / (crop[1] - 1), (h - 1) / (crop[0] - 1)
        scale = torch.stack([keypoints.new_full((), s) for s in scales])  # new_tensor would wait for the GPU
        at = keypoints[..., :2] * scale  # (B, K, 2) in pixels of the heat map
        near, reach = (at + 0.5).floor(), round(3 * self.sigma)
        weight = (keypoints[..., 2] > 0) & (near >= -reach).all(-1)
        weight &= (near[..., 0] < w + reach) & (near[..., 1] < h + reach)
        lines = []
        for axis, side in ((0, w), (1, h)):
            i = torch.arange(side, device=keypoints.device)
            bell = (-((i - at[..., axis, None]) ** 2) / (2 * self.sigma**2)).exp()  # (B, K, side)
            lines.append(bell * ((i - near[..., axis, None]).abs() <= reach))
        return lines[1][..., :, None] * lines[0][..., None, :], weight.float()

    @torch.no_grad()
    def predict(self, f, y: list[dict]) -> list[dict]:
        """The keypoints of each crop's person.

        f: of the B crops, or of the B crops and then the same B mirrored, whose heat maps are then averaged
        Returns B dicts: image_id, keypoints (K, 3): x and y in pixels of the image, score; score of the
        person: the box's times the mean of the keypoints' above 0.2; area of the crop in the image.
        """
        heat = self.decoder(f.grid)  # (B or 2 B, K, h, w)
        if len(heat) == 2 * len(y):
            plain, flipped = heat.chunk(2)
            heat = (plain + flipped[:, self.mirror].flip(-1)) / 2
        at, scores = read(heat, self.blur)  # (B, K, 2), (B, K)
        crops = heat.new_tensor([[float(v) for v in t["crop_cxcywh"]] for t in y])[:, None]  # (B, 1, 4)
        last = heat.new_tensor([heat.shape[3] - 1, heat.shape[2] - 1])
        at = crops[..., :2] + (at / last - 0.5) * crops[..., 2:]
        sure = scores > self.sure
        means = (scores * sure).sum(1) / sure.sum(1).clamp(min=1)  # (B,)
        keypoints, means = torch.cat([at, scores[..., None]], -1).cpu(), means.tolist()
        return [
            {
                "image_id": t["image_id"],
                "keypoints": k,
                "score": float(t["score"]) * mean,
                "area": float(t["crop_cxcywh"][2] * t["crop_cxcywh"][3]),
            }
            for t, k, mean in zip(y, keypoints, means, strict=True)
        ]


def read(heat: Tensor, blur: int, sigma: float | None = None) -> tuple[Tensor, Tensor]:
    """Where heat maps (B, K, h, w) peak, to a fraction of a pixel: x and y (B, K, 2), and how high (B, K).

    DARK (arXiv 1910.06278) as in UDP: one Newton step on the logarithm of the smoothed map. sigma: of the
    smoothing; by default OpenCV's for the kernel `blur`. The step ends at the neighbouring pixel.
    """
    h, w = heat.shape[2:]
    scores, best = heat.flatten(2).max(-1)  # (B, K)
    x, y = best % w, best // w

    sigma = sigma or 0.3 * ((blur - 1) / 2 - 1) + 0.8
    bell = torch.arange(blur, device=heat.device) - blur // 2
    bell = (-(bell**2) / (2 * sigma**2)).exp()
    bell = bell / bell.sum()
    smooth = F.pad(heat.flatten(0, 1)[:, None], [blur // 2] * 4, mode="reflect")
    smooth = F.conv2d(F.conv2d(smooth, bell[None, None, None]), bell[None, None, :, None])  # (B K, 1, h, w)
    smooth = F.pad(smooth.clamp(0.001, 50).log(), [1] * 4, mode="replicate")[:, 0]  # (B K, h + 2, w + 2)

    def value(dx: int, dy: int) -> Tensor:
        index = (y + 1 + dy) * (w + 2) + x + 1 + dx  # (B, K)
        return smooth.flatten(1).gather(1, index.view(-1, 1)).view_as(x)

    here, right, left, below, above = (value(*d) for d in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)))
    gx, gy = (right - left) / 2, (below - above) / 2
    xx, yy = right - 2 * here + left, below - 2 * here + above
    xy = (value(1, 1) - right - below + 2 * here - left - above + value(-1, -1)) / 2
    xx, yy = xx + torch.finfo(heat.dtype).eps, yy + torch.finfo(heat.dtype).eps
    step = torch.stack([xy * gy - yy * gx, xy * gx - xx * gy], -1) / (xx * yy - xy * xy)[..., None]
    return torch.stack([x, y], -1) + step.nan_to_num(0).clamp(-1, 1), scores
