import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from offramp_contract.calibration import Calibration, OperatingPoint
from offramp_contract.errors import BundleError, InvalidValue, ManifestError, NotReady, UnknownModel
from offramp_contract.policy_spec import ConfidenceSpec
from offramp_runtime import open_bundle, open_device
from offramp_server.catalogue import IndexEntry
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.messages import NoObserver, StageRun
from offramp_server.repository import Repository
from offramp_server.repository_files import scan

MakeBundle = Callable[..., Path]
ROW = np.array([[0, 9, 0, 0]], dtype=np.float32)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(open_device("cpu", 1), EngineSettings(warm_up_s=0.05)) as engine:
        yield engine


@pytest.fixture(scope="module")
def old(make_bundle: MakeBundle) -> Path:
    return make_bundle(gains=(1.0, 2.0))


@pytest.fixture(scope="module")
def new(make_bundle: MakeBundle) -> Path:
    return make_bundle(gains=(3.0, 4.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty repository."""
    path = tmp_path / "repository"
    path.mkdir()
    return path


def put(bundle: Path, target: Path) -> Path:
    """Put a bundle there in one atomic step, as a folder or, if the target says so, zipped."""
    staging = target.parent.parent / ".staging"
    staging.mkdir(exist_ok=True)
    if target.suffix == ".zip":
        written = Path(shutil.make_archive(str(staging / target.stem), "zip", bundle))
    else:
        written = shutil.copytree(bundle, staging / target.name)
    return written.rename(target)


def version_of(bundle: Path) -> str:
    return open_bundle(bundle).manifest.model_digest[:12]


def break_graph(bundle: Path) -> None:
    (bundle / "stages" / "00.onnx").write_bytes(b"not what the manifest names")


@pytest.mark.parametrize("entry", ["north", "north.zip"])
def test_a_folder_of_bundles_is_served_by_the_names_of_its_entries(
    engine: Engine, folder: Path, old: Path, new: Path, entry: str
) -> None:
    put(old, folder / entry)
    put(new, folder / "south")
    (folder / "README.md").write_text("no bundle")
    (folder / ".hidden").mkdir()
    repository = Repository(engine, folder)
    repository.load_all()
    assert [(served.name, served.version) for served in repository.served()] == [
        ("north", version_of(old)),
        ("south", version_of(new)),
    ]
    assert repository.find("north", version_of(old)) is repository.find("north")


def test_a_bundle_alone_is_served_by_its_own_name_and_to_requests_that_name_none(engine: Engine, old: Path) -> None:
    repository = Repository(engine, old)
    repository.load_all()
    assert repository.find().name == "toy"
    assert repository.find() is repository.find("toy")


def test_the_highest_of_a_models_numbered_versions_is_served(
    engine: Engine, folder: Path, old: Path, new: Path
) -> None:
    (folder / "toy").mkdir()
    for number, bundle in (("2", old), ("10", new)):
        shutil.copytree(bundle, folder / "toy" / number)
    repository = Repository(engine, folder)
    repository.load_all()
    assert repository.find("toy").version == version_of(new)


def test_a_broken_bundle_is_refused_by_name_and_the_others_are_served(engine: Engine, folder: Path, old: Path) -> None:
    break_graph(put(old, folder / "broken"))
    put(old, folder / "sound")
    (folder / "empty").mkdir()
    (folder / "torn.zip").write_bytes(b"PK but not for long")
    repository = Repository(engine, folder)
    repository.load_all()
    assert {(entry.name, entry.state) for entry in repository.index()} == {
        ("broken", "UNAVAILABLE"),
        ("empty", "UNAVAILABLE"),
        ("sound", "READY"),
        ("torn", "UNAVAILABLE"),
    }
    reasons = {entry.name: entry.reason for entry in repository.index()}
    assert "stages/00.onnx" in reasons["broken"]
    assert "manifest.json" in reasons["empty"]
    assert "zip" in reasons["torn"]
    with pytest.raises(NotReady, match=r"^model 'broken' is unavailable: file 'stages/00\.onnx'"):
        repository.find("broken")
    assert repository.find("sound").name == "sound"


def test_a_broken_bundle_alone_stops_the_start(engine: Engine, folder: Path, old: Path) -> None:
    bundle = put(old, folder / "toy")
    break_graph(bundle)
    with pytest.raises(BundleError, match=r"stages/00\.onnx"):
        Repository(engine, bundle).load_all()


def test_a_path_that_is_nothing_stops_the_start(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="neither a bundle nor a folder of bundles"):
        Repository(engine, tmp_path / "nothing").load_all()


def test_several_models_need_a_name_or_a_default(engine: Engine, folder: Path, old: Path, new: Path) -> None:
    put(old, folder / "north")
    put(new, folder / "south")
    repository = Repository(engine, folder)
    repository.load_all()
    with pytest.raises(InvalidValue, match="name one of north, south"):
        repository.find()
    repository.default_model = "south"
    assert repository.find().name == "south"


@pytest.mark.parametrize("name", ["../toy", "/etc", "toy/../toy", "", "x" * 5000, "none", "."])
def test_a_name_is_looked_up_and_never_a_path(engine: Engine, folder: Path, old: Path, name: str) -> None:
    put(old, folder / "toy")
    repository = Repository(engine, folder)
    repository.load_all()
    for ask in (repository.find, repository.load, repository.unload):
        with pytest.raises(UnknownModel) as caught:
            ask(name)
        assert len(caught.value.message) < 300


def test_a_version_that_is_not_served_is_unknown(engine: Engine, old: Path) -> None:
    repository = Repository(engine, old)
    repository.load_all()
    with pytest.raises(UnknownModel, match=f"is served in version {version_of(old)}, not '1'"):
        repository.find("toy", "1")


def exchange_zip(folder: Path, bundle: Path) -> None:
    put(bundle, folder / "toy.zip")


def exchange_link(folder: Path, bundle: Path) -> None:
    link = folder / ".link"
    link.symlink_to(bundle)
    link.rename(folder / "toy")


def exchange_number(folder: Path, bundle: Path) -> None:
    model = folder / "toy"
    model.mkdir(exist_ok=True)
    put(bundle, model / str(len(os.listdir(model)) + 1))


@pytest.mark.parametrize("exchange", [exchange_zip, exchange_link, exchange_number])
def test_a_new_version_takes_the_place_of_the_old_one(
    engine: Engine, folder: Path, old: Path, new: Path, exchange: Callable[[Path, Path], None]
) -> None:
    exchange(folder, old)
    repository = Repository(engine, folder)
    repository.load_all()
    first = repository.find("toy")
    repository.refresh()
    assert repository.find("toy") is first  # nothing has changed, so nothing is loaded
    exchange(folder, new)
    repository.refresh()
    assert repository.find("toy").version == version_of(new)
    assert repository.index() == [IndexEntry("toy", version_of(new), "READY")]


class HoldFirstStage(NoObserver):
    """Holds the engine's thread in the dispatch of a version until the test lets it go on."""

    __slots__ = ("go_on", "is_held", "version")

    def __init__(self, version: str) -> None:
        object.__setattr__(self, "version", version)
        object.__setattr__(self, "is_held", threading.Event())
        object.__setattr__(self, "go_on", threading.Event())

    def stage_ran(self, run: StageRun) -> None:
        if run.version == self.version and run.stage == "stage_0":
            self.is_held.set()
            self.go_on.wait(30)


def test_what_the_old_version_was_asked_it_answers_and_then_it_goes(folder: Path, old: Path, new: Path) -> None:
    exchange_zip(folder, old)
    hold = HoldFirstStage(version_of(old))
    with Engine(open_device("cpu", 1), EngineSettings(warm_up_s=0.05), hold) as engine:
        repository = Repository(engine, folder)
        repository.load_all()
        replaced = repository.find("toy")
        answers: list[float] = []

        def ask() -> None:
            result = engine.classify(ROW, policy={"kind": "fixed", "exit": 1}, latency_ms=60_000)
            answers.append(float(result.rows[0].answer.logits_C[1]))  # type: ignore[union-attr,index]

        asking = threading.Thread(target=ask)
        asking.start()
        assert hold.is_held.wait(30)
        exchange_zip(folder, new)
        refreshing = threading.Thread(target=repository.refresh)
        refreshing.start()
        hold.go_on.set()
        refreshing.join(30)
        asking.join(30)
        assert answers == [18.0]  # the old version's last exit: 2 x
        assert repository.find("toy").version == version_of(new)
        assert engine.classify(ROW, policy={"kind": "fixed", "exit": 1}, model="toy").rows[0].answer.logits_C[1] == 36.0  # type: ignore[union-attr,index]
        wait_until_gone(engine, replaced)


def wait_until_gone(engine: Engine, served: object) -> None:
    """Wait for the timer that unloads a model."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer) and thread.args == [served]:
            thread.join(30)
    assert served not in engine.models


def test_a_request_that_found_the_old_version_in_time_is_answered_by_it(
    engine: Engine, folder: Path, old: Path, new: Path
) -> None:
    exchange_zip(folder, old)
    repository = Repository(engine, folder, linger_s=60.0)
    repository.load_all()
    found = repository.find("toy")
    exchange_zip(folder, new)
    repository.refresh()
    assert repository.find("toy") is not found
    assert found in engine.models


def test_a_broken_new_version_is_named_and_the_old_one_goes_on(engine: Engine, folder: Path, old: Path) -> None:
    exchange_number(folder, old)
    repository = Repository(engine, folder)
    repository.load_all()
    served = repository.find("toy")
    exchange_number(folder, old)
    break_graph(folder / "toy" / "2")
    repository.refresh()
    assert repository.find("toy") is served
    ready, refused = repository.index()
    assert ready == IndexEntry("toy", version_of(old), "READY")
    assert (refused.state, refused.version) == ("UNAVAILABLE", "")
    assert "stages/00.onnx" in refused.reason


def test_a_bundle_that_is_still_being_copied_is_taken_once_it_is_whole(engine: Engine, folder: Path, old: Path) -> None:
    repository = Repository(engine, folder)
    repository.load_all()
    (folder / "toy").mkdir()
    shutil.copy(old / "manifest.json", folder / "toy")
    repository.refresh()
    with pytest.raises(NotReady, match="missing"):
        repository.find("toy")
    shutil.copytree(old / "stages", folder / "toy" / "stages")
    repository.refresh()
    assert repository.find("toy").version == version_of(old)
    assert repository.index() == [IndexEntry("toy", version_of(old), "READY")]


def test_a_calibration_put_beside_a_served_model_is_taken_up(engine: Engine, folder: Path, old: Path) -> None:
    bundle = put(old, folder / "toy")
    repository = Repository(engine, folder)
    repository.load_all()
    before = repository.find("toy")
    manifest = before.manifest
    point = OperatingPoint(
        name="c50", policy=ConfidenceSpec(threshold=0.5), compute=0.5, accuracy=0.9, exit_rates=(0.5, 0.5)
    )
    calibration = Calibration(model_digest=manifest.model_digest, temperatures=(1.0, 1.0), operating_points=(point,))
    (bundle / ".calibration").write_bytes(calibration.to_bytes())
    (bundle / ".calibration").rename(bundle / "calibration.json")
    repository.refresh()
    assert repository.find("toy").calibration.operating_points == (point,)
    wait_until_gone(engine, before)
    assert engine.classify(ROW, compute=0.6).rows[0].answer.exit_index == 0  # type: ignore[union-attr]


def test_what_has_gone_from_the_folder_is_unloaded(engine: Engine, folder: Path, old: Path) -> None:
    bundle = put(old, folder / "toy")
    repository = Repository(engine, folder)
    repository.load_all()
    served = repository.find("toy")
    shutil.rmtree(bundle)
    repository.refresh()
    assert repository.index() == []
    with pytest.raises(UnknownModel):
        repository.find("toy")
    wait_until_gone(engine, served)


def test_an_unloaded_model_stays_away_until_it_is_loaded_by_name(
    engine: Engine, folder: Path, old: Path, new: Path
) -> None:
    exchange_zip(folder, old)
    repository = Repository(engine, folder)
    repository.load_all()
    repository.unload("toy")
    exchange_zip(folder, new)
    repository.refresh()
    assert repository.index() == [IndexEntry("toy", "", "UNAVAILABLE", "unloaded")]
    with pytest.raises(UnknownModel):
        repository.find("toy")
    repository.load("toy")
    assert repository.index() == [IndexEntry("toy", version_of(new), "READY")]


def test_a_model_can_be_loaded_again_while_its_earlier_load_lingers(engine: Engine, folder: Path, old: Path) -> None:
    put(old, folder / "toy")
    repository = Repository(engine, folder, linger_s=0.05)
    repository.load_all()
    lingering = repository.find("toy")
    repository.unload("toy")
    repository.load("toy")
    wait_until_gone(engine, lingering)
    assert engine.classify(ROW).rows[0].answer.top_class_K[0] == 1  # type: ignore[union-attr]


def test_loading_by_name_says_why_a_bundle_cannot_be_served(engine: Engine, folder: Path, old: Path) -> None:
    repository = Repository(engine, folder)
    repository.load_all()
    break_graph(put(old, folder / "late"))
    with pytest.raises(BundleError, match=r"stages/00\.onnx"):
        repository.load("late")


def test_what_the_engine_holds_is_served_without_files(engine: Engine, old: Path) -> None:
    engine.add_model(open_bundle(old))
    repository = Repository(engine)
    repository.refresh()
    assert repository.find().name == "toy"


def test_watching_notices_a_new_version_while_the_loop_runs(engine: Engine, folder: Path, old: Path, new: Path) -> None:
    exchange_zip(folder, old)
    repository = Repository(engine, folder)
    repository.load_all()

    async def until_swapped() -> None:
        watching = asyncio.create_task(repository.watch(0.005))
        exchange_zip(folder, new)
        async with asyncio.timeout(60):
            while repository.find("toy").version != version_of(new):
                await asyncio.sleep(0.005)
        watching.cancel()

    asyncio.run(until_swapped())


def test_a_repository_that_cannot_be_read_for_a_moment_changes_nothing(engine: Engine, folder: Path, old: Path) -> None:
    put(old, folder / "toy")
    repository = Repository(engine, folder)
    repository.load_all()
    served = repository.find("toy")
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(BundleError):
        repository.refresh()
    assert repository.find("toy") is served


def test_requests_go_on_while_a_version_is_swapped(engine: Engine, folder: Path, old: Path, new: Path) -> None:
    exchange_zip(folder, old)
    repository = Repository(engine, folder, linger_s=30.0)
    repository.load_all()
    is_swapped = threading.Event()
    answers: list[float] = []

    def ask() -> None:
        while not is_swapped.is_set():
            result = engine.classify(ROW, policy={"kind": "fixed", "exit": 0}, model="toy")
            answers.append(float(result.rows[0].answer.logits_C[1]))  # type: ignore[union-attr,index]

    asking = threading.Thread(target=ask)
    asking.start()
    exchange_zip(folder, new)
    repository.refresh()
    answers_by_then = len(answers)
    is_swapped.set()
    asking.join(30)
    assert answers_by_then > 0
    assert set(answers) <= {9.0, 27.0}


def test_entries_whose_names_cannot_name_a_model_are_not_looked_at(folder: Path, old: Path) -> None:
    for name in ("-dash", "a b", "ünicode", "." + "x"):
        shutil.copytree(old, folder / name)
    assert scan(folder) == {}
