# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From L2 to L1: watch the implicit bias change
#
# A weight trained as a product, `x = m * w`, does not end where a plain weight ends. Which solution it picks is decided by one number,
# the scale `a`: large, and it picks the solution of least L2 norm; small, and it picks the sparse one of least L1 norm.
# Decay makes `a` smaller while training goes on, and what it did stays when the decay is over.
#
# ![the penalty, its exponent, and how both change along a training](../docs/figures/flow/bias.svg)
#
# Left: the penalty of one weight, a parabola for a large `a` and nearly an absolute value for a small one. Below you can drag a slider through it.
#
# It needs `pip install '.[train]'`. Open it as a notebook (`jupytext --to ipynb implicit_bias.py`), or run it as a program
# (`python implicit_bias.py`), which prints the numbers and shows no figure.

# %%
import numpy as np
import plotly.graph_objects as go

from mirrormask import flow

# %% [markdown]
# ## The problem
#
# 40 equations, 100 unknowns, and a true answer with five nonzeros. Infinitely many solutions fit without error: the one of least L2 norm has 100
# nonzeros, the one of least L1 norm finds the five.

# %%
network, truth = flow.sparse_regression(seed=0, n=40, d=100, nonzeros=5)
least_l2, least_l1 = flow.min_l2(network.Z, network.y), flow.min_l1(network.Z, network.y)
print("nonzeros of least L2:", int((abs(least_l2) > 1e-6).sum()), " of least L1:", int((abs(least_l1) > 1e-6).sum()))

# %% [markdown]
# ## The solution that each scale picks
#
# Drag the slider. At the left the weights are spread over all 100 entries; at the right five are left.

# %%
scales = np.logspace(2, -6, 17)
solutions = [flow.minimize_potential(network.Z, network.y, a) for a in scales]
frames = [
    go.Frame(data=[go.Bar(y=np.abs(x))], name=f"{a:.0e}", layout={"title": f"a = {a:.0e}: |x|"})
    for a, x in zip(scales, solutions, strict=True)
]
figure = go.Figure(data=frames[0].data, layout=frames[0].layout, frames=frames)
steps = [{"label": frame.name, "method": "animate", "args": [[frame.name], {"mode": "immediate"}]} for frame in frames]
figure.update_layout(sliders=[{"steps": steps, "currentvalue": {"prefix": "a = "}}], yaxis_range=[0, 2.2])
figure

# %% [markdown]
# ## How far from each end
#
# The distance to both solutions, against the scale. The way from one to the other is slow: it goes with the logarithm of `a`.

# %%
size = np.linalg.norm(truth)
curves = go.Figure()
for name, end in (("to least L2", least_l2), ("to least L1", least_l1)):
    curves.add_scatter(x=scales, y=[np.linalg.norm(x - end) / size for x in solutions], name=name)
curves.update_layout(xaxis={"type": "log", "autorange": "reversed", "title": "a"}, yaxis_title="distance / |x*|")
curves

# %% [markdown]
# ## The exponent of the penalty
#
# At a weight of size 1 the implicit penalty grows like `|x|^p`. 2 is weight decay, 1 is the lasso. From `a = 100` to `1e-6` it falls from 2.00 to 1.07.

# %%
exponents = flow.effective_exponent(1.0, scales)
for a, p in zip(scales[::4], exponents[::4], strict=True):
    print(f"a = {a:8.0e}   p = {p:.2f}")

# %% [markdown]
# ## Its effect outlasts the decay
#
# Two trainings from the same start: one without decay, one with some for the first 60 units of time and none in the other 340.
# The scale stays where the decay has left it. So the second one goes on to the sparse solution, although nothing pulls on its weights any more:
# it ends 0.014 from the truth, the one without decay 0.801.

# %%
runs = {
    "no decay": network.flow(beta=1.0, time=400.0),
    "decay, then none": network.flow(beta=1.0, time=400.0, alpha=flow.SwitchedOff(0.05, 60.0)),
}
for name, run in runs.items():
    x = run.x[-1]
    print(f"{name:18} distance to the sparse truth {np.linalg.norm(x - truth) / size:.3f}")
assert np.linalg.norm(runs["decay, then none"].x[-1] - truth) < np.linalg.norm(runs["no decay"].x[-1] - truth)
