"""A training loop of your own with words of gradwise in it, and the same run said as one `Step`.

    python examples/plain_loop.py

Handwritten digits of scikit-learn (bundled, nothing is downloaded), a small network, three words: the optimizer AdaBelief, the transform
ClipNorm, the schedule LinearDecay. The first half shows that they are plain PyTorch objects: nothing of the loop changes. The second half
hands the same words to `gradwise.Step`, which gives the same weights, and tells what each step cost.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradwise import Step, supervised
from gradwise.optim import AdaBelief, LinearDecay
from gradwise.transforms import ClipNorm


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and to test on: 1,297 and 500 digits of 8 x 8 pixels in [0, 1]."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[500:], y[500:], x[:500], y[:500]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    x, y, test_x, test_y = data()
    batches = [index for _ in range(epochs) for index in torch.arange(len(x)).split(64)]
    per_epoch = len(batches) // epochs

    # 1. Your loop. The optimizer and the schedule go where torch's would; the transform is attached once and works at every step().
    model = network()
    optimizer = AdaBelief(model.parameters(), lr=1e-2)
    ClipNorm(1.0).attach(optimizer)
    schedule = LinearDecay(optimizer, total_steps=len(batches))
    losses: list[float] = []
    print("epoch  training loss  test accuracy  learning rate")
    for number, index in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if number % per_epoch == 0 and number // per_epoch % max(1, epochs // 4) == 0:
            mean, rate = sum(losses[-per_epoch:]) / per_epoch, optimizer.param_groups[0]["lr"]
            print(f"{number // per_epoch:5}  {mean:13.4f}  {accuracy(model, test_x, test_y):13.1%}  {rate:13.4f}")

    # 2. The same words as one sentence. Pairs that cannot be right together would be refused on this line, with the reason.
    twin = network()
    twin_optimizer = AdaBelief(twin.parameters(), lr=1e-2)
    twin_schedule = LinearDecay(twin_optimizer, total_steps=len(batches))
    step = Step(twin, supervised(cross_entropy), twin_optimizer, transforms=[ClipNorm(1.0)], schedule=twin_schedule)
    reports = [step((x[index], y[index])) for index in batches]

    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    seconds = sorted(report.seconds for report in reports)[len(reports) // 2]
    print(f"\nthe same words as a Step: same losses {losses == [r.loss for r in reports]}, same weights {same}")
    print(
        f"a step: {reports[0].forwards} forward, {reports[0].backwards} backward, {reports[0].gradient_bytes:,} bytes of gradient, "
        f"{1000 * seconds:.2f} ms (median of {len(reports)})"
    )


if __name__ == "__main__":
    main()
