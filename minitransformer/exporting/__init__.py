"""What leaves: a run's model in the runtime that others have, and the proof that it is what was trained."""

from minitransformer.exporting import gguf, hf, onnx, torch_program
from minitransformer.exporting.formats import ExportFormat, export_run

__all__ = ["ExportFormat", "export_run", "gguf", "hf", "onnx", "torch_program"]
