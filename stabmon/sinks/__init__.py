"""Sinks: where records go. One destination, one file.

``SINKS`` finds them by name; :class:`~stabmon.sinks.base.SinkGroup` writes to several and isolates
failures.
"""

from stabmon.sinks.base import SINKS, Sink, SinkGroup, sink

__all__ = ["SINKS", "Sink", "SinkGroup", "sink"]
