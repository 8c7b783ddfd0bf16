"""Read settings: presets, YAML files and keyword arguments."""

from stabmon.config.schema import StabilityConfig, load_config, presets

__all__ = ["StabilityConfig", "load_config", "presets"]
