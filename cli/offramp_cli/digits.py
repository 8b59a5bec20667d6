"""Makes what the demo serves: a network trained on handwritten digits, as a calibrated bundle that is kept."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from offramp_contract.errors import OfframpError

from offramp_cli.console import stderr
from offramp_cli.export import print_stages, step_by_step
from offramp_cli.export_source import NUM_EXAMPLES
from offramp_cli.train import fit, save, training_record

NAME = "digits"
NETWORK = "multi_exit_cnn"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the bundle.

    Attributes:
        seed: For weights, split and order.
        epochs: Passes over the training images.
        threads: Threads to train with; None: one per core.
    """

    seed: int = 0
    epochs: int = 6
    threads: int | None = None


def digits_bundle(folder: Path, recipe: Recipe, fresh: bool) -> Path:
    """Give the digits bundle in a folder; trains and exports it unless one made by the same recipe is there.

    Args:
        folder: The demo's folder; the bundle is `digits` in it.
        recipe: What decides the bundle.
        fresh: Make it anew in any case.
    """
    bundle = folder / NAME
    if not fresh and is_made_by(recipe, bundle):
        stderr.print(f"[green]✓[/] using the bundle in {bundle} (--fresh trains it anew)", highlight=False)
        return bundle
    _make(folder, recipe)
    return bundle


def is_made_by(recipe: Recipe, bundle: Path) -> bool:
    """Say whether a sound, calibrated bundle is there that was made by a recipe."""
    from offramp_runtime import open_bundle

    try:
        opened = open_bundle(bundle)
    except OfframpError:
        return False
    settings = opened.manifest.provenance.training.get("settings", {})
    is_calibrated = bool(opened.calibration.operating_points)
    return is_calibrated and (settings.get("seed"), settings.get("epochs")) == (recipe.seed, recipe.epochs)


def _make(folder: Path, recipe: Recipe) -> None:
    import torch
    from offramp_exporter import export
    from offramp_models import load_data
    from offramp_models.networks import plan_network
    from offramp_models.training import TrainingSettings

    data, plan = load_data(NAME, recipe.seed), plan_network(NETWORK)
    network = plan.build(recipe.seed)
    settings = TrainingSettings(epochs=recipe.epochs, seed=recipe.seed)
    record = training_record(plan, fit(network, data, settings, recipe.threads))
    save(network, record, folder / f"{NAME}.pt")
    if (folder / NAME).exists():  # also one that can no longer be read, which `overwrite` would leave alone
        shutil.rmtree(folder / NAME)
    with step_by_step() as step:
        bundle = export(
            network,
            torch.from_numpy(data.inputs(data.calibration)[:NUM_EXAMPLES]),
            folder / NAME,
            name=NAME,
            labels=data.label_names,
            preprocessing=data.preprocessing,
            training=record,
            progress=step,
        )
    print_stages(bundle.manifest)
    _calibrate(folder / NAME, recipe)


def _calibrate(bundle: Path, recipe: Recipe) -> None:
    from offramp_calibration.calibrate import CalibrationSettings, calibrate
    from offramp_calibration.write import write_calibration
    from offramp_runtime import open_bundle

    from offramp_cli.labelled_data import open_data
    from offramp_cli.recording import Recording, traced

    opened = open_bundle(bundle)
    held_out = open_data(NAME, opened, "calibration").data
    with traced(opened, held_out, Recording(device="cpu", threads=recipe.threads)) as trace:
        calibration = calibrate(trace, CalibrationSettings(seed=recipe.seed))
    write_calibration(calibration, bundle)
    stderr.print(
        f"[green]✓[/] calibrated on {calibration.num_samples} held-out images: "
        f"{len(calibration.operating_points)} operating points",
        highlight=False,
    )
