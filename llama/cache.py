"""Remember the keys and values of conversations, so that a turn feeds its own tokens only."""
import copy

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of B conversations.

    A tensor per layer: growing then takes the memory of one layer beside, not of all. `lengths` (B,) lives on
    the host: nothing waits for the device to know how far a row has come.
    """

    def __init__(self, config, rows, device="cpu", dtype=torch.float32):
        self_layers = config.num_hidden_layers - len(config.cross_attention_layers)
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.has_image = torch.zeros(rows, dtype=torch.bool)
        shape = rows, 2, config.num_key_value_heads, 0, config.head_dim      # (B, 2, K, capacity, D)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(self_layers)]
        self.cross = None                   # (cross layers, B, 2, K, S, D) once an image came
        self.cross_mask = None              # (B, S) bool: vision tokens of real tiles; None when all are

    def reserve(self, capacity):
        """Make room for `capacity` tokens per row."""
        short = capacity - self.kv[0].shape[3]
        if short > 0:
            for i in range(len(self.kv)):
                self.kv[i] = F.pad(self.kv[i], (0, 0, 0, -(-short // 64) * 64))

    def reserve_images(self, layers, rows, real):
        """Make room for the images of `rows` in as many cross-attention layers.

        real (N, S): is a vision token of a tile that is no padding? Kept are those that are real in some row.
        """
        B, _, K, _, D = self.kv[0].shape
        S = int(real.sum(1).max())                             # real tiles come first
        self.cross = self.kv[0].new_zeros(layers, B, 2, K, S, D)
        self.has_image[rows.cpu()] = True
        if not real[:, :S].all():
            nothing = torch.zeros(B, S, dtype=torch.bool, device=real.device)
            self.cross_mask = nothing.index_copy_(0, rows, real[:, :S])

    def move(self, to, source):
        """Make row to[i] what row source[i] was (lists). In place, layer by layer: it takes little memory."""
        to, source = torch.tensor(to, dtype=torch.int64), torch.tensor(source, dtype=torch.int64)
        used = int(self.lengths.max())
        for layer in self.kv:
            layer[to, :, :, :used] = layer[source, :, :, :used]
        cross = [] if self.cross is None else self.cross
        for tensor in (self.lengths, self.has_image, self.cross_mask, *cross):
            if tensor is not None:
                tensor[to] = tensor[source]

    def keep(self, rows):
        """Forget all conversations but `rows`, which become rows 0, 1, ... in that order."""
        self.move(list(range(len(rows))), list(rows))
        self.__dict__.update(self.first(len(rows)).__dict__)

    def first(self, n):
        """Return a cache of the first n rows that shares this one's memory."""
        view = copy.copy(self)
        view.lengths, view.has_image = self.lengths[:n], self.has_image[:n]
        view.kv = [layer[:n] for layer in self.kv]
        view.cross = None if self.cross is None else self.cross[:, :n]
        view.cross_mask = None if self.cross_mask is None else self.cross_mask[:n]
        return view
