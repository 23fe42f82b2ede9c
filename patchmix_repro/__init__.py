"""An executable companion to Patch Mixing and ReMixer."""
__version__ = "0.1.0"
