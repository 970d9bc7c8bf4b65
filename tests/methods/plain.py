"""Slow, plain references: the map of a method in the autograd graph, torch's own optimizer, masks by sorting."""

import math

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

import mirrormask as mm

STEPS = 40


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (16,), generator=generator)


BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
}


def draw(seed, step, index, shape, kind=torch.rand, skip=0):
    """The library's random numbers: a generator for each seed, step and weight."""
    words = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(words[0] >> 1))
    for _ in range(skip):
        torch.rand(shape, generator=generator)
    return kind(shape, generator=generator)


def top(scores, k):
    """Bool masks of the k largest of all scores together; of equal ones the first."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:k]] = True
    return [m.reshape(s.shape) for m, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


def erk_counts(shapes, keep):
    """ERK without saturation, which these networks do not reach at the sparsities used."""
    raw = [sum(shape) for shape in shapes]
    wanted = [keep * r / sum(raw) for r in raw]
    assert all(w <= math.prod(s) for w, s in zip(wanted, shapes, strict=True))
    counts = [math.floor(w) for w in wanted]
    for i in sorted(range(len(raw)), key=lambda i: counts[i] - wanted[i])[: keep - sum(counts)]:
        counts[i] += 1
    return counts


class Plain:
    """``x = mask * phi(theta)`` in the graph; a method is a subclass that overrides what it changes."""

    decayed = ("x",)  # latents with the base's weight decay
    sparsity = 0.7

    def __init__(self, base):
        self.model = network()
        self.names = [name for name, p in self.model.named_parameters() if p.dim() == 2]
        kind, options = BASES[base]
        self.lr, self.adaptive = options["lr"], kind is not torch.optim.SGD
        self.theta, groups = [], []
        for name in self.names:
            x = self.model.get_parameter(name).detach().clone()
            latents = {k: v.clone().requires_grad_() for k, v in self.start(x).items()}
            self.theta.append(latents)
            for k, v in latents.items():
                decay = options["weight_decay"] if k in self.decayed else 0.0
                lr = self.lr * self.rate({k: v.detach() for k, v in latents.items()})
                groups.append({"params": [v], "lr": lr, "weight_decay": decay})
        self.others = {n: p for n, p in self.model.named_parameters() if n not in self.names}
        groups.append({"params": list(self.others.values())})
        self.base = kind(groups, **options)
        self.masks = [torch.ones_like(x) for x in self.x()]
        self.total = sum(m.numel() for m in self.masks)
        self.begin()

    # what a method may override
    def start(self, x):
        return {"x": x}

    def phi(self, x):
        return x

    def rate(self, latents):
        return 1.0

    def begin(self):
        pass

    def penalty(self, step):
        return 0.0

    def rank(self, x, index):
        return x.abs()

    def before(self, step):
        pass

    def after(self, t):
        pass

    # the machinery
    def x(self):
        return [self.phi(**latents) for latents in self.theta]

    def weights(self):
        return [(x * mask).detach() for x, mask in zip(self.x(), self.masks, strict=True)]

    def buffers(self, tensor):
        return [v for v in self.base.state[tensor].values() if torch.is_tensor(v) and v.shape == tensor.shape]

    def keep(self, sparsity):
        return round((1 - sparsity) * self.total)

    def put(self, masks, revive=False):
        """Masks in force: the dead are 0 with their state; those that come back start at 0 without any."""
        with torch.no_grad():
            for latents, old, new in zip(self.theta, self.masks, masks, strict=True):
                stay = new * old
                for v in latents.values():
                    if v.shape == new.shape:
                        v.mul_(stay)
                        for buffer in self.buffers(v):
                            buffer.mul_(stay)
        self.masks = [m.double() for m in masks]

    def prune(self, sparsity):
        scores = [self.rank(x, i) for i, x in enumerate(self.weights())]
        scores = [score.masked_fill(m == 0, -1.0) for score, m in zip(scores, self.masks, strict=True)]
        self.put(top(scores, self.keep(sparsity)))

    def step(self, step):
        self.base.zero_grad()
        self.t = step
        with torch.enable_grad():
            weights = {n: x * m for n, x, m in zip(self.names, self.x(), self.masks, strict=True)}
            inputs, y = batch(step)
            loss = nn.functional.cross_entropy(functional_call(self.model, {**weights, **self.others}, (inputs,)), y)
            # the gradient of the dense weight, masked or not
            dense = {n: w.detach().requires_grad_() for n, w in weights.items()}
            out = functional_call(self.model, {**dense, **self.others}, (inputs,))
            self.dense = torch.autograd.grad(nn.functional.cross_entropy(out, y), list(dense.values()))
            (loss + self.penalty(step)).backward()
        if list(self.theta[0]) == ["x"]:  # an ordinary weight: its gradient takes no notice of the mask
            for latents, grad in zip(self.theta, self.dense, strict=True):
                latents["x"].grad = grad.clone()
        with torch.no_grad():
            self.before(step)
            self.base.step()
            self.moved(step)
            if list(self.theta[0]) == ["x"]:
                for latents, mask in zip(self.theta, self.masks, strict=True):
                    latents["x"].mul_(mask)
            self.after(step + 1)

    def moved(self, step):
        pass


class Gmp(Plain):
    first, last, gap = 4, 30, 2

    def after(self, t):
        if self.first < t <= self.last and ((t - self.first) % self.gap == 0 or t == self.last):
            part = 1 - (1 - (t - self.first) / (self.last - self.first)) ** 3
            self.prune(self.sparsity * part if t < self.last else self.sparsity)


class GmpFloor(Gmp):
    """Every layer's own best first, up to a share of its ERK count."""

    share = 0.9

    def prune(self, sparsity):
        scores = [x.abs().masked_fill(m == 0, -1.0) for x, m in zip(self.weights(), self.masks, strict=True)]
        keep = self.keep(sparsity)
        shapes, last = [tuple(m.shape) for m in self.masks], self.masks[-1].numel()
        try:
            counts = erk_counts(shapes, keep)
        except AssertionError:  # the last layer, the smallest, is kept whole
            counts = [*erk_counts(shapes[:-1], keep - last), last]
        for i, (score, count) in enumerate(zip(scores, counts, strict=True)):
            first = top([score], math.floor(self.share * count))[0]
            scores[i] = score.masked_fill(first & (score >= 0), math.inf)
        self.put(top(scores, keep))


class OneShot(Plain):
    at = 20

    def after(self, t):
        if t == self.at:
            self.prune(self.sparsity)


class Elsa(OneShot):
    at, gap, strength = 34, 4, 0.5

    def begin(self):
        self.z = [x.detach().clone() for x in self.x()]
        self.u = [torch.zeros_like(z) for z in self.z]

    def pull(self, step):
        return 0.5 * self.strength * (1 - math.cos(math.pi * (step // self.gap * self.gap) / self.at))

    def before(self, step):
        if step < self.at:
            for latents, z, u in zip(self.theta, self.z, self.u, strict=True):
                latents["x"].grad += self.pull(step) * (latents["x"] - z + u)

    def rank(self, x, index):
        moment = self.base.state[self.theta[index]["x"]].get("exp_avg_sq", torch.ones_like(x))
        return (x + self.u[index]) ** 2 * moment

    def after(self, t):
        super().after(t)
        if t % self.gap == 0 and t < self.at:
            xs = self.weights()
            masks = top([self.rank(x, i) for i, x in enumerate(xs)], self.keep(self.sparsity))
            for i, (x, mask) in enumerate(zip(xs, masks, strict=True)):
                self.z[i] = (x + self.u[i]) * mask
                self.u[i] = (self.u[i] + x - self.z[i]) * self.pull(t - 1) / self.pull(t)


class Acdc(Plain):
    pruned, dense_again = (4, 8, 12, 16, 20, 24, 28, 34), (6, 10, 14, 18, 22, 26, 30)

    def after(self, t):
        if t in self.pruned:
            self.put(top([x.abs() for x in self.weights()], self.keep(self.sparsity)))
        if t in self.dense_again:
            self.put([torch.ones_like(m) for m in self.masks])


class Ham:
    """Mixed into another reference: the mirror step on its weight."""

    a, b, clip, on = 300.0, 0.05, 0.05, "x"

    def before(self, step):
        super().before(step)
        self.grads = [latents[self.on].grad.clone() for latents in self.theta]

    def moved(self, step):
        for latents, g in zip(self.theta, self.grads, strict=True):
            w = latents[self.on]
            w.mul_(torch.exp(w.sign() * (-self.lr * self.a * g).clamp(-self.clip, self.clip) - self.lr * self.b))
        super().moved(step)


class L1(OneShot):
    alpha = 0.02

    def moved(self, step):
        if step < self.at:
            for latents in self.theta:
                x = latents["x"]
                x.copy_(x.sign() * torch.clamp(x.abs() - self.lr * self.alpha, min=0))


class AtStart(Plain):
    allocation, seed = "global", 5

    def begin(self):
        scores = [draw(self.seed, 0, i, m.shape).double() for i, m in enumerate(self.masks)]
        keep = self.keep(self.sparsity)
        if self.allocation == "global":
            masks = top(scores, keep)
        else:
            shapes = [tuple(m.shape) for m in self.masks]
            counts = erk_counts(shapes, keep)
            if self.allocation == "uniform":
                wanted = [(1 - self.sparsity) * m.numel() for m in self.masks]
                counts = [math.floor(w) for w in wanted]
                for i in sorted(range(len(counts)), key=lambda i: counts[i] - wanted[i])[: keep - sum(counts)]:
                    counts[i] += 1
            masks = [top([s], k)[0] for s, k in zip(scores, counts, strict=True)]
        with torch.no_grad():
            self.put(masks)


class Exchange(AtStart):
    """RigL and SET."""

    allocation, fraction, gap, until, grow, anneal, spread = "erk", 0.4, 4, 30, "gradient", True, 0.0

    def after(self, t):
        if t % self.gap or not 0 < t < self.until:
            return
        part = self.fraction * (1 + math.cos(math.pi * t / self.until)) / 2 if self.anneal else self.fraction
        masks, fresh = [], []
        for i, (latents, mask) in enumerate(zip(self.theta, self.masks, strict=True)):
            x = latents["x"]
            alive = int(mask.sum())
            drop = min(round(part * alive), mask.numel() - alive)
            kept = top([x.abs().masked_fill(mask == 0, -1.0)], alive - drop)[0]
            wish = self.dense[i].abs() if self.grow == "gradient" else draw(self.seed, t, i, x.shape).double()
            new = kept | top([wish.float().masked_fill(kept, -1.0)], drop)[0]
            masks.append(new)
            rms = x[mask > 0].float().square().mean().sqrt()
            noise = draw(self.seed, t, i, x.shape, torch.randn, skip=1) if self.spread else torch.zeros(x.shape)
            fresh.append(torch.where(new & (mask == 0), (noise * rms * self.spread).double(), torch.zeros_like(x)))
        self.put(masks)
        for latents, value in zip(self.theta, fresh, strict=True):
            latents["x"].add_(value)


class Hadamard(OneShot):
    decayed, gain = (), 0.8

    def beta(self, x):
        return float(2 * x.square().mean().sqrt())

    def start(self, x):
        m = ((self.beta(x) + (self.beta(x) ** 2 + 4 * x**2).sqrt()) / 2).sqrt()
        return {"m": m, "w": x / m}

    def phi(self, m, w):
        return m * w

    def rate(self, latents):
        m, w = latents.values()
        return float(self.gain / ((m.abs() + w.abs()).mean() if self.adaptive else (m**2 + w**2).mean()))

    def shrink(self, increment):
        for latents in self.theta:
            for v in latents.values():
                v.mul_(1 - 2 * increment)


class Spred(Hadamard):
    alpha = 0.05

    def penalty(self, step):  # coupled
        return self.alpha * sum(v.square().sum() for latents in self.theta for v in latents.values())


class Pilot(Hadamard):
    alpha, delta, K, score, first = 0.2, 1.5, 0.5, None, None

    def before(self, step):
        self.shrink(self.lr * self.alpha)

    def epoch_end(self, score, step):
        norm = sum(float(x.abs().sum()) for x in self.weights())
        self.first = self.first or norm
        grow = (self.score is None or score > self.score) and norm > self.K * self.first and step / STEPS <= 0.5
        self.alpha = self.alpha * self.delta if grow else self.alpha / self.delta
        self.score = score


class Sensitive:
    """Mixed into another reference: under Adam, sizes times the root mean square gradient of their row."""

    def rank(self, x, index):
        return x.abs() * (self.dense[index].square().mean(1, keepdim=True).sqrt() if self.adaptive else 1.0)


class MirrorDescent(Sensitive, Gmp):
    """``x = a sinh(u)``; the gradient of x passes to u as it is."""

    decayed, gain = (), 0.8

    def start(self, x):
        a = float(x.square().mean().sqrt())
        self.scales = [*getattr(self, "scales", []), a]
        return {"u": torch.asinh(x / a)}

    def rate(self, latents):
        return float(self.gain / (self.scales[-1] * torch.cosh(latents["u"])).mean())

    def x(self):
        us = [latents["u"] for latents in self.theta]
        return [u + (a * torch.sinh(u) - u).detach() for u, a in zip(us, self.scales, strict=True)]

    def before(self, step):
        self.old = [latents["u"].detach().clone() for latents in self.theta]
        if 2 <= step < 30:
            self.scales = [a * (1 - 2 * 4.0 / 4 / 28) ** 2 for a in self.scales]

    def after(self, t):
        for latents, old in zip(self.theta, self.old, strict=True):
            latents["u"].copy_(old + (latents["u"] - old).clamp(-0.03, 0.03))
        super().after(t)


class Mirror(Sensitive, Hadamard, Gmp):
    after = Gmp.after

    def before(self, step):
        if 2 <= step < 30:
            self.shrink(4.0 / 4 / 28)


class Deep(OneShot):
    """``x = f1 f2 f3`` with a decay of the factors in the gradient; the draw is the library's, the map is not."""

    decayed, gain, alpha, options = (), 0.8, 0.02, {}

    def start(self, x):
        return mm.geometry.DeepProduct(**self.options).init(x)

    def phi(self, **factors):
        return math.prod(factors.values())

    def rate(self, latents):
        speed = 0.0
        for name in latents:
            others = math.prod(f for other, f in latents.items() if other != name)
            speed += float((others.abs() if self.adaptive else others**2).mean())
        return self.gain / speed

    def penalty(self, step):
        return self.alpha * sum(v.square().sum() for latents in self.theta for v in latents.values())


class Scaled(Exchange):
    """RigL, with the gradient of each row scaled by its share of living weights."""

    def before(self, step):
        for latents, mask in zip(self.theta, self.masks, strict=True):
            shares = [float(row.mean()) for row in mask]
            mean = sum(shares) / len(shares)
            for row, share in zip(latents["x"].grad, shares, strict=True):
                row.mul_(math.sqrt(share / mean))


class Growing:
    """Mixed into a reference of `mirror`: the decay waits for growth, and under Adam the score with it."""

    growth, sizes, integral, grown = 0.1, None, 0.0, 0.0

    def watched(self, step):
        """What the decay takes off in this step."""
        sizes = [math.log(float((x**4).mean()) ** 0.25) for x in self.weights()]
        self.sizes = self.sizes or sizes
        shares = [min(max(2 * (a - b) / self.growth - 1, 0.0), 1.0) for a, b in zip(sizes, self.sizes, strict=True)]
        self.grown = sum(s * m.numel() for s, m in zip(shares, self.masks, strict=True)) / self.total
        fall = min((4.0 - 4 * self.integral) / (30 - step), 2 * 4.0 / 28) if 2 <= step < 30 else 0.0
        self.integral += fall * self.grown / 4
        return fall * self.grown / 4

    def rank(self, x, index):
        rms = self.dense[index].square().mean(1, keepdim=True).sqrt()
        return x.abs() * (rms ** ((1 + self.grown) / 2) if self.adaptive else 1.0)


class GrowingMirror(Growing, Mirror):
    def before(self, step):
        self.shrink(self.watched(step))


class GrowingDescent(Growing, MirrorDescent):
    def before(self, step):
        self.old = [latents["u"].detach().clone() for latents in self.theta]
        keep = 1 - 2 * self.watched(step)
        self.scales = [a * keep**2 for a in self.scales]


class SignIn(Hadamard, AtStart):
    allocation = "erk"

    def start(self, x):
        self.betas = [*getattr(self, "betas", []), self.beta(x)]
        return super().start(x)

    def before(self, step):
        self.shrink(self.lr * 0.05)

    def after(self, t):
        if t % 4 == 0 and t <= 30:
            for latents, mask, beta in zip(self.theta, self.masks, self.betas, strict=True):
                x = (latents["m"] * latents["w"]) * mask
                m = ((beta + (beta**2 + 4 * x**2).sqrt()) / 2).sqrt()
                latents["w"].copy_(x / m * mask)
                latents["m"].copy_(m * mask)


class Power(OneShot):
    decayed, gain, p = (), 0.8, 3.0

    def start(self, x):
        return {"theta": x.sign() * x.abs() ** (1 / self.p)}

    def phi(self, theta):
        return theta * theta.abs() ** (self.p - 1)

    def rate(self, latents):
        slope = self.p * latents["theta"].abs() ** (self.p - 1)
        return float(self.gain / (slope.mean() if self.adaptive else slope.square().mean()))


class Str(Gmp):
    decayed, on, settled = ("w",), "w", False

    def start(self, x):
        g = 0.05 * x.square().mean().sqrt()
        return {"w": x.sign() * (x.abs() + g), "s": g.log().reshape(1)}

    def phi(self, w, s):
        with torch.no_grad():  # the gradient of s, divided by max(1, n g²)
            share = 1 / (s.exp() ** 2 * (w.abs() > s.exp()).sum()).clamp(min=1.0)
        return w.sign() * torch.relu(w.abs() - (share * s + (s - share * s).detach()).exp())

    def prune(self, sparsity):
        rank = [latents["w"].abs().log() - latents["s"] for latents in self.theta]
        masks = top(rank, self.keep(sparsity))
        kept = min(float(r[m].min()) for r, m in zip(rank, masks, strict=True) if m.any())
        gone = max(float(r[~m].max()) for r, m in zip(rank, masks, strict=True) if not m.all())
        for latents in self.theta:
            latents["s"].add_((kept + gone) / 2)
        if sparsity == self.sparsity:
            xs = self.weights()
            self.put(masks)
            for latents, x, mask in zip(self.theta, xs, masks, strict=True):
                latents["w"].copy_(x * mask)
                latents["s"].fill_(-1e4)


class Cs(Gmp):
    decayed, lam = ("w",), 0.01
    t = 0

    def start(self, x):
        s = torch.full_like(x, 0.2)
        return {"w": x / s.sigmoid(), "s": s}

    def tau(self, t):
        return 50.0 ** min(t / 30, 1.0)

    def phi(self, w, s):
        return w * torch.sigmoid(self.tau(self.t) * s)

    def penalty(self, step):
        return self.lam * sum(torch.sigmoid(self.tau(step) * latents["s"]).sum() for latents in self.theta)

    def after(self, t):
        self.t = t
        super().after(t)

    def prune(self, sparsity):
        rank = [latents["s"].clone() for latents in self.theta]
        masks = top(rank, self.keep(sparsity))
        kept = min(float(r[m].min()) for r, m in zip(rank, masks, strict=True) if m.any())
        gone = max(float(r[~m].max()) for r, m in zip(rank, masks, strict=True) if not m.all())
        for latents in self.theta:
            latents["s"].sub_((kept + gone) / 2)
        if sparsity == self.sparsity:
            xs = self.weights()
            self.masks = [m.double() for m in masks]
            for latents, x, mask in zip(self.theta, xs, masks, strict=True):
                latents["w"].copy_(x * mask)
                latents["s"].fill_(1e4)
                for v in latents.values():
                    for buffer in self.buffers(v):
                        buffer.mul_(mask)


class Rounds(Plain):
    """LTH (rewind 0), WR (rewind k) and LRR (rewind None): each round is a training of its own."""

    prunings, rewind = 3, 0

    def begin(self):
        k = self.rewind or 0
        self.first = round((STEPS + self.prunings * k) / (self.prunings + 1))
        later = (STEPS - self.first) / self.prunings
        self.bounds = [round(self.first + i * later) for i in range(self.prunings)]
        self.rates = [group["lr"] for group in self.base.param_groups]
        self.kept = None
        if self.rewind == 0:
            self.kept = self.everything()

    def everything(self):
        return [v.detach().clone() for group in self.base.param_groups for v in group["params"]]

    def schedule(self, position):
        return 1 / (1 + position)

    def before(self, step):
        done = [b for b in self.bounds if b <= step]
        self.position = step - done[-1] + (self.rewind or 0) if done else step
        for group, rate in zip(self.base.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule(self.position)
        super().before(step)

    def after(self, t):
        if t in self.bounds:
            i = self.bounds.index(t) + 1
            self.prune(1 - (1 - self.sparsity) ** (i / self.prunings))
            if self.kept is not None:
                tensors = [v for group in self.base.param_groups for v in group["params"]]
                for v, old in zip(tensors, self.kept, strict=True):
                    v.copy_(old)
                for latents, mask in zip(self.theta, self.masks, strict=True):
                    for v in latents.values():
                        v.mul_(mask)
                self.back()
            self.base.state.clear()
        if self.rewind and t == self.rewind:
            self.kept = self.everything()
            self.note()

    def note(self):
        pass

    def back(self):
        pass


class PilotRounds(Rounds, Pilot):
    decayed = ()
    saved = None

    def before(self, step):
        Rounds.before(self, step)

    def shrink(self, increment):
        super().shrink(increment * self.schedule(self.position))

    def note(self):
        self.saved = (self.alpha, self.score, self.first_norm())

    def first_norm(self):
        return self.norm

    norm = None

    def epoch_end(self, score, step):
        norm = sum(float(x.abs().sum()) for x in self.weights())
        self.norm = self.norm or norm
        grow = (self.score is None or score > self.score) and norm > self.K * self.norm and step / STEPS <= 0.5
        self.alpha = self.alpha * self.delta if grow else self.alpha / self.delta
        self.score = score

    def back(self):
        self.alpha, self.score, self.norm = self.saved
