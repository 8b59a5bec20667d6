"""What the dashboard shows: rows of panels, each of which is one PromQL query.

The queries name only what `offramp_server.metrics` exposes; a test evaluates each against a real Prometheus.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

CHOSEN = 'model="$model", version=~"$version"'
"""What the choices at the top of the dashboard leave of every metric."""
SECONDS, SHARE, PER_SECOND, REQUESTS_PER_SECOND = "s", "percentunit", "cps", "reqps"


def rate(metric: str, *by: str, where: str = "") -> str:
    """Give the increase of a counter per second, summed but for the labels in `by`."""
    selector = ", ".join(filter(None, (CHOSEN, where)))
    total = f"sum by ({', '.join(by)}) " if by else "sum"
    return f"{total}(rate({metric}{{{selector}}}[$__rate_interval]))"


def increase(metric: str, *by: str, where: str = "") -> str:
    """Give the increase of a counter over the time shown, summed but for the labels in `by`."""
    selector = ", ".join(filter(None, (CHOSEN, where)))
    return f"sum by ({', '.join(by)}) (increase({metric}{{{selector}}}[$__range]))"


def share(part: str, whole: str) -> str:
    """Give how large a rate is beside another."""
    return f"{part} / {whole}"


def mean(histogram: str, *by: str) -> str:
    """Give the mean of what a histogram has observed lately."""
    return share(rate(f"{histogram}_sum", *by), rate(f"{histogram}_count", *by))


def quantile(q: float, histogram: str, *by: str) -> str:
    """Give a quantile of what a histogram has observed lately."""
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', 'le', *by)})"


def together(label: str, named: dict[str, str]) -> str:
    """Join queries into one, told apart by a label."""
    return " or ".join(f'label_replace({query}, "{label}", "{name}", "", "")' for name, query in named.items())


def quantiles(histogram: str, *points: float) -> str:
    """Give several quantiles at once, told apart by the label `quantile`."""
    return together("quantile", {f"p{point * 100:g}": quantile(point, histogram) for point in points})


DEPTH = mean("offramp_depth_ratio")
SAVED = f"1 - {DEPTH}"
SAMPLES = rate("offramp_samples_total")
FORCED = rate("offramp_forced_exits_total")
MISSED = share(rate("offramp_deadline_missed_total"), rate("offramp_deadline_slack_seconds_count"))


@dataclass(frozen=True)
class Panel:
    """What is particular to one panel.

    Attributes:
        title: What it shows.
        description: How to read it, shown on demand.
        query: Its one query.
        legend: Names the query's series by their labels.
        unit: Grafana's name of the values' unit.
        width: In 24ths of the page.
        look: A number with its recent course, a bar per series, lines, stacked areas, or shares of a whole.
        limits: From which value on a number turns orange, and red.
    """

    title: str
    description: str
    query: str
    legend: str = ""
    unit: str = PER_SECOND
    width: int = 8
    look: Literal["number", "bars", "lines", "stack", "shares"] = "lines"
    limits: tuple[float, ...] = ()


Row: TypeAlias = tuple[str, tuple[Panel, ...]]

NOW: Row = (
    "Now",
    (
        Panel("Requests", "Requests per second, whatever became of them.", rate("offramp_requests_total"),
              unit=REQUESTS_PER_SECOND, width=4, look="number"),
        Panel("Latency p99", "99 of 100 admitted requests were answered within this time of their arrival.",
              quantile(0.99, "offramp_request_duration_seconds"), unit=SECONDS, width=4, look="number"),
        Panel("Compute saved", "Share of the full path's FLOPs that answered rows did not need.", SAVED,
              unit=SHARE, width=4, look="number"),
        Panel("Forced exits", "Share of rows that left because of their deadline, not by their policy.",
              share(FORCED, SAMPLES), unit=SHARE, width=4, look="number", limits=(0.05, 0.2)),
        Panel("Deadlines missed", "Share of requests with a deadline that were answered after it.", MISSED,
              unit=SHARE, width=4, look="number", limits=(0.001, 0.01)),
        Panel("Rejected", "Share of requests refused because of load, or because the engine was not ready.",
              share(rate("offramp_requests_total", where='outcome="rejected"'), rate("offramp_requests_total")),
              unit=SHARE, width=4, look="number", limits=(0.001, 0.01)),
    ),
)  # fmt: skip
REQUESTS: Row = (
    "Requests",
    (
        Panel("Requests by outcome", "invalid and cancelled are the clients' doing; rejected and deadline mean too "
              "much load or too small budgets; error is ours.",
              rate("offramp_requests_total", "outcome"), "{{outcome}}", REQUESTS_PER_SECOND, look="stack"),
        Panel("Latency", "Arrival to answer of admitted requests.",
              quantiles("offramp_request_duration_seconds", 0.5, 0.95, 0.99), "{{quantile}}", SECONDS),
        Panel("Rows in flight", "Admitted and not answered yet.",
              f"sum by (version) (offramp_inflight_samples{{{CHOSEN}}})", "{{version}}", "short"),
        Panel("Refused by reason", "Requests that were not admitted, by error code.",
              rate("offramp_rejected_total", "reason") + " > 0",
              "{{reason}}", REQUESTS_PER_SECOND, look="stack", width=12),
        Panel("Rows answered with an error, by reason", "not_finite: the network gave NaN or infinity for the row; "
              "stage_failed: the runtime raised.",
              rate("offramp_failed_samples_total", "reason") + " > 0", "{{reason}}", look="stack", width=12),
    ),
)  # fmt: skip
DEPTHS: Row = (
    "Depth",
    (
        Panel("Rows by exit", "Where rows left, over the time shown.",
              increase("offramp_samples_total", "exit"), "{{exit}}", "short",
              look="bars"),
        Panel("Rows by exit, over time", "A shift to later exits means harder inputs or stricter requests; a shift to "
              "earlier ones may be deadlines: see the reasons.",
              rate("offramp_samples_total", "exit"), "{{exit}}", look="shares"),
        Panel("Rows by reason, over time", "Why rows left: the policy's rule, a cap, the deadline, or the end.",
              rate("offramp_samples_total", "reason") + " > 0", "{{reason}}", look="shares"),
        Panel("Depth and compute saved", "Shares of the full path's FLOPs.",
              together("share", {"average depth": DEPTH, "compute saved": SAVED}), "{{share}}", SHARE),
        Panel("Forced and voluntary exits", "Forced: the deadline decided, so the answer is shallower than its policy "
              "asked for.",
              together("kind", {"voluntary": f"({SAMPLES} - {FORCED})", "forced": FORCED}), "{{kind}}", look="stack"),
        Panel("Mean exit index", "0 is the first exit.", mean("offramp_exit_depth"), "mean", "short"),
    ),
)  # fmt: skip
GATES: Row = (
    "Gates",
    (
        Panel("Executed depth", "Share of the full path's FLOPs that rows really ran, stages behind shut gates left "
              "out: the shallowest tenth, half and nine tenths of the rows are below.",
              quantiles("offramp_depth_ratio", 0.1, 0.5, 0.9), "{{quantile}}", SHARE),
        Panel("Gates open", "Share of the rows which came to a gate that went through, over the time shown.",
              share(increase("offramp_gate_decisions_total", "gate", where='decision="open"'),
                    increase("offramp_gate_decisions_total", "gate")), "{{gate}}", SHARE, look="bars"),
        Panel("Gate decisions, over time", "All gates together: open, shut by their own score or the request, and "
              "forced: a deadline left no time for what is behind.",
              rate("offramp_gate_decisions_total", "decision"), "{{decision}}", look="shares"),
    ),
)  # fmt: skip
STAGES: Row = (
    "Stages",
    (
        Panel("Device time by stage", "Seconds of the device per second; all stages together near 1 means that the "
              "device is the limit.",
              rate("offramp_stage_duration_seconds_sum", "stage"), "{{stage}}", SHARE, look="stack", width=12),
        Panel("Stage duration p95", "One dispatch, gathering and routing included.",
              quantile(0.95, "offramp_stage_duration_seconds", "stage", "variant"), "{{stage}} {{variant}}", SECONDS,
              width=12),
        Panel("Rows per dispatch", "Mean batch size: survivors of different requests run together.",
              mean("offramp_stage_batch_size", "stage"), "{{stage}}", "short", width=12),
        Panel("Queue time p95 by stage", "How long rows waited before a stage.",
              quantile(0.95, "offramp_queue_seconds", "stage"), "{{stage}}", SECONDS, width=12),
    ),
)  # fmt: skip
DEADLINES: Row = (
    "Deadlines",
    (
        Panel("Slack at the answer", "Deadline minus time of the answer, the tightest 1 %, 10 % and half of the "
              "requests; below 0 it was missed.",
              quantiles("offramp_deadline_slack_seconds", 0.01, 0.1, 0.5), "{{quantile}}", SECONDS, width=12),
        Panel("Deadlines missed, over time", "Share of requests with a deadline.", MISSED, "missed", SHARE, width=12),
    ),
)  # fmt: skip
GEARS: Row = (
    "Gears",
    (
        Panel("Gear", "How far the load has moved each version down its certified operating points; 0: not at all, or "
              "it has none.",
              f"sum by (version) (offramp_gear{{{CHOSEN}}})", "{{version}}", "short", width=12),
        Panel("Requests by gear, over time", "Of requests that leave the choice to the server, which gear served them.",
              rate("offramp_gear_requests_total", "gear"), "gear {{gear}}", look="shares", width=12),
    ),
)  # fmt: skip
WHOLE: Row = (
    "The whole server",
    (
        Panel("Requests by model", "All models, not only the chosen one.",
              "sum by (model) (rate(offramp_requests_total[$__rate_interval]))", "{{model}}", REQUESTS_PER_SECOND, 6,
              look="stack"),
        Panel("Compute saved since load", "All models and versions, since each was loaded.",
              "offramp_compute_saved_ratio", "{{model}} {{version}}", SHARE, 6, look="bars"),
        Panel("CPU", "Cores that the process uses.",
              'rate(process_cpu_seconds_total{job="offramp"}[$__rate_interval])', "{{instance}}", "short", 6),
        Panel("Memory", "Resident memory of the process.", 'process_resident_memory_bytes{job="offramp"}',
              "{{instance}}", "bytes", 6),
    ),
)  # fmt: skip

ROWS = (NOW, REQUESTS, DEPTHS, GATES, STAGES, DEADLINES, GEARS, WHOLE)
