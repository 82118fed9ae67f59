"""LoRA on the query and value projections of any ViT (paper Eq. 1): h = W x + (alpha / rank) B A x.

    lora.attach(vit, rank=64)      # in place: every attention layer, identity until B is trained
    lora.save(vit, "lora.safetensors", step=5000)
    lora.load(vit, "lora.safetensors")   # attaches if need be
    lora.merge(vit); lora.unmerge(vit)   # W <- W + (alpha / rank) B A, and back, bit for bit
    lora.switch(vit, on=False)           # h = W x for a while: before and after with one set of weights

It works from outside, on timm's EVA and plain ViTs, open_clip's towers and transformers' vision models:
wherever attention has one fused `qkv` Linear, or one for q and one for v. Names, row order (q, then v) and
shapes are those of the authors' released files; a file fits both kinds of attention. train() and eval()
change nothing: merging is a call.
"""

import inspect
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import files

# What an attention calls its Linear modules: timm's and others' fused, timm's and transformers', older ViTs
TARGETS = ("qkv",), ("q_proj", "v_proj"), ("query", "value")


class LoRALinear(nn.Linear):
    """A frozen Linear, its weight and bias kept by identity, plus low-rank updates of some of its row blocks.

    linear: the layer to take over, D_in -> D_out in `blocks` equal row blocks (fused qkv: 3; q or v alone: 1)
    updated: which blocks get an update, e.g. (0, 2) for q and v
    lora_A: (n r, D_in), lora_B: (n D_out / blocks, r), n = len(updated); always float32
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, blocks: int, updated: tuple[int, ...]):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.blocks, self.updated = rank, alpha, blocks, updated
        n, rows = len(updated), linear.out_features // blocks
        new = dict(device=linear.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(n * rank, linear.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(n * rows, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(+-1 / sqrt(D)), as LoRA's authors
        self.kept: Tensor | None = None  # the weight before merge()
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not None or not self.on:
            return F.linear(x, self.weight, self.bias)  # (..., D_out)
        a = F.linear(x, self.lora_A.to(x.dtype)) * (self.alpha / self.rank)  # (..., n r)
        B = self.lora_B.to(x.dtype).chunk(len(self.updated))
        updates = [F.linear(u, b) for u, b in zip(a.split(self.rank, -1), B, strict=True)]  # n of (..., rows)
        BAx = updates[0]
        if self.blocks > 1:
            block, zeros = dict(zip(self.updated, updates, strict=True)), torch.zeros_like(BAx)
            BAx = torch.cat([block.get(i, zeros) for i in range(self.blocks)], -1)  # (..., D_out)
        if BAx.dtype.itemsize > 2:
            return F.linear(x, self.weight, self.bias) + BAx
        # In 16 bit the product adds all in fp32 and rounds once. Added to an h that is rounded already, what
        # is below half a step of h is lost: in bf16, early in training, nine tenths of the update
        x, W = x.flatten(0, -2), self.weight
        if self.bias is not None:  # a column of W for a 1 behind x; eight, for the sake of alignment
            x, W = F.pad(x, (0, 8), value=1.0), torch.cat([W, F.pad(self.bias[:, None], (0, 7))], 1)
        return torch.addmm(BAx.flatten(0, -2), x, W.t()).view(BAx.shape)

    def delta(self) -> Tensor:
        """The update as a dense (D_out, D_in) float32 matrix."""
        A, B = self.lora_A.split(self.rank), self.lora_B.chunk(len(self.updated))
        products = [b @ a * (self.alpha / self.rank) for a, b in zip(A, B, strict=True)]
        block = dict(zip(self.updated, products, strict=True))
        return torch.cat([block.get(i, torch.zeros_like(products[0])) for i in range(self.blocks)])


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The attached layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What stage 2 trains: every lora_A and lora_B by name, in the model's order."""
    found = layers(model).items()
    return {f"{name}.{part}": getattr(layer, part) for name, layer in found for part in ("lora_A", "lora_B")}


def targets(attention: nn.Module) -> tuple[str, ...]:
    """The names of the Linear modules that LoRA updates: ("qkv",), or those of q and v; () if it has none."""
    for names in TARGETS:
        linears = [getattr(attention, name, None) for name in names]
        if all(isinstance(x, nn.Linear) for x in linears):
            rows, columns = linears[0].out_features, linears[0].in_features
            if names != ("qkv",) or rows == 3 * columns:
                return names
    return ()


def attentions(model: nn.Module) -> nn.ModuleDict:
    """The attentions of transformers' vision tower under timm's names, blocks.N.attn, which LoRA files have.

    model: the tower (CLIP's, SigLIP's, DINOv2's, DINOv3's, BLIP-2's, ...) or a bigger model that has one
    Raises ValueError if there is not exactly one: a ViT has patch embeddings, and a list of layers.
    """
    patches = ("patch_embedding", "patch_embeddings")
    towers = [m for m in model.modules() if any(hasattr(getattr(m, "embeddings", None), p) for p in patches)]
    if len(towers) != 1:
        raise ValueError(f"{type(model).__name__}: {len(towers)} vision towers of transformers' in it, not 1")
    lists = {name.rpartition(".")[2]: m for name, m in towers[0].named_modules() if type(m) is nn.ModuleList}
    layers = lists.get("layers", lists.get("layer", []))
    found = [[m for m in layer.modules() if targets(m)] for layer in layers]
    if not found or any(len(of_layer) != 1 for of_layer in found):
        raise ValueError(f"{type(towers[0]).__name__}: not a ViT with one attention in each layer")
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"attn": attn}) for (attn,) in found)})


def attach(model: nn.Module, rank: int = 64, alpha: float = 1.0) -> nn.Module:
    """Put A and B beside the q and v of every attention layer, in place; the output does not change yet.

    alpha: the update is scaled by alpha / rank; the authors' released weights: 1; Eq. 1 as printed: the rank
    Raises ValueError if the model has no such layer, a quantized one, or LoRA already, or does not use it.
    """
    if layers(model):
        raise ValueError("LoRA is attached already")
    if rank < 1:
        raise ValueError(f"the LoRA rank must be at least 1, got {rank}")
    found = [(module, targets(module)) for module in model.modules() if targets(module)]
    if not found:
        raise ValueError(
            f"{type(model).__name__}: no attention with a `qkv`, or `q_proj` and `v_proj`, Linear"
        )
    for attention, names in found:
        for dtype in {getattr(attention, name).weight.dtype for name in names}:
            if not dtype.is_floating_point:
                raise ValueError(
                    f"{type(attention).__name__} is quantized ({dtype}): LoRA needs 16 or 32 bit"
                )
    for attention, names in found:
        fused = dict(blocks=3, updated=(0, 2)) if names == ("qkv",) else dict(blocks=1, updated=(0,))
        for name in names:
            setattr(attention, name, LoRALinear(getattr(attention, name), rank, alpha, **fused))
        if hasattr(attention, "qkv_bias_separate"):
            attention.qkv_bias_separate = True  # else timm's EvaAttention never calls qkv, only reads it
    _assert_used(found[0][0])
    return model


@torch.no_grad()
def _assert_used(attention: nn.Module) -> None:
    """An attention that reads its Linear modules' weights would leave the update without effect or error."""
    found = layers(attention)
    weight = next(iter(found.values())).weight
    if weight.is_meta:
        return
    called, hooks = set(), []
    for name, layer in found.items():
        hooks.append(layer.register_forward_hook(lambda *_, name=name: called.add(name)))
    x, more = torch.zeros(1, 4, weight.shape[1], device=weight.device, dtype=weight.dtype), {}
    if "position_embeddings" in inspect.signature(attention.forward).parameters:  # DINOv3's in transformers
        more["position_embeddings"] = x.new_ones(4, 1), x.new_zeros(4, 1)  # cosines, sines
    try:
        attention(x, **more)
    finally:
        for hook in hooks:
            hook.remove()
    if bypassed := [name for name in found if name not in called]:
        kind, names = type(attention).__name__, " and ".join(bypassed)
        raise ValueError(f"{kind} bypasses its {names} layer: LoRA would have no effect")


def save(model: nn.Module, path: str | Path, /, **header) -> None:
    """Write every A and B and a JSON header: rank, alpha, targets, and what is given (backbone, step)."""
    found = layers(model)
    first = next(iter(found.values()))
    targets = sorted({name.rpartition(".")[2] for name in found})
    header = {"rank": first.rank, "alpha": first.alpha, "targets": targets, **header}
    files.save(parameters(model), path, lora=header)


def read_header(path: str | Path) -> dict:
    """The JSON header alone. Raises FileNotFoundError, or ValueError if the file is not one of ours."""
    header = files.read_header(path, "LoRA")
    rank, alpha, targets = header["rank"], header["alpha"], header["targets"]
    if rank < 1 or not 0 < alpha < 1e9 or not all(type(target) is str for target in targets):
        found = f"rank {files.shown(rank)}, alpha {files.shown(alpha)}, targets {files.shown(targets)}"
        raise ValueError(f"{path}: {found}: expected positive numbers and names of layers")
    return header


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors. Raises as read_header, and ValueError if no tensor has the rank of the header."""
    header, state = read_header(path), files.read_tensors(path)
    ranks = {tuple(value.shape[1:]) for name, value in state.items() if name.endswith("lora_B")}
    if ranks != {(header["rank"],)}:
        found = ", ".join(sorted({str(rank[0]) for rank in ranks if rank})) or "none"
        raise ValueError(f"{path}: rank {files.shown(header['rank'])}, that of its tensors is {found}")
    return header, state


def load(model: nn.Module, path: str | Path, without: str | None = None) -> dict:
    """Fill A and B from a file, attaching them first if need be; returns the header.

    One file is for a fused qkv and for separate q and v: its rows are q's, then v's.
    without: leave out what begins with this name, a block that the model does not have
    Raises ValueError listing what does not fit: rank, alpha, layers that the model or the file lacks, shapes.
    """
    header, state = read(path)
    found = layers(model)
    if not found:
        attach(model, header["rank"], header["alpha"])
    elif (layer := next(iter(found.values()))).kept is not None:
        raise ValueError("unmerge the LoRA that is there before loading another")
    elif (layer.rank, layer.alpha) != (header["rank"], header["alpha"]):
        have, got = (layer.rank, layer.alpha), (header["rank"], header["alpha"])
        raise ValueError(f"{path} has (rank, alpha) {got}; this model has {have}")
    expected = parameters(model)
    state = {name: value for name, value in state.items() if not (without and name.startswith(without))}
    state = as_in(expected, state)
    files.check(state, expected, f"{path} does not fit this model")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(state[name])
    return header


def as_in(expected: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's A and B with q and v fused or separate as `expected` has them; what fits neither stays."""
    state = dict(state)
    for name in expected:
        attention, layer, part = re.fullmatch(r"(.*?)(\w*)\.(\w+)", name).groups()
        for q, v in TARGETS[1:]:
            q, v, qkv = (f"{attention}{x}.{part}" for x in (q, v, "qkv"))
            if name == q and qkv in state and state[qkv].ndim:
                state[q], state[v] = state.pop(qkv).tensor_split(2)
            elif layer == "qkv" and q in state and v in state and state[q].shape == state[v].shape != ():
                state[name] = torch.cat([state.pop(q), state.pop(v)])
    return state


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """W <- W + (alpha / rank) B A in place; A, B and the old W are kept for unmerge.

    Raises ValueError if a W is in 16 bit: in bf16 36-39% of the update would be lost in its rounding.
    """
    for name, layer in layers(model).items():
        if layer.weight.dtype.itemsize < 4:
            raise ValueError(
                f"{name} is stored in {str(layer.weight.dtype)[6:]}, whose rounding would take much of the "
                "update away: call model.float() first, or export with convert.py, which merges in float32"
            )
    for layer in layers(model).values():
        if layer.kept is None:
            layer.kept = layer.weight.clone()
            layer.weight.add_(layer.delta())
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Undo merge() bit for bit."""
    for layer in layers(model).values():
        if layer.kept is not None:
            layer.weight.copy_(layer.kept)
            layer.kept = None
    return model


def switch(model: nn.Module, on: bool) -> nn.Module:
    """Leave the updates out of the computation, or put them back in. Raises ValueError if they are merged."""
    for name, layer in layers(model).items():
        if layer.kept is not None:
            raise ValueError(f"{name} is merged: unmerge it first")
        layer.on = on
    return model
