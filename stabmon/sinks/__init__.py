"""Sinks: the destinations of records, one file each.

``SINKS`` finds them by name; :class:`~stabmon.sinks.group.SinkGroup` writes to several and isolates
failures.
"""

from stabmon.sinks.base import SINKS, Sink, sink
from stabmon.sinks.group import SinkGroup

__all__ = ["SINKS", "Sink", "SinkGroup", "sink"]
