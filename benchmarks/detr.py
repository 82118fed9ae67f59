"""Detection and pose heads, one training step (forward, loss, backward), against transformers' parts.

    python benchmarks/detr.py

Detection: D = 1408, 48 x 48 patches (672 px), 7 to 20 targets an image. transformers' DETR has one width; its
encoder and decoder layers (fused attention), its position code and its loss are put into our head's shape
with our weights and dropout, and without dropout both give the same loss. With dropout, as in stage 1, a CPU
spends most of the step on that of the encoder's 2,305 x 2,305 attention; without, as in stage 2, products
limit both. The loss and its matching have a table of their own (detr_loss.py). Pose: 8 crops of 18 x 14
patches; transformers' ViTPose has a decoder, but no loss: it gets the squared error to heat maps at hand,
ours makes them, too. Its transposed convolutions limit both. Interleaved; medians.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.models.detr import modeling_detr as hf
from transformers.models.vitpose.modeling_vitpose import VitPoseClassicDecoder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, which has a lora.py too

import detr_loss  # noqa: E402

from backbone import Features  # noqa: E402
from heads.detr import Detr  # noqa: E402
from heads.pose import Pose  # noqa: E402


def take_over(layer: nn.Module, ours: nn.Module) -> nn.Module:
    """A transformers' layer with the weights of our layer of the same kind."""
    attentions = {"self_attn": ours.self_attn, "encoder_attn": getattr(ours, "multihead_attn", None)}
    norms = ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]
    pairs = [(layer.mlp.fc1, ours.linear1), (layer.mlp.fc2, ours.linear2)]
    names = [name for name in norms if hasattr(layer, name)]
    pairs += [(getattr(layer, name), getattr(ours, f"norm{k}")) for k, name in enumerate(names, 1)]
    for theirs, own in pairs:
        theirs.load_state_dict(own.state_dict())
    for name, own in attentions.items():
        if own is None:
            continue
        attention = getattr(layer, name)
        for k, part in enumerate(("q_proj", "k_proj", "v_proj")):
            weight, bias = own.in_proj_weight.chunk(3)[k], own.in_proj_bias.chunk(3)[k]
            getattr(attention, part).load_state_dict({"weight": weight, "bias": bias})
        attention.o_proj.load_state_dict(own.out_proj.state_dict())
    return layer


class Theirs(nn.Module):
    """Our detection head with transformers' layers, position code and loss in the places of ours."""

    def __init__(self, ours: Detr):
        super().__init__()
        self.head = copy.deepcopy(ours)
        kinds = {"encoder": (hf.DetrEncoderLayer, 128), "decoder": (hf.DetrDecoderLayer, 256)}
        for name, (kind, width) in kinds.items():
            sizes = dict(d_model=width, encoder_ffn_dim=1024, decoder_ffn_dim=1024)
            dropout = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.1)  # DETR's
            config = transformers.DetrConfig(**sizes, **dropout, attn_implementation="sdpa")
            layers = [take_over(kind(config), layer) for layer in getattr(ours, name)]
            setattr(self.head, name, nn.ModuleList(layers))
        self.position = hf.DetrSinePositionEmbedding(64, normalize=True)

    def loss(self, f: Features, y: list[dict]) -> tuple[Tensor, dict]:
        head, (B, _, H, W) = self.head, f.grid.shape
        pos = self.position(torch.Size((B, 1, H, W)), f.grid.device, f.grid.dtype)
        pos = pos.flatten(2).transpose(1, 2)  # (B, N, 128)
        x = head.input_proj(f.grid).flatten(2).transpose(1, 2)
        tokens = torch.cat([head.task_token.expand(B, 1, -1), x], 1)
        token_pos = nn.functional.pad(pos, (0, 0, 1, 0))
        for layer in head.encoder:
            tokens = layer(tokens, None, spatial_position_embeddings=token_pos)
        memory, pos = head.enc2dec_proj(x + tokens[:, 1:]), head.pos_embed_proj(pos)
        query_pos = head.query_embed.weight.expand(B, -1, -1)
        q, levels = torch.zeros_like(query_pos), []
        for layer in head.decoder:
            places = dict(spatial_position_embeddings=pos, object_queries_position_embeddings=query_pos)
            q = layer(q, None, encoder_hidden_states=memory, **places)
            levels.append(head.decoder_norm(q))
        q = torch.stack(levels)
        return detr_loss.their_loss(head, head.class_embed(q), head.bbox_embed(q).sigmoid(), y), {}


class TheirPose(nn.Module):
    """transformers' decoder and the squared error to heat maps at hand."""

    def __init__(self, dim: int, heat: Tensor):
        super().__init__()
        backbone = transformers.VitPoseBackboneConfig(hidden_size=dim)
        self.decoder = VitPoseClassicDecoder(
            transformers.VitPoseConfig(backbone_config=backbone, num_labels=heat.shape[1])
        )
        self.heat = heat

    def loss(self, f: Features, y: list[dict]) -> tuple[Tensor, dict]:
        return (self.decoder(f.grid) - self.heat).square().mean(), {}


def step(head: nn.Module, f: Features, y: list[dict]) -> None:
    head.zero_grad()
    f.grid.grad = None
    head.loss(f, y)[0].backward()


def detection(args: argparse.Namespace, dropout: bool) -> dict:
    categories = [{"id": i, "name": str(i)} for i in range(detr_loss.CLASSES)]
    ours = Detr(args.dim, categories)
    theirs, y = Theirs(ours), detr_loss.targets(args.batch)
    f = Features(None, torch.randn(args.batch, args.dim, args.side, args.side, requires_grad=True), None)
    with torch.no_grad():
        values = [head.eval().loss(f, y)[0] for head in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=1e-4, atol=0)  # sums of products in another order
    heads = {"ours": ours.train(dropout), "transformers": theirs.train(dropout)}
    return {who: partial(step, head, f, y) for who, head in heads.items()}


def pose(args: argparse.Namespace) -> dict:
    names = [str(k) for k in range(17)]  # COCO's
    ours = Pose(args.dim, [{"id": 1, "name": "person", "keypoints": names, "mirror": list(range(17))}])
    f = Features(None, torch.randn(args.crops, args.dim, 18, 14, requires_grad=True), None)
    keypoints = torch.rand(args.crops, 17, 3) * torch.tensor([196.0, 252.0, 0.0]) + torch.tensor([0, 0, 2.0])
    y = [{"image_id": i, "keypoints": k, "padded_size": (252, 196)} for i, k in enumerate(keypoints)]
    theirs = TheirPose(args.dim, ours.targets(keypoints, (72, 56), (252, 196))[0])
    return {"ours": partial(step, ours.train(), f, y), "transformers": partial(step, theirs.train(), f, y)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dim", type=int, default=1408, help="width of the features (EVA-ViT-G: 1408)")
    p.add_argument("--side", type=int, default=48, help="patches along each side (48: 672 px)")
    p.add_argument("--batch", type=int, default=1, help="images (Sec. 4.2: 1)")
    p.add_argument("--crops", type=int, default=8, help="of pose")
    p.add_argument("--reps", type=int, default=9, help="rounds to take medians over")
    p.add_argument("--threads", type=int, default=2, help="of torch")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    print("| head | | ms a step | times as fast |\n|---|---|---|---|")
    answer = {"torch": torch.__version__, "transformers": transformers.__version__, **vars(args)}
    cases = {"detection": detection(args, True), "detection, no dropout": detection(args, False)}
    for name, runs in {**cases, "pose": pose(args)}.items():
        seconds = {who: [] for who in runs}
        for _ in range(args.reps + 1):  # the first is the warm-up
            for who, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[who].append(time.perf_counter() - start)
        medians = {who: statistics.median(values[1:]) for who, values in seconds.items()}
        for who, value in medians.items():
            print(f"| {name} | {who} | {1e3 * value:.0f} | {medians['transformers'] / value:.2f} |")
        answer[f"{name}_ms"] = {who: [round(1e3 * t, 1) for t in v[1:]] for who, v in seconds.items()}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
