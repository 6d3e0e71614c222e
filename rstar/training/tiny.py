"""A seeded toy model for tests and for `model.base: tiny`: every code path of a real one, in megabytes and seconds.

A Llama of width 64 with a byte-level BPE of at most 600 tokens that is trained on our step format; random weights, so
what it writes is noise. Its begin, end and padding tokens are three different ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rstar.prompts import DELIMITERS

VOCABULARY = 600
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BOS, _EOS, _PAD, _TURN = "<s>", "<|im_end|>", "<pad>", "<|im_start|>"
_TEXTS = (
    "user\nTom has 12 apples and buys 7 more. How many apples does he have now?",
    "<code>\n# Step 1: Start with the apples Tom has\napples = 12\n<end_of_step>\n",
    "# Step 2: Add the apples he buys\napples = apples + 7\n<end_of_step>\n",
    "# Step 3: Print the total\nprint(apples)\n<end_of_code>\n<output>19<end_of_output>\n",
    "<answer>From the result, we can see that the answer is \\boxed{19}.\n<end_of_answer>",
    "system\nYou solve problems with Python.\nassistant\nfrom sympy import solve\nresult = (3 + 4) * 5 - 6 / 2",
    "What is the least common multiple of 12 and 18? What is 345 + 678 - 90? Calculate 23 * 45.",
)


def build_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny Llama and its tokenizer to `folder` and return it. Equal arguments give equal weights.

    Args:
        folder: Created where missing.
        seed: Of the random weights; the global random state is left as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,  # the usual 0.02 makes greedy decoding of an untrained model repeat one token
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_BOS, _EOS, _PAD, _TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*_TEXTS, *(d + "\n" for d in DELIMITERS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        additional_special_tokens=[_TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )
