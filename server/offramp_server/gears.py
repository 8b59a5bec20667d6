"""Which gear requests get: up fast when the backlog presses, down slowly once the load fits a gear less.

The law knows nothing of queues. It is told, for each request that arrives, what it meets: how long it will probably
wait, and the load. A wait over `PRESSED` of the request's budget shifts up, by one or as far as the load needs, no
faster than a shift can show in the backlog. The gear falls by one when the wait is short and the load, at what rows
cost one gear below, leaves the device some air; a steady load thus finds its gear and stays there. Where that
prediction proves wrong and a shift down has to be taken back, the next one waits twice as long.
Time is an argument; between two requests there is nothing to do, and no timer does it.
"""

from collections.abc import Callable
from typing import Final

PRESSED: Final = 0.8
CALM: Final = 0.4
FULL_LOAD: Final = 1.0
AIRY_LOAD: Final = 0.95
SETTLE_SHARE: Final = 0.5
PATIENCE_S: Final = 1.0
MAX_PATIENCE_S: Final = 16.0


class Gears:
    """The gear of one model.

    Args:
        num_gears: Length of its ladder, gear 0 included.
        cost_of: Gives what a row costs in a gear, in any unit.
    """

    def __init__(self, num_gears: int, cost_of: Callable[[int], float]) -> None:
        self._num_gears = num_gears
        self._cost_of = cost_of
        self._gear = 0
        self._quiet_since_s = float("-inf")
        self._shifted_s = float("-inf")
        self._was_down = False
        self._patience_s = PATIENCE_S

    def at(self, now: float) -> int:
        """Give the gear at a time, not before the last one that was told.

        Once the backlog is gone it falls by itself, without any request.
        """
        return self._fallen(now)[0]

    def observe(self, wait_s: float, budget_s: float, load: float, now: float) -> int:
        """Take into account that a request arrives; gives the gear from now on.

        Args:
            wait_s: How long it will probably wait for the device.
            budget_s: The time it has, above 0.
            load: Share of the device's time that requests have lately asked for, in the gears they got.
            now: The time.
        """
        gear, shifted_s, self._patience_s = self._fallen(now)
        if gear != self._gear:
            self._gear, self._shifted_s, self._was_down = gear, shifted_s, True
        self._quiet_since_s = max(self._quiet_since_s, now + min(wait_s, budget_s))
        pressure, held_s = wait_s / budget_s, now - self._shifted_s
        if pressure > PRESSED and held_s >= SETTLE_SHARE * budget_s:
            self._shift_up(load, now)
        elif gear and pressure < CALM and held_s >= self._patience_s:
            self._shift_down(load, now)
        return self._gear

    def _fallen(self, now: float) -> tuple[int, float, float]:
        """Give the gear to which time alone has brought it down, when the last shift was, and the patience since."""
        gear, shifted_s, patience_s = self._gear, self._shifted_s, self._patience_s
        quiet_since_s = max(self._quiet_since_s, shifted_s)
        while gear and now - quiet_since_s >= patience_s:
            quiet_since_s += patience_s
            gear, shifted_s, patience_s = self._below(gear), quiet_since_s, max(patience_s / 2, PATIENCE_S)
        return gear, shifted_s, patience_s

    def _shift_up(self, load: float, now: float) -> None:
        cost = self._cost_of(self._gear)
        cheaper = [gear for gear in range(self._gear + 1, self._num_gears) if self._cost_of(gear) < cost]
        if not cheaper:
            return
        if self._was_down and now - self._shifted_s < self._patience_s:
            self._patience_s = min(2 * self._patience_s, MAX_PATIENCE_S)
        enough = (gear for gear in cheaper if load * self._cost_of(gear) < FULL_LOAD * cost)
        self._gear, self._shifted_s, self._was_down = next(enough, cheaper[-1]), now, False

    def _shift_down(self, load: float, now: float) -> None:
        lower = self._below(self._gear)
        if load * self._cost_of(lower) >= AIRY_LOAD * self._cost_of(self._gear):
            return
        if self._was_down:  # the one before has held
            self._patience_s = max(self._patience_s / 2, PATIENCE_S)
        self._gear, self._shifted_s, self._was_down = lower, now, True

    def _below(self, gear: int) -> int:
        """Give the next gear down.

        Gear 0 may be a policy that nobody has calibrated: a gear that costs more than that turns out to is no step.
        """
        return next((lower for lower in range(gear - 1, 0, -1) if self._cost_of(lower) < self._cost_of(0)), 0)
