"""The threads of a device: runners, which take turns at choosing and finishing dispatches; stages run side by side.

Where there is little to do, a thread that brings work may do it itself: waking another and being woken by it would cost
more.

A thread that dies takes all others with it, and the last to go says so: whoever is still owed an answer gets one.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from offramp_contract.errors import NotReady

from offramp_server.loop import DeviceLoop

logger = logging.getLogger(__name__)

ROUNDS_PER_CHORE = 8
"""While there is work, profiling a new model gets one run in so many rounds."""
CLOSE_TIMEOUT_S = 60.0
LONGEST_PAUSE_S = 1.0


@dataclass(slots=True)
class _Chore:
    """Work for the device that nobody waits for with a deadline, in small steps.

    Attributes:
        steps: Gives, before each step, the seconds that step is expected to take.
        next_s: Those of the next step.
        done: Resolved when no step is left.
    """

    steps: Iterator[float]
    next_s: float = 0.0
    done: Future[None] = field(default_factory=Future)


class Runners:
    """Drives a device's loop.

    Args:
        loop: The loop; touched by the runners only.
        count: How many there are.

    Attributes:
        wakeup: Guards what is decided together with a command: whoever holds it may call `command` and be sure that
            the runners have not ended.
        cause_of_death: Why they have ended, if nobody asked them to.
        is_stopping: Whether they end or have ended.
    """

    def __init__(self, loop: DeviceLoop, count: int) -> None:
        self.wakeup = threading.Condition(threading.RLock())
        self.cause_of_death: str | None = None
        self.is_stopping = False
        self._loop = loop
        self._commands: deque[Callable[[], None]] = deque()
        self._chores: deque[_Chore] = deque()
        self._turn = threading.Lock()
        self._chore_turn = threading.Lock()
        self._num_idle = 0
        self._num_left = count
        names = (f"offramp-runner-{index}" for index in range(count))
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    @property
    def why_ended(self) -> str | None:
        """The reason why nothing is run any more, or None."""
        if self.cause_of_death is not None:
            return f"the engine has died: {self.cause_of_death}"
        return "the engine is closed" if self.is_stopping else None

    @property
    def is_alive(self) -> bool:
        """Whether all run; false means that only a restart helps."""
        return self.cause_of_death is None and all(thread.is_alive() for thread in self._threads)

    def command(self, command: Callable[[], None], *, wake: bool = True) -> None:
        """Have a command obeyed before the next dispatch is chosen; commands are obeyed in order.

        Args:
            command: What to do.
            wake: Whether a runner is woken for it. Who says no calls `wake` or `work_off` soon.

        Raises:
            NotReady: If the runners have ended.
        """
        with self.wakeup:
            reason = self.why_ended
            if reason is not None:
                raise NotReady(reason)
            self._commands.append(command)
            if wake:
                self.wake()

    def wake(self) -> None:
        """Have a runner look whether there is work, unless the device is full: who runs a stage looks after it."""
        with self.wakeup:
            if self._loop.has_room:
                self.wakeup.notify()

    def work_off(self, num_rounds: int) -> None:
        """Run on the calling thread what waits, in at most so many rounds; the rest is the runners'.

        So is everything if one of them is awake: it has work, and looks for more when that is done.
        """
        with self.wakeup:
            are_idle = self._num_idle == len(self._threads) and not self.is_stopping
            self._num_left += are_idle  # this thread is one of them meanwhile
        if are_idle:
            try:
                while num_rounds and self._waits():
                    num_rounds = 0 if self._round() else num_rounds - 1
            except BaseException as error:
                self._die(error)
                if not isinstance(error, Exception):  # such as an interrupt, which is the caller's to deal with
                    raise
            finally:
                self._leave()
        if self._has_work():
            self.wake()

    def do(self, steps: Iterator[float]) -> None:
        """Have a chore done while nothing more urgent is to do; blocks until it is.

        Args:
            steps: Does one step after the other, and gives before each the seconds it is expected to take.

        Raises:
            NotReady: If the runners end before.
        """
        chore = _Chore(steps)
        self.command(lambda: self._chores.append(chore))
        chore.done.result()

    def stop(self) -> None:
        """End all; requests still in flight are answered with `NotReady`."""
        self._end_all()
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)

    def _serve(self) -> None:
        """Be one of them."""
        try:
            rounds, pause_s = 0, 0.0
            while self._wait_for_work(pause_s):
                pause_s = self._round()
                rounds += 1
                if self._chores and (pause_s or rounds % ROUNDS_PER_CHORE == 0):
                    self._do_chore()
        except BaseException as error:
            self._die(error)
        finally:
            self._leave()

    def _wait_for_work(self, pause_s: float) -> bool:
        """Sleep until there is something to do, and first for so long if what waits may not start before."""
        if not pause_s and self._has_work():  # as between two rounds of one batch: without the lock
            return not self.is_stopping
        with self.wakeup:
            self._num_idle += 1
            if pause_s and self._loop.may_start and not (self._commands or self._chores or self.is_stopping):
                self.wakeup.wait(min(pause_s, LONGEST_PAUSE_S))
            self.wakeup.wait_for(self._has_work)
            self._num_idle -= 1
            return not self.is_stopping

    def _has_work(self) -> bool:
        return bool(self._waits() or self._chores or self.is_stopping)

    def _waits(self) -> bool:
        return bool(self._commands or self._loop.may_start)

    def _round(self) -> float:
        """Run a stage, if one is to run; gives the seconds until the next may, infinite if nothing waits."""
        with self._turn:
            while self._commands:
                self._commands.popleft()()
            dispatch = self._loop.choose()
            if dispatch is None:
                return self._loop.wait_s
        self._call_the_idle()
        ran = self._loop.execute(dispatch)
        with self._turn:
            self._loop.finish(dispatch, ran)
        return 0.0

    def _call_the_idle(self) -> None:
        """Wake another runner if there is work for it."""
        if self._num_idle and len(self._threads) > 1 and self._loop.may_start:
            self.wake()

    def _do_chore(self) -> None:
        """Do one step of the first chore, unless another runner is at it."""
        if self._chore_turn.acquire(blocking=False):
            try:
                if self._chores:
                    self._advance(self._chores[0])
            finally:
                self._chore_turn.release()

    def _advance(self, chore: _Chore) -> None:
        """Do one step of a chore, unless that would break the promise of a row that waits."""
        with self._turn:
            slack_s = self._loop.slack_s
        if chore.next_s > slack_s:
            return
        try:
            chore.next_s = next(chore.steps)
        except StopIteration:
            self._chores.popleft()
            chore.done.set_result(None)
        except Exception as error:
            # A model that cannot even be warmed up is its loader's problem; the others go on.
            self._chores.popleft()
            chore.done.set_exception(error)

    def _die(self, error: BaseException) -> None:
        """End all because of an error that nobody has foreseen."""
        logger.critical("a thread of the engine has died", exc_info=True)
        self.cause_of_death = type(error).__name__
        self._end_all()

    def _end_all(self) -> None:
        with self.wakeup:
            self.is_stopping = True
            self.wakeup.notify_all()

    def _leave(self) -> None:
        """Be one of them no more; the last answers everyone."""
        with self.wakeup:
            self._num_left -= 1
            is_last = self._num_left == 0
        if is_last:
            self._answer_everyone()

    def _answer_everyone(self) -> None:
        error = NotReady(self.why_ended or "the engine is closed")
        while self._commands:
            with suppress(Exception):  # what killed the thread may have left anything behind it in any state
                self._commands.popleft()()
        for chore in self._chores:
            chore.done.set_exception(error)
        self._loop.abandon(error)
