"""Settings from flags, environment and a YAML file, each value with the words that say where from.

``--max-num-seqs 8``, ``MOESERVE_MAX_NUM_SEQS=8`` and ``max_num_seqs: 8`` say the same; of several
the first in this order wins. A key that is no setting, a value that a setting refuses, and a
setting that the command does not take are ConfigErrors that name the source; but variables may be
of another command, for one environment serves all.

pydantic-settings (tried: 2.16) does not replace this. It ignores a ``MOESERVE_...`` variable that
is no setting and a YAML file that is not there, takes the last of a YAML key given twice, a YAML
boolean for a number and no ``none`` in YAML; and its errors name neither flag, variable nor file,
and show a secret that they refuse.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from moeserve.config.cluster import EverySetting
from moeserve.config.commands import COMMANDS, GROUPS
from moeserve.config.group import Options
from moeserve.config.options import ServeConfig
from moeserve.config.variables import is_no_setting
from moeserve.errors import ConfigError

ENV_PREFIX = "MOESERVE_"
SECRETS = frozenset(
    name
    for name, field in EverySetting.model_fields.items()
    if SecretStr in get_args(field.annotation)
)
Chosen = TypeVar("Chosen", bound=Options)


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and the words that name where it came from; ``shared`` with other commands."""

    value: object
    source: str
    shared: bool = False


def shown(name: str, setting: Setting) -> str:
    """``--threads='0'``; of a secret only where it came from."""
    return f"{setting.source}={'...' if name in SECRETS else repr(setting.value)}"


def add_options(parser: argparse.ArgumentParser, kind: type[Options] = ServeConfig) -> None:
    """Adds a flag for each setting of ``kind``, by group, ``--config`` and ``--print-config``."""
    for options in GROUPS:
        if issubclass(kind, options):
            title = (options.__doc__ or "").splitlines()[0].removesuffix(".")
            group = parser.add_argument_group(f"settings: {title[0].lower()}{title[1:]}")
            for name in options.model_fields:
                _add_option(group, name, kind.model_fields[name])
    sources = parser.add_argument_group("settings may also come as MOESERVE_<NAME>, or from a file")
    sources.add_argument("--config", metavar="FILE", type=Path, help="YAML file of settings")
    sources.add_argument(
        "--print-config", action="store_true", help="print the settings as YAML, and end"
    )


def _add_option(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    text = f"{field.description}" + ("" if field.default is None else f" [{field.default}]")
    flag = flag_of(name)
    if _allows(field, bool):
        group.add_argument(
            flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text
        )
        return
    words = choices(field.annotation)
    metavar = "{" + ",".join(words) + "}" if words else name.rsplit("_", 1)[-1].upper()
    group.add_argument(flag, dest=name, default=None, metavar=metavar, help=text.replace("%", "%%"))


def read_settings(
    flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None = None
) -> dict[str, Setting]:
    """What was given: flags over environment over file. A flag that is None was not."""
    settings = _from_file(file) if file is not None else {}
    settings |= _from_environ(environ)
    return settings | {
        name: Setting(value, flag_of(name))
        for name, value in flags.items()
        if value is not None and name in EverySetting.model_fields
    }


def options_of(settings: Mapping[str, Setting], kind: type[Chosen]) -> Chosen:
    """The settings over the defaults of ``kind``, which must take all that are not shared."""
    taken = {name: s for name, s in settings.items() if name in kind.model_fields}
    foreign = sorted(n for n, s in settings.items() if n not in taken and not s.shared)
    if foreign:
        takers = (name for name, options in COMMANDS.items() if options is kind)
        command = next(takers, kind.__name__)
        raise ConfigError(
            "; ".join(
                f"{shown(name, settings[name])}: has no effect in {command}, leave it out"
                for name in foreign
            )
        )
    try:
        return kind.model_validate({name: _value(name, s) for name, s in taken.items()})
    except ValidationError as refused:
        raise ConfigError(_explain(refused, taken)) from refused


def load_config(
    flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None = None
) -> ServeConfig:
    """Flags over environment over file over defaults. A flag that is None was not given."""
    return options_of(read_settings(flags, environ, file), ServeConfig)


def settings_from_args(args: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Setting]:
    """What a parser made by ``add_options`` read, completed from environment and file."""
    return read_settings(vars(args), environ, args.config)


def also_said(args: argparse.Namespace, name: str, other: str, spelling: str) -> None:
    """What a command line gives in another place is the setting; in both it is a ConfigError."""
    given = getattr(args, other)
    if given is None:
        return
    if getattr(args, name) is not None:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag}={getattr(args, name)!r} and {spelling} {given!r}: give one")
    setattr(args, name, given)


def to_yaml(options: Options) -> str:
    """Loads back to the same options; secrets that are set stand there in clear."""
    held = [name for name in sorted(SECRETS) if getattr(options, name, None) is not None]
    lines = f"# holds {' and '.join(held)}: keep private\n" if held else ""
    return lines + yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False)


def to_environ(
    options: Options, environ: Mapping[str, str], kind: type[Options] | None = None
) -> dict[str, str]:
    """``environ`` for another process that is to have these options, whatever was set in there;
    of them only the settings of ``kind``, where that is given."""
    others = {
        key: value
        for key, value in environ.items()
        if not key.startswith(ENV_PREFIX) or is_no_setting(key)
    }
    wanted = (kind or type(options)).model_fields
    return others | {
        ENV_PREFIX + name.upper(): "none" if value is None else str(value)
        for name, value in options.model_dump(mode="json").items()
        if name in wanted
    }


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _from_environ(environ: Mapping[str, str]) -> dict[str, Setting]:
    found = {}
    for key, value in environ.items():
        if not key.startswith(ENV_PREFIX) or is_no_setting(key):
            continue
        name = key.removeprefix(ENV_PREFIX).lower()
        _require_known(name, key, ENV_PREFIX, str.upper)
        found[name] = Setting(value, key, shared=True)
    return found


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's."""


def _mapping_once(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{node.start_mark.name}: {key} is given twice; keep one")
    return loader.construct_mapping(node)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_once)


def _from_file(file: Path) -> dict[str, Setting]:
    try:
        with file.open(encoding="utf-8") as text:
            read = yaml.load(text, _StrictLoader)
    except OSError as error:
        raise ConfigError(f"--config {file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: is not YAML: {error}") from error
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise ConfigError(
            f"--config {file}: expected 'name: value' lines, not {type(read).__name__}"
        )
    found = {}
    for key, value in read.items():
        name = str(key).replace("-", "_")
        _require_known(name, f"{file}: {key}", f"{file}: ", str)
        if name in found:
            raise ConfigError(f"{file}: {name} is given twice; keep one")
        found[name] = Setting(value, f"{file}: {key}")
    return found


def _require_known(name: str, shown: str, prefix: str, spell: Any) -> None:
    if name in EverySetting.model_fields:
        return
    close = difflib.get_close_matches(name, EverySetting.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{spell(close[0])}?" if close else "see --help for the settings"
    raise ConfigError(f"{shown}: unknown setting; {hint}")


def _value(name: str, setting: Setting) -> object:
    """Text may say ``none``; a YAML boolean is no number."""
    field = EverySetting.model_fields[name]
    value = setting.value
    if isinstance(value, str) and value.lower() in ("none", "null") and _allows(field, NoneType):
        return None
    if isinstance(value, bool) and not _allows(field, bool):
        raise ConfigError(f"{setting.source}={value}: expected {field.description}, not a boolean")
    return value


def _allows(field: FieldInfo, kind: type) -> bool:
    return field.annotation is kind or kind in get_args(field.annotation)


def choices(annotation: Any) -> list[str]:
    """The words a field takes; N where it takes a number instead."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    words = [word for kind in get_args(annotation) for word in choices(kind)]
    return [*words, "N"] if words else []


def _explain(refused: ValidationError, settings: Mapping[str, Setting]) -> str:
    lines = []
    for error in refused.errors(include_url=False, include_context=False):
        reason = error["msg"].removeprefix("Value error, ")
        name = str(error["loc"][0]) if error["loc"] else ""
        if name not in settings:
            lines.append(reason)
            continue
        lines.append(f"{shown(name, settings[name])}: {reason}")
    return "; ".join(dict.fromkeys(lines))
