"""Small networks, each for one habit of what the code of `forward` says."""

import torch
from carrying_networks import CLASSES, WIDTH, Blocks
from torch import Tensor, nn
from torch.nn import functional as F


class DataAndVariables(Blocks):
    """`.data` and `Variable`, as years ago."""

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.autograd.Variable(x)
        return [
            F.linear(h.data, head.weight.data, head.bias) for head, h in zip(self.heads, self.features(x), strict=True)
        ]


class MovesToAnAccelerator(Blocks):
    """`.cuda()` and friends inside forward, on a machine that has none."""

    def forward(self, x: Tensor) -> list[Tensor]:
        shift = torch.ones(WIDTH, device="cuda")
        return self.exits(x.cuda() + shift.to("cuda:0") + torch.zeros(WIDTH).to(device=torch.device("cuda")))


class OwnForward(Blocks):
    """`self.forward = ...` on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.all_exits

    def all_exits(self, x: Tensor) -> list[Tensor]:
        return self.exits(x)


class MadeAnew(Blocks):
    """Parameters that forward makes of parameters."""

    def forward(self, x: Tensor) -> list[Tensor]:
        self.scale = nn.Parameter(self.heads[0].weight * 2, requires_grad=False)
        return [F.linear(x, self.scale), self.heads[1](self.blocks[0](x).relu())]


class NotRegistered(Blocks):
    """Tensors that are no buffers, and modules in a plain list, which eval() misses."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.more = torch.randn(WIDTH), [torch.randn(CLASSES)]
        self.hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(), nn.BatchNorm1d(WIDTH)) for _ in range(2)]

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.hidden[0](x + self.shift)
        return [self.heads[0](first) + self.more[0], self.heads[1](self.hidden[1](first))]


class HardThreshold(Blocks):
    """A hard gate: the decision is made for each row, by a threshold."""

    def forward(self, x: Tensor) -> list[Tensor]:
        exits = self.exits(x)
        gate = (exits[0].max(1, keepdim=True)[0] > 0.25).float()
        return [exits[0], gate * exits[1] + (1 - gate) * exits[0]]


class HardTopK(Blocks):
    """A mask keeps the three largest features, whichever they are where some are the same."""

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = torch.zeros_like(x).scatter(1, x.topk(3, 1)[1], 1.0) * x
        return self.exits(kept)[:2]


class SamplesInTraining(Blocks):
    """A gate that samples in training, and takes the likeliest in eval()."""

    def forward(self, x: Tensor) -> list[Tensor]:
        early, late, _ = self.exits(x)
        gate = F.gumbel_softmax(early, hard=True) if self.training else F.one_hot(early.argmax(1), CLASSES).float()
        return [early, late * gate]


class MaskBlend(Blocks):
    """A block is computed for every row and blended in by a gate; where it is not, a shortcut stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.blocks[0](x).relu()
        mask = (self.gate(x) > 0).float()
        blended = mask * self.blocks[1](x).relu() + (1 - mask) * self.blocks[2](x)
        return [self.heads[0](x), self.heads[1](blended)]


class IdsAndMask(nn.Module):
    """Token ids and a mask, both int64."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, CLASSES) for _ in range(2)])

    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        hidden = self.embedding(ids)
        weight = (mask / mask.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)
        return [self.heads[0]((hidden * weight).sum(1)), self.heads[1]((self.block(hidden).relu() * weight).sum(1))]


class ScalarBeside(Blocks):
    """A number and a word beside the tensor."""

    def forward(self, x: Tensor, temperature: float, mode: str = "one") -> list[Tensor]:
        exits = self.exits(x)
        return [exit_ / temperature for exit_ in (exits if mode == "all" else exits[:1])]


class NeedsTwoRows(Blocks):
    """`squeeze()` takes the batch away when there is one row."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [exit_.unsqueeze(2).squeeze() for exit_ in self.exits(x)]


class IntOfTheBatch(Blocks):
    """`int(size / 2)` of a size that is no batch."""

    def forward(self, x: Tensor) -> list[Tensor]:
        half = int(x.size(1) / 2)
        rows = int(x.size(0))
        return [exit_.view(rows, -1) + x[:, :half].sum(1, keepdim=True) for exit_ in self.exits(x)]


class OneRowOnly(Blocks):
    """Sizes that are written for one row."""

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = [h.view(WIDTH) for h in self.features(x)]
        return [head(h).view(1, CLASSES) for head, h in zip(self.heads, hidden, strict=True)]
