"""Segmentation head, one training step (forward, loss, backward): ours against transformers' Mask2Former.

    python benchmarks/mask2former.py

Both at the paper's sizes: one feature level of width 1408 (EVA-ViT-G), 73 x 73 patches (1022 px), batch 1,
20 targets, 12,544 points. transformers' pixel decoder, transformer and loss are cut from three levels to one.
Its Eq. 2 has no H, so ours is timed without H too; the speed-ups of that are in the last line. Interleaved;
medians. Memory: largest resident size (ru_maxrss) of a process of its own in two steps, less that before.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as hf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that ours are found from any folder

from backbone import Features
from heads.mask2former import Mask2Former
from heads.transformer import sine_position

CLASSES, PATCH = 80, 14


class Peer(nn.Module):
    """transformers' Mask2Former on one feature map, at the sizes of ours."""

    def __init__(self, dim: int):
        super().__init__()
        config = Mask2FormerConfig(encoder_feedforward_dim=512, dim_feedforward=1024, num_labels=CLASSES)
        self.pixel_decoder = hf.Mask2FormerPixelDecoder(config, [dim])
        self.pixel_decoder.num_feature_levels = 1
        self.pixel_decoder.level_embed = nn.Parameter(torch.randn(1, 256))
        for layer in self.pixel_decoder.encoder.layers:
            layer.self_attn = hf.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(256, 8, 1, 4)
        self.transformer = hf.Mask2FormerTransformerModule(256, config)
        self.transformer.num_feature_levels = self.transformer.decoder.num_feature_levels = 1
        self.transformer.level_embed = nn.Embedding(1, 256)
        self.class_predictor = nn.Linear(256, CLASSES + 1)
        self.weight = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
        self.criterion = hf.Mask2FormerLoss(config, self.weight)

    def forward(self, f: Features, y: list[dict]) -> torch.Tensor:
        pixels = self.pixel_decoder([f.grid], return_dict=True, output_hidden_states=False)
        decoded = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        answers = [
            {"class_queries_logits": self.class_predictor(q.transpose(0, 1)), "masks_queries_logits": m}
            for q, m in zip(decoded.intermediate_hidden_states, decoded.masks_queries_logits, strict=True)
        ]
        targets = dict(
            mask_labels=[t["masks"].float() for t in y],  # its image processor gives floats
            class_labels=[t["labels"] for t in y],
            auxiliary_predictions=answers[:-1],
        )
        losses = self.criterion(**answers[-1], **targets)
        return sum(
            weight * value
            for name, value in losses.items()
            for prefix, weight in self.weight.items()
            if name.startswith(prefix)
        )


def build(name: str, dim: int) -> nn.Module:
    torch.manual_seed(0)
    categories = [{"id": i, "name": str(i)} for i in range(CLASSES)]
    ours = Mask2Former(dim, categories, eq2_h=name == "ours, with H").train()
    if name != "transformers":
        return ours
    peer = Peer(dim).train()
    for a, b in zip(peer.pixel_decoder.encoder.layers, ours.encoder, strict=True):
        a.self_attn.load_state_dict(b.self_attn.state_dict())  # the same places to look at
    return peer


def inputs(dim: int, side: int, targets: int) -> tuple[Features, list[dict]]:
    torch.manual_seed(0)
    pixels = side * PATCH
    centre, radius = torch.rand(targets, 2, 1, 1) * pixels, (0.05 + 0.2 * torch.rand(targets, 1, 1)) * pixels
    y, x = torch.meshgrid(torch.arange(pixels), torch.arange(pixels), indexing="ij")
    masks = (x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2 < radius**2  # discs
    size = (pixels, pixels)
    target = {"image_id": 1, "size": size, "padded_size": size, "orig_size": size, "masks": masks}
    target["labels"] = torch.randint(CLASSES, (targets,))
    return Features(None, torch.randn(1, dim, side, side), None), [target]


def step(head: nn.Module, f: Features, y: list[dict]) -> tuple[float, float]:
    """Seconds of forward with loss, and of backward."""
    head.zero_grad()
    start = time.perf_counter()
    loss = head(f, y)
    loss = loss[0] if isinstance(loss, tuple) else loss
    middle = time.perf_counter()
    loss.backward()
    return middle - start, time.perf_counter() - middle


def encoder_steps(side: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of forward and backward of the six deformable layers alone."""
    ours, peer = build("ours", 256), build("transformers", 256)
    x = torch.randn(1, side * side, 256, requires_grad=True)
    pos = sine_position(torch.empty(1, 256, side, side), None, 128)
    centres = (2 * torch.arange(side) + 1) / side - 1
    centres = torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)], -1)
    ratios = torch.ones(1, 1, 2)

    def run_ours():
        out = x
        for layer in ours.encoder:
            out = layer(out, pos, centres, None)
        return out

    def run_peer():
        places = dict(spatial_shapes_list=[(side, side)], valid_ratios=ratios, position_embeddings=pos)
        return peer.pixel_decoder.encoder(
            inputs_embeds=x, output_attentions=False, output_hidden_states=False, return_dict=True, **places
        ).last_hidden_state

    seconds = {"ours": [], "transformers": []}
    for _ in range(repeats + 1):
        for name, run in (("ours", run_ours), ("transformers", run_peer)):
            start = time.perf_counter()
            run().sum().backward()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dim", type=int, default=1408, help="width of the features (EVA-ViT-G: 1408)")
    p.add_argument("--side", type=int, default=73, help="patches along each side (73: 1022 px)")
    p.add_argument("--targets", type=int, default=20, help="masks in the image")
    p.add_argument("--repeats", type=int, default=7, help="timed steps of each")
    p.add_argument("--threads", type=int, default=2, help="of torch")
    p.add_argument("--memory-of", help="print the peak memory of two steps of this one and stop")
    args = p.parse_args()
    torch.set_num_threads(args.threads)

    if args.memory_of:
        f, y = inputs(args.dim, args.side, args.targets)
        head = build(args.memory_of, args.dim)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2):
            step(head, f, y)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)  # KiB -> GiB
        return

    names = ["ours", "ours, with H", "transformers"]
    memory = {}  # first, while this process is small: a child's ru_maxrss starts at ours
    for name in names:
        command = [sys.executable, __file__, "--memory-of", name, "--threads", str(args.threads)]
        command += ["--dim", str(args.dim), "--side", str(args.side), "--targets", str(args.targets)]
        memory[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    f, y = inputs(args.dim, args.side, args.targets)
    heads = {name: build(name, args.dim) for name in names}
    seconds = {name: [] for name in names}
    for _ in range(args.repeats + 1):  # the first is the warm-up
        for name in names:
            seconds[name].append(step(heads[name], f, y))
    times = {}
    for name in names:
        forward, backward = zip(*seconds[name][1:], strict=True)
        total = [a + b for a, b in seconds[name][1:]]
        times[name] = [statistics.median(values) for values in (forward, backward, total)]
    encoder = {name: statistics.median(v) for name, v in encoder_steps(args.side, args.repeats).items()}
    encoder["ours, with H"] = encoder["ours"]
    print("| | forward + loss, s | backward, s | step, s | speed-up | encoder, s | speed-up | peak, GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        forward, backward, total = times[name]
        speedups = times["transformers"][2] / total, encoder["transformers"] / encoder[name]
        cells = [forward, backward, total, speedups[0], encoder[name], speedups[1], memory[name]]
        print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    print(
        json.dumps(
            {
                **vars(args),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "step_s": {name: round(times[name][2], 4) for name in names},
                "encoder_s": {name: round(encoder[name], 4) for name in names},
                "peak_gib": {name: round(memory[name], 3) for name in names},
                "step_speedup": round(times["transformers"][2] / times["ours"][2], 3),
                "encoder_speedup": round(encoder["transformers"] / encoder["ours"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
