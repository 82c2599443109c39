"""One paper, one file; one line here. Methods of other packages are named by their dotted path."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import Any

from stepdistill.methods.add import ADD
from stepdistill.methods.base import Method
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.ctm import CTM
from stepdistill.methods.decoupled_dmd import DecoupledDMD
from stepdistill.methods.dmd import DMD
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.dp_dmd import DPDMD
from stepdistill.methods.ect import ECT
from stepdistill.methods.f_distill import FDistill
from stepdistill.methods.guided import Guided
from stepdistill.methods.imagine_flash import ImagineFlash
from stepdistill.methods.ladd import LADD
from stepdistill.methods.lcm import LCM
from stepdistill.methods.pcm import PCM
from stepdistill.methods.pgsb import PGSB
from stepdistill.methods.phased_dmd import PhasedDMD
from stepdistill.methods.polish import Polish
from stepdistill.methods.progressive import Progressive
from stepdistill.methods.rcm import RCM
from stepdistill.methods.scm import SCM
from stepdistill.methods.sid import SiD
from stepdistill.methods.swiftbrush import SwiftBrush
from stepdistill.methods.swiftbrush_v2 import SwiftBrushV2
from stepdistill.methods.tcd import TCD
from stepdistill.methods.tdd import TDD
from stepdistill.methods.tdm import TDM

METHODS: dict[str, type[Method[Any]]] = {
    "add": ADD,
    "consistency": Consistency,
    "ctm": CTM,
    "decoupled_dmd": DecoupledDMD,
    "dmd": DMD,
    "dmd2": DMD2,
    "dp_dmd": DPDMD,
    "ect": ECT,
    "f_distill": FDistill,
    "guided": Guided,
    "imagine_flash": ImagineFlash,
    "ladd": LADD,
    "lcm": LCM,
    "pcm": PCM,
    "pgsb": PGSB,
    "phased_dmd": PhasedDMD,
    "polish": Polish,
    "progressive": Progressive,
    "rcm": RCM,
    "scm": SCM,
    "sid": SiD,
    "swiftbrush": SwiftBrush,
    "swiftbrush_v2": SwiftBrushV2,
    "tcd": TCD,
    "tdd": TDD,
    "tdm": TDM,
}


def find(name: str) -> type[Method[Any]]:
    """The method of this name, or the subclass of Method that "package.module:Class" names. ValueError with the remedy otherwise."""
    if ":" in name:
        return _outside(name)
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        raise ValueError(f"unknown method {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(METHODS)}"))
    return METHODS[name]


def _outside(path: str) -> type[Method[Any]]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError, TypeError) as error:                # the last two for an empty and a relative name
        raise ValueError(f"method.name {path!r}: {error}; install the package that holds it, or put its folder on PYTHONPATH") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"method.name {path!r}: {module} has no subclass of stepdistill.methods.base.Method called {attribute!r}")
    if missing := [key for key in ("title", "arxiv", "family", "Config") if not hasattr(found, key)]:
        raise ValueError(f"method.name {path!r}: {attribute} lacks {', '.join(missing)}; CONTRIBUTING.md says what a method is")
    if not dataclasses.is_dataclass(found.Config):
        raise ValueError(f"method.name {path!r}: {attribute}.Config must be a dataclass, its keys are the recipe's")
    return found
