"""A character-level language model on Python's own standard-library sources: text that is on every machine that runs gradwise.

Train, validation and test are different source files, so a model cannot score by remembering one. The files are named below and not
listed from a folder: two machines with the same Python version hold the same text, and `Task.data_hash` tells when they do not.
"""

from __future__ import annotations

import importlib.util
import math
import string
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from gradwise.bench.tasks import Data, Task, seeded
from gradwise.core.errors import UserError
from gradwise.core.protocols import supervised

ALPHABET = string.printable
CONTEXT = 64

_TRAIN = [
    "argparse", "calendar", "configparser", "contextlib", "csv", "dataclasses", "difflib", "enum", "fractions", "functools",
    "gettext", "heapq", "imaplib", "inspect", "ipaddress", "mailbox", "optparse", "pickle", "shutil", "smtplib", "statistics",
    "tarfile",
]  # fmt: skip
_VALIDATION = ["shlex", "locale", "textwrap", "netrc"]
_TEST = ["tempfile", "uuid", "pprint", "random"]


class CharGPT(nn.Module):
    """A decoder-only transformer over characters: pre-norm blocks of causal attention and a GELU network, learned positions.

    Args:
        vocabulary: number of symbols.
        width, heads, layers, context: of the transformer; width must be a multiple of heads.

    Shapes:
        tokens (B, T), integers below `vocabulary`, T <= context -> logits (B, vocabulary, T), torch's order for `cross_entropy`.

    Raises:
        ValueError: width is no multiple of heads.

    Example:
        >>> CharGPT(101)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 101, 5])
    """

    def __init__(self, vocabulary: int, width: int = 64, heads: int = 4, layers: int = 2, context: int = CONTEXT) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width}, heads={heads}")
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for weight in (self.token.weight, self.position.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.token(tokens) + self.position(positions))
        return self.head(self.norm(hidden)).transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
        x = x + self.out(attended)
        return x + self.network(self.norm2(x))


def encode(text: str) -> Tensor:
    """Characters as integers: the position in `ALPHABET` (`string.printable`), and one symbol more for every other character.

    Example:
        >>> encode("01é").tolist()
        [0, 1, 100]
    """
    table = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([table.get(character, len(ALPHABET)) for character in text], dtype=torch.long)


def windows(tokens: Tensor, context: int = CONTEXT) -> Data:
    """Cut a text into windows that do not overlap, each with the same window one character later as its target.

    Example:
        >>> windows(torch.arange(5), context=2)
        (tensor([[0, 1],
                [2, 3]]), tensor([[1, 2],
                [3, 4]]))
    """
    count = (len(tokens) - 1) // context
    return tokens[: count * context].view(count, context), tokens[1 : count * context + 1].view(count, context)


def bits_per_character(model: nn.Module, data: Data) -> float:
    """Mean of -log2 of the probability given to the character that came next.

    Example:
        >>> blind = lambda tokens: torch.zeros(len(tokens), 4, tokens.shape[1])
        >>> round(bits_per_character(blind, windows(torch.arange(4), context=3)), 6)
        2.0
    """
    total = 0.0
    for inputs, target in zip(data[0].split(64), data[1].split(64), strict=True):
        total += float(cross_entropy(model(inputs), target, reduction="sum"))
    return total / data[1].numel() / math.log(2)


def stdlib_text() -> Task:
    """The task: predict the next character of Python source code with a 2-layer GPT of about 117,000 parameters.

    Raises:
        UserError: this Python came without the sources of its standard library.

    Example:
        >>> task = stdlib_text()
        >>> task.metric, task.better, task.supports_loss
        ('bits per character', 'lower', True)
    """
    train, validation, test = (windows(encode(_source(modules))) for modules in (_TRAIN, _VALIDATION, _TEST))
    return Task(
        name="stdlib_text", metric="bits per character", better="lower", model=seeded(lambda: CharGPT(len(ALPHABET) + 1)),
        objective=supervised(cross_entropy), train=train, validation=_every_few(validation, 192), test=_every_few(test, 512),
        evaluate=bits_per_character, batch_size=16,
        description="Next character of Python's own standard-library sources (train, validation and test are different files), "
        "2-layer GPT of width 64 and context 64.",
    )  # fmt: skip


def _source(modules: list[str]) -> str:
    texts = []
    for name in modules:
        spec = importlib.util.find_spec(name)
        path = Path(spec.origin) if spec is not None and spec.origin else None
        if path is None or path.suffix != ".py" or not path.exists():
            raise UserError(f"task 'stdlib_text' needs the source of Python's module {name!r}, and this Python came without it")
        texts.append(path.read_text(encoding="utf-8"))
    return "\n".join(texts)


def _every_few(data: Data, count: int) -> Data:
    """About `count` windows, evenly spread over the text, so that one evaluation costs little."""
    stride = max(1, len(data[0]) // count)
    return tuple(x[::stride][:count].contiguous() for x in data)
