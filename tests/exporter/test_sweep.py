"""No bundle ever differs from its network: 200 inputs of every scale for each network of these tests.

Every exit is asked for one row at a time and for many rows together; a network that returns early decides by itself
where, and its bundle leaves there, too.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from early_networks import EARLY, Trunk
from early_oracle import NUM_INPUTS, ask, images
from habit_table import HABITS
from offramp_contract.policy import Reason, Seen
from offramp_contract.policy_spec import NativeSpec, compile_policy
from offramp_contract.statistics import Decision
from offramp_runtime import Bundle, StageExecutor, open_bundle, open_device, run_all_exits
from offramp_server import Engine
from offramp_server.engine_settings import EngineSettings
from torch import Tensor, nn

SCALES = (0.01, 0.1, 1.0, 3.0, 30.0)
MANY = 50
TOLERANCE = 1e-4


def scaled(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale the floats, a fifth of the rows by each scale."""
    factors_B = torch.tensor(SCALES).repeat(NUM_INPUTS // len(SCALES))
    return {
        name: tensor * factors_B.reshape(-1, *[1] * (tensor.ndim - 1)) if tensor.is_floating_point() else tensor
        for name, tensor in rows.items()
    }


def staged(executor: StageExecutor, arrays: dict[str, np.ndarray], batch: int) -> list[np.ndarray]:
    """Give every exit's scores, so many rows at a time."""
    answers = []
    for start in range(0, NUM_INPUTS, batch):
        rows = np.arange(start, start + batch) % NUM_INPUTS
        exits = run_all_exits(executor, {name: array[rows] for name, array in arrays.items()})
        answers.append([logits_BC for logits_BC, _ in exits])
    return [np.concatenate(parts)[:NUM_INPUTS] for parts in zip(*answers, strict=True)]


def assert_equal_by_row(actual_BC: np.ndarray, expected_BC: np.ndarray) -> None:
    size_B1 = np.abs(np.where(np.isfinite(expected_BC), expected_BC, 0)).max(axis=1, keepdims=True)
    np.testing.assert_allclose(actual_BC / (1 + size_B1), expected_BC / (1 + size_B1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", HABITS)
def test_a_network_that_returns_every_exit_never_differs_from_its_bundle(
    name: str, exported_habit: Callable[[str], tuple[nn.Module, Bundle]]
) -> None:
    habit = HABITS[name]
    network, bundle = exported_habit(name)
    manifest = bundle.manifest
    torch.manual_seed(4)
    rows = scaled(habit.rows(NUM_INPUTS))
    expected = habit.simply_called(network, rows)
    arrays = {name or manifest.inputs[0].name: tensor.numpy() for name, tensor in rows.items()}
    executor = StageExecutor(bundle, open_device("cpu", threads=1))

    for batch in {manifest.min_batch, min(MANY, manifest.max_batch or MANY)}:
        for actual_BC, expected_BC in zip(staged(executor, arrays, batch), expected, strict=True):
            assert_equal_by_row(actual_BC, expected_BC.numpy())


def leaving_alone(bundle: Bundle, arrays: dict[str, np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Give where each row leaves under the native policy when it comes alone, and its answer there."""
    executor = StageExecutor(bundle, open_device("cpu", threads=1))
    policy = compile_policy(NativeSpec(), len(bundle.manifest.exits), bundle.manifest.native)
    for row in range(NUM_INPUTS):
        exits = run_all_exits(executor, {name: array[row : row + 1] for name, array in arrays.items()})
        decisions = [Decision(decision_BD) for _, decision_BD in exits]
        class_BK = np.stack([decision.class_B for decision in decisions], axis=1)
        fired = [policy(Seen(k, decisions[k], class_BK[:, : k + 1]))[0] for k in range(len(exits) - 1)]
        taken = next((k for k, reason in enumerate(fired) if reason != Reason.CONTINUE), len(exits) - 1)
        yield taken, exits[taken][0][0]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings = EngineSettings(warm_up_s=0.02, default_latency_ms=None, max_wait_ms=1e6)
    with Engine(open_device("cpu", threads=1), settings) as engine:
        yield engine


@pytest.mark.parametrize("kind", EARLY, ids=lambda kind: kind.__name__)
def test_a_network_that_returns_early_never_differs_from_its_bundle(
    kind: type[Trunk], exported: Callable[[type[nn.Module]], Path], engine: Engine
) -> None:
    bundle, x = open_bundle(exported(kind)), images()
    torch.manual_seed(4)
    x = x.flip(0) * torch.tensor(SCALES).repeat(NUM_INPUTS // len(SCALES)).reshape(-1, 1, 1, 1)
    own = ask(kind().eval(), x)
    name = bundle.manifest.inputs[0].name
    served = engine.add_model(bundle)
    try:
        rows = engine.classify({name: x.numpy()}, model=served.name).rows
    finally:
        engine.remove_model(served)
    together = [(row.answer.exit_index, row.answer.logits_C) for row in rows]
    alone = list(leaving_alone(bundle, {name: x.numpy()}))

    for answers in (alone, together):
        # The network and its bundle name exits each in their own way: every name of the one has one name of the other.
        pairs = {(asked.where, exit_) for asked, (exit_, _) in zip(own, answers, strict=True)}
        assert len(pairs) == len({where for where, _ in pairs}) == len({exit_ for _, exit_ in pairs})
        assert len(pairs) > 1
        logits_BC = np.stack([logits_C for _, logits_C in answers])
        assert_equal_by_row(logits_BC, np.stack([asked.logits for asked in own]))
