"""One keep plan frozen into a really smaller model: as a Hugging Face folder, for ONNX Runtime or for llama.cpp."""

from microglia.export.accuracy import accuracy_kept
from microglia.export.plan import PLANS, KeepPlan
from microglia.export.run import FORMATS, Exported, export

__all__ = ["FORMATS", "PLANS", "Exported", "KeepPlan", "accuracy_kept", "export"]
