"""From held-out data to a bundle that knows itself: traces, replay, operating points, certificates, reports."""

from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import Replayed, replay
from offramp_calibration.trace import Trace

__all__ = ["Outcomes", "Replayed", "Trace", "replay"]
