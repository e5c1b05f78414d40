"""Writes the tiny model that the test bed serves: ``tiny_model.py OUT_DIR TEXT_FILE...``.

A Qwen2 of about a million random weights and a byte-level BPE tokenizer trained on the given
files. Three things are arranged, so that tests mean something:

- *Text depends on all of the context.* Attention is made strong enough that a token changed far
  back changes the greedy text: KV bytes that are wrong show.
- *Answers survive their way back.* Only whole words with a space in front can be generated, never
  the token that ends a reply, and such text encodes to the ids it came from; so a conversation's
  history is found in the cache, as with a trained model. Replies end at ``max_tokens`` or at a
  stop string.
- *Ties do not decide.* Weights are float32: batches of other sizes round differently, and with
  bfloat16 logits that often changes the best token.

Runs in the test bed's own environment (torch, transformers), never in the project's.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END_OF_TEXT, IM_START, IM_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 2048
CONTEXT_TOKENS = 32768
SEED = 20

#: Qwen's template, less its default system prompt: tools in the system block, calls and results.
CHAT_TEMPLATE = """\
{%- set first = messages[0] if messages and messages[0].role == 'system' else none %}
{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if first %}{{- first.content + '\n\n' }}{% endif %}
{{- '# Tools\n\nYou may call these functions:\n<tools>' }}
{%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- elif first %}{{- '<|im_start|>system\n' + first.content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string
    else call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role != 'system' or not loop.first %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over ``texts``: any text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True) for text in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"only {tokenizer.get_vocab_size()} tokens: give more text to train on")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=IM_END, pad_token=END_OF_TEXT
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def whole_words(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of tokens that are a word behind a space, and are what that text encodes to."""
    found = []
    for token in range(VOCABULARY):
        text = tokenizer.decode([token])
        if re.fullmatch(r" [A-Za-z]{2,}", text) and tokenizer.encode(text) == [token]:
            found.append(token)
    return found


def make_model(words: list[int], end_token: int) -> Qwen2ForCausalLM:
    """Random weights from a fixed seed, arranged as the module says."""
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        initializer_range=0.12,
        bos_token_id=0,
        eos_token_id=end_token,
        pad_token_id=0,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        # Channel 0 carries a constant past every layer; the head reads from it what may be said.
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            # Sharp attention looks at few places, at each step at others, and what is there counts.
            layer.self_attn.q_proj.weight.mul_(2.5)
            layer.self_attn.k_proj.weight.mul_(2.5)
            layer.self_attn.o_proj.weight.mul_(4.0)
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        head = model.lm_head.weight
        head[:, 0] = -1000.0
        head[words, 0] = 0.0
    return model


def main(out_dir: str, *text_files: str) -> None:
    """Write config, weights and tokenizer to ``out_dir``."""
    tokenizer = train_tokenizer(sorted(text_files))
    words = whole_words(tokenizer)
    model = make_model(words, tokenizer.convert_tokens_to_ids(IM_END))
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out_dir)
    model.save_pretrained(out_dir)
    sys.stdout.write(f"{out_dir}: {model.num_parameters():,} weights, {len(words)} words\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
