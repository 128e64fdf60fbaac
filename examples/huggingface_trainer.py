"""A gradwise optimizer inside the Hugging Face Trainer, through its own seam `optimizer_cls_and_kwargs`. No subclass, no callback.

    pip install 'gradwise[hf]'
    python examples/huggingface_trainer.py                     # a tiny GPT-2 built here, on the standard library's text; no network
    python examples/huggingface_trainer.py --optimizer lion
    python examples/huggingface_trainer.py --model distilgpt2  # a model and its tokenizer from the hub or from a local folder

The Trainer keeps its schedule, weight-decay groups, checkpoints and logging; the optimizer's state is in its checkpoints as any other's.
"""

import argparse
import csv
import inspect
import string
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from gradwise.optim import AdaBelief, AdamP, Lion

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
except ImportError as error:
    raise SystemExit(f"this example needs the extra hf: pip install 'gradwise[hf]' ({error})") from None

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adabelief": (AdaBelief, {"lr": 3e-3, "weight_decay": 0.01}),
    "adamp": (AdamP, {"lr": 3e-3, "weight_decay": 0.01}),
    "lion": (Lion, {"lr": 5e-4, "betas": (0.95, 0.98), "weight_decay": 0.1}),  # steps of equal size need a smaller rate
}


class Windows(Dataset[dict[str, torch.Tensor]]):
    """A text's tokens (N,) cut into windows that do not overlap; the model shifts the labels itself."""

    def __init__(self, tokens: list[int], context: int) -> None:
        self.windows = torch.tensor(tokens[: len(tokens) // context * context]).view(-1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def characters(text: str) -> list[int]:
    """One token a character: its place in `string.printable`, and one token more for all others."""
    return [string.printable.find(c) if c in string.printable else len(string.printable) for c in text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adabelief")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--model", help="name on the Hugging Face hub or a local folder; default: a tiny GPT-2 by characters")
    options = parser.parse_args()
    torch.manual_seed(0)
    model: nn.Module
    if options.model:
        encode = AutoTokenizer.from_pretrained(options.model).encode
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        encode = characters
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(string.printable) + 1, n_positions=64, n_embd=64, n_layer=2, n_head=4,
                bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    train = Windows(encode(inspect.getsource(argparse) + inspect.getsource(csv)), context=64)
    held_out = Windows(encode(inspect.getsource(textwrap)), context=64)
    optimizer, arguments = OPTIMIZERS[options.optimizer]
    if options.model:  # fine-tuning wants a tenth of the rate of training from nothing
        arguments = {**arguments, "lr": arguments["lr"] / 10}

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(Path(folder)), max_steps=options.steps, per_device_train_batch_size=16, per_device_eval_batch_size=64,
                learning_rate=arguments["lr"], lr_scheduler_type="linear", logging_steps=max(1, options.steps // 5), save_strategy="no",
                report_to="none", disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(), seed=0,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            optimizer_cls_and_kwargs=(optimizer, arguments),
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    assert isinstance(inner, optimizer)
    print(f"{optimizer.__name__}: held-out loss {before:.4f} before, {after:.4f} after {options.steps} steps")


if __name__ == "__main__":
    main()
