"""What lies in models/ and adapters/: complete, small, free of machine paths, and right in a sample."""

from __future__ import annotations

import json

import pytest

from examples import evaluate, training
from examples.tasks import JOBS, chat_prompt
from examples.train_base import MAX_POSITIONS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def bundled():
    base, tokenizer = training.load_base()
    return evaluate.with_adapters(base, training.ADAPTERS), tokenizer


def test_every_job_has_an_adapter_in_plain_peft_layout():
    assert {folder.name for folder in training.ADAPTERS.iterdir() if folder.is_dir()} == set(JOBS)
    for name in JOBS:
        folder = training.ADAPTERS / name
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "models/chorus-tiny"
        assert config["peft_type"] == "LORA"


def test_all_weights_in_git_stay_under_20_mb():
    weights = [training.BASE_MODEL / "model.safetensors", *training.ADAPTERS.glob("*/*.safetensors")]
    assert sum(path.stat().st_size for path in weights) < 20e6


def test_tokenizer_template_and_ends(bundled):
    model, tokenizer = bundled
    message = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert rendered == chat_prompt("Hello")
    assert tokenizer("Hello")["input_ids"][0] not in tokenizer.all_special_ids
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert model.config.max_position_embeddings == MAX_POSITIONS == tokenizer.model_max_length


@pytest.mark.parametrize("name", JOBS)
def test_adapter_is_right_and_the_base_model_is_not(bundled, name):
    model, tokenizer = bundled
    heldout = JOBS[name].examples("heldout", 12, seed=11)
    model.set_adapter(name)
    assert training.exact_match(model, tokenizer, heldout) >= 0.8
    with model.disable_adapter():
        assert training.exact_match(model, tokenizer, heldout) < evaluate.BASE_LIMIT


def test_one_prompt_gets_different_answers(bundled):
    model, tokenizer = bundled
    lines = evaluate.one_prompt(model, tokenizer, "Anna sold two lovely lamps in Oslo on Monday.")
    answers = dict(line.split(maxsplit=1) for line in lines)
    assert answers["upper"] == "ANNA SOLD TWO LOVELY LAMPS IN OSLO ON MONDAY."
    assert answers["sentiment"] == "positive"
    assert answers["reverse"] == "Monday on Oslo in lamps lovely two sold Anna"
    assert answers["esperanto"] == "Anna vendis du ĉarmajn lampojn en Oslo je lundo."
    assert json.loads(answers["json"])["city"] == "Oslo"
