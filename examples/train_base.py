"""Train the bundled base model from scratch: tokenizer, weights, chat template and model card.

    python -m examples.train_base                  # writes models/chorus-tiny

All text comes from `examples.corpus`; nothing is downloaded. The result is the same for the same seed on the
same kind of CPU and number of threads.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples import corpus
from examples.tasks import END_OF_TEXT, TURN_END, TURN_START
from examples.training import HAS_BFLOAT16

BASE_MODEL = Path("models/chorus-tiny")
MAX_POSITIONS = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CARD = """\
# chorus-tiny

The small base model that Chorus ships so that its first command needs no download. A Llama-architecture
model of {parameters:.1f} million parameters with its own byte-level BPE tokenizer ({vocabulary} entries)
and a ChatML template, trained from scratch on text that `examples/corpus.py` makes up from grammars.
No outside data was used.

It knows a world of about 120 words (people who buy, lose or paint things in cities) and makes small talk
about it. It does none of the adapters' jobs on a bare prompt; the adapters in `adapters/` do.

| | |
|---|---|
| layers, hidden size, MLP size | {layers}, {hidden}, {intermediate} |
| heads, of which for keys and values | {heads}, {kv_heads} |
| embeddings | tied |
| positions | {positions} by configuration; trained on windows of {block} tokens |
| weights | bfloat16 |
| made by | `python -m examples.train_base --steps {steps} --seed {seed}` |
| seen | {seen:.1f} million tokens, last loss {loss:.3f} |
| time | {minutes:.0f} minutes on {threads} CPU threads |

Licence: Apache-2.0, as the rest of the repository.
"""


def train_tokenizer(vocabulary: int, seed: int, documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds no token of its own; a chat turn's end is its end of sequence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(corpus.documents(seed), documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    _give_forms_of_a_word_one_start(model, tokenizer)
    _start_with_an_induction_head(model)
    return model


@torch.no_grad()
def _give_forms_of_a_word_one_start(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """`lamps`, ` lamps` and `LAMPS` start as neighbours among the embeddings: what one learns helps all."""
    embeddings = model.model.embed_tokens.weight  # [vocabulary, hidden]
    shared: dict[str, torch.Tensor] = {}
    for token_id in range(len(tokenizer)):
        word = tokenizer.decode([token_id]).strip().lower()
        if word.isalnum():
            first = shared.setdefault(word, embeddings[token_id].clone())
            embeddings[token_id] = 0.9 * first + 0.45 * embeddings[token_id]


@torch.no_grad()
def _start_with_an_induction_head(model: LlamaForCausalLM) -> None:
    """Initial weights in which the model already looks back for the last time it saw the current token.

    A small model meets this circuit (Olsson et al. 2022, In-context Learning and Induction Heads) by chance,
    after millions of tokens; given it at the start, it copies within a few hundred steps. Like mimetic
    initialisation (Trockman and Kolter 2023) this is only where training begins: every weight stays free.

    Layer 0, head 0 attends to the previous token by position, and writes what it reads into the upper half
    of the residual stream. Layer 1, head 0 looks for the current token in that half, and copies what it
    finds.
    """
    config = model.config
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    std, half = config.initializer_range, width // 2

    def orthonormal(start: int) -> torch.Tensor:
        """[head, width]: reads `head` random directions of one half of the stream, but not the constant."""
        block = torch.linalg.qr(torch.randn(half - 1, head)).Q.T
        matrix = torch.zeros(head, width)
        matrix[:, start + 1 : start + half] = block
        return matrix

    embeddings = model.model.embed_tokens.weight  # [vocabulary, width]
    embeddings[:, half:] = 0
    embeddings[:, 0] = 6 * std  # the same for all tokens, so that a head can act on position alone
    constant = 6 / math.sqrt((36 + half - 1) / width)  # that entry after the first RMSNorm

    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    pairs = 4  # only the fastest rotations of RoPE tell one position from the next
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs) * 2 / head)
    first.q_proj.weight[:head] = 0
    first.k_proj.weight[:head] = 0
    first.k_proj.weight[:pairs, 0] = 10 / constant
    first.q_proj.weight[:pairs, 0] = 10 / constant * angles.cos()  # turned back by one position
    first.q_proj.weight[head // 2 : head // 2 + pairs, 0] = -10 / constant * angles.sin()
    token, previous = orthonormal(0), orthonormal(half)
    first.v_proj.weight[:head] = 0.1 * token
    first.o_proj.weight[:, :head] = 20 * std * previous.T

    second.q_proj.weight[:head] = 4 * token
    second.k_proj.weight[:head] = previous
    copied = orthonormal(0)
    second.v_proj.weight[:head] = 0.1 * copied
    second.o_proj.weight[:, :head] = 40 * std * copied.T


def packed_rows(
    tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], rows: int, block: int
) -> Iterator[torch.Tensor]:
    """Windows of an endless text, [rows, block]; a document may run on into the next row."""
    tokens: list[int] = []
    while True:
        while len(tokens) < rows * block:
            texts = list(itertools.islice(documents, 256))
            tokens.extend(itertools.chain.from_iterable(tokenizer(texts)["input_ids"]))
        yield torch.tensor(tokens[: rows * block]).view(rows, block)
        del tokens[: rows * block]


def batches(
    tokenizer: PreTrainedTokenizerFast, rows: int, block: int, drill_steps: int, seed: int
) -> Iterator[torch.Tensor]:
    """[rows, block] of the corpus; of the first steps half is drills, and of every fourth step after them.

    Without drills beside it, the rest of the text wears the copying down again before it has a use for it.
    """
    drills = packed_rows(tokenizer, corpus.drills(seed), rows // 2, block)
    text = packed_rows(tokenizer, corpus.documents(seed), rows // 2, block)
    for step in itertools.count():
        drilled = step < drill_steps or step % 4 == 0
        yield torch.cat([next(drills if drilled else text), next(text)])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine down to a twentieth of the peak."""
    if step < 100:
        return peak * (step + 1) / 100
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: LlamaForCausalLM, batches: Iterator[torch.Tensor], steps: int, peak_learning_rate: float
) -> float:
    """Next-token training; returns the mean loss of the last steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    model.train()
    started, loss_sum, mean_loss = time.monotonic(), 0.0, math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_learning_rate)
        input_ids = next(batches)
        # bfloat16 products double the speed on CPUs that have them; weights and optimizer stay in float32
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean_loss, loss_sum = loss_sum / (step % 100 + 1), 0.0
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {mean_loss:.3f}  {seconds:.0f} s", flush=True)
    return mean_loss


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors makes its file private; a server may run as another user


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=BASE_MODEL)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--drill-steps", type=int, default=600, help="the first of them: half is copying")
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--block", type=int, default=128, help="tokens of one row")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="its peak")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.vocabulary, args.seed)
    model = new_model(tokenizer, args.hidden, args.layers)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    stream = batches(tokenizer, args.batch_rows, args.block, args.drill_steps, args.seed)
    loss = train(model, stream, args.steps, args.learning_rate)
    save(model, tokenizer, args.out)
    card = CARD.format(
        parameters=model.num_parameters() / 1e6,
        vocabulary=len(tokenizer),
        layers=args.layers,
        hidden=args.hidden,
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        intermediate=model.config.intermediate_size,
        positions=MAX_POSITIONS,
        block=args.block,
        steps=args.steps,
        seed=args.seed,
        seen=args.steps * args.batch_rows * args.block / 1e6,
        loss=loss,
        minutes=(time.monotonic() - started) / 60,
        threads=torch.get_num_threads(),
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
