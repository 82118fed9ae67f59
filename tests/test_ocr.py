"""The text recognition head: what it reads from, its loss, and that it learns."""

import pytest
import torch
from test_words import some_words

from backbone import Features
from data import words
from heads.ocr import OcrHead


def features(B=3, seed=0) -> Features:
    torch.manual_seed(seed)
    return Features(torch.randn(B, 24), torch.randn(B, 24, 4, 8), None)


def test_a_word_ends_at_the_first_end_and_is_whole_without_one():
    head = OcrHead(24, 33, words.CHARSETS[36], width=16)
    a, b, end = 1 + 10, 1 + 11, 0
    assert head.decode([a, b, end, b, end]) == "ab"
    assert head.decode([end, a]) == "" and head.decode([a] * 26) == "a" * 26
    assert head.encode(["ab", ""]).tolist() == [[a, b, end] + [-100] * 23, [end] + [-100] * 25]
    assert head.decode(head.encode(["z" * 25])[0].tolist()) == "z" * 25


def test_loss_is_the_mean_over_characters_and_ends():
    head = OcrHead(24, 33, words.CHARSETS[94], width=16)
    f, labels = features(), ["Ab", "", "c!9"]
    loss, parts = head.loss(f, [{"label": label} for label in labels])
    log_p, total, count = head.logits(f).log_softmax(-1), 0.0, 0
    for row, label in zip(log_p, labels, strict=True):
        for place, k in enumerate([1 + words.CHARSETS[94].index(c) for c in label] + [0]):
            total, count = total - row[place, k].item(), count + 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5) and count == 8
    assert head.logits(f).shape == (3, 26, 95)
    assert 0 <= parts["right"] <= 1


def test_reading_from_tokens_leaves_cls_out_and_needs_enough_of_them():
    head = OcrHead(24, 33, "ab", width=16).eval()
    f = features()
    for layer in head.layers:  # without attention a place only sees its own token
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.out_proj.bias)
    changed = f.grid.clone().requires_grad_()
    head.logits(f._replace(grid=changed))[:, 7].sum().backward()
    assert changed.grad.abs().sum((0, 1)).flatten().nonzero().flatten().tolist() == [7]  # row 0, column 7
    plain = OcrHead(24, 32, "ab", width=16)  # a backbone without [CLS]
    assert plain.logits(f._replace(cls=None)).shape == (3, 26, 3)
    with pytest.raises(ValueError, match="26 tokens are too few to read 26 from"):
        OcrHead(24, 26, "ab")


def test_a_layer_normalizes_before_attention_and_before_its_mlp():
    """x + A(LN x), then that + MLP(LN of it), from the layer's own parts: as DeiT, which ViTSTR is."""
    torch.manual_seed(0)
    layer, x = OcrHead(24, 33, "ab", width=16).layers[0].eval(), torch.randn(2, 5, 16)
    n = layer.norm1(x)
    y = x + layer.self_attn(n, n, n)[0]
    y = y + layer.linear2(torch.nn.functional.gelu(layer.linear1(layer.norm2(y))))
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)


def test_positions_begin_half_as_large_as_tokens():
    torch.manual_seed(0)
    position = OcrHead(24, 33, "ab", width=64).position.detach()
    assert position.std().item() == pytest.approx(0.5, rel=0.05) and abs(position.mean()) < 0.05  # of 2,112


def test_the_head_learns_what_its_features_say():
    """Eight fixed pictures' features, eight words."""
    torch.manual_seed(0)
    head = OcrHead(24, 33, words.CHARSETS[36], width=64, depth=4)
    f, labels = features(8), some_words(8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(f, [{"label": label} for label in labels])[0].backward()
        optimizer.step()
    read = head.eval().predict(f, [{"image_id": i} for i in range(8)])
    assert [r["text"] for r in read] == labels and [r["image_id"] for r in read] == list(range(8))
