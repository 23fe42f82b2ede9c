"""Patch Mixing and ReMixer, reproduced."""
__version__ = "0.1.0"
