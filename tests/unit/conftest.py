"""What tests of the engine share."""

import pytest
import tokenizers

from mlcgen.runtime.step_cost import StepCost
from mlcgen.runtime.tokenizer import Tokenizer

from .tiny_engine import VOCAB


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    hf.train_from_iterator(["the quick brown fox jumps over the lazy dog and the model goes on and on"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    hf.save(str(path))
    return Tokenizer(
        path, {"eos_token": "<eos>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    )


@pytest.fixture
def cheap_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever steps take on this machine."""
    monkeypatch.setattr(StepCost, "of_another", lambda cost, num_tokens: 0.1)
    monkeypatch.setattr(StepCost, "seconds", lambda cost, num_tokens: 1e9)
