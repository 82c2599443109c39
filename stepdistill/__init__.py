"""Turn any diffusers pipeline into a one-to-four-step one."""

__version__ = "0.1.0"
