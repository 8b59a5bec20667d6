"""Which models and versions are served: a bundle, or a folder of bundles that may change while the server runs.

A folder is laid out so that a new version can be put there in one atomic step:

    repository/
        digits.zip          a bundle, replaced by renaming another file onto it
        scenes/             a bundle folder, replaced by exchanging a symbolic link
        texts/1/            numbered versions of a model, of which the highest is served;
        texts/2/            a new one is added by renaming a finished folder (or .zip) into place

A model is served under the name of its entry in the folder; a bundle that stands alone under its manifest's. The new
version of a model is loaded and warmed up beside the old one and then takes its place; the old one ends what it was
asked. A bundle that cannot be served is named with the reason, and whatever served before goes on.
"""

import asyncio
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from offramp_contract.errors import BundleError, InvalidValue, NotReady, OfframpError, UnknownModel
from offramp_runtime import Bundle, open_bundle

from offramp_server.choice import DefaultsOf, Fields, choose, no_defaults
from offramp_server.engine import Engine
from offramp_server.preprocess import prepare
from offramp_server.repository_files import Fingerprint, Source, fingerprint_of, scan
from offramp_server.served import ServedModel

logger = logging.getLogger("offramp.server")

State = Literal["READY", "LOADING", "UNAVAILABLE"]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the index.

    Attributes:
        version: The model's version; empty where nothing could be loaded.
        reason: Why it is not served; empty where it is.
    """

    name: str
    version: str
    state: State
    reason: str = ""


@dataclass(slots=True)
class _Entry:
    """One model of the repository.

    Attributes:
        served: What answers under its name.
        seen: The files as they were when it was last tried to load them.
        reason: Why these files are not what is served.
        is_loading: Whether they are being loaded now.
        is_held_back: Whether it was unloaded by hand, so that only loading by hand brings it back.
    """

    served: ServedModel | None = None
    seen: Fingerprint | None = None
    reason: str = ""
    is_loading: bool = False
    is_held_back: bool = False


@dataclass(slots=True)
class Repository:
    """Finds the model that a request names, and keeps what is served in step with the files.

    Finding never blocks. Loading does, and is done by one thread at a time.

    Attributes:
        engine: Runs the models. Those that it holds already are served too.
        path: A bundle, or a folder of bundles; None serves what the engine holds.
        default_model: Name of the model that answers requests which name none; None takes the only one.
        linger_s: How long a replaced or unloaded model stays in the engine for requests that found it before and have
            not been admitted yet: as long as a body may take to arrive.
        defaults_of: The operator's default operating points; a model that cannot give its own is not served.
    """

    engine: Engine
    path: Path | None = None
    default_model: str | None = None
    linger_s: float = 0.0
    defaults_of: DefaultsOf = no_defaults
    _entries: dict[str, _Entry] = field(default_factory=dict, init=False)
    _loading: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        for served in self.engine.models:
            self._entries[served.name] = _Entry(served)

    def find(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """Give the model that answers to a name.

        Args:
            name: None asks for the default or only model.
            version: None takes the one that is served.

        Raises:
            UnknownModel: If there is no such model or version.
            InvalidValue: If no name is given and several models are served.
            NotReady: If the model is there but cannot be served (yet).
        """
        if name is None:
            name = self._default_name()
        entry = self._entries.get(name)
        if entry is None or entry.is_held_back:
            raise UnknownModel(f"model: no model {name[:128]!r} is served here", "model")
        served = entry.served
        if served is None:
            raise NotReady(f"model {name!r} is " + ("loading" if entry.is_loading else f"unavailable: {entry.reason}"))
        if version is not None and version != served.version:
            raise UnknownModel(
                f"version: model {name!r} is served in version {served.version}, not {version[:64]!r}", "version"
            )
        return served

    def served(self) -> tuple[ServedModel, ...]:
        """Give every model that is served, by name."""
        entries = sorted(self._entries.items())
        return tuple(entry.served for _, entry in entries if entry.served is not None)

    def index(self) -> list[IndexEntry]:
        """List every model of the repository, served or not, with the reason where it is not."""
        lines = []
        for name, entry in sorted(self._entries.items()):
            if entry.served is not None:
                lines.append(IndexEntry(name, entry.served.version, "READY"))
            if entry.is_loading:
                lines.append(IndexEntry(name, "", "LOADING"))
            elif entry.reason:
                lines.append(IndexEntry(name, "", "UNAVAILABLE", entry.reason))
        return lines

    def load_all(self) -> None:
        """Load every bundle; blocks until all are warmed up.

        Raises:
            BundleError: If the path is a bundle that cannot be served, or neither a bundle nor a folder. A broken
                bundle in a folder does not raise: the index names it, and the others are served.
        """
        if self.path is None:
            return
        sources = scan(self.path)
        for source in sources.values():
            try:
                self._load(source)
            except BundleError:
                if source.path == self.path:
                    raise
        if not sources:
            logger.warning("repository %s holds no bundle yet", self.path)

    def load(self, name: str) -> ServedModel:
        """Load a model from the repository, whether or not its files have changed; blocks until it is warmed up.

        Raises:
            UnknownModel: If the repository holds no such model.
            BundleError: If its bundle cannot be served; what was served before still is.
            NotReady: If the engine is closed.
        """
        source = self._sources().get(name)
        if source is None:
            raise UnknownModel(f"model: the repository holds no model {name[:128]!r}", "model")
        return self._load(source)

    def unload(self, name: str) -> None:
        """Stop serving a model until it is loaded by name again; what it was asked before is still answered.

        Raises:
            UnknownModel: If no such model is served.
        """
        with self._loading:
            entry = self._entries.get(name)
            if entry is None or entry.served is None:
                raise UnknownModel(f"model: no model {name[:128]!r} is served here", "model")
            entry.is_held_back, entry.reason = True, "unloaded"
            served, entry.served = entry.served, None
        self._retire(served)

    def refresh(self) -> None:
        """Look through the files once: load what is new or has changed, unload what has gone; blocks while loading."""
        sources = self._sources()
        for name, source in sources.items():
            entry = self._entries.get(name)
            if entry is not None and (entry.is_held_back or entry.seen == fingerprint_of(source.path)):
                continue
            try:
                self._load(source)
            except OfframpError:  # logged, and named by the index
                continue
        for name in set(self._entries) - set(sources):
            self._forget(name)

    async def watch(self, interval_s: float) -> None:
        """Refresh for ever, at an interval; returns at once if that is 0 or there are no files to watch."""
        while interval_s > 0 and self.path is not None:
            await asyncio.sleep(interval_s)
            try:
                await asyncio.to_thread(self.refresh)
            except BundleError as error:
                logger.warning("the repository cannot be read, so nothing changes: %s", error.message)
            except Exception:  # watching must outlive whatever a file system does
                logger.exception("looking through the repository failed")

    def _default_name(self) -> str:
        if self.default_model is not None:
            return self.default_model
        names = [served.name for served in self.served()] or list(self._entries)
        if len(names) > 1:
            raise InvalidValue(f"model: several are served, so name one of {', '.join(names)}", "model")
        if not names:
            raise NotReady("no model is served yet")
        return names[0]

    def _sources(self) -> dict[str, Source]:
        return {} if self.path is None else scan(self.path)

    def _load(self, source: Source) -> ServedModel:
        with self._loading:
            entry = self._entries.setdefault(source.name, _Entry())
            entry.is_loading, entry.is_held_back, entry.reason = True, False, ""
            entry.seen = fingerprint_of(source.path)
            try:
                served, replaced = self._opened(source, entry.served), entry.served
            except OfframpError as error:
                entry.reason = error.message
                logger.warning("model %s cannot be served from %s: %s", source.name, source.path, error.message)
                raise
            finally:
                entry.is_loading = False
            entry.served = served
        if replaced is not None and replaced is not served:
            self._retire(replaced)
        return served

    def _opened(self, source: Source, current: ServedModel | None) -> ServedModel:
        """Load a bundle into the engine, unless it is the one that is served already."""
        try:
            bundle = open_bundle(source.path)
            if current is not None and _is_same(bundle, current.bundle):
                return current
            prepare(bundle)
            _check_default(bundle, self.defaults_of(source.name))
            served = self.engine.add_model(bundle, source.name)
        except OfframpError:
            raise
        except (
            Exception
        ) as error:  # files vanish while they are read, and a network may fail in any way on its first input
            logger.exception("loading model %s failed", source.name)
            raise BundleError(f"its bundle cannot be loaded ({type(error).__name__})") from error
        logger.info("model %s is served in version %s", served.name, served.version)
        return served

    def _forget(self, name: str) -> None:
        with self._loading:
            entry = self._entries[name]
            if entry.seen is None:  # the engine's own, which never had files here
                return
            del self._entries[name]
        logger.info("model %s has gone from the repository", name)
        if entry.served is not None:
            self._retire(entry.served)

    def _retire(self, served: ServedModel) -> None:
        """Unload a model once nobody can be about to ask it."""
        timer = threading.Timer(self.linger_s, self._remove, [served])
        timer.daemon = True
        timer.start()

    def _remove(self, served: ServedModel) -> None:
        try:
            self.engine.remove_model(served)
        except NotReady:
            logger.debug("the engine closed before model %s was unloaded", served.name)


def _check_default(bundle: Bundle, defaults: Fields) -> None:
    try:
        choose({}, bundle.manifest, bundle.calibration, defaults)
    except InvalidValue as error:
        raise BundleError(f"its calibration cannot give the default operating point: {error.message}") from None


def _is_same(bundle: Bundle, other: Bundle) -> bool:
    return (
        bundle.manifest.model_digest == other.manifest.model_digest
        and bundle.calibration.calibration_digest == other.calibration.calibration_digest
    )
