"""An open-loop load test for servers that speak Offramp's API or the Open Inference Protocol. It only talks HTTP."""

from offramp_loadtest.arrivals import ArrivalKind
from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.payloads import Payload, payloads_of_arrays, read_payloads
from offramp_loadtest.report import render
from offramp_loadtest.run import LoadPlan, Progress, run
from offramp_loadtest.summary import Summary
from offramp_loadtest.targets import Api

__all__ = [
    "Api",
    "ArrivalKind",
    "LoadPlan",
    "LoadTestError",
    "Payload",
    "Progress",
    "Summary",
    "payloads_of_arrays",
    "read_payloads",
    "render",
    "run",
]
