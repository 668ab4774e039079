"""From a YAML file and its overrides to a checked Config."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsv3_mtp.config import code, reader
from dsv3_mtp.config.mtp import MTPConfig, option_problems, unused_keys
from dsv3_mtp.config.reader import UNKNOWN, ConfigError, Problem, problems_of, show
from dsv3_mtp.config.run import Config, rules_between
from dsv3_mtp.config.section import Section
from dsv3_mtp.config.tree import ConfigDocument, read_document

_LOG = logging.getLogger("dsv3_mtp")  # without a handler Python prints its warnings to stderr


WHOLE = ("mtp.objective",)  # {kl: 1} over a base's {ce: 1} is kl alone


def load_config(
    path: str | Path, sets: Iterable[str] = (), *, trust_code: bool | Collection[str] = True
) -> Config:
    """Reads and checks a run's YAML. sets: overrides such as "mtp.mode=none", values in YAML,
    applied first.

    trust_code: import what the file names as package.module:Class; or which of these names. True
        only for a file that the user has named as a config, not for one found in a run folder.

    Raises ConfigError, whose text is a report of every problem in the file and in the overrides.
    """
    document = read_document(path, sets, whole=WHOLE)
    if trust_code is not True:
        code.refuse(str(path), document.tree, trust_code or ())
    return _checked(document, str(path))


def replaced(config: Config, key: str, value: Any) -> Config:
    """`Config.replace`."""
    document = ConfigDocument(["the config"], config.to_dict(), files=1, whole=frozenset(WHOLE))
    document.put(key, value)
    return _checked(document, "the config")


def _checked(document: ConfigDocument, source: str) -> Config:
    """The config of a document. Raises ConfigError: `source` has problems, which are all listed."""
    _drop_unused(document)
    tree, problems = document.tree, document.problems
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found = problems_of(error, tree, Config)
        more = [*rules_between(_parsed(tree)), *_option_problems(tree.get("mtp"))]
        found += [problem for problem in more if problem not in found]
        problems += map(document.traced, found)
    if problems:
        raise ConfigError(source, problems)
    return config


def _option_problems(section: Any) -> Iterator[Problem]:
    """What is wrong with the options of the heads in a faulty `mtp` section."""
    given = section if isinstance(section, Mapping) else {}
    extra = {key: value for key, value in given.items() if key not in MTPConfig.model_fields}
    with suppress(ValueError, TypeError):  # of an unknown mode, which is reported
        for key, text in option_problems(given.get("mode", MTPConfig().mode), extra):
            if text == UNKNOWN:
                text += reader.did_you_mean(f"mtp.{key}", reader.key_paths(Config))
            yield f"mtp.{key}", text


def _drop_unused(document: ConfigDocument) -> None:
    """Takes out what is said of heads that this run has not, and says so: keys of another kind at
    their defaults, and those that a base has set.

    Such a key of another value beside the mode, or by --set, is an error: `option_problems`.
    """
    mtp = document.tree.get("mtp")
    if not isinstance(mtp, dict):
        return
    mode = mtp.get("mode", MTPConfig.model_fields["mode"].default)
    try:
        unused = unused_keys(mode)
    except (ValueError, TypeError):  # of an unknown mode, which is reported
        return
    keys, default_keys = [], []
    for key, default in unused.items():
        if key not in mtp:
            continue
        if document.inherited(f"mtp.{key}", beside="mtp.mode") and mtp[key] != default:
            what = (key, show(mtp[key]), document.origin(f"mtp.{key}"), mode)
            _LOG.warning("mtp.%s: %s of %s has no effect with mode %s: left out", *what)
            keys.append(key)
        elif mtp[key] == default and key not in MTPConfig.model_fields:
            default_keys.append(f"mtp.{key}")
    if default_keys:
        _LOG.info("%s: left out, mode %s has no such key", ", ".join(default_keys), mode)
    document.tree["mtp"] = {key: value for key, value in mtp.items() if key not in keys}


def _parsed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a faulty tree that are valid on their own."""
    sections = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            with suppress(ValidationError):
                sections[name] = field.annotation.model_validate(tree.get(name))
    return sections
