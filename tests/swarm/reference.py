"""The unsplit model, run by transformers alone: its own tokenizer, chat template, weights loader and generate()."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from azu.distribution import Library

__all__ = ["Reference"]


class Reference:
    """SmolLM2 in float32, out of a coordinator's published files."""

    def __init__(self, data_dir: Path, digest: str) -> None:
        library = Library(data_dir)
        manifest = dict(library.manifests())[digest]
        config = LlamaConfig.from_dict(json.loads(library.store.path(manifest.config.digest).read_bytes()))
        self.model = LlamaForCausalLM(config).eval()
        blobs = [*manifest.layers, *manifest.shared.values()]
        state = {name: tensor for blob in blobs for name, tensor in load_file(library.store.path(blob.digest)).items()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}  # tied to the embedding
        self.model.tie_weights()
        settings = json.loads(library.store.path(manifest.tokenizer["tokenizer_config.json"].digest).read_bytes())
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(library.store.path(manifest.tokenizer["tokenizer.json"].digest)),
            chat_template=settings["chat_template"],
            eos_token="<|im_end|>",
        )

    def prompt_ids(self, question: str) -> list[int]:
        """The question as the chat template asks it."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @cache  # noqa: B019 - there is one, and it lives as long as the tests
    def ask(self, question: str, max_tokens: int = 16) -> tuple[str, list[int]]:
        """The greedy answer's text and token ids, the stop token among them."""
        prompt = torch.tensor([self.prompt_ids(question)])
        with torch.inference_mode():
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=2,
                eos_token_id=2,
            )
        ids = output[0, prompt.shape[1] :].tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True), ids
