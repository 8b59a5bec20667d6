"""Small networks that return early, each for one habit of public code. Every one notes in `taken` where it returned."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 4


class Trunk(nn.Module):
    """Blocks with a classifier behind each; what `forward` does with them is the habit."""

    num_exits = 3

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.blocks = nn.ModuleList([nn.Conv2d(1 if i == 0 else 4, 4, 3, padding=1) for i in range(self.num_exits)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(self.num_exits)])
        self.heads = nn.ModuleList([nn.Linear(4, CLASSES) for _ in range(self.num_exits)])
        self.taken: Any = None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)

    def block(self, index: int, x: Tensor) -> Tensor:
        return F.relu(self.norms[index](self.blocks[index](x)), inplace=True)

    def head(self, index: int, x: Tensor) -> Tensor:
        out: Tensor = self.heads[index](F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))
        return out

    def left(self, where: Any) -> Any:
        self.taken = where
        return where


def entropy(logits: Tensor) -> Tensor:
    p = F.softmax(logits, dim=1)
    # Some processors' softmax gives denormals where others' gives 0, of which the logarithm makes NaN.
    p = p * (p >= torch.finfo(torch.float32).tiny)
    return -(p * torch.log(p)).sum()


class MaxSoftmax(Trunk):
    """The most frequent one: `torch.max` over all there is, and the exit's number beside the answer."""

    threshold = 0.6

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        for index in range(2):
            x = self.block(index, x)
            out = self.head(index, x)
            if torch.max(F.softmax(out, dim=1)) > self.threshold:
                return out, self.left(index)
        return self.head(2, self.block(2, x)), self.left(2)


class EntropyList(Trunk):
    """A threshold per exit in a list, in nats, from below; all in one `for`, the last exit without a test."""

    thresholds: ClassVar = [0.7, 0.8]

    def forward(self, x: Tensor) -> Tensor | None:
        for index, (block, norm, head) in enumerate(zip(self.blocks, self.norms, self.heads, strict=True)):
            x = torch.relu(norm(block(x)))
            logits = head(x.mean((2, 3)))
            if index == 2 or entropy(logits) < self.thresholds[index]:
                self.left(index)
                return logits
        return None


class ConfidentAndClear(Trunk):
    """`and`: the second half is asked only if the first says yes."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        for index in range(2):
            x = self.block(index, x)
            out = self.head(index, x)
            best, second = F.softmax(out, dim=1).topk(2)[0][0]
            if best > 0.6 and best - second > 0.4:
                return {"logits": out, "exit": self.left(index)}
        return {"logits": self.head(2, self.block(2, x)), "exit": self.left(2)}


class ManyConditions(Trunk):
    """Exits behind an `and` and an `or` each: one course for every exit, where every answer alone would make 81."""

    num_exits = 5
    thresholds: ClassVar = [0.6, 0.6, 0.45, 0.55]
    labels: ClassVar = [3, 0, 2, 0]

    def forward(self, x: Tensor) -> Tensor:
        for index in range(4):
            x = self.block(index, x)
            out = self.head(index, x)
            best, second = F.softmax(out, dim=1).topk(2)[0][0]
            if best > self.thresholds[index] and (best - second > 0.2 or out.argmax() == self.labels[index]):
                self.left(index)
                return out
        self.left(4)
        return self.head(4, self.block(4, x))


class AnswersInside(Trunk):
    """The answer is computed inside the branch: a test on cheap features, and a head that only leavers run."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, x)
        if x.mean().item() > 1.6:
            self.left(0)
            return self.head(0, x) * 2 + 1
        x = self.block(1, x)
        if 1.0 < x.mean().item():  # noqa: SIM300  (people write it)
            self.left(1)
            return self.head(1, x).neg()
        self.left(2)
        return self.head(2, self.block(2, x))


class Ladder(Trunk):
    """`elif` chains and nested conditions."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, x)
        out = self.head(0, x)
        conf = F.softmax(out, dim=1).amax()
        if conf >= 0.8:
            self.left("sure")
            return out
        elif conf <= 0.45:  # noqa: RET505  (people write it)
            self.left("hopeless")
            return out - out.mean()
        x = self.block(1, x)
        out = self.head(1, x)
        if F.softmax(out, dim=1).amax() > 0.5:
            if out.argmax() == 2:
                self.left("class 2")
                return out
            if not F.softmax(out, dim=1).amax() < 0.65:
                self.left("clear")
                return self.head(2, x)
        self.left("last")
        return self.head(2, self.block(2, x))


@dataclass
class Output:
    logits: Tensor
    exit_index: int
    confidence: Tensor


class InADataclass(Trunk):
    """Thresholds in a buffer, `Tensor.item()` on the score, a dataclass with more beside the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("thresholds", torch.tensor([0.7, 0.6]))

    def forward(self, x: Tensor) -> Output:
        for index in range(2):
            x = self.block(index, x)
            out = self.head(index, x)
            conf = F.softmax(out, dim=-1).max(dim=-1)[0]
            if conf.item() > self.thresholds[index]:
                return Output(out, self.left(index), conf)
        out = self.head(2, self.block(2, x))
        return Output(out, self.left(2), out.max())


class Checked(Trunk):
    """Validity checks: they raise on "no", and are no exits."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        if not torch.isfinite(x).all():
            raise ValueError("the input is not finite")
        x = self.block(0, x)
        out = self.head(0, x)
        assert (out.abs() < 1e6).all()
        if F.softmax(out, 1).max() > 0.7:
            return out, self.left(0)
        return self.head(1, self.block(1, x)), self.left(1)


class SkipsABlock(Trunk):
    """A block is run on "yes" only, and all that follows comes twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        x = self.block(0, x)
        name = "without"
        if x.mean() > 1.45:
            x = self.block(1, x)
            name = "with"
        out = self.head(1, x)
        if F.softmax(out, 1).max() > 0.6:
            return out, self.left(f"early {name}")
        return self.head(2, self.block(2, x)), self.left(f"late {name}")


class Patient(Trunk):
    """Patience with a counter in Python."""

    num_exits = 4
    patience = 1

    def forward(self, x: Tensor) -> Tensor:
        counter, last = 0, None
        for index in range(self.num_exits):
            x = self.block(index, x)
            out = self.head(index, x)
            label = out.argmax(dim=1)
            if last is not None and torch.all(label.eq(last)):
                counter += 1
            else:
                counter = 0
            if counter == self.patience:
                break
            last = label
        self.left(index)
        return out


class VeryPatient(Patient):
    """The same, with so many courses that the server had better count."""

    num_exits = 10
    patience = 3


class Thrown(Exception):
    """Carries an answer."""

    def __init__(self, answer: Tensor, index: int) -> None:
        super().__init__("left early")
        self.answer, self.index = answer, index


class ExitLayer(nn.Module):
    """Throws where it is sure."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, logits: Tensor, index: int) -> None:
        if F.softmax(logits, dim=1).max() > self.threshold:
            raise Thrown(logits, index)


class ThrowsAndCatches(Trunk):
    """An exception carries the answer across modules; the network's own `forward` catches it."""

    def __init__(self) -> None:
        super().__init__()
        self.exit_layer = ExitLayer(0.7)

    def run_blocks(self, x: Tensor) -> Tensor:
        for index in range(3):
            x = self.block(index, x)
            logits = self.head(index, x)
            if index < 2:
                self.exit_layer(logits, index)
        return logits

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        try:
            return self.run_blocks(x), self.left(2)
        except Thrown as thrown:
            return thrown.answer, self.left(thrown.index)


class Throws(ThrowsAndCatches):
    """The exception leaves `forward`: whoever calls the network catches it."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.left("caller")
        return self.run_blocks(x)


class WholeBatch(Trunk):
    """Decides for the whole batch, with `torch.all` and a minimum over it, and gives up the batch's axis."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        if x.size(0) != 1:
            raise ValueError("one image at a time")
        x = self.block(0, x)
        probs = F.softmax(self.head(0, x).squeeze(), dim=0)
        if torch.all(probs.max() > 0.7):
            return self.head(0, x).squeeze(), self.left(0)
        x = self.block(1, x)
        logits = self.head(1, x)[0]
        if F.softmax(logits, -1).max(0).values.min() >= 0.6:
            return logits, self.left(1)
        return self.head(2, self.block(2, x)).view(-1), self.left(2)


class GrowingList(Trunk):
    """Returns the logits of every exit so far; the newest is the answer."""

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for index in range(3):
            x = self.block(index, x)
            outputs.append(self.head(index, x))
            if index < 2 and not F.softmax(outputs[-1], 1).max() <= 0.7:
                break
        self.left(index)
        return outputs


class Undecided(Trunk):
    """Entropy that becomes NaN where a probability rounds to 0: `if not (h >= t)` then leaves."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x = self.block(0, x)
        out = self.head(0, x) * 20
        if not entropy(out) >= 1e-6:
            return out, self.left(0)
        x = self.block(1, x)
        out = self.head(1, x) * 20
        if entropy(out) < 0.05:
            return out, self.left(1)
        return self.head(2, self.block(2, x)), self.left(2)


class FallsBack(Trunk):
    """Answers with an earlier exit's scores where two exits disagree, and in probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, x)
        first = F.softmax(self.head(0, x), dim=1)
        if first.max() > 0.75:
            self.left("first")
            return first
        second = F.softmax(self.head(1, self.block(1, x)), dim=1)
        if torch.equal(first.argmax(1), second.argmax(1)):
            self.left("agreed")
            return second
        self.left("fallback")
        return first


EARLY = [
    MaxSoftmax, EntropyList, ConfidentAndClear, ManyConditions,
    AnswersInside, Ladder, InADataclass, Checked, SkipsABlock, Patient,
    ThrowsAndCatches, Throws, WholeBatch, GrowingList, Undecided, FallsBack,
]  # fmt: skip


class OnTheEdge(nn.Module):
    """One exit per way of comparing a number with 0.8, each by its own element of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, CLASSES)
        self.taken: Any = None

    def forward(self, x: Tensor) -> Tensor:
        a = x[0]
        self.taken = 0
        if a[0] > 0.8:
            return self.head(x)
        self.taken = 1
        if a[1] >= 0.8:
            return self.head(x * 2)
        self.taken = 2
        if a[2].item() > 0.8:
            return self.head(x * 3)
        self.taken = 3
        if 0.8 <= a[3].item():  # noqa: SIM300  (people write it)
            return self.head(x * 4)
        self.taken = 4
        if a[4] < 0.2:
            return self.head(x * 5)
        self.taken = 5
        if not a[5] > 0.2:
            return self.head(x * 6)
        self.taken = 6
        if a[6:7].le(0.2).all():
            return self.head(x * 7)
        self.taken = 7
        return self.head(x * 8)
