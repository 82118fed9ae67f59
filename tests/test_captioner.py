"""Captioner: against nn.LSTMCell and matrices, a plain beam search, and counts of the paper."""

import itertools
import math

import pytest
import torch
from torch import nn

import backbone as vit
import lora
import tasks
from backbone import Features
from heads.captioner import Captioner

WORDS = ["<pad>", *(f"w{i}" for i in range(19)), "<unk>", "<start>", "<end>"]
START, END = 21, 22


def features(B=3, side=18, seed=0, valid=None) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(None, torch.randn(B, 16, side, side, generator=generator), valid)


def captions(*lengths, seed=0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(1, 21, (n,), generator=generator).tolist() for n in lengths]
    return [{"image_id": i, "tokens": torch.tensor([START, *w, END])} for i, w in enumerate(words)]


@pytest.fixture
def head() -> Captioner:
    """Small, with weights large enough that captions differ from image to image."""
    torch.manual_seed(0)
    head = Captioner(16, WORDS).eval()
    for name, p in head.named_parameters():
        if p.dim() > 1:
            p.data *= 8 if name.startswith(("fc", "embedding")) else 3
    head.fc.bias.data[END] = 0.5  # so that captions end, at lengths of their own
    return head


def by_hand(head: Captioner, v, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """One image, one caption: v (N, D) -> logits (T, K), attention (T, N); Eqs. 3-4 through nn.LSTMCell."""
    w = dict(head.named_parameters())
    at = "attention."
    cell: nn.LSTMCell = head.decode_step
    h = (w["init_h.weight"] @ v.mean(0) + w["init_h.bias"])[None]
    c = (w["init_c.weight"] @ v.mean(0) + w["init_c.bias"])[None]
    logits, attentions = [], []
    for token in tokens:
        hidden = v @ w[f"{at}encoder_att.weight"].T + w[f"{at}encoder_att.bias"]
        hidden = hidden + h @ w[f"{at}decoder_att.weight"].T + w[f"{at}decoder_att.bias"]
        energy = hidden.clamp(min=0) @ w[f"{at}full_att.weight"][0]  # (N,); a constant is nothing to softmax
        attention = energy.exp() / energy.exp().sum()
        gate = 1 / (1 + (-h @ w["f_beta.weight"].T - w["f_beta.bias"]).exp())
        z = gate * (attention @ v)
        h, c = cell(torch.cat([w["embedding.weight"][token][None], z], 1), (h, c))
        logits.append(h[0] @ w["fc.weight"].T + w["fc.bias"])
        attentions.append(attention)
    return torch.stack(logits), torch.stack(attentions)


def pooled(f: Features, b: int) -> torch.Tensor:
    """(196, D): bin i of 18 rows covers floor(18 i / 14) .. ceil(18 (i + 1) / 14) - 1."""
    grid = f.grid[b]
    if f.valid is not None:
        grid = grid[:, : int(f.valid[b, :, 0].sum()), : int(f.valid[b, 0].sum())]
    D, H, W = grid.shape
    bins = [[(n * i // 14, -(-n * (i + 1) // 14)) for i in range(14)] for n in (H, W)]
    cells = [grid[:, a:b, c:d].mean((1, 2)) for (a, b), (c, d) in itertools.product(*bins)]
    return torch.stack(cells)


def test_loss_is_equations_3_and_4_with_lstm_cell(head):
    """Value, both terms and every gradient, features included, to fp32 rounding."""
    f, y = features(), captions(5, 2, 9)
    f.grid.requires_grad_()
    loss, parts = head.loss(f, y)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in head.named_parameters()} | {"grid": f.grid.grad.clone()}
    head.zero_grad()
    f.grid.grad = None
    entropies, once = [], []
    for b, t in enumerate(y):
        logits, attention = by_hand(head, pooled(f, b), t["tokens"][:-1].tolist())
        entropies.append(-logits.log_softmax(-1)[range(len(logits)), t["tokens"][1:]])
        once.append((1 - attention.sum(0)) ** 2)
    expected = torch.cat(entropies).mean(), torch.cat(once).mean()
    torch.testing.assert_close(parts["cross_entropy"], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts["attention"], expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, expected[0] + expected[1], rtol=1e-5, atol=1e-6)
    sum(expected).backward()
    theirs = {name: p.grad for name, p in head.named_parameters()} | {"grid": f.grid.grad}
    for name, grad in theirs.items():
        if name != "attention.full_att.bias":  # zero but for rounding, and not read by hand
            torch.testing.assert_close(
                ours[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-7
            )


def test_batch_order_and_padding_do_not_change_the_loss(head):
    """A short caption beside a long one, any order; an image in the corner of a padded batch."""
    f, y = features(), captions(1, 30, 7)
    loss, _ = head.loss(f, y)
    order = [2, 0, 1]
    shuffled, _ = head.loss(Features(None, f.grid[order], None), [y[i] for i in order])
    torch.testing.assert_close(shuffled, loss, rtol=1e-5, atol=1e-6)
    alone = [head.loss(Features(None, f.grid[i : i + 1], None), y[i : i + 1])[1] for i in range(3)]
    words = [len(t["tokens"]) - 1 for t in y]
    together = sum(n * one["cross_entropy"] for n, one in zip(words, alone, strict=True)) / sum(words)
    together += sum(one["attention"] for one in alone) / 3
    torch.testing.assert_close(loss, together, rtol=1e-5, atol=1e-6)

    grid, valid = torch.full((2, 16, 20, 24), 1e4), torch.zeros(2, 20, 24, dtype=torch.bool)
    for b, (h, w) in enumerate([(18, 18), (20, 11)]):
        valid[b, :h, :w] = True
        grid[b, :, :h, :w] = torch.randn(16, h, w)
    padded = head.loss(Features(None, grid, valid), y[:2])[1]
    cropped = [
        head.loss(Features(None, grid[b : b + 1, :, :h, :w], None), y[b : b + 1])[1]
        for b, (h, w) in enumerate([(18, 18), (20, 11)])
    ]
    expected = sum(n * one["cross_entropy"] for n, one in zip(words, cropped, strict=False)) / sum(words[:2])
    torch.testing.assert_close(padded["cross_entropy"], expected, rtol=1e-5, atol=1e-6)
    assert head.predict(Features(None, grid, valid), y[:2])[1]["caption"]


def log_prob(head, v, tokens) -> float:
    """Of a caption, with or without its <end>, by hand."""
    logits, _ = by_hand(head, v, [START, *tokens[:-1]])
    return float(logits.log_softmax(-1)[range(len(tokens)), tokens].sum())


@torch.no_grad()
def test_greedy_is_the_argmax_of_teacher_forcing_on_its_own_words(head):
    f = features(B=8, side=14)
    answers = head.predict(f, captions(*[1] * 8), beam=1)
    lengths = set()
    for b, one in enumerate(answers):
        tokens = one["tokens"].tolist()
        logits, attention = by_hand(head, pooled(f, b), [START, *tokens[:-1]])
        assert logits.argmax(-1).tolist() == tokens
        assert END not in tokens[:-1] and (tokens[-1] == END or len(tokens) == 51)
        assert one["log_prob"] == pytest.approx(log_prob(head, pooled(f, b), tokens), rel=1e-4)
        torch.testing.assert_close(one["attention"].flatten(1), attention, rtol=1e-3, atol=1e-6)
        assert one["caption"] == " ".join(WORDS[t] for t in tokens if 0 < t < 20) and one["image_id"] == b
        lengths.add(len(tokens))
    assert len(lengths) > 2  # images leave the batch at different times


def plain_beam(head, v, width: int) -> tuple[list[int], float]:
    """The same search, one image, whole hypotheses in a list, every one scored from its start."""
    beams = [([], 0.0)]
    for _ in range(51):
        options = []
        for tokens, score in beams:
            if tokens and tokens[-1] == END:
                options.append((tokens, score))
                continue
            row = by_hand(head, v, [START, *tokens])[0][-1].log_softmax(-1)
            options += [([*tokens, i], score + float(row[i])) for i in range(len(row))]
        beams = sorted(options, key=lambda one: -one[1])[:width]
        if beams[0][0][-1] == END:
            break
    return beams[0]


@torch.no_grad()
def test_beam_search_is_a_plain_one(head):
    f = features(B=24, side=14, seed=1)
    y = captions(*[1] * 24)
    greedy, wide = head.predict(f, y, beam=1), head.predict(f, y, beam=5)
    alone = [head.predict(Features(None, f.grid[b : b + 1], None), y[b : b + 1])[0] for b in range(24)]
    for b in range(24):
        assert wide[b]["tokens"].tolist() == alone[b]["tokens"].tolist()
        assert wide[b]["attention"].shape == (len(wide[b]["tokens"]), 14, 14)
        if b < 4:
            tokens, score = plain_beam(head, pooled(f, b), 5)
            assert wide[b]["tokens"].tolist() == tokens
            assert wide[b]["log_prob"] == pytest.approx(score, rel=1e-4)
    assert sum(w["log_prob"] > g["log_prob"] + 1e-3 for w, g in zip(wide, greedy, strict=True)) > 3


@torch.no_grad()
def test_a_beam_wider_than_the_vocabulary():
    torch.manual_seed(0)
    head = Captioner(16, ["<pad>", "<unk>", "<start>", "<end>"]).eval()
    (one,) = head.predict(features(B=1), captions(1), beam=7)
    assert math.isfinite(one["log_prob"]) and one["caption"] == ""


def test_dropout_only_in_training(head):
    f, y = features(), captions(5, 2, 9)
    assert torch.equal(head.loss(f, y)[0], head.loss(f, y)[0])
    head.train()
    torch.manual_seed(0)
    a, b = (float(head.loss(f, y)[0].detach()) for _ in range(2))
    assert a != b


def test_it_learns_to_tell_images_apart():
    torch.manual_seed(0)
    head, f, y = Captioner(16, WORDS), features(), captions(6, 3, 9)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(80):
        loss, _ = head.loss(f, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for one, t in zip(head.eval().predict(f, y), y, strict=True):
        assert one["tokens"].tolist() == t["tokens"][1:].tolist()


def test_all_heads_and_lora_count_what_the_paper_says():
    """Sec. 3.2, EVA-ViT-E: 36.8 M and 29.4 M. The release's 36,794,628 had 92 logits and 256 task tokens."""
    with torch.device("meta"):
        words = ["<pad>", *map(str, range(9486)), "<unk>", "<start>", "<end>"]
        categories = [{"id": i, "name": str(i)} for i in range(80)]
        captioner = Captioner(1792, words)
        made = [tasks.find("detection").Head(1792, categories), captioner]
        made.append(tasks.find("segmentation").Head(1792, categories, eq2_h=False))
        counts = [sum(p.numel() for p in head.parameters()) for head in made]
        assert counts == [8_774_997, 14_136_723, 13_847_441]
        assert round(sum(counts) / 1e6, 1) == 36.8
        eva_e = lora.attach(vit.Backbone("eva_e").vit, 64)
        assert sum(p.numel() for p in lora.parameters(eva_e).values()) == 29_360_128
    names = {name.rpartition(".")[0] for name in captioner.state_dict()}
    att = {f"attention.{name}_att" for name in ("encoder", "decoder", "full")}
    assert names == {"embedding", "decode_step", "init_h", "init_c", "f_beta", "fc"} | att  # the release's


def test_the_head_file_is_usable_without_the_data(head, tmp_path):
    tasks.save_head(head, tmp_path / "captioning.safetensors", "captioning")
    loaded = tasks.load_head(tmp_path / "captioning.safetensors", 16)
    f, y = features(), captions(1, 1, 1)
    assert [a["caption"] for a in loaded.predict(f, y)] == [a["caption"] for a in head.predict(f, y)]
    tasks.check_classes(loaded, WORDS, tmp_path)
    other = [*WORDS[:5], "zebra", *WORDS[6:]]
    with pytest.raises(ValueError, match="knows 23 words, the data has 23, unlike from 5 on.*--min-count"):
        tasks.check_classes(loaded, other, tmp_path)
    with pytest.raises(ValueError, match="<start>"):
        Captioner(16, ["a", "b"])


def test_words_are_averaged_over_the_ranks(head, monkeypatch):
    """Two ranks of one caption each must add up to one process of both."""
    import heads.captioner as module

    f, y = features(B=2), captions(3, 12)
    both, _ = head.loss(f, y)
    both.backward()
    expected = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    words = sum(len(t["tokens"]) - 1 for t in y) / 2
    monkeypatch.setattr(module, "mean_over_ranks", lambda values, device: torch.tensor([words]))
    for b in range(2):
        loss, _ = head.loss(Features(None, f.grid[b : b + 1], None), y[b : b + 1])
        (loss / 2).backward()
    for name, p in head.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-6)
