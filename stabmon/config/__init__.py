"""Declare and read settings: presets, YAML files and keyword arguments."""

from stabmon._settings import SettingsError, read_settings
from stabmon.config.load import load_config, presets, proposed_interventions
from stabmon.config.schema import StabilityConfig

__all__ = [
    "SettingsError",
    "StabilityConfig",
    "load_config",
    "presets",
    "proposed_interventions",
    "read_settings",
]
