"""Remember the keys and values of conversations, so that a turn feeds its own tokens only."""
import copy

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of B conversations.

    One tensor per layer, so that growing needs spare memory for one layer, not for all. `lengths` (B,) lives
    on the host: nothing waits for the device to know how far a row has come.
    """

    def __init__(self, config, rows, device="cpu", dtype=torch.float32):
        self_layers = config.num_hidden_layers - len(config.cross_attention_layers)
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.has_image = torch.zeros(rows, dtype=torch.bool)
        shape = rows, 2, config.num_key_value_heads, 0, config.head_dim      # (B, 2, K, capacity, D)
        self.image_rows = None              # those that have one: (N,) on the device, slice(None) if all
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(self_layers)]
        self.cross = []                     # (B, 2, K, S, D) per cross-attention layer, once an image came
        self.cross_mask = None              # (B, S) bool: vision tokens of real tiles; None when all are

    def reserve(self, capacity):
        """Make room for `capacity` tokens per row."""
        missing = capacity - self.kv[0].shape[3]
        if missing > 0:
            for i in range(len(self.kv)):                      # by whole blocks of 64
                self.kv[i] = F.pad(self.kv[i], (0, 0, 0, -(-missing // 64) * 64))

    def reserve_images(self, layers, rows, real):
        """Make room for the images of `rows` in so many cross-attention `layers`.

        real (N, S): False for vision tokens of padding tiles. They come last, and those that are padding in
        all rows are not kept.
        """
        B, _, K, _, D = self.kv[0].shape
        S = int(real.sum(1).max())                             # real tiles come first
        self.cross = [self.kv[0].new_zeros(B, 2, K, S, D) for _ in range(layers)]
        self.has_image[rows.cpu()] = True
        if not real[:, :S].all():
            self.cross_mask = torch.zeros(B, S, dtype=torch.bool, device=real.device)
            self.cross_mask[rows] = real[:, :S]
        self.list_images()

    def list_images(self):
        """Set image_rows, so that steps read nothing on the host and copy nothing to the device."""
        rows = self.has_image.nonzero()[:, 0].to(self.kv[0].device)
        self.image_rows = slice(None) if self.has_image.all() else rows if len(rows) else None

    def move(self, to, source):
        """Make row to[i] what row source[i] was. In place, layer by layer: it takes little memory."""
        to, source = torch.tensor([[*to], [*source]], dtype=torch.int64)
        used = int(self.lengths.max())
        kv = [layer[:, :, :, :used] for layer in self.kv]
        for tensor in (*kv, *self.cross, self.lengths, self.has_image, self.cross_mask):
            if tensor is not None:
                tensor[to] = tensor[source]
        self.list_images()

    def keep(self, rows):
        """Let row i be what row rows[i] was (a list): others are forgotten, and one may be there twice."""
        self.replace(lambda tensor: tensor[rows])

    def first(self, n):
        """Return a cache of the first n rows, which shares this one's memory, `lengths` too."""
        view = copy.copy(self)
        view.kv, view.cross = [*self.kv], [*self.cross]
        view.replace(lambda tensor: tensor[:n])
        return view

    def replace(self, pick):
        """Replace each tensor by pick(tensor), layer by layer, which needs spare memory for one."""
        for layers in (self.kv, self.cross):
            for i in range(len(layers)):
                layers[i] = pick(layers[i])
        self.lengths, self.has_image = pick(self.lengths), pick(self.has_image)
        if self.cross_mask is not None:
            self.cross_mask = pick(self.cross_mask)
        self.list_images()
