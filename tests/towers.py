"""The vision towers that the tests cover, small and random, each from the library that it is compared with.

python -m tests.towers           # the table of README.md, from what test_towers.py is run with
python -m tests.towers --write   # puts it there
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import open_clip
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models import register_model
from torch import Tensor, nn

import backbone as vit

vit.register_models()  # eva_g_blip2
transformers.utils.logging.disable_progress_bar()
SIDE, WIDTH = 4, 48  # patches of a side, at its own size; features of a token
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- python -m tests.towers --write -->\n", "<!-- end -->\n"
THEIRS = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3)
MLP, REGISTERS = dict(intermediate_size=2 * WIDTH), dict(num_register_tokens=4)
OURS = dict(embed_dim=WIDTH, depth=2, num_heads=3, mlp_ratio=2)


class Tower(NamedTuple):
    """A row of the table.

    timm: --model; library: whose features ours equal; make: patch size -> the same of the library, small
    ours: what makes timm's as small; to: exports; other: also at another size than its own
    zero_shot: --clip scores it; needs: a word of what --weights is
    """

    name: str
    timm: str
    library: str
    make: Callable[[int], nn.Module]
    to: tuple[str, ...]
    weights: str
    ours: dict = {}
    other: bool = True
    zero_shot: bool = False

    @property
    def model(self) -> str:
        """timm's, as small as theirs: registered under a name of its own."""
        name, size = f"small_{self.timm}", {**OURS, **self.ours}
        if not timm.is_model(name):

            def make(pretrained: bool = False, **options) -> nn.Module:
                return timm.create_model(self.timm, **{**size, **options})

            make.__name__ = name
            register_model(make)
        return name

    @property
    def patch(self) -> int:
        return facts(self.timm)["patch"]

    def save(self, folder: Path) -> Path:
        """Its weights, random, as its library keeps them; what --weights is given."""
        torch.manual_seed(0)
        _ = self.model  # open_clip asks timm for it
        model = self.make(self.patch)
        without = "dinov3" in self.timm and "qkvb" not in self.timm  # its biases of q and v are zeros
        for name, p in model.named_parameters():
            nn.init.normal_(p, std=1.0 if name.endswith("lambda1") else 0.1)
            if without and name.endswith(("q_proj.bias", "v_proj.bias")):
                nn.init.zeros_(p)
        if self.library == "transformers":
            model.save_pretrained(folder / "theirs")
            return folder / "theirs"
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / "theirs.safetensors")
        return folder / "theirs.safetensors"

    def images(self, height: int = SIDE, width: int = SIDE) -> Tensor:
        size = height * self.patch, width * self.patch
        return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def clip(act: str) -> Callable[[int], nn.Module]:
    def make(patch: int) -> nn.Module:
        size = dict(image_size=SIDE * patch, patch_size=patch)
        return transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**THEIRS, **MLP, **size, hidden_act=act)
        )

    return make


def siglip(patch: int) -> nn.Module:
    size = dict(image_size=SIDE * patch, patch_size=patch)
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**THEIRS, **MLP, **size))


def dinov2(**more) -> Callable[[int], nn.Module]:
    def make(patch: int) -> nn.Module:
        size = dict(image_size=SIDE * patch, patch_size=patch, mlp_ratio=2, layerscale_value=1.0)
        return transformers.Dinov2Model(transformers.Dinov2Config(**THEIRS, **size, **more))

    return make


def dinov2_registers(patch: int) -> nn.Module:
    size = dict(image_size=SIDE * patch, patch_size=patch, mlp_ratio=2, **REGISTERS)
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**THEIRS, **size))


def dinov3(**more) -> Callable[[int], nn.Module]:
    def make(patch: int) -> nn.Module:
        config = transformers.DINOv3ViTConfig(**THEIRS, **MLP, **REGISTERS, patch_size=patch, **more)
        return transformers.DINOv3ViTModel(config)

    return make


def blip2(patch: int) -> nn.Module:
    config = dict(image_size=SIDE * patch, patch_size=patch, initializer_range=0.02)
    return transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**THEIRS, **MLP, **config))


def of_open_clip(name: str, **vision) -> Callable[[int], nn.Module]:
    """A whole CLIP, which open_clip knows as test_NAME."""

    def make(patch: int) -> nn.Module:
        vision_cfg = {
            "image_size": SIDE * patch,
            **vision,
            **({"patch_size": patch} if "width" in vision else {}),
        }
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        config = {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text}
        config |= {"quick_gelu": True} if "width" in vision else {"custom_text": True}
        file = Path(tempfile.mkdtemp()) / f"test_{name}.json"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
        return open_clip.create_model(file.stem)

    return make


def of_timm(name: str, **ours) -> Callable[[int], nn.Module]:
    return lambda patch: timm.create_model(name, num_classes=0, **{**OURS, **ours})


def at(patch: int, **more) -> dict:
    return {"img_size": SIDE * patch, **more}


ANY, WHOLE, FOLDER = ("timm", "peft"), "a whole CLIP's file", "a folder, also of a bigger model"
TIMM = "a file, `pretrained`"
HF = ("transformers", "timm")
EVA = dict(timm_pool="token", timm_proj=None, timm_model_name="small_eva_giant_patch14_clip_224")
OWN = dict(width=WIDTH, layers=2, head_width=16, mlp_ratio=2.0)
TOWERS = [
    Tower(
        "EVA-CLIP (Table 2)", "eva_giant_patch14_clip_224", "open_clip", of_open_clip("eva", **EVA),
        ("timm", "open_clip", "eva_clip", "peft"), WHOLE, at(14, global_pool="token"), zero_shot=True,
    ),
    Tower(
        "CLIP of OpenAI, LAION, ...: open_clip", "vit_large_patch14_clip_quickgelu_336", "open_clip",
        of_open_clip("own", **OWN), ("timm", "open_clip"), WHOLE, at(14), zero_shot=True,
    ),
    Tower(
        "CLIP of OpenAI: transformers, LLaVA", "vit_large_patch14_clip_quickgelu_336", "transformers",
        clip("quick_gelu"), HF, FOLDER, at(14),
    ),
    Tower(
        "CLIP of LAION: transformers", "vit_base_patch32_clip_224", "transformers", clip("gelu"), HF, FOLDER,
        at(32),
    ),
    Tower(
        "SigLIP, SigLIP 2, PaliGemma, SmolVLM", "vit_so400m_patch14_siglip_384", "transformers", siglip, HF,
        FOLDER, at(14),
    ),
    Tower(
        "BLIP-2", "eva_g_blip2", "transformers", blip2, ("blip2", *HF, "peft"), FOLDER, at(14)
    ),
    Tower("DINOv2", "vit_base_patch14_dinov2", "transformers", dinov2(), HF, FOLDER, at(14)),
    Tower(
        "DINOv2 giant", "vit_giant_patch14_dinov2", "transformers", dinov2(use_swiglu_ffn=True), HF, FOLDER,
        at(14, mlp_ratio=128 / WIDTH),
    ),
    Tower(
        "DINOv2 with registers", "vit_base_patch14_reg4_dinov2", "transformers", dinov2_registers, HF, FOLDER,
        at(14), other=False,  # its resize smooths (antialias), ours does not
    ),
    Tower("DINOv3", "vit_base_patch16_dinov3", "transformers", dinov3(), HF, FOLDER),
    Tower(
        "DINOv3 plus, DINOv3 with biases", "vit_small_plus_patch16_dinov3_qkvb", "transformers",
        dinov3(use_gated_mlp=True, hidden_act="silu"), HF, FOLDER,
    ),
    Tower("EVA-02", (name := "eva02_base_patch14_224"), "timm", of_timm(name), ANY, TIMM),
    Tower("PE", (name := "vit_pe_core_base_patch16_224"), "timm", of_timm(name), ANY, TIMM),
    Tower("any plain ViT of timm's", (name := "vit_base_patch16_224"), "timm", of_timm(name), ANY, TIMM),
]  # fmt: skip


@cache
def facts(timm_name: str) -> dict:
    """Of the real model."""
    with torch.device("meta"):
        backbone = vit.Backbone(timm_name)
    rotary, learned = getattr(backbone.vit, "rope", None) is not None, backbone.vit.pos_embed is not None
    positions = " and ".join(["learned"] * learned + ["rotary"] * rotary)
    registers = backbone.vit.num_prefix_tokens - backbone.has_cls
    tokens = ["[CLS]"] * backbone.has_cls + [f"{registers} registers"] * bool(registers)
    return {"patch": backbone.patch, "positions": positions, "tokens": ", ".join(tokens) or "none"}


def table() -> str:
    """README's block."""
    columns = [
        "tower",
        "patch",
        "positions",
        "more tokens",
        "zero-shot",
        "export --to",
        "--model",
        "--weights",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in TOWERS:
        known, model = facts(row.timm), f"`{row.timm}`"
        scored, to = "yes" if row.zero_shot else "", ", ".join(row.to)
        cells = [
            row.name,
            known["patch"],
            known["positions"],
            known["tokens"],
            scored,
            to,
            model,
            row.weights,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def block(readme: str) -> tuple[str, str, str]:
    """What is before the table, the table, what is after it."""
    before, rest = readme.split(BEGIN)
    inside, after = rest.split(END)
    return before + BEGIN, inside, END + after


def main() -> None:
    if "--write" in sys.argv:
        before, _, after = block(README.read_text())
        README.write_text(before + table() + after)
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
