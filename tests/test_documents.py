"""What README.md and CONTRIBUTING.md show really works: every Python block runs, and the example method passes as a newcomer would hope."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradwise.core import papers

ROOT = Path(__file__).parent.parent


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", python_blocks("README.md"))
def test_readme_block_runs(block: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", block], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_readme_names_only_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"run", "test"} <= set(re.findall(r"(?:`|^)make ([a-z]+)", readme, flags=re.MULTILINE)) <= targets
    listed = subprocess.run([sys.executable, "-m", "gradwise", "--help"], capture_output=True, text=True, check=True).stdout
    for command in set(re.findall(r"^gradwise ([a-z-]+)", readme, flags=re.MULTILINE)):
        assert command in listed


def test_the_contributed_optimizer_is_whole_in_seventy_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = python_blocks("CONTRIBUTING.md")
    assert len(block.splitlines()) <= 70
    (tmp_path / "contributed_signum.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(papers, "_PAPERS", dict(papers._PAPERS))  # it must not stay in the catalog of the other tests
    signum = importlib.import_module("contributed_signum").Signum
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(300, 20, generator=generator) for _ in range(2))
    for options in ({"mode": "loop"}, {"mode": "foreach", "flat": True}, {"mode": "compiled"}, {"state": "8bit"}):
        w = torch.nn.Parameter(start.clone())
        optimizer = signum([w], lr=0.01, **options)
        for _ in range(3):
            w.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(w.detach(), start - 0.03 * grad.sign())
