"""What leaves: a run's model in the runtime that others have, and the proof that it is what was trained."""

from minitransformer.exporting import hf
from minitransformer.exporting.formats import ExportFormat, export_run

__all__ = ["ExportFormat", "export_run", "hf"]
