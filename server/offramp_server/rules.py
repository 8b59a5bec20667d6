"""What the scheduler does beyond running what waits; every rule can be turned off."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """What the scheduler does beyond running what waits; each rule can be turned off to see what it is worth.

    Attributes:
        rebatch: Rows of different batches run together; otherwise a batch stays one from its first dispatch to its end.
        hold: Part-full batches are held where that pays.
        batch_timeout_s: A batch that is not full starts when its oldest row has waited for so long; None starts it
            when the device is free.
        forced_exits: A row that is short of time leaves with the answer it has, and goes past gated stages; otherwise
            it runs on to where its policy lets it leave, however late.
    """

    rebatch: bool = True
    hold: bool = True
    batch_timeout_s: float | None = None
    forced_exits: bool = True
