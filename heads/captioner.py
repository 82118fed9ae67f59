"""Captioning head: an LSTM that looks at the patch tokens by soft attention (paper Sec. 3.2, Eqs. 3 and 4).

Show, Attend and Tell (arXiv 1502.03044) at the authors' sizes and with their names of the weights. What does
not change from word to word is computed once: the attention's projection of the features for an image, the
words' part of Eq. 3 and the vocabulary layer for a batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ranks import mean_over_ranks

PAD, UNK, START, END = 0, -3, -2, -1  # places of <pad>, <unk>, <start>, <end> in a vocabulary


class Attention(nn.Module):
    """a_1 . ReLU(W_v v + W_h h) scores each position v for the state h."""

    def __init__(self, dim: int, state: int, hidden: int):
        super().__init__()
        self.encoder_att, self.decoder_att = nn.Linear(dim, hidden), nn.Linear(state, hidden)
        self.full_att = nn.Linear(hidden, 1)

    def forward(self, h: Tensor, keys: Tensor) -> Tensor:
        """h: (B, K, n); keys: encoder_att of the features (B, N, hidden). Returns (B, K, N), sums of 1."""
        hidden = F.relu(keys[:, None] + self.decoder_att(h)[:, :, None])  # (B, K, N, hidden)
        return self.full_att(hidden).squeeze(-1).softmax(-1)


class Captioner(nn.Module):
    """14 x 14 pooled patch tokens -> words, one after another.

    dim: width D of the backbone
    vocabulary: what each token stands for: <pad>, the words, <unk>, <start>, <end>
    dropout: of the words' logits; the authors' release
    """

    side = 14  # positions to look at: 14 x 14; the authors' release
    most_tokens = 51  # that predict says: 50 words, the authors' release, and <end>
    regularization = 1.0  # weight of the doubly stochastic term (1502.03044, Eq. 14); the authors' release

    def __init__(self, dim: int, vocabulary: list[str], dropout: float = 0.5):
        super().__init__()
        self.config = {"dim": dim, "vocabulary": vocabulary, "dropout": dropout}
        special = [vocabulary[i] for i in (PAD, UNK, START, END)] if len(vocabulary) > 3 else []
        if special != ["<pad>", "<unk>", "<start>", "<end>"] or {*map(type, vocabulary)} != {str}:
            raise ValueError("a vocabulary is <pad>, the words, <unk>, <start>, <end>, in this order")
        m = n = attention = 384  # Sec. 4.2; Eq. 3's m and n: widths of the embedding and of the LSTM
        self.attention = Attention(dim, n, attention)
        self.embedding = nn.Embedding(len(vocabulary), m)  # E of Eq. 3
        self.decode_step = nn.LSTMCell(m + dim, n)  # T of Eq. 3
        self.init_h, self.init_c = nn.Linear(dim, n), nn.Linear(dim, n)
        self.f_beta = nn.Linear(n, dim)  # how much of the context the LSTM lets in
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(n, len(vocabulary))
        for weight in (self.embedding.weight, self.fc.weight):
            nn.init.uniform_(weight, -0.1, 0.1)  # the authors' release
        nn.init.zeros_(self.fc.bias)

    def forward(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(f, y)

    def look(self, f) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Once for each image: v (B, N, D), the attention's keys (B, N, 384), h_0 and c_0 (B, 1, n)."""
        if f.valid is None:
            v = F.adaptive_avg_pool2d(f.grid, self.side)  # (B, D, 14, 14)
        else:  # each image without its padding
            rows, columns = f.valid[:, :, 0].sum(1).tolist(), f.valid[:, 0].sum(1).tolist()
            sizes = zip(f.grid, rows, columns, strict=True)
            v = torch.stack([F.adaptive_avg_pool2d(grid[:, :h, :w], self.side) for grid, h, w in sizes])
        v = v.flatten(2).transpose(1, 2).contiguous()  # (B, N, D), N = 196
        mean = v.mean(1, keepdim=True)
        return v, self.attention.encoder_att(v), (self.init_h(mean), self.init_c(mean))

    def weights(self) -> tuple[Tensor, Tensor]:
        """The columns of Eq. 3's T for E y_{t-1} and for z_t; cut once: backward, each cut costs."""
        m = self.embedding.embedding_dim
        return self.decode_step.weight_ih[:, :m], self.decode_step.weight_ih[:, m:]

    def words(self, tokens: Tensor, W_y: Tensor) -> Tensor:
        """The part of Eq. 3's T that reads E y_{t-1}, with both biases: (...,) -> (..., 4n)."""
        cell = self.decode_step
        return F.linear(self.embedding(tokens), W_y, cell.bias_ih + cell.bias_hh)

    def step(self, word: Tensor, h: Tensor, c: Tensor, v: Tensor, keys: Tensor, W_z: Tensor):
        """One word further, Eqs. 3 and 4, for K captions of each image.

        word: (B, K, 4n), from `words`; h, c: (B, K, n); v, keys: from `look`; W_z: from `weights`
        Returns h, c and the attention (B, K, N).
        """
        attention = self.attention(h, keys)
        z = self.f_beta(h).sigmoid() * (attention @ v)  # (B, K, D), the context vector
        # Eq. 3: sigma, sigma, tanh, sigma of T (E y_{t-1}, h_{t-1}, z_t)
        W_h = self.decode_step.weight_hh
        i, f, g, o = (word + F.linear(h, W_h) + F.linear(z, W_z)).chunk(4, -1)  # (B, K, n) each
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        # Eq. 4
        c = f * c + i * g
        h = o * c.tanh()
        return h, c, attention

    def loss(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of every next word, and the doubly stochastic term: each place is looked at once.

        f: Features; y: B dicts with tokens (T + 1,), from <start> to <end>
        Returns the loss and its two terms for the log.
        """
        lengths = torch.tensor([len(t["tokens"]) - 1 for t in y])  # T of each caption; known to the host
        tokens = pad_sequence([t["tokens"] for t in y], batch_first=True, padding_value=PAD)  # (B, T + 1)
        said = torch.arange(tokens.shape[1] - 1) < lengths[:, None]  # (B, T)
        b, t = (index.to(tokens.device, non_blocking=True) for index in said.nonzero(as_tuple=True))

        v, keys, (h, c) = self.look(f)
        W_y, W_z = self.weights()
        states, attentions = [], []
        for word in self.words(tokens[:, :-1], W_y).split(1, 1):  # (B, 1, 4n)
            h, c, attention = self.step(word, h, c, v, keys, W_z)
            states.append(h)
            attentions.append(attention)

        logits = self.fc(self.dropout(torch.cat(states, 1)[b, t]))  # (M, K) of the M words of the batch
        words = mean_over_ranks([len(b)], logits.device)
        cross_entropy = F.cross_entropy(logits, tokens[b, t + 1], reduction="sum") / words.squeeze()
        said = said.to(tokens.device, non_blocking=True)[..., None]
        looked = (torch.cat(attentions, 1) * said).sum(1)  # (B, N)
        once = (1 - looked).square().mean()
        parts = {"cross_entropy": cross_entropy.detach(), "attention": once.detach()}
        return cross_entropy + self.regularization * once, parts

    @torch.no_grad()
    def predict(self, f, y: list[dict], beam: int = 5) -> list[dict]:
        """The likeliest caption that a beam search finds.

        y: B dicts with image_id
        Returns B dicts: image_id, caption, tokens (T,) with <end> unless cut at T = 51, their log_prob, and
        the attention (T, 14, 14) that each was said with.
        """
        captions, vocabulary = self.search(*self.look(f), beam), self.config["vocabulary"]
        special = {vocabulary[i] for i in (PAD, UNK, START, END)}
        for caption, t in zip(captions, y, strict=True):
            words = [vocabulary[token] for token in caption["tokens"].tolist()]
            caption["image_id"], caption["caption"] = (
                t["image_id"],
                " ".join(w for w in words if w not in special),
            )
        return captions

    def search(self, v: Tensor, keys: Tensor, state: tuple[Tensor, Tensor], beam: int) -> list[dict]:
        """The `beam` likeliest beginnings for every image, word by word, until the likeliest has ended.

        As log-probabilities only fall, no other can overtake it then, and its image leaves the batch.
        v, keys, state: from `look`. Returns B dicts: tokens, log_prob, attention.
        """
        B, K, end = len(v), beam, self.fc.out_features + END
        W_y, W_z = self.weights()
        h, c = (x.expand(-1, K, -1) for x in state)
        log_prob = torch.full((B, K), -torch.inf, device=v.device)
        log_prob[:, 0] = 0  # all K begin alike: only one may go on
        tokens = torch.full((B, K, 1), self.fc.out_features + START, device=v.device)
        attentions = v.new_zeros(B, K, 0, v.shape[1])
        ended = torch.zeros(B, K, dtype=torch.bool, device=v.device)
        images, captions = torch.arange(B), [None] * B
        for length in range(1, self.most_tokens + 1):
            h, c, attention = self.step(self.words(tokens[..., -1], W_y), h, c, v, keys, W_z)
            logits = self.fc(h)
            best, word = logits.topk(min(K, logits.shape[2]), -1)  # (B, K, K): others cannot be among the K
            best -= logits.logsumexp(-1, keepdim=True)
            best[ended] = -torch.inf  # what has ended goes on as it is
            best[..., 0].masked_fill_(ended, 0)
            word.masked_fill_(ended[..., None], PAD)
            log_prob, choice = (log_prob[..., None] + best).flatten(1).topk(K)  # (B, K)
            row, parent = torch.arange(len(v), device=v.device)[:, None], choice // best.shape[2]
            word = word.flatten(1).gather(1, choice)
            tokens = torch.cat([tokens[row, parent], word[..., None]], -1)
            attentions = torch.cat([attentions, attention[:, :, None]], 2)[row, parent]
            h, c, ended = h[row, parent], c[row, parent], ended[row, parent] | (word == end)

            leaves = ended[:, 0].cpu()
            if length == self.most_tokens:
                leaves = torch.ones_like(leaves)
            for i in leaves.nonzero()[:, 0].tolist():
                said = tokens[i, 0, 1:].tolist()
                T = said.index(end) + 1 if end in said else length
                looks = attentions[i, 0, :T].unflatten(-1, (self.side, self.side))  # (T, 14, 14)
                best = {"tokens": tokens[i, 0, 1 : T + 1], "log_prob": float(log_prob[i, 0])}
                captions[images[i]] = {**best, "attention": looks}
            if leaves.all():
                break
            if leaves.any():
                stays = (~leaves).nonzero()[:, 0]
                images, stays = images[stays], stays.to(v.device)
                v, keys, h, c, log_prob, tokens, attentions, ended = (
                    x[stays] for x in (v, keys, h, c, log_prob, tokens, attentions, ended)
                )
        return captions
