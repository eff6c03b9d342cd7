"""Convert a GGUF file once to an ordinary checkpoint folder: float32 safetensors, tokenizer, chat template.

transformers reads the GGUF in half a minute. Three things need correction or checks:

* Its GGUF reader ignores the file's pre-tokenizer. That of ``smollm`` splits off every digit first; without that, the
  spaces before a number become other tokens than the model was trained on.
* It may keep the weights packed unless told to dequantize.
* Its versions differ. So the result is compared with known digests of the weights and of a probe text's ids.
"""

import contextlib
import hashlib
import io
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from subspec.errors import SubspecError
from subspec.targets.weight_files import one_line
from subspec.utils.console import quiet_libraries

PROBE_MESSAGES = [{"role": "user", "content": "Naïve  12+30 =   42 :\n\n  def f(x):\n    return x²"}]
"""Encoded with the chat template to identify a tokenizer: digits after spaces, accents, code, special tokens."""


def convert(gguf: Path, folder: Path, weights_sha256: str, probe_sha256: str) -> None:
    """Write the model and tokenizer of ``gguf`` into the empty or absent ``folder``.

    Args:
        gguf: alone in its folder (transformers would read a configuration beside it).
        weights_sha256, probe_sha256: expected :func:`weights_digest` and :func:`probe_digest`; empty: no check.

    SubspecError if the file cannot be read, or if this version of transformers reads it differently.
    """
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    # The GGUF reader's own progress bar obeys no switch.
    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise SubspecError(
                f"transformers {transformers.__version__} cannot read {gguf.name} ({one_line(error)}); "
                "the file is damaged, or install a supported transformers version"
            ) from error
        digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
        tokenizer.clean_up_tokenization_spaces = False  # decoding must give back what was encoded
        tokenizer.model_max_length = model.config.max_position_embeddings
        _compare("weights", weights_sha256, weights_digest(model))
        _compare("token ids", probe_sha256, probe_digest(tokenizer))
        ids = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids, do_sample=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def weights_digest(model: torch.nn.Module) -> str:
    """Hex SHA-256 over names and float32 bytes of a model's parameters, sorted by name; tied ones count once.

    Dequantizing Q4_1 and Q8_0 takes one rounding per weight, so every machine gets the same bytes.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def probe_digest(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of the ids of :data:`PROBE_MESSAGES` in the tokenizer's chat template."""
    if not tokenizer.chat_template:
        return "no chat template"
    ids = tokenizer.apply_chat_template(PROBE_MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    return hashlib.sha256(repr([int(token) for token in ids]).encode()).hexdigest()


def _compare(what: str, expected: str, found: str) -> None:
    if expected and found != expected:
        raise SubspecError(
            f"transformers {transformers.__version__} read other {what} from the GGUF file than expected "
            f"({found[:12]} instead of {expected[:12]}); install a supported transformers version"
        )
