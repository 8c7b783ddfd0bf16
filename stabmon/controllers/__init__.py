"""Learned and linear attention in unmodified models.

Each controller is one file, with its formulas and nothing else.

>>> from stabmon.controllers import CONTROLLERS
>>> list(CONTROLLERS)
['info_density', 'linear_ramp', 'linearization']
"""

from stabmon.controllers.attach import Controllers, attach_controllers, detach_controllers
from stabmon.controllers.base import CONTROLLERS, Controller, Site, controller
from stabmon.controllers.serialization import load_controllers, save_controllers
from stabmon.controllers.watch import ControllerWatch

__all__ = [
    "CONTROLLERS",
    "Controller",
    "ControllerWatch",
    "Controllers",
    "Site",
    "attach_controllers",
    "controller",
    "detach_controllers",
    "load_controllers",
    "save_controllers",
]
