"""How does a model leave the process, and is it still the same? Files for other runtimes, proven there."""

from lightning_compress.export.export import export
from lightning_compress.export.facts import ExportedModel

__all__ = ["ExportedModel", "export"]
