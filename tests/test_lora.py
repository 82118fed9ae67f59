"""LoRA against the materialized W + BA, peft, and the models that it is attached to."""

import copy
import json

import open_clip
import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

import backbone as vit
import files
import lora

vit.register_models()


def fused_without_bias_parameters() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)


def post_norm_eva() -> nn.Module:
    """EVA-ViT-E's kind of block."""
    size = dict(embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.0, num_classes=0)
    return timm.create_model("eva02_enormous_patch14_clip_224", **size)


def separate_projections() -> nn.Module:
    """timm's EVA02 large style: q_proj, k_proj, v_proj."""
    return timm.create_model("eva02_large_patch14_224", embed_dim=64, depth=2, num_heads=4, num_classes=0)


class LastHidden(nn.Module):
    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, images):
        return self.tower(images).last_hidden_state


def blip2_tower() -> nn.Module:
    size = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return LastHidden(Blip2VisionModel(Blip2VisionConfig(**size, image_size=224, initializer_range=0.02)))


def huggingface_clip_tower() -> nn.Module:
    size = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return LastHidden(CLIPVisionModel(CLIPVisionConfig(**size, image_size=224, patch_size=16)))


HALVES = [torch.bfloat16, torch.float16]
MODELS = [
    lambda: timm.create_model("eva_mini", num_classes=0, depth=2),
    post_norm_eva,
    fused_without_bias_parameters,
    separate_projections,
    blip2_tower,
    huggingface_clip_tower,
]
IDS = ["eva_pre_norm", "eva_post_norm", "timm_vit", "q_proj_v_proj", "blip2", "hf_clip"]


def randomize(model: nn.Module, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in lora.parameters(model).values():
        nn.init.normal_(p, std=std, generator=generator)


@pytest.mark.parametrize("make", MODELS, ids=IDS)
def test_identity_at_first_then_merged_equals_unmerged_and_unmerge_is_exact(make):
    torch.manual_seed(0)
    model, images = make().eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        plain = model(images)
        lora.attach(model, rank=4)
        assert torch.equal(model(images), plain)  # B = 0
        randomize(model)
        weights = {name: layer.weight.clone() for name, layer in lora.layers(model).items()}
        for mode in (True, False):
            model.train(mode)  # changes nothing
            tuned = model(images)
            assert (tuned - plain).abs().max() > 1e-3
            lora.merge(model)
            lora.merge(model)  # once is enough
            torch.testing.assert_close(
                model(images), tuned, atol=2e-5, rtol=1e-4
            )  # fp32, other order of sums
            lora.unmerge(model)
            for name, layer in lora.layers(model).items():
                assert torch.equal(layer.weight, weights[name])
            assert torch.equal(model(images), tuned)


def test_A_begins_uniform_up_to_one_over_the_root_of_the_width():
    torch.manual_seed(0)
    model = lora.attach(timm.create_model("eva_mini", num_classes=0, depth=1), rank=64)
    A = model.blocks[0].attn.qkv.lora_A.detach() * 192**0.5  # (128, 192)
    assert A.abs().max() <= 1 + 1e-6 and A.abs().mean() == pytest.approx(0.5, abs=0.01)  # of 24,576


def test_merge_changes_q_and_v_rows_only_and_by_the_scaled_product():
    model = timm.create_model("eva_mini", num_classes=0, depth=1)
    lora.attach(model, rank=8, alpha=2.0)
    randomize(model)
    layer = model.blocks[0].attn.qkv
    before = layer.weight.clone()
    lora.merge(model)
    q, k, v = (layer.weight - before).chunk(3)
    scale = 2.0 / 8
    torch.testing.assert_close(q, scale * layer.lora_B[:192] @ layer.lora_A[:8], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(v, scale * layer.lora_B[192:] @ layer.lora_A[8:], atol=1e-6, rtol=1e-5)
    assert not k.any()


def test_gradients_equal_those_of_the_materialized_update():
    torch.manual_seed(0)
    model = timm.create_model("eva_mini", num_classes=0, depth=2).requires_grad_(False).double()
    lora.attach(model, rank=4)
    model.double()
    randomize(model)
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    model(images).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in lora.parameters(model).items()}
    model.zero_grad()

    def materialized(layer, x):
        q, v = (b @ a / 4 for a, b in zip(layer.lora_A.split(4), layer.lora_B.chunk(2), strict=True))
        return F.linear(x, layer.weight + torch.cat([q, torch.zeros_like(q), v]), layer.bias)

    for layer in lora.layers(model).values():
        layer.forward = materialized.__get__(layer)
    model(images).square().sum().backward()
    for name, p in lora.parameters(model).items():
        assert ours[name].abs().max() > 0
        torch.testing.assert_close(ours[name], p.grad, atol=1e-9, rtol=1e-9)  # float64


def test_agrees_with_peft_on_separate_layers():
    torch.manual_seed(0)
    ours = huggingface_clip_tower().eval()
    theirs = copy.deepcopy(ours)
    lora.attach(ours, rank=4, alpha=2.0)
    randomize(ours)
    config = peft.LoraConfig(r=4, lora_alpha=2.0, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(theirs, config).eval()
    for name, layer in lora.layers(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        other.lora_A["default"].weight.data.copy_(layer.lora_A)
        other.lora_B["default"].weight.data.copy_(layer.lora_B)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_an_open_clip_tower_takes_it():
    tower = open_clip.create_model("ViT-B-32", force_image_size=64).visual
    with pytest.raises(ValueError, match="no attention"):
        lora.attach(tower)  # open_clip's own ViT keeps q, k, v inside nn.MultiheadAttention
    tower = open_clip.model.TimmModel("eva_mini", 64, pool="token", proj=None)
    assert len(lora.layers(lora.attach(tower, rank=2))) == 6


def test_only_lora_trains_and_the_first_block_gets_gradients():
    backbone = vit.load("eva_mini", "random")
    lora.attach(backbone.vit, rank=2)
    backbone.recompute = 6
    randomize(backbone.vit)
    backbone(torch.randn(1, 3, 56, 56)).grid.square().mean().backward()
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {f"vit.{name}" for name in lora.parameters(backbone.vit)} and len(trained) == 12
    assert all(p.grad.abs().max() > 0 for p in lora.parameters(backbone.vit).values())


def test_names_and_counts_are_the_releases():
    """29,360,128 for EVA-ViT-E (Sec. 3.2: 29.4M), 14,417,920 for -G, rank 64."""
    with torch.device("meta"):
        for name, count, dim in (("eva_e", 29_360_128, 1792), ("eva_g", 14_417_920, 1408)):
            model = lora.attach(vit.Backbone(name).vit, rank=64)
            parameters = lora.parameters(model)
            assert sum(p.numel() for p in parameters.values()) == count
            assert parameters["blocks.0.attn.qkv.lora_A"].shape == (128, dim)
            assert parameters["blocks.0.attn.qkv.lora_B"].shape == (2 * dim, 64)


# --- 16 bit


def gain(applied: Tensor, true: Tensor) -> float:
    """How much of an update arrives: the projection of the applied one on the true one."""
    return ((applied.double() * true.double()).sum() / true.double().square().sum()).item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("blocks", [3, 1], ids=["qkv", "q"])
def test_16_bit_keep_a_layers_update(blocks, bias, dtype):
    """EVA-ViT-G's width. Added to a rounded h, 0.11, 0.36, 0.89 of it arrive in bf16, 0.70 in fp16."""
    torch.manual_seed(0)
    linear = nn.Linear(1408, blocks * 1408, bias=bias, dtype=dtype).requires_grad_(False)
    nn.init.normal_(linear.weight, std=0.03)
    layer = lora.LoRALinear(
        linear, rank=64, alpha=1.0, blocks=blocks, updated=(0, 2) if blocks == 3 else (0,)
    )
    x, eps = torch.randn(2, 400, 1408).to(dtype), torch.finfo(dtype).eps
    plain = linear(x).float()
    W, b = linear.weight.float(), linear.bias.float() if bias else None
    for std in (0.003, 0.01, 0.04):
        nn.init.normal_(layer.lora_B, std=std)
        with torch.no_grad():
            h, delta = layer(x), layer.delta()
            with torch.autocast("cpu", dtype):
                assert torch.equal(layer(x.float()), h) and h.dtype == dtype
            torch.testing.assert_close(h.float(), F.linear(x.float(), W + delta, b), atol=eps, rtol=eps)
            assert 0.98 < gain(h.float() - plain, F.linear(x.float(), delta)) < 1.02, std


def open_clip_tower() -> nn.Module:
    tower = open_clip.model.TimmModel("eva_mini", 192, pool="", proj=None)
    tower.trunk.set_input_size(28)
    tower.trunk.blocks = tower.trunk.blocks[:2]
    return tower


WIDE = dict(embed_dim=192, depth=2, num_heads=4, num_classes=0, global_pool="")
WIDE_HF = dict(hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4)
TOWERS = {  # five tokens of two blocks: many images in little time
    "eva_pre_norm": lambda: timm.create_model("eva_mini", img_size=28, **WIDE),
    "eva_post_norm": lambda: timm.create_model("eva02_enormous_patch14_clip_224", img_size=28, **WIDE),
    "timm_vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=14, **WIDE),
    "blip2": lambda: LastHidden(Blip2VisionModel(Blip2VisionConfig(**WIDE_HF, image_size=28))),
    "hf_clip": lambda: LastHidden(CLIPVisionModel(CLIPVisionConfig(**WIDE_HF, image_size=28, patch_size=14))),
    "open_clip": open_clip_tower,
}


@pytest.mark.parametrize("dtype, std", [(torch.bfloat16, 0.01), (torch.float16, 0.003)], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_16_bit_keep_the_update_at_the_end_of_a_network(name, dtype, std):
    """Each rounding on the way adds noise, 8 times the change itself in bf16, which averages out over images.

    The gain's standard error is 0.015. Added to a rounded h, 0.73 to 0.79 of the update arrives in bf16.
    """
    torch.manual_seed(0)
    model = TOWERS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.03 if parameter.ndim > 1 else 0.1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    model.to(dtype)
    lora.attach(model, rank=64)
    exact = copy.deepcopy(model).float()
    for layers in zip(lora.layers(model).values(), lora.layers(exact).values(), strict=True):
        layers[1].lora_B.data = nn.init.normal_(layers[0].lora_B, std=std).data
    images, change = torch.randn(1000, 3, 28, 28).to(dtype), []
    with torch.no_grad():
        for each, x in ((model, images), (exact, images.float())):
            change.append(lora.switch(each, on=True)(x).float() - lora.switch(each, on=False)(x).float())
    assert 0.9 < gain(*change) < 1.1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_gradients_are_those_of_fp32(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 288, dtype=dtype).requires_grad_(False)
    half = lora.LoRALinear(linear, rank=4, alpha=4.0, blocks=3, updated=(0, 2))
    nn.init.normal_(half.lora_B, std=0.3)
    exact, found = copy.deepcopy(half).float(), []
    x, grad = torch.randn(4, 32, 96).to(dtype), torch.randn(4, 32, 288).to(dtype)
    for layer, tokens in ((half, x), (exact, x.float())):
        layer(tokens.requires_grad_()).backward(grad.to(tokens.dtype))
        found.append((tokens.grad, layer.lora_A.grad, layer.lora_B.grad))
    for ours, true in zip(*found, strict=True):
        assert (ours.float() - true).norm() < 0.01 * true.norm()  # bf16: 8 bits
    assert half.lora_A.grad.dtype == half.lora_B.grad.dtype == torch.float32
    assert half.weight.grad is None and half.bias.grad is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_weights_are_not_merged(dtype):
    model = timm.create_model("eva_mini", num_classes=0, depth=1).to(dtype)
    weight = lora.attach(model, rank=4).blocks[0].attn.qkv.weight.clone()
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv is stored in b?float16.*float\(\).*convert.py"):
        lora.merge(model)
    assert torch.equal(model.blocks[0].attn.qkv.weight, weight)
    lora.merge(model.float())


# --- files and errors


def test_a_file_carries_rank_alpha_and_origin(tmp_path):
    make = lambda: timm.create_model("eva_mini", num_classes=0, depth=2)  # noqa: E731
    torch.manual_seed(0)
    model = make()
    other = copy.deepcopy(model)
    lora.attach(model, rank=4, alpha=4.0)
    randomize(model)
    path = tmp_path / "lora.safetensors"
    lora.save(model, path, backbone="eva_mini", step=7)
    header = lora.load(other, path)
    assert header == {"rank": 4, "alpha": 4.0, "targets": ["qkv"], "backbone": "eva_mini", "step": 7}
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(images), other(images))
    assert sorted(load_file(path)) == sorted(lora.parameters(model)) and len(load_file(path)) == 4
    assert json.dumps(header)


def test_what_does_not_fit_is_refused_and_listed(tmp_path):
    small, large = (timm.create_model("eva_mini", num_classes=0, depth=d) for d in (1, 2))
    lora.attach(small, rank=4)
    path = tmp_path / "lora.safetensors"
    lora.save(small, path)
    with pytest.raises(ValueError, match="missing blocks.1.attn.qkv.lora_A"):
        lora.load(large, path)
    with pytest.raises(ValueError, match=r"\(4, 1.0\).*\(8, 1.0\)"):
        lora.load(lora.attach(timm.create_model("eva_mini", num_classes=0, depth=1), rank=8), path)
    wide = timm.create_model("eva_mini", num_classes=0, depth=1, embed_dim=96)
    with pytest.raises(ValueError, match=r"\(8, 192\), expected \(8, 96\)"):
        lora.load(wide, path)
    with pytest.raises(ValueError, match="attached already"):
        lora.attach(small)
    with pytest.raises(ValueError, match="unmerge"):
        lora.load(lora.merge(small), path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        lora.load(small, tmp_path / "nowhere.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="junk"):
        lora.load(small, tmp_path / "junk.safetensors")


def test_an_attention_that_bypasses_its_linear_is_refused():
    class Bypassing(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            return F.linear(x, self.qkv.weight)

    class HalfBypassing(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q_proj(x) + F.linear(x, self.v_proj.weight)

    with pytest.raises(ValueError, match="Bypassing bypasses its qkv layer"):
        lora.attach(Bypassing(), rank=2)
    with pytest.raises(ValueError, match="HalfBypassing bypasses its v_proj layer"):
        lora.attach(HalfBypassing(), rank=2)


def test_an_output_projection_of_zeros_is_no_bypass():
    for name in ("eva_mini", "vit_tiny_patch16_224", "eva02_large_patch14_224"):
        model = timm.create_model(name, num_classes=0, depth=1, embed_dim=64, num_heads=4)
        nn.init.zeros_(model.blocks[0].attn.proj.weight)
        assert lora.layers(lora.attach(model, rank=2))


def test_switched_off_is_the_frozen_model_and_merged_cannot_be_switched():
    model, images = MODELS[0]().eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        plain = model(images)
        randomize(lora.attach(model, rank=4))
        tuned = model(images)
        assert torch.equal(lora.switch(model, on=False)(images), plain)
        assert torch.equal(lora.switch(model, on=True)(images), tuned)
    with pytest.raises(ValueError, match="unmerge it first"):
        lora.switch(lora.merge(model), on=False)


# --- transformers' vision towers, and one file for fused and separate


SIZE = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16)
MLP, REGISTERS = dict(intermediate_size=64), dict(num_register_tokens=4)
TEXT = transformers.LlamaConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=100)
CLIP = transformers.CLIPVisionConfig(**SIZE, **MLP)
THEIRS = {
    "clip": lambda: CLIPVisionModel(CLIP),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZE, **MLP)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZE)),
    "dinov2_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZE, **REGISTERS)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZE, **MLP, **REGISTERS)),
    "beit": lambda: transformers.BeitModel(transformers.BeitConfig(**SIZE, **MLP)),
    "blip2": lambda: Blip2VisionModel(Blip2VisionConfig(**SIZE, **MLP)),
    "in_llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=CLIP, text_config=TEXT, image_token_index=99)
    ),
}


class Fused(nn.Module):
    """The attention whose qkv has the rows of a tower's q, k and v (of zeros: q and v are compared alone)."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        names = lora.targets(attention)
        self.qkv = nn.Linear(48, 144, bias=False)
        if names != ("qkv",):
            q, v = (getattr(attention, name).weight for name in names)
            self.qkv.weight = nn.Parameter(torch.cat([q, torch.zeros_like(q), v]))

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


@pytest.mark.parametrize("make", THEIRS.values(), ids=THEIRS)
def test_a_file_of_fused_qkv_fits_a_tower_of_transformers_and_back(make, tmp_path):
    torch.manual_seed(0)
    tower = lora.attentions(make())
    fused = [Fused(block["attn"]) for block in tower["blocks"]]
    fused = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"attn": x}) for x in fused)})
    randomize(lora.attach(fused, rank=4, alpha=2.0))
    lora.save(fused, tmp_path / "fused.safetensors")
    lora.load(tower, tmp_path / "fused.safetensors")
    assert len(tower["blocks"]) == 2
    for name, layer in lora.layers(fused).items():
        attention = tower.get_submodule(name.removesuffix(".qkv"))
        parts = [getattr(attention, x) for x in lora.targets(attention)]
        ours = parts[0].delta() if len(parts) == 1 else torch.cat([x.delta() for x in parts])
        theirs = layer.delta() if len(parts) == 1 else torch.cat(layer.delta().chunk(3)[::2])
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
        x = torch.randn(3, 48)
        if len(parts) == 2:
            kept = [F.linear(x, p.weight) + F.linear(x, p.delta()) for p in parts]
            q, _, v = layer(x).chunk(3, -1)
            torch.testing.assert_close(torch.cat([q, v], -1), torch.cat(kept, -1), atol=1e-5, rtol=1e-5)
    lora.save(tower, tmp_path / "separate.safetensors")
    again = copy.deepcopy(fused)
    randomize(again, std=1.0)
    lora.load(again, tmp_path / "separate.safetensors")
    for name, value in lora.parameters(fused).items():
        assert torch.equal(lora.parameters(again)[name], value)


def test_half_a_pair_or_another_width_of_separate_q_and_v_is_refused(tmp_path):
    tower, path = lora.attach(lora.attentions(THEIRS["clip"]()), rank=4), tmp_path / "lora.safetensors"
    wide = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    lora.save(lora.attach(wide, rank=4), path)
    with pytest.raises(ValueError, match=r"blocks.0.attn.q_proj.lora_A is \(4, 192\), expected \(4, 48\)"):
        lora.load(tower, path)
    fused = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, embed_dim=48)
    lora.save(lora.attach(fused, rank=4), path)
    header, state = lora.read(path)

    def refused(model: nn.Module, name: str, value: Tensor | None, what: str) -> None:
        files.save({k: v for k, v in {**state, name: value}.items() if v is not None}, path, lora=header)
        with pytest.raises(ValueError, match=what):
            lora.load(model, path)

    A = "blocks.0.attn.q_proj.lora_A"
    missing = "2 tensors: missing blocks.1.attn.v_proj.lora_B; missing blocks.1.attn.q_proj.lora_B"
    refused(tower, "blocks.1.attn.qkv.lora_B", None, missing)
    refused(tower, "blocks.0.attn.qkv.lora_A", torch.zeros(8), rf"{A} is \(4,\), expected \(4, 48\)")
    refused(tower, "blocks.0.attn.qkv.lora_A", torch.zeros(()), f"missing {A}.*unexpected .*qkv.lora_A")
    lora.save(tower, path)
    header, state = lora.read(path)
    for value in (torch.zeros(3, 7), torch.zeros(()), None):
        refused(fused, A, value, "missing blocks.0.attn.qkv.lora_A; unexpected .blocks.0.attn.")


def test_a_quantized_tower_is_refused():
    tower = THEIRS["clip"]()
    q = tower.encoder.layers[1].self_attn.q_proj
    q.weight = nn.Parameter(torch.zeros(48, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"CLIPAttention is quantized \(torch.int8\): LoRA needs"):
        lora.attach(tower)
    assert not lora.layers(tower)


def test_a_model_with_no_tower_or_two_is_refused():
    with pytest.raises(ValueError, match="0 vision towers"):
        lora.attentions(transformers.LlamaModel(TEXT))
    two = nn.ModuleList([THEIRS["clip"](), THEIRS["dinov2"]()])
    with pytest.raises(ValueError, match="2 vision towers"):
        lora.attentions(two)
