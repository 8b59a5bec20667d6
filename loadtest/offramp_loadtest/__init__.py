"""An open-loop load test for servers that speak Offramp's API or the Open Inference Protocol. It only talks HTTP."""

from offramp_loadtest.capacity import measure_capacity
from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.payloads import Payload, payloads_of_arrays, read_payloads
from offramp_loadtest.report import render
from offramp_loadtest.run import LoadTest, Progress, run
from offramp_loadtest.scenario import Arrivals, Difficulty, Disturbance, Phase, Scenario, read_scenario, scenario_of
from offramp_loadtest.summary import Record, Summary
from offramp_loadtest.targets import Api

__all__ = [
    "Api",
    "Arrivals",
    "Difficulty",
    "Disturbance",
    "LoadTest",
    "LoadTestError",
    "Payload",
    "Phase",
    "Progress",
    "Record",
    "Scenario",
    "Summary",
    "measure_capacity",
    "payloads_of_arrays",
    "read_payloads",
    "read_scenario",
    "render",
    "run",
    "scenario_of",
]
