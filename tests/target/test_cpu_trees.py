"""Trees of tokens through a whole model on this machine's CPU."""

import json
from pathlib import Path

import mlcgen
from mlcgen.runtime.load import load_executor

from .small_model import CONFIG, PAGE_SIZE, PAGES, VOCAB
from .trees import check_model


def test_paths_have_the_logits_of_plain_sequences(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = {"kv_dtype": "f32", "page_size": PAGE_SIZE, "max_batch": 8, "random_weights": True}
    path = mlcgen.compile(tmp_path, ["cpu"], "f32", tmp_path / "out", **options)
    tree, plain = (load_executor(path, num_pages=PAGES).executor for _ in range(2))
    for _ in range(3):
        check_model(tree, plain, VOCAB, 1e-5)
