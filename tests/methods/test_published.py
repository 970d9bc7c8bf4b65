"""AC/DC with HAM on a small convolutional network, beside the published rules: the authors' step, written anew."""

import torch
from torch import nn

import mirrormask as mm

STEPS, SPARSITY, LR = 40, 0.8, 0.01
#: AC/DC's ImageNet schedule (10 dense epochs of 100, phases of 5, the last dense one from 75 to 85) in 40 steps.
PRUNE, FREE = (4, 8, 12, 16, 20, 24, 28, 34), (6, 10, 14, 18, 22, 26, 30)


def network():
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2)]
    return nn.Sequential(*parts, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)).double()


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.randint(0, 3, (16,), generator=generator)).backward()


def published(alpha=200.0, beta=1e-3):
    """``w ← w exp(clamp(lr (-α sign(w) ∇f - β), -5, 5))`` after SGD's step, on weights of two dimensions and more."""
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    weights = [p for p in model.parameters() if p.dim() > 1]
    masks, course = [torch.ones_like(w) for w in weights], []
    for step in range(STEPS):
        gradients(model, step)
        grads = [w.grad.clone() for w in weights]
        base.step()
        with torch.no_grad():
            for w, g, mask in zip(weights, grads, masks, strict=True):
                w.mul_(torch.exp((LR * (-alpha * w.sign() * g - beta)).clamp(-5.0, 5.0)) * mask)
            if step + 1 in PRUNE:
                flat = torch.cat([w.abs().flatten() for w in weights])
                cut = flat.sort(descending=True).values[round((1 - SPARSITY) * flat.numel()) - 1]
                masks = [(w.abs() >= cut).double() for w in weights]
                for w, mask in zip(weights, masks, strict=True):
                    w.mul_(mask)
                    base.state[w]["momentum_buffer"].mul_(mask)
            elif step + 1 in FREE:
                for w, mask in zip(weights, masks, strict=True):
                    base.state[w]["momentum_buffer"].mul_(mask)
                masks = [torch.ones_like(w) for w in weights]
        course.append([w.detach().clone() for w in weights])
    return course


def test_acdc_ham_takes_the_published_step_on_a_convolutional_network():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    method = mm.methods.acdc_ham(SPARSITY, a=200.0, clip=5.0, floor=0.0)  # as published
    optimizer = mm.sparsify(model, base, method, steps=STEPS)
    for step, wanted in enumerate(published()):
        gradients(model, step)
        optimizer.step()
        for x, w in zip(optimizer.weights.values(), wanted, strict=True):
            torch.testing.assert_close(x.detach(), w, rtol=1e-8, atol=1e-10)
    sparse = [sum(int(w.count_nonzero()) for w in wanted) for wanted in published()]
    assert sparse[4] < sparse[6] and sparse[-1] == round((1 - SPARSITY) * sparse[0])
