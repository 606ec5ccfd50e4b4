"""Settings of earlier versions that were removed, and the sentence that each of them gets.

What they did lost against what stayed; `docs/log.md` has the measurements. Older files and run
directories name these settings too, mostly with the value that still describes what training does:
that value is accepted and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.errors import require


@dataclass(frozen=True)
class RemovedSetting:
    """A key of the table `switch` that is gone.

    Attributes:
        only: the value that describes what training does today.
        gone: the value that was removed.
        name: what that value stood for.
    """

    only: str
    gone: str
    name: str


SWITCH: Final = {
    "clustering": RemovedSetting("weights", "coactivation", "clustering by co-activation"),
    "router": RemovedSetting("centroid", "learned", "a router that learns while the model trains"),
}


def removed_sentence(key: str) -> str:
    """What a user reads who asks for the value of `switch.KEY` that is gone."""
    setting = SWITCH[key]
    return (
        f'switch.{key} = "{setting.gone}" ({setting.name}) was removed, because it made models no '
        f'better (docs/log.md); leave switch.{key} out to train with "{setting.only}"'
    )


def without_removed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The nested `values` of a configuration without the settings that were removed.

    Raises:
        ConfigError: if one of them has another value than the one that stayed.
    """
    switch = values.get("switch")
    if not isinstance(switch, dict):
        return dict(values)
    for key, setting in SWITCH.items():
        found = switch.get(key, setting.only)
        require(found != setting.gone, f"{where}: {removed_sentence(key)}")
        require(
            found == setting.only,
            f'{where}: switch.{key} can only be "{setting.only}"; leave it out',
        )
    return {**values, "switch": {k: v for k, v in switch.items() if k not in SWITCH}}


def used_by(config: Mapping[str, Any]) -> str | None:
    """The sentence for a run whose RUN/config.json is `config`, if it used what was removed."""
    switch = config.get("switch")
    for key, setting in SWITCH.items():
        if isinstance(switch, dict) and switch.get(key) == setting.gone:
            return removed_sentence(key)
    return None


def for_digest() -> dict[str, str]:
    """The removed settings as every run that can still resume had them."""
    return {key: setting.only for key, setting in SWITCH.items()}
