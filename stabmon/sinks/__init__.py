"""Sinks: the destinations of records, one file each.

``SINKS`` finds them by name; :class:`~stabmon.sinks.base.SinkGroup` writes to several and isolates
failures.
"""

from stabmon.sinks.base import SINKS, Sink, SinkGroup, sink

__all__ = ["SINKS", "Sink", "SinkGroup", "sink"]
