"""Habits of networks that people write, each shown by a small network of our own: export, verify, serve.

None is a copy of anybody's code. Every network is exported as it is, served by the real engine, and asked for every
exit with one row and with several, on 200 random inputs: it must answer what the network does when it is simply called.
Networks that return early, the most frequent habit, have `test_early_return.py`; what is impossible, `test_impossible`.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from habit_table import HABITS
from offramp_runtime import Bundle, open_device
from offramp_server import Engine
from offramp_server.engine_settings import EngineSettings
from torch import nn

NUM_SINGLE, NUM_INPUTS = 12, 200


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    torch.set_num_threads(1)
    settings = EngineSettings(warm_up_s=0.02, default_latency_ms=None, max_wait_ms=1e6)
    with Engine(open_device("cpu", threads=1), settings) as engine:
        yield engine


@pytest.mark.parametrize("name", HABITS)
def test_a_network_is_exported_proved_and_served_as_it_is(
    name: str, engine: Engine, exported_habit: Callable[[str], tuple[nn.Module, Bundle]]
) -> None:
    habit = HABITS[name]
    network, bundle = exported_habit(name)

    manifest = bundle.manifest
    assert [exit_.name for exit_ in manifest.exits] == [f"exit_{number}" for number in habit.order]
    assert (manifest.min_batch, manifest.max_batch) == habit.batches
    rows = habit.rows(NUM_INPUTS)
    expected = habit.simply_called(network, rows)
    arrays = {name or manifest.inputs[0].name: tensor.numpy() for name, tensor in rows.items()}
    served = engine.add_model(bundle)
    try:
        for exit_index, scores_BC in enumerate(expected):
            policy = {"kind": "fixed", "exit": exit_index}
            for part in (*(slice(row, row + 1) for row in range(NUM_SINGLE)), slice(NUM_SINGLE, None)):
                chosen = {name: array[part] for name, array in arrays.items()}
                result = engine.classify(chosen, model=served.name, policy=policy)
                assert [row.answer.exit_index for row in result.rows] == [exit_index] * len(result.rows)
                logits_BC = np.stack([row.answer.logits_C for row in result.rows])
                np.testing.assert_allclose(logits_BC, scores_BC[part].numpy(), rtol=1e-4, atol=1e-4)
    finally:
        engine.remove_model(served)
