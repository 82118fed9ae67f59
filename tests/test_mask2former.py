"""Mask2Former head against transformers' Mask2Former, literal transcriptions, and numbers worked by hand."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as hf

import heads.mask2former as m2f
from backbone import Features
from heads.coco_results import mask_results, write_panoptic
from heads.matching import hungarian
from heads.transformer import sine_position

CATEGORIES = [{"id": i + 1, "name": f"class {i}"} for i in range(79)] + [{"id": 90, "name": "toothbrush"}]
D, PATCH = 24, 14
ROUNDING = dict(rtol=1e-4, atol=1e-4)  # float32 through 15 layers, summed in another order


def new_head(eq2_h: bool = True) -> m2f.Mask2Former:
    """Every parameter random, the zero ones too, so that none can hide."""
    torch.manual_seed(0)
    head = m2f.Mask2Former(D, CATEGORIES, eq2_h)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.02 * torch.randn_like(p))
    head.points = 96
    return head


@pytest.fixture(scope="module")
def head() -> m2f.Mask2Former:
    return new_head()


def target(n: int, size: tuple[int, int], padded_size=None, image_id: int = 1) -> dict:
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    centre, radius = torch.rand(n, 2, 1, 1) * torch.tensor(size)[:, None, None], min(size) / 3
    return {
        "image_id": image_id,
        "size": size,
        "padded_size": padded_size or size,
        "orig_size": (size[0] // 2, size[1] // 2),
        "labels": torch.randint(80, (n,)),
        "masks": (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2,
    }


def fix_points(head: m2f.Mask2Former, monkeypatch) -> None:
    """The k-th target of any image gets the same points in every call."""
    torch.manual_seed(1)
    table = {count: torch.rand(8, count, 2) for count in (96, 3 * 96, 24)}
    monkeypatch.setattr(head, "random_points", lambda n, count, device: table[count][:n], raising=False)


# --- the network


@pytest.mark.parametrize(
    "dim, eq2_h, count",
    [
        (1792, False, 13_847_441),
        (1408, False, 13_650_833),
        (1792, True, 13_913_489),
        (1408, True, 13_716_881),
    ],
)
def test_parameter_counts(dim, eq2_h, count):
    """The first two are the release's; H adds a 256 x 256 convolution and a GroupNorm: 65,536 + 512."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(m2f.Mask2Former, "reset_parameters", lambda self: None)
        head = m2f.Mask2Former(dim, CATEGORIES, eq2_h)
    assert sum(p.numel() for p in head.parameters()) == count


def test_config_is_json_and_rebuilds_the_head(head):
    again = m2f.Mask2Former(**json.loads(json.dumps(head.config)))
    assert again.load_state_dict(head.state_dict())


@pytest.mark.parametrize("padded", [False, True])
def test_deformable_attention_equals_transformers(head, padded):
    ours = head.encoder[0].self_attn
    peer = hf.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(256, 8, 1, 4)
    peer.load_state_dict(ours.state_dict())
    B, H, W = 2, 5, 7
    x, pos = torch.randn(B, H * W, 256), torch.randn(B, H * W, 256)
    valid = torch.ones(B, H, W, dtype=torch.bool)
    if padded:
        valid[1, 3:], valid[1, :, 4:] = False, False
    y, x_ = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")
    centres = torch.stack([x_, y], -1)  # in (0, 1)
    places = centres.view(1, H * W, 1, 2).expand(B, -1, -1, -1)
    expected = peer(x, ~valid.flatten(1), x, None, pos, places, [(H, W)])[0]
    got = ours(x, pos, 2 * centres - 1, valid if padded else None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # one layer


def test_deformable_attention_starts_looking_in_eight_directions():
    head = m2f.Mask2Former(D, CATEGORIES)
    attention = head.encoder[3].self_attn
    offsets = attention.sampling_offsets.bias.view(8, 4, 2)
    square = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor(square)[:, None] * torch.arange(1, 5)[:, None]
    torch.testing.assert_close(offsets, expected.float(), rtol=0, atol=1e-5)
    assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()


def test_sine_positions_equal_transformers():
    valid = torch.ones(2, 5, 7, dtype=torch.bool)
    valid[1, 3:], valid[1, :, 4:] = False, False
    peer = hf.Mask2FormerSinePositionEmbedding(128, normalize=True)
    for mask in (None, valid):
        expected = peer((2, D, 5, 7), "cpu", torch.float32, mask).flatten(2).transpose(1, 2)
        got = sine_position(torch.empty(2, D, 5, 7), mask, feats=128).expand(2, -1, -1)
        inside = valid.flatten(1) if mask is not None else slice(None)
        torch.testing.assert_close(got[inside], expected[inside], rtol=1e-5, atol=1e-5)


def transformers_network(head: m2f.Mask2Former) -> tuple[nn.Module, nn.Module]:
    """transformers' pixel decoder and transformer, cut to one level, with the weights of ours."""
    config = Mask2FormerConfig(encoder_feedforward_dim=512, dim_feedforward=1024)
    pixel, decoder = hf.Mask2FormerPixelDecoder(config, [D]), hf.Mask2FormerTransformerModule(256, config)
    pixel.num_feature_levels = decoder.num_feature_levels = decoder.decoder.num_feature_levels = 1
    for layer in pixel.encoder.layers:
        layer.self_attn = hf.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(256, 8, 1, 4)
    pixel.level_embed = nn.Parameter(head.encoder_level[None].detach())
    decoder.level_embed = nn.Embedding.from_pretrained(head.decoder_level[None].detach())

    state = head.state_dict()

    def load(module: nn.Module, prefix: str, names: dict[str, str]) -> None:
        """names: ours -> theirs, as beginnings of parameter names"""
        mine = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        renamed = {
            theirs + k[len(ours) :]: v
            for k, v in mine.items()
            for ours, theirs in names.items()
            if k.startswith(ours)
        }
        missing, unexpected = module.load_state_dict(renamed, strict=False)
        loaded_prefixes = tuple(names.values())
        assert not unexpected and not [k for k in missing if k.startswith(loaded_prefixes)]

    load(pixel, "input_proj.", {"": "input_projections.0."})
    load(pixel, "G.", {"": "adapter_1."})
    load(pixel, "R.", {"0": "layer_1.0", "1": "layer_1.1", "3": "mask_projection"})
    ffn = {"linear1": "fc1", "linear2": "fc2"}
    for i, layer in enumerate(pixel.encoder.layers):
        norms = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
        load(layer, f"encoder.{i}.", {"self_attn": "self_attn", **ffn, **norms})
    for i, layer in enumerate(decoder.decoder.layers):
        for key in ("weight", "bias"):
            pieces = state[f"decoder.{i}.self_attn.in_proj_{key}"].chunk(3)
            for name, piece in zip("qkv", pieces, strict=True):
                state[f"decoder.{i}.self_attn.{name}_proj.{key}"] = piece
        separate = {f"self_attn.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"}
        norms = {
            "norm1": "cross_attn_layer_norm",
            "norm2": "self_attn_layer_norm",
            "norm3": "final_layer_norm",
        }
        same = {"multihead_attn": "cross_attn", "self_attn.out_proj": "self_attn.out_proj"}
        load(layer, f"decoder.{i}.", {**same, **separate, **ffn, **norms})
    load(decoder.decoder, "decoder_norm.", {"": "layernorm."})
    load(decoder, "query_", {"feat": "queries_features", "embed": "queries_embedder"})
    layers = {f"{i}": f"{i}.0" for i in range(3)}
    load(decoder.decoder.mask_predictor.mask_embedder, "MLP.layers.", layers)
    return pixel, decoder


def test_network_equals_transformers():
    head = new_head(eq2_h=False)
    pixel, decoder = transformers_network(head)
    grid = torch.randn(2, D, 6, 5)
    with torch.no_grad():
        mapped = pixel([grid], output_hidden_states=False, return_dict=True)
        expected = decoder(mapped.multi_scale_features, mapped.mask_features)
        logits, embeddings, pixels, masks = head.decode(Features(None, grid, None))
    assert len(masks) == 10
    blocked = (masks < 0).flatten(3).float().mean()
    assert 0.05 < blocked < 0.95  # the attention is masked, and not all of it
    torch.testing.assert_close(pixels, mapped.mask_features, **ROUNDING)
    for level in range(10):
        q = expected.intermediate_hidden_states[level].transpose(0, 1)
        torch.testing.assert_close(logits[level], head.class_embed(q), **ROUNDING)
        torch.testing.assert_close(masks[level], expected.masks_queries_logits[level], **ROUNDING)


def test_masks_are_equation_2(head):
    """q_mask = MLP(q) . R(G(F_0) + H(F_1^enc)), each letter as the paper defines it."""
    f = Features(None, torch.randn(2, D, 6, 5), None)
    F_1 = head.encode(f.grid, sine_position(f.grid, None, 128), None)
    w = head.state_dict()

    def norm(x, name):
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"])

    G = norm(F.conv2d(f.grid, w["G.0.weight"]), "G.1")
    H = F.interpolate(norm(F.conv2d(F_1, w["H.0.weight"]), "H.1"), size=(6, 5), mode="bilinear")
    R = F.relu(norm(F.conv2d(G + H, w["R.0.weight"], padding=1), "R.1"))
    R = F.conv2d(R, w["R.3.weight"], w["R.3.bias"])
    _, embeddings, pixels, masks = head.decode(f)
    q = F.layer_norm(head.query_feat.weight, (256,), w["decoder_norm.weight"], w["decoder_norm.bias"])
    for i in range(3):
        q = F.linear(q, w[f"MLP.layers.{i}.weight"], w[f"MLP.layers.{i}.bias"])
        q = q.relu() if i < 2 else q
    torch.testing.assert_close(embeddings[0, 1], q, **ROUNDING)
    torch.testing.assert_close(pixels, R, **ROUNDING)
    torch.testing.assert_close(masks, torch.einsum("lbqd,bdhw->lbqhw", embeddings, R), **ROUNDING)


def test_a_query_with_an_empty_mask_attends_everywhere():
    masks = torch.tensor([[[-1.0, -2.0, -3.0, -4.0], [1.0, -2.0, 0.0, 4.0], [-1.0, -1.0, -1.0, 9.0]]])
    valid = torch.tensor([[[True, True, True, False]]])
    no = -torch.inf
    everywhere = torch.tensor([[0.0, 0, 0, 0], [0, no, 0, 0], [no, no, no, 0]])
    inside = torch.tensor([[0, 0, 0, no], [0, no, 0, no], [0, 0, 0, no]])
    for padding, expected in ((None, everywhere), (valid, inside)):
        got = m2f.attention_mask(masks, padding, heads=2)
        torch.testing.assert_close(got, expected.expand(2, -1, -1), rtol=0, atol=0)


def test_blocked_rows_in_the_network(monkeypatch):
    """With constant pixel features a mask is either everything or nothing: the same as no masking at all."""
    head = new_head()
    nn.init.zeros_(head.R[-1].weight)
    f = Features(None, torch.randn(1, D, 4, 4), None)
    logits, _, _, masks = head.decode(f)
    assert (masks < 0).flatten(3).all(-1).any() and torch.isfinite(logits).all()
    monkeypatch.setattr(m2f, "attention_mask", lambda masks, valid, heads: None)
    torch.testing.assert_close(logits, head.decode(f)[0], **ROUNDING)


# --- batches


def two_images() -> tuple[Features, list[Features], list[dict], list[list[dict]]]:
    """A small and a large image, together and alone. Padding holds values as large as any."""
    torch.manual_seed(2)
    H, W, h, w = 7, 6, 5, 4  # patches
    grid, valid = torch.randn(2, D, H, W), torch.ones(2, H, W, dtype=torch.bool)
    valid[0, h:], valid[0, :, w:] = False, False
    grid[0, :, ~valid[0]] *= 10
    batch = Features(None, grid, valid)
    alone = [Features(None, grid[:1, :, :h, :w], None), Features(None, grid[1:], None)]
    sizes = [(h * PATCH - 3, w * PATCH - 9), (H * PATCH - 6, W * PATCH)]
    y = [target(n, size, (H * PATCH, W * PATCH), n) for n, size in zip((3, 5), sizes, strict=True)]
    y_alone = [[{**y[0], "padded_size": (h * PATCH, w * PATCH)}], [y[1]]]
    return batch, alone, y, y_alone


@pytest.mark.parametrize("eq2_h", [True, False])
def test_answers_do_not_depend_on_the_batch(eq2_h):
    head = new_head(eq2_h)
    batch, alone, y, y_alone = two_images()
    logits, embeddings, _, masks = head.decode(batch)
    for b in range(2):
        expected = head.decode(alone[b])
        H, W = alone[b].grid.shape[2:]
        torch.testing.assert_close(logits[:, b], expected[0][:, 0], **ROUNDING)
        torch.testing.assert_close(embeddings[:, b], expected[1][:, 0], **ROUNDING)
        torch.testing.assert_close(masks[:, b, :, :H, :W], expected[3][:, 0], **ROUNDING)
        assert not masks[:, b, :, H:].any() and not masks[:, b, :, :, W:].any()
    together = head.predict(batch, y)
    for b in range(2):
        (single,) = head.predict(alone[b], y_alone[b])
        assert (
            single["image_id"] == together[b]["image_id"] and single["masks"].shape[1:] == y[b]["orig_size"]
        )
        order, order_alone = together[b]["scores"].argsort(), single["scores"].argsort()
        torch.testing.assert_close(together[b]["scores"][order], single["scores"][order_alone], **ROUNDING)
        differing = together[b]["masks"].float().mean() - single["masks"].float().mean()
        assert differing.abs() < 1e-3  # of the pixels, where a logit is zero up to rounding


def test_two_ranks_of_one_image_equal_one_rank_of_two(head, monkeypatch):
    """The mean over the ranks, as DDP takes it; num_masks and class weights are averaged over them too."""
    batch, alone, y, y_alone = two_images()
    fix_points(head, monkeypatch)
    expected, parts = head.loss(batch, y)
    held = []
    monkeypatch.setattr(m2f, "mean_over_ranks", lambda values, device: held.append(values) or torch.ones(2))
    for b in range(2):
        head.loss(alone[b], y_alone[b])
    monkeypatch.setattr(m2f, "mean_over_ranks", lambda values, device: torch.tensor(held).mean(0))
    losses = [head.loss(alone[b], y_alone[b]) for b in range(2)]
    torch.testing.assert_close((losses[0][0] + losses[1][0]) / 2, expected, rtol=1e-4, atol=0)
    for name in parts:
        mean = (losses[0][1][name] + losses[1][1][name]) / 2
        torch.testing.assert_close(mean, parts[name], rtol=1e-4, atol=0)


# --- the loss


def random_answers(B: int, Q: int, H: int, W: int, levels: int = 3):
    torch.manual_seed(3)
    logits = torch.randn(levels, B, Q, 81, requires_grad=True)
    embeddings = torch.randn(levels, B, Q, 256, requires_grad=True)
    pixels = (torch.randn(B, 256, H, W) / 8).requires_grad_()
    return logits, embeddings, pixels


def test_matching_and_loss_equal_transformers(head, monkeypatch):
    """On the same answers, targets and random points; the second image has more targets than queries."""
    B, Q, H, W = 2, 4, 6, 5
    logits, embeddings, pixels = random_answers(B, Q, H, W)
    masks = torch.einsum("lbqd,bdhw->lbqhw", embeddings, pixels)
    y = [target(n, (H * PATCH, W * PATCH)) for n in (3, 6)]
    fix_points(head, monkeypatch)
    loss, parts = head.criterion(logits, embeddings, pixels, masks.detach(), y)

    weight = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    peer = hf.Mask2FormerLoss(Mask2FormerConfig(num_labels=80, train_num_points=head.points), weight)
    truth, labels = [t["masks"].float() for t in y], [t["labels"] for t in y]
    held = {"rows": [0]}

    def rand(n, count, two, device=None):
        return head.random_points(8, count, device)[held["rows"]]

    monkeypatch.setattr(torch, "rand", rand)
    sizes, scales = [len(t["labels"]) for t in y], torch.ones(B, 2)
    costs = head.matching_costs(logits.detach(), masks.detach(), labels, truth, scales)
    match = hungarian(costs)
    expected, first_target = 0, torch.tensor([0, sizes[0]])
    points = rand(1, head.points, 2)
    for b in range(B):
        t = hf.sample_point(truth[b][None], points, align_corners=False)[0]
        x = hf.sample_point(masks[1, b][None].detach(), points, align_corners=False)[0]
        cost = 5 * (hf.pair_wise_sigmoid_cross_entropy_loss(x, t) + hf.pair_wise_dice_loss(x, t))
        cost = cost - 2 * logits[1, b].detach().softmax(-1)[:, labels[b]]
        torch.testing.assert_close(costs[b][1], cost, rtol=1e-5, atol=1e-5)
    for level in range(len(logits)):
        held["rows"] = [0]
        pairs = peer.matcher(masks[level], logits[level], truth, labels)
        assert torch.equal(match.query[level], torch.cat([query for query, _ in pairs]))
        targets = torch.cat([t + first for (_, t), first in zip(pairs, first_target, strict=True)])
        assert torch.equal(match.target[level], targets)
        held["rows"] = torch.cat([t for _, t in pairs])
        peer.matcher.forward = lambda *args, pairs=pairs: pairs
        terms = peer(masks[level], logits[level], truth, labels)
        expected = expected + sum(weight[name] * term for name, term in terms.items())
        del peer.matcher.forward
    for name, term in zip(("mask", "dice", "class"), terms.values(), strict=True):
        torch.testing.assert_close(parts[name], term.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    given = (logits, embeddings, pixels)
    for got, wanted in zip(
        torch.autograd.grad(loss, given), torch.autograd.grad(expected, given), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_points_are_sampled_as_by_transformers():
    maps, points = torch.randn(3, 2, 7, 9), torch.rand(3, 50, 2)
    expected = hf.sample_point(maps, points, align_corners=False)
    torch.testing.assert_close(m2f.sample(maps, points[:, None])[:, :, 0], expected, rtol=0, atol=0)


def half_planes(size: tuple[int, int], padded: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks x < 37 px and y < 29 px of an image, and logits on its padded grid that say the same."""
    y, x = ((torch.arange(side) + 0.5) * PATCH for side in (padded[0] // PATCH, padded[1] // PATCH))
    logits = torch.stack([(37 - x).expand(len(y), -1), (29 - y)[:, None].expand(-1, len(x))])
    columns, rows = torch.arange(size[1]) < 37, torch.arange(size[0]) < 29
    masks = torch.stack([columns.expand(size), rows[:, None].expand(size)])
    return masks, 10 * logits  # steep: the loss is zero but for the pixels on the edge


def test_masks_and_grid_meet_to_the_pixel(head):
    """Release bug B14: the grid covers the padded image, the masks the image. In training and in answers."""
    size, padded = (67, 101), (84, 112)
    masks, logits = half_planes(size, padded)
    scale = torch.tensor([size[1] / padded[1], size[0] / padded[0]])
    head = copy.copy(head)
    head.points = 4096
    embeddings = torch.eye(256)[None, :2]  # so that the pixel features are the logits
    pixels = F.pad(logits, (0, 0, 0, 0, 0, 254))
    # within 7 px of the grid's edge half of a point's neighbours lie outside and read as zero: the sign stays
    bce, dice = head.mask_losses(embeddings, pixels, masks.float(), scale)
    assert bce.max() < 0.5 and dice.max() < 0.02
    bce, _ = head.mask_losses(embeddings, pixels, masks.float(), torch.ones(2))
    assert bce.min() > 2  # what ignoring the padding costs

    y = {"size": size, "padded_size": padded, "orig_size": (134, 202)}
    ones = F.pad(
        torch.ones(1, 5, 8), (0, 2, 0, 3)
    )  # the patches of the image, and those of a batch around it
    y_batch = {**y, "padded_size": (8 * PATCH, 10 * PATCH)}
    torch.testing.assert_close(m2f.full_size(ones, y_batch), torch.ones(1, 134, 202))
    answer = m2f.full_size(logits, y) > 0
    assert answer[0].sum(1).unique().tolist() == [74] and answer[1].sum(0).unique().tolist() == [58]


@pytest.fixture
def two_threads():
    """With one, torch computes gradients of 1 x 1 convolutions in another way, which hides their layout."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("counts", [(0, 0), (2, 0)])
def test_images_without_targets(counts, two_threads):
    """Finite, and every parameter gets a gradient, laid out as DDP wants it."""
    head = new_head()
    head.encoder, head.decoder = head.encoder[:1], head.decoder[:2]  # to be quick
    valid = None if counts[0] else torch.ones(2, 4, 5, dtype=torch.bool)
    f = Features(None, torch.randn(2, D, 4, 5), valid)
    loss, parts = head(f, [target(n, (56, 70)) for n in counts])
    gradients = torch.autograd.grad(loss, list(head.parameters()))  # raises if one is not in the graph
    assert torch.isfinite(loss) and set(parts) == {"class", "mask", "dice"}
    for (name, p), gradient in zip(head.named_parameters(), gradients, strict=True):
        assert gradient.isfinite().all() and gradient.stride() == p.stride(), name
    assert (parts["mask"] > 0) == (sum(counts) > 0)


def test_masks_may_be_uint8(head):
    f, y = Features(None, torch.randn(1, D, 4, 5), None), [target(2, (56, 70))]
    losses = []
    for dtype in (torch.bool, torch.uint8):
        torch.manual_seed(0)
        losses.append(head(f, [{**y[0], "masks": y[0]["masks"].to(dtype)}])[0])
    assert losses[0] == losses[1]
    assert head(f, y)[0] != losses[0]  # other random points


def test_loss_makes_one_transfer_to_the_host(head, monkeypatch):
    f, y = Features(None, torch.randn(2, D, 4, 5), None), [target(2, (56, 70)), target(1, (56, 70))]
    calls = []
    for name in ("cpu", "item", "tolist", "nonzero", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, n=name, real=real: calls.append(n) or real(self, *a)
        )
    head(f, y)
    monkeypatch.undo()
    assert calls == ["cpu"]


def test_the_last_class_can_be_learned():
    """Release bug B3: COCO's 80th class, the toothbrush, was no-object. Two squares in random features."""
    torch.manual_seed(0)
    head = m2f.Mask2Former(8, CATEGORIES)
    head.encoder, head.decoder = head.encoder[:1], head.decoder[:2]  # to be quick
    head.points = 256
    f = Features(None, torch.randn(1, 8, 6, 6), None)
    y = target(2, (84, 84), image_id=7)
    y["labels"], y["masks"] = torch.tensor([79, 0]), torch.zeros(2, 84, 84, dtype=torch.bool)
    y["masks"][0, 14:42, 14:56], y["masks"][1, 56:, 28:] = True, True
    y["orig_size"] = (84, 84)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        head(f, [y])[0].backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    (answer,) = head.predict(f, [y])
    for mask, label in zip(y["masks"], y["labels"], strict=True):
        best = answer["scores"].where(answer["labels"] == label, 0).argmax()
        iou = (answer["masks"][best] & mask).sum() / (answer["masks"][best] | mask).sum()
        assert answer["scores"][best] > 0.8 and iou > 0.8
    assert {c["category_id"] for c in mask_results([answer], CATEGORIES) if c["score"] > 0.5} == {
        90,
        1,
    }


# --- answers


def answering(categories: list[dict], probabilities: torch.Tensor, masks: torch.Tensor) -> m2f.Mask2Former:
    """A head that gives these p(class) (Q, C + 1) and mask logits (Q, H, W)."""
    head = m2f.Mask2Former.__new__(m2f.Mask2Former)
    nn.Module.__init__(head)
    head.config, head.num_classes = {"categories": categories}, len(categories)
    head.decode = lambda f: (probabilities.log()[None, None], None, None, masks[None, None])
    return head


def test_instances_by_hand():
    """Score = p(class) x mean probability where the logit is positive; a class of stuff is no instance."""
    categories = [{"id": 3, "isthing": 1}, {"id": 7, "isthing": 0}, {"id": 90, "isthing": 1}]
    probabilities = torch.tensor([[0.6, 0.3, 0.06, 0.04], [0.1, 0.2, 0.5, 0.2]])
    masks = torch.tensor([[[2.0, -1.0], [1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    y = {"image_id": 5, "size": (2, 2), "padded_size": (2, 2), "orig_size": (2, 2)}
    (answer,) = answering(categories, probabilities, masks).predict(None, [y])
    quality = (torch.tensor(2.0).sigmoid() + torch.tensor(1.0).sigmoid()) / 2
    torch.testing.assert_close(answer["scores"], torch.tensor([0.6 * quality, 0, 0, 0.06 * quality]))
    assert answer["labels"].tolist() == [0, 2, 0, 2]
    assert (
        answer["masks"][0].tolist() == [[True, False], [True, False]] and answer["masks"].dtype == torch.bool
    )
    assert not answer["masks"][1].any()
    results = json.loads(json.dumps(mask_results([answer], categories)))
    assert [r["category_id"] for r in results] == [3, 90, 3, 90] and results[0]["image_id"] == 5
    assert results[0]["segmentation"]["size"] == [2, 2]


def test_panoptic_by_hand():
    """Six columns. Two queries of the same stuff are one segment; a thing beaten on half its mask gives up;
    the unsure and the no-object queries do not take part; a pixel in nobody's mask is void."""
    categories = [{"id": 3, "isthing": 1}, {"id": 7, "isthing": 0}]
    high, low = 0.96, 0.9

    def row(*columns):
        return torch.tensor([[9.0 if c in columns else -9.0 for c in range(6)]])

    probabilities, masks = zip(
        (torch.tensor([high, 0.02, 0.02]), row(0, 1)),  # thing: segment 1
        (torch.tensor([low, 0.05, 0.05]), row(1, 2)),  # thing: wins 1 of 2 columns, < 0.8
        (torch.tensor([0.02, high, 0.02]), row(3)),  # stuff: segment 2
        (torch.tensor([0.02, high, 0.02]), row(4)),  # the same stuff
        (torch.tensor([0.7, 0.2, 0.1]), row(5)),  # unsure
        (torch.tensor([0.02, 0.02, high]), row(5)),  # no object
        strict=True,
    )
    head = answering(categories, torch.stack(probabilities), torch.stack(masks))
    y = {"image_id": 5, "size": (1, 6), "padded_size": (1, 6), "orig_size": (1, 6)}
    (answer,) = head.predict_panoptic(None, [y])
    assert answer["segments"].tolist() == [[1, 1, 0, 2, 2, 0]] and answer["segments"].dtype == torch.int32
    assert answer["segments_info"] == [{"id": 1, "category_id": 3}, {"id": 2, "category_id": 7}]

    head.sure = 0.99
    (answer,) = head.predict_panoptic(None, [y])
    assert not answer["segments"].any() and answer["segments_info"] == []


# --- result files


def test_ground_truth_written_as_results_has_ap_1(real_coco):
    coco = COCO(real_coco / "annotations" / "instances_val2017.json")
    categories = [{"id": c["id"], "name": c["name"]} for c in coco.loadCats(sorted(coco.getCatIds()))]
    label_of = {c["id"]: label for label, c in enumerate(categories)}
    predictions = []
    for image_id in coco.getImgIds():
        annotations = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
        if annotations:
            masks = torch.from_numpy(np.stack([coco.annToMask(a) for a in annotations])).bool()
            labels = torch.tensor([label_of[a["category_id"]] for a in annotations])
            scores = torch.linspace(0.9, 0.5, len(labels))
            predictions.append({"image_id": image_id, "masks": masks, "labels": labels, "scores": scores})
    results = json.loads(json.dumps(mask_results(predictions, categories)))
    evaluation = COCOeval(coco, coco.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def panoptic_quality(truth: list[tuple], predicted: list[tuple]) -> float:
    """Mean over categories of sum IoU / (TP + FP / 2 + FN / 2), of (ids (h, w), segments_info) per image."""
    tallies: dict[int, np.ndarray] = {}  # category -> sum of IoU, TP, segments of both sides
    for (ids_a, infos_a), (ids_b, infos_b) in zip(truth, predicted, strict=True):
        for info in (*infos_a, *infos_b):
            tallies.setdefault(info["category_id"], np.zeros(3))[2] += 1
        for a in infos_a:
            for b in infos_b:
                mask_a, mask_b = ids_a == a["id"], ids_b == b["id"]
                union = (mask_a | (mask_b & (ids_a > 0))).sum()
                iou = (mask_a & mask_b).sum() / union if union else 0
                if a["category_id"] == b["category_id"] and iou > 0.5:
                    tallies[a["category_id"]] += (iou, 1, 0)
    return float(np.mean([2 * iou / segments for iou, _, segments in tallies.values()]))


def test_ground_truth_written_as_panoptic_has_pq_1(real_coco, tmp_path):
    content = json.loads((real_coco / "annotations" / "panoptic_val2017.json").read_text())
    truth, predicted = [], []

    def read(path):
        r, g, b = np.asarray(Image.open(path).convert("RGB")).astype(np.int64).transpose(2, 0, 1)
        return r + 256 * g + 256**2 * b

    for a in content["annotations"]:
        ids = read(real_coco / "annotations" / "panoptic_val2017" / a["file_name"])
        infos = [s for s in a["segments_info"] if not s["iscrowd"]]
        truth.append((np.where(np.isin(ids, [s["id"] for s in infos]), ids, 0), infos))
        prediction = {"image_id": a["image_id"], "segments": torch.from_numpy(truth[-1][0]).int()}
        prediction["segments_info"] = [{k: s[k] for k in ("id", "category_id")} for s in infos]
        written = json.loads(json.dumps(write_panoptic(prediction, tmp_path)))
        assert written["image_id"] == a["image_id"]
        predicted.append((read(tmp_path / written["file_name"]), written["segments_info"]))
        assert set(np.unique(predicted[-1][0])) - {0} == {s["id"] for s in written["segments_info"]}
    assert max(ids.max() for ids, _ in truth) > 256**2  # all three colours are in use
    assert panoptic_quality(truth, predicted) == 1.0
    worse = [(np.roll(ids, 9, 1), infos) for ids, infos in predicted]
    assert panoptic_quality(truth, worse) < 0.9
