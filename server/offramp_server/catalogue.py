"""Which models answer to which names. Finding never blocks, and a name that finds nothing is told why.

Whoever keeps the catalogue says what a model is; it needs a name and a version. The repository keeps it in step with
files, an HTTP worker with the repository's.
"""

from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from offramp_contract.errors import InvalidValue, NotReady, UnknownModel

State = Literal["READY", "LOADING", "UNAVAILABLE"]


class Named(Protocol):
    """A model, as far as finding it goes."""

    @property
    def name(self) -> str:
        """The name clients use."""

    @property
    def version(self) -> str:
        """The version that is served."""


M = TypeVar("M", bound=Named)


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


@dataclass
class Entry(Generic[M]):
    """One name.

    Attributes:
        served: What answers to it.
        reason: Why something else, or nothing, does.
        is_loading: Whether a model is being loaded for it now.
        is_held_back: Whether it was unloaded by hand, so that only loading by hand brings it back.
    """

    served: M | None = None
    reason: str = ""
    is_loading: bool = False
    is_held_back: bool = False


@dataclass
class Catalogue(Generic[M]):
    """The names.

    Attributes:
        default_model: Name of the model that answers requests which name none; None takes the only one.
        entries: By name.
    """

    default_model: str | None = None
    entries: dict[str, Entry[M]] = field(default_factory=dict)

    def find(self, name: str | None = None, version: str | None = None) -> M:
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
        entry = self.entries.get(name)
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

    def served(self) -> tuple[M, ...]:
        """Give every model that is served, by name."""
        entries = sorted(self.entries.items())
        return tuple(entry.served for _, entry in entries if entry.served is not None)

    def index(self) -> list[IndexEntry]:
        """List every name, served or not, with the reason where it is not."""
        lines = []
        for name, entry in sorted(self.entries.items()):
            if entry.served is not None:
                lines.append(IndexEntry(name, entry.served.version, "READY"))
            if entry.is_loading:
                lines.append(IndexEntry(name, "", "LOADING"))
            elif entry.reason:
                lines.append(IndexEntry(name, "", "UNAVAILABLE", entry.reason))
        return lines

    def _default_name(self) -> str:
        if self.default_model is not None:
            return self.default_model
        names = [served.name for served in self.served()] or list(self.entries)
        if len(names) > 1:
            raise InvalidValue(f"model: several are served, so name one of {', '.join(names)}", "model")
        if not names:
            raise NotReady("no model is served yet")
        return names[0]
