"""The DETR head, its matcher and loss against transformers, torchvision, brute force and values by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, generalized_box_iou
from transformers import DetrConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding

from backbone import Features
from heads.detr import Detr, paired_giou
from heads.matching import hungarian
from heads.transformer import DecoderLayer, EncoderLayer, sine_position

CATEGORIES = [{"id": i + 1, "name": f"c{i}"} for i in range(80)]


def head(dim=24, **options) -> Detr:
    torch.manual_seed(0)
    return Detr(dim, CATEGORIES, **options).eval()


def features(B=2, H=5, W=7, D=24, valid=None) -> Features:
    generator = torch.Generator().manual_seed(1)
    return Features(None, torch.randn(B, D, H, W, generator=generator), valid)


def targets(*counts: int) -> list[dict]:
    rng = np.random.default_rng(0)
    y = []
    for i, n in enumerate(counts):
        boxes = np.concatenate([rng.uniform(0.2, 0.8, (n, 2)), rng.uniform(0.05, 0.4, (n, 2))], 1)
        y.append({
            "image_id": i, "orig_size": (100, 200), "size": (50, 100),
            "labels": torch.from_numpy(rng.integers(0, 80, n)),
            "boxes_cxcywh": torch.from_numpy(boxes).float(),
        })  # fmt: skip
    return y


def test_parameter_counts():
    """Exact, at EVA-ViT-E's and -G's widths."""
    for dim, count in ((1792, 8_774_997), (1408, 8_725_845)):
        with torch.device("meta"):
            assert sum(p.numel() for p in Detr(dim, CATEGORIES).parameters()) == count


def transformers_loss(logits, boxes, y):
    config = DetrConfig(
        num_labels=80, auxiliary_loss=True, decoder_layers=len(logits), class_cost=1, bbox_cost=5,
        giou_cost=2, bbox_loss_coefficient=5, giou_loss_coefficient=2, eos_coefficient=0.1,
    )  # fmt: skip
    labels = [{"class_labels": t["labels"], "boxes": t["boxes_cxcywh"]} for t in y]
    return ForObjectDetectionLoss(
        logits[-1], labels, logits.device, boxes[-1], config, list(logits.unbind()), list(boxes.unbind())
    )[:2]


@pytest.mark.parametrize("counts", [(3, 8), (0, 5), (1,), (0, 0)])
def test_loss_and_gradient_agree_with_transformers(counts):
    torch.manual_seed(0)
    y = targets(*counts)
    logits = torch.randn(6, len(y), 100, 81)
    boxes = torch.rand(6, len(y), 100, 4) * 0.5 + 0.2
    results = []
    for loss in (head().criterion, transformers_loss):
        inputs = [logits.clone().requires_grad_(), boxes.clone().requires_grad_()]
        value, parts = loss(*inputs, y)
        value.backward()
        results.append((value.detach(), parts, *(x.grad for x in inputs)))
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    for name, other in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        torch.testing.assert_close(ours[1][name], theirs[1][other].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        ours[3], theirs[3], rtol=1e-4, atol=1e-5
    )  # GIoU has an epsilon of 1e-7 in ours


def test_matching_equals_brute_force():
    torch.manual_seed(0)
    costs = [torch.rand(3, 5, n) for n in (4, 0, 2)]
    match = hungarian(costs)
    assert match.query.shape == (3, 6)
    for level in range(3):
        for image, (cost, before) in enumerate(zip(costs, (0, 4, 4), strict=True)):
            n = cost.shape[2]
            table = cost[level]
            best = min(
                sum(table[q, t] for t, q in enumerate(chosen))
                for chosen in itertools.permutations(range(5), n)
            )
            mine = match.image[level] == image
            assert mine.sum() == n
            ours = table[match.query[level, mine], match.target[level, mine] - before].sum()
            torch.testing.assert_close(ours, torch.as_tensor(best, dtype=ours.dtype))


def test_more_targets_than_queries_and_broken_costs():
    cost = torch.rand(2, 3, 7)
    assert hungarian([cost]).query.shape == (2, 3)
    cost[0, 1] = math.nan
    cost[1, :, 2] = math.inf
    match = hungarian([cost])
    assert sorted(match.query[0].tolist()) == [0, 1, 2] and 2 not in match.target[1].tolist()
    cost = torch.rand(1, 5, 2)
    cost[0, 3] = math.nan  # a broken query is the last to be taken
    assert 3 not in hungarian([cost]).query[0].tolist()


def test_costs_use_torchvisions_boxes():
    y = targets(4)
    logits, boxes = torch.randn(1, 1, 6, 81), torch.rand(1, 1, 6, 4) * 0.4 + 0.2
    (cost,) = head().matching_costs(logits, boxes, y)
    corners = [box_convert(b, "cxcywh", "xyxy") for b in (boxes[0, 0], y[0]["boxes_cxcywh"])]
    for q, t in itertools.product(range(6), range(4)):
        probability = logits[0, 0, q].softmax(0)[y[0]["labels"][t]]
        l1 = (boxes[0, 0, q] - y[0]["boxes_cxcywh"][t]).abs().sum()
        giou = generalized_box_iou(corners[0][q : q + 1], corners[1][t : t + 1])[0, 0]
        torch.testing.assert_close(cost[0, q, t], 5 * l1 - probability - 2 * giou)


def test_giou_by_hand_and_by_torchvision():
    """Two unit squares a unit apart: no overlap, union 2, hull 3: GIoU = 0 - 1 / 3."""
    a, b = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[2.0, 0, 3, 1]])
    torch.testing.assert_close(paired_giou(a, b), torch.tensor([-1 / 3]))
    a, b = (box_convert(torch.rand(50, 4) + 0.01, "cxcywh", "xyxy") for _ in range(2))
    torch.testing.assert_close(paired_giou(a, b), generalized_box_iou(a, b).diagonal())


class Waits(TorchDispatchMode):
    """What would make the host wait for a GPU: values read, and sizes that depend on values."""

    found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if "index" in name else []
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_one_transfer_to_the_host(monkeypatch):
    """All levels and images at once; on a CPU .cpu() is free, so it is counted by hand."""
    sizes, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: sizes.append(self.shape) or cpu(self))
    y = targets(3, 6)
    logits, boxes = torch.randn(6, 2, 100, 81, requires_grad=True), torch.rand(6, 2, 100, 4) * 0.3 + 0.3
    with Waits() as waits:
        loss, _ = head().criterion(logits, boxes.requires_grad_(), y)
        loss.backward()
    assert sizes == [torch.Size([6 * 100 * (3 + 6)])] and waits.found == []


def test_no_targets_give_a_finite_loss_and_a_gradient_for_every_parameter():
    model = head()
    loss, parts = model(features(), targets(0, 0))
    loss.backward()
    assert loss.isfinite() and parts["l1"] == 0 and parts["giou"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_nan_prediction_reaches_the_loss():
    f = features()
    f.grid[0] = math.nan
    loss, _ = head().loss(f, targets(2, 2))
    assert loss.isnan()


def test_padding_changes_nothing():
    """Two images of unlike sizes in one batch: the losses average to those of the images alone."""
    model = head()
    a, b = features(1, 4, 7).grid, features(1, 6, 5).grid
    grid, valid = torch.zeros(2, 24, 6, 7), torch.zeros(2, 6, 7, dtype=torch.bool)
    grid[0, :, :4, :], grid[1, :, :, :5] = a[0], b[0]
    grid[0, :, 4:] = 100.0  # whatever is in the padding
    valid[0, :4], valid[1, :, :5] = True, True
    y = targets(2, 2)
    together = model.decode(Features(None, grid, valid))
    for i, alone in enumerate((a, b)):
        for x, expected in zip(together, model.decode(Features(None, alone, None)), strict=True):
            torch.testing.assert_close(x[:, i : i + 1], expected, atol=2e-5, rtol=1e-4)
    mean = sum(model.loss(Features(None, x, None), [t])[0] for x, t in zip((a, b), y, strict=True)) / 2
    torch.testing.assert_close(model.loss(Features(None, grid, valid), y)[0], mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_sine_positions_are_transformers(padded):
    valid = torch.ones(2, 5, 7, dtype=torch.bool)
    if padded:
        valid[0, :, 4:], valid[1, 3:] = False, False
    config = DetrConfig(d_model=128, position_embedding_type="sine")
    theirs = DetrSinePositionEmbedding(config.d_model // 2, normalize=True)
    expected = theirs((2, 24, 5, 7), torch.device("cpu"), torch.float32, mask=valid)
    if expected.dim() == 4:
        expected = expected.flatten(2).transpose(1, 2)
    ours = sine_position(features().grid, valid if padded else None, 64).expand(2, -1, -1)
    inside = valid.flatten(1)
    torch.testing.assert_close(ours[inside], expected[inside], atol=1e-5, rtol=1e-5)


def test_layers_are_torchs_when_positions_are_zero():
    """torch.nn.TransformerEncoderLayer and -DecoderLayer are the same post-norm layers without positions."""
    torch.manual_seed(0)
    x, memory, zero = torch.randn(2, 5, 16), torch.randn(2, 9, 16), torch.zeros(2, 5, 16)
    options = dict(d_model=16, nhead=4, dim_feedforward=32, dropout=0.0, batch_first=True)
    for ours, theirs, call in (
        (EncoderLayer(16, 4, 32), torch.nn.TransformerEncoderLayer(**options), lambda m: m(x, zero, None)),
        (DecoderLayer(16, 4, 32), torch.nn.TransformerDecoderLayer(**options),
         lambda m: m(x, zero, memory, memory, None)),
    ):  # fmt: skip
        ours.load_state_dict(theirs.state_dict())
        expected = theirs(x) if isinstance(ours, EncoderLayer) else theirs(x, memory)
        torch.testing.assert_close(call(ours), expected, atol=1e-5, rtol=1e-5)


def test_values_are_read_without_their_positions():
    """Where all places hold the same, it does not matter where a query looks; but what they hold does."""
    torch.manual_seed(0)
    layer = DecoderLayer(32, 4, 64).eval()
    q, pos, a, b = (torch.randn(2, n, 32) for n in (5, 5, 9, 9))
    memory = torch.randn(2, 1, 32).expand(-1, 9, -1)
    torch.testing.assert_close(layer(q, pos, a, memory, None), layer(q, pos, b, memory, None))
    assert (layer(q, pos, a, b, None) - layer(q, pos, a, memory, None)).abs().max() > 0.01


def test_no_object_is_never_an_answer():
    """The best class of a query that is almost sure of none, with the probability that is left for it."""
    detr = head()
    with torch.no_grad():
        detr.class_embed.bias[-1] = 8
    f, y = features(), targets(0, 0)
    probabilities = detr.decode(f)[0][-1].softmax(-1)
    assert probabilities.argmax(-1).eq(80).all()
    for answer, p in zip(detr.predict(f, y), probabilities, strict=True):
        assert answer["labels"].max() < 80
        torch.testing.assert_close(answer["scores"], p[torch.arange(100), answer["labels"]])
        torch.testing.assert_close(answer["scores"], p[:, :80].amax(1))


def test_predict_scales_to_the_original_image():
    model, y = head(), targets(1, 1)
    logits, boxes = model.decode(features())
    predictions = model.predict(features(), y)
    p = predictions[1]
    assert p["image_id"] == 1 and p["labels"].max() < 80
    cx, cy, w, h = boxes[-1, 1, 0]
    expected = torch.stack([(cx - w / 2) * 200, (cy - h / 2) * 100, (cx + w / 2) * 200, (cy + h / 2) * 100])
    torch.testing.assert_close(p["boxes_xyxy"][0], expected)
    torch.testing.assert_close(p["scores"], F.softmax(logits[-1, 1], -1)[:, :80].max(-1).values)


def test_it_learns_two_images():
    torch.manual_seed(0)
    model, f, y = head(), features(), targets(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(40):
        loss, _ = model(f, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_memory_keeps_the_encoders_input():
    """The residual of the release: with an encoder that says nothing, the decoder still sees the features."""

    class Nothing(torch.nn.Module):
        def forward(self, tokens, pos, padding):
            return torch.zeros_like(tokens)

    torch.manual_seed(0)
    head = Detr(16, [{"id": 1, "name": "a"}]).eval()
    head.encoder = torch.nn.ModuleList([Nothing()])
    with torch.no_grad():
        logits = [head.decode(Features(None, torch.randn(1, 16, 3, 4), None))[0] for _ in range(2)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
