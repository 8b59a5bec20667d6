"""Writes the page on goodput under load from what `goodput.py` measured.

    python loadtest/benchmarks/goodput_report.py docs/benchmarks/goodput/*.json --out docs/benchmarks/goodput.md

Figures lie beside the JSON files.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from goodput_figures import Curve, curves_of, draw

OVERLOADS = (1.3, 2.0)
WITHIN_CAPACITY = 0.95

INTRODUCTION = """# Correct goodput under load

How many answers a second are both on time and right, against the load that is offered. It cannot be gamed: whoever
leaves at the first exit is on time and often wrong, whoever runs to the end is right and, under load, late.

* Load ρ is a share of μ, the rows per second that full depth does through the same path with work always waiting.
* Requests are due at Poisson times whether or not earlier ones have been answered; latency counts from when one was
  due. Each has one image and the same latency budget. Refused and failed requests count as late.
* The inputs' difficulty drifts: from middling to hard, to easy, and back, once in each run, by the doubt of the first
  exit. All configurations get the same inputs at the same times.
* *Full depth* and *the same for all* are what servers without early exits do: no request tells them its budget. *The
  deepest exit that fits* always goes on while the budget lasts (as Edgent does). *Early exit* is a calibrated operating
  point, with gears down to a certified floor. *The label oracle* asks for the cheapest right answer of each row, which
  nobody can know.
* Where rows that leave early take less of the stages than of HTTP and the client, less of the gain is realised than the
  stages' milliseconds predict. Where the cheapest certified gear does not keep up, requests are refused, and count as
  late; where gates are shut for lack of time, answers are on time and less often right.
* Every configuration has a server process of its own; client and servers share the machine. Numbers are the median of
  the passes, with their range.
"""


def main(
    series: Annotated[list[Path], typer.Argument(help="JSON files of goodput.py.")],
    out: Annotated[Path, typer.Option(help="The page.")],
) -> None:
    """Write the page and its figures."""
    parts = [INTRODUCTION]
    for path in series:
        document = json.loads(path.read_text())
        figures = draw(document, path.parent)
        parts.append(
            "\n".join(_section(document, {name: _relative(file, out) for name, file in figures.items()}, path, out))
        )
    out.write_text("\n".join(parts) + "\n")


def _relative(path: Path, out: Path) -> str:
    return path.resolve().relative_to(out.resolve().parent).as_posix()


def _section(document: Mapping[str, Any], figures: Mapping[str, str], path: Path, out: Path) -> Iterator[str]:
    curves = curves_of(document)
    yield f"## {document['model']}\n"
    yield from _facts(document, _relative(path, out))
    yield from _headline(document, curves)
    yield f"![Correct goodput and attainment against load, with every baseline]({figures['baselines']})\n"
    yield from _by_load("correct goodput, 1/s", curves, "correct_goodput", lambda value: f"{value:.0f}")
    yield from _by_load("attainment", curves, "attainment", lambda value: f"{value:.1%}")
    yield from _by_load("accuracy of the answers", curves, "accuracy", lambda value: f"{value:.1%}")
    yield "Early exit with everything on, and less one thing at a time:\n"
    yield f"![Early exit with everything on, and less one thing at a time]({figures['ablations']})\n"
    for rho in (WITHIN_CAPACITY, OVERLOADS[-1]):
        yield from _at_load(curves, rho)
    yield from _gain(document)


def _facts(document: Mapping[str, Any], path: str) -> Iterator[str]:
    point, settings, versions = document["point"], document["settings"], document["versions"]
    facts = {
        "command": f"`{document['command']}`",
        "network": _trained(document["training"]),
        "data": document["data"],
        "operating point": f"`{point['name']}`: {point['compute']:.1%} of full depth's compute, accuracy "
        f"{point['accuracy']:.1%} against {document['full_accuracy']:.1%} on calibration data",
        "gear floor": f"accuracy {document['floor']:g}, certified",
        "capacity at full depth": f"μ = {document['capacity']:.1f} rows/s",
        "latency budget": f"{document['slo_ms']:g} ms",
        "runs": f"{settings['passes']} passes of {settings['seconds']:g} s at each load; seeds 0 to "
        f"{settings['passes'] - 1}; {document['minutes']:g} minutes in all",
        "requests": f"one image each, `/{settings['api']}`",
        "server": f"`offramp serve {document['flags']}` and the flags of the configuration",
        "machine": document["machine"],
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "every run": f"[JSON]({path})",
    }
    yield "| what | value |\n| --- | --- |"
    yield from (f"| {name} | {value} |" for name, value in facts.items())
    yield ""


def _trained(training: Mapping[str, Any]) -> str:
    """Say what a network is and how it was trained, in the words of `offramp train`."""
    settings = training["settings"]
    knobs = (f"`{name}={_listed(value)}`" for name, value in training["knobs"].items())
    how = [f"{settings['epochs']} epochs of batches of {settings['batch_size']}", settings["method"].replace("_", " ")]
    how += [f"learning rate {settings['learning_rate']:g}", f"seed {settings['seed']}"]
    if "target" in settings["method"]:
        how.append(f"gate target {settings['gate_target']:g}")
    return f"{training['network']} with {', '.join(knobs)}; trained for {', '.join(how)}"


def _listed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _headline(document: Mapping[str, Any], curves: Sequence[Curve]) -> Iterator[str]:
    """Say in numbers how early exit compares with full depth."""
    named = {curve.name: curve for curve in curves}
    if document["full"] not in named or document["early"] not in named:
        return
    full, early = named[document["full"]], named[document["early"]]
    rows = []
    for rho in early.runs:
        ours, theirs = _median(early, rho, "correct_goodput"), _median(full, rho, "correct_goodput")
        difference = _pooled_accuracy(early, rho) - _pooled_accuracy(full, rho)
        ratio = f"{ours / theirs:.2f}" if theirs else "∞"
        kept = [_median(curve, rho, "attainment") for curve in (early, full)]
        rows.append(f"| {rho:g} | {ratio} | {kept[0]:.1%} | {kept[1]:.1%} | {100 * difference:+.1f} |")
    yield "| load ρ | correct goodput over full depth's | attainment | full depth's | accuracy of answers, pp |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    yield from rows
    yield ""


def _by_load(title: str, curves: Sequence[Curve], value: str, show: Callable[[float], str]) -> Iterator[str]:
    rhos = list(curves[0].runs)
    yield f"| {title} | {' | '.join(f'ρ = {rho:g}' for rho in rhos)} |"
    yield f"| --- |{' ---: |' * len(rhos)}"
    for curve in curves:
        yield f"| {curve.name} | {' | '.join(_cell(curve, rho, value, show) for rho in rhos)} |"
    yield ""


def _cell(curve: Curve, rho: float, value: str, show: Callable[[float], str]) -> str:
    found = [run[value] for run in curve.runs[rho] if run[value] is not None]
    if not found:
        return ""
    middle = show(float(np.median(found)))
    return middle if len(found) == 1 else f"{middle} ({show(min(found))} to {show(max(found))})"


def _at_load(curves: Sequence[Curve], rho: float) -> Iterator[str]:
    if rho not in curves[0].runs:
        return
    yield f"At ρ = {rho:g}; latencies in ms, of the answered:\n"
    yield "| | p50 | p95 | p99 | p99.9 | waited, p50 | ran, p50 | refused | forced | depth | rows a dispatch |"
    yield f"| --- |{' ---: |' * 10}"
    for curve in curves:
        latencies = [_of(curve, rho, "latency_ms", name, "{:.1f}") for name in ("p50", "p95", "p99", "p99.9")]
        inside = [_of(curve, rho, name, "p50", "{:.1f}") for name in ("queue_ms", "compute_ms")]
        shares = [_of(curve, rho, name, None, "{:.1%}") for name in ("rejected", "forced", "mean_depth")]
        batch = _of(curve, rho, "mean_batch", None, "{:.1f}")
        yield f"| {curve.name} | {' | '.join([*latencies, *inside, *shares, batch])} |"
    yield ""


def _of(curve: Curve, rho: float, value: str, key: str | None, form: str) -> str:
    found = [run[value] if key is None else run[value].get(key) for run in curve.runs[rho]]
    known = [number for number in found if number is not None]
    return form.format(float(np.median(known))) if known else ""


def _gain(document: Mapping[str, Any]) -> Iterator[str]:
    gains = document["gains"]
    if not gains:
        return
    yield "With work always waiting, full depth and the operating point in turns on one server:\n"
    yield "| | median | of pairs |\n| --- | ---: | --- |"
    shown = {
        "full depth, rows/s": "full_rate",
        "early exit, rows/s": "early_rate",
        "gain in throughput": "realised",
        "gain that stage milliseconds predict": "predicted",
        "realised over predicted": "share",
    }
    for title, name in shown.items():
        found = [gain[name] for gain in gains]
        places = 1 if name.endswith("rate") else 2
        yield f"| {title} | {np.median(found):.{places}f} | {min(found):.{places}f} to {max(found):.{places}f} |"
    yield ""


def _median(curve: Curve, rho: float, value: str) -> float:
    return float(np.median([run[value] for run in curve.runs[rho]]))


def _pooled_accuracy(curve: Curve, rho: float) -> float:
    answered = [(run["accuracy"], run["outcomes"].get("ok", 0)) for run in curve.runs[rho]]
    right = sum(accuracy * count for accuracy, count in answered if accuracy is not None)
    return float(right / max(sum(count for _, count in answered), 1))


if __name__ == "__main__":
    typer.run(main)
