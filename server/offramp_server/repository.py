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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from offramp_contract.errors import BundleError, InvalidValue, NotReady, OfframpError, UnknownModel
from offramp_runtime import Bundle, open_bundle

from offramp_server.catalogue import Catalogue, Entry, IndexEntry
from offramp_server.choice import Choice, DefaultsOf, Fields, choose, no_defaults
from offramp_server.engine import Engine
from offramp_server.preprocess import prepare
from offramp_server.repository_files import Fingerprint, Source, fingerprint_of, scan
from offramp_server.served import ServedModel

logger = logging.getLogger("offramp.server")


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
        on_change: Called, on whichever thread, when the catalogue has changed.
        catalogue: Which models answer to which names.
    """

    engine: Engine
    path: Path | None = None
    default_model: str | None = None
    linger_s: float = 0.0
    defaults_of: DefaultsOf = no_defaults
    on_change: Callable[[], None] = lambda: None
    catalogue: Catalogue[ServedModel] = field(init=False)
    _seen: dict[str, Fingerprint] = field(default_factory=dict, init=False)
    _loading: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        entries = {served.name: Entry(served) for served in self.engine.models}
        self.catalogue = Catalogue(entries=entries)

    def find(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """Give the model that answers to a name; see `Catalogue.find`."""
        return self.catalogue.find(self.default_model if name is None else name, version)

    def served(self) -> tuple[ServedModel, ...]:
        """Give every model that is served, by name."""
        return self.catalogue.served()

    def index(self) -> list[IndexEntry]:
        """List every model of the repository, served or not, with the reason where it is not."""
        return self.catalogue.index()

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
            entry = self.catalogue.entries.get(name)
            if entry is None or entry.served is None:
                raise UnknownModel(f"model: no model {name[:128]!r} is served here", "model")
            entry.is_held_back, entry.reason = True, "unloaded"
            served, entry.served = entry.served, None
        self.on_change()
        self._retire(served)

    def refresh(self) -> None:
        """Look through the files once: load what is new or has changed, unload what has gone; blocks while loading."""
        sources = self._sources()
        for name, source in sources.items():
            entry = self.catalogue.entries.get(name)
            if entry is not None and (entry.is_held_back or self._seen.get(name) == fingerprint_of(source.path)):
                continue
            try:
                self._load(source)
            except OfframpError:  # logged, and named by the index
                continue
        for name in set(self.catalogue.entries) - set(sources):
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

    def _sources(self) -> dict[str, Source]:
        return {} if self.path is None else scan(self.path)

    def _load(self, source: Source) -> ServedModel:
        with self._loading:
            entry = self.catalogue.entries.setdefault(source.name, Entry())
            entry.is_loading, entry.is_held_back, entry.reason = True, False, ""
            self._seen[source.name] = fingerprint_of(source.path)
            self.on_change()
            try:
                served, replaced = self._opened(source, entry.served), entry.served
            except OfframpError as error:
                entry.reason = error.message
                logger.warning("model %s cannot be served from %s: %s", source.name, source.path, error.message)
                raise
            else:
                entry.served = served
            finally:
                entry.is_loading = False
                self.on_change()
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
            default = _default_of(bundle, self.defaults_of(source.name))
            served = self.engine.add_model(bundle, source.name, default)
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
            entry = self.catalogue.entries[name]
            if name not in self._seen:  # the engine's own, which never had files here
                return
            del self.catalogue.entries[name], self._seen[name]
        self.on_change()
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
            self.on_change()
        except NotReady:
            logger.debug("the engine closed before model %s was unloaded", served.name)


def _default_of(bundle: Bundle, defaults: Fields) -> Choice:
    try:
        return choose({}, bundle.manifest, bundle.calibration, defaults)
    except InvalidValue as error:
        raise BundleError(f"its calibration cannot give the default operating point: {error.message}") from None


def _is_same(bundle: Bundle, other: Bundle) -> bool:
    return (
        bundle.manifest.model_digest == other.manifest.model_digest
        and bundle.calibration.calibration_digest == other.calibration.calibration_digest
    )
