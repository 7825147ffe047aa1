"""Sources of models: Hugging Face directories and hub ids, GGUF files, installed model packages."""

from mlcgen.checkpoint.base import Checkpoint, Grouped, TensorInfo, Tokenizer
from mlcgen.checkpoint.source import open_checkpoint

__all__ = ["Checkpoint", "Grouped", "TensorInfo", "Tokenizer", "open_checkpoint"]
