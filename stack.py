"""Many runs as one: models of one shape, each with its own weights and learning rates.

Small kernels leave a machine idle. Here R small runs are one stack: weights
(R, *shape), batches (R, B, ...), one batched product per layer, a learning rate
per replica and tensor. Each replica trains as torch.optim would train it alone,
to rounding.

    R replicas   B batch size   C classes   h inputs of a layer   δ = dloss/d(W h)
    χ = dloss_i/dlogits of a sample i

    nets = [Net() for lr in lrs]                            # any nn.Module, logits out
    rule = Rule("sgd", momentum=0.9)
    replicas = make(nets[0], [list(net.parameters()) for net in nets], lrs,
                    moments=rule.moments)
    model = module_network(nets[0], LOSSES["ce"])
    for step in range(steps):                               # x (R, B, ...), y (R, B)
        loss, = advance(replicas, x, y, model, rule, step)  # (R,)
    logits = model.forward(replicas["weights"], x)          # (R, B, C)

`drop_` removes replicas that diverged. A bias-free MLP has its backward pass
written out (`mlp_network`), with plain SGD fused into its products:
W <- W - lr δᵀh. Needs torch only; can be copied alone. Out of scope: dropout
and BatchNorm, which need state; CUDA graphs (`advance` waits for no value, but
x, y, factor and step would have to be tensors that stay).
"""
import math
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from collections.abc import Callable

import torch
from torch.func import functional_call, vmap


# ---- losses ----

# logits (..., C), targets (...) -> loss per sample (...), derivative χ (..., C).
# Under mse and huber targets may also be real-valued, (..., C).

def _minus_target(outputs, targets):
    """Return outputs (..., C) minus the one-hot or real-valued targets."""
    if targets.is_floating_point():
        return outputs - targets
    index = targets.unsqueeze(-1)
    return outputs.scatter_add(-1, index, outputs.new_full((), -1.0).expand(index.shape))


def ce(logits, targets):
    """Cross-entropy, as torch's cross_entropy."""
    log_p = logits.log_softmax(-1)
    loss = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return loss, _minus_target(log_p.exp(), targets)


def mse(logits, targets):
    """(logits - target)², mean over classes, as torch's MSELoss."""
    error = _minus_target(logits, targets)
    return error.square().mean(-1), error * (2 / logits.shape[-1])


def brier(logits, targets):
    """The same on softmax probabilities p."""
    p = logits.softmax(-1)
    loss, chi = mse(p, targets)
    return loss, p * (chi - (p * chi).sum(-1, keepdim=True))


def huber(logits, targets, delta=1.0):
    """Of errors e: e²/2 within delta, delta (|e| - delta/2) beyond; mean over classes,
    as torch's huber_loss."""
    error = _minus_target(logits, targets)
    inner = error.clamp(-delta, delta)
    return (inner * (error - inner / 2)).mean(-1), inner / logits.shape[-1]


def hinge(logits, targets, power=1):
    """Sum over wrong classes j of max(0, 1 - z_y + z_j)^power, divided by C,
    as torch's multi_margin_loss."""
    index, classes = targets.unsqueeze(-1), logits.shape[-1]
    violation = (1 - logits.gather(-1, index) + logits).clamp(min=0).scatter(-1, index, 0.0)
    chi = (violation > 0).to(logits.dtype) if power == 1 else 2 * violation
    chi = chi.scatter(-1, index, -chi.sum(-1, keepdim=True)) / classes
    return violation.pow(power).sum(-1) / classes, chi


LOSSES = {"ce": ce, "mse": mse, "brier": brier, "huber": huber, "hinge": hinge,
          "squared_hinge": partial(hinge, power=2)}


# ---- the loss of the best constant predictor ----

def constant_loss(loss, frequencies, delta=1.0):
    """Return the loss of the best constant logits z, given class frequencies p (C,).

    Minimizes the expected loss by L-BFGS, in O(C log C) a step; the hinge is a
    linear program with an exact solution. loss: a function of LOSSES. delta: huber's.
    """
    p, name = frequencies.double(), next(name for name in LOSSES if LOSSES[name] is loss)
    if name == "hinge":
        return _lowest_hinge(p)

    def separable(f, z):        # mean over classes j of E f(z_j - [j is the target])
        return ((1 - p) * f(z) + p * f(z - 1)).mean()

    def squared_hinge(z):       # the classes j with z_j > z_c - 1 violate c's margin
        z, order = z.sort()
        first = torch.searchsorted(z, z - 1)
        sums = [torch.cat([part.flip(0).cumsum(0).flip(0), part.new_zeros(1)])[first]
                for part in (torch.ones_like(z), z, z.square())]
        margin = 1 - z
        violations = margin.square() * sums[0] + 2 * margin * sums[1] + sums[2] - 1
        return p[order] @ violations / len(p)

    def huber_of(error):
        inner = error.clamp(-delta, delta)
        return inner * (error - inner / 2)

    return _minimum({
        "ce":            lambda z: z.logsumexp(0) - p @ z,
        "mse":           lambda z: separable(torch.square, z),
        "brier":         lambda z: separable(torch.square, z.softmax(0)),
        "huber":         lambda z: separable(huber_of, z),
        "squared_hinge": squared_hinge,
    }[name], p.clamp(min=1e-30).log() if name in ("ce", "brier") else p)


def constant_loss_of_targets(function, targets):
    """Return the loss of the best constant outputs for real-valued targets (N, K)."""
    y = targets.double()
    return _minimum(lambda z: _Expected.apply(z, function, y), y.mean(0))


class _Expected(torch.autograd.Function):
    """The mean loss of constant outputs z (K,), whose derivative the loss itself returns."""

    @staticmethod
    def forward(ctx, z, function, y):
        losses, chi = function(z.expand(len(y), -1), y)
        ctx.save_for_backward(chi.mean(0))
        return losses.mean()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None


def _minimum(expected, start):
    """Return the minimum of a smooth function of a vector by L-BFGS."""
    z = start.clone().requires_grad_()
    with torch.enable_grad():
        loss = expected(z)
        gradient, = torch.autograd.grad(loss, z)
    if gradient.abs().max() < 1e-12:        # as under cross-entropy and squared errors
        return loss.item()
    solver = torch.optim.LBFGS([z], max_iter=60, tolerance_grad=1e-10, tolerance_change=0.0,
                               line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = expected(z)
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
        return expected(z).item()


def _lowest_hinge(p):
    """Return the lowest expected hinge of constant logits.

    This linear program has a whole-numbered solution: logits -k for block k of
    the classes, sorted by frequency and cut at 0 = s_0 < s_1 < ... = C. With F(s)
    the mass of the s most frequent classes its loss is
    (sum_k s_(k+1) (1 - F(s_k)) - 1) / C, so that the lowest sum up to a cut t is
    lowest(t) = min over s < t of lowest(s) + t (1 - F(s)): an envelope of lines.
    """
    tail = [1.0, *(1 - p.sort(descending=True).values.cumsum(0)).tolist()]      # 1 - F(s)
    lines, lowest = deque([(tail[0], 0.0)]), 0.0        # (slope, intercept), falling slopes

    def crossing(a, b):
        return (b[1] - a[1]) / (a[0] - b[0])

    for t in range(1, len(tail)):
        while len(lines) > 1 and crossing(lines[0], lines[1]) <= t:
            lines.popleft()
        slope, intercept = lines[0]
        lowest = intercept + t * slope
        line = tail[t], lowest
        if line[0] < lines[-1][0]:      # else a class that never occurs: no gain
            while len(lines) > 1 and crossing(lines[-2], line) <= crossing(lines[-2], lines[-1]):
                lines.pop()
            lines.append(line)
    return (lowest - 1) / len(p)


# ---- replicas ----

# {"weights": [(R, *shape)], "lr": [(R, 1, ...)], ...}, a list entry per tensor

def make(model, initial, lr, weight_decay=0.0, eps=1e-8, moments=0,
         device="cpu", dtype=torch.float32):
    """Return the stack of R = len(initial) replicas of a model, a dict.

    initial: an iterable of R lists of weights, in the order of
    model.parameters(), or indices of earlier replicas that start with the same.
    lr, weight_decay, eps: a number, or one per replica, each a number or
    {parameter name: number}. moments: 0 for plain SGD, 1 for momentum, 2 for AdamW.
    """
    parameters, kind = dict(model.named_parameters()), {"dtype": dtype, "device": device}
    count = len(lr) if isinstance(lr, (list, tuple)) else len(initial)
    replicas = {"weights": [torch.empty(count, *p.shape, **kind) for p in parameters.values()]}

    initial = iter(initial)
    with torch.no_grad():
        for r in range(count):
            source = next(initial)
            for i, weights in enumerate(replicas["weights"]):
                weights[r].copy_(weights[source] if isinstance(source, int) else source[i])
            del source          # before the next one is drawn

    for key, values in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        values = values if isinstance(values, (list, tuple)) else [values] * count
        replicas[key] = []
        for name, p in parameters.items():
            column = [value[name] if isinstance(value, dict) else value
                      for value in values]      # (R,)
            replicas[key].append(torch.tensor(column, **kind).view(-1, *[1] * p.ndim))

    for moment in ("first", "second")[:moments]:
        replicas[moment] = [torch.zeros_like(weights) for weights in replicas["weights"]]
    return replicas


def drop_(replicas, keep):
    """Keep the replicas where keep (R,) is true, tensor after tensor."""
    if keep.all():
        return
    for key in ("grads", "calls"):      # steps make them anew
        replicas.pop(key, None)
    for tensors in replicas.values():
        for i, tensor in enumerate(tensors):
            tensors[i] = tensor[keep]


# ---- stacked models: logits and gradients of all replicas ----

class StackedModel(NamedTuple):
    """The functions of a model that is trained as a stack.

    forward(weights, x) -> logits (R, B, ..., C)
    gradients(weights, x, y, out) -> gradients [(R, *shape)] of mean losses,
        loss per sample (R, B, ...), logits;
        out: a list that keeps the gradients, and their memory for the next step
    sgd_step(weights, x, y, lr) -> loss, logits:
        gradients and plain SGD's update in one, or None
    """
    forward: Callable
    gradients: Callable
    sgd_step: "Callable | None" = None


def module_network(model, loss, alone=False):
    """Return any module as a StackedModel: autograd through vmap.

    With alone=True a stack of one bypasses vmap, which lets torch use flash
    attention. loss: a function of LOSSES.
    """
    names = [name for name, _ in model.named_parameters()]
    # every place of every parameter, several where tied
    slots = [(i, module._parameters, key) for i, w in enumerate(model.parameters())
             for module in model.modules()
             for key, p in module._parameters.items() if p is w]

    def is_single(weights):
        return alone and len(weights[0]) == 1

    @contextmanager
    def parameters_set(weights):
        """Let a stack of one that trains alone be the model's parameters."""
        places = slots if is_single(weights) else ()
        own = [owner[key] for _, owner, key in places]
        try:
            for i, owner, key in places:
                owner[key] = weights[i].squeeze(0)
            yield
        finally:
            for (_, owner, key), w in zip(places, own):
                owner[key] = w

    def forward(weights, x):
        if is_single(weights):      # functional_call costs a tenth of a small model's step
            with parameters_set(weights):
                logits = model(x[0])[None]
        else:
            logits = vmap(lambda w, x: functional_call(model, dict(zip(names, w)), x))(
                tuple(weights), x)
        # no loss in bfloat16
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def gradients(weights, x, y, out=None):
        leaves = [w.detach().requires_grad_() for w in weights]
        # set until the backward pass ends, which recomputes checkpointed activations
        with torch.enable_grad(), parameters_set(leaves):
            logits = forward(leaves, x)
            losses, chi = loss(logits.detach(), y)
            # Replicas meet nowhere: one backward pass serves all.
            grads = torch.autograd.grad(logits, leaves, chi.div_(losses[0].numel()),
                                        materialize_grads=True)
        return grads, losses, logits.detach()

    return StackedModel(forward, gradients)


def mlp_network(loss):
    """Return a bias-free ReLU MLP as a StackedModel: the textbook forward and backward pass.

    loss: a function of LOSSES.
    """
    def outputs(weights, x):
        # [x, hidden activations ..., logits], each (R, B, width)
        activations = [x]
        for w in weights:
            activations.append(torch.bmm(activations[-1], w.mT))
            if w is not weights[-1]:
                activations[-1].relu_()
        return activations

    def forward(weights, x):
        return outputs(weights, x)[-1]

    def backward(weights, x, y, use):
        """Call use(layer, δ, h) from the readout down; it may change δ and the layer's W."""
        *inputs, logits = outputs(weights, x)
        losses, delta = loss(logits, y)
        delta.div_(losses[0].numel())
        for l in reversed(range(len(weights))):
            below = torch.bmm(delta, weights[l]) if l > 0 else None
            use(l, delta, inputs[l])
            if l > 0:               # δ where h > 0, else 0
                below = torch.ops.aten.threshold_backward.default(below, inputs[l], 0)
            delta = below
        return losses, logits

    def gradients(weights, x, y, out=None):
        grads = [None] * len(weights) if out is None else out

        def keep(l, delta, h):
            grads[l] = torch.bmm(delta.mT, h, out=grads[l])
        return grads, *backward(weights, x, y, keep)

    def sgd_step(weights, x, y, lr):
        def update(l, delta, h):
            weights[l].baddbmm_(delta.mul_(lr[l]).mT, h, alpha=-1)
        return backward(weights, x, y, update)

    return StackedModel(forward, gradients, sgd_step)


# ---- optimizers ----

class Rule(NamedTuple):
    """The update of torch.optim.SGD ("sgd") or AdamW ("adam")."""
    optimizer: str
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    decay: bool = False     # whether there is any weight decay
    clip: float = 0.0       # largest gradient norm, or 0

    @property
    def is_plain_sgd(self):
        return self.optimizer == "sgd" and not (self.momentum or self.decay or self.clip)

    @property
    def moments(self):
        return 2 if self.optimizer == "adam" else int(self.momentum > 0)


def advance(replicas, x, y, model, rule, step=0, factor=1.0, parts=1, accuracy=False):
    """Take one optimizer step of every replica on x (R, B, ...), y (R, B, ...), in place.

    Returns means over the batch before the step: [loss (R,)], with accuracy
    [loss, accuracy]. model: a StackedModel. step counts from 0. factor multiplies
    every LR (a schedule). parts: parts of the batch (gradient accumulation).
    """
    if model.sgd_step and rule.is_plain_sgd and parts == 1:
        lr = replicas["lr"] if factor == 1 else [factor * lr for lr in replicas["lr"]]
        return _means(*model.sgd_step(replicas["weights"], x, y, lr), y, accuracy)

    grads, means_of_parts = None, []
    for x_part, y_part in zip(x.chunk(parts, 1), y.chunk(parts, 1)):
        # the first part's gradients go where those of the last step were
        out = (replicas.setdefault("grads", [None] * len(replicas["weights"]))
               if grads is None else None)
        part_grads, losses, logits = model.gradients(replicas["weights"], x_part, y_part, out)
        grads = (part_grads if grads is None
                 else [total.add_(part) for total, part in zip(grads, part_grads)])
        means_of_parts.append(_means(losses, logits, y_part, accuracy))
        del part_grads, losses, logits      # before those of the next part exist

    if parts > 1:
        torch._foreach_div_(grads, parts)
    if rule.clip:
        clip_(grads, rule.clip)
    update_(replicas, grads, rule, factor, step)
    return (means_of_parts[0] if parts == 1
            else [torch.stack(values).mean(0) for values in zip(*means_of_parts)])


def _means(losses, logits, y, accuracy):
    values = [losses, logits.argmax(-1) == y] if accuracy else [losses]
    return [value.to(logits.dtype).flatten(1).mean(1) for value in values]


def clip_(grads, largest):
    """Clip the gradient norm of each replica, as torch.nn.utils.clip_grad_norm_."""
    # a norm per replica and tensor, so that sums do not depend on R
    norms = torch._foreach_norm([of_replica for g in grads for of_replica in g])
    squares = torch.stack(norms).view(len(grads), -1).square()      # (tensors, R)
    factor = (largest / (sum(squares).sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, [factor.view(-1, *[1] * (g.ndim - 1)) for g in grads])


def update_(replicas, grads, rule, factor, step):
    """Take one step of torch.optim.SGD or AdamW on every replica, using up the gradients."""
    if rule.optimizer == "adam":
        return (fused_adamw_ if grads[0].is_cpu else foreach_adamw_)(
            replicas, grads, rule, factor, step)
    if rule.decay:
        torch._foreach_addcmul_(grads, replicas["weights"], replicas["weight_decay"])
    if rule.momentum:
        torch._foreach_mul_(replicas["first"], rule.momentum)
        torch._foreach_add_(replicas["first"], grads)
        grads = replicas["first"]
    torch._foreach_addcmul_(replicas["weights"], grads,
                            [-factor * lr for lr in replicas["lr"]])


def fused_adamw_(replicas, grads, rule, factor, step):
    """Take a step of AdamW by torch's fused kernel.

    It reads memory once, but takes one LR a call: one call for all that share theirs.
    """
    if "calls" not in replicas:
        replicas["calls"] = _fused_calls(replicas)
    count, grads = torch.tensor(step + 1.0), [g.contiguous().unbind() for g in grads]
    for (lr, decay, eps), members, w, m, v in replicas["calls"]:
        torch._fused_adamw_(
            w, [grads[i][r] for i, r in members], m, v, [], [count] * len(w),
            lr=factor * lr, beta1=rule.beta1, beta2=rule.beta2,
            weight_decay=decay, eps=eps, amsgrad=False, maximize=False)


def _fused_calls(replicas):
    """Return [((lr, weight decay, ε), [(tensor, replica)] that share them,
    weights, moments 1, 2)]."""
    groups = {}
    settings = zip(replicas["lr"], replicas["weight_decay"], replicas["eps"])
    for i, values in enumerate(settings):
        for r, key in enumerate(zip(*(value.flatten().tolist() for value in values))):
            groups.setdefault(key, []).append((i, r))
    kinds = ("weights", "first", "second")
    return [(key, members, *([replicas[kind][i][r] for i, r in members] for kind in kinds))
            for key, members in groups.items()]


def foreach_adamw_(replicas, grads, rule, factor, step):
    """Take a step of AdamW in a few calls however many replicas there are."""
    w, m, v = replicas["weights"], replicas["first"], replicas["second"]
    lrs = [factor * lr for lr in replicas["lr"]]
    root = math.sqrt(1 - rule.beta2 ** (step + 1))
    torch._foreach_lerp_(m, grads, 1 - rule.beta1)
    torch._foreach_mul_(v, rule.beta2)
    torch._foreach_addcmul_(v, grads, grads, 1 - rule.beta2)

    # W <- (1 - lr decay) W - lr size m / (√v + root ε), with moments whose bias is not corrected
    scale = torch._foreach_sqrt(v)
    torch._foreach_add_(scale, torch._foreach_mul(replicas["eps"], root))
    if rule.decay:
        torch._foreach_mul_(
            w, [1 - lr * decay for lr, decay in zip(lrs, replicas["weight_decay"])])
    size = root / (1 - rule.beta1 ** (step + 1))
    torch._foreach_addcmul_(w, torch._foreach_div(m, scale), [-lr * size for lr in lrs])
