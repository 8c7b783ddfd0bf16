"""Read settings into dataclasses: types, bounds, renamed keys, layers of YAML and arguments.

The ground floor of :mod:`stabmon.config`: it imports nothing of stabmon, so that rules,
interventions, guard and check declare their settings with it.
"""

from stabmon._settings.by_name import ByName, FieldsOf
from stabmon._settings.layers import Layer, SettingsError
from stabmon._settings.limits import (
    Bounds,
    Count,
    Factor,
    Fraction,
    Known,
    NonEmpty,
    NonNegative,
    Positive,
)
from stabmon._settings.reader import (
    NOT_A_SETTING,
    check,
    read,
    setting_names,
    settings_of,
)
from stabmon._settings.renamed import renamed, renamed_settings
from stabmon._settings.sources import read_settings, word_layers, yaml_layers

__all__ = [
    "NOT_A_SETTING",
    "Bounds",
    "ByName",
    "Count",
    "Factor",
    "FieldsOf",
    "Fraction",
    "Known",
    "Layer",
    "NonEmpty",
    "NonNegative",
    "Positive",
    "SettingsError",
    "check",
    "read",
    "read_settings",
    "renamed",
    "renamed_settings",
    "setting_names",
    "settings_of",
    "word_layers",
    "yaml_layers",
]
