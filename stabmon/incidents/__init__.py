"""Say once what goes wrong: the issues of a step with one cause, grouped and in words.

Console, dashboards, webhook, ``stabmon watch`` and the report page all show these.
"""

from stabmon.incidents.incident import Incident
from stabmon.incidents.intervention_words import intervention_text, is_armed, is_change
from stabmon.incidents.log import IncidentLog, incidents_of

__all__ = [
    "Incident",
    "IncidentLog",
    "incidents_of",
    "intervention_text",
    "is_armed",
    "is_change",
]
