"""A tiny published directory: a byte-level tokenizer with special tokens and a chat template; random weights."""

import json

import tokenizers
from naive import tiny_model

from moe_zoo.checkpoints import hf

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role }}
    {{- '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
    {%- if loop.index > 5 %}{%- break %}{%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}{% if thinking is defined and not thinking %}{% generation %}<t>{% endgeneration %}{% endif %}
{%- endif %}
"""  # noqa: E501


def write_tokenizer(folder, template=TEMPLATE):
    """256 bytes and the special tokens; nothing is merged."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": "<|endoftext|>", "bos_token": None, "pad_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_published(folder, template=TEMPLATE):
    """The tokenizer with a Mixtral of one layer. <|im_end|> (258) ends a text, says generation_config.json."""
    model = tiny_model(layers="1*moe", vocab_size=264)
    hf.save(folder, model, model.config)
    write_tokenizer(folder, template)
    settings = {"eos_token_id": [256, 258], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder
