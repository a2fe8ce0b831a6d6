"""Variants from outside the package: Python files that the user names, and installed packages.

A plugin registers its classes by defining them, as every module here does. It runs with the user's rights, so only
plugins named on the command line or installed are loaded, never code from a run folder.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.records import checked_value, whole_record
from minitransformer.settings import settings_of

FLAG = "--plugin"
GROUP = "minitransformer.plugins"
"""entry-point group by which an installed package offers modules with variants"""


@dataclass(frozen=True)
class Plugin:
    """A plugin file, as a run records it: its name and the SHA-256 of its content."""

    name: str
    sha256: str


_loaded: dict[str, tuple[Plugin, Path]] = {}
"""plugins loaded in this process, by module name"""


def load_plugin(path: Path) -> Plugin:
    """Import the Python file at `path`, whose classes register themselves; a second import does nothing.

    Raises `UserError` for a file that cannot be read or run, and for a variant whose name is taken.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"the plugin {path} cannot be read ({error.strerror}): name a Python file") from None
    name = f"minitransformer_plugin_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    plugin = Plugin(path.name, hashlib.sha256(content).hexdigest())
    if name in _loaded:
        if _loaded[name][0] != plugin:
            raise UserError(f"two plugins are called {path.stem}: rename the file {path}")
        return plugin
    specification = spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise UserError(f"the plugin {path} is not a Python file: its name must end in .py")
    module = module_from_spec(specification)
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the plugin {path} cannot be loaded ({what}{line}): fix it") from None
    _loaded[name] = (plugin, path.resolve())
    return plugin


def load_installed_plugins() -> None:
    """Import the modules that installed packages offer; raises `UserError` for one that cannot be imported."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"the installed plugin {entry.name} cannot be loaded ({what}): fix it, or remove it"
            ) from None


def take_plugins(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files of `--plugin` flags in `arguments`, and the other arguments."""
    paths, rest = [], []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != FLAG:
            rest.append(word)
        elif file := value if equals else next(words, ""):
            paths.append(Path(file))
        else:
            raise UserError(f"{FLAG} names no file: give it a Python file")
    return paths, rest


def loaded_files() -> tuple[str, ...]:
    """The plugin files of this process, to be loaded in a child process."""
    return tuple(str(path) for _, path in _loaded.values())


def plugins_of(config: Any) -> list[Plugin]:
    """The plugins that define variants chosen in `config`."""
    return _defining(value.variant for each, value in settings_of(config) if each.family)


def plugins_behind(*classes: type) -> list[str]:
    """The SHA-256 of each plugin that defines one of `classes`, for what they compute to be cached under."""
    return [plugin.sha256 for plugin in _defining(classes)]


def _defining(classes: Iterable[type]) -> list[Plugin]:
    modules = {each.__module__ for each in classes}
    return [plugin for name, (plugin, _) in _loaded.items() if name in modules]


def check_plugins(recorded: Any, origin: str) -> None:
    """Raises `UserError` unless the plugins recorded in the file `origin` are loaded in the same version.

    Raises `StorageError` for a damaged record.
    """
    loaded = {plugin.name: plugin for plugin, _ in _loaded.values()}
    for record in checked_value(recorded or [], list, "plugins", origin):
        plugin = whole_record(Plugin, record, "a plugin", origin)
        if plugin.name not in loaded:
            raise UserError(f"{origin} needs the plugin {plugin.name}: give it with {FLAG} {plugin.name}")
        if loaded[plugin.name] != plugin:
            which = f"{plugin.name} (SHA-256 {plugin.sha256[:12]}…)"
            raise UserError(f"{origin} needs another version of the plugin {which}: give that version")
