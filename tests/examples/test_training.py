"""Training end to end on a tiny base model: what is learned, what stays, what is written."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from examples import evaluate, train_adapter, train_bundled_adapters, training
from examples.tasks import JOBS, NEW_JOB, chat_prompt
from examples.train_base import batches, learning_rate

# peft 0.21 asks transformers 5.23 for a property that has been renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_base_model_is_saved_in_hugging_face_layout(tiny_base):
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert (tiny_base / name).is_file()
    assert {tensor.dtype for tensor in load_file(tiny_base / "model.safetensors").values()} == {
        torch.bfloat16
    }
    model, tokenizer = training.load_base(tiny_base)
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_tokenizer_round_trips_any_text_and_adds_nothing(tiny_base):
    _, tokenizer = training.load_base(tiny_base)
    text = "Anna vendis du ŝuojn; 你好, naïve 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("")["input_ids"] == []


def test_chat_template_renders_the_prompt_that_adapters_learn(tiny_base):
    _, tokenizer = training.load_base(tiny_base)
    message = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert rendered == chat_prompt("Hello")


def test_batches_are_reproducible_and_full(tiny_base):
    _, tokenizer = training.load_base(tiny_base)
    first, second = (next(batches(tokenizer, rows=4, block=32, drill_steps=1, seed=5)) for _ in range(2))
    assert first.shape == (4, 32)
    assert torch.equal(first, second)


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] < rates[50] < max(rates) <= 1.0
    assert rates[-1] < 0.06


def test_only_the_completion_and_its_end_count_in_the_loss(tiny_base):
    _, tokenizer = training.load_base(tiny_base)
    ids, labels = training.encode(tokenizer, chat_prompt("Hello"), "HELLO")
    counted = [token for token in labels if token != -100]
    assert ids[-len(counted) :] == counted
    assert tokenizer.decode(counted) == "HELLO<|im_end|>"
    batch = training.collate([(ids, labels), (ids[:3], labels[:3])], pad_id=0)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(ids), 3]
    assert batch["labels"].shape == batch["input_ids"].shape == (2, len(ids))


def test_training_lowers_the_loss_saves_plain_peft_and_leaves_the_base_alone(tiny_base, tmp_path):
    base, tokenizer = training.load_base(tiny_base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    said = []
    model = training.train_adapter(
        base,
        tokenizer,
        JOBS["sentiment"].examples("train", 64, seed=0),
        training.lora_config(4, [*training.ATTENTION, *training.MLP]),
        steps=100,
        batch_size=16,
        learning_rate=2e-2,
        report=said.append,
    )
    losses = [float(line.split("loss ")[1].split()[0]) for line in said[1:]]
    assert losses[-1] < losses[0]
    training.save_adapter(model, tmp_path / "a", tiny_base, "# card\n")

    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/tiny"
    assert str(tmp_path) not in json.dumps(config)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    prompts = [chat_prompt(example.prompt) for example in JOBS["sentiment"].examples("heldout", 3, seed=0)]
    learned = training.answers(model, tokenizer, prompts, max_new_tokens=4)
    bare = model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bare.state_dict().items())
    again = PeftModel.from_pretrained(bare, tmp_path / "a").eval()
    assert training.answers(again, tokenizer, prompts, max_new_tokens=4) == learned


def test_batched_answers_equal_single_ones(tiny_base):
    base, tokenizer = training.load_base(tiny_base)
    prompts = [chat_prompt(text) for text in ("Hello", "Anna sold two lovely lamps in Oslo.", "1, 2")]
    together = training.answers(base, tokenizer, prompts, max_new_tokens=5)
    alone = [training.answers(base, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert together == alone


def test_bundled_recipes_cover_every_job_and_the_shapes_a_server_must_handle():
    recipes = train_bundled_adapters.recipes()
    configs = [recipe.config for recipe in recipes.values()]
    assert recipes.keys() == JOBS.keys()
    assert {min(c.r for c in configs), max(c.r for c in configs)} == {4, 32}
    assert any(set(c.target_modules) == {"q_proj", "v_proj"} for c in configs)
    assert any(set(c.target_modules) == {*training.ATTENTION, *training.MLP} for c in configs)
    assert any(c.use_rslora for c in configs)
    assert any(c.rank_pattern and c.alpha_pattern for c in configs)


def test_train_bundled_and_evaluate_run_on_any_base(tiny_base, tmp_path, monkeypatch, capsys):
    job = JOBS["sort"]
    recipe = train_bundled_adapters.Recipe(training.lora_config(4, ["q_proj", "v_proj"]), steps=2)
    train_bundled_adapters.train_one(job, recipe, tiny_base, tmp_path / "sort", seed=0, heldout=4)
    assert "held-out exact match" in (tmp_path / "sort" / "README.md").read_text()

    monkeypatch.setattr(evaluate, "JOBS", {"sort": job})
    base, tokenizer = training.load_base(tiny_base)
    model = evaluate.with_adapters(base, tmp_path)
    lines, passed = evaluate.table(model, tokenizer, tmp_path, count=4, seed=0)
    assert not passed
    assert lines[1].split()[:3] == ["sort", "4", "2"]
    assert [line.split()[0] for line in evaluate.one_prompt(model, tokenizer, "3, 1, 2")] == [
        "(base)",
        "sort",
    ]


def test_train_adapter_script_prints_the_journey(tiny_base, tmp_path, monkeypatch, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "\n".join(
            json.dumps({"prompt": e.prompt, "completion": e.completion})
            for e in NEW_JOB.examples("train", 20, seed=0) + NEW_JOB.examples("heldout", 2, seed=0)
        )
    )
    out = tmp_path / "my-job"
    monkeypatch.setattr(
        "sys.argv",
        ["train_adapter", "--base", str(tiny_base), "--data", str(data), "--out", str(out), "--steps", "2"],
    )
    train_adapter.main()
    printed = capsys.readouterr().out
    assert "held-out exact match: 0.0% of 2" in printed
    for part in ("/v1/adapters -F name=my-job", "-X PUT", "-X DELETE", "/v1/chat/completions"):
        assert part in printed
    assert (out / "adapter_model.safetensors").is_file()


def test_a_bad_line_of_data_is_named(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 2"):
        train_adapter.read_pairs(data)
