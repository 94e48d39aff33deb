"""Output embeddings that hold their weight otherwise than as `weight`, as quantised ones do."""

import torch
from torch import nn


class Packed(nn.Linear):
    """As bitsandbytes has 4-bit weights: two of them a byte, in a column."""

    def __init__(self, plain: nn.Linear):
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.plain = [plain]
        column = torch.zeros(self.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(column, requires_grad=False)

    def forward(self, hidden):
        return self.plain[0](hidden)


class Nameless(nn.Module):
    """As GPTQ's layers: buffers of other names."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_buffer("qweight", plain.weight.detach().clone())

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.qweight)


class Method(nn.Module):
    """As torch's dynamically quantised layers: `weight()`, and no tensor that a module knows."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.plain = [plain]

    def weight(self):
        return self.plain[0].weight

    def forward(self, hidden):
        return self.plain[0](hidden)
